"""Data: the rule-based Spurious Token Game (STG), the tokenizer, phrases to token adjacency, batches, labels by an assistant."""
import argparse
import bisect
import errno
import json
import math
import os
import random
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

ROLES = ("other", "causal", "spurious", "irrelevant")  # a token's role is stored as its index here
END = "<|endoftext|>"  # closes every answer, so that a greedy answer knows where to stop


@dataclass(frozen=True)
class Feature:
    """One number in a game's text: uniform in low..high (whole numbers when decimals and noise are 0) plus noise."""
    name: str
    low: float = 1
    high: float = 10
    noise: float = 0.0  # standard deviation of the Gaussian noise
    decimals: int = 0  # how many are shown; the answer is computed from the value before rounding
    unit: str = ""
    weight: float = 0.0  # causal features: factor in the score
    copies: str = ""  # spurious features: the causal feature copied in training and IID; low..high, without noise, is OOD
    ratio: float = 0.0  # spurious features: factor of the copy


@dataclass(frozen=True)
class Game:
    """A Spurious Token Game, the paper's synthetic benchmark: causal features decide the answer, spurious ones copy them."""
    name: str
    causal: tuple
    spurious: tuple
    irrelevant: tuple
    question: str  # {features} stands for the numbers; the answer follows
    bands: tuple = ()  # ((lowest score, answer), ...), highest first; or
    scale: tuple = ()  # (low, high): the score, clipped, is answered as a whole number from 0 (low) to 100 (high)
    shuffle: bool = True  # every row has its own order of features; otherwise causal, spurious, irrelevant

    def answer(self, score):
        """The answer to a score: its band's, or its place on the scale."""
        if self.scale:
            low, high = self.scale
            return str(round(100 * (min(max(score, low), high) - low) / (high - low)))
        return next(answer for lowest, answer in self.bands if round(score, 6) >= lowest)


STG = Game(
    name="STG",
    causal=(Feature("Smoking", weight=1.2), Feature("Weight", weight=0.7), Feature("Exercise", weight=-1.0)),
    spurious=(Feature("Yellow fingers", copies="Smoking", ratio=1.5), Feature("Clothing size", copies="Weight", ratio=1.0),
              Feature("Hormones", copies="Exercise", ratio=0.5)),
    irrelevant=(Feature("Room size"), Feature("Certain gene")),
    question="Here is the statistical data for a person. Please predict the probability of cancer. {features} Answer: ",
    bands=((7.3, "High Risk"), (2.7, "Middle Risk"), (-math.inf, "Low Risk")))  # scores are tenths: > 7.2 is >= 7.3

STG_H = Game(
    name="STG_H",
    causal=(Feature("Industrial Emissions", 30, 70, 2.0, 1, weight=0.3),
            Feature("Vehicle Emissions", 20, 60, 2.0, 1, weight=0.25),
            Feature("Coal Dependency", 10, 50, 1.5, 1, "%", weight=0.2),
            Feature("Agricultural Burning", 10, 30, 1.0, 1, weight=0.15),
            Feature("Urban Green Coverage", 40, 80, 3.0, 1, "%", weight=-0.2),
            Feature("Meteorological Dispersion", 50, 90, 3.0, 1, weight=-0.3)),
    spurious=(Feature("Ice Cream Sales Index", 5, 9, 2.0, 1, copies="Meteorological Dispersion", ratio=0.4),
              Feature("Allergy Complaints Level", 2, 6, 3.0, 1, copies="Agricultural Burning", ratio=0.2),
              Feature("Renewable Stock Index", 3, 7, 1.5, 0, copies="Industrial Emissions", ratio=1.1),
              Feature("Public Transport Subscriptions (k)", 3, 9, 2.0, 1, copies="Vehicle Emissions", ratio=0.15),
              Feature("Water Awareness Score", -8, -4, 1.0, 1, copies="Urban Green Coverage", ratio=-0.1)),
    irrelevant=(Feature("City Anniversary", 1, 100, unit="th"), Feature("Average Internet Speed", 80, 120, 3.0, 1, "Mbps"),
                Feature("Number of Libraries", 10, 50)),
    question="{features}. Given these diverse conditions, what is the projected Air Quality Index (AQI) on a 0-100 scale? "
             "Answer: ",
    scale=(-20, 30), shuffle=False)

GAMES = {game.name: game for game in (STG, STG_H)}


