"""Games, tokenizer, the shift by one and Dataset, against independent and slower definitions."""
import math
import os
import random
import re
from collections import Counter
from pathlib import Path
from statistics import correlation, fmean, stdev

import pytest
import torch

from data import (END, STG, STG_H, Example, Feature, Game, adjacency_of, build_tokenizer,
                  character_offsets, character_tokens, encode, generate, inside_of, mislabel,
                  narrow, read, token_edges)

RELEASED = os.environ.get("CAT_RELEASED_DATA")
tokenizer_of = lambda examples: build_tokenizer([e.input + e.target for e in examples] * 2)


def parse(example):
    """{name: number} in the order of a game's text, by a reading of its own."""
    found = re.findall(r"([A-Z][A-Za-z ()]*): (-?\d+(?:\.\d+)?)", example.input)
    return {name: float(number) for name, number in found}


def linked(input, target, effect, *causes, spurious=()):
    """An Example with an edge from an effect to each cause."""
    return Example(input, target, ({effect: list(causes)},), tuple(spurious))


@pytest.mark.parametrize("ood", [False, True])
def test_the_easy_game_has_three_bands_and_exact_copies_that_become_independent(ood):
    examples, bounds = generate(STG, 2000, ood, seed=3), Counter()
    values = [parse(example) for example in examples]
    for v, example in zip(values, examples):
        tenths = 12 * v["Smoking"] + 7 * v["Weight"] - 10 * v["Exercise"]  # whole numbers are exact
        band = "High Risk" if tenths > 72 else "Middle Risk" if tenths >= 27 else "Low Risk"
        assert example.target == band
        bounds[tenths] += 1
    assert len({tuple(v) for v in values}) > 1900  # each in its own order, of 40,320
    assert bounds[27] and bounds[72] and Counter(e.target for e in examples)["Middle Risk"] > 300
    for copy, cause, ratio in (("Yellow fingers", "Smoking", 1.5), ("Clothing size", "Weight", 1),
                               ("Hormones", "Exercise", 0.5)):
        copies, causes = [v[copy] for v in values], [v[cause] for v in values]
        if ood:
            assert {*copies} == {*range(1, 11)} and abs(correlation(copies, causes)) < 0.08
        else:
            assert copies == [math.floor(ratio * x) for x in causes]


@pytest.mark.parametrize("ood", [False, True])
def test_the_hard_game_has_noise_and_copies_that_become_independent(ood):
    examples = generate(STG_H, 2000, ood)
    values = [parse(example) for example in examples]
    shown = {name: [v[name] for v in values] for name in values[0]}
    for v, example in zip(values, examples):
        index = sum(f.weight * v[f.name] for f in STG_H.causal)
        answer = 2 * (min(max(index, -20), 30) + 20)
        # the label's factors are up to 0.05 from the shown ones, and the weights add up to 1.4
        assert abs(answer - int(example.target)) < 0.5 + 2 * 1.4 * 0.05 + 1e-9
    assert (STG_H.answer(-21), STG_H.answer(31)) == ("0", "100")
    for f in STG_H.causal:
        outside = fmean(not f.low <= x <= f.high for x in shown[f.name])  # by its noise
        assert outside == pytest.approx(0.8 * f.noise / (f.high - f.low), rel=0.3)
    for f in STG_H.spurious:
        copies, causes = shown[f.name], shown[f.copies]
        if ood:
            assert f.low <= min(copies) < f.low + 0.1 and f.high - 0.1 < max(copies) <= f.high
            assert abs(correlation(copies, causes)) < 0.08
        else:
            rest = [x - f.ratio * y for x, y in zip(copies, causes)]
            assert abs(fmean(rest)) < 0.2 and stdev(rest) == pytest.approx(f.noise, rel=0.1)


def test_examples_are_repeatable_and_no_two_have_the_same_numbers():
    numbers = lambda examples: {tuple(sorted(parse(example).items())) for example in examples}
    iid = generate(STG, 1000, seed=5)
    assert generate(STG, 1000, seed=5) == iid != generate(STG, 1000, seed=6)
    again = numbers(generate(STG, 1000, seed=5, exclude=iid[:500]))
    assert len(again) == 1000 and again - numbers(iid[:500]) == again > numbers(iid[500:])
    smoking = lambda ood: [parse(generate(STG, 1, ood, n)[0])["Smoking"] for n in range(50)]
    assert sum(map(float.__eq__, smoking(False), smoking(True))) < 15  # 5 by chance: two streams
    tiny = Game("tiny", (), (), STG.irrelevant, "{features} Answer: ", ((-math.inf, "yes"),))
    assert len(generate(tiny, 100)) == 100  # 10 x 10 numbers
    for n in 101, 0:
        with pytest.raises(ValueError, match=f"rows is {n}: give 1 or more, .* tiny has"):
            generate(tiny, n)


