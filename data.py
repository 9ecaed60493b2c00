"""Data: the rule-based Spurious Token Game (STG), phrases to token adjacency, tokenizer, batches;
last, to be skipped at first, labels by an assistant."""
import argparse
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
import unicodedata
from array import array
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

ROLES = ("other", "causal", "spurious", "irrelevant")  # a token's role is stored as its index here
EDGES = ("value", "span", "spurious", "random")  # what is called causal, see `chosen_edges`
END = "<|endoftext|>"  # closes every answer, so that a greedy answer knows where to stop


@dataclass(frozen=True)
class Feature:
    """One number in a game's text: uniform in low..high (whole if decimals and noise are 0)."""
    name: str
    low: float = 1
    high: float = 10
    noise: float = 0.0  # standard deviation of the Gaussian noise that is added
    decimals: int = 0  # how many are shown; the answer is computed from the value before rounding
    unit: str = ""
    weight: float = 0.0  # causal features: factor in the score
    copies: str = ""  # spurious features: the causal feature copied in training and IID tests
    ratio: float = 0.0  # spurious features: factor of the copy; low..high, without noise, is OOD


@dataclass(frozen=True)
class Game:
    """A Spurious Token Game, the paper's synthetic benchmark: causal features decide the answer,
    spurious ones copy them until they are out of distribution."""
    name: str
    causal: tuple
    spurious: tuple
    irrelevant: tuple
    question: str  # {features} stands for the numbers; the answer follows
    bands: tuple = ()  # ((lowest score, answer), ...), highest first; or
    scale: tuple = ()  # (low, high): the score is answered as a whole number, 0 (low) to 100 (high)
    shuffle: bool = True  # every example has its own order; else causal, spurious, irrelevant
    steps: int = 1200  # that training needs, of 16 examples each

    def __post_init__(self):
        causes, lows = [f.name for f in self.causal], [low for low, _ in self.bands]
        for f in self.causal + self.spurious + self.irrelevant:
            if f.low > f.high:
                raise ValueError(f"{self.name}: {f.name} has low {f.low} above high {f.high}: swap them")
        for f in self.spurious:
            if f.copies not in causes:
                raise ValueError(f"{self.name}: {f.name} copies {f.copies!r}, which is no causal feature: "
                                 f"choose one of {', '.join(causes)}")
        if self.question.count("{features}") != 1:
            raise ValueError(f"{self.name}: question must hold {{features}} once, where the numbers go")
        if not self.scale and (lows != sorted(lows, reverse=True) or lows[-1:] != [-math.inf]):
            raise ValueError(f"{self.name}: bands are {lows}: give the highest first, and last the one "
                             "from -math.inf")

    def answer(self, score):
        """The answer to a score: its band's, or its place on the scale."""
        if self.scale:
            low, high = self.scale
            return str(round(100 * (min(max(score, low), high) - low) / (high - low)))
        return next(answer for lowest, answer in self.bands if round(score, 6) >= lowest)


STG = Game(
    name="STG",
    causal=(Feature("Smoking", weight=1.2), Feature("Weight", weight=0.7),
            Feature("Exercise", weight=-1.0)),
    spurious=(Feature("Yellow fingers", copies="Smoking", ratio=1.5),
              Feature("Clothing size", copies="Weight", ratio=1.0),
              Feature("Hormones", copies="Exercise", ratio=0.5)),
    irrelevant=(Feature("Room size"), Feature("Certain gene")),
    question="Here is the statistical data for a person. "
             "Please predict the probability of cancer. {features} Answer: ",
    bands=((7.3, "High Risk"), (2.7, "Middle Risk"), (-math.inf, "Low Risk")))  # > 7.2 is >= 7.3