@dataclass(frozen=True)
class Example:
    """One question with its answer. Spans are (start, end) in characters of input + target."""
    input: str
    target: str
    edges: tuple = ()  # ((effect span, cause span), ...): predicting the effect should look at the cause
    roles: tuple = ()  # ((role, span), ...) of the numbers; empty when nobody knows
    source: str = ""  # "file:line", for messages


def draw(feature, rng):
    """A uniform value in low..high, a whole number when neither decimals nor noise are asked for."""
    if feature.noise or feature.decimals:
        return rng.uniform(feature.low, feature.high)
    return rng.randint(feature.low, feature.high)


def generate(game, n, ood=False, seed=0, edges="value", exclude=()):
    """n rows of a game, no two alike in their numbers (the paper's synthetic benchmark).

    ood: the spurious features stop copying and are drawn on their own. edges: "value" puts cause edges on the number
    only ("8"), "span" on all of "Smoking: 8". exclude: Examples whose numbers must not come up again.
    Returns a list of Example. The same arguments give the same rows everywhere: only Python's own generator is used.
    Raises ValueError for n < 1, and when the game has too few different rows.
    """
    if n < 1:
        raise ValueError(f"rows is {n}: give at least 1")
    rng = random.Random(f"{game.name} {ood} {seed}")
    features = game.causal + game.spurious + game.irrelevant
    seen = {numbers(example, game) for example in exclude}
    examples, misses = [], 0
    while len(examples) < n:
        value = {f.name: draw(f, rng) + rng.gauss(0, f.noise) for f in game.causal + game.irrelevant}
        for f in game.spurious:
            copy = f.ratio * value[f.copies]
            value[f.name] = draw(f, rng) if ood else copy + rng.gauss(0, f.noise) if f.noise else math.floor(copy)
        score = sum(f.weight * value[f.name] for f in game.causal)
        example = write(game, {f: f"{value[f.name]:.{f.decimals}f}" for f in features}, game.answer(score), edges, rng)
        row = numbers(example, game)
        misses = misses + 1 if row in seen else 0
        if misses == 1000:  # in a row
            raise ValueError(f"rows is {n}: {game.name} has too few different rows, ask for fewer")
        if not misses:
            seen.add(row)
            examples.append(example)
    return examples


def write(game, shown, answer, edges, rng):
    """The Example with the numbers `shown` ({feature: text}): writes the text and notes where each number stands."""
    groups = [[(role, f) for f in getattr(game, role)] for role in ROLES[1:]]
    separator = "; "
    if game.shuffle:
        groups, separator = [sum(groups, [])], ", "
        rng.shuffle(groups[0])
    before, after = game.question.split("{features}")
    text, roles = before, []
    for g, group in enumerate(groups):
        text += ". " if g else ""
        for i, (role, f) in enumerate(group):
            text += separator if i else ""
            start = len(text)
            text += f"{f.name}: "
            roles.append((role, (start if edges == "span" else len(text), len(text) + len(shown[f]))))
            text += shown[f] + f.unit
    text += after
    effect = (len(text), len(text) + len(answer))
    return Example(text, answer, tuple((effect, span) for role, span in roles if role == "causal"), tuple(roles))


def numbers(example, game):
    """What makes a row of a game the same row: its numbers, whatever the order they are written in."""
    before, after = game.question.split("{features}")
    return tuple(sorted(example.input.removeprefix(before).removesuffix(after).split(", ")))


NUMBER = r"-?\d+(?:[.,]\d+)*"


def fold(text):
    """Lower case, character by character: the few that would change length stay, so that positions stay true."""
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def occurrences(text, phrase, start=0):
    """Every (start, end) at which phrase stands in text. A number at its ends must be whole: "1" is not in "10", "-1" or
    "1.5"."""
    found = []
    start = text.find(phrase, start) if phrase else -1
    while start >= 0:
        end = start + len(phrase)
        before, after = "  " + text[max(start - 2, 0):start], text[end:end + 2] + "  "
        joins_left = phrase[0].isdigit() and (before[-1].isdigit() or before[-1] in ".," and before[-2].isdigit()
                                              or before[-1] == "-" and not before[-2].isalnum())
        joins_right = phrase[-1].isdigit() and (after[0].isdigit() or after[0] in ".," and after[1].isdigit())
        if not joins_left and not joins_right:
            found.append((start, end))
        start = text.find(phrase, start + 1)
    return found


def find(text, phrase, start=0):
    """`occurrences`, exact; when there are none, in any case."""
    return occurrences(text, phrase, start) or occurrences(fold(text), fold(phrase), start)