@pytest.mark.skipif(not RELEASED, reason="set CAT_RELEASED_DATA to the authors' released data")
@pytest.mark.parametrize("game, file", [(STG, "STG/spurious_token_game_train3.jsonl"),
                                        (STG_H, "STG_H/STG_H_train.jsonl")])
def test_generated_texts_look_like_the_released_ones(game, file):
    released = read(Path(RELEASED, file))[:300]
    shapes = [[re.sub(r"(?<=: )-?\d+(\.\d+)?", "8", example.input) for example in some]
              for some in (released, generate(game, 300))]
    if game.shuffle:
        shapes = [[sorted(re.findall(r"\w+: 8|[^ ,]+", s)) for s in some] for some in shapes]
    assert shapes[0] == shapes[1] == shapes[0][:1] * 300
    for example in released if game is STG_H else ():  # of those of STG, a third breaks the rule
        score = sum(f.weight * parse(example)[f.name] for f in game.causal)
        assert abs(int(game.answer(score)) - int(example.target)) <= 1  # of rounded numbers


@pytest.mark.parametrize("wrong, part", [
    (dict(spurious=(Feature("B", copies="Aa"),)), "B copies 'Aa': give one of .*A"),
    (dict(irrelevant=(Feature("C", 9, 2),)), "C is 9 to 2: lower first"),
    (dict(bands=((5, "yes"),)), r"bands from \[5\]: highest first, -math.inf last"),
    (dict(bands=((1, "no"), (5, "yes"), (-math.inf, "?"))), r"bands from \[1, 5, -inf\]: "),
    (dict(question="A number. Answer: "), "write {features} once in the question")])
def test_a_mistake_in_a_game_is_one_line_with_the_remedy(wrong, part):
    good = dict(causal=(Feature("A"),), spurious=(Feature("B", copies="A"),), irrelevant=(),
                question="{features} Answer: ", bands=((5, "yes"), (-math.inf, "no")))
    Game("mine", **good)
    with pytest.raises(ValueError, match=rf"^mine: .*{part}.*\Z"):
        Game("mine", **(good | wrong))


def test_the_shift_by_one_drawn():
    example = linked("Smoking: 8, Room: 5 Answer: ", "High Risk", "High Risk", "8")
    picture = """
        i . . . . . . . . . .   Smoking
        i i . . . . . . . . .   :_
        i i i . . . . . . . .   8          looks inside its own item: not shifted
        . . . . . . . . . . .   ,_
        . . . . . . . . . . .   Room
        . . . . . . . . . . .   :_
        . . . . . . . . . . .   5
        . . . . . . . i . . .   _Answer
        . . A . . . . i i . .   :_         predicts High: an edge to the cause 8
        . . A . . . . i i i .   High       predicts Risk: an edge to the cause 8
        . . . . . . . i i i i   _Risk      predicts END: no edge
    """
    cells = [line.split()[:12] for line in picture.strip().splitlines()]
    dataset, ix = encode([example], tokenizer_of([example])), torch.tensor([0])
    tokens = [dataset.tokenizer.decode([t]).replace(" ", "_") for t in dataset.idx[0].tolist()]
    assert tokens == [query.pop() for query in cells]
    for letter, drawn in ("A", adjacency_of(dataset, ix)), ("i", inside_of(dataset, ix)):
        assert drawn[0].tolist() == [[cell == letter for cell in query] for query in cells]


def test_edges_for_the_offsets_of_any_tokenizer_are_those_of_the_definition():
    rng = random.Random(0)
    for _ in range(150):
        cuts = sorted(rng.sample(range(31), rng.randrange(2, 20)))
        offsets = [(start + rng.choice((0, 0, end - start > 1)), end)  # now and then less a blank
                   for start, end in zip(cuts, cuts[1:]) for _ in range(rng.choice((1, 1, 3)))]
        offsets = [(0, 0)] * rng.randrange(3) + offsets + [(0, 0)] * rng.randrange(3)  # padding
        effect, cause = (tuple(sorted(rng.sample(range(32), 2))) for _ in range(2))
        held = lambda span: [t for t, at in enumerate(offsets) if {*range(*at)} & {*range(*span)}]
        expected = [(t - 1, key) for t in held(effect) for key in held(cause)
                    if t > 0 and key < min(held(effect))]
        assert token_edges([(effect, cause)] * 2, offsets) == expected  # each pair once, sorted


def test_values_spans_and_controls():
    text = "PM2.5: 40, Score: 8 of -10, Mood: fair"
    parts = lambda phrase, how: [text[slice(*part)] for part in narrow(
        text, (text.index(phrase), text.index(phrase) + len(phrase)), how)]
    for phrase, numbers in (("PM2.5: 40", ["40"]), ("Score: 8 of -10", ["8", "-10"]),
                            ("fair", ["fair"])):  # each number, else the phrase
        assert parts(phrase, "value") == numbers and parts(phrase, "span") == [phrase]
    game, rng, chosen = generate(STG, 200), random.Random(0), Counter()
    n_edges = [encode(game, tokenizer_of(game), how).edges.shape[1] for how in ("value", "span")]
    assert n_edges == [3 * 2, 3 * 3 * 2]  # three numbers, or name, colon and number
    for example in game:
        assert mislabel(example, "spurious", rng).important == ({example.target: example.spurious},)
        [causes] = mislabel(example, "random", rng).important[0].values()
        assert len({*causes}) == 3 and all(cause in example.input for cause in causes)
        chosen.update(cause.split(":")[0] for cause in causes)
    assert len(chosen) == 8 and max(chosen.values()) < 1.6 * min(chosen.values())


