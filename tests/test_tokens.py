"""From spans to tokens and batches: the tokenizer, the shift by one, items and padding."""
import random

import pytest

from data import (END, Example, build_tokenizer, collate, encode, item_ends, item_start, link,
                  pieces_of, token_edges, token_offsets, tokenizer_of)


def tokenizer_for(*examples):
    """A tokenizer in which each word of the examples is a token."""
    return build_tokenizer([example.input + example.target for example in examples] * 2)


def words(tokenizer, tokens):
    """The text of each token, with _ for a blank."""
    return [tokenizer.decode([token]).replace(" ", "_") for token in tokens.tolist()]


# ----------------------------------------------------------------------------
# The tokenizer

def test_numbers_that_occur_are_tokens_and_words_that_occur_twice():
    tokenizer = build_tokenizer(["Yellow fingers: 12, ", "Yellow fingers: 345", "once 6789"])
    longer = [piece.decode() for piece in pieces_of(tokenizer)[256:]]
    assert sorted(longer) == [" fingers", "12", "345", "678", ": ", "Yellow"]


@pytest.mark.parametrize("text", [
    "Smoking: 8, Room: 5 Answer: High Risk",
    "Smoking:8  Room\n\t:1234567 once_more",
    "陈静, Søren 🙂🙂 e\u0301 \u200b\x1c٣",
    f"{END} is a text too",
])
def test_any_text_comes_back(text):
    tokenizer = build_tokenizer(["Smoking: 8, Room: 5"] * 2)
    tokens = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.encode_single_token(END) not in tokens
    assert tokenizer_of(pieces_of(tokenizer)).encode_ordinary(text) == tokens


def test_tokens_that_are_bytes_of_one_character_have_its_span():
    tokenizer = build_tokenizer(["ab: "] * 2)
    tokens = tokenizer.encode_ordinary("ab: é🙂x")
    assert token_offsets(tokenizer, tokens) == (
        [(0, 2), (2, 4)] + [(4, 5)] * 2 + [(5, 6)] * 4 + [(6, 7)])


# ----------------------------------------------------------------------------
# The shift by one

def draw(batch, tokenizer):
    """The matrices of a batch's first example: A is an edge, i is inside."""
    lines = []
    for query, word in enumerate(words(tokenizer, batch.idx[0])):
        line = ""
        for edge, inside in zip(batch.adjacency[0, query], batch.inside[0, query]):
            if edge:
                line += "A "
            elif inside:
                line += "i "
            else:
                line += ". "
        lines.append(line + word)
    return lines


def test_the_shift_by_one_drawn():
    example, _ = link("Smoking: 8, Room: 5 Answer: ", "High Risk", [("High Risk", ["8"])])
    tokenizer = tokenizer_for(example)
    batch = collate([encode(example, tokenizer)])
    assert draw(batch, tokenizer) == [
        "i . . . . . . . . . . Smoking",
        "i i . . . . . . . . . :_",
        "i i i . . . . . . . . 8",  # looks inside its own item, which is not shifted
        ". . . . . . . . . . . ,_",
        ". . . . . . . . . . . Room",
        ". . . . . . . . . . . :_",
        ". . . . . . . . . . . 5",
        ". . . . . . . i . . . _Answer",
        ". . A . . . . i i . . :_",  # predicts High: an edge to the cause 8
        ". . A . . . . i i i . High",  # predicts Risk: an edge to the cause 8
        ". . . . . . . i i i i _Risk",  # predicts the end: no edge
    ]


def random_offsets(rng):
    """Spans of tokens as tokenizers give them: with gaps, several for one character, and (0, 0)
    for padding on either side."""
    offsets = [(0, 0)] * rng.randrange(3)
    end = 0
    while end < 25:
        start = end + rng.randrange(2)
        end = start + rng.randint(1, 4)
        offsets += [(start, end)] * rng.choice([1, 1, 3])
    return offsets + [(0, 0)] * rng.randrange(3)


def holding(span, offsets):
    """The tokens that share a character with a span."""
    characters = set(range(*span))
    return [position for position, token in enumerate(offsets)
            if characters & set(range(*token))]


@pytest.mark.parametrize("seed", range(100))
def test_edges_are_those_of_the_definition(seed):
    rng = random.Random(seed)
    offsets = random_offsets(rng)
    effect = sorted(rng.sample(range(30), 2))
    cause = sorted(rng.sample(range(30), 2))
    expected = []
    for predicted in holding(effect, offsets):
        for key in holding(cause, offsets):
            if key < holding(effect, offsets)[0]:
                expected.append((predicted - 1, key))
    assert token_edges([(effect, cause)] * 2, offsets) == expected


# ----------------------------------------------------------------------------
# Items