def link(input, target, important, edges="value"):
    """Phrases to edges (the paper's causal supervision signals): important is a list of {effect phrase: [cause phrases]}.

    An effect is looked for in the target first, then everywhere; a cause counts only where it ends before its effect
    starts. edges: "value" narrows a cause to the numbers in it, when it has one; "span" keeps it whole.
    Returns (edges, missing, late): the edges as in Example, phrases that are not in the text, and causes that are but
    never before their effect.
    """
    text, links, missing, late = input + target, [], [], []
    for group in important:
        for effect, causes in group.items():
            effects = find(text, effect, len(input)) or find(text, effect)
            if not effects:
                missing.append(effect)
                continue
            for cause in causes:
                spans = find(text, cause)
                pairs = [(e, c) for e in effects for c in spans if c[1] <= e[0]]
                if not pairs:
                    (late if spans else missing).append(cause)
                for e, (start, end) in pairs:
                    found = re.finditer(NUMBER, text[start:end]) if edges == "value" else ()
                    links += [(e, (start + n.start(), start + n.end())) for n in found] or [(e, (start, end))]
    return tuple(links), missing, late


def shuffle_numbers(examples, seed):
    """OOD rows made from labelled ones, each with an edge: in each input, the numbers that are no cause change places with
    each other, so that what went along with a cause no longer does, while the answer stays true. Edges are left out."""
    rng, shuffled = random.Random(seed), []
    for example in examples:
        free = [number for number in re.finditer(NUMBER, example.input)
                if not any(start < number.end() and number.start() < end for _, (start, end) in example.edges)]
        values = [number.group() for number in free]
        rng.shuffle(values)
        text, at = "", 0
        for number, value in zip(free, values):
            text += example.input[at:number.start()] + value
            at = number.end()
        shuffled.append(Example(text + example.input[at:], example.target, source=example.source))
    return shuffled


ITEM = rf"[A-Z][^,;:.]*: {NUMBER}[\w%]*(?=[,;.]?(?:\s|$))"


def reorder(example, rng):
    """The same row with its "Name: number" items in another order; edges and roles move along. It stays as it is when that
    would tear a span apart or put an effect before its cause, or when other words stand between two items."""
    items, text = list(re.finditer(ITEM, example.input)), example.input + example.target
    order, at = [], 0  # for each place, the place in `text` that its character comes from
    for old, new in zip(items, rng.sample(items, len(items))):
        order += [*range(at, old.start()), *range(*new.span())]
        at = old.end()
    order += range(at, len(text))
    place = [new for _, new in sorted(zip(order, range(len(order))))]  # where each character of `text` goes

    def move(span):
        start, end = place[span[0]], place[span[1] - 1] + 1
        return (start, end) if place[slice(*span)] == list(range(start, end)) else None

    edges = tuple((move(effect), move(cause)) for effect, cause in example.edges)
    roles = tuple((role, move(span)) for role, span in example.roles)
    torn = any(None in edge or edge[1][1] > edge[0][0] for edge in edges) or any(span is None for _, span in roles)
    if torn or any(re.search(r"\w", example.input[a.end():b.start()]) for a, b in zip(items, items[1:])):
        return example
    return Example("".join(text[i] for i in order)[:len(example.input)], example.target, edges, roles, example.source)


