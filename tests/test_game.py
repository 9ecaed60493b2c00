"""The Spurious Token Game: its rule, its copies that end out of distribution, and its spans."""
import math
import re

import pytest

from data import STG, Feature, Game, UserError, answer_to, generate

# A game of 3 * 3 * 2 * 2 = 36 questions.
SMALL = Game(
    causal=[Feature("Sun", high=3, weight=1.0), Feature("Rain", high=3, weight=-1.0)],
    spurious=[
        Feature("Ice cream", high=6, copies="Sun", ratio=2.0),
        Feature("Umbrellas", high=6, copies="Rain", ratio=0.5),
    ],
    irrelevant=[Feature("Day", high=2), Feature("Year", high=2)],
    question="How is the day? {features}. It is ",
    answers=[(1.0, "fine"), (0.0, "fair"), (-math.inf, "wet")],
)


def numbers_in(example):
    """{name: number} of a question, in its order."""
    items = re.findall(r"(?:[.?] |, )([A-Z][a-z ]+): (\d+)", example.input)
    return {name: int(number) for name, number in items}


def numbers_of(features, example):
    numbers = numbers_in(example)
    return [numbers[feature.name] for feature in features]


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


@pytest.mark.parametrize("ood", [False, True])
def test_the_answer_follows_the_rule(ood):
    for example in generate(STG, 1000, ood):
        numbers = numbers_in(example)
        tenths = 12 * numbers["Smoking"] + 7 * numbers["Weight"] - 10 * numbers["Exercise"]
        if tenths > 72:
            assert example.target == "High Risk"
        elif tenths >= 27:
            assert example.target == "Middle Risk"
        else:
            assert example.target == "Low Risk"


def test_in_distribution_spurious_numbers_copy_causal_ones():
    for example in generate(STG, 1000):
        numbers = numbers_in(example)
        assert numbers["Yellow fingers"] == 3 * numbers["Smoking"] // 2
        assert numbers["Clothing size"] == numbers["Weight"]
        assert numbers["Hormones"] == numbers["Exercise"] // 2


@pytest.mark.parametrize("feature", STG.spurious, ids=lambda feature: feature.name)
def test_out_of_distribution_every_spurious_number_goes_with_every_causal_one(feature):
    pairs = set()
    for example in generate(STG, 2000, ood=True):
        numbers = numbers_in(example)
        pairs.add((numbers[feature.name], numbers[feature.copies]))
    assert len(pairs) == 10 * 10  # Hormones of 6 to 10 too, which training never shows


def test_every_feature_stands_at_every_place():
    orders = set()
    for example in generate(STG, 300):
        orders.update(enumerate(numbers_in(example)))
    assert len(orders) == 8 * 8


# ----------------------------------------------------------------------------
# Spans

def test_spans_are_where_the_words_were_written():
    for example in generate(SMALL, 36):
        text = example.input + example.target
        numbers = numbers_in(example)
        effects = {text[slice(*effect)] for effect, _ in example.edges}
        causes = {text[slice(*cause)] for _, cause in example.edges}
        spurious = {text[slice(*span)] for span in example.spurious}
        assert effects == {example.target}
        assert causes == {f"Sun: {numbers['Sun']}", f"Rain: {numbers['Rain']}"}
        assert spurious == {
            f"Ice cream: {numbers['Ice cream']}", f"Umbrellas: {numbers['Umbrellas']}"}


# ----------------------------------------------------------------------------
# Seeds, and examples that differ

def test_the_same_seed_gives_the_same_examples():
    assert generate(STG, 50, seed=5) == generate(STG, 50, seed=5)


@pytest.mark.parametrize("features", [STG.causal, STG.spurious], ids=["causal", "spurious"])
def test_another_seed_gives_other_numbers(features):
    before = [numbers_of(features, example) for example in generate(STG, 50, ood=True, seed=5)]
    after = [numbers_of(features, example) for example in generate(STG, 50, ood=True, seed=6)]
    assert before != after


def test_out_of_distribution_other_questions_are_asked():
    iid = [numbers_of(STG.causal, example) for example in generate(STG, 50)]
    ood = [numbers_of(STG.causal, example) for example in generate(STG, 50, ood=True)]
    assert iid != ood


def test_another_spurious_seed_changes_spurious_numbers_only():
    before = generate(STG, 100, ood=True)
    after = generate(STG, 100, ood=True, spurious_seed=1)
    others = STG.causal + STG.irrelevant
    for one, other in zip(before, after, strict=True):
        assert numbers_of(STG.spurious, one) != numbers_of(STG.spurious, other)
        assert numbers_of(others, one) == numbers_of(others, other)
        assert list(numbers_in(one)) == list(numbers_in(other))  # the order of the features
        assert one.target == other.target


def test_examples_that_share_a_set_all_differ():
    seen = set()
    examples = generate(SMALL, 20, seen=seen)
    examples += generate(SMALL, 16, ood=True, seen=seen)
    questions = set()
    for example in examples:
        questions.add(tuple(numbers_of(SMALL.causal + SMALL.irrelevant, example)))
    assert len(questions) == 36


@pytest.mark.parametrize("wanted, before", [(0, 0), (37, 0), (17, 20)])
def test_the_game_has_36_examples_and_no_more(wanted, before):
    seen = set()
    if before > 0:
        generate(SMALL, before, seen=seen)
    with pytest.raises(UserError, match=rf"^{wanted} examples .* {before} others: .* the 36 .*\Z"):
        generate(SMALL, wanted, seen=seen)
