"""From spans to tokens and batches: the tokenizer, the shift by one, items and padding."""
import pytest

from data import (END, Example, build_tokenizer, collate, encode, item_ends, item_start, link,
                  pieces_of, token_edges, token_offsets, tokenizer_of)


def tokenizer_for(*examples):
    """A tokenizer in which each word of the examples is a token."""
    return build_tokenizer([example.input + example.target for example in examples] * 2)


def words(tokenizer, tokens):
    """The text of each token, with _ for a blank, in one line."""
    texts = [tokenizer.decode([token]).replace(" ", "_") for token in tokens.tolist()]
    return " ".join(texts)


# ----------------------------------------------------------------------------
# The tokenizer

def test_tokens_are_numbers_that_occur_and_other_pieces_that_occur_twice():
    tokenizer = build_tokenizer(["Yellow fingers: 12, ", "Yellow fingers: 345", "once 6789"])
    # 6789 is cut into 678 and 9, which is a byte anyway; "once" and ", " occur once.
    longer = [piece.decode() for piece in pieces_of(tokenizer)[256:]]
    assert sorted(longer) == [" fingers", "12", "345", "678", ": ", "Yellow"]


@pytest.mark.parametrize("text", [
    "Smoking:8  Room\n\t:1234567 once_more",
    "陈静, Søren 🙂🙂 e\u0301 \u200b\x1c٣",
    f"{END} is a text too",
])
def test_any_text_comes_back_and_is_cut_alike_by_a_tokenizer_of_the_same_pieces(text):
    tokenizer = build_tokenizer(["Smoking: 8, Room: 5"] * 2)
    tokens = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.encode_single_token(END) not in tokens
    assert tokenizer_of(pieces_of(tokenizer)).encode_ordinary(text) == tokens


def test_tokens_that_are_bytes_of_one_character_have_its_span():
    tokenizer = build_tokenizer(["ab: "] * 2)
    tokens = tokenizer.encode_ordinary("ab: éx")
    expected = [(0, 2), (2, 4), (4, 5), (4, 5), (5, 6)]
    assert token_offsets(tokenizer, tokens) == expected


# ----------------------------------------------------------------------------
# The shift by one

def test_edges_are_shifted_by_one_and_items_are_not():
    example, _ = link("Smoking: 8, Room: 5 Answer: ", "High Risk", [("High Risk", ["8"])])
    tokenizer = tokenizer_for(example)
    batch = collate([encode(example, tokenizer)])
    drawn = "\n"
    for query, word in enumerate(words(tokenizer, batch.idx[0]).split()):
        marks = ["."] * 11
        for key in batch.inside[0, query].nonzero():
            marks[key] = "i"
        for key in batch.adjacency[0, query].nonzero():
            marks[key] = "A"
        drawn += " ".join(marks + [word]) + "\n"
    # The last ":" predicts High and "High" predicts Risk: they have an edge (A) to the cause 8.
    # "Risk" predicts the end. Items (i) are not shifted: the 8 looks inside its own.
    assert drawn == """
i . . . . . . . . . . Smoking
i i . . . . . . . . . :_
i i i . . . . . . . . 8
. . . . . . . . . . . ,_
. . . . . . . . . . . Room
. . . . . . . . . . . :_
. . . . . . . . . . . 5
. . . . . . . i . . . _Answer
. . A . . . . i i . . :_
. . A . . . . i i i . High
. . . . . . . i i i i _Risk
"""


def test_edges_with_the_offsets_of_other_tokenizers():
    offsets = [
        (0, 0),  # a token before the text
        (0, 2),
        (3, 4), (3, 4),  # the bytes of one character
        (4, 6),
        (6, 9),
        (0, 0),  # padding
    ]
    edges = token_edges([((5, 7), (1, 5))], offsets)
    # The effect is on tokens 4 and 5, the cause on 1, 2, 3 and 4, which is not before the effect.
    assert edges == [(3, 1), (3, 2), (3, 3), (4, 1), (4, 2), (4, 3)]