STG_H = Game(
    name="STG_H",
    causal=(Feature("Industrial Emissions", 30, 70, 2.0, 1, weight=0.3),
            Feature("Vehicle Emissions", 20, 60, 2.0, 1, weight=0.25),
            Feature("Coal Dependency", 10, 50, 1.5, 1, "%", weight=0.2),
            Feature("Agricultural Burning", 10, 30, 1.0, 1, weight=0.15),
            Feature("Urban Green Coverage", 40, 80, 3.0, 1, "%", weight=-0.2),
            Feature("Meteorological Dispersion", 50, 90, 3.0, 1, weight=-0.3)),
    spurious=(Feature("Ice Cream Sales Index", 5, 9, 2.0, 1,
                      copies="Meteorological Dispersion", ratio=0.4),
              Feature("Allergy Complaints Level", 2, 6, 3.0, 1,
                      copies="Agricultural Burning", ratio=0.2),
              Feature("Renewable Stock Index", 3, 7, 1.5, 0,
                      copies="Industrial Emissions", ratio=1.1),
              Feature("Public Transport Subscriptions (k)", 3, 9, 2.0, 1,
                      copies="Vehicle Emissions", ratio=0.15),
              Feature("Water Awareness Score", -8, -4, 1.0, 1,
                      copies="Urban Green Coverage", ratio=-0.1)),
    irrelevant=(Feature("City Anniversary", 1, 100, unit="th"),
                Feature("Average Internet Speed", 80, 120, 3.0, 1, "Mbps"),
                Feature("Number of Libraries", 10, 50)),
    question="{features}. Given these diverse conditions, what is the projected Air Quality Index "
             "(AQI) on a 0-100 scale? Answer: ",
    scale=(-20, 30), shuffle=False, steps=4500)

GAMES = {game.name: game for game in (STG, STG_H)}


@dataclass(frozen=True)
class Example:
    """One question with its answer. Spans are (start, end) in characters of input + target."""
    input: str
    target: str
    edges: tuple = ()  # ((effect span, cause span), ...): who predicts the effect looks at the cause
    spurious: tuple = ()  # spans that merely go along with the answer, where known
    irrelevant: tuple = ()  # spans of noise, where known
    source: str = ""  # "file:line", for messages
    dropped: int = 0  # phrases of its labels that were not found


def draw(feature, rng):
    """A uniform value in low..high, a whole number when neither decimals nor noise are asked for."""
    if feature.noise or feature.decimals:
        return rng.uniform(feature.low, feature.high)
    return rng.randint(feature.low, feature.high)


def generate(game, n, ood=False, seed=0, exclude=()):
    """n examples of a game, no two alike in their numbers (the paper's synthetic benchmark)."""
    if n < 1:
        raise ValueError(f"rows is {n}: give at least 1")
    rng = random.Random(f"{game.name} {ood} {seed}")
    seen = {numbers_of(example) for example in exclude}
    examples, misses = [], 0
    while len(examples) < n:
        value = {f: draw(f, rng) + rng.gauss(0, f.noise) for f in game.causal + game.irrelevant}
        by_name = {f.name: value[f] for f in game.causal}
        for f in game.spurious:
            copy = f.ratio * by_name[f.copies]
            value[f] = (draw(f, rng) if ood else copy + rng.gauss(0, f.noise) if f.noise
                        else math.floor(copy))
        score = sum(f.weight * value[f] for f in game.causal)
        shown = {f: f"{value[f]:.{f.decimals}f}" for f in value}
        example = render(game, shown, game.answer(score), rng)
        misses = misses + 1 if numbers_of(example) in seen else 0
        if misses == 1000:  # in a row
            raise ValueError(f"rows is {n}: {game.name} has too few different examples, ask for fewer")
        if not misses:
            seen.add(numbers_of(example))
            examples.append(example)
    return examples


def render(game, shown, answer, rng):
    """The Example with the numbers `shown` ({feature: text}): its text, and where each stands."""
    groups, separator = [list(group) for group in (game.causal, game.spurious, game.irrelevant)], "; "
    if game.shuffle:
        groups, separator = [sum(groups, [])], ", "
        rng.shuffle(groups[0])
    text, after = game.question.split("{features}")
    span = {}
    for g, group in enumerate(groups):
        for i, f in enumerate(group):
            text += separator if i else ". " if g else ""
            span[f] = len(text), len(text) + len(f"{f.name}: {shown[f]}")
            text += f"{f.name}: {shown[f]}{f.unit}"
    text += after
    effect = len(text), len(text) + len(answer)
    return Example(text, answer, tuple((effect, span[f]) for f in game.causal),
                   tuple(span[f] for f in game.spurious), tuple(span[f] for f in game.irrelevant))


def numbers_of(example):
    """What makes two examples of a game the same: their numbers, in whatever order they stand."""
    spans = [cause for _, cause in example.edges] + [*example.spurious, *example.irrelevant]
    return tuple(example.input[slice(*span)] for span in spans)


