"""Data: the Spurious Token Game; phrases to token adjacency; JSON Lines, tokenizer and batches.
Last, to be skipped at first: labels by an assistant, and the sub-commands."""
import argparse
import json
import math
import os
import random
import re
import shlex
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

ROLES = ("other", "causal", "spurious")  # of a token
EDGES = ("value", "span", "spurious", "random")  # see `narrow`, `mislabel`
END = "<|endoftext|>"  # closes every answer


@dataclass(frozen=True)
class Feature:
    """A number of a game: uniform in low..high, whole if decimals and noise are 0."""
    name: str
    low: float = 1
    high: float = 10
    noise: float = 0.0  # standard deviation
    decimals: int = 0  # shown; the answer uses all
    unit: str = ""
    weight: float = 0.0  # causal: factor in the score
    copies: str = ""  # spurious: the causal feature copied unless OOD
    ratio: float = 1.0  # of the copy, rounded down unless it has noise


@dataclass(frozen=True)
class Game:
    """The paper's Spurious Token Game: causal features decide the answer, spurious ones copy them
    until they are out of distribution (OOD). ValueError for a mistake."""
    name: str
    causal: tuple
    spurious: tuple
    irrelevant: tuple
    question: str  # {features} stands for the numbers
    bands: tuple  # ((lowest score, answer), ...), highest first
    shuffle: bool = True  # the features of each example
    steps: int = 1500  # of training

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
        if lows != sorted({*lows, -math.inf}, reverse=True):
            raise ValueError(f"{self.name}: bands from {lows}: highest first, -math.inf last")

    def answer(self, score):
        return next(answer for lowest, answer in self.bands if round(score, 6) >= lowest)


STG = Game(
    "STG",
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
    "STG_H",
    causal=(
        Feature("Industrial Emissions", 30, 70, 2.0, 1, weight=0.3),
        Feature("Vehicle Emissions", 20, 60, 2.0, 1, weight=0.25),
        Feature("Coal Dependency", 10, 50, 1.5, 1, "%", weight=0.2),
        Feature("Agricultural Burning", 10, 30, 1.0, 1, weight=0.15),
        Feature("Urban Green Coverage", 40, 80, 3.0, 1, "%", weight=-0.2),
        Feature("Meteorological Dispersion", 50, 90, 3.0, 1, weight=-0.3)),
    spurious=(
        Feature("Ice Cream Sales Index", 5, 9, 2.0, 1, "", 0, "Meteorological Dispersion", 0.4),
        Feature("Allergy Complaints Level", 2, 6, 3.0, 1, "", 0, "Agricultural Burning", 0.2),
        Feature("Renewable Stock Index", 3, 7, 1.5, 0, "", 0, "Industrial Emissions", 1.1),
        Feature("Public Transport Subscriptions (k)", 3, 9, 2.0, 1, "", 0, "Vehicle Emissions",
                0.15),
        Feature("Water Awareness Score", -8, -4, 1.0, 1, "", 0, "Urban Green Coverage", -0.1)),
    irrelevant=(
        Feature("City Anniversary", 1, 100, unit="th"),
        Feature("Average Internet Speed", 80, 120, 3.0, 1, "Mbps"),
        Feature("Number of Libraries", 10, 50)),
    question="{features}. Given these diverse conditions, what is the projected Air Quality Index "
             "(AQI) on a 0-100 scale? Answer: ",
    # 0 for a score of -20 to 100 for one of 30, rounded
    bands=(*((n / 2 - 20.25, str(n)) for n in range(100, 0, -1)), (-math.inf, "0")),
    shuffle=False, steps=3000)

GAMES = {game.name: game for game in (STG, STG_H)}


@dataclass(frozen=True)
class Example:
    """A question with its answer: a line of a file."""
    input: str
    target: str
    important: tuple = ()  # ({effect: [causes]}, ...), phrases
    spurious: tuple = ()  # phrases that merely go along
    source: str = ""  # "file:line"


