"""Labelled text: which places a phrase stands at, which edges follow, and what a file may hold."""
import json
import math
import os
import random
import re
from pathlib import Path

import pytest

from data import (NUMBER, STG, Example, Feature, Game, UserError, choose_causes, find, game_line,
                  generate, hold_out, inner_places, link, read)

RELEASED = os.environ.get("CAT_RELEASED_DATA")


def edges_in(example):
    """[(effect, cause)] as texts."""
    text = example.input + example.target
    return [(text[slice(*effect)], text[slice(*cause)]) for effect, cause in example.edges]


def spurious_in(example):
    return [example.input[slice(*span)] for span in example.spurious]


def write(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    return path


# ----------------------------------------------------------------------------
# Numbers and phrases

@pytest.mark.parametrize("text, numbers", [
    ("COVID-19, COVID–19, F-16, v1.2.3", ""),
    ("PM2.5: 40, Vitamin B12: 30", "40 30"),
    ("5-6 days, wards 10–12, 7:50, 1/3 of 1,000. ", "5-6 10–12 7:50 1/3 1,000"),
    ("on 2024-05-06, a 0-100 scale, .5 and 1e-5", "2024-05-06 0-100 .5 1e-5"),
    ("Score: -6.9. (-5) $-3 −2, 4 - 2", "-6.9 -5 -3 −2 4 2"),
    ("38th; 73.8%; 114.2Mbps. Then 3.5.", "38 73.8 114.2 3.5"),
    ("10%-20%, 5°-7°", "10 20 5 7"),
])
def test_a_number_is_one_whole_value(text, numbers):
    assert NUMBER.findall(text) == numbers.split()


def mark(text, phrase):
    """The text with «phrase» where it is found as whole words, or else ‹phrase› inside words."""
    spans, whole = find(text, phrase, inner_places(text))
    if whole:
        left, right = "«»"
    else:
        left, right = "‹›"
    for start, end in reversed(spans):
        text = text[:start] + left + text[start:end] + right + text[end:]
    return text


@pytest.mark.parametrize("phrase, marked", [
    # Whole words and numbers come first.
    ("and", "Sandy «and» the sand"),
    ("age: 45", "mileage: 45, «age: 45»"),
    ("1", "«1» 10 1.5 15.0 -1 1/3 1e5 «1»"),
    (".5", "2.5 and «.5»"),
    ("-5", "2-5 and «-5»"),
    ("000", "1,000 «000»"),
    ("kg", "5‹kg›, 15‹kg›"),
    ("5", "PM2.‹5›"),
    (".2", "v1‹.2›"),
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
    ("कम", "‹कम›ी"),
    ("म", "की‹म›"),
    ("Schiff", "‹Schiff›\u00adfahrt"),
    ("fahrt", "Schiff\u00ad‹fahrt›"),
    ("خواهم", "نمی\u200c‹خواهم›"),
    ("ष", "क\u200d‹ष›"),
    ("b", "a\u2060‹b›"),
    # A script without blanks has no words to be inside of.
    ("静", "陈«静»颜色"),
    # What is blank, not there, or in over 100 places is not found.
    (" ", "a a"),
    ("b", "a a"),
    ("a", "«a» " * 100),
    ("a", "a " * 101),
    ("a", "A " * 101 + "«a»"),
])
def test_where_a_phrase_stands(phrase, marked):
    text = re.sub("[«»‹›]", "", marked)
    assert mark(text, phrase) == marked


# ----------------------------------------------------------------------------
# Edges

RISK = ("Weight: 4, Smoking: 8, high risk? Answer: ", "High Risk")


@pytest.mark.parametrize("texts, effect, causes, edges", [
    (RISK, "High Risk", ["Smoking: 8"], [((42, 51), (11, 21))]),
    (RISK, "high risk", ["weight"], [((42, 51), (0, 6))]),  # in the target first
    (RISK, "Smoking", ["Weight"], [((11, 18), (0, 6))]),  # an effect within the question
    (("5 and 5 is ", "5"), "5", ["5", "5"], [((11, 12), (0, 1)), ((11, 12), (6, 7))]),
    (("good? It is", "good"), "good", ["is"], [((11, 15), (9, 11))]),  # right behind a letter
    (("x: 3 is ", "32"), "is 32", ["3"], [((5, 10), (3, 4))]),  # an effect across the border
    (("No: x ", "Now"), "No", ["x"], []),  # a whole word in the question, before its cause
])
def test_causes_before_their_effect_become_edges(texts, effect, causes, edges):
    example, _ = link(*texts, [(effect, causes)])
    assert example.edges == edges


@pytest.mark.parametrize("effect, cause, note", [
    ("High Risk", "Height", "not found, or in over 100 places"),
    ("No Risk", "Weight", "not found, or in over 100 places"),
    ("High Risk", "moking: 8", "found only inside words"),
    ("Smoking", "high risk", "not before its effect"),
    ("Smoking: 8", "4, Smoking", "not before its effect"),
])
def test_a_phrase_of_no_use_is_noted(effect, cause, note):
    _, notes = link(*RISK, [(effect, [cause])])
    assert [what for what, _ in notes] == [note]


def test_spurious_phrases_count_in_the_question_only():
    example, notes = link("Weight: 4, high risk: ", "High Risk", [], ["weight: 4", "High Risk"])
    assert example.spurious == [(0, 9), (11, 20)]
    assert notes == []


def test_text_without_blanks_gives_no_notes():
    _, notes = link("颜色：红，吸烟：是，答案：", "高", [("高", ["是"])], ["红"])
    assert notes == []


# ----------------------------------------------------------------------------
# Files

GOOD = '{"input": "Wert: 8 ", "target": "3", "important": {"3": ["Wert: 8"]}}'


@pytest.mark.parametrize("line", [
    GOOD,
    "\ufeff" + GOOD,
    GOOD + "\r",
    GOOD.replace('"target": "3"', '"target": 3'),
    GOOD.replace('["Wert: 8"]', '"Wert: 8"'),
    GOOD.replace('{"3": ["Wert: 8"]}', '[{"3": ["Wert: 8"]}]'),
    # null is a field that is not there, at every depth
    GOOD.replace('["Wert: 8"]', '["Wert: 8", null]'),
    GOOD.replace('{"3": ["Wert: 8"]}', '[null, {"3": ["Wert: 8"], "Nowhere": null}]'),
    GOOD.replace("}}", '}, "spurious": null, "id": 7}'),
    GOOD.replace("}}", '}, "spurious": [null]}'),
])
def test_ways_to_write_an_example(tmp_path, line, capsys):
    path = write(tmp_path, line)
    [example] = read(path)
    assert example == Example("Wert: 8 ", "3", [((8, 9), (0, 7))], [], f"{path}:1")
    assert capsys.readouterr().out == f"{path}: 1 examples, 1 of them with causes\n"


def test_accents_are_one_character_and_empty_lines_are_none(tmp_path):
    path = write(tmp_path, "", '{"input": "Cafe\u0301 ", "target": "x", "important": null}', "")
    assert read(path) == [Example("Café ", "x", [], [], f"{path}:2")]


@pytest.mark.parametrize("label", [
    {"effect": {"cause": ["x"]}},
    {"effect": ["x", 3]},
    {"effect \ud83d": ["x"]},  # half of an emoji
    "effect",
])
def test_a_malformed_label_is_left_out_and_shown_once(tmp_path, label, capsys):
    important = [label, {"y": ["a"]}]
    row = json.dumps({"input": "a ", "target": "y", "important": important})
    path = write(tmp_path, GOOD, row, row)
    examples = read(path)
    assert [edges_in(example) for example in examples[1:]] == [[("y", "a")]] * 2
    _, note = capsys.readouterr().out.splitlines()
    assert re.fullmatch(f"{path}: no label: 2, the first .*effect.* in {path}:2", note)


def test_a_spurious_phrase_that_is_no_text_is_left_out(tmp_path, capsys):
    path = write(tmp_path, GOOD.replace("}}", '}, "spurious": ["Wert", 8]}'))
    assert read(path)[0].spurious == [(0, 4)]
    assert f"no label: 1, the first 8 in {path}:1" in capsys.readouterr().out


@pytest.mark.parametrize("line, part", [
    ("{", "no JSON"),
    ("[" * 100_000, "no JSON"),
    ("3", "3 is no object: write "),
    ('{"target": "x"}', '"input" is not there'),
    ('{"input": "x", "target": null}', '"target" is null'),
    ('{"input": "x", "target": NaN}', '"target" is NaN'),
    ('{"input": "x", "target": -1e999}', '"target" is -Infinity'),
    ('{"input": "x", "target": true}', '"target" is true'),
    ('{"input": ["x"], "target": "x"}', r'"input" is \["x"\]'),
    ('{"input": " ", "target": "x"}', '"input" is " "'),
    ('{"input": "x", "target": "y", "target": "z"}', "the key 'target' stands twice"),
    (GOOD.replace("}}", ', "3": "Wert"}}'), "the key '3' stands twice"),
    ('{"input": "\udcff", "target": "x"}', '"input" is .*udcff": give a text, in UTF-8'),
    ('{"input": "\\ud83d", "target": "x"}', '"input" is .*ud83d": give'),
])
def test_a_wrong_line_is_named_with_what_was_found(tmp_path, line, part):
    path = write(tmp_path, GOOD, line, GOOD)
    with pytest.raises(UserError, match=rf"^{path}:2: .*{part}.*\Z"):
        read(path)


def test_a_file_without_examples(tmp_path):
    path = write(tmp_path, "", "")
    with pytest.raises(UserError, match=f"^{path}: no examples: give "):
        read(path)


# ----------------------------------------------------------------------------
# Which causes to train with, and which examples

CARD, _ = link("Smoking: 8 of 10, Mood: fair, Fingers: 12, Room: 5, Gene: 7 Answer: ", "High",
               [("High", ["Smoking: 8 of 10", "Mood: fair"])], ["Fingers: 12"])


@pytest.mark.parametrize("how, causes, spurious", [
    ("value", ["8", "10", "Mood: fair"], ["12"]),  # each number of a phrase, or all of it
    ("span", ["Smoking: 8 of 10", "Mood: fair"], ["Fingers: 12"]),
    ("spurious", ["12"], ["12"]),
])
def test_the_causes_to_train_with(how, causes, spurious):
    chosen = choose_causes(CARD, how, random.Random(0))
    assert edges_in(chosen) == [("High", cause) for cause in causes]
    assert spurious_in(chosen) == spurious


def test_random_causes_are_as_many_other_numbers():
    rng, seen = random.Random(0), set()
    example, _ = link(CARD.input, "High", [("High", ["Smoking: 8 of 10"])])
    for _ in range(20):
        first, second = edges_in(choose_causes(example, "random", rng))
        assert first != second
        seen.update([first, second])
    assert seen == {("High", "12"), ("High", "5"), ("High", "7")}


def test_random_causes_are_all_others_where_there_are_fewer():
    example, _ = link("A: 1, B: 2, C: 3 ", "x", [("x", ["A: 1", "B: 2"])])
    assert edges_in(choose_causes(example, "random", random.Random(0))) == [("x", "3")]


def test_a_spurious_number_behind_an_effect_can_not_be_its_cause():
    example, _ = link("A: 1, B: 2, C: 3 ", "x", [("B", ["A"])], ["C: 3"])
    assert edges_in(choose_causes(example, "spurious", random.Random(0))) == []


def test_without_spurious_phrases_they_can_not_be_the_causes():
    example, _ = link("A: 1 ", "x", [("x", ["A: 1"])], source="rows.jsonl:3")
    with pytest.raises(UserError, match=r'^rows.jsonl:3: no "spurious" .*--causes value\Z'):
        choose_causes(example, "spurious", random.Random(0))


def test_hold_out_keeps_equal_inputs_on_one_side():
    examples = generate(STG, 20) * 2
    train, held_out = hold_out(examples, 0.25, seed=1)
    trained = {example.input for example in train}
    held = {example.input for example in held_out}
    assert len(train) == 30
    assert len(held_out) == 10
    assert not trained & held
    assert held_out != hold_out(examples, 0.25, seed=2)[1]


@pytest.mark.parametrize("share", [0, 0.01, 0.99, 1, -0.5, math.inf, math.nan])
def test_a_share_that_leaves_a_side_empty(share):
    with pytest.raises(UserError, match=f"^--val is {share:g}: give .* 20 different inputs$"):
        hold_out(generate(STG, 20), share, 0)


# ----------------------------------------------------------------------------
# The game as a file, and the authors' files

def test_a_game_that_is_written_to_a_file_comes_back_with_the_same_spans(tmp_path):
    for ood in (False, True):
        examples = generate(STG, 100, ood)
        path = write(tmp_path, "".join(game_line(example) for example in examples))
        for before, after in zip(examples, read(path), strict=True):
            assert after.input + after.target == before.input + before.target
            assert after.edges == before.edges
            assert after.spurious == before.spurious


def test_names_that_clash_are_not_written():
    game = Game([Feature("weight", weight=1.0)], [], [Feature("Body weight")], "{features}: ",
                [(0.0, "x")])
    examples = generate(game, 100)
    clashes = [example for example in examples if example.input.count(": 4") == 2]
    with pytest.raises(UserError, match="^'weight: 4' stands in 'Body weight: 4' too: rename"):
        game_line(clashes[0])


@pytest.mark.skipif(not RELEASED, reason="set CAT_RELEASED_DATA to the authors' data")
def test_the_authors_causes_are_found_where_the_game_writes_them():
    for example in read(Path(RELEASED, "STG", "spurious_token_game_train3.jsonl")):
        numbers = dict(re.findall(r"(\w+): (\d+)", example.input))
        causes = [numbers["Smoking"], numbers["Weight"], numbers["Exercise"]]
        edges = edges_in(choose_causes(example, "value", random.Random(0)))
        assert sorted(edges) == [(example.target, cause) for cause in sorted(causes)]