def parse(line):
    """One JSON line to (input, target, important). ValueError says what is wrong and what to do."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON ({str(error).split(':')[0]}): write one object on each line") from None
    if not isinstance(row, dict):
        raise ValueError('not a JSON object: write {"input": ..., "target": ...}')
    for key in ("input", "target"):
        value = row.get(key)
        if key == "target" and type(value) in (int, float) and abs(value) < math.inf:
            row[key] = value = str(value)
        if not isinstance(value, str) or not value.strip():
            what = "is missing" if key not in row else "is empty" if isinstance(value, str) else f"is {value!r:.40}"
            raise ValueError(f'"{key}" {what}: give a text{" or a number" if key == "target" else ""}')
    try:
        (row["input"] + row["target"]).encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair in the text: replace it") from None
    important = row.get("important") or []
    important = [important] if isinstance(important, dict) else important
    try:
        important = [{effect: [causes] if isinstance(causes, str) else causes for effect, causes in group.items()}
                     for group in important]
        if all(isinstance(cause, str) for group in important for causes in group.values() for cause in causes):
            return row["input"], row["target"], important
    except (AttributeError, TypeError):
        pass
    raise ValueError('"important" has the wrong shape: give [{"effect": ["cause", ...]}, ...] or leave it out')


def read(path, edges="value", skip_bad=False):
    """JSON Lines with input, target and optional important to (list of Example, summary line).

    A byte order mark, CRLF and blank lines are fine. A bad line raises ValueError as "file:line: what, and what to do",
    or is counted with skip_bad; phrases that are missing are always only counted. OSError when the file can't be read.
    """
    examples, shown, missing, late, bad, unlinked = [], [], 0, 0, 0, 0
    with open(path, "rb") as file:
        for n, line in enumerate(file, 1):
            try:
                line = line.decode("utf-8-sig" if n == 1 else "utf-8")
                if not line.strip():
                    continue
                input, target, important = parse(line)
            except ValueError as error:
                if not skip_bad:
                    what = "not UTF-8: save the file as UTF-8" if isinstance(error, UnicodeDecodeError) else error
                    raise ValueError(f"{path}:{n}: {what}, or pass --skip-bad") from None
                bad += 1
                continue
            links, row_missing, row_late = link(input, target, important, edges)
            missing, late = missing + len(row_missing), late + len(row_late)
            shown += [f"{n}: {phrase!r}" for phrase in row_missing + row_late][:3 - len(shown)]
            unlinked += bool(important) and not links
            examples.append(Example(input, target, links, source=f"{path}:{n}"))
    if not examples:
        raise ValueError(f"{path}: no rows: give one JSON object on each line")
    summary = f"{path}: {len(examples)} rows, {sum(bool(e.edges) for e in examples)} supervised"
    if bad:
        summary += f"; skipped {bad} bad lines"
    if missing or late:
        summary += (f"; dropped {missing} phrases not in the text, {late} causes not before their effect, "
                    f"{unlinked} rows left without an edge, such as line {', '.join(shown)}")
    return examples, summary


# GPT-2 puts a space before the word; here ": " is one token, so a prompt that ends in a space is cut where training cut it.
PATTERN = r"\p{N}{1,3}| ?\p{L}+|[^\s\p{L}\p{N}]+\s*|\s+"


def build_tokenizer(texts, digits=3):
    """A byte-level tiktoken.Encoding made from `texts`, without a download: it encodes any text and decodes it exactly.

    One token: each byte, each whole number of up to `digits` digits (1 or 3), each word or mark that occurs at least twice.
    """
    pieces = [bytes([i]) for i in range(256)]
    pieces += [str(i).encode() for i in range(10 ** digits)]
    counts = Counter(piece for text in texts for piece in re.findall(r" ?[^\W\d_]+|[^\w\s]+\s*", text))
    pieces += [piece.encode() for piece, count in counts.most_common(8192) if count > 1]
    return tokenizer_from(list(dict.fromkeys(pieces)), digits)


def tokenizer_from(pieces, digits=3):
    """The tiktoken.Encoding whose token i is pieces[i], a list of bytes; END is the token after the last."""
    return tiktoken.Encoding(name="game", pat_str=PATTERN.replace("3", str(digits)), special_tokens={END: len(pieces)},
                             mergeable_ranks={piece: i for i, piece in enumerate(pieces)})


@dataclass(frozen=True)
class Dataset:
    """N encoded rows, padded on the right to the longest, T tokens. Tensors are made once; a batch is cut from them."""
    idx: torch.Tensor  # (N, T) token ids
    targets: torch.Tensor  # (N, T) the token after each position, -100 where there is none
    answer: torch.Tensor  # (N, T) bool: positions that predict a token of the answer, END included
    role: torch.Tensor  # (N, T) index into ROLES, int8
    edges: torch.Tensor  # (E, 2) query and key of each edge, row after row
    first_edge: torch.Tensor  # (N + 1,) where each row's edges start in `edges`


def encode(examples, tokenizer, block_size, device="cpu", skip_bad=False):
    """Examples to a Dataset. Character spans become tokens; edges are moved to the queries that predict.

    A decoder predicts token t + 1 at position t: an effect on tokens s..e is predicted by rows s-1..e-1, and those are
    the rows that get the edges. Keys are the cause's tokens before s, so no edge points at the future.
    A row longer than block_size raises ValueError with its file and line, or is left out with skip_bad.
    """
    end = tokenizer.encode_single_token(END)
    ids, roles, edges = array("i"), array("b"), array("i")  # row after row; a list would take ten times the memory
    prompts, lengths, first_edge = [], [], [0]
    for n, example in enumerate(examples):
        prompt, answer = tokenizer.encode_ordinary(example.input), tokenizer.encode_ordinary(example.target)
        tokens = prompt + answer
        if len(tokens) > block_size:
            if skip_bad:
                continue
            raise ValueError(f"{example.source or f'row {n + 1}'}: {len(tokens)} tokens, over block_size {block_size}: "
                             "shorten the text, or raise --block-size, or pass --skip-bad")
        text = example.input + example.target
        pieces = tokenizer.decode_tokens_bytes(tokens) if example.edges or example.roles else ()  # only spans need them
        bounds = list(accumulate(map(len, pieces), initial=0))  # token t is the bytes bounds[t]..bounds[t + 1]

        def tokens_of(span):
            start, stop = (len(text[:i].encode()) for i in span)
            return range(bisect.bisect_right(bounds, start) - 1, bisect.bisect_left(bounds, stop))

        pairs = set()
        for effect, cause in example.edges:
            effect, keys = tokens_of(effect), tokens_of(cause)
            pairs.update((t - 1, key) for t in effect for key in keys if t > 0 and key < effect[0])
        for pair in sorted(pairs):
            edges.extend(pair)
        role = [0] * len(tokens)
        for name, span in example.roles:
            for t in tokens_of(span):
                role[t] = ROLES.index(name)
        ids.extend(tokens)
        roles.extend(role)
        prompts.append(len(prompt))
        lengths.append(len(tokens))
        first_edge.append(len(edges) // 2)
    if not lengths:
        raise ValueError(f"no row fits in block_size {block_size}: raise --block-size")
    prompts, lengths = torch.tensor(prompts)[:, None], torch.tensor(lengths)[:, None]  # (N, 1) each
    position = torch.arange(lengths.max() + 1)
    held = position < lengths  # (N, T + 1)
    idx = torch.full(held.shape, end)
    idx[held] = torch.tensor(np.array(ids), dtype=torch.long)
    role = torch.zeros(held.shape, dtype=torch.int8)
    role[held] = torch.tensor(np.array(roles))
    targets = idx[:, 1:].masked_fill(~held[:, :-1], -100)
    answer = held & (position >= prompts - 1)
    edges = torch.tensor(np.array(edges).reshape(-1, 2))
    tensors = idx[:, :-1], targets, answer[:, :-1], role[:, :-1], edges, torch.tensor(first_edge)
    return Dataset(*(tensor.contiguous().to(device) for tensor in tensors))


def adjacency_of(data, rows):
    """Dense adjacency (B, T, T), bool, of the rows (B,) of a Dataset: [b, i, j] is an edge from query i to key j."""
    counts = data.first_edge[rows + 1] - data.first_edge[rows]  # (B,)
    b = torch.repeat_interleave(counts)  # (E,) which row of the batch each edge is of
    within = torch.arange(len(b), device=b.device) - (counts.cumsum(0) - counts)[b]
    query, key = data.edges[data.first_edge[rows][b] + within].unbind(-1)
    adjacency = torch.zeros(len(rows), data.idx.shape[1], data.idx.shape[1], dtype=torch.bool, device=b.device)
    adjacency[b, query, key] = True
    return adjacency


def describe(examples, tokenizer):
    """What was understood of the examples, as lines of text, with the edges of one of them drawn."""
    labels = Counter(example.target for example in examples)
    data = encode(examples, tokenizer, sys.maxsize)
    lengths = (data.targets != -100).sum(dim=1).sort().values
    linked = data.first_edge.diff().nonzero()[:, 0]
    lines = [f"answers: {len(labels)}, " + ", ".join(f"{label!r} {n / len(examples):.1%}" for label, n in labels.most_common(5)),
             f"tokens: {lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}, {tokenizer.n_vocab} in the vocabulary",
             f"edges: {len(data.edges)} in {len(linked)} of {len(examples)} rows"]
    if len(linked):
        n, looks = int(linked[0]), {}
        for query, key in data.edges[slice(*data.first_edge[n:n + 2].tolist())].tolist():
            looks.setdefault(query, []).append(key)
        token = [repr(tokenizer.decode([t])) for t in data.idx[n].tolist()]
        lines += [examples[n].input + examples[n].target, "each query, the token it predicts, the keys it should look at:"]
        for query, keys in looks.items():
            shown = "  ".join(f"{token[key]} at {key}" for key in keys)
            lines.append(f"  {token[query]} at {query} predicts {token[query + 1]}  <-  {shown}")
    return "\n".join(lines)


def dump(examples):
    """Examples as JSON Lines in the format that `read` takes; causes are written as their edges have them, each text once."""
    for example in examples:
        text, important = example.input + example.target, {}
        for effect, cause in example.edges:
            important.setdefault(text[slice(*effect)], {})[text[slice(*cause)]] = True
        row = {"input": example.input, "target": example.target}
        if important:
            row["important"] = [{effect: list(causes) for effect, causes in important.items()}]
        yield json.dumps(row, ensure_ascii=False) + "\n"


def save(path, content):
    """Writes the bytes to path + ".tmp", then renames that to path: there the old file or the new one is whole, at any moment.
    OSError, with the path, when it can't be written or is something else than a file."""
    temporary = f"{path}.tmp"
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(errno.EINVAL, "Not a regular file")
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


