"""Data: the Spurious Token Game; phrases to token adjacency; JSON Lines, tokenizer and batches.
Last, to be skipped at first: labels by an assistant, and the sub-commands."""
import argparse
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, pairwise
from unicodedata import normalize

import tiktoken
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

ROLES = ("other", "causal", "spurious")  # of a token, stored as the index here
EDGES = ("value", "span", "spurious", "random")  # what is called causal, see `narrow_edges`
END = "<|endoftext|>"  # closes every answer


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
    """A Spurious Token Game, the paper's benchmark: causal features decide the answer, spurious
    ones copy them until they are out of distribution (OOD). ValueError for a mistake."""
    name: str
    causal: tuple
    spurious: tuple
    irrelevant: tuple
    question: str  # {features} stands for the numbers; the answer follows
    bands: tuple = ()  # answer by score: ((lowest, answer), ...), highest first; or
    scale: tuple = ()  # (low, high): answer 0 for a score of low to 100 for one of high
    shuffle: bool = True  # each example has its own order; else causal, spurious, irrelevant
    steps: int = 1500  # of training that it needs

    def __post_init__(self):
        causes, lows = [f.name for f in self.causal], [low for low, _ in self.bands]
        for f in self.causal + self.spurious + self.irrelevant:
            if f.low > f.high:
                raise ValueError(f"{self.name}: {f.name} is {f.low} to {f.high}: lower first")
        for f in self.spurious:
            if f.copies not in causes:
                raise ValueError(f"{self.name}: {f.name} copies {f.copies!r}: give one of {causes}")
        if self.question.count("{features}") != 1:
            raise ValueError(f"{self.name}: write {{features}} once in the question")
        if self.scale and not self.scale[0] < self.scale[1]:
            raise ValueError(f"{self.name}: scale is {self.scale}: lower first")
        if not self.scale and lows != sorted({*lows, -math.inf}, reverse=True):
            raise ValueError(f"{self.name}: bands from {lows}: highest first, -math.inf last")

    def answer(self, score):
        if self.bands:
            return next(answer for lowest, answer in self.bands if round(score, 6) >= lowest)
        low, high = self.scale
        return str(round(100 * (min(max(score, low), high) - low) / (high - low)))


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
    important: tuple = ()  # ({effect phrase: [cause phrases]}, ...)
    spurious: tuple = ()  # phrases that merely go along with the answer, where known
    source: str = ""  # "file:line", for messages


def draw(feature, rng):
    whole = not (feature.noise or feature.decimals)
    return (rng.randint if whole else rng.uniform)(feature.low, feature.high)


def generate(game, n, ood=False, seed=0, exclude=()):
    """n Examples of a game, no two with the same numbers, none with those of `exclude`; the same
    arguments give the same ones. ood: spurious features are drawn on their own instead of copying.
    ValueError for n < 1 or more than the game has."""
    rng, examples = random.Random(f"{game.name} {ood} {seed}"), []
    before, after = game.question.split("{features}")
    numbers = lambda text: frozenset(re.split("[.,;] ", text[len(before):len(text) - len(after)]))
    seen = {numbers(example.input) for example in exclude}
    for _ in range(1000 + 100 * n):
        value = {f.name: draw(f, rng) + rng.gauss(0, f.noise)
                 for f in game.causal + game.irrelevant}
        for f in game.spurious:
            copy = f.ratio * value[f.copies]
            value[f.name] = (draw(f, rng) if ood else
                             copy + rng.gauss(0, f.noise) if f.noise else math.floor(copy))
        causal, spurious, irrelevant = groups = [
            [f"{f.name}: {value[f.name]:.{f.decimals}f}{f.unit}" for f in group]
            for group in (game.causal, game.spurious, game.irrelevant)]
        text = ". ".join("; ".join(group) for group in groups)
        if game.shuffle:
            text = ", ".join(rng.sample(causal + spurious + irrelevant, len(value)))
        answer = game.answer(sum(f.weight * value[f.name] for f in game.causal))
        example = Example(before + text + after, answer, ({answer: causal},), tuple(spurious))
        if numbers(example.input) not in seen:
            seen.add(numbers(example.input))
            examples.append(example)
        if len(examples) == n:
            return examples
    raise ValueError(f"rows is {n}: give at least 1; {game.name} has too few different examples")


