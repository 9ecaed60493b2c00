"""Numbers, phrases to edges, JSON Lines, and examples with other numbers or another order."""
import math
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from data import (NUMBER, STG, STG_H, Example, dump, find, generate, hold_out, main,
                  phrases_to_edges, read, redraw, reorder)


@pytest.mark.parametrize("text, numbers", [
    ("COVID-19, COVID–19, F-16, v1.2.3", []), ("PM2.5: 40, Vitamin B12: 30", ["40", "30"]),
    ("5-6 days, wards 10–12, 7:50, 1/3 of 1,000. ", ["5-6", "10–12", "7:50", "1/3", "1,000"]),
    ("on 2024-05-06, a 0-100 scale, .5 and 1e-5", ["2024-05-06", "0-100", ".5", "1e-5"]),
    ("Score: -6.9. (-5) $-3 −2, 4 - 2", ["-6.9", "-5", "-3", "−2", "4", "2"]),
    ("38th; 73.8%; 114.2Mbps. Then 3.5.", ["38", "73.8", "114.2", "3.5"]),
    ("10%-20%, 5°-7°", ["10", "20", "5", "7"])])
def test_a_number_is_one_whole_value(text, numbers):
    assert NUMBER.findall(text) == numbers


@pytest.mark.parametrize("text, phrase, found", [  # [(start, what stands there)]
    ("1 10 1.5 15.0 -1 1/3 1e5 1", "1", [(0, "1"), (25, "1")]),
    ("5.0 15.0 5.05 5.0.", "5.0", [(0, "5.0"), (14, "5.0")]), ("2-5 and -5", "-5", [(8, "-5")]),
    ("2.5 and .5", ".5", [(8, ".5")]), ("1,000 000", "000", [(6, "000")]),
    ("Sandy and the sand", "and", [(6, "and")]), ("least east", "east", [(6, "east")]),
    ("mileage: 45, age: 45", "age: 45", [(13, "age: 45")]),
    ("5kg, 15kg", "kg", []), ("PM2.5", "5", []), ("a a", " ", []), ("a a", "", []),  # none whole
    ("High high", "High", [(0, "High")]), ("HIGH high", "High", [(0, "HIGH"), (5, "high")]),
    ("has 5 \u00a0apples", " 5 apples\n", [(4, "5 \u00a0apples")]),
    ("Tom’s “old” car", "tom's \"old\" car", [(0, "Tom’s “old” car")]),
    ("un café", "cafe\u0301", [(3, "café")]), ("é: İ 3", "É: İ 3", [(0, "é: İ 3")]),
    ("(a+b) [x]*", "(A+B) [x]*", [(0, "(a+b) [x]*")])])
def test_a_phrase_stands_at_word_boundaries_in_any_white_space_quotes_and_accents(
        text, phrase, found):
    spans = find(text, phrase, notes := [])
    assert [(a, text[a:b]) for a, b in spans if ("inside words", phrase) not in notes] == found


def linked(input, target, *important):
    """The edges as [(effect, its start, cause, its start)], and the notes."""
    edges, _, _, notes = phrases_to_edges(Example(input, target, important))
    text = input + target
    return [(text[slice(*e)], e[0], text[slice(*c)], c[0]) for e, c in edges], notes


RISK = "Weight: 4, Smoking: 8, high risk? Answer: ", "High Risk"


@pytest.mark.parametrize("texts, important, edges, notes", [
    (RISK, [{"High Risk": ["Smoking: 8", "weight: 4", "Height: 1"]}],
     [("High Risk", 42, "Smoking: 8", 11), ("High Risk", 42, "Weight: 4", 0)],
     [("not found", "Height: 1")]),
    (RISK, [{"high risk": ["Weight"]}], [("High Risk", 42, "Weight", 0)], []),  # the target first
    (RISK, [{"Smoking": ["Weight", "high risk"]}, {"No": ["Weight"]}],
     [("Smoking", 11, "Weight", 0)], [("late", "high risk"), ("not found", "No")]),
    (("5 and 5 Answer: ", "5"), [{"5": ["5", "5"]}], [("5", 16, "5", 0), ("5", 16, "5", 6)], []),
    (("It is:", "positive"), [{"positive": ["is:"]}], [("positive", 6, "is:", 3)], []),
    (("Room: 3 Answer: ", "32"), [{"Answer: 32": ["3"]}], [("Answer: 32", 8, "3", 6)], []),
    # a cause that overlaps its effect is none
    (("a b c ", "d"), [{"b c": ["a b", "a"]}], [("b c", 2, "a", 0)], [("late", "a b")]),
    # a place inside a word is the last resort, after whole places outside the target
    (("It causes rain and Sandy: ", "Now"), [{"Now": ["cause", "and"]}],
     [("Now", 26, "cause", 3), ("Now", 26, "and", 15)], [("inside words", "cause")]),
    (("No: x ", "Now"), [{"No": ["x"]}], [], [("late", "x")]),
    # a phrase that stands everywhere gives no edges
    (("a " * 2000, "x"), [{"x": [" ", "a"]}, {"a": ["a"]}], [],
     [("not found", " "), ("not found", "a"), ("not found", "a")]),
    (("a " * 50, "x"), [{"x": ["a"]}], [("x", 100, "a", 2 * n) for n in range(50)], [])])
