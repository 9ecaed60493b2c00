"""The game, the tokenizer, the shift by one, phrases to edges, and reading: against independent parses and hand-made files."""
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from data import (END, GAMES, ROLES, STG, STG_H, Example, Game, adjacency_of, build_tokenizer, describe, dump, encode, generate,
                  link, main, occurrences, read, reorder, shuffle_numbers)

RELEASED = os.environ.get("CAT_RELEASED_DATA")
needs_released = pytest.mark.skipif(not RELEASED, reason="set CAT_RELEASED_DATA to the folder of the authors' released data")


def tokenizer_of(examples):
    return build_tokenizer([e.input + e.target for e in examples])


def parse_numbers(text):
    """{name: number} of a game's text, by its own reading of it."""
    return {name.strip(): float(number) for name, number in re.findall(r"([A-Z][A-Za-z ()]*): (-?\d+(?:\.\d+)?)", text)}


@pytest.mark.parametrize("ood", [False, True])
def test_labels_follow_the_rule(ood):
    for example in generate(STG, 500, ood, seed=3):
        v = parse_numbers(example.input)
        tenths = 12 * v["Smoking"] + 7 * v["Weight"] - 10 * v["Exercise"]
        assert example.target == ("High Risk" if tenths > 72 else "Middle Risk" if tenths >= 27 else "Low Risk")


@pytest.mark.parametrize("ood", [False, True])
def test_the_hard_game_is_the_rule_up_to_the_shown_rounding(ood):
    exact = 0
    for example in generate(STG_H, 500, ood, seed=3):
        v = parse_numbers(example.input)
        index = (0.3 * v["Industrial Emissions"] + 0.25 * v["Vehicle Emissions"] + 0.2 * v["Coal Dependency"]
                 + 0.15 * v["Agricultural Burning"] - 0.2 * v["Urban Green Coverage"] - 0.3 * v["Meteorological Dispersion"])
        answer = 2 * (min(max(index, -20), 30) + 20)
        assert abs(answer - int(example.target)) < 0.5 + 2 * 1.4 * 0.05 + 1e-9  # 1.4: the coefficients' absolute sum
        exact += round(answer) == int(example.target)
    assert exact > 450


def test_iid_copies_are_exact_and_ood_copies_are_independent():
    pairs = [("Yellow fingers", "Smoking", 1.5), ("Clothing size", "Weight", 1), ("Hormones", "Exercise", 0.5)]
    for example in generate(STG, 500, seed=1):
        v = parse_numbers(example.input)
        assert all(v[copy] == math.floor(ratio * v[cause]) for copy, cause, ratio in pairs)
    rows = [parse_numbers(e.input) for e in generate(STG, 4000, True, seed=1)]
    for copy, cause, _ in pairs:
        table = Counter((v[copy], v[cause]) for v in rows)
        chi2 = sum((table[i, j] - 40) ** 2 / 40 for i in range(1, 11) for j in range(1, 11))
        assert chi2 < 149  # 99 degrees of freedom: above this once in a thousand


def test_same_seed_same_rows_in_any_process_and_no_row_twice():
    rows = generate(STG, 3000, seed=5)
    ood = generate(STG, 1000, True, seed=5, exclude=rows)
    keys = [tuple(sorted(parse_numbers(e.input).items())) for e in rows + ood]
    assert len(set(keys)) == 4000
    assert generate(STG, 3000, seed=5) == rows and generate(STG, 20, seed=6) != rows[:20]
    code = "from data import *; print(''.join(dump(generate(STG_H, 50, True, 9))), end='')"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=Path(__file__).parent.parent,
                           env=os.environ | {"PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")]
    assert runs[0] == runs[1] and len(runs[0].splitlines()) == 50


def test_excluded_rows_do_not_come_up_again():
    rows = generate(STG, 200, seed=5)
    assert not set(e.input for e in generate(STG, 200, seed=5, exclude=rows[:100])) & set(e.input for e in rows[:100])