# One value each: 8, -6.9, .5, 1,000, 1/3, 7:50, 0-100, 2024-05-06, 1e-5. None: PM2.5, B12, F-16.
NUMBER = re.compile(r"(?<!\w)(?<!\d[.,:/–-])(?<![^\W\d_]-)"  # not within a word or number
                    r"[-−]?\.?\d+(?:[.,:/–-]\d+)*(?:[eE][-+]?\d+)?")
WORD = re.compile(NUMBER.pattern + r"|\w+(?:(?<=\d)[.,:/–-]\d+)*")
MANY = 100
MISSING, INSIDE = f"phrases not in the text, or at over {MANY} places", "phrases inside words only"
LATE = "causes not before their effect"


def numbers_in(text, span):
    """The spans of the numbers in a span of text."""
    return [number.span() for number in NUMBER.finditer(text, *span)]


def torn(text, at):
    """Whether a place in text has the same word or number on both sides."""
    nearby = WORD.finditer(text, text.rfind(" ", 0, at) + 1, at + 4)
    return any(word.start() < at < word.end() for word in nearby)


@lru_cache(maxsize=10_000)
def loose(phrase):
    """The phrase as a pattern: any case, white space, quotes and composition of accents."""
    phrase = unicodedata.normalize("NFC", phrase)
    forms = {c: f"(?:{c}|{unicodedata.normalize('NFD', c)})" for c in phrase if c.isalpha()}
    forms |= dict.fromkeys("'‘’′", "['‘’′]") | dict.fromkeys('"“”″', '["“”″]')
    words = ("".join(forms.get(c) or re.escape(c) for c in word) for word in phrase.split())
    return re.compile(r"\s+".join(words), re.IGNORECASE)


def find(text, phrase, start=0, whole=True):
    """Spans of text, from start on, that are the phrase exactly, or when there is none, loosely.

    whole: neither begins nor ends inside a word or number ("he" in "the", "5" in "2.5").
    """
    def fits(span):  # no word of the input goes on in the target, which begins at start
        return not whole or not any(at > start and torn(text, at) for at in span)

    phrase, spans, at = phrase.strip(), [], start - 1
    while phrase and (at := text.find(phrase, at + 1)) >= 0:
        spans.append((at, at + len(phrase)))
    spans = [span for span in spans if fits(span)]
    if phrase and not spans:
        spans = [m.span() for m in loose(phrase).finditer(text, start) if fits(m.span())]
    return spans


def find_anyhow(text, phrase, starts, notes):
    """`find` from the first of the starts that has the phrase, and only then inside words."""
    for whole in (True, False):
        for start in starts:
            spans = find(text, phrase, start, whole)
            if 0 < len(spans) <= MANY:
                notes[INSIDE] += [] if whole else [phrase]
                return spans
    notes[MISSING].append(phrase)
    return []


def phrases_to_edges(input, target, important):
    """Phrases to edges, the paper's causal supervision signals.

    important: a list of {effect: [causes]}. An effect is looked for in the target, then everywhere;
    a cause counts where it ends before its effect starts.
    Returns (edges, notes): edges as in Example, notes {MISSING, INSIDE or LATE: [phrases]}.
    """
    text, edges, notes = input + target, {}, defaultdict(list)
    for effect, causes in ((e, c) for group in important for e, c in group.items()):
        effects = find_anyhow(text, effect, (len(input), 0), notes)
        for cause in causes if effects else ():
            spans = find_anyhow(text, cause, (0,), notes)
            pairs = [(e, c) for e in effects for c in spans if c[1] <= e[0]]
            edges.update(dict.fromkeys(pairs))
            notes[LATE] += [cause] if spans and not pairs else []
    return tuple(edges), notes


def as_list(value):
    return value if isinstance(value, list) else [value]


def merge(pairs):
    """A JSON object whose equal keys add up; json alone would keep the last."""
    merged = {}
    for key, value in pairs:
        merged[key] = as_list(merged[key]) + as_list(value) if key in merged else value
    return merged