def test_the_vocabulary_has_the_numbers_that_occur_and_any_text_comes_back():
    texts = [e.input + e.target for e in generate(STG, 50)] + ["once 12345"]
    tokenizer, numbers = build_tokenizer(texts), {*re.findall(r"\d{1,3}", " ".join(texts))}
    pieces = [piece.decode("latin-1") for piece in tokenizer.token_byte_values()]
    assert {*filter(str.isdecimal, pieces)} == numbers | {*"0123456789"} and "123" in numbers
    assert {"Smoking", " fingers", ": ", ", "} < {*pieces} and "once" not in pieces


@pytest.mark.parametrize("text", [f"{END} Smoking: 8", "陈静, Søren: 7 🙂🙂 x  \n\t y e\u0301\ue000"])
def test_any_text_comes_back_and_characters_of_several_tokens_are_shown_as_one(text):
    tokenizer = build_tokenizer(["Smoking: 8, Room: 5"] * 2)
    tokens = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(tokens) == text and tokenizer.n_vocab - 1 not in tokens
    characters = iter([n for n, c in enumerate(text) for _ in c.encode()])  # of each byte
    held = [[next(characters) for _ in piece] for piece in tokenizer.decode_tokens_bytes(tokens)]
    assert character_offsets(tokenizer, tokens) == [(at[0], at[-1] + 1) for at in held]
    shown = character_tokens(tokenizer, tokens)
    assert "".join(piece for piece, _ in shown) == text
    assert sum((positions for _, positions in shown), []) == [*range(len(tokens))]
    assert all(len(piece) == 1 or len(positions) == 1 for piece, positions in shown)


@pytest.mark.parametrize("game", [STG, STG_H])
def test_roles_and_edges_are_on_the_tokens_that_the_game_wrote(game):
    examples = generate(game, 20, seed=2)
    dataset = encode(examples, tokenizer_of(examples))
    text_of = lambda ids: dataset.tokenizer.decode(ids.tolist())
    for n, example in enumerate(examples):
        role, adjacency = dataset.role[n], adjacency_of(dataset, torch.tensor([n]))[0]
        for r, features in enumerate((game.causal, game.spurious), 1):
            decimals = {f.name: f.decimals for f in features}
            shown = [f"{x:.{decimals[k]}f}" for k, x in parse(example).items() if k in decimals]
            assert text_of(dataset.idx[n, role == r]).replace(" ", "") == "".join(shown)
        queries = adjacency.any(1)
        assert text_of(dataset.targets[n, queries]) == example.target
        assert (adjacency[queries] == (role == 1)).all()


def test_padding_and_batches_of_repeated_and_of_empty_examples():
    # what is called both is causal, and the answer has no role
    answered = linked("a 1 b 2 c 3 ", "d e", "d e", "1", spurious=["2", "1", "d"])
    within = linked("a 1 b 2 ", "d", "b", "1")  # an effect that is not the answer gives no role
    examples = [answered, within, Example("a ", "b")]
    tokenizer = tokenizer_of(examples)
    dataset, end = encode(examples, tokenizer), tokenizer.encode_single_token(END)
    assert [[tokenizer.decode([t]) for t in idx] for idx in dataset.idx.tolist()] == [
        ["a", " ", "1", " b", " ", "2", " c", " ", "3", " ", "d", " e"],
        ["a", " ", "1", " b", " ", "2", " ", "d"] + [END] * 4, ["a", " ", "b"] + [END] * 9]
    assert dataset.targets.tolist() == [idx[1:length].tolist() + [end] + [-100] * (12 - length)
                                        for idx, length in zip(dataset.idx, (12, 8, 3))]
    assert [a.nonzero()[:, 0].tolist() for a in dataset.answer] == [[9, 10, 11], [6, 7], [1, 2]]
    assert dataset.role.tolist() == [[0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0], [0] * 12, [0] * 12]
    dense = torch.zeros(3, 12, 12, dtype=torch.bool)
    dense[0, [9, 10], 2] = dense[1, 2, 2] = True
    for ix in [0], [1], [2], [2, 1, 0, 0, 2, 1, 1], [2, 2]:
        assert torch.equal(adjacency_of(dataset, torch.tensor(ix)), dense[ix])
    assert not inside_of(dataset, torch.tensor([1, 2]))[:, 8:].any()