def test_too_many_rows_is_an_error():
    tiny = Game("tiny", (), (), STG.irrelevant, "{features} Answer: ", ((-math.inf, "yes"),))
    assert len(generate(tiny, 100)) == 100
    for rows, part in ((101, "rows is 101"), (0, "rows is 0")):
        with pytest.raises(ValueError, match=part):
            generate(tiny, rows)


def consecutive(positions):
    """[3, 4, 7] to [[3, 4], [7]]."""
    runs = []
    for t in positions:
        if runs and runs[-1][-1] == t - 1:
            runs[-1].append(t)
        else:
            runs.append([t])
    return runs


@pytest.mark.parametrize("game", GAMES.values())
@pytest.mark.parametrize("edges", ["value", "span"])
def test_the_rule_marks_the_tokens_it_wrote(game, edges):
    examples = generate(game, 20, seed=2, edges=edges)
    tokenizer = tokenizer_of(examples)
    data = encode(examples, tokenizer, 256)
    for n, example in enumerate(examples):
        text = lambda positions: "".join(tokenizer.decode([data.idx[n, t]]) for t in positions)
        numbers = parse_numbers(example.input)
        for role, features in (("causal", game.causal), ("spurious", game.spurious), ("irrelevant", game.irrelevant)):
            marked = (data.role[n] == ROLES.index(role)).nonzero()[:, 0].tolist()
            runs = [text(run) for run in consecutive(marked)]
            shown = {f.name: f"{numbers[f.name]:.{f.decimals}f}" for f in features}
            expected = [f"{name}: {number}" if edges == "span" else number for name, number in shown.items()]
            assert sorted(runs) == sorted(expected)
        adjacency = adjacency_of(data, torch.tensor([n]))[0]
        rows = adjacency.any(1).nonzero()[:, 0].tolist()
        predicted = "".join(tokenizer.decode([data.targets[n, t]]) for t in rows)
        assert predicted == example.target
        assert (adjacency[rows] == (data.role[n] == ROLES.index("causal"))).all()


def test_the_shift_by_one_drawn_by_hand():
    example = Example("Smoking: 8, Room: 5 Answer: ", "High Risk", (((28, 37), (9, 10)),))
    tokenizer = tokenizer_of([example, example])
    data = encode([example], tokenizer, 64)
    tokens = ["Smoking", ": ", "8", ", ", "Room", ": ", "5", " Answer", ": ", "High", " Risk"]
    assert [tokenizer.decode([t]) for t in data.idx[0].tolist()] == tokens
    picture = """
        0 0 0 0 0 0 0 0 0 0 0
        0 0 0 0 0 0 0 0 0 0 0
        0 0 0 0 0 0 0 0 0 0 0
        0 0 0 0 0 0 0 0 0 0 0
        0 0 0 0 0 0 0 0 0 0 0
        0 0 0 0 0 0 0 0 0 0 0
        0 0 0 0 0 0 0 0 0 0 0
        0 0 0 0 0 0 0 0 0 0 0
        0 0 1 0 0 0 0 0 0 0 0
        0 0 1 0 0 0 0 0 0 0 0
        0 0 0 0 0 0 0 0 0 0 0
    """  # the row of ': ' predicts 'High', the row of 'High' predicts ' Risk'; both look at '8'
    drawn = torch.tensor([[int(cell) for cell in line.split()] for line in picture.strip().splitlines()])
    assert (adjacency_of(data, torch.tensor([0]))[0].int() == drawn).all()
    end = tokenizer.encode_single_token(END)
    assert data.targets[0].tolist() == data.idx[0, 1:].tolist() + [end]
    assert data.answer[0].nonzero()[:, 0].tolist() == [8, 9, 10]  # predict High, Risk, END