# ----------------------------------------------------------------------------
# Items

@pytest.mark.parametrize("text, phrase, item", [
    ("Room: 5", "5", "Room: 5"),
    ("a:b,c:d", "d", "c:d"),
    ("颜色：红，吸烟：是", "是", "吸烟：是"),
    ("Rot | Raucher: ja", "ja", "Raucher: ja"),
    ("آب: ۲، نان: گرم", "گرم", "نان: گرم"),
    ("Wet? Cold; warm! hot\tdry\nold", "old", "old"),
    ("cost 1,000 or 2.5", "2.5", "or 2.5"),  # a number that stands alone ends an item
    ("a 5 Vitamin B12: 30", "30", "Vitamin B12: 30"),  # the 12 does not stand alone
    ("hot,7up", "7up", "7up"),
])
def test_the_item_around_a_phrase(text, phrase, item):
    end = len(text)
    start = item_start(text, (end - len(phrase), end), item_ends(Example(text, "")))
    assert text[start:] == item


def first_of_items(input, target, causes):
    """The first token of the item of each token."""
    example, _ = link(input, target, [(target, causes)])
    return encode(example, tokenizer_for(example)).item_first.tolist()


def test_a_number_does_not_go_on_into_the_answer():
    # a|: |3|2| b. The answer's item starts at the query that predicts it, 3, which is in "a: 3".
    assert first_of_items("a: 3", "2 b", ["3"]) == [0, 0, 0, 2, 2]


def test_a_token_of_two_items_belongs_to_the_earlier():
    first = first_of_items("a, b, c, d, ", "x", ["c, d", "b, c", "a, b"])
    assert first[:7] == [0, 0, 0, 2, 2, 4, 4]  # of a|, |b|, |c|, |d


def test_the_query_that_predicts_the_answer_is_in_its_item_behind_a_question_mark_too():
    first = first_of_items("Is it 8?", "yes", ["8"])
    assert first[-2:] == [4, 4]  # of Is| it| |8|?|yes


# ----------------------------------------------------------------------------
# Encoded examples and batches

# Two causes, the first of which is called spurious too.
TWO, _ = link("a 1 b 2 c 3 ", "d e", [("d e", ["1", "3"])], ["1", "2"])
# An effect that is not the answer.
WITHIN, _ = link("a 1 b 2 ", "d", [("b", ["1"])])


def test_the_fields_of_an_encoded_example():
    tokenizer = tokenizer_for(TWO)
    encoded = encode(TWO, tokenizer)
    assert words(tokenizer, encoded.idx) == "a _ 1 _b _ 2 _c _ 3 _ d _e"
    assert words(tokenizer, encoded.targets) == f"_ 1 _b _ 2 _c _ 3 _ d _e {END}"
    assert words(tokenizer, encoded.targets[encoded.answer]) == f"d _e {END}"
    assert words(tokenizer, encoded.idx[encoded.causal]) == "1 3"
    assert words(tokenizer, encoded.idx[encoded.spurious]) == "2"
    assert encoded.edges.tolist() == [[9, 2], [9, 8], [10, 2], [10, 8]]


def test_padding_is_nothing_to_learn_from_or_to_look_at():
    tokenizer = tokenizer_for(TWO, WITHIN)
    two, within = encode(TWO, tokenizer), encode(WITHIN, tokenizer)
    batch = collate([two, within])
    assert not batch.causal[1].any()  # its cause is not one of the answer
    assert batch.idx.shape == (2, 12)  # as long as the longest example
    for name in ("idx", "targets", "answer", "causal", "spurious"):
        assert getattr(batch, name)[1, :8].equal(getattr(within, name))
    assert batch.targets[1, 8:].tolist() == [-100] * 4
    assert batch.answer.sum(dim=1).tolist() == [3, 2]
    assert batch.adjacency[0].nonzero().equal(two.edges)
    assert batch.adjacency[1].nonzero().equal(within.edges)
    assert batch.inside[1].sum() == collate([within]).inside.sum()