def parse_example(line, source=""):
    """A line of JSON to (Example, notes as above). ValueError says what is wrong and what to do."""
    try:
        fields = json.loads(line, object_pairs_hook=merge)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON ({str(error).split(':')[0]}): "
                         "write one object on each line, as UTF-8") from None
    if not isinstance(fields, dict):
        raise ValueError('not a JSON object: write {"input": ..., "target": ...}')
    if type(fields.get("target")) in (int, float) and abs(fields["target"]) < math.inf:
        fields["target"] = str(fields["target"])
    for key in ("input", "target"):
        text = fields.get(key, "missing")
        if key not in fields or not isinstance(text, str) or not text.strip() \
                or re.search("[\ud800-\udfff]", text):
            raise ValueError(f'"{key}" is {text!r:.40}: give a text'
                             + " or a number" * (key == "target"))
    input, target = fields["input"], fields["target"]
    try:
        important = [{effect: as_list(causes) for effect, causes in group.items()}
                     for group in as_list(fields.get("important") or [])]
        edges, notes = phrases_to_edges(input, target, important)
        dropped, spans = len(notes[MISSING]), {}
        for role in ("spurious", "irrelevant"):
            found = [span for phrase in as_list(fields.get(role) or [])
                     for span in find_anyhow(input, phrase, (0,), notes)]
            spans[role] = tuple(span for span in dict.fromkeys(found) if is_free(span, edges))
    except (AttributeError, TypeError):
        raise ValueError('a label has the wrong shape: give "important": [{"effect": ["cause", ...]}, '
                         '...] and "spurious": ["phrase", ...], or leave it out') from None
    return Example(input, target, edges, **spans, source=source, dropped=dropped), notes


def is_free(span, edges):
    """Whether a span has no character in common with a cause."""
    return all(end <= span[0] or span[1] <= start for _, (start, end) in edges)


def read(path, skip_bad=False):
    """A JSON Lines file of input, target and optional important, spurious and irrelevant (DOC) to
    (list of Example, summary line).

    A bad line raises ValueError as "file:line: what, and what to do", or is counted with skip_bad;
    phrases that are not found are only counted. OSError when the file can't be read.
    """
    examples, counts, first = [], Counter(), {}
    with open(path, "rb") as file:
        for n, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                example, notes = parse_example(line, f"{path}:{n}")
                examples.append(example)
            except ValueError as error:
                if not skip_bad:
                    raise ValueError(f"{path}:{n}: {error}, or pass --skip-bad") from None
                notes = {"bad lines skipped": [str(error)]}
            for what in filter(notes.get, notes):
                counts[what] += len(notes[what])
                first.setdefault(what, f"line {n}: {notes[what][0]!r}")
    if not examples:
        raise ValueError(f"{path}: no examples: give one JSON object on each line")
    answered = sum(any(effect[1] > len(e.input) for effect, _ in e.edges) for e in examples)
    summary = (f"{path}: {len(examples)} examples, {sum(bool(e.edges) for e in examples)} supervised, "
               f"{answered} of them at the answer")
    return examples, summary + "".join(f"; {n} {what}, such as {first[what]}"
                                       for what, n in counts.items())


def dump(examples):
    """Examples as lines of JSON that `read` takes back unchanged."""
    for example in examples:
        text, important = example.input + example.target, {}
        for effect, cause in example.edges:
            important.setdefault(text[slice(*effect)], {})[text[slice(*cause)]] = None
        fields = {"input": example.input, "target": example.target,
                  "important": [{effect: list(causes)} for effect, causes in important.items()],
                  "spurious": [text[slice(*span)] for span in example.spurious],
                  "irrelevant": [text[slice(*span)] for span in example.irrelevant]}
        yield json.dumps({k: v for k, v in fields.items() if v}, ensure_ascii=False) + "\n"


def move_spans(example, input, move):
    """The example with another input, each span moved by a function; as it is when one has no place
    there (None) or a cause no longer ends before its effect."""
    edges = tuple((move(effect), move(cause)) for effect, cause in example.edges)
    spurious, irrelevant = (tuple(map(move, s)) for s in (example.spurious, example.irrelevant))
    if None in sum(edges, spurious + irrelevant) or any(c[1] > e[0] for e, c in edges):
        return example
    return dataclasses.replace(example, input=input, edges=edges, spurious=spurious,
                               irrelevant=irrelevant)


def replace(example, changes):
    """The example with changes = {span of the input: text}, its spans moved along."""
    def move(span):
        if not any(start < at < end for start, end in changes for at in span):
            return tuple(at + sum(len(new) - (end - start) for (start, end), new in changes.items()
                                  if end <= at) for at in span)

    input = example.input
    for (start, end), new in sorted(changes.items(), reverse=True):
        input = input[:start] + new + input[end:]
    return move_spans(example, input, move)