def test_a_token_shared_by_cause_and_effect_is_no_cause():
    example = Example("a xy zz ", "b", (((3, 7), (2, 3)),))  # effect "y zz", cause "x", and " xy" is one token
    tokenizer = tokenizer_of([example, example])
    data = encode([example], tokenizer, 16)
    assert " xy" in [tokenizer.decode([t]) for t in data.idx[0].tolist()] and len(data.edges) == 0


def test_batches_are_padded_on_the_right():
    examples = [Example("a b c ", "d e", (((6, 7), (0, 1)),)), Example("a ", "b")]
    data = encode(examples, tokenizer_of(examples * 2), 16)
    end = data.idx.max()
    lengths = (data.targets != -100).sum(1).tolist()
    assert lengths[0] > lengths[1] and (data.idx[1, lengths[1]:] == end).all()
    assert not data.answer[1, lengths[1]:].any()
    adjacency = adjacency_of(data, torch.tensor([1, 0, 0]))
    assert not adjacency[0].any() and adjacency[1].any() and (adjacency[1] == adjacency[2]).all()


def test_edges_stay_sparse_until_a_batch_is_made():
    examples = generate(STG_H, 100)
    data = encode(examples, tokenizer_of(examples), 256)
    held = sum(tensor.numel() * tensor.element_size() for tensor in vars(data).values())
    N, T = data.idx.shape
    assert held < N * T * T / 2


def test_tokenizer_gives_any_text_back():
    tokenizer = tokenizer_of(generate(STG, 50))
    rng = random.Random(0)
    for _ in range(300):
        points = [rng.choice((rng.randrange(32, 127), rng.randrange(0x20, 0x600), rng.randrange(0xE000, 0x110000)))
                  for _ in range(rng.randrange(0, 30))]
        text = "".join(map(chr, points))
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_game_words_and_numbers_are_one_token():
    tokenizer = tokenizer_of(generate(STG, 50))
    for piece in ["Smoking", " fingers", ": ", ", ", "7", "42", "100", "999"]:
        assert len(tokenizer.encode_ordinary(piece)) == 1
    assert [tokenizer.decode([t]) for t in tokenizer.encode_ordinary("12345")] == ["123", "45"]
    split = build_tokenizer(["Smoking: 8"] * 2, digits=1)
    assert [split.decode([t]) for t in split.encode_ordinary(": 42")] == [": ", "4", "2"]


def test_a_span_is_every_token_that_holds_a_byte_of_it():
    tokenizer, rng, text = tokenizer_of(generate(STG, 5)), random.Random(0), "né 8 日本 Smoking: 10, 😀1 Weight É"
    character = [n for n, c in enumerate(text) for _ in c.encode()]  # of each byte
    pieces = tokenizer.decode_tokens_bytes(tokenizer.encode_ordinary(text))
    assert len(pieces) < len(character) > len(text) + 5  # tokens of several bytes, characters of several tokens
    for _ in range(200):
        start, end = sorted(rng.sample(range(len(text) + 1), 2))
        data = encode([Example(text, "!", edges=(((len(text), len(text) + 1), (start, end)),))], tokenizer, 100)
        at, keys = 0, []
        for t, piece in enumerate(pieces):
            if any(start <= n < end for n in character[at:at + len(piece)]):
                keys.append(t)
            at += len(piece)
        assert data.edges.tolist() == [[len(pieces) - 1, key] for key in keys]


@pytest.mark.parametrize("text, phrase, found", [
    ("1 10 1.5 15.0 -1 1", "1", [0, 17]), ("5.0 15.0 5.05 5.0.", "5.0", [0, 14]), ("F-16 and 16", "16", [2, 9]),
    ("5, 5%", "5", [0, 3]), ("1,000 000", "000", [6]), ("aaa", "aa", [0, 1]), ("x", "", []), ("8 apples 18 apples", "8 apples", [0])])
def test_a_number_matches_only_a_whole_number(text, phrase, found):
    assert occurrences(text, phrase) == [(start, start + len(phrase)) for start in found]