def generate(game, n, ood=False, seed=0, exclude=()):
    """n Examples of a game, no two with the same numbers, none with those of `exclude`. ood:
    spurious features do not copy. ValueError for n < 1 or more than the game has."""
    rng, examples = random.Random(f"{game.name} {ood} {seed}"), []
    before, after = map(len, game.question.split("{features}"))
    numbers = lambda text: frozenset(re.split("[.,;] ", text[before:len(text) - after]))
    seen = {numbers(example.input) for example in exclude}
    draw = lambda f: (rng.uniform if f.noise or f.decimals else rng.randint)(f.low, f.high)
    for _ in range(1000 + 100 * n):
        value = {f.name: draw(f) + rng.gauss(0, f.noise) for f in game.causal + game.irrelevant}
        for f in game.spurious:
            copy = f.ratio * value[f.copies]
            value[f.name] = (draw(f) if ood else
                             copy + rng.gauss(0, f.noise) if f.noise else math.floor(copy))
        causal, spurious, irrelevant = groups = [
            [f"{f.name}: {value[f.name]:.{f.decimals}f}{f.unit}" for f in group]
            for group in (game.causal, game.spurious, game.irrelevant)]
        text = ". ".join("; ".join(group) for group in groups)
        if game.shuffle:
            text = ", ".join(rng.sample(causal + spurious + irrelevant, len(value)))
        answer = game.answer(sum(f.weight * value[f.name] for f in game.causal))
        text = game.question.replace("{features}", text)
        if (key := numbers(text)) not in seen:
            seen.add(key)
            examples.append(Example(text, answer, ({answer: causal},), tuple(spurious)))
        if len(examples) == n:
            return examples
    raise ValueError(f"rows is {n}: give 1 or more, and not more than {game.name} has")


# One value each: 8, -6.9, .5, 1,000, 1/3, 7:50, 0-100, 2024-05-06, 1e-5. None: PM2.5, B12, F-16.
JOINT = "[.,:/–-]"  # between the digits of one value
NUMBER = re.compile(rf"(?<!\w)(?<!\d{JOINT})(?<![^\W\d_][-–−])"  # not within a word or number
                    rf"(?:(?<![\w%°)])[-−])?\.?\d+(?:{JOINT}\d+)*(?:[eE][-+]?\d+)?")
# a place inside a word ("he" in "the") or a number ("5" in "2.5" or "-5")
INSIDE = re.compile(r"(?<=\w)(?=\w)|(?<=\W[-−.])(?=\d)"
                    rf"|(?<=\d{JOINT})(?=\d)|(?<=\d)(?={JOINT}\d)")
QUOTES = str.maketrans("‘’‚′“”„″", "''''" + '""""')
compiled = lru_cache(10_000)(re.compile)


def find(text, phrase, notes, target=math.inf):
    """The spans where a phrase fits best, in any white space and quotes: whole, then from where the
    target starts, then as written. Adds to notes."""
    text = text.translate(QUOTES)
    words = normalize("NFC", phrase).translate(QUOTES).split()
    fits = defaultdict(list)  # {how well: spans}
    pattern = compiled(r"\s+".join(map(re.escape, words)), re.I)
    for match in pattern.finditer(text) if words else ():
        a, b = match.span()
        whole = (a == target or not INSIDE.match(text, a)) and not INSIDE.match(text, b)
        fits[whole, a >= target, match[0].split() == words].append((a, b))
    best = max(fits, default=None)
    if not 0 < len(fits[best]) <= 100:  # none, or too many
        notes.append(("not found", phrase))
        return []
    if not best[0]:
        notes.append(("inside words", phrase))
    return fits[best]