# One value each: 8, -6.9, .5, 1,000, 1/3, 7:50, 0-100, 2024-05-06, 1e-5. None: PM2.5, B12, F-16.
JOINT = "[.,:/–-]"  # between the digits of one value
NUMBER = re.compile(rf"(?<!\w)(?<!\d{JOINT})(?<![^\W\d_][-–−])"  # not within a word or number
                    rf"(?:(?<![\w%°)])[-−])?\.?\d+(?:{JOINT}\d+)*(?:[eE][-+]?\d+)?")
# a place inside a word ("he" in "the") or a number ("5" in "2.5" or "-5")
INSIDE = re.compile(r"(?<=\w)(?=\w)|(?<=\W[-−.])(?=\d)"
                    rf"|(?<=\d{JOINT})(?=\d)|(?<=\d)(?={JOINT}\d)")
QUOTES = str.maketrans("‘’‚′“”„″", "''''" + '""""')
MANY = 100  # a phrase that stands at more places says nothing about any of them
compiled = lru_cache(maxsize=10_000)(re.compile)


def find(text, phrase, notes, target=math.inf):
    """The spans of a phrase in any white space and quotes: whole, or else inside words; if any is
    there, from where the target starts; as written, or else in any case. Notes a phrase "inside
    words" or "not found"."""
    text = text.translate(QUOTES)
    words = normalize("NFC", phrase).translate(QUOTES).split()
    pattern = compiled(r"\s+".join(map(re.escape, words)), re.I)
    fits = defaultdict(list)  # {how well: spans}
    for a, b in (match.span() for match in pattern.finditer(text) if match[0]):
        whole = (a == target or not INSIDE.match(text, a)) and not INSIDE.match(text, b)
        fits[whole, a >= target, text[a:b].split() == words].append((a, b))
    best = max(fits, default=None)
    if not 0 < len(fits[best]) <= MANY:
        notes.append(("not found", phrase))
        return []
    if not best[0]:
        notes.append(("inside words", phrase))
    return fits[best]


def phrases_to_edges(example):
    """An Example's (edges, causal, spurious, notes) in spans (start, end) of input + target.

    edges: [(effect, cause)], the paper's causal supervision: who predicts the effect should look at
    the cause, which ends before it. An effect is looked for in the target, then everywhere. causal:
    causes of the answer. notes: [(what, phrase)], "not found", "inside words" or "late", never
    before an effect."""
    text, n = example.input + example.target, len(example.input)
    edges, notes = {}, []
    for effect, causes in (pair for group in example.important for pair in group.items()):
        effects = find(text, effect, notes, n)
        for cause in dict.fromkeys(causes) if effects else ():
            spans = find(text, cause, notes)
            before = [(e, c) for e in effects for c in spans if c[1] <= e[0]]
            edges.update(dict.fromkeys(before))  # each once
            if spans and not before:
                notes.append(("late", cause))
    spurious = [span for phrase in example.spurious for span in find(text[:n], phrase, notes)]
    return list(edges), [cause for effect, cause in edges if effect[1] > n], spurious, notes


def as_lists(pairs):
    """A JSON object with a list under each key, so that values of equal keys add up."""
    fields = {}
    for key, value in pairs:
        fields.setdefault(key, []).extend(value if isinstance(value, list) else [value])
    return fields


def parse_example(line, source=""):
    """A line of JSON as an Example. ValueError says what to write instead."""
    try:
        fields = json.loads(line, object_pairs_hook=as_lists)
        [input], [target] = fields["input"], fields["target"]
        target = str(target) if type(target) in (int, float) else target
        important, spurious = (tuple(fields.get(key, ())) for key in ("important", "spurious"))
        causes = [cause for group in important for causes in group.values() for cause in causes]
        "".join([input, target, *causes, *spurious]).encode()  # all are texts
        assert input.strip() and target.strip()
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
        raise ValueError(f'{source}: {line[:40]!r} is no example: write {{"input": "...", '
                         '"target": "...", "important": [{"effect": ["cause"]}]}') from None
    return Example(normalize("NFC", input), normalize("NFC", target), important, spurious, source)