def edges_as_text(input, target, important, edges="span"):
    links, missing, late = link(input, target, important, edges)
    text = input + target
    return [(text[slice(*effect)], effect[0], text[slice(*cause)], cause[0]) for effect, cause in links], missing, late


def test_phrases_become_edges():
    text = "Weight: 4, Smoking: 8, high risk? Answer: "
    links, missing, late = edges_as_text(text, "High Risk", [{"High Risk": ["Smoking: 8", "weight: 4", "Height: 1"]}])
    assert links == [("High Risk", 42, "Smoking: 8", 11), ("High Risk", 42, "Weight: 4", 0)]
    assert missing == ["Height: 1"] and late == []
    links, _, late = edges_as_text(text, "High Risk", [{"Smoking": ["Weight", "high risk"]}, {"nowhere": ["Weight"]}])
    assert links == [("Smoking", 11, "Weight", 0)] and late == ["high risk"]
    links, _, _ = edges_as_text(text, "High Risk", [{"High Risk": ["Smoking: 8", "Answer"]}], "value")
    assert links == [("High Risk", 42, "8", 20), ("High Risk", 42, "Answer", 34)]
    assert edges_as_text("5 and 5 Answer: ", "5", [{"5": ["5"]}])[0] == [("5", 16, "5", 0), ("5", 16, "5", 6)]
    assert edges_as_text("É: İ 3 → ", "4", [{"4": ["é: İ 3"]}])[0] == [("4", 9, "É: İ 3", 0)]


def test_shuffled_numbers_break_copies_and_keep_causes_and_answers():
    rows = generate(STG, 300, seed=8)
    shuffled = shuffle_numbers(rows, 1)
    moved = 0
    for row, other in zip(rows, shuffled):
        a, b = parse_numbers(row.input), parse_numbers(other.input)
        assert all(a[name] == b[name] for name in ("Smoking", "Weight", "Exercise")) and row.target == other.target
        assert sorted(a.values()) == sorted(b.values())
        moved += a["Clothing size"] != b["Clothing size"]
    assert moved > 150 and shuffled == shuffle_numbers(rows, 1) != shuffle_numbers(rows, 2)


def write(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


GOOD = '{"input": "Wert: 8 é ", "target": 3, "important": {"3": ["Wert: 8"]}}'


def test_reads_bom_crlf_blank_lines_and_numbers(tmp_path):
    path = write(tmp_path, "\ufeff" + GOOD + "\r\n\r\n" + GOOD.replace("3", "4.5") + "\n\n")
    examples, summary = read(path)
    assert [(e.input, e.target) for e in examples] == [("Wert: 8 é ", "3"), ("Wert: 8 é ", "4.5")]
    assert examples[0].edges == (((10, 11), (6, 7)),) and examples[1].source == f"{path}:3"
    assert "2 rows, 2 supervised" in summary


@pytest.mark.parametrize("line, part", [
    ("{", "broken JSON"), ("[" * 100000, "broken JSON"), ("3", "not a JSON object"), ('{"input": "x"}', '"target" is missing'),
    ('{"input": 3, "target": "x"}', '"input" is 3'), ('{"input": "x", "target": true}', '"target" is True'),
    ('{"input": "x", "target": NaN}', '"target" is nan'), ('{"input": " ", "target": "x"}', '"input" is empty'),
    ('{"input": "x", "target": ""}', '"target" is empty'), ('{"input": "\\ud800", "target": "x"}', "surrogate"),
    ('{"input": "x", "target": "y", "important": ["z"]}', '"important"'),
    ('{"input": "x", "target": "y", "important": {"y": [3]}}', '"important"'), (b"\xff", "not UTF-8")])
def test_a_bad_line_names_file_and_line_or_is_skipped(tmp_path, line, part):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path, GOOD.encode() + b"\n" + line + b"\n" + GOOD.encode())
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:2: ") and part in str(error.value) and "\n" not in str(error.value)
    examples, summary = read(path, skip_bad=True)
    assert len(examples) == 2 and "skipped 1 bad" in summary


