"""Data: from the Spurious Token Game, or a labelled text, to tokens and batches.

A place in a text is called a span, (start, end) in characters of input + target. The game knows
its spans because it writes them; in a labelled file they are found by their phrases. From there on
both are an Example, and there are no phrases any more.

The sections: 1 the game, 2 labelled text, 3 tokens, 4 batches, and, to be skipped at first,
5 labels by an assistant and the commands `show`, `generate` and `annotate`.
"""
import argparse
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import unicodedata
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache

import tiktoken
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm


class UserError(Exception):
    """A mistake of the user: a message of one line with the place and the remedy."""


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


# ----------------------------------------------------------------------------
# 1 The game: causal features decide the answer, spurious ones copy them until they do not

@dataclass
class Example:
    """A question and its answer, and what causes what in them.

    Each edge is (span of an effect, span of a cause): whoever predicts the effect should look at
    the cause, which ends before the effect starts. The effect is most often the target.
    """
    input: str
    target: str
    edges: list = field(default_factory=list)
    spurious: list = field(default_factory=list)  # spans in the input that merely go along
    source: str = ""  # "file:line", for messages


@dataclass
class Feature:
    """A whole number of the game, drawn evenly from low to high unless it is a copy."""
    name: str
    low: int = 1
    high: int = 10
    weight: float = 0.0  # of a causal feature: its factor in the score
    copies: str = ""  # of a spurious feature: the causal feature that it copies
    ratio: float = 1.0  # of a spurious feature: the copy is ratio * the original, rounded down


@dataclass
class Game:
    causal: list
    spurious: list
    irrelevant: list
    question: str  # {features} stands for the numbers
    answers: list  # (lowest score, answer), from the highest score to the lowest


# The Spurious Token Game of the paper (STG).
STG = Game(
    causal=[
        Feature("Smoking", weight=1.2),
        Feature("Weight", weight=0.7),
        Feature("Exercise", weight=-1.0),
    ],
    spurious=[
        Feature("Yellow fingers", copies="Smoking", ratio=1.5),
        Feature("Clothing size", copies="Weight", ratio=1.0),
        Feature("Hormones", copies="Exercise", ratio=0.5),
    ],
    irrelevant=[
        Feature("Room size"),
        Feature("Certain gene"),
    ],
    question="Here is the statistical data for a person. "
             "Please predict the probability of cancer. {features} Answer: ",
    answers=[
        (7.3, "High Risk"),  # the rule is "over 7.2", and scores come in steps of 0.1
        (2.7, "Middle Risk"),
        (-math.inf, "Low Risk"),
    ],
)


def draw(game, ood, rng, spurious_rng):
    """The numbers of one question, {name: number}.

    In distribution a spurious feature copies a causal one. Out of distribution (ood) it is drawn
    by itself, from spurious_rng: the copy breaks, and values come that no copy has (Hormones copy
    half of Exercise, 0 to 5, and are now 1 to 10). All else stays as it was.
    """
    numbers = {}
    for feature in game.causal + game.irrelevant:
        numbers[feature.name] = rng.randint(feature.low, feature.high)
    for feature in game.spurious:
        if ood:
            numbers[feature.name] = spurious_rng.randint(feature.low, feature.high)
        else:
            numbers[feature.name] = math.floor(feature.ratio * numbers[feature.copies])
    return numbers


def answer_to(game, numbers):
    """The answer of the first band that the weighted sum of the causal numbers reaches."""
    score = 0.0
    for feature in game.causal:
        score += feature.weight * numbers[feature.name]
    score = round(score, 6)  # as floats, 1.2 * 4 + 0.7 * 7 - 7 is less than the 2.7 of a band
    for lowest, answer in game.answers:
        if score >= lowest:
            return answer