def read(path):
    """A JSON Lines file as (Examples, summary). ValueError for a bad line, which it names."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        examples = [parse_example(line, f"{path}:{n}") for n, line in enumerate(file, 1)
                    if line.strip()]
    if not examples:
        raise ValueError(f"{path}: no examples: give one JSON object on each line")
    counts, unused = Counter(), defaultdict(list)
    for example in examples:
        edges, causal, _, notes = phrases_to_edges(example)
        counts.update({"with edges": +bool(edges), "with edges at the answer": +bool(causal)})
        for what, phrase in notes:
            unused[what].append(f"{phrase!r} in {example.source}")
    return examples, "; ".join([
        f"{path}: {len(examples)} examples", *(f"{n} {what}" for what, n in counts.items()),
        *(f"{len(found)} phrases {what}, such as {found[0]}" for what, found in unused.items())])


def dump(example):
    """An Example as the line of JSON that `read` takes back."""
    fields = {key: value for key, value in vars(example).items() if value and key != "source"}
    return json.dumps(fields, ensure_ascii=False) + "\n"


def save(path, content):
    """Writes bytes by way of path + ".tmp": at path there is the old file or the new one, whole."""
    with open(f"{path}.tmp", "wb") as file:
        file.write(content)
    os.replace(f"{path}.tmp", path)


def overlapping(span, spans):
    """The indices of the spans, such as the offsets of tokens, that share a character with one."""
    return [i for i, (start, end) in enumerate(spans) if start < span[1] and span[0] < end]


def fixed_question(examples):
    """What all inputs begin and end with, in whole words: (prefix, suffix)."""
    inputs = [example.input for example in examples]
    begin = os.path.commonprefix(inputs)
    end = os.path.commonprefix([text[::-1] for text in inputs])[::-1]
    return re.sub(r"\w+$", "", begin), re.sub(r"^\w+", "", end)


def substitute(text, spans, texts):
    """The text with other texts in the places of spans."""
    for (start, end), new in sorted(zip(spans, texts), reverse=True):
        text = text[:start] + new + text[end:]
    return text


def permute(text, spans, rng):
    """The text with what stands in the spans in another order."""
    return substitute(text, spans, rng.sample([text[a:b] for a, b in spans], len(spans)))


# "Name: number" with its unit
ITEM = re.compile(r"(?:^|(?<=[,;:.?!]\s))([^\W\d_](?:[^,;:.?!]|\.(?=\S))*): " + NUMBER.pattern
                  + r"[\w%]*(?=[,;.]?(?:\s|$))")


def hold_out(examples, share, seed):
    """Splits examples into (train, iid, ood): a share of the different inputs, 0 to 1, is held out.

    ood: those of iid whose numbers that belong to no cause, nor to `fixed_question`, changed
    places; the answer stays true. None that lost a phrase. ValueError when a part would be empty.
    """
    rng, inputs = random.Random(seed), sorted({example.input for example in examples})
    n = round(share * len(inputs)) if 0 < share < 1 else 0
    if not 0 < n < len(inputs):
        raise ValueError(f"--val is {share:g}: give a share between 0 and 1, and more examples")
    held_out, ood = set(rng.sample(inputs, n)), []
    train, iid = ([e for e in examples if (e.input in held_out) == held] for held in (False, True))
    before, after = map(len, fixed_question(examples))
    for example in iid:
        edges, *_, notes = phrases_to_edges(example)
        end, named = len(example.input), [span for edge in edges for span in edge]
        items = (item.span() for item in ITEM.finditer(example.input))
        fixed = [(0, before), (end - after, end), *named,
                 *(item for item in items if overlapping(item, named))]
        numbers = (number.span() for number in NUMBER.finditer(example.input))
        free = [number for number in numbers if not overlapping(number, fixed)]
        moved = replace(example, input=permute(example.input, free, rng), spurious=())
        if edges and "not found" not in dict(notes) and moved.input != example.input:
            ood.append(moved)
    return train, iid, ood


def redraw_spurious(examples, seed):
    """The same examples, each spurious phrase replaced by a random one of any example that differs
    in numbers only ("Hormones: 4" by any "Hormones: N")."""
    rng, pool, redrawn = random.Random(seed), defaultdict(list), []
    for phrase in (phrase for example in examples for phrase in example.spurious):
        pool[NUMBER.sub("N", phrase)].append(phrase)
    for example in examples:
        new = {phrase: rng.choice(pool[NUMBER.sub("N", phrase)]) for phrase in example.spurious}
        places = {span: new[phrase] for phrase in new for span in find(example.input, phrase, [])}
        text = substitute(example.input, places, places.values())
        redrawn.append(replace(example, input=text, spurious=tuple(new.values())))
    return redrawn


def reorder(example, rng):
    """The same example with the "Name: number" items of its input in another order; as it is when
    that loses an edge or role, words stand between two items, or two have one name."""
    items = list(ITEM.finditer(example.input))
    between = "".join(example.input[a.end():b.start()] for a, b in pairwise(items))
    if len({item[1].lower() for item in items}) < len(items) or re.search(r"\w", between):
        return example
    moved = replace(example, input=permute(example.input, [item.span() for item in items], rng))
    before, after = ([*map(len, phrases_to_edges(e)[:3])] for e in (example, moved))
    return moved if before == after else example


# ": " is one token, so that a prompt that ends in a blank is cut where training cut it
PATTERN = r"\p{N}{1,3}| ?\p{L}+|[^\s\p{L}\p{N}]+\s*|\s+"


def build_tokenizer(texts):
    """A byte-level tiktoken.Encoding for any text. One token: each byte, each number of up to three
    digits in texts, each word or mark that occurs twice, and END."""
    counts = Counter(piece for text in texts
                     for piece in re.findall(r"\d{1,3}| ?[^\W\d_]+|[^\w\s]+\s*", text))
    pieces = [piece.encode() for piece, n in counts.most_common() if n > 1 or piece.isdecimal()]
    ranks = {piece: i for i, piece in enumerate(
        dict.fromkeys([*(bytes([i]) for i in range(256)), *pieces]))}
    return tiktoken.Encoding("game", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={END: len(ranks)})


def character_offsets(tokenizer, tokens):
    """[(start, end)] of each token in characters; tokens of one character have the same place."""
    text, starts = tokenizer.decode_with_offsets(tokens)
    return [(start, max(start + 1, end)) for start, end in pairwise([*starts, len(text)])]


def character_tokens(tokenizer, tokens):
    """Tokens as [(text, [positions])]; the bytes of one character are together."""
    text, offsets = tokenizer.decode(tokens), character_offsets(tokenizer, tokens)
    return [(text[start:end], list(positions))
            for (start, end), positions in groupby(range(len(tokens)), offsets.__getitem__)]


def token_edges(edges, offsets):
    """Edges between spans as sorted (query, key) pairs of tokens, for any tokenizer.

    offsets: [(start, end)] of the tokens in characters, as fast tokenizers return; (0, 0) is no
    text. A decoder predicts token t + 1 at position t: an effect on tokens s..e gives edges to the
    queries s-1..e-1. Keys are the cause's tokens before s."""
    pairs = set()
    for effect, cause in edges:
        predicted, keys = overlapping(effect, offsets), overlapping(cause, offsets)
        pairs.update((t - 1, key) for t in predicted for key in keys if key < predicted[0])
    return sorted(pairs)