def phrases_to_edges(example):
    """(edges, causal, spurious, notes) of an Example, in spans (start, end) of input + target.

    edges: [(effect, cause)], the paper's causal supervision: who predicts the effect should look at
    the cause, which ends before it. causal: causes of the answer. notes: [(what, phrase)], such as
    ("late", "Room: 5") for a cause that is not before its effect."""
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
    """A JSON object with a list under each key; values of equal keys add up."""
    fields = defaultdict(list)
    for key, value in pairs:
        fields[key] += value if isinstance(value, list) else [value]
    return dict(fields)


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
    except Exception:
        raise ValueError(f'{source}: {line[:40]!r} is no example: write {{"input": "...", '
                         '"target": "...", "important": [{"effect": ["cause"]}]}') from None
    return Example(normalize("NFC", input), normalize("NFC", target), important, spurious, source)


def read(path):
    """The Examples of a JSON Lines file; prints a summary. ValueError for a bad line."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        examples = [parse_example(line, f"{path}:{n}") for n, line in enumerate(file, 1)
                    if line.strip()]
    if not examples:
        raise ValueError(f"{path}: no examples: give one JSON object on each line")
    edges, causal, _, notes = zip(*map(phrases_to_edges, examples))
    unused = defaultdict(list)
    for example, noted in zip(examples, notes):
        for what, phrase in noted:
            unused[what].append(f"{phrase!r} in {example.source}")
    print(f"{path}: {len(examples)} examples; {sum(map(bool, edges))} with edges; "
          f"{sum(map(bool, causal))} with edges at the answer",
          *(f"{len(where)} phrases {what}, such as {where[0]}" for what, where in unused.items()),
          sep="; ")
    return examples


def dump(example):
    """An Example as the line of JSON that `read` reads."""
    fields = {key: value for key, value in vars(example).items() if value and key != "source"}
    return json.dumps(fields, ensure_ascii=False) + "\n"


def overlapping(span, spans):
    """Indices of the spans, such as offsets of tokens, that share a character with one."""
    return [i for i, (a, b) in enumerate(spans) if a < span[1] and span[0] < b]


# "Name: number" with its unit
ITEM = re.compile(r"(?:^|(?<=[,;:.?!]\s))([^\W\d_](?:[^,;:.?!]|\.(?=\S))*): " + NUMBER.pattern
                  + r"[\w%]*(?=[,;.]?(?:\s|$))")


def hold_out(examples, share, seed):
    """(train, {"iid": ..., "ood": ...}): a share, 0 to 1, of the different inputs is held out; ood
    is what `redraw` changes of it. ValueError for an empty part."""
    inputs = sorted({example.input for example in examples})
    n = round(share * len(inputs)) if 0 < share < 1 else 0
    if n in (0, len(inputs)):
        raise ValueError(f"--val is {share:g}: give a share between 0 and 1, and more examples")
    held_out = {*random.Random(seed).sample(inputs, n)}
    train, iid = ([e for e in examples if (e.input in held_out) == held] for held in (False, True))
    ood = [new for old, new in zip(iid, redraw(iid, seed)) if new.input != old.input]
    return train, {"iid": iid, "ood": ood}


def moved(example, **fields):
    """The example with other fields; as it is when that loses an edge or role."""
    other = replace(example, **fields)
    counts = lambda e: [*map(len, phrases_to_edges(e)[:3])]
    return other if counts(other) == counts(example) else example


def redraw(examples, seed):
    """The examples with the spurious phrases of a random one in the places of theirs; [] when none
    has any."""
    rng, redrawn, pool = random.Random(seed), [], defaultdict(list)
    for e in examples:
        pool[len(e.spurious)].append(e.spurious)
    for example in examples if any(pool) else ():
        text, old = example.input, example.spurious
        new = rng.choice(pool[len(old)])
        places = {span: b for a, b in zip(old, new) for span in find(text, a, [])}
        for (start, end), phrase in sorted(places.items(), reverse=True):
            text = text[:start] + phrase + text[end:]
        redrawn.append(moved(example, input=text, spurious=new))
    return redrawn


def reorder(example, rng):
    """The example with its "Name: number" items in another order; as it is when words stand between
    them or two have one name; see `moved`."""
    text, items = example.input, list(ITEM.finditer(example.input))
    between = "".join(text[a.end():b.start()] for a, b in pairwise(items))
    if len({item[1].lower() for item in items}) < len(items) or re.search(r"\w", between):
        return example
    others = iter(rng.sample([item[0] for item in items], len(items)))
    return moved(example, input=ITEM.sub(lambda _: next(others), text))


def mislabel(example, how, rng):
    """A control: the "spurious" phrases, or three "random" items, are called causes."""
    phrases = example.spurious
    if how == "random":
        items = [item[0] for item in ITEM.finditer(example.input)]
        phrases = rng.sample(items, min(3, len(items)))
    return replace(example, important=({example.target: phrases},))


# ": " is one token, so that a prompt that ends in a blank is cut where training cut it
PATTERN = r"\d{1,3}| ?[^\s\d!-/:-@\[-`{-~]+|[!-/:-@\[-`{-~]+\s*|\s+"


def build_tokenizer(texts):
    """A byte-level tiktoken.Encoding for any text. One token: END, each byte, each number of up to
    three digits in texts, each word or mark that occurs twice."""
    counts = Counter(piece for text in texts for piece in re.findall(PATTERN, text))
    pieces = [piece.encode() for piece, n in counts.most_common() if n > 1 or piece.isdecimal()]
    pieces = dict.fromkeys([*(bytes([i]) for i in range(256)), *pieces])
    return tiktoken.Encoding("game", pat_str=PATTERN, special_tokens={END: len(pieces)},
                             mergeable_ranks={piece: i for i, piece in enumerate(pieces)})


def character_offsets(tokenizer, tokens):
    """[(start, end)] of each token in characters; tokens of one character have the same place."""
    text, starts = tokenizer.decode_with_offsets(tokens)
    return [(a, max(a + 1, b)) for a, b in pairwise([*starts, len(text)])]


def character_tokens(tokenizer, tokens):
    """Tokens as [(text, [positions])]; the bytes of one character are together."""
    text, offsets = tokenizer.decode(tokens), character_offsets(tokenizer, tokens)
    return [(text[a:b], list(positions))
            for (a, b), positions in groupby(range(len(tokens)), offsets.__getitem__)]


def token_edges(edges, offsets):
    """Edges between spans as sorted (query, key) pairs of tokens, for any tokenizer.

    offsets: [(start, end)] of the tokens in characters, as fast tokenizers return; (0, 0): no text.
    A decoder predicts token t + 1 at position t: the queries of an effect on tokens s..e are
    s-1..e-1. Keys are the cause's tokens before s."""
    pairs = set()
    for effect, cause in edges:
        predicted, keys = overlapping(effect, offsets), overlapping(cause, offsets)
        pairs.update((t - 1, key) for t in predicted for key in keys if key < predicted[0])
    return sorted(pairs)