INSTRUCTION = """Each line below is a text as JSON: an input and the target that follows it. "important" says which phrases
decide which later ones, as {effect: [causes]}; the effect is most often the target. Copy the phrases from the text letter by
letter. A cause stands before its effect; what merely goes along with an effect is no cause. Reply with the "important" of the
last line, and nothing else.

"""
MOST = 1_000_000  # bytes read of a reply


def ask(command, prompt, time_limit, stop):
    """What a command (a list of words, run without a shell) prints when it reads the prompt on standard input.

    Raises ValueError when it fails, prints more than MOST bytes, or is not done after time_limit seconds or when the event
    `stop` is set: then it is killed with its whole process group. OSError when it can't be started.
    """
    with tempfile.TemporaryFile() as file:  # writing to a pipe could block on a command that does not read
        file.write(prompt.encode())
        file.seek(0)
        process = subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    reply, closed, end = bytearray(), False, time.monotonic() + time_limit
    with process:
        while (not closed or process.poll() is None) and len(reply) <= MOST and time.monotonic() < end and not stop.is_set():
            if closed:
                stop.wait(0.01)
            elif select.select([process.stdout], [], [], 0.1)[0]:
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                reply += chunk
                closed = not chunk
        killed = process.returncode is None
        if killed:
            os.killpg(process.pid, signal.SIGKILL)
    if killed:
        raise ValueError(f"over {MOST} bytes" if len(reply) > MOST else f"not done in {time_limit:g} seconds")
    if process.returncode:
        raise ValueError(f"exit status {process.returncode}")
    return reply.decode(errors="replace")