def fixed_question(inputs):
    """What all inputs begin and end with, in whole words: (prefix, suffix)."""
    begin = os.path.commonprefix(inputs)
    end = os.path.commonprefix([text[::-1] for text in inputs])[::-1]
    return begin[:begin.rfind(" ") + 1], end[end.find(" "):] if " " in end else ""


def hold_out(examples, share, seed):
    """Splits examples into (train, iid, ood, changed), equal inputs on one side: iid is a share, 0 to
    1, of the inputs. ValueError when nothing is left for one side.

    ood: of the iid examples with edges and no dropped phrase, the numbers that belong to no cause,
    shuffled in each input, so that what went along with a cause no longer does while the answer
    stays true. What all inputs begin and end with is the question, and stays. changed: how many did.
    """
    rng, inputs = random.Random(seed), sorted({example.input for example in examples})
    held_out = set(rng.sample(inputs, round(share * len(inputs)) if 0 < share < 1 else 0))
    if not 0 < len(held_out) < len(inputs):
        raise ValueError(f"a share of {share:g} of {len(inputs)} different inputs leaves no example on "
                         "one side: give a share between 0 and 1, or more examples")
    train = [example for example in examples if example.input not in held_out]
    iid = [example for example in examples if example.input in held_out]
    begin, end = (len(os.path.commonprefix([text[::step] for text in inputs])) for step in (1, -1))
    ood, changed = [], 0
    for example in iid:
        if example.edges and not example.dropped:
            length = len(example.input)
            spans = [span for span in numbers_in(example.input, (0, length)) if begin < span[1]
                     and span[0] < length - end and is_free(span, example.edges)]
            values = [example.input[slice(*span)] for span in spans]
            rng.shuffle(values)
            ood.append(replace(example, dict(zip(spans, values))))
            changed += ood[-1].input != example.input
    return train, iid, ood, changed


def redraw_spurious(examples, seed):
    """The same examples, each spurious phrase that of a random example, of those alike but for the
    number ("Hormones: 4", "Hormones: 2"); causes stay."""
    def alike(example, span):
        return NUMBER.sub("N", example.input[slice(*span)])

    rng, pool = random.Random(seed), defaultdict(list)
    for example in examples:
        for span in example.spurious:
            pool[alike(example, span)].append(example.input[slice(*span)])
    return [replace(example, {span: rng.choice(pool[alike(example, span)])
                              for span in example.spurious}) for example in examples]


ITEM = re.compile(r"(?:^|(?<=[,;:.?!]\s))([^\W\d_](?:[^,;:.?!]|\.(?=\S))*): " + NUMBER.pattern
                  + r"[\w%]*(?=[,;.]?(?:\s|$))")


def reorder(example, rng):
    """The same example with the "Name: number" items of its input in another order, spans moved along.

    It stays as it is when that would tear a span or put an effect before its cause, when other words
    stand between two items, or when two items have one name.
    """
    text, items = example.input + example.target, list(ITEM.finditer(example.input))
    cuts = [0, *sum((item.span() for item in items), ()), len(text)]
    pieces = list(zip(cuts, cuts[1:]))  # items are every second one
    if len({item[1] for item in items}) < len(items) or any(
            re.search(r"\w", text[slice(*between)]) for between in pieces[2:-1:2]):
        return example
    order = list(pieces)
    order[1::2] = rng.sample(pieces[1::2], len(items))
    places = dict(zip(order, accumulate((end - start for start, end in order), initial=0)))

    def move(span):
        for start, end in pieces:
            if start <= span[0] and span[1] <= end:
                return tuple(at - start + places[start, end] for at in span)

    moved = "".join(text[slice(*piece)] for piece in order)
    return move_spans(example, moved[:len(example.input)], move)


# ": " is one token, so that a prompt that ends in a blank is cut where training cut it
PATTERN = r"\p{N}{1,3}| ?\p{L}+|[^\s\p{L}\p{N}]+\s*|\s+"


def build_tokenizer(texts):
    """A byte-level tiktoken.Encoding made from `texts`, without a download: it encodes any text and
    decodes it exactly. One token: each byte, each number of up to three digits that occurs, each
    word or mark that occurs twice."""
    counts = Counter(piece for text in texts
                     for piece in re.findall(r"\d{1,3}| ?[^\W\d_]+|[^\w\s]+\s*", text))
    pieces = [piece.encode() for piece, n in counts.most_common() if n > 1 or piece.isdecimal()]
    return tokenizer_from(list(dict.fromkeys([bytes([i]) for i in range(256)] + pieces)))


