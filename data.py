"""Data: the Spurious Token Game, phrases to token adjacency, JSON Lines, tokenizer and batches;
last, to be skipped at first, labels by an assistant and the sub-commands."""
import argparse
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import threading
import unicodedata
from array import array
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, islice, pairwise, product

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

ROLES = ("other", "causal", "spurious")  # a token's role is stored as its index here
EDGES = ("value", "span", "spurious", "random")  # what is called causal, see `narrow_edges`
END = "<|endoftext|>"  # closes every answer, so that a greedy answer knows where to stop


@dataclass(frozen=True)
class Feature:
    """One number in a game's text: uniform in low..high, whole if decimals and noise are 0."""
    name: str
    low: float = 1
    high: float = 10
    noise: float = 0.0  # standard deviation of the Gaussian noise that is added
    decimals: int = 0  # shown; the answer is computed before rounding
    unit: str = ""
    weight: float = 0.0  # causal features: factor in the score
    copies: str = ""  # spurious features: the causal feature copied unless OOD
    ratio: float = 1.0  # of the copy, rounded down unless it has noise


@dataclass(frozen=True)
class Game:
    """A Spurious Token Game, the paper's synthetic benchmark: causal features decide the answer,
    spurious ones copy them until they are out of distribution (OOD). ValueError for a mistake."""
    name: str
    causal: tuple
    spurious: tuple
    irrelevant: tuple
    question: str  # {features} stands for the numbers; the answer follows
    bands: tuple = ()  # ((lowest score, answer), ...), highest first; or
    scale: tuple = ()  # (low, high): the score is answered as a whole number, 0 (low) to 100 (high)
    shuffle: bool = True  # each example has its own order; else causal, spurious, irrelevant
    steps: int = 1500  # of training that it needs

    def __post_init__(self):
        causes, lows = [f.name for f in self.causal], [low for low, _ in self.bands]
        wrong = [f"{f.name} is {f.low} to {f.high}: lower first"
                 for f in self.causal + self.spurious + self.irrelevant if f.low > f.high]
        wrong += [f"{f.name} copies {f.copies!r}: give one of {', '.join(causes)}"
                  for f in self.spurious if f.copies not in causes]
        if self.question.count("{features}") != 1:
            wrong.append("write {features} once in the question")
        if not self.scale and lows != sorted({*lows, -math.inf}, reverse=True):
            wrong.append(f"bands from {lows}: give the highest first and -math.inf last")
        if wrong:
            raise ValueError(f"{self.name}: {wrong[0]}")

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
    scale=(-20, 30), shuffle=False, steps=3000)

GAMES = {game.name: game for game in (STG, STG_H)}


@dataclass(frozen=True)
class Example:
    """One question with its answer: a line of a JSON Lines file."""
    input: str
    target: str
    important: tuple = ()  # ({effect phrase: [cause phrases]}, ...), the paper's causal supervision
    spurious: tuple = ()  # phrases that merely go along with the answer, where known
    source: str = ""  # "file:line", for messages


def draw(feature, rng):
    if feature.noise or feature.decimals:
        return rng.uniform(feature.low, feature.high)
    return rng.randint(feature.low, feature.high)


def generate(game, n, ood=False, seed=0, exclude=()):
    """n Examples of a game, no two with the same numbers; the same arguments give the same ones.

    ood: the spurious features are drawn on their own instead of copying. exclude: Examples whose
    numbers must not come up again. ValueError for n < 1 or more than the game has."""
    if n < 1:
        raise ValueError(f"rows is {n}: give at least 1")
    rng, examples = random.Random(f"{game.name} {ood} {seed}"), []
    begin, end = map(len, game.question.split("{features}"))
    key = lambda e: tuple(sorted(re.split("[.,;] ", e.input[begin:len(e.input) - end])))
    seen = {key(example) for example in exclude}
    for _ in range(1000 + 100 * n):
        value = {f: draw(f, rng) + rng.gauss(0, f.noise) for f in game.causal + game.irrelevant}
        causes = {f.name: value[f] for f in game.causal}
        for f in game.spurious:
            copy = f.ratio * causes[f.copies]
            value[f] = (draw(f, rng) if ood else copy + rng.gauss(0, f.noise) if f.noise
                        else math.floor(copy))
        answer = game.answer(sum(f.weight * value[f] for f in game.causal))
        groups = [[f"{f.name}: {value[f]:.{f.decimals}f}{f.unit}" for f in group]
                  for group in (game.causal, game.spurious, game.irrelevant)]
        phrases = sum(groups, [])
        text = (", ".join(rng.sample(phrases, len(phrases))) if game.shuffle
                else ". ".join("; ".join(group) for group in groups))
        example = Example(game.question.replace("{features}", text), answer,
                          ({answer: groups[0]},), tuple(groups[1]))
        if key(example) not in seen:
            seen.add(key(example))
            examples.append(example)
            if len(examples) == n:
                return examples
    raise ValueError(f"{game.name} has too few different examples for {n}: ask for fewer")