def write(game, numbers, rng):
    """The Example with these numbers, its features in a random order. Each span is noted while its
    words are written, so nothing has to be found again."""
    features = game.causal + game.spurious + game.irrelevant
    rng.shuffle(features)
    before, after = game.question.split("{features}")
    text = before
    causes, spurious = [], []
    for i, feature in enumerate(features):
        if i > 0:
            text += ", "
        start = len(text)
        text += f"{feature.name}: {numbers[feature.name]}"
        span = (start, len(text))
        if feature in game.causal:
            causes.append(span)
        elif feature in game.spurious:
            spurious.append(span)
    text += after

    answer = answer_to(game, numbers)
    effect = (len(text), len(text) + len(answer))
    edges = [(effect, cause) for cause in causes]
    return Example(text, answer, edges, spurious)


def generate(game, n, ood=False, seed=0, spurious_seed=0, seen=None):
    """n Examples of a game; no two have the same causal and irrelevant numbers.

    seen is a set of such numbers. They are not used again, and those of the new examples are
    added to it: training and test examples that share the set differ. Out of distribution another
    spurious_seed gives the same questions and answers with other spurious numbers.
    """
    seen = set() if seen is None else seen
    not_spurious = game.causal + game.irrelevant
    possible = math.prod(feature.high - feature.low + 1 for feature in not_spurious)
    if n < 1 or n + len(seen) > possible:
        raise UserError(f"{n} examples are asked for, after {len(seen)} others: give at least 1, "
                        f"and not more than the {possible} that the game has")

    # Two sources of random numbers, so that spurious ones can change while all else stays.
    rng = random.Random(f"{seed} {ood}")
    spurious_rng = random.Random(f"{seed} {spurious_seed} spurious")
    examples = []
    while len(examples) < n:
        numbers = draw(game, ood, rng, spurious_rng)
        example = write(game, numbers, rng)
        key = tuple(numbers[feature.name] for feature in not_spurious)
        if key not in seen:
            seen.add(key)
            examples.append(example)
    return examples


# ----------------------------------------------------------------------------
# 2 Labelled text: phrases in a file become spans

# One value, such as 8, -6.9, .5, 1,000, 1/3, 7:50, 2024-05-06 or 1e-5.
NUMBER = re.compile(r"""
    (?<!\w)                    # not in a word, as in B12
    (?<!\d[.,:/–-])            # not in the middle of a number
    (?<![^\W\d_][-–−])         # not after a letter and a hyphen, as in F-16
    (?: (?<![\w%°)]) [-−] )?   # a minus stands after a blank; "5-6" has a hyphen
    \.? \d+ (?: [.,:/–-] \d+ )*
    (?: [eE] [-+]? \d+ )?
    """, re.VERBOSE)

QUOTES = str.maketrans("‘’‚′“”„″", "''''" + '""""')  # curly quotes are found by straight ones
JOINERS = "\u00ad\u200c\u200d\u2060"  # soft hyphen, zero-width joiners, word joiner
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")  # no blanks
MOST_PLACES = 100  # a phrase that stands in more places says nothing


def is_mark(char):
    """True for what belongs to the character before it, such as an accent or a vowel sign."""
    return char in JOINERS or unicodedata.category(char).startswith("M")


def is_letter(char):
    """True for a letter or digit of a script that puts blanks between its words."""
    if char.isascii():
        return char.isalnum() or char == "_"
    return char.isalnum() and not unicodedata.name(char, "").startswith(UNSPACED)


def inner_places(text):
    """The places in a text that lie within a word or a number, where no phrase begins or ends:
    "he" does not stand in "the", nor 5 in 2.5."""
    inner = set()
    for place in range(1, len(text)):
        before, after = text[place - 1], text[place]
        if is_mark(after):
            inner.add(place)
        elif is_letter(after) and (is_letter(before) or is_mark(before)):
            inner.add(place)
    for joint in re.finditer(r"\d[.,:/–-](?=\d)", text):
        inner.update([joint.end() - 1, joint.end()])
    for number in NUMBER.finditer(text):
        inner.update(range(number.start() + 1, number.end()))
    return inner


@lru_cache(maxsize=10_000)  # the same phrases come in many lines
def pattern_of(phrase):
    """A pattern that finds a phrase in either case and with any white space between its words."""
    return re.compile(r"\s+".join(re.escape(word) for word in phrase.split()), re.IGNORECASE)