def test_phrases_become_edges(texts, important, edges, notes):
    assert linked(*texts, *important) == (edges, notes)


GOOD = '{"input": "Wert: 8 e\u0301 ", "target": 3, "important": {"3": "Wert: 8", "3": ["é"]}}'


def write(tmp_path, text):
    path = tmp_path / "examples.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_reads_bom_crlf_blank_lines_numbers_accents_and_equal_effects(tmp_path, capsys):
    path = write(tmp_path, "\ufeff" + GOOD + "\r\n\r\n" + GOOD.replace("3", "4.5") + "\n\n")
    examples = read(path)
    assert [(e.input, e.target) for e in examples] == [("Wert: 8 é ", "3"), ("Wert: 8 é ", "4.5")]
    assert examples[0].important == ({"3": ["Wert: 8", "é"]},)
    assert examples[1].source == f"{path}:3"
    assert capsys.readouterr().out == (
        f"{path}: 2 examples; 2 with edges; 2 with edges at the answer\n")


def test_the_summary_counts_what_is_not_used(tmp_path, capsys):
    path = write(tmp_path, "".join(
        dump(Example("Weight: 4, Room: 5 ", "x", ({effect: [cause]},))) for effect, cause in (
            ("x", "Weigth: 4"), ("Room", "Weight: 4"), ("x", "oom: 5"), ("Weight", "Room"))))
    read(path)
    assert capsys.readouterr().out == (
        f"{path}: 4 examples; 2 with edges; 1 with edges at the answer; "
        f"1 phrases not found, such as 'Weigth: 4' in {path}:1; "
        f"1 phrases inside words, such as 'oom: 5' in {path}:3; "
        f"1 phrases late, such as 'Room' in {path}:4\n")


@pytest.mark.parametrize("line", [
    b"{", b"[" * 100000, b"3", b'{"input": "x"}', b"\xff", b'{"input": "\\ud800", "target": "x"}',
    b'{"input": "x", "target": true}', b'{"input": " ", "target": "x"}',
    b'{"input": "x", "target": "y", "important": ["z"]}',
    b'{"input": "x", "target": "y", "important": {"y": [3]}}',
    b'{"input": "x", "target": "y", "spurious": [3]}'])
def test_a_bad_line_names_file_line_and_remedy(tmp_path, line):
    path = write(tmp_path, GOOD.encode() + b"\n" + line + b"\n" + GOOD.encode())
    with pytest.raises(ValueError, match=rf"^{path}:2: .*is no example: write [^\n]*\Z"):
        read(path)


texts = lambda examples: {example.input for example in examples}


def edge_texts(example):
    text = example.input + example.target
    return [(text[slice(*e)], text[slice(*c)]) for e, c in phrases_to_edges(example)[0]]


def test_hold_out_splits_no_twins_and_changes_spurious_phrases_alone():
    games = generate(STG, 300, seed=8)
    train, held = hold_out(games * 2, 0.5, 1)
    iid = texts(held["iid"])
    assert not texts(train) & iid and len(texts(train)) == len(iid) == 150
    assert Counter(e.input for e in held["iid"]) == dict.fromkeys(iid, 2)
    assert 250 < len(held["ood"]) <= 300 and not texts(games) & texts(held["ood"])
    assert all(len(edge_texts(example)) == 3 for example in held["ood"])  # no cause has changed
    words = [Example(f"word{'x' * n} ", "y", ({"y": ["word"]},)) for n in range(9)]
    assert hold_out(words, 0.3, 0)[1]["ood"] == []  # no OOD that is IID's twin
    assert hold_out(words, 0.3, 0) != hold_out(words, 0.3, 1)
    for share in (0, 1, 0.99, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"--val is {share}: give"):
            hold_out(words, share, 0)