def test_a_row_over_block_size_is_an_error_or_skipped(tmp_path):
    path = write(tmp_path, GOOD + "\n" + GOOD.replace("é", "é" * 40))
    examples, _ = read(path)
    tokenizer = tokenizer_of([])
    with pytest.raises(ValueError) as error:
        encode(examples, tokenizer, 64)
    assert str(error.value).startswith(f"{path}:2: ") and "block_size 64" in str(error.value)
    assert len(encode(examples, tokenizer, 64, skip_bad=True).idx) == 1


@pytest.mark.parametrize("game", GAMES.values())
def test_written_and_read_back_gives_the_same_adjacency(tmp_path, game):
    examples = generate(game, 30, True, seed=4)
    path = write(tmp_path, "".join(dump(generate(game, 30, True, seed=4, edges="span"))))
    again, summary = read(path)
    tokenizer = tokenizer_of(examples)
    a, b = encode(examples, tokenizer, 256), encode(again, tokenizer, 256)
    assert torch.equal(a.idx, b.idx) and torch.equal(a.edges, b.edges) and torch.equal(a.first_edge, b.first_edge)
    assert "dropped" not in summary and "edges" in describe(again, tokenizer)


def test_command_line(tmp_path, capsys):
    out = tmp_path / "game.jsonl"
    main(["--game", "STG", "--rows", "20", "--ood", "--out", str(out)])
    capsys.readouterr()
    shown = subprocess.run([sys.executable, Path(__file__).parent.parent / "data.py", out], capture_output=True, text=True)
    assert shown.returncode == 0 and "20 rows, 20 supervised" in shown.stdout and "predicts ' Risk'  <-  '" in shown.stdout
    for args, part in [((), "FILE"), ((tmp_path / "none.jsonl",), "none.jsonl"), (("--game", "STG", "--rows", 0), "rows is 0"),
                       ((write(tmp_path, "{"),), "rows.jsonl:1: "), ((out, "--out", tmp_path / "x"), "--out"),
                       (("--game", "STG", "--rows", 5, "--out", tmp_path / "no" / "x"), "no/x'"),
                       (("--game", "STG", "--rows", 5, "--out", tmp_path), "Not a regular file")]:
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and part in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["game.jsonl", "rows.jsonl"]


@pytest.mark.parametrize("game", [STG, STG_H])
@pytest.mark.parametrize("edges", ["value", "span"])
def test_reorder_keeps_every_item_answer_and_edge(game, edges):
    rng, orders = random.Random(0), set()
    items = lambda text: sorted(re.split(r", |; |\. ", text.removeprefix(game.question.split("{")[0]).removesuffix(game.question.split("}")[1])))
    for example in generate(game, 30, seed=1, edges=edges):
        changed = reorder(example, rng)
        assert items(changed.input) == items(example.input) and changed.target == example.target
        for before, after in ((example.edges, changed.edges), (example.roles, changed.roles)):
            spans = [[(a if isinstance(a, str) else example.target, text[slice(*b)]) for a, b in pairs]
                     for text, pairs in ((example.input + example.target, before), (changed.input + changed.target, after))]
            assert spans[0] == spans[1]
        assert all((changed.input + changed.target)[slice(*effect)] == example.target for effect, _ in changed.edges)
        orders.add(tuple(changed.input.index(f.name) < changed.input.index(g.name) for f in game.causal for g in game.causal))
    assert len(orders) > 5
    torn = Example("A: 1, B: 2 ", "x", edges=(((11, 12), (0, 8)),))
    for example in [torn, Example("No item", "x"), Example("Weight: 4 kg, Room: 5 ", "x"), Example("Score: 8/10, Level: 3 ", "x"),
                    Example("Date: 2024-05-06, Room: 5 ", "x"), Example("Time: 10:30, Room: 5 ", "x")]:
        assert all(reorder(example, rng) == example for _ in range(5))
    inner = Example("A: 1, B: 2, C: 3 Answer: ", "x", edges=(((9, 10), (3, 4)),))  # B after A
    changed = [reorder(inner, rng) for _ in range(20)]
    assert all(c[1] <= e[0] and example.input[slice(*c)] == "1" for example in changed for e, c in example.edges)
    assert len({example.input for example in changed}) > 1