def find(text, phrase, inner, starts=(0,)):
    """The spans of a phrase in a text, and whether they are whole words and numbers.

    Whole words come first, then places inside words. starts are the places to search from, tried
    in turn. Where the phrase stands as it is written, places in another case are left out.
    """
    text = text.translate(QUOTES)
    phrase = unicodedata.normalize("NFC", phrase).translate(QUOTES)
    if not phrase.strip():
        return [], True
    for whole in (True, False):
        for start in starts:
            spans, as_written = [], []
            for match in pattern_of(phrase).finditer(text, start):
                if whole and (match.start() in inner or match.end() in inner):
                    continue
                spans.append(match.span())
                if match.group().split() == phrase.split():
                    as_written.append(match.span())
            spans = as_written or spans
            if len(spans) > MOST_PLACES:
                return [], whole
            if spans:
                return spans, whole
    return [], True


def link(input, target, important, spurious=(), source=""):
    """The Example of a text with phrases, and notes on phrases that are of no use.

    important is [(effect, [causes])], spurious a list, all phrases. A cause counts wherever it
    stands before its effect. The notes are (what is wrong, phrase).
    """
    text = input + target
    inner = inner_places(text)
    inner.discard(len(input))  # the target starts a word, even right behind a letter
    notes = []

    def places(text, phrase, starts=(0,)):
        spans, whole = find(text, phrase, inner, starts)
        if not spans:
            notes.append((f"not found, or in over {MOST_PLACES} places", phrase))
        elif not whole:
            notes.append(("found only inside words", phrase))
        return spans

    edges = {}  # a dict holds each edge once, in order
    for effect, causes in important:
        effects = places(text, effect, starts=(len(input), 0))  # in the target, or else anywhere
        if not effects:
            continue
        for cause in causes:
            found = places(text, cause)
            late = True
            for effect_span in effects:
                for cause_span in found:
                    if cause_span[1] <= effect_span[0]:
                        edges[effect_span, cause_span] = True
                        late = False
            if found and late:
                notes.append(("not before its effect", cause))
    spurious_spans = []
    for phrase in spurious:
        spurious_spans += places(input, phrase)
    return Example(input, target, list(edges), spurious_spans, source), notes


def no_equal_keys(pairs):
    """A JSON object as a dict, which alone would keep the last of equal keys."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return fields


def is_text(value):
    """True for a string that UTF-8 can hold: bytes that are not UTF-8, and halves of characters
    as in "\\ud83d", were read as surrogates, which become a question mark here."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


def parse_labels(important):
    """[(effect, [causes])] of the value of "important", and a list of what in it is no label. A
    null is treated as if it were not there."""
    pairs, wrong = [], []
    groups = important if isinstance(important, list) else [important]
    for group in groups:
        if group is None:
            continue
        if not isinstance(group, dict):
            wrong.append(group)
            continue
        for effect, causes in group.items():
            if not isinstance(causes, list):
                causes = [causes]
            causes = [cause for cause in causes if cause is not None]
            if not all(is_text(phrase) for phrase in [effect] + causes):
                wrong.append({effect: group[effect]})
            elif causes:
                pairs.append((effect, causes))
    return pairs, wrong


