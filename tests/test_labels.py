"""Labelled text: which places a phrase stands at, which edges follow, what a file may hold, which
causes and examples are trained on, and the game as a file."""
import random
import re

import pytest

from data import (NUMBER, STG, UserError, choose_causes, find, game_line, generate, hold_out,
                  inner_places, link, read)


# ----------------------------------------------------------------------------
# Numbers and phrases

@pytest.mark.parametrize("text, numbers", [
    ("COVID-19, COVID–19, F-16, v1.2.3", ""),
    ("PM2.5: 40, Vitamin B12: 30", "40 30"),
    ("5-6 days, wards 10–12, 7:50, 1/3 of 1,000. ", "5-6 10–12 7:50 1/3 1,000"),
    ("on 2024-05-06, a 0-100 scale, .5 and 1e-5", "2024-05-06 0-100 .5 1e-5"),
    ("Score: -6.9. (-5) $-3 −2, 4 - 2", "-6.9 -5 -3 −2 4 2"),
    ("38th; 73.8%; 10%-20%, 5°-7°", "38 73.8 10 20 5 7"),
])
def test_a_number_is_one_whole_value(text, numbers):
    assert NUMBER.findall(text) == numbers.split()


@pytest.mark.parametrize("phrase, marked", [  # «whole words and numbers», ‹inside a word›
    # Places inside words count only where there are no others.
    ("and", "Sandy «and» the sand"),
    ("age: 45", "mileage: 45, «age: 45»"),
    ("1", "«1» 10 1.5 15.0 -1 1/3 1e5 «1»"),
    ("kg", "5‹kg›, 15‹kg›"),
    ("5", "PM2.‹5›"),
    ("b", "a_‹b›"),
    # So does the case that is written.
    ("High", "«High» high"),
    ("High", "«HIGH» «high»"),
    # White space, quotes and accents may be written in other ways.
    (" 5 Apples\n", "has «5 \u00a0Apples» or 5 apples"),
    ("Tom's “old” car", "«Tom’s \"old\" car»"),
    ("cafe\u0301", "un «café»"),
    ("(A+B) [x]*", "«(a+b) [x]*»"),
    # Vowel signs, soft hyphens and zero-width joiners belong to their word.
    ("कम", "कमी «कम»"),
    ("Schiff", "‹Schiff›\u00adfahrt"),
    ("خواهم", "نمی\u200c‹خواهم›"),
    # A script without blanks has no words to be inside of.
    ("静", "陈«静»颜色"),
    # What is blank, not there, or in over 100 places is not found.
    (" ", "a a"),
    ("b", "a a"),
    ("a", "«a» " * 100),
    ("a", "a " * 101),
])
def test_where_a_phrase_stands(phrase, marked):
    text = re.sub("[«»‹›]", "", marked)
    spans, whole = find(text, phrase, inner_places(text))
    left, right = "«»" if whole else "‹›"
    for start, end in reversed(spans):
        text = text[:start] + left + text[start:end] + right + text[end:]
    assert text == marked


# ----------------------------------------------------------------------------
# Edges

def edges_in(example):
    """The edges as "effect <- cause", with their places in the text."""
    text = example.input + example.target
    edges = []
    for effect, cause in example.edges:
        edges.append(f"{text[slice(*effect)]} {effect[0]} <- {text[slice(*cause)]} {cause[0]}")
    return ", ".join(edges)


RISK = ("Weight: 4, Smoking: 8, high risk? Answer: ", "High Risk")


@pytest.mark.parametrize("texts, effect, cause, edges", [
    (RISK, "high risk", "weight", "High Risk 42 <- Weight 0"),  # in the target first
    (RISK, "Smoking", "Weight", "Smoking 11 <- Weight 0"),  # an effect in the question
    (("5 and 5 is ", "5"), "5", "5", "5 11 <- 5 0, 5 11 <- 5 6"),
    (("good? It is", "good"), "good", "is", "good 11 <- is 9"),  # right behind a letter
    (("x: 3 is ", "32"), "is 32", "3", "is 32 5 <- 3 3"),  # an effect across the border
    (("No: x ", "Now"), "No", "x", ""),  # "No" is whole in the question only, before x
])
def test_causes_before_their_effect_become_edges(texts, effect, cause, edges):
    example, _ = link(*texts, [(effect, [cause, cause])])  # named twice, it is one edge
    assert edges_in(example) == edges


@pytest.mark.parametrize("effect, cause, note", [
    ("No Risk", "Weight", "not found, or in over 100 places"),
    ("High Risk", "moking: 8", "found only inside words"),
    ("Smoking: 8", "4, Smoking", "not before its effect"),
])
def test_a_phrase_of_no_use_is_noted(effect, cause, note):
    _, notes = link(*RISK, [(effect, [cause])])
    assert [what for what, _ in notes] == [note]


# ----------------------------------------------------------------------------
# Files

def write(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text.encode(errors="surrogateescape"))
    return path


GOOD = ('{"input": "Café: 8 ", "target": "3", "important": {"3": ["Café: 8"]}, '
        '"spurious": ["8"]}')


@pytest.mark.parametrize("old, new", [
    ("", ""),
    ("{", "\ufeff{"),
    ('"target": "3"', '"target": 3'),
    ("é", "e\u0301"),
    ('["Café: 8"]', '"Café: 8"'),
    ('{"3": ["Café: 8"]}', '[{"3": ["Café: 8"]}]'),
    # null is a field that is not there, at every depth
    ('["Café: 8"]', '["Café: 8", null]'),
    ('{"3": ["Café: 8"]}', '[null, {"3": ["Café: 8"], "Nowhere": null}]'),
    ('["8"]', '["8", null]'),
    ('["8"]', '"8"'),
    ('["8"]', '["8"], "id": 7'),
])
def test_ways_to_write_an_example(tmp_path, old, new, capsys):
    path = write(tmp_path, GOOD.replace(old, new, 1) + "\n")
    example, = read(path)
    assert edges_in(example) == "3 8 <- Café: 8 0"
    assert example.spurious == [(6, 7)]
    assert capsys.readouterr().out == f"{path}: 1 examples, 1 of them with causes\n"