def label(reply, input, target):
    """The Example that an assistant's reply makes of a text: from the last {effect: [causes]}, or list of them, with an edge.

    Only what `link` finds is kept: phrases of the text, cause before effect. Raises ValueError when that is nothing.
    """
    reply, values, end = reply[-50_000:], [], 0  # the answer comes last, and braces that open nothing take quadratic time
    for brace in re.finditer(r'{(?=\s*")|\[(?=\s*{)', reply):
        if brace.start() >= end:
            try:
                value, end = json.JSONDecoder().raw_decode(reply, brace.start())
            except (ValueError, RecursionError):
                continue
            values += [value, value.get("important")] if isinstance(value, dict) else [value]
    for value in reversed(values):
        try:
            important = parse(json.dumps({"input": input, "target": target, "important": value}))[2]
        except (ValueError, RecursionError):
            continue
        pairs = dict.fromkeys((effect, cause) for group in important for effect, causes in group.items() for cause in causes)
        edges = link(input, target, [{effect: [cause]} for effect, cause in pairs], "span")[0]
        if edges:
            return Example(input, target, edges)
    raise ValueError("no {effect: [causes]} with phrases of the text in the reply")


def finished(path):
    """The rows of an output file as {(input, target): [line, ...]}, without a last line cut by a kill; {} without a file.

    Raises ValueError for any other line that is no row, as "file:line: what, and what to do".
    """
    rows, lines = {}, Path(path).read_bytes().split(b"\n") if os.path.exists(path) else []
    for n, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig").strip()
            if text:
                rows.setdefault(parse(text)[:2], []).append(text + "\n")
        except ValueError as error:
            if n < len(lines) or not b'{"input": '.startswith(line[:10]):
                raise ValueError(f"{path}:{n}: {error}, or give another --out") from None
    return rows