def narrow(text, span, how="value"):
    """The spans of numbers in a span, "8" in "Smoking: 8"; without any, or as "span", the span."""
    numbers = [number.span() for number in NUMBER.finditer(text, *span)]
    return numbers if numbers and how != "span" else [span]


def narrow_edges(text, edges, spurious, how, rng):
    """Edges to the numbers of each cause ("value") or to all of it ("span"); or, as controls, to
    the "spurious" numbers or as many "random" words instead."""
    keys = defaultdict(list)  # of each effect
    for effect, cause in edges:
        keys[effect] += narrow(text, cause, how)
    for effect in keys:
        if how == "spurious":
            keys[effect] = [number for span in spurious for number in narrow(text, span)]
        elif how == "random":
            words = [word.span() for word in re.finditer(r"\w+", text[:effect[0]])]
            keys[effect] = rng.sample(words, min(len(keys[effect]), len(words)))
    return [(effect, key) for effect in keys for key in keys[effect]]


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
    item: torch.Tensor  # (N, T) where the item of a cause or effect token starts; else no token
    edges: torch.Tensor  # (N, E, 2) query and key of each edge, T where there is none


# what stands before an item, up to a separator or number: the item of "8" is "Smoking: 8"
BEFORE_ITEM = re.compile(rf"(?s)(?:.*(?:[,;.?!]\s|\n|{NUMBER.pattern})\s*)?")