def text_of(fields, name, source):
    """The text under a name in a line of a file; a number is as good as a text."""
    value = fields.get(name)
    finite = isinstance(value, float) and math.isfinite(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if finite or whole:
        value = str(value)
    if not is_text(value) or not value.strip():
        found = json.dumps(value)[:40] if name in fields else "not there"
        raise UserError(f'{source}: "{name}" is {found}: give a text, in UTF-8')
    return unicodedata.normalize("NFC", value)


def read_fields(path):
    """The lines of a JSON Lines file as dicts with input, target, important [(effect, [causes])],
    spurious, wrong (what is no label) and source."""
    rows = []
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        lines = file.readlines()
    for number, line in enumerate(lines, 1):
        source = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            fields = json.loads(line, object_pairs_hook=no_equal_keys)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source}: no JSON: {error}") from None
        if not isinstance(fields, dict):
            raise UserError(f'{source}: {line.strip()[:40]} is no object: write {{"input": "...", '
                            '"target": "...", "important": [{"effect": ["cause"]}]}')
        important, wrong = parse_labels(fields.get("important"))
        spurious = fields.get("spurious") or []
        if not isinstance(spurious, list):
            spurious = [spurious]
        wrong += [phrase for phrase in spurious if phrase is not None and not is_text(phrase)]
        rows.append({
            "input": text_of(fields, "input", source),
            "target": text_of(fields, "target", source),
            "important": important,
            "spurious": [phrase for phrase in spurious if is_text(phrase)],
            "wrong": wrong,
            "source": source,
        })
    if not rows:
        raise UserError(f"{path}: no examples: give one JSON object on each line")
    return rows


def read(path):
    """The Examples of a JSON Lines file. Prints how many there are, and what is of no use."""
    examples = []
    notes = {}  # what is wrong: [the phrase and its line]
    for row in read_fields(path):
        example, useless = link(row["input"], row["target"], row["important"], row["spurious"],
                                row["source"])
        examples.append(example)
        useless += [("no label", label) for label in row["wrong"]]
        for what, phrase in useless:
            notes.setdefault(what, []).append(f"{phrase!r:.60} in {row['source']}")
    with_causes = [example for example in examples if example.edges]
    print(f"{path}: {len(examples)} examples, {len(with_causes)} of them with causes")
    for what, phrases in notes.items():
        print(f"{path}: {what}: {len(phrases)}, the first {phrases[0]}")
    return examples


def narrow(text, span):
    """The spans of the numbers in a span, 8 in "Smoking: 8", or the span if it has none."""
    numbers = [number.span() for number in NUMBER.finditer(text, *span)]
    return numbers or [span]


CAUSES = ("value", "span", "spurious", "random")


def choose_causes(example, how, rng):
    """The example with those causes that it is to be trained with. how is

    value     the numbers of each cause, 8 in "Smoking: 8", or all of it if it has none
    span      each cause whole
    spurious  the spurious numbers instead of the causes: a control
    random    as many other numbers of the input instead, drawn from rng: a control
    """
    if how == "span":
        return example
    text = example.input + example.target
    spurious = []
    for span in example.spurious:
        spurious += narrow(text, span)
    edges = []
    for effect, cause in example.edges:
        for number in narrow(text, cause):
            edges.append((effect, number))
    if how == "value" or not edges:
        return replace(example, edges=edges, spurious=spurious)

    causes = {cause for _, cause in edges}
    if how == "spurious":
        if not spurious:
            raise UserError(f'{example.source}: no "spurious" phrases, which --causes spurious '
                            "needs: name them, or give --causes value")
        wrong = spurious
    else:
        numbers = [number.span() for number in NUMBER.finditer(example.input)]
        others = [number for number in numbers if number not in causes]
        wrong = rng.sample(others, min(len(causes), len(others)))
    wrong_edges = {}  # a dict holds each edge once, in order
    for effect, _ in edges:
        for cause in wrong:
            if cause[1] <= effect[0]:
                wrong_edges[effect, cause] = True
    return replace(example, edges=list(wrong_edges), spurious=spurious)


def hold_out(examples, share, seed):
    """(train, held out): a share, between 0 and 1, of the different inputs is held out."""
    inputs = sorted({example.input for example in examples})
    n = round(share * len(inputs)) if 0 < share < 1 else 0
    if not 0 < n < len(inputs):
        raise UserError(f"--val is {share:g}: give a share between 0 and 1 that leaves examples "
                        f"on both sides of {len(inputs)} different inputs")
    held = set(random.Random(seed).sample(inputs, n))
    train = [example for example in examples if example.input not in held]
    return train, [example for example in examples if example.input in held]


# ----------------------------------------------------------------------------
# 3 Tokens: spans become (query, key) pairs

END = "<|endoftext|>"  # the token that closes every answer