@pytest.mark.parametrize("text, phrase, item", [
    ("Smoking: 8, Room: 5", "5", "Room: 5"),
    ("a:b,c:d", "d", "c:d"),
    ("颜色：红，吸烟：是", "是", "吸烟：是"),
    ("Rot | Raucher: ja", "ja", "Raucher: ja"),
    ("آب: ۲، نان: گرم", "گرم", "نان: گرم"),
    ("लाल। नीला", "नीला", "नीला"),
    ("Wet? Cold; warm! hot\tdry\nold", "old", "old"),
    ("cost 1,000 or 2.5", "2.5", "or 2.5"),  # a number that stands alone ends an item
    ("a 5 Vitamin B12: 30", "30", "Vitamin B12: 30"),  # the 12 does not stand alone
    ("v1.2 fast", "fast", "v1.2 fast"),
    ("hot,7up", "7up", "7up"),
    ("first", "first", "first"),
])
def test_the_item_around_a_phrase(text, phrase, item):
    end = len(text)
    start = item_start(text, (end - len(phrase), end), item_ends(Example(text, "")))
    assert text[start:] == item


def test_items_of_the_answer_start_with_it_even_right_behind_a_number():
    ends = item_ends(Example("Room: 3", "2, yes"))
    assert item_start("Room: 32, yes", (7, 8), ends) == 7
    assert item_start("Room: 32, yes", (10, 13), ends) == 10


def test_a_token_of_two_items_belongs_to_the_earlier():
    example, _ = link("a, b, c, d, ", "x", [("x", ["c, d", "b, c", "a, b"])])
    encoded = encode(example, tokenizer_for(example))
    assert encoded.item_first.tolist()[:7] == [0, 0, 0, 2, 2, 4, 4]  # a, b, c, d


def test_the_query_that_predicts_the_answer_is_in_its_item_behind_a_question_mark_too():
    example, _ = link("Is it 8?", "yes", [("yes", ["8"])])
    encoded = encode(example, tokenizer_for(example))
    first_query = encoded.answer.nonzero()[0].item()  # the question mark
    assert encoded.item_first[first_query] == first_query
    assert encoded.item_first[first_query + 1] == first_query


# ----------------------------------------------------------------------------
# Encoded examples and batches

# Two causes, the first of which is called spurious too.
TWO, _ = link("a 1 b 2 c 3 ", "d e", [("d e", ["1", "3"])], ["1", "2"])
# An effect that is not the answer.
WITHIN, _ = link("a 1 b 2 ", "d", [("b", ["1"])])
PLAIN = Example("a ", "b")


def test_the_fields_of_an_encoded_example():
    tokenizer = tokenizer_for(TWO)
    encoded = encode(TWO, tokenizer)
    assert words(tokenizer, encoded.idx) == "a _ 1 _b _ 2 _c _ 3 _ d _e".split()
    assert words(tokenizer, encoded.targets) == f"_ 1 _b _ 2 _c _ 3 _ d _e {END}".split()
    assert words(tokenizer, encoded.targets[encoded.answer]) == ["d", "_e", END]
    assert words(tokenizer, encoded.idx[encoded.causal]) == ["1", "3"]
    assert words(tokenizer, encoded.idx[encoded.spurious]) == ["2"]
    assert encoded.edges.tolist() == [[9, 2], [9, 8], [10, 2], [10, 8]]


def test_a_cause_of_another_effect_than_the_answer_is_an_edge_only():
    encoded = encode(WITHIN, tokenizer_for(WITHIN))
    assert encoded.edges.tolist() == [[2, 2]]
    assert not encoded.causal.any()


def test_a_batch_is_as_long_as_its_own_longest_example():
    tokenizer = tokenizer_for(TWO, WITHIN, PLAIN)
    two = encode(TWO, tokenizer)
    within = encode(WITHIN, tokenizer)
    plain = encode(PLAIN, tokenizer)
    assert collate([plain, plain]).adjacency.shape == (2, 3, 3)
    assert collate([plain, within]).adjacency.shape == (2, 8, 8)
    assert collate([plain, within, two]).inside.shape == (3, 12, 12)


def test_padding_is_nothing_to_learn_from_or_to_look_at():
    tokenizer = tokenizer_for(TWO, WITHIN)
    two = encode(TWO, tokenizer)
    within = encode(WITHIN, tokenizer)
    batch = collate([two, within])
    assert batch.idx[1].tolist() == within.idx.tolist() + [0] * 4
    assert batch.targets[1].tolist() == within.targets.tolist() + [-100] * 4
    assert batch.answer[1].tolist() == [False] * 6 + [True] * 2 + [False] * 4
    assert not batch.causal[1].any()
    assert not batch.spurious[1].any()
    assert batch.adjacency[0].nonzero().tolist() == two.edges.tolist()
    assert batch.adjacency[1].nonzero().tolist() == [[2, 2]]
    # "a 1" and " b": a token looks inside its own item, and not ahead.
    assert batch.inside[1].nonzero().tolist() == [
        [0, 0], [1, 0], [1, 1], [2, 0], [2, 1], [2, 2], [3, 3]]