# One value each: 8, -6.9, .5, 1,000, 1/3, 7:50, 0-100, 2024-05-06, 1e-5. None: PM2.5, B12, F-16.
NUMBER = re.compile(r"(?<!\w)(?<!\d[.,:/–-])(?<![^\W\d_]-)"  # not within a word or number
                    r"[-−]?\.?\d+(?:[.,:/–-]\d+)*(?:[eE][-+]?\d+)?")
QUOTES = {quote: f"[{alike}]" for alike in ("'‘’‚′", '"“”„″') for quote in alike}
MANY = 100  # a phrase that stands at more places says nothing about any of them


def numbers_in(text, span):
    """The spans of the numbers in a span of text."""
    return [number.span() for number in NUMBER.finditer(text, *span)]


@lru_cache(maxsize=10_000)
def phrase_pattern(phrase, whole, flags):
    """A phrase in any white space, quotes and composition of accents; whole: with no end inside a
    word or number ("he" in "the", "5" in "2.5")."""
    def alike(c):
        apart = unicodedata.normalize("NFD", c)
        return QUOTES.get(c) or (re.escape(c) if c == apart else f"(?:{c}|{apart})")

    words = unicodedata.normalize("NFC", phrase).split()
    pattern = r"\s+".join("".join(map(alike, word)) for word in words)
    if whole and re.match(r"[-−.]?\w", words[0]):
        pattern = r"(?<!\w)" + r"(?<!\d[.,:/–-])(?<!\W[-−.])" * words[0][0].isdigit() + pattern
    if whole and re.search(r"\w$", words[-1]):
        pattern += r"(?!\w)" + r"(?![.,:/–-]\d)" * words[-1][-1].isdigit()
    return re.compile(pattern, flags)


def find(text, phrase, starts, notes):
    """The spans of a phrase from the first of the starts where it stands: whole, as written or in
    any case; else inside words. Notes phrases "inside words" and "not found"."""
    tries = product((True, False), starts, (0, re.I)) if phrase.strip() else ()
    for whole, start, flags in tries:
        found = phrase_pattern(phrase, whole, flags).finditer(text[start:])
        spans = [(start + m.start(), start + m.end()) for m in islice(found, MANY + 1)]
        if 0 < len(spans) <= MANY:
            notes["inside words"] += [] if whole else [phrase]
            return spans
    notes["not found"].append(phrase)
    return []


def phrases_to_edges(example):
    """The phrases of an Example as (edges, roles, notes), in spans (start, end) of input + target:
    the paper's causal supervision signals.

    edges: [(effect span, cause span)]: who predicts the effect should look at the cause. An effect
    is looked for in the target, then everywhere; a cause ends before its effect starts. roles:
    (spans of causes of the answer, spans of spurious phrases). notes: {what: [phrases]}, those
    "not found", "inside words" or "late", never before an effect."""
    text, n = example.input + example.target, len(example.input)
    edges, notes = {}, defaultdict(list)
    for effect, causes in (pair for group in example.important for pair in group.items()):
        effects = find(text, effect, (n, 0), notes)
        for cause in causes if effects else ():
            spans = find(text, cause, (0,), notes)
            pairs = [(e, c) for e in effects for c in spans if c[1] <= e[0]]
            edges.update(dict.fromkeys(pairs))
            notes["late"] += [cause] if spans and not pairs else []
    spurious = [span for phrase in example.spurious for span in find(text[:n], phrase, (0,), notes)]
    return list(edges), ([cause for effect, cause in edges if effect[1] > n], spurious), notes


def as_list(value):
    return list(value) if isinstance(value, (list, tuple)) else [value]


def merge(pairs):
    """A JSON object whose equal keys add up, where json would keep the last one."""
    merged = {}
    for key, value in pairs:
        merged[key] = as_list(merged[key]) + as_list(value) if key in merged else value
    return merged


