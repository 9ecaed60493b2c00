"""The Spurious Token Game: its rule, its copies that end out of distribution, its spans, and the
seeds that tell its examples apart."""
import re
from dataclasses import replace

import pytest

from data import STG, UserError, answer_to, generate

SMALL = replace(STG, irrelevant=[])  # three causal numbers make 1,000 questions


def numbers_in(example):
    """{name: number} of a question, in its order."""
    items = re.findall(r"([A-Z][a-z ]+): (\d+)", example.input)
    return {name: int(number) for name, number in items}


def numbers_of(features, examples):
    """The numbers of some features in each example."""
    rows = []
    for example in examples:
        numbers = numbers_in(example)
        rows.append(tuple(numbers[feature.name] for feature in features))
    return rows


# ----------------------------------------------------------------------------
# Answers and numbers

@pytest.mark.parametrize("smoking, weight, exercise, answer", [
    (9, 5, 7, "High Risk"),  # 10.8 + 3.5 - 7 = 7.3
    (6, 10, 7, "Middle Risk"),  # 7.2
    (4, 7, 7, "Middle Risk"),  # 2.7, and as floats a little less
    (3, 10, 8, "Low Risk"),  # 2.6
])
def test_the_bands_of_the_answers(smoking, weight, exercise, answer):
    numbers = {"Smoking": smoking, "Weight": weight, "Exercise": exercise}
    assert answer_to(STG, numbers) == answer


def test_the_answer_is_that_of_the_numbers():
    for example in generate(STG, 100) + generate(STG, 100, ood=True):
        assert example.target == answer_to(STG, numbers_in(example))


def test_in_distribution_spurious_numbers_copy_causal_ones():
    for example in generate(STG, 1000):
        numbers = numbers_in(example)
        assert numbers["Yellow fingers"] == 3 * numbers["Smoking"] // 2
        assert numbers["Clothing size"] == numbers["Weight"]
        assert numbers["Hormones"] == numbers["Exercise"] // 2


def test_out_of_distribution_every_spurious_number_goes_with_every_causal_one():
    examples = generate(STG, 2000, ood=True)
    for causal, spurious in zip(STG.causal, STG.spurious):
        pairs = set(numbers_of([causal, spurious], examples))
        assert len(pairs) == 10 * 10  # Hormones of 6 to 10 too, which training never shows


def test_every_feature_stands_at_every_place():
    places = set()
    for example in generate(STG, 300):
        places.update(enumerate(numbers_in(example)))
    assert len(places) == 8 * 8


def test_the_text_and_the_spans_of_a_question():
    example, = generate(SMALL, 1)
    text = example.input + example.target
    written = re.findall(r"[A-Z][a-z ]+: \d+", text)
    causes = [text[slice(*cause)] for _, cause in example.edges]
    spurious = [text[slice(*span)] for span in example.spurious]
    assert example.input == SMALL.question.format(features=", ".join(written))
    assert {text[slice(*effect)] for effect, _ in example.edges} == {example.target}
    assert causes == re.findall(r"(?:Smoking|Weight|Exercise): \d+", text)
    assert sorted(causes + spurious) == sorted(written)  # nothing in it is irrelevant


# ----------------------------------------------------------------------------
# Seeds, and examples that differ

def test_a_seed_decides_all_numbers():
    before = generate(STG, 50, ood=True, seed=5)
    after = generate(STG, 50, ood=True, seed=6)
    assert before == generate(STG, 50, ood=True, seed=5)
    assert numbers_of(STG.causal, before) != numbers_of(STG.causal, after)
    assert numbers_of(STG.spurious, before) != numbers_of(STG.spurious, after)


def test_another_spurious_seed_changes_spurious_numbers_only():
    before = generate(STG, 100, ood=True)
    after = generate(STG, 100, ood=True, spurious_seed=1)
    others = STG.causal + STG.irrelevant
    assert numbers_of(STG.spurious, before) != numbers_of(STG.spurious, after)
    assert numbers_of(others, before) == numbers_of(others, after)


def test_examples_that_share_a_set_all_differ():
    seen = set()
    examples = generate(SMALL, 600, seen=seen) + generate(SMALL, 400, ood=True, seen=seen)
    assert len(set(numbers_of(SMALL.causal, examples))) == 1000


@pytest.mark.parametrize("wanted, before", [(0, 0), (1001, 0), (1, 1000)])
def test_none_or_more_than_the_1000_examples_are_refused(wanted, before):
    seen = set(range(before))
    with pytest.raises(UserError, match=f"^{wanted} examples .* {before} others: .* the 1000 that"):
        generate(SMALL, wanted, seen=seen)