def narrow(text, span, how="value"):
    """The spans of numbers in a span, "8" in "Smoking: 8"; without any, or as "span", the span."""
    numbers = [number.span() for number in NUMBER.finditer(text, *span)]
    return numbers if numbers and how != "span" else [span]


@dataclass(frozen=True)
class Dataset:
    """N encoded examples, padded on the right to T tokens."""
    tokenizer: tiktoken.Encoding
    idx: torch.Tensor  # (N, T) token ids
    targets: torch.Tensor  # (N, T) the next token, -100 where there is none
    answer: torch.Tensor  # (N, T) bool: predicts a token of the answer or END
    role: torch.Tensor  # (N, T) index into ROLES
    item: torch.Tensor  # (N, T) where the item of a cause or effect starts, else no token
    edges: torch.Tensor  # (N, E, 2) query and key of each edge, T where there is none


# what stands before an item, up to a separator or number: the item of "8" is "Smoking: 8"
BEFORE_ITEM = re.compile(rf"(?s)(?:.*(?:[,;.?!]\s|\n|{NUMBER.pattern})\s*)?")


def encode(examples, tokenizer, how="value", device="cpu"):
    """Examples to a Dataset. how: see `narrow`."""
    end, encoded = tokenizer.encode_single_token(END), []
    for example in examples:
        text, prompt = example.input + example.target, tokenizer.encode_ordinary(example.input)
        tokens = prompt + tokenizer.encode_ordinary(example.target)  # apart, as when asked
        offsets, T = character_offsets(tokenizer, tokens), len(tokens)
        answer, role, item = [t >= len(prompt) - 1 for t in range(T)], [0] * T, [T] * T
        edges, causal, spurious, _ = phrases_to_edges(example)
        for r, spans in (2, spurious), (1, causal):  # what is called both is causal
            for part in sum((narrow(text, span, how) for span in spans), []):
                for t in overlapping(part, offsets):
                    role[t] = r
        edges = [(effect, part) for effect, cause in edges for part in narrow(text, cause, how)]
        for span in {span for edge in edges for span in edge}:
            start = BEFORE_ITEM.match(text, 0, span[0]).end()
            inside = overlapping((start, span[1]), offsets)
            for t in inside:
                item[t] = min(item[t], inside[0])
        pairs = torch.tensor(token_edges(edges, offsets), dtype=torch.long).view(-1, 2)
        columns = tokens, tokens[1:] + [end], answer, role, item
        encoded.append((*map(torch.tensor, columns), pairs))
    T = max(len(tokens) for tokens, *_ in encoded)
    tensors = [pad_sequence(column, batch_first=True, padding_value=value).to(device)
               for column, value in zip(zip(*encoded), (end, -100, False, 0, T, T))]
    return Dataset(tokenizer, *tensors)