def unanswered(rows, lines):
    """The Examples that have no line in what `finished` returns; a line is the answer to one of several equal rows."""
    spare, left = Counter({key: len(same) for key, same in lines.items()}), []
    for row in rows:
        spare[row.input, row.target] -= 1
        if spare[row.input, row.target] < 0:
            left.append(Example(row.input, row.target, source=row.source))
    return left


def annotate(questions, demos, assistant, out, jobs=4, time_limit=60, skip_bad=False):
    """Label the rows of a file (the paper's first step: human examples, then an assistant) and print what came of it.

    questions, demos, out: JSON Lines files. Every demo needs a usable "important"; that of a question is not looked at.
    assistant: a command that reads a prompt and prints a reply. It gets three tries of time_limit seconds a row, `jobs` rows
    at once; a row without a usable reply is written without "important". Rows already in out are kept. A row is appended
    when it is done; at the end the rows are put in the order of the questions, those of no question last.
    Raises ValueError or OSError, for wrong arguments before out is touched, and KeyboardInterrupt with the number of rows done.
    """
    try:
        command = shlex.split(assistant)
    except ValueError as error:
        raise ValueError(f"--assistant is {assistant!r}: {error}, quote it as for a shell") from None
    if not command or not shutil.which(command[0]):
        raise ValueError(f"--assistant is {assistant!r}: no such command, give a program that reads a prompt and prints a reply")
    if not 1 <= jobs <= 100 or not time_limit > 0:
        raise ValueError(f"--jobs is {jobs} and --time-limit {time_limit:g}: give 1 to 100 jobs and more than 0 seconds")
    if os.path.exists(out) and (not os.path.isfile(out) or any(os.path.samefile(out, path) for path in (questions, demos))):
        raise ValueError(f"--out is {out}: give a file of its own")
    (shown, demos_summary), (rows, summary) = read(demos, "span", skip_bad), read(questions, "span", skip_bad)
    for demo in shown:
        if not demo.edges:
            raise ValueError(f'{demo.source}: no usable "important": give {{effect: [causes]}} with phrases of the text')
    lines, prompt, stop = finished(out), INSTRUCTION + "".join(dump(shown)), threading.Event()

    def answer(row):
        for _ in range(3):
            try:
                return label(ask(command, prompt + next(dump([row])), time_limit, stop), row.input, row.target), ""
            except ValueError as error:
                why = f", such as {row.source}: {error}"
        return row, why

    def rewrite(lines):
        save(out, "".join(lines).encode())

    print(f"{demos_summary}\n{summary}")
    rewrite(line for same in lines.values() for line in same)
    todo, why, pool = unanswered(rows, lines), "", ThreadPoolExecutor(jobs)
    try:
        with open(out, "a", encoding="utf-8") as file:
            answers = as_completed([pool.submit(answer, row) for row in todo])
            for future in tqdm(answers, total=len(rows), initial=len(rows) - len(todo), disable=None):
                row, failure = future.result()
                file.write(next(dump([row])))
                file.flush()
                why = failure or why
    except KeyboardInterrupt:
        done = len(rows) - len(unanswered(rows, finished(out)))
        raise KeyboardInterrupt(f"stopped with {done} of {len(rows)} rows in {out}: the same command continues") from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    lines = finished(out)
    ordered = [lines[row.input, row.target].pop(0) for row in rows]
    rewrite(ordered + [line for same in lines.values() for line in same])
    labelled, summary = read(out)
    print(f"{summary}; {sum(not row.edges for row in labelled)} without a usable reply{why}")


def compare(labelled, truth, edges="value", skip_bad=False):
    """How well the edges of a labelled file are those of a true one, as lines of text; rows are paired by input and target.

    Precision is the share of the labelled edges that are true, recall the share of the true edges that are labelled, F1 their
    harmonic mean; all are 1 where neither file has an edge, 0 where only one has. ValueError when no row has a partner.
    """
    def scores(both, found, true):
        return (both / found, both / true, 2 * both / (found + true)) if found and true else (float(found == true),) * 3

    (rows, summary), (true_rows, true_summary) = read(labelled, edges, skip_bad), read(truth, edges, skip_bad)
    partners, counts = {}, {}  # counts: {"file:line": (edges in both, labelled edges, true edges)}
    for row in true_rows:
        partners.setdefault((row.input, row.target), []).append(set(row.edges))
    for row in rows:
        if partners.get((row.input, row.target)):
            found, true = set(row.edges), partners[row.input, row.target].pop(0)
            counts[row.source] = len(found & true), len(found), len(true)
    if not counts:
        raise ValueError(f"{labelled}: no row is in {truth} too, with its input and target: compare files of the same questions")
    n, by_row = len(counts), {row: scores(*counts[row]) for row in counts}
    both, found, true = map(sum, zip(*counts.values()))
    shown = "precision {:.3f}, recall {:.3f}, F1 {:.3f}".format
    worst = sorted((row for row in by_row if by_row[row][2] < 1), key=lambda row: by_row[row][2])[:3]
    return "\n".join([summary, true_summary,
                      f"{n} rows compared; without a partner: {len(rows) - n} labelled, {len(true_rows) - n} true",
                      f"all edges: {shown(*scores(both, found, true))} ({found} labelled, {true} true, {both} both)",
                      f"mean over rows: {shown(*(sum(column) / n for column in zip(*by_row.values())))}",
                      *(f"worst: {row}: {shown(*by_row[row])}" for row in worst)])