def tokenizer_from(pieces):
    """The tiktoken.Encoding whose token i is pieces[i], bytes; END follows the last. ValueError
    unless every byte is a piece and no piece comes twice."""
    if len({*pieces}) < len(pieces) or not {bytes([i]) for i in range(256)} <= {*pieces}:
        raise ValueError("pieces must hold every byte, and none twice")
    return tiktoken.Encoding("game", pat_str=PATTERN, special_tokens={END: len(pieces)},
                             mergeable_ranks={piece: i for i, piece in enumerate(pieces)})


def character_offsets(tokenizer, tokens):
    """[(start, end)] of each token in characters; tokens of one character have the same place."""
    pieces = tokenizer.decode_tokens_bytes(tokens)
    bounds = list(accumulate(map(len, pieces), initial=0))
    # the number of characters begun up to each byte: the later bytes of one are 10xxxxxx in UTF-8
    begun = list(accumulate(byte & 0xC0 != 0x80 for byte in b"".join(pieces)))
    return [(begun[start] - 1, begun[end - 1]) for start, end in zip(bounds, bounds[1:])]


def tokens_of(span, offsets):
    """The tokens that share a character with a span."""
    return [t for t, (start, end) in enumerate(offsets) if start < span[1] and span[0] < end]


def token_edges(edges, offsets):
    """Edges between spans to sorted (query, key) pairs of tokens, for any tokenizer.

    edges: ((effect span, cause span), ...), as in Example. offsets: [(start, end)] of the tokens in
    characters, as a fast tokenizer returns with return_offsets_mapping=True; (0, 0) is no text.
    A decoder predicts token t + 1 at position t: an effect on tokens s..e is predicted by the
    queries s-1..e-1, and those get the edges. Keys are the cause's tokens before s."""
    pairs = set()
    for effect, cause in edges:
        predicted, keys = tokens_of(effect, offsets), tokens_of(cause, offsets)
        pairs.update((t - 1, key) for t in predicted for key in keys if t > 0 and key < predicted[0])
    return sorted(pairs)


def chosen_edges(example, edges, rng):
    """The edges of an Example with the causes narrowed to their numbers (edges "value"; "Smoking: 8"
    to "8") or whole ("span"); as controls, with spurious numbers ("spurious") or as many random words
    ("random") in their place."""
    text = example.input + example.target
    if edges == "span":
        return example.edges
    number = lambda span: numbers_in(text, span) or [span]
    true = [(effect, part) for effect, cause in example.edges for part in number(cause)]
    if edges == "value":
        return true
    chosen = []
    for effect, n in Counter(effect for effect, _ in true).items():
        wrong = [part for span in example.spurious for part in number(span)]
        if edges == "random":
            words = [word.span() for word in re.finditer(r"\w+", text[:effect[0]])]
            wrong = rng.sample(words, min(n, len(words)))
        chosen += [(effect, part) for part in wrong]
    return chosen


SEPARATOR = re.compile(rf"(?s).*(?:[,;.?!]\s|\n|{NUMBER.pattern})\s*")


def item_of(text, span):
    """The item that a span stands in: from the last separator or number before the span to its end,
    such as "Smoking: 8" for "8" and "Answer: High Risk" for "High Risk"."""
    before = SEPARATOR.match(text, 0, span[0])
    return before.end() if before else 0, span[1]


@dataclass(frozen=True)
class Dataset:
    """N encoded examples, padded on the right to the longest, T tokens; a batch is cut from it."""
    tokenizer: tiktoken.Encoding
    question: tuple  # what all inputs begin and end with
    idx: torch.Tensor  # (N, T) token ids
    targets: torch.Tensor  # (N, T) the token after each position, -100 where there is none
    answer: torch.Tensor  # (N, T) bool: positions that predict a token of the answer, END included
    role: torch.Tensor  # (N, T) index into ROLES
    item: torch.Tensor  # (N, T) where the item of each cause and effect token starts; else T or more
    edges: torch.Tensor  # (E, 2) query and key of each edge, example after example
    first_edge: torch.Tensor  # (N + 1,) where each example's edges start in `edges`