def adjacency_of(data, ix):
    """(B, T, T), bool, for the examples ix, (B,): [b, i, j] is an edge from query i to key j."""
    B, T = len(ix), data.idx.shape[1]
    query, key = data.edges[ix].unbind(-1)  # (B, E) each
    adjacency = torch.zeros(B, T + 1, T + 1, dtype=torch.bool, device=query.device)
    adjacency[torch.arange(B)[:, None], query, key] = True
    return adjacency[:, :T, :T]


def inside_of(data, ix):
    """(B, T, T), bool, for the layers below: a token of an item looks inside it, up to itself. Not
    shifted by one: it is about what a token holds, not what it predicts."""
    position = torch.arange(data.idx.shape[1], device=data.idx.device)
    return (data.item[ix][:, :, None] <= position) & (position <= position[:, None])


def show(file, row):
    """Prints the text of an example and which part of it should look at which."""
    for example in read(file)[row - 1:row]:
        text = example.input + example.target
        print(text)
        for (a, b), cause in phrases_to_edges(example)[0]:
            for c, d in narrow(text, cause):
                print(f"{text[a:b]!r} at {a} should look at {text[c:d]!r} at {c}")


def save(game, rows, ood, seed, out):
    """Writes a file of examples."""
    examples = generate(GAMES[game], rows, ood, seed)
    with open(out, "w", encoding="utf-8") as file:
        file.writelines(map(dump, examples))


texts = lambda example: (example.input, example.target)
INSTRUCTION = """In each line below "important" says which phrases of input and target decide which
later ones, [{effect: [causes]}]; the effect is most often the target. Copy phrases letter by
letter. Reply with the "important" of the last line alone.

"""