@needs_released
def test_released_files_load():
    counts = {"STG/spurious_token_game_train3.jsonl": 1600, "STG/spurious_token_game_train3_M.jsonl": 800,
              "STG/spurious_token_game_train3_S.jsonl": 400, "STG/spurious_token_game_test3.jsonl": 400,
              "STG/spurious_token_game_ood3_2.jsonl": 400, "STG_H/STG_H_train.jsonl": 3000, "STG_H/STG_H_iid_test.jsonl": 1000,
              "STG_H/STG_H_ood_test.jsonl": 1000, "MAWPS/mawps_train.jsonl": 1239, "MAWPS/mawps_val.jsonl": 413,
              "MAWPS/mawps_test.jsonl": 413}
    for name, count in counts.items():
        examples, _ = read(os.path.join(RELEASED, name))
        assert len(examples) == count
        data = encode(examples, tokenizer_of(examples), 512)
        assert (data.edges[:, 1] <= data.edges[:, 0]).all() and bool(len(data.edges)) == any(e.edges for e in examples)


@needs_released
def test_released_stg_edges_are_the_causal_numbers():
    examples, _ = read(os.path.join(RELEASED, "STG/spurious_token_game_train3.jsonl"))
    for example in examples:
        if example.target == "Middle Risk":
            continue
        text, numbers = example.input + example.target, parse_numbers(example.input)
        assert sorted(float(text[slice(*cause)]) for _, cause in example.edges) == \
            sorted(numbers[name] for name in ("Smoking", "Weight", "Exercise"))


def test_random_flags_and_random_bytes_end_in_0_or_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng, codes, good = random.Random(0), [], "".join(dump(generate(STG, 5, edges="span"))).encode()
    with pytest.raises(SystemExit):
        main(["--help"])
    flags = re.findall(r"^ +(--[a-z-]+)", capsys.readouterr().out, re.M)
    values = ["0", "1", "-1", "9", "1e400", "nan", "", "x", "STG", "STG_H", "span", "noise", "rows", "out", ".", "é\x00", "cat", "false"]
    for _ in range(200):
        at = rng.randrange(len(good))
        piece = rng.choice((b"", b"[", b'"', b"{", b"null", b"\\ud800", b"\r", b"\xff", b"9" * 400, b"\xef\xbb\xbf", b"NaN", b"\n\n"))
        for name, content in ("noise", rng.choice((rng.randbytes(100), good[:at], good[:at] + piece + good[at + 1:]))), ("rows", good):
            with open(name, "wb") as file:
                file.write(content)
        chosen = rng.choice((["noise"], ["rows"], ["--game", "STG", "--rows", "5"], ["--check", "noise", "--against", "rows"],
                             ["--annotate", "rows", "--demos", "noise", "--assistant", "true", "--out", "out"], []))
        for flag in rng.sample(flags, rng.randrange(3)):
            chosen = chosen + ([flag] if rng.random() < 0.3 else [flag, rng.choice(values)])
        try:
            main(chosen)
            codes.append(0)
        except SystemExit as stop:
            codes.append(stop.code)
            error = capsys.readouterr().err.splitlines()
            assert stop.code in (0, 2) and len(error) == (stop.code == 2), (chosen, error)
    assert codes.count(0) > 20 and codes.count(2) > 20