def encode(examples, tokenizer, edges="value", device="cpu", seed=0):
    """Examples to a Dataset. edges: as `how` of `narrow_edges`; seed: of its "random"."""
    rng, end, encoded = random.Random(seed), tokenizer.encode_single_token(END), []
    for example in examples:
        # the prompt is encoded on its own, as when a question is asked
        text, prompt = example.input + example.target, tokenizer.encode_ordinary(example.input)
        tokens = prompt + tokenizer.encode_ordinary(example.target)
        offsets, T = character_offsets(tokenizer, tokens), len(tokens)
        answer, role, item = [t >= len(prompt) - 1 for t in range(T)], [0] * T, [T] * T
        links, causal, spurious, _ = phrases_to_edges(example)
        for r, spans in (2, spurious), (1, causal):  # what is called both is causal
            for part in (part for span in spans for part in narrow(text, span, edges)):
                for t in overlapping(part, offsets):
                    role[t] = r
        links = narrow_edges(text, links, spurious, edges, rng)
        for span in {span for link in links for span in link}:
            start = BEFORE_ITEM.match(text, 0, span[0]).end()
            inside = overlapping((start, span[1]), offsets)
            for t in inside:
                item[t] = min(item[t], inside[0])
        pairs = torch.tensor(token_edges(links, offsets), dtype=torch.long).view(-1, 2)
        columns = tokens, tokens[1:] + [end], answer, role, item
        encoded.append((*map(torch.tensor, columns), pairs))
    T = max(len(tokens) for tokens, *_ in encoded)
    tensors = [pad_sequence(column, batch_first=True, padding_value=value).to(device)
               for column, value in zip(zip(*encoded), (end, -100, False, 0, T, T))]
    answers = tuple(sorted({example.target for example in examples}))
    return Dataset(tokenizer, fixed_question(examples), answers, *tensors)


def adjacency_of(data, ix):
    """(B, T, T), bool, for the examples ix, (B,): [b, i, j] is an edge from query i to key j."""
    B, T = len(ix), data.idx.shape[1]
    query, key = data.edges[ix].unbind(-1)  # (B, E) each
    adjacency = torch.zeros(B, T + 1, T + 1, dtype=torch.bool, device=query.device)
    adjacency[torch.arange(B)[:, None], query, key] = True
    return adjacency[:, :T, :T]  # without what fills up


def inside_of(data, ix):
    """(B, T, T), bool: the adjacency of the layers below: a token of an item looks inside it, up to
    itself. Not shifted by one: it is about what a token holds, not about what it predicts."""
    position = torch.arange(data.idx.shape[1], device=data.idx.device)
    return (data.item[ix][:, :, None] <= position) & (position <= position[:, None])


def show(examples, row=None):
    """The edges of the example on line `row` of its file, or of the first that has any, as text.
    ValueError when no example is on that line."""
    example = next((e for e in examples if (
        e.source.endswith(f":{row}") if row else phrases_to_edges(e)[0])), None)
    if row and not example:
        raise ValueError(f"--row is {row}: give the line of an example")
    example = example or examples[0]
    text = example.input + example.target
    edges = narrow_edges(text, phrases_to_edges(example)[0], (), "value", None)
    return "\n".join([text, *(f"{text[a:b]!r} at {a} should look at {text[c:d]!r} at {c}"
                              for (a, b), (c, d) in edges)])


INSTRUCTION = """Each line below is JSON: an input and the target that follows it. "important" says
which phrases decide which later ones, [{effect: [causes]}]; the effect is most often the target.
Copy phrases letter by letter. A cause stands before its effect; what merely goes along with an
effect is none. Reply with the "important" of the last line alone.

"""


def parse_reply(reply, example):
    """The example with the labels of a reply: JSON objects or a list of them, no words in between.
    ValueError or RecursionError for anything else, such as cut JSON, and for labels of no edge."""
    reply = reply.rpartition("</think>")[2]  # before stands a draft
    start = re.search(r"\{|\[\s*\{|\Z", reply).start()
    rest, objects = reply[start:], []
    while rest.startswith(("{", "[")):
        value, end = json.JSONDecoder(object_pairs_hook=as_lists).raw_decode(rest)
        objects += value if isinstance(value, list) else [value]
        rest = rest[end:].lstrip(", \r\n\t")
    mine = [value for value in objects if isinstance(value, dict)
            and value.get("input", [example.input]) == [example.input]]
    if mine != objects or "{" in rest or "<think>" in reply or len(reply) > 20_000:
        raise ValueError("a draft, another text, words in between or over 20,000 characters")
    important = [group for value in mine for group in value.get("important", [value])]
    labelled = parse_example(dump(replace(example, important=important)), example.source)
    if not phrases_to_edges(labelled)[0]:
        raise ValueError("no {effect: [causes]} of phrases in the text")
    return labelled


def answered(path):
    """{(input, target)} of an output so far, less a last line that a kill has cut."""
    with open(path, "a+b") as file:  # raises now where nothing can be written
        file.seek(0)
        content = file.read()
    whole, newline, last = content.rpartition(b"\n")
    if last and b'{"input": "'.startswith(last[:11]):
        content = whole + newline + (last + b"\n" if last.endswith(b"}") else b"")
        save(path, content)
    return {(e.input, e.target) for e in read(path)[0]} if content else set()