def parse_reply(reply, example):
    """The example with the labels of a reply: JSON objects or a list of them, with an edge.
    ValueError, AttributeError or RecursionError for anything else."""
    rest, important = reply.rpartition("</think>")[2][:20_000], []  # before stands a draft
    rest = rest[re.search(r"<think>|\{|\[\s*\{|\Z", rest).start():]
    while rest.startswith(("{", "[")):
        value, end = json.JSONDecoder(object_pairs_hook=as_lists).raw_decode(rest)
        rest = rest[end:].lstrip(", \r\n\t")
        for group in value if isinstance(value, list) else [value]:
            if group.get("input", [example.input]) != [example.input]:
                raise ValueError("echo of the prompt")
            important += group.get("important", [group])
    labelled = parse_example(dump(replace(example, important=important)), example.source)
    if "{" in rest or not phrases_to_edges(labelled)[0]:
        raise ValueError("words between objects, or no phrases of the text")
    return labelled


def annotate(questions, demos, assistant, out):
    """Labels the examples of a file, from some labelled by hand, as the paper does.

    questions, demos, out: JSON Lines files. assistant: a command that reads a prompt and prints a
    reply; a usable one is a line of out at once, and not asked for again. ValueError, OSError."""
    command, examples, failed = shlex.split(assistant) or [""], read(questions), []
    prompt = INSTRUCTION + "".join(map(dump, read(demos)))
    open(out, "a").close()  # raises now where nothing can be written
    done = {*map(texts, read(out))} if os.path.getsize(out) else ()
    for example in tqdm([e for e in examples if texts(e) not in done], disable=None):
        question = prompt + dump(Example(*texts(example)))
        try:
            reply = subprocess.run(command, input=question, timeout=300, check=True,
                                   capture_output=True, encoding="utf-8").stdout
            line = dump(parse_reply(reply, example))
        except (ValueError, AttributeError, RecursionError, subprocess.SubprocessError) as error:
            failed.append(f"{example.source}: {error}")
            continue
        with open(out, "a", encoding="utf-8") as file:
            file.write(line)
    print(f"{len(failed)} without a usable reply", *failed[:1], sep=", such as ")


def check(file, against):
    """Prints how well labels have the edges of true ones, and the worst examples."""
    edges = lambda example: {*phrases_to_edges(example)[0]}
    labelled, truth = read(file), {texts(e): edges(e) for e in read(against)}
    compared, tp, fp, fn = [], 0, 0, 0
    for e in (e for e in labelled if texts(e) in truth):
        predicted, gold = edges(e), truth[texts(e)]
        missing, extra = ([(e.input + e.target)[slice(*cause)] for _, cause in sorted(part)]
                          for part in (gold - predicted, predicted - gold))
        tp, fp, fn = tp + len(gold & predicted), fp + len(extra), fn + len(missing)
        compared.append((-len(missing + extra), f"{e.source}: missing {missing}, too many {extra}"))
    print(f"{len(compared)} of {len(labelled)} compared; edges: "
          f"precision {tp / max(tp + fp, 1):.3f}, recall {tp / max(tp + fn, 1):.3f}, "
          f"F1 {2 * tp / max(2 * tp + fp + fn, 1):.3f}")
    print(*(text for _, text in sorted(compared)[:3]), sep="\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="run", required=True)
    add = commands.add_parser("show").add_argument
    add("file")
    add("--row", type=int, default=1)
    add = commands.add_parser("generate").add_argument
    add("game", choices=GAMES)
    add("--rows", type=int, default=1600)
    add("--ood", action="store_true")
    add("--seed", type=int, default=0)
    add("--out", required=True)
    add = commands.add_parser("annotate").add_argument
    add("questions")
    add("--demos", required=True)
    add("--assistant", required=True)
    add("--out", required=True)
    add = commands.add_parser("check").add_argument
    add("file")
    add("--against", required=True)
    args = vars(parser.parse_args(argv))
    run = {"show": show, "generate": save, "annotate": annotate, "check": check}[args.pop("run")]
    try:
        run(**args)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        parser.exit(2, f"data.py: {str(error) or 'interrupted: the same command goes on'}\n")


if __name__ == "__main__":
    main()