def encode(examples, tokenizer, edges="value", device="cpu", seed=0):
    """Examples to a Dataset. edges: see `chosen_edges`; seed: of "random"."""
    end, rng, far = tokenizer.encode_single_token(END), random.Random(seed), 2 ** 30
    ids, roles, items, pairs = (array("i") for _ in range(4))  # flat: lists take ten times the memory
    prompts, lengths, first_edge = [], [], [0]
    for example in examples:
        text, prompt = example.input + example.target, tokenizer.encode_ordinary(example.input)
        tokens = prompt + tokenizer.encode_ordinary(example.target)
        offsets = character_offsets(tokenizer, tokens)
        linked = chosen_edges(example, edges, rng)
        for pair in token_edges(linked, offsets):
            pairs.extend(pair)
        item, role = [far] * len(tokens), [0] * len(tokens)
        for span in {span for edge in linked for span in edge}:
            inside = tokens_of(item_of(text, span), offsets)
            for t in inside:
                item[t] = min(item[t], inside[0])
        causal = [cause for effect, cause in example.edges if effect[1] > len(example.input)]
        for r, spans in enumerate((causal, example.spurious, example.irrelevant), 1):
            for part in (part for span in spans for part in
                         (edges != "span" and numbers_in(text, span) or [span])):
                for t in tokens_of(part, offsets):
                    role[t] = r
        ids.extend(tokens)
        roles.extend(role)
        items.extend(item)
        prompts.append(len(prompt))
        lengths.append(len(tokens))
        first_edge.append(len(pairs) // 2)
    prompts, lengths = torch.tensor(prompts)[:, None], torch.tensor(lengths)[:, None]  # (N, 1) each
    position = torch.arange(lengths.max() + 1)
    held = position < lengths  # (N, T + 1)

    def pad(flat, value):
        padded = torch.full(held.shape, value)
        padded[held] = torch.tensor(np.array(flat), dtype=torch.long)
        return padded[:, :-1]

    idx, answer = pad(ids, end), held & (position >= prompts - 1)
    targets = torch.cat((idx[:, 1:], torch.full_like(prompts, end)), dim=1)
    tensors = (idx, targets.masked_fill(~held[:, :-1], -100), answer[:, :-1], pad(roles, 0),
               pad(items, far), torch.tensor(np.array(pairs).reshape(-1, 2)).long(), torch.tensor(first_edge))
    return Dataset(tokenizer, fixed_question([example.input for example in examples]),
                   *(tensor.contiguous().to(device) for tensor in tensors))


def adjacency_of(data, ix):
    """(B, T, T), bool, for the examples ix, (B,): [b, i, j] is an edge from query i to key j."""
    counts = data.first_edge[ix + 1] - data.first_edge[ix]  # (B,)
    b = torch.repeat_interleave(counts)  # (E,) which example of the batch each edge is of
    within = torch.arange(len(b), device=b.device) - (counts.cumsum(0) - counts)[b]
    query, key = data.edges[data.first_edge[ix][b] + within].unbind(-1)
    T = data.idx.shape[1]
    adjacency = torch.zeros(len(ix), T, T, dtype=torch.bool, device=b.device)
    adjacency[b, query, key] = True
    return adjacency


def inside_of(data, ix):
    """(B, T, T), bool: the adjacency of the layers below, where each token of an item looks inside it,
    at itself and what stands before. Not shifted by one: it is about what a token holds, not about
    what it predicts."""
    position = torch.arange(data.idx.shape[1], device=data.idx.device)
    return (data.item[ix][:, :, None] <= position) & (position <= position[:, None])


def character_tokens(tokenizer, tokens):
    """Tokens as (text, [positions]); those that share a character are together."""
    offsets, groups = character_offsets(tokenizer, tokens), []
    text = tokenizer.decode(tokens)
    for t, (start, end) in enumerate(offsets):
        if groups and start < groups[-1][1]:
            groups[-1][1] = max(end, groups[-1][1])
            groups[-1][2].append(t)
        else:
            groups.append([start, end, [t]])
    return [(text[start:end], positions) for start, end, positions in groups]


def pieces_of(tokenizer):
    return [tokenizer.decode_single_token_bytes(i).decode("latin-1") for i in range(tokenizer.n_vocab - 1)]


def save(path, content):
    """Writes bytes to path by way of path + ".tmp": there the old file or the new one is whole."""
    with open(f"{path}.tmp", "wb") as file:
        file.write(content)
    os.replace(f"{path}.tmp", path)