# How a text is cut before it is looked up: numbers of up to three digits, words with the blank
# before them, punctuation with the blanks behind it. So ": " is one token, and a question that
# ends in it is cut where training cut it.
PUNCTUATION = r"!-/:-@\[-`{-~"  # of ASCII
PATTERN = rf"\d{{1,3}}| ?[^\s\d{PUNCTUATION}]+|[{PUNCTUATION}]+\s*|\s+"


def tokenizer_of(pieces, pattern=PATTERN):
    """A tiktoken.Encoding whose tokens are pieces, a list of bytes, and END."""
    ranks = {piece: i for i, piece in enumerate(pieces)}
    return tiktoken.Encoding("cat", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={END: len(ranks)})


def build_tokenizer(texts):
    """A tokenizer for any text: a token for each byte, for each number of up to three digits that
    occurs in texts, and for each other piece of PATTERN that occurs twice."""
    counts = Counter()
    for text in texts:
        counts.update(re.findall(PATTERN, text))
    pieces = [bytes([i]) for i in range(256)]
    for piece, n in counts.most_common():
        piece_bytes = piece.encode()
        if len(piece_bytes) > 1 and (n > 1 or piece.isdecimal()):
            pieces.append(piece_bytes)
    return tokenizer_of(pieces)


def pieces_of(tokenizer):
    """The list of bytes that `tokenizer_of` makes the tokenizer from."""
    return [tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.n_vocab - 1)]


def token_offsets(tokenizer, tokens):
    """The span of each token. Tokens that are bytes of one character have the same span."""
    text, starts = tokenizer.decode_with_offsets(tokens)
    offsets = []
    for start, end in zip(starts, starts[1:] + [len(text)]):
        offsets.append((start, max(end, start + 1)))  # the next byte may start where this one does
    return offsets


def tokens_in(span, offsets):
    """The positions of the tokens that share a character with a span."""
    start, end = span
    return [t for t, (a, b) in enumerate(offsets) if a < end and start < b]


def token_edges(edges, offsets):
    """Edges between spans as a sorted list of (query, key), positions of tokens.

    offsets are the spans of the tokens, from `token_offsets` or any Hugging Face tokenizer, whose
    special tokens have (0, 0). An effect on the tokens s..e is supervised at the queries s-1..e-1
    that predict it; the keys are the cause's tokens before s.
    """
    pairs = set()
    for effect, cause in edges:
        effect_tokens = tokens_in(effect, offsets)
        cause_tokens = tokens_in(cause, offsets)
        for t in effect_tokens:
            # A decoder predicts token t from what it knows at position t - 1. At t itself it is
            # too late: there the token is already known.
            query = t - 1
            for key in cause_tokens:
                if key < effect_tokens[0]:
                    pairs.add((query, key))
    return sorted(pairs)


# The item of a number is the words around it that say what it is: "Smoking: 8" for the 8, and
# "Answer: High Risk" for an answer. Items end with a number that stands alone or with a separator;
# a comma or point between two digits does not separate.
SEPARATOR = r"[;?!|\t\n\r，。；？！、،؛؟।] | (?<!\d)[,.] | [,.](?!\d)"
ITEM_END = re.compile(rf"{NUMBER.pattern} | {SEPARATOR}", re.VERBOSE)


def item_start(text, span, ends):
    """Where the item around a span starts: for the 8 of "Smoking: 8" at the S. ends are the places
    where items of the text end, from `item_ends`. Blanks after the item before are left out."""
    start = max(end for end in ends if end <= span[0])
    while start < span[0] and text[start].isspace():
        start += 1
    return start


def item_ends(example):
    """The places in input + target where an item ends, so that the next can start; 0 is one too.
    A number does not go on from the input into the target, so they are searched apart."""
    ends = [0]
    for match in ITEM_END.finditer(example.input):
        ends.append(match.end())
    for match in ITEM_END.finditer(example.target):
        ends.append(len(example.input) + match.end())
    return ends


OUTSIDE = 10**9  # item_first of a token that is in no item: a position after all tokens