def parse_example(line, source=""):
    """A line of JSON as an Example. ValueError says what is wrong and what to do."""
    try:
        fields = json.loads(line, object_pairs_hook=merge)
        input, target = fields["input"], fields["target"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError('no JSON object: write {"input": ..., "target": ...} on a line') from None
    target = str(target) if type(target) in (int, float) else target
    for key, text in ("input", input), ("target", target):
        if not isinstance(text, str) or not text.strip() or re.search("[\ud800-\udfff]", text):
            raise ValueError(f'"{key}" is {text!r:.40}: give a text')
    try:
        important = tuple({effect: as_list(causes) for effect, causes in group.items()}
                          for group in as_list(fields.get("important") or []))
        spurious = tuple(as_list(fields.get("spurious") or []))
        "".join(sum((causes for group in important for causes in group.values()), [*spurious]))
    except (AttributeError, TypeError):
        raise ValueError('"important" or "spurious" is wrong: give [{"effect": ["cause", ...]}, '
                         '...] and ["phrase", ...]') from None
    return Example(input, target, important, spurious, source)


def read(path):
    """A JSON Lines file as (Examples, summary), which counts the phrases that are of no use.
    ValueError for a bad line, as "file:line: what is wrong and what to do"; OSError."""
    examples, counts, shown = [], Counter(), {}
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for n, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                examples.append(parse_example(line, f"{path}:{n}"))
            except ValueError as error:
                raise ValueError(f"{path}:{n}: {error}") from None
            edges, (causal, _), notes = phrases_to_edges(examples[-1])
            counts.update({"edges": +bool(edges), "edges at the answer": +bool(causal)})
            for what in filter(notes.get, notes):
                counts[what] += len(notes[what])
                shown.setdefault(what, f"phrases {what}, such as line {n}: {notes[what][0]!r}")
    if not examples:
        raise ValueError(f"{path}: no examples: give one JSON object on each line")
    supervised = [f"{counts[what]} with {what}" for what in ("edges", "edges at the answer")]
    return examples, "; ".join([f"{path}: {len(examples)} examples, {', '.join(supervised)}",
                                *(f"{counts[what]} {text}" for what, text in shown.items())])


def dump(example):
    """An Example as the line of JSON that `read` takes back."""
    fields = {key: value for key, value in vars(example).items() if value and key != "source"}
    return json.dumps(fields, ensure_ascii=False) + "\n"


def save(path, content):
    """Writes bytes by way of path + ".tmp": at path there is the old file or the new one, whole."""
    with open(f"{path}.tmp", "wb") as file:
        file.write(content)
    os.replace(f"{path}.tmp", path)


def fixed_question(examples):
    """What all inputs begin and end with, in whole words: (prefix, suffix)."""
    inputs = [example.input for example in examples]
    begin = os.path.commonprefix(inputs)
    end = os.path.commonprefix([text[::-1] for text in inputs])[::-1]
    return re.sub(r"\w+$", "", begin), re.sub(r"^\w+", "", end)


def substitute(text, changes):
    """The text with other texts in places, {span: text}."""
    for (start, end), new in sorted(changes.items(), reverse=True):
        text = text[:start] + new + text[end:]
    return text


def hold_out(examples, share, seed):
    """Splits examples into (train, iid, ood): a share of the different inputs, 0 to 1, is held out.

    ood: the held-out examples whose numbers that belong to no cause, nor to `fixed_question`,
    changed places; the answer stays true, what went along with it does not. Those with a label that
    was not found are left out. ValueError when nothing is left to train or test on."""
    rng, inputs = random.Random(seed), sorted({example.input for example in examples})
    n = max(1, round(share * len(inputs))) if 0 < share < 1 else 0
    if not 0 < n < len(inputs):
        raise ValueError(f"--val is {share:g}: give a share between 0 and 1, and more examples")
    held_out, ood = set(rng.sample(inputs, n)), []
    train, iid = ([e for e in examples if (e.input in held_out) == held] for held in (False, True))
    before, after = map(len, fixed_question(examples))
    for example in iid:
        edges, _, notes = phrases_to_edges(example)
        free = [(start, end) for start, end in numbers_in(example.input, (0, len(example.input)))
                if before <= start and end <= len(example.input) - after
                and not any(a < end and start < b for _, (a, b) in edges)]
        values = [example.input[slice(*span)] for span in free]
        text = substitute(example.input, dict(zip(free, rng.sample(values, len(values)))))
        if edges and not notes["not found"] and text != example.input:
            ood.append(replace(example, input=text, spurious=()))
    return train, iid, ood


def redraw_spurious(examples, seed):
    """The same examples with each spurious phrase that of a random example, which differs from it
    in numbers only ("Hormones: 4" is drawn from all "Hormones: N"); causes stay."""
    rng, pool, redrawn = random.Random(seed), defaultdict(list), []
    for phrase in (phrase for example in examples for phrase in example.spurious):
        pool[NUMBER.sub("N", phrase)].append(phrase)
    for example in examples:
        new = {phrase: rng.choice(pool[NUMBER.sub("N", phrase)]) for phrase in example.spurious}
        changes = {span: new[phrase] for phrase in new
                   for span in find(example.input, phrase, (0,), defaultdict(list))}
        redrawn.append(replace(example, input=substitute(example.input, changes),
                               spurious=tuple(new.values())))
    return redrawn


ITEM = re.compile(r"(?:^|(?<=[,;:.?!]\s))([^\W\d_](?:[^,;:.?!]|\.(?=\S))*): " + NUMBER.pattern
                  + r"[\w%]*(?=[,;.]?(?:\s|$))")


def reorder(example, rng):
    """The same example with the "Name: number" items of its input in another order; as it is when
    that would lose an edge or role, words stand between two items, or two have one name."""
    items = list(ITEM.finditer(example.input))
    between = "".join(example.input[a.end():b.start()] for a, b in pairwise(items))
    if len({item[1] for item in items}) < len(items) or re.search(r"\w", between):
        return example
    changes = {old.span(): new[0] for old, new in zip(items, rng.sample(items, len(items)))}
    moved = replace(example, input=substitute(example.input, changes))
    (edges, roles, _), (moved_edges, moved_roles, _) = map(phrases_to_edges, (example, moved))
    same = [*map(len, (edges, *roles))] == [*map(len, (moved_edges, *moved_roles))]
    return moved if same else example


# ": " is one token, so that a prompt that ends in a blank is cut where training cut it
PATTERN = r"\p{N}{1,3}| ?\p{L}+|[^\s\p{L}\p{N}]+\s*|\s+"


def build_tokenizer(texts):
    """A byte-level tiktoken.Encoding that encodes any text and decodes it exactly. One token: each
    byte, each number of up to three digits in texts, each word or mark that occurs twice."""
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
    return [(begun[start] - 1, begun[end - 1]) for start, end in pairwise(bounds)]


def character_tokens(tokenizer, tokens):
    """Tokens as [(text, [positions])]; those that share a character are together."""
    groups, text = [], tokenizer.decode(tokens)
    for t, (start, end) in enumerate(character_offsets(tokenizer, tokens)):
        if groups and start < groups[-1][1]:
            groups[-1] = groups[-1][0], max(end, groups[-1][1]), groups[-1][2] + [t]
        else:
            groups.append((start, end, [t]))
    return [(text[start:end], positions) for start, end, positions in groups]


def tokens_of(span, offsets):
    """The tokens that share a character with a span."""
    return [t for t, (start, end) in enumerate(offsets) if start < span[1] and span[0] < end]


def token_edges(edges, offsets):
    """Edges between spans as sorted (query, key) pairs of tokens, for any tokenizer.

    offsets: [(start, end)] of the tokens in characters, as a fast tokenizer returns with
    return_offsets_mapping=True; (0, 0) is no text. A decoder predicts token t + 1 at position t: an
    effect on tokens s..e is predicted by the queries s-1..e-1, and those get the edges. Keys are
    the cause's tokens before s."""
    pairs = set()
    for effect, cause in edges:
        predicted, keys = tokens_of(effect, offsets), tokens_of(cause, offsets)
        pairs.update((t - 1, key) for t in predicted for key in keys if key < predicted[0])
    return sorted(pairs)


def narrow_edges(text, edges, spurious, how, rng):
    """Edges with their causes whole ("span"), as their numbers ("value": "Smoking: 8" to "8") or,
    as controls, replaced by "spurious" numbers or as many "random" words."""
    narrow = lambda span: how != "span" and numbers_in(text, span) or [span]
    narrowed = [(effect, part) for effect, cause in edges for part in narrow(cause)]
    if how in ("value", "span"):
        return narrowed
    wrong = []
    for effect, n in Counter(effect for effect, _ in narrowed).items():
        words = [word.span() for word in re.finditer(r"\w+", text[:effect[0]])]
        numbers = [part for span in spurious for part in narrow(span)]
        chosen = numbers if how == "spurious" else rng.sample(words, min(n, len(words)))
        wrong += [(effect, part) for part in chosen]
    return wrong


SEPARATOR = re.compile(rf"(?s).*(?:[,;.?!]\s|\n|{NUMBER.pattern})\s*")


def item_of(text, span):
    """The item that a span stands in, from the last separator or number to the span's end:
    "Smoking: 8" for "8", "Answer: High Risk" for "High Risk"."""
    before = SEPARATOR.match(text, 0, span[0])
    return before.end() if before else 0, span[1]


@dataclass(frozen=True)
class Dataset:
    """N encoded examples, padded on the right to the longest, T tokens; a batch is cut from it."""
    tokenizer: tiktoken.Encoding
    question: tuple  # what all inputs begin and end with
    answers: tuple  # the different targets
    idx: torch.Tensor  # (N, T) token ids
    targets: torch.Tensor  # (N, T) the token after each position, -100 where there is none
    answer: torch.Tensor  # (N, T) bool: positions that predict a token of the answer, END included
    role: torch.Tensor  # (N, T) index into ROLES
    item: torch.Tensor  # (N, T) where the item of a cause or effect token starts; T or more: none
    edges: torch.Tensor  # (E, 2) query and key of each edge, example after example
    first_edge: torch.Tensor  # (N + 1,) where each example's edges start in `edges`


def encode(examples, tokenizer, edges="value", device="cpu", seed=0):
    """Examples to a Dataset. edges: as `how` of `narrow_edges`; seed: of its "random"."""
    rng, end, far = random.Random(seed), tokenizer.encode_single_token(END), 2 ** 30
    ids, role, item, pairs = (array("i") for _ in range(4))  # flat: lists take ten times the memory
    prompts, lengths, first_edge = [], [], [0]
    for example in examples:
        text, prompt = example.input + example.target, tokenizer.encode_ordinary(example.input)
        tokens = prompt + tokenizer.encode_ordinary(example.target)
        offsets, n = character_offsets(tokenizer, tokens), len(ids)
        ids.extend(tokens)
        role.extend([0] * len(tokens))
        item.extend([far] * len(tokens))
        links, (causal, spurious), _ = phrases_to_edges(example)
        for r, span in [(2, span) for span in spurious] + [(1, span) for span in causal]:
            for part in edges != "span" and numbers_in(text, span) or [span]:
                for t in tokens_of(part, offsets):
                    role[n + t] = r
        links = narrow_edges(text, links, spurious, edges, rng)
        for span in {span for link in links for span in link}:
            inside = tokens_of(item_of(text, span), offsets)
            for t in inside:
                item[n + t] = min(item[n + t], inside[0])
        for pair in token_edges(links, offsets):
            pairs.extend(pair)
        prompts.append(len(prompt))
        lengths.append(len(tokens))
        first_edge.append(len(pairs) // 2)
    prompts, lengths = torch.tensor(prompts)[:, None], torch.tensor(lengths)[:, None]  # (N, 1) each
    position = torch.arange(lengths.max() + 1)
    held = position < lengths  # (N, T + 1)

    def pad(flat, value):
        padded = torch.full(held.shape, value)
        padded[held] = torch.tensor(np.array(flat), dtype=torch.long)
        return padded

    idx = pad(ids, end)
    targets = idx[:, 1:].masked_fill(~held[:, :-1], -100)
    answer = held & (position >= prompts - 1)
    tensors = (idx[:, :-1], targets, answer[:, :-1], pad(role, 0)[:, :-1], pad(item, far)[:, :-1],
               torch.tensor(np.array(pairs).reshape(-1, 2)).long(), torch.tensor(first_edge))
    return Dataset(tokenizer, fixed_question(examples), tuple(sorted({e.target for e in examples})),
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
    """(B, T, T), bool: the adjacency of the layers below, where each token of an item looks inside
    it, at itself and what stands before. Not shifted by one: it is about what a token holds, not
    about what it predicts."""
    position = torch.arange(data.idx.shape[1], device=data.idx.device)
    return (data.item[ix][:, :, None] <= position) & (position <= position[:, None])


def show(examples, row=None):
    """The edges of one example as text: of line `row` of its file, or the first that has any.
    ValueError when no example is on that line."""
    drawn = [e for e in examples
             if (phrases_to_edges(e)[0] if row is None else e.source.endswith(f":{row}"))]
    if row is not None and not drawn:
        raise ValueError(f"--row is {row}: give the line of an example")
    example = (drawn or examples)[0]
    tokenizer = build_tokenizer(e.input + e.target for e in examples)
    data, token, keys = encode([example], tokenizer), {}, defaultdict(dict)
    for text, positions in character_tokens(tokenizer, data.idx[0].tolist()):
        token |= dict.fromkeys(positions, f"{text!r} at {positions[0]}")
    for query, key in data.edges.tolist():
        keys[f"{token[query]} predicts {token[query + 1]}"][token[key]] = True
    return "\n".join([example.input + example.target,
                      "each query, the token it predicts, the keys it should look at:",
                      *(f"  {query}  <-  {'  '.join(keys[query])}" for query in keys)])


INSTRUCTION = """Each line below is a text as JSON: an input and the target that follows it.
"important" says which phrases decide which later ones, as [{effect: [causes]}]; the effect is
most often the target. Copy phrases from the text letter by letter. A cause stands before its
effect; what merely goes along with an effect is no cause. Reply with the "important" of the last
line alone.

"""


def parse_reply(reply, example):
    """The example with the labels that a reply ends in: its last JSON objects with no words between
    them. ValueError for broken or cut JSON, thoughts without an end, over 20,000 characters, and no
    edge at all."""
    reply, values, end = reply.rpartition("</think>")[2], [], 0  # before that stands a draft
    if len(reply) > 20_000:
        raise ValueError(f"{len(reply)} characters")
    decoder = json.JSONDecoder(object_pairs_hook=merge)
    for start in (m.start() for m in re.finditer(r"""\{\s*["'“‘]|\[\s*\{|<think>""", reply)):
        if start >= end:
            try:
                value, stop = decoder.raw_decode(reply, start)
            except (ValueError, RecursionError):
                raise ValueError(f"broken or cut at {reply[start:start + 40]!r}") from None
            values = (values if not reply[end:start].strip(" \r\n\t,") else []) + as_list(value)
            end = stop
    important = []
    for value in values:
        if isinstance(value, dict) and value.keys() & {"input", "important"}:  # a line, or an echo?
            mine = value.get("input", example.input) == example.input
            value = value.get("important", []) if mine else []
        important += as_list(value)
    fields = {"input": example.input, "target": example.target, "important": important}
    labelled = replace(example, important=parse_example(json.dumps(fields)).important)
    if not phrases_to_edges(labelled)[0]:
        raise ValueError("no {effect: [causes]} of phrases in the text")
    return labelled


def answered(path):
    """{(input, target)} of the lines of an output file, less a last one that a kill has cut.
    ValueError for a line that is no example."""
    content = open(path, "rb").read() if os.path.exists(path) else b""
    whole, newline, last = content.rpartition(b"\n")
    try:
        parse_example(last)
        save(path, content + b"\n")
    except ValueError:
        if b'{"input"'.startswith(last[:8]):
            save(path, whole + newline)
    return {(e.input, e.target) for e in read(path)[0]} if os.path.getsize(path) else set()


def annotate(questions, demos, assistant, out, jobs=4, time_limit=60):
    """Labels the examples of a file (the paper's first step: human examples, then an assistant).

    questions, demos, out: JSON Lines files; every demo has labels. assistant: a command that reads
    a prompt and prints a reply in time_limit seconds, tried three times an example, `jobs` at once.
    Each answer is a line of out when it comes, without labels when no reply is of use; what stands
    in out is not asked again. ValueError or OSError for wrong arguments."""
    command, (shown, _), (examples, summary) = shlex.split(assistant), read(demos), read(questions)
    if not command or not shutil.which(command[0]):
        raise ValueError(f"--assistant is {assistant!r}: give a program and its flags")
    if jobs < 1:
        raise ValueError(f"--jobs is {jobs}: give at least 1")
    if os.path.exists(out) and any(os.path.samefile(out, path) for path in (questions, demos)):
        raise ValueError(f"--out is {out}: give a file of its own")
    for demo in shown:
        if not phrases_to_edges(demo)[0]:
            raise ValueError(f'{demo.source}: no usable "important": give phrases of the text')
    prompt, done = INSTRUCTION + "".join(map(dump, shown)), answered(out)
    lock, problems = threading.Lock(), []
    todo = {(e.input, e.target): e for e in examples if (e.input, e.target) not in done}.values()

    def label(example):
        question, labelled = prompt + dump(Example(example.input, example.target)), None
        for _ in range(3):
            try:
                reply = subprocess.run(command, input=question.encode(), stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL, timeout=time_limit, check=True)
                labelled = parse_reply(reply.stdout.decode(errors="replace"), example)
                break
            except (ValueError, subprocess.SubprocessError) as error:
                problem = f"{example.source}: {error}"
        else:
            problems.append(problem)
        with lock, open(out, "a", encoding="utf-8") as file:
            file.write(dump(labelled or replace(example, important=())))

    print(summary)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for answer in tqdm(as_completed([pool.submit(label, example) for example in todo]),
                               total=len(todo), disable=None):
                answer.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # answers under way are still written
    print(f"{read(out)[1]}; {len(problems)} asked now have no usable reply", *problems[:1],
          sep=", such as ")


def check(labelled, truth):
    """How well labelled Examples have the edges of the true ones, as text; paired by input and
    target. ValueError when no text is in both."""
    gold = {(e.input, e.target): set(phrases_to_edges(e)[0]) for e in truth}
    pairs = [(e, set(phrases_to_edges(e)[0]), gold[e.input, e.target])
             for e in labelled if (e.input, e.target) in gold]
    if not pairs:
        raise ValueError(f"{labelled[0].source}: no text is in {truth[0].source}: "
                         "give labels of the same texts")
    tp = sum(len(predicted & true) for _, predicted, true in pairs)
    n_predicted, n_true = (sum(len(pair[k]) for pair in pairs) for k in (1, 2))
    lines = [f"{len(pairs)} examples compared, {len(labelled) - len(pairs)} have no true labels",
             f"edges: precision {tp / max(n_predicted, 1):.3f}, recall {tp / max(n_true, 1):.3f}, "
             f"F1 {2 * tp / max(n_predicted + n_true, 1):.3f}"]
    for e, predicted, true in sorted(pairs, key=lambda pair: -len(pair[1] ^ pair[2]))[:3]:
        missing, extra = ([(e.input + e.target)[slice(*cause)] for _, cause in sorted(edges)]
                          for edges in (true - predicted, predicted - true))
        lines += [f"{e.source}: missing {missing}, too many {extra}"] if missing or extra else []
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="data.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    parser.error = error = lambda message: parser.exit(2, f"data.py: {message}\n")  # no usage

    def command(name, help):
        sub = commands.add_parser(name, help=help)
        sub.error = error
        return sub.add_argument

    add = command("show", "what is understood of a JSON Lines file")
    add("file")
    add("--row", type=int, help="line of the example to draw")
    add = command("generate", "examples of a game")
    add("game", choices=GAMES)
    add("--rows", type=int, default=1600)
    add("--ood", action="store_true", help="spurious features stop copying")
    add("--seed", type=int, default=0)
    add("--out", required=True)
    add = command("annotate", "labels by an assistant; the same command goes on")
    add("questions")
    add("--demos", required=True, help="examples labelled by hand")
    add("--assistant", required=True, help="command that reads a prompt and prints a reply")
    add("--out", required=True)
    add("--jobs", type=int, default=4, help="examples to ask for at once")
    add("--time-limit", type=float, default=60, help="seconds for a reply")
    add = command("check", "compare labels with true ones")
    add("file")
    add("--against", required=True)
    args = parser.parse_args(argv)
    try:
        if args.command == "annotate":
            annotate(args.questions, args.demos, args.assistant, args.out, args.jobs,
                     args.time_limit)
        elif args.command == "generate":
            examples = generate(GAMES[args.game], args.rows, args.ood, args.seed)
            save(args.out, "".join(map(dump, examples)).encode())
            print(show(examples))
        else:
            examples, summary = read(args.file)
            print(summary)
            print(show(examples, args.row) if args.command == "show"
                  else check(examples, read(args.against)[0]))
    except (ValueError, OSError) as problem:
        error(problem)
    except KeyboardInterrupt:
        parser.exit(130, "data.py: interrupted: the same command goes on\n")


if __name__ == "__main__":
    main()