def annotate(questions, demos, assistant, out, time_limit=60):
    """Labels the examples of a file, from some labelled by hand, as the paper does.

    questions, demos, out: JSON Lines files. assistant: a command that reads a prompt and prints a
    reply in time_limit seconds, tried three times an example. Each answer is a line of out at once,
    without labels if no reply is of use; what stands there is not asked again. ValueError, OSError.
    """
    command, demos, examples = shlex.split(assistant), read(demos)[0], read(questions)[0]
    if not command or not shutil.which(command[0]):
        raise ValueError(f"--assistant is {assistant!r}: give a program and its flags")
    for demo in demos:
        if not phrases_to_edges(demo)[0]:
            raise ValueError(f'{demo.source}: no usable "important": give phrases of the text')
    prompt, done, problems = INSTRUCTION + "".join(map(dump, demos)), answered(out), []
    todo = {(e.input, e.target): e for e in examples if (e.input, e.target) not in done}
    for example in tqdm(todo.values(), disable=None):
        question = prompt + dump(Example(example.input, example.target))
        labelled, failed = replace(example, important=()), []
        while not labelled.important and len(failed) < 3:
            try:
                reply = subprocess.run(command, input=question, timeout=time_limit, check=True,
                                       capture_output=True, encoding="utf-8").stdout
                labelled = parse_reply(reply, example)
            except (ValueError, RecursionError, subprocess.SubprocessError) as error:
                failed.append(f"{example.source}: {error}")
        problems += failed[2:]  # of the third and last try
        with open(out, "a", encoding="utf-8") as file:
            file.write(dump(labelled))
    print(read(out)[1])
    print(f"{len(problems)} asked now have no usable reply", *problems[:1], sep=", such as ")


def check(labelled, truth):
    """How well labelled Examples have the edges of the true ones with the same texts, and the three
    worst, as text."""
    gold = {(e.input, e.target): set(phrases_to_edges(e)[0]) for e in truth}
    compared, tp, fp, fn = [], 0, 0, 0
    for e in labelled:
        if (e.input, e.target) in gold:
            edges, true = set(phrases_to_edges(e)[0]), gold[e.input, e.target]
            missing, extra = ([(e.input + e.target)[start:end] for _, (start, end) in sorted(part)]
                              for part in (true - edges, edges - true))
            tp, fp, fn = tp + len(true & edges), fp + len(extra), fn + len(missing)
            compared.append((len(missing + extra),
                             f"{e.source}: missing {missing}, too many {extra}"))
    worst = sorted(compared, key=lambda pair: -pair[0])[:3]
    return "\n".join([
        f"{len(compared)} of {len(labelled)} examples have true labels; edges: "
        f"precision {tp / max(tp + fp, 1):.3f}, recall {tp / max(tp + fn, 1):.3f}, "
        f"F1 {2 * tp / max(2 * tp + fp + fn, 1):.3f}", *(text for _, text in worst)])


def main(argv=None):
    parser = argparse.ArgumentParser(prog="data.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("show", help="print what is understood").add_argument
    add("file")
    add("--row", type=int, help="line of the example")
    add = commands.add_parser("generate", help="write examples of a game").add_argument
    add("game", choices=GAMES)
    add("--rows", type=int, default=1600)
    add("--ood", action="store_true", help="spurious features stop copying")
    add("--seed", type=int, default=0)
    add("--out", required=True)
    add = commands.add_parser("annotate", help="label by an assistant").add_argument
    add("questions")
    add("--demos", required=True, help="examples labelled by hand")
    add("--assistant", required=True, help="command that reads a prompt and prints a reply")
    add("--out", required=True, help="the same command goes on with it")
    add("--time-limit", type=float, default=60, help="seconds for a reply")
    add = commands.add_parser("check", help="compare labels with true ones").add_argument
    add("file")
    add("--against", required=True)
    args = parser.parse_args(argv)
    try:
        if args.command == "generate":
            examples = generate(GAMES[args.game], args.rows, args.ood, args.seed)
            return save(args.out, "".join(map(dump, examples)).encode())
        if args.command == "annotate":
            return annotate(args.questions, args.demos, args.assistant, args.out, args.time_limit)
        examples, summary = read(args.file)
        print(summary)
        print(show(examples, args.row) if args.command == "show"
              else check(examples, read(args.against)[0]))
    except (ValueError, OSError) as error:
        parser.exit(2, f"data.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "data.py: interrupted: the same command goes on\n")


if __name__ == "__main__":
    main()