@dataclass
class Encoded:
    """The tensors of one Example of T tokens."""
    idx: torch.Tensor  # (T,) token ids
    targets: torch.Tensor  # (T,) the next token of each
    answer: torch.Tensor  # (T,) bool: predicts a token of the answer, or END
    causal: torch.Tensor  # (T,) bool: holds a cause of the answer
    spurious: torch.Tensor  # (T,) bool: holds what is called spurious and is no cause
    item_first: torch.Tensor  # (T,) first token of its item, of a cause or effect, or OUTSIDE
    edges: torch.Tensor  # (E, 2) query and key of each edge


def encode(example, tokenizer):
    """The Encoded of an Example."""
    text = example.input + example.target
    # The answer is cut apart from the question, as it is when the model is asked.
    prompt = tokenizer.encode_ordinary(example.input)
    tokens = prompt + tokenizer.encode_ordinary(example.target)
    offsets = token_offsets(tokenizer, tokens)
    T = len(tokens)

    # The last token of the question predicts the first of the answer.
    answer = [t >= len(prompt) - 1 for t in range(T)]

    pairs = token_edges(example.edges, offsets)
    causal, spurious = [False] * T, [False] * T
    for span in example.spurious:
        for t in tokens_in(span, offsets):
            spurious[t] = True
    for query, key in pairs:
        if answer[query]:
            causal[key] = True
            spurious[key] = False  # what is called both is causal

    item_first = [OUTSIDE] * T
    ends = item_ends(example)
    spans = set()
    for effect, cause in example.edges:
        spans.update([effect, cause])
    for span in spans:
        item = tokens_in((item_start(text, span, ends), span[1]), offsets)
        first = item[0]
        if span[1] > len(example.input):
            # The query that predicts the answer is in its item, even behind "...?" or a number.
            first = min(first, len(prompt) - 1)
        for t in range(first, item[-1] + 1):
            item_first[t] = min(item_first[t], first)  # where items overlap, the earlier counts

    return Encoded(
        idx=torch.tensor(tokens),
        targets=torch.tensor(tokens[1:] + [tokenizer.encode_single_token(END)]),
        answer=torch.tensor(answer),
        causal=torch.tensor(causal),
        spurious=torch.tensor(spurious),
        item_first=torch.tensor(item_first),
        edges=torch.tensor(pairs, dtype=torch.long).view(-1, 2),
    )


# ----------------------------------------------------------------------------
# 4 Batches: as long as their own longest example

@dataclass
class Batch:
    """B examples, padded on the right to the T tokens of the longest."""
    idx: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T), -100 on padding
    answer: torch.Tensor  # (B, T) bool
    causal: torch.Tensor  # (B, T) bool
    spurious: torch.Tensor  # (B, T) bool
    adjacency: torch.Tensor  # (B, T, T) bool: query i should look at key j
    inside: torch.Tensor  # (B, T, T) bool: key j is in the item of token i, and not after it


def collate(examples, device="cpu"):
    """A Batch of Encoded examples on a device."""
    def padded(name, value):
        columns = [getattr(example, name) for example in examples]
        return pad_sequence(columns, batch_first=True, padding_value=value)  # (B, T)

    idx = padded("idx", 0)
    B, T = idx.shape
    n_edges = torch.tensor([len(example.edges) for example in examples])
    b = torch.arange(B).repeat_interleave(n_edges)  # the example of each edge
    query, key = torch.cat([example.edges for example in examples]).unbind(dim=1)
    adjacency = torch.zeros(B, T, T, dtype=torch.bool)
    adjacency[b, query, key] = True

    # In "Smoking: 8" the 8 may look at Smoking, at the colon and at itself. Row i of `inside` is
    # about what token i holds and later layers read from it, not about what it predicts: it is not
    # shifted.
    first = padded("item_first", OUTSIDE)[:, :, None]  # (B, T, 1)
    query = torch.arange(T)[:, None]  # (T, 1)
    key = torch.arange(T)[None, :]  # (1, T)
    inside = (first <= key) & (key <= query)  # (B, T, T)

    return Batch(
        idx=idx.to(device),
        targets=padded("targets", -100).to(device),
        answer=padded("answer", False).to(device),
        causal=padded("causal", False).to(device),
        spurious=padded("spurious", False).to(device),
        adjacency=adjacency.to(device),
        inside=inside.to(device),
    )