@pytest.mark.parametrize("label", [
    '"important": [{"3": ["Café"]}, {"effect": {"cause": ["x"]}}]',
    '"important": [{"3": ["Café"]}, {"effect": ["x", 3]}]',
    '"important": [{"3": ["Café"], "effect \\ud83d": ["x"]}]',  # half of an emoji
    '"important": [{"3": ["Café"]}, "effect"]',
    '"important": {"3": ["Café"]}, "spurious": [["effect"]]',
])
def test_a_malformed_label_is_left_out_and_shown_once(tmp_path, label, capsys):
    row = '{"input": "Café: 8 ", "target": "3", %s}' % label
    path = write(tmp_path, f"{row}\n{row}")
    for example in read(path):
        assert edges_in(example) == "3 8 <- Café 0"
    # Each wrong part holds the word "effect".
    _, note = capsys.readouterr().out.splitlines()
    assert re.fullmatch(f"{path}: no label: 2, the first .*effect.* in {path}:1", note)


@pytest.mark.parametrize("line, part", [
    ("{", "no JSON"),
    ("[" * 100_000, "no JSON"),
    ("3", "3 is no object: write "),
    ('{"target": "x"}', '"input" is not there'),
    ('{"input": "x", "target": NaN}', '"target" is NaN'),
    ('{"input": "x", "target": true}', '"target" is true'),
    ('{"input": " ", "target": "x"}', '"input" is " "'),
    ('{"input": "x", "target": "y", "target": "z"}', "the key 'target' stands twice"),
    ('{"input": "\udcff", "target": "x"}', '"input" is .*udcff": give a text, in UTF-8'),
])
def test_a_wrong_line_is_named_with_what_was_found(tmp_path, line, part):
    path = write(tmp_path, f"{GOOD}\n{line}\n{GOOD}")
    with pytest.raises(UserError, match=rf"^{path}:2: .*{part}.*\Z"):
        read(path)


def test_a_file_without_examples(tmp_path):
    path = write(tmp_path, "\n")
    with pytest.raises(UserError, match=f"^{path}: no examples: give "):
        read(path)


# ----------------------------------------------------------------------------
# Which causes to train with, and which examples

def chosen_causes(causes, how, spurious=("Fingers: 12",), seed=0):
    text = "Smoking: 8 of 10, Mood: fair, Fingers: 12, Room: 5, Gene: 7 Answer: "
    example, _ = link(text, "High", [("High", causes)], spurious, source="rows.jsonl:3")
    chosen = choose_causes(example, how, random.Random(seed))
    return [text[slice(*cause)] for _, cause in chosen.edges]


@pytest.mark.parametrize("how, chosen", [
    ("value", ["8", "10", "Mood: fair"]),  # each number of a phrase, or all of it
    ("span", ["Smoking: 8 of 10", "Mood: fair"]),
    ("spurious", ["12"]),
])
def test_the_causes_to_train_with(how, chosen):
    assert chosen_causes(["Smoking: 8 of 10", "Mood: fair"], how) == chosen


def test_random_causes_are_as_many_other_numbers_or_all_where_there_are_fewer():
    seen = set()
    for seed in range(20):
        first, second = chosen_causes(["Smoking: 8 of 10"], "random", seed=seed)
        seen.update([first, second])
    assert seen == {"12", "5", "7"}
    assert chosen_causes(["Smoking: 8 of 10", "12", "5"], "random") == ["7"]


def test_a_spurious_number_behind_an_effect_can_not_be_its_cause():
    example, _ = link("A: 1, B: 2, C: 3 ", "x", [("B", ["A"])], ["C: 3"])
    assert choose_causes(example, "spurious", random.Random(0)).edges == []


def test_without_spurious_phrases_they_can_not_be_the_causes():
    with pytest.raises(UserError, match=r'^rows.jsonl:3: no "spurious" .*--causes value\Z'):
        chosen_causes(["Mood"], "spurious", spurious=())


def test_hold_out_keeps_equal_inputs_on_one_side():
    examples = generate(STG, 20) * 2
    train, held_out = hold_out(examples, 0.25, seed=1)
    inputs = {example.input for example in held_out}
    assert (len(train), len(held_out), len(inputs)) == (30, 10, 5)  # both copies of each input
    assert held_out != hold_out(examples, 0.25, seed=2)[1]


@pytest.mark.parametrize("share", [0.01, 0.99, -0.5, float("nan")])
def test_a_share_that_leaves_a_side_empty(share):
    with pytest.raises(UserError, match=f"^--val is {share:g}: give .* 20 different inputs$"):
        hold_out(generate(STG, 20), share, 0)


# ----------------------------------------------------------------------------
# The game as a file

def test_a_game_that_is_written_to_a_file_comes_back_with_the_same_spans(tmp_path):
    examples = generate(STG, 100, ood=True)
    path = write(tmp_path, "".join(map(game_line, examples)))
    for before, after in zip(examples, read(path), strict=True):
        after.source = ""
        assert after == before


def test_names_that_clash_are_not_written():
    example, _ = link("weight: 4, Body weight: 4 ", "x", [("x", ["weight: 4"])])
    with pytest.raises(UserError, match="^'weight: 4' stands in 'Body weight: 4' too: rename"):
        game_line(example)