def main(argv=None):
    parser = argparse.ArgumentParser(prog="data.py", description="Describe a FILE, generate one with --game, label one with "
                                     "--annotate, or compare labels with --check.")
    parser.error = lambda message: parser.exit(2, f"data.py: {message}\n")  # one line, without the usage
    parser.add_argument("file", nargs="?", help="JSON Lines file to describe")
    parser.add_argument("--game", choices=GAMES, help="generate rows of this game")
    parser.add_argument("--rows", type=int, default=1600, help="rows to generate (default 1600)")
    parser.add_argument("--ood", action="store_true", help="spurious features stop copying")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated rows (default 0)")
    parser.add_argument("--annotate", metavar="FILE", help="label the rows of this file; the same command goes on")
    parser.add_argument("--demos", metavar="FILE", help="rows labelled by hand, shown to the assistant")
    parser.add_argument("--assistant", metavar="COMMAND", help="program that reads a prompt and prints a reply")
    parser.add_argument("--jobs", type=int, default=4, help="rows to ask for at once (default 4)")
    parser.add_argument("--time-limit", type=float, default=60, help="seconds for a reply, three tries a row (default 60)")
    parser.add_argument("--out", help="file to write the generated or labelled rows to")
    parser.add_argument("--check", metavar="FILE", help="compare the labels of this file ...")
    parser.add_argument("--against", metavar="FILE", help="... with the true labels of this one")
    parser.add_argument("--edges", choices=("value", "span"), default="value", help="what of a cause to look at (default value)")
    parser.add_argument("--skip-bad", action="store_true", help="skip and count bad lines instead of stopping")
    args = parser.parse_args(argv)
    uses = {"file": "edges skip_bad", "game": "rows ood seed out edges", "check": "against edges skip_bad",
            "annotate": "demos assistant jobs time_limit out skip_bad"}
    modes = [mode for mode in uses if getattr(args, mode) is not None]
    if len(modes) != 1:
        parser.error("give one of: a FILE to describe, --game to generate, --annotate to label, --check to compare")
    mode = modes[0]
    for name, value in vars(args).items():
        flag, used = "--" + name.replace("_", "-"), name in uses[mode].split()
        if value is None and used and mode != "game":
            parser.error(f"--{mode} needs {flag}: give it too")
        if value != parser.get_default(name) and not used and name != mode:
            parser.error(f"{flag} does not go with {'FILE' if mode == 'file' else '--' + mode}: leave it out")
    try:
        if mode == "annotate":
            annotate(args.annotate, args.demos, args.assistant, args.out, args.jobs, args.time_limit, args.skip_bad)
        elif mode == "check":
            print(compare(args.check, args.against, args.edges, args.skip_bad))
        else:
            if mode == "game":
                examples = generate(GAMES[args.game], args.rows, args.ood, args.seed, args.edges)
                print(f"{args.game}: {len(examples)} rows, {'ood' if args.ood else 'iid'}, seed {args.seed}")
            else:
                examples, summary = read(args.file, args.edges, args.skip_bad)
                print(summary)
            print(describe(examples, build_tokenizer(e.input + e.target for e in examples)))
        if mode == "game" and args.out:
            rows = generate(GAMES[args.game], args.rows, args.ood, args.seed, "span")
            save(args.out, "".join(dump(rows)).encode())
            print(f"wrote {args.out}")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        parser.exit(2, f"data.py: {error}{': check the path' if isinstance(error, OSError) else ''}\n")
    except KeyboardInterrupt as error:
        parser.exit(130, f"data.py: {str(error) or 'stopped'}\n")


if __name__ == "__main__":
    main()