# ----------------------------------------------------------------------------
# 5 Labels by an assistant, and the commands (to be skipped at first)

INSTRUCTION = """In each line below "important" says which phrases of input and target decide which
later ones, [{effect: [causes]}]; the effect is most often the target. Copy phrases letter by
letter. Reply with the "important" of the last line alone, as JSON, and nothing after it.

"""

# What models print around a draft that is not meant as the answer.
DRAFTS = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
    ("Thinking...", "...done thinking."),
]


def to_line(input, target, important=(), spurious=()):
    """A line of a JSON Lines file as `read` reads it; important is [(effect, [causes])]."""
    fields = {"input": input, "target": target}
    if important:
        fields["important"] = [{effect: causes} for effect, causes in important]
    if spurious:
        fields["spurious"] = list(spurious)
    return json.dumps(fields, ensure_ascii=False) + "\n"


def parse_reply(reply):
    """The labels [(effect, [causes])] of an assistant's reply. ValueError if it has none to read.

    After any draft, words without brackets may stand before the one JSON value that ends the
    reply: {effect: [causes]}, a list of these, or {"important": [...]}.
    """
    for _, end in DRAFTS:
        reply = reply.rpartition(end)[2]
    for start, _ in DRAFTS:
        if start in reply:
            raise ValueError("a draft that does not end")
    reply = reply.strip().removesuffix("```").strip()
    bracket = re.search(r"[\[{]", reply)
    if bracket is None:
        raise ValueError("no JSON in the reply")
    try:
        value = json.loads(reply[bracket.start():], object_pairs_hook=no_equal_keys)
    except RecursionError:
        raise ValueError("too many brackets") from None
    if isinstance(value, dict) and "important" in value and len(value) == 1:
        value = value["important"]
    for group in value if isinstance(value, list) else [value]:
        if isinstance(group, dict) and "input" in group:
            raise ValueError("an echo of the question")
    pairs, wrong = parse_labels(value)
    if wrong:
        raise ValueError(f"no label: {wrong[0]!r:.60}")
    return pairs


def run_assistant(command, prompt, timeout):
    """What a command, run by the platform's shell, prints when it is given a prompt. ValueError
    when it fails or takes more than timeout seconds."""
    posix = os.name == "posix"
    process = subprocess.Popen(command, shell=True, encoding="utf-8", errors="replace",
                               start_new_session=posix, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    try:
        reply, _ = process.communicate(prompt, timeout=timeout)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        # What the shell has started must end too, even when the shell itself has ended before.
        if posix:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        else:
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)])
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise ValueError(f"no reply in {timeout} seconds") from None
        raise
    if process.returncode in (126, 127, 9009):  # what shells say of a command that is not there
        raise UserError(f"--assistant {command!r}: the shell can't run it: give a command that "
                        "reads a prompt and prints a reply")
    if process.returncode != 0:
        raise ValueError(f"the command failed with code {process.returncode}")
    return reply