@pytest.mark.parametrize("game", [STG, STG_H])
def test_redrawn_and_reordered_examples_keep_causes_answers_and_names(game):
    names = lambda example: [phrase.split(":")[0] for phrase in example.spurious]
    examples, changed, rng, orders = generate(game, 60, seed=3), 0, random.Random(0), set()
    for before, after in zip(examples, redrawn := redraw(examples, 1), strict=True):
        assert edge_texts(before) == edge_texts(after) != [] and before.target == after.target
        assert after.spurious in [e.spurious for e in examples] and names(before) == names(after)
        assert all(phrase in after.input for phrase in after.spurious)
        changed += before.input != after.input
        other = reorder(before, rng)
        assert sorted(other.input) == sorted(before.input)
        assert edge_texts(other) == edge_texts(before)
        orders.add(tuple(other.input.index(f"{f.name}: ") < other.input.index(f"{g.name}: ")
                         for f in game.causal for g in game.causal))
    assert changed > 50 and len(orders) > 5
    assert len({e.spurious for e in redrawn}) > 20 and redrawn != redraw(examples, 2)


def test_redrawn_phrases_change_places_at_once_and_leave_causes_alone():
    examples = [Example(", ".join(some) + ". ", "x", ({"x": ["mild"]},), some) for some in (
        ("red car", "blue"), ("green bus", "red car"), ("mild", "car"), ("black",))]
    drawn = [texts(redraw(examples, seed)[n:n + 1]).pop() for seed in range(30) for n in range(4)]
    assert {*drawn} == texts(examples)  # "mild" is a cause


def test_reorder_leaves_an_example_alone_that_would_change_its_meaning():
    rng = random.Random(0)
    for example in [Example("A: 1, B: 2 ", "x", ({"x": ["A: 1, B: 2"]},)),
                    Example("A: 1, B: 2 ", "x", spurious=("1, B: 2",)), Example("No item", "x"),
                    Example("Weight: 4 kg, Room: 5 ", "x"), Example("A: 1, or is it B: 2? ", "x"),
                    Example("Day: 1, Price: 5, day: 2, Price: 7 ", "x")]:
        assert all(reorder(example, rng) == example for _ in range(9))
    inner = Example("A: 1, B: 2, C: 3 Answer: ", "x", ({"2": ["1"]},))
    changed = {reorder(inner, rng).input.removesuffix(" Answer: ") for _ in range(40)}
    assert changed == {"A: 1, B: 2, C: 3", "A: 1, C: 3, B: 2", "C: 3, A: 1, B: 2"}  # B after A
    whole = Example("PM2.5: 40, Score: 8/10 ", "x")
    assert {reorder(whole, rng).input for _ in range(9)} == {whole.input, "Score: 8/10, PM2.5: 40 "}


def test_show_says_what_should_look_at_what(tmp_path, capsys):
    path = write(tmp_path, "\n" + "".join(map(dump, (
        Example("陈静 ", "x", ({"x": ["静"]},)),
        Example("Age: 8, Tax: 5 ", "7", ({"7": ["Tax: 5", "Age"]},))))))
    for row, lines in (1, ["陈静 x", "'x' at 3 should look at '静' at 1"]), (
            2, ["Age: 8, Tax: 5 7", "'7' at 15 should look at '5' at 13",
                "'7' at 15 should look at 'Age' at 0"]):
        main(["show", str(path), "--row", str(row)])
        assert capsys.readouterr().out.splitlines()[1:] == lines


def test_command_line(tmp_path, capsys):
    out, none = str(tmp_path / "game.jsonl"), str(tmp_path / "none.jsonl")
    main(["generate", "STG_H", "--rows", "20", "--ood", "--seed", "4", "--out", out])
    assert [replace(e, source="") for e in read(out)] == generate(STG_H, 20, True, 4)
    empty = str(write(tmp_path, "\n"))
    for args, part in [(["show", none], "none.jsonl"), (["show", empty], "no examples: give one"),
                       (["generate", "STG", "--rows", "0", "--out", none], "rows is 0"),
                       (["generate", "STG", "--out", none + "/x"], "none.jsonl/x")]:
        with pytest.raises(SystemExit) as stop:
            main(args)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and part in error and error.count("\n") == 1
    assert not Path(none).exists()