def annotate(questions, demos, assistant, out, timeout=300):
    """Labels the examples of the file questions, given some labelled by hand in demos (the paper's
    way to supervision). Each usable reply becomes a line of out at once; what stands in out is not
    asked for again."""
    rows = read_fields(questions)
    prompt = INSTRUCTION
    for demo in read_fields(demos):
        prompt += to_line(demo["input"], demo["target"], demo["important"])
    done = set()
    with open(out, "a+b") as file:  # fails at once where nothing can be written
        file.seek(0)
        before = file.read()
        if before.strip():
            done = {(row["input"], row["target"]) for row in read_fields(out)}
        if before and not before.endswith(b"\n"):
            file.write(b"\n")

    unusable = []
    todo = [row for row in rows if (row["input"], row["target"]) not in done]
    for row in tqdm(todo, disable=None):
        question = prompt + to_line(row["input"], row["target"])
        try:
            important = parse_reply(run_assistant(assistant, question, timeout))
            example, _ = link(row["input"], row["target"], important)
            if not example.edges:
                raise ValueError("no cause that stands before its effect")
        except ValueError as error:
            unusable.append(f"{row['source']}: {error}")
            continue
        with open(out, "a", encoding="utf-8") as file:
            file.write(to_line(row["input"], row["target"], important, row["spurious"]))
    print(f"{len(todo) - len(unusable)} labelled, {len(unusable)} without a usable reply")
    if unusable:
        print(f"the first of them: {unusable[0]}; the same command asks for them again")


def show(file, row):
    """Prints an example of a file, what should look at what in it, and the item of each cause."""
    examples = read(file)
    if not 1 <= row <= len(examples):
        raise UserError(f"--row is {row}: {file} has the rows 1 to {len(examples)}")
    example = choose_causes(examples[row - 1], "value", random.Random(0))
    text = example.input + example.target
    ends = item_ends(example)
    print(text)
    for effect, cause in example.edges:
        item = text[item_start(text, cause, ends):cause[1]]
        print(f"{text[slice(*effect)]!r} at {effect[0]} should look at {text[slice(*cause)]!r} "
              f"at {cause[0]}, in the item {item!r}")


def game_line(example):
    """The line of a file for an Example of a game, which must give the same spans again."""
    text = example.input + example.target
    inner = inner_places(text)
    phrases = {}
    for span in [cause for _, cause in example.edges] + example.spurious:
        phrases[span] = text[slice(*span)]
        for start, end in find(text, phrases[span], inner)[0]:
            if (start, end) != span:
                item = text[item_start(text, (start, end), item_ends(example)):end]
                raise UserError(f"{phrases[span]!r} stands in {item!r} too: rename one of them")
    causes = [phrases[cause] for _, cause in example.edges]
    spurious = [phrases[span] for span in example.spurious]
    return to_line(example.input, example.target, [(example.target, causes)], spurious)


def save_game(rows, ood, seed, out):
    lines = [game_line(example) for example in generate(STG, rows, ood, seed)]
    with open(out, "w", encoding="utf-8") as file:
        file.writelines(lines)
    print(f"wrote {len(lines)} examples to {out}")


def main(argv):
    parser = OneLineParser(
        description="Look at data, write the game to a file, or have questions labelled.")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("show", help="show what should look at what in an example")
    command.add_argument("file", help="a JSON Lines file")
    command.add_argument("--row", type=int, default=1, help="which example of it (default: 1)")

    command = commands.add_parser("generate", help="write examples of the game to a file")
    command.add_argument("--rows", type=int, default=1600, help="how many (default: 1600)")
    command.add_argument("--ood", action="store_true", help="spurious features do not copy")
    command.add_argument("--seed", type=int, default=0, help="of the numbers (default: 0)")
    command.add_argument("--out", required=True, help="the file to write")

    command = commands.add_parser("annotate", help="have questions labelled by an assistant")
    command.add_argument("questions", help="a JSON Lines file of questions and answers")
    command.add_argument("--demos", required=True, help="a file with a few labelled by hand")
    command.add_argument("--assistant", required=True,
                         help="a shell command that reads a prompt and prints a reply")
    command.add_argument("--out", required=True, help="the file for the labelled examples")

    args = parser.parse_args(argv)
    if args.command == "show":
        show(args.file, args.row)
    elif args.command == "generate":
        save_game(args.rows, args.ood, args.seed, args.out)
    else:
        annotate(args.questions, args.demos, args.assistant, args.out)


def run_main(main, on_interrupt):
    """Runs a program's main on the command line; a mistake of its user ends it with one line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # what can't be printed is escaped
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:  # OSError: a file that is not there, a full disk
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(on_interrupt, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run_main(main, on_interrupt="interrupted: the same command goes on")
