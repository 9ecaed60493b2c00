"""Train a small GPT without and with Causal Attention Tuning (CAT), then test both in
distribution (IID) and out of distribution (OOD).

`python train.py` plays the Spurious Token Game; `python train.py --help` lists the flags.
"""
import argparse
import hashlib
import html
import io
import json
import math
import os
import random
import re
import statistics
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from tqdm import tqdm

from cat import FORMS, average_attention, gamma_at, re_attention_loss
from data import (CAUSES, END, PATTERN, STG, OneLineParser, UserError, build_tokenizer,
                  choose_causes, collate, encode, generate, hold_out, pieces_of, read, run_main,
                  token_offsets, tokenizer_of)
from model import GPT, GPTConfig

NAMES = {"no-cat": "no CAT", "cat": "CAT"}  # the two runs
WARM_UP = 0.1  # the share of the training in which the learning rate rises
WATCHED = 100  # examples to look at during a run
EVAL_TOKENS = 4096  # in a batch of an evaluation, padding included
MARKED = 0.05  # --ask marks tokens with at least this share of the attention

# ----------------------------------------------------------------------------
# Flags

# These say where a command runs, and may differ when it is resumed; all others make its results.
PLACE_FLAGS = ("device", "threads", "out", "resume", "ask")


def parse_args(argv):
    parser = OneLineParser(description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    # data
    add("--rows", type=int, default=8000, help="examples of the game to train on")
    add("--test-rows", type=int, default=1000, help="examples of the game for each test")
    add("--train", metavar="FILE", help="train on a JSON Lines file instead of the game")
    add("--iid", metavar="FILE", help="test on a file, in distribution")
    add("--ood", metavar="FILE", help="test on a file, out of distribution")
    add("--val", type=float, help="test on this share of --train, held out, instead of on files")
    add("--causes", choices=CAUSES, default="value",
        help="what to look at: the number of each cause, its whole span, or as controls the "
             "spurious numbers or random ones")
    # training
    add("--runs", nargs="+", choices=["no-cat", "cat"], default=["no-cat", "cat"],
        help="without CAT, with CAT, or both")
    add("--seed", type=int, nargs="+", default=[1], help="one or more, of data and weights")
    add("--steps", type=int, default=1800, help="updates of the weights")
    add("--batch-size", type=int, default=16, help="examples in a step")
    add("--lr", type=float, default=6e-3,
        help="learning rate, which rises over the first tenth and then falls to 0 as a cosine")
    add("--form", choices=FORMS, default="each",
        help="form of the Re-Attention loss; only each and uniform ask for every cause")
    add("--alpha", type=float, default=100.0, help="ratio of causal to other attention to reach")
    add("--gamma", type=float, default=0.3, help="weight of the Re-Attention loss at the start")
    add("--decay", type=float, default=0.0,
        help="the weight falls to gamma * exp(-decay) over the training")
    add("--layers", choices=["last", "all"], default="last",
        help="whose attention should look at the causes: the last layer's or the mean over all")
    add("--open-path", action="store_true",
        help="let causes and answers look outside of their items in the layers below the last")
    # place
    if torch.cuda.is_available():
        device = "cuda"
    elif torch.backends.mps.is_available():
        device = "mps"
    else:
        device = "cpu"
    add("--device", default=device, help="where to train: cpu, cuda or mps")
    add("--threads", type=int, default=2, help="threads of the CPU")
    add("--out", default="out", metavar="FOLDER", help="folder for all that is written")
    add("--resume", action="store_true", help="go on where the same command stopped")
    add("--ask", nargs=2, metavar=("CHECKPOINT", "QUESTION"),
        help="have a checkpoint answer a question, and train nothing")
    args = parser.parse_args(argv)

    for name in ("rows", "test_rows", "steps", "batch_size", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"{flag(name)} is {getattr(args, name)}: give at least 1")
    if args.threads > 1024:
        parser.error(f"--threads is {args.threads}: give at most the number of cores")
    for seed in args.seed:
        if not -(2**63) <= seed < 2**63:  # what torch.manual_seed takes
            parser.error(f"--seed is {seed}: give a number of at most 18 digits")
    for name in ("lr", "alpha"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"{flag(name)} is {getattr(args, name)}: give a number over 0")
    for name in ("gamma", "decay"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"{flag(name)} is {getattr(args, name)}: give a number of at least 0")
    for name in ("runs", "seed"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            parser.error(f"{flag(name)} names one twice: {getattr(args, name)}: give each once")
    given = [name for name in ("train", "iid", "ood", "val") if getattr(args, name) is not None]
    if given not in ([], ["train", "iid", "ood"], ["train", "val"]):
        parser.error(f"only {' '.join(map(flag, given))} given: give --train --iid --ood, or "
                     "--train --val, or none of them")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", args.device):
        parser.error(f"--device is {args.device}: give cpu, cuda or mps")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError):  # how torch says that there is no such device
        parser.error(f"--device is {args.device}: this machine has {device}")
    return args


def flag(name):
    return "--" + name.replace("_", "-")


# ----------------------------------------------------------------------------
# Data

@dataclass
class Data:
    tokenizer: tiktoken.Encoding
    train: list  # of Encoded examples
    watched: dict  # split: Encoded examples to look at during a run
    tested: dict  # split: Encoded examples to test on; "redrawn" is ood with other spurious numbers
    prompt_end: str  # the blanks that most questions end with


def read_files(args):
    """{split: Examples} of the files that the flags name."""
    paths = {"train": args.train, "iid": args.iid, "ood": args.ood}
    return {split: read(path) for split, path in paths.items() if path is not None}


def load_data(args, seed, game, files):
    """The Data of one seed, from the game or from files."""
    if not files:
        n_test = WATCHED + args.test_rows
        seen = set()  # no question of training is asked in a test
        iid = generate(game, args.rows + n_test, seed=seed, seen=seen)
        ood = generate(game, n_test, ood=True, seed=seed, seen=set(seen))
        redrawn = generate(game, n_test, ood=True, seed=seed, spurious_seed=1, seen=set(seen))
        train, iid = iid[:args.rows], iid[args.rows:]
        watched = {"iid": iid[:WATCHED], "ood": ood[:WATCHED]}
        tested = {"iid": iid[WATCHED:], "ood": ood[WATCHED:], "redrawn": redrawn[WATCHED:]}
    elif args.val is not None:
        train, held_out = hold_out(files["train"], args.val, seed)
        watched = {"train": train[:WATCHED]}
        tested = {"iid": held_out}
    else:
        train = files["train"]
        watched = {"train": train[:WATCHED]}  # test files are not looked at before the end
        tested = {"iid": files["iid"], "ood": files["ood"]}

    tokenizer = build_tokenizer(example.input + example.target for example in train)
    rng = random.Random(seed)

    def encode_all(examples, causes):
        encoded = []
        for example in examples:
            encoded.append(encode(choose_causes(example, causes, rng), tokenizer))
            n, most = len(encoded[-1].idx), GPTConfig.block_size
            if n > most:
                raise UserError(f"{example.source}: {n} tokens, and the model takes {most}: "
                                "shorten the text")
        return encoded

    # The controls have wrong causes in training; where a test looks, the right ones count.
    right = "span" if args.causes == "span" else "value"
    blanks = Counter(example.input[len(example.input.rstrip()):] for example in train)
    return Data(
        tokenizer=tokenizer,
        train=encode_all(train, args.causes),
        watched={split: encode_all(examples, right) for split, examples in watched.items()},
        tested={split: encode_all(examples, right) for split, examples in tested.items()},
        prompt_end=blanks.most_common(1)[0][0],
    )


# ----------------------------------------------------------------------------
# The two losses of L = L_next + gamma * L_attn
#
# L_next = cross-entropy of all tokens + cross-entropy of the answer
# L_attn = Re-Attention loss of the last layer on the causes
#          + Re-Attention loss of the layers below it on the items, unless the path is left open

def next_token_loss(logits, batch):
    """The mean over all tokens, plus that over the answer: alone, the few tokens of an answer would
    be lost among the numbers of a question, most of which nobody can predict."""
    loss_all = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
    loss_answer = F.cross_entropy(logits[batch.answer], batch.targets[batch.answer])
    return loss_all + loss_answer


def supervised_attention(attentions, args):
    """The attention map, (B, T, T), that should look at the causes."""
    if args.layers == "last":
        return average_attention(attentions[-1:])
    return average_attention(attentions)


def attention_loss(attentions, batch, args):
    """The Re-Attention loss on the causes and, unless the path is left open, on the items.

    No mask is needed: padding has no edges, and no token looks at it, since it comes last.
    """
    attn = supervised_attention(attentions, args)
    loss = re_attention_loss(attn, batch.adjacency, args.alpha, args.form)

    # Closing the path: below the last layer, the answer's own query could read a spurious number
    # and carry it past the map that is supervised. The 8 of "Smoking: 8" could do so too, and then
    # an answer that looks at the 8 reads the spurious number all the same. So there, the tokens of
    # causes and answers look inside their own items only.
    below = attentions[:-1]
    if below and not args.open_path:
        attn = average_attention(below)
        loss = loss + re_attention_loss(attn, batch.inside, args.alpha, args.form)
    return loss


# ----------------------------------------------------------------------------
# Evaluation

@dataclass
class Answers:
    given: list  # the model's answer to each question
    right: list  # the right one
    attn: list  # (T,) attention that the first token of the answer is predicted with


def eval_batches(examples):
    """The examples in order, in groups of at most EVAL_TOKENS tokens."""
    group, longest = [], 0
    for example in examples:
        longest = max(longest, len(example.idx))
        if group and longest * (len(group) + 1) > EVAL_TOKENS:
            yield group
            group, longest = [], len(example.idx)
        group.append(example)
    yield group


@torch.no_grad()
def evaluate(model, examples, tokenizer, args):
    """The Answers of a model. Each token of an answer is predicted after the right tokens before
    it. A model that writes by itself makes its first mistake at the same token, so the same answers
    are right."""
    answers = Answers([], [], [])
    for group in eval_batches(examples):
        batch = collate(group, args.device)
        logits, attentions = model(batch.idx)
        predicted = logits.argmax(dim=-1).cpu()  # (B, T)
        attn = supervised_attention(attentions, args).cpu()  # (B, T, T)
        for b, example in enumerate(group):
            where = example.answer.nonzero().flatten()
            given = tokenizer.decode(predicted[b, where].tolist())
            right = tokenizer.decode(example.targets[where].tolist())
            answers.given.append(given.removesuffix(END))
            answers.right.append(right.removesuffix(END))
            answers.attn.append(attn[b, where[0], :len(example.idx)].clone())
    return answers


def accuracy(answers):
    n_right = 0
    for given, right in zip(answers.given, answers.right):
        if given == right:
            n_right += 1
    return n_right / len(answers.right)


def share_of_most_frequent(right):
    """The accuracy of always giving the most frequent answer."""
    _, n = Counter(right).most_common(1)[0]
    return n / len(right)


def attention_shares(answers, examples):
    """Where the attention of the answer goes, a mean over the examples whose causes are known:
    {"attn_causal": share, "attn_spurious": share, "attn_other": share}, as far as known."""
    causal, spurious = [], []
    for attn, example in zip(answers.attn, examples):
        if example.causal.any():
            causal.append(attn[example.causal].sum().item())
            spurious.append(attn[example.spurious].sum().item())
    if not causal:
        return {}
    shares = {"attn_causal": statistics.mean(causal)}
    if any(example.spurious.any() for example in examples):
        shares["attn_spurious"] = statistics.mean(spurious)
    shares["attn_other"] = 1 - sum(shares.values())
    return shares


def test(model, splits, tokenizer, args):
    """The scores of a model on {split: examples}, and its Answers to each split."""
    answers, scores = {}, {}
    for split, examples in splits.items():
        answers[split] = evaluate(model, examples, tokenizer, args)
        if split != "redrawn":
            scores[f"acc_{split}"] = accuracy(answers[split])
    shown = "ood" if "ood" in splits else list(splits)[-1]
    scores.update(attention_shares(answers[shown], splits[shown]))
    if "redrawn" in splits:
        pairs = zip(answers["ood"].given, answers["redrawn"].given)
        scores["changed"] = statistics.mean(before != after for before, after in pairs)
    return scores, answers


# ----------------------------------------------------------------------------
# Checkpoints: all that --ask needs, and what --resume can't make again from the flags and the
# training data; nothing in them runs code when loaded

def checkpoint_path(args, run, seed):
    return Path(args.out, f"{run}-{seed}.pt")


def save_checkpoint(path, checkpoint):
    """Writes a checkpoint whole or not at all: a full disk leaves the one before."""
    content = io.BytesIO()
    torch.save(checkpoint, content)
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(content.getvalue())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path):
    """The dict that `train` saved, on the CPU."""
    with open(path, "rb") as file:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # torch.load has many ways to refuse a file
            checkpoint = None
    if not isinstance(checkpoint, dict) or "fingerprint" not in checkpoint:
        raise UserError(f"{path}: no checkpoint of train.py: name another file, or another --out")
    return checkpoint


def begun_runs(args, fingerprint):
    """{(run, seed): step} of the checkpoints in --out, which must be of this very command."""
    begun = {}
    for path in sorted(Path(args.out).glob("*.pt")):
        if not re.fullmatch(r"(no-)?cat--?\d+\.pt", path.name):
            continue
        checkpoint = load_checkpoint(path)
        other = [flag(name) for name, value in result_flags(args).items()
                 if checkpoint["flags"].get(name) != value]
        if not other and checkpoint["fingerprint"] != fingerprint:
            other = ["training data"]
        if other:
            raise UserError(f"{path} is of a command with other {', '.join(other)}: "
                            "give another --out")
        begun[checkpoint["run"], checkpoint["seed"]] = checkpoint["step"]
    return begun


def result_flags(args):
    return {name: value for name, value in vars(args).items() if name not in PLACE_FLAGS}


def fingerprint_of(game, files):
    """Differs when the examples to train on differ."""
    content = [game] if not files else [replace(e, source="") for e in files["train"]]
    return hashlib.sha256(repr(content).encode()).hexdigest()


# ----------------------------------------------------------------------------
# Training

def train(args, run, seed, data, fingerprint, metrics_path):
    """One run, "no-cat" or "cat", from its checkpoint if there is one. Returns the model."""
    # Both runs start with the same weights and see the same examples in the same order.
    torch.manual_seed(seed)
    config = GPTConfig(vocab_size=data.tokenizer.n_vocab)
    model = GPT(config).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    n, B = len(data.train), args.batch_size
    n_epochs = math.ceil(args.steps * B / n)
    order = torch.cat([torch.randperm(n) for _ in range(n_epochs)]).tolist()  # one epoch by one

    first_step = 0
    path = checkpoint_path(args, run, seed)
    if path.exists():
        checkpoint = load_checkpoint(path)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first_step = checkpoint["step"]

    log_every = math.ceil(args.steps / 10)
    start_time = time.time()
    progress = tqdm(initial=first_step, total=args.steps, desc=f"{NAMES[run]:6}", ascii=True,
                    disable=not sys.stderr.isatty(),
                    bar_format="{l_bar}{bar:8}| {n_fmt}/{total_fmt} "
                               "[{elapsed}<{remaining}, {rate_fmt}{postfix}]")
    for step in range(first_step, args.steps):
        # 1. The learning rate and gamma follow the share of the training that is done.
        done = step / args.steps
        rising = (step + 1) / (WARM_UP * args.steps)
        falling = (1 + math.cos(math.pi * done)) / 2  # a cosine, from 1 to 0
        lr = args.lr * min(rising, falling)
        gamma = gamma_at(done, args.gamma, args.decay)
        optimizer.param_groups[0]["lr"] = lr

        # 2. The loss on the next examples.
        chosen = order[step * B:(step + 1) * B]
        batch = collate([data.train[i] for i in chosen], args.device)
        logits, attentions = model(batch.idx)
        loss_next = next_token_loss(logits, batch)
        loss = loss_next
        if run == "cat":
            loss_attn = attention_loss(attentions, batch, args)
            loss = loss_next + gamma * loss_attn

        # 3. An update of the weights.
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.update()

        # 4. At each tenth of the run: look, log, save.
        if (step + 1) % log_every == 0 or step + 1 == args.steps:
            if not math.isfinite(loss.item()):
                raise UserError(f"the loss is {loss.item()} at step {step + 1}: "
                                "give a lower --lr or --gamma")
            if run == "no-cat":
                with torch.no_grad():  # to compare, not to train on
                    loss_attn = attention_loss(attentions, batch, args)
            scores, _ = test(model, data.watched, data.tokenizer, args)
            line = {
                "run": run, "seed": seed, "step": step + 1, "steps": args.steps,
                "loss": loss.item(), "loss_next": loss_next.item(), "loss_attn": loss_attn.item(),
                "lr": lr, "gamma": gamma if run == "cat" else 0.0,
                **scores, "seconds": time.time() - start_time,
            }
            append_line(metrics_path, line)
            save_checkpoint(path, {
                "run": run, "seed": seed, "step": step + 1,
                "flags": result_flags(args), "fingerprint": fingerprint,
                "config": asdict(config), "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "pieces": pieces_of(data.tokenizer), "pattern": PATTERN,
                "prompt_end": data.prompt_end,
            })
            report(progress, run, line)
    progress.close()
    return model


def report(progress, run, line):
    """Says in the bar of a run, or in a line where there is no terminal, how it goes."""
    words = [f"loss {line['loss']:.2f}"]
    for split in ("train", "iid", "ood"):
        if f"acc_{split}" in line:
            words.append(f"{split} {line[f'acc_{split}']:.2f}")
    if progress.disable:
        print(f"{NAMES[run]:6} {line['step']:5}/{line['steps']}: {', '.join(words)}", flush=True)
    else:
        progress.set_postfix_str(f"{words[0]}, {words[-1]}")  # all that fits 80 columns


def append_line(path, line):
    """Adds a line to metrics.jsonl, where it can be read at once."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_metrics(path):
    """The lines of metrics.jsonl; one that was cut off in the middle is left out."""
    lines = []
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return lines


# ----------------------------------------------------------------------------
# The table

def mean_and_spread(values):
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def print_table(results):
    """Prints one line a run, over its seeds; results are the scores of each run and seed."""
    several = any(result["seed"] != results[0]["seed"] for result in results)
    titles, rows = [""], []
    for run in NAMES:
        of_run = [result for result in results if result["run"] == run]
        if not of_run:
            continue
        titles, row = [""], [NAMES[run]]
        for split in ("iid", "ood"):
            if f"acc_{split}" in of_run[0]:
                titles.append(split.upper())
                row.append(mean_and_spread([result[f"acc_{split}"] for result in of_run]))
        if several and "acc_ood" in of_run[0]:
            titles.append("worst")
            row.append(f"{min(result['acc_ood'] for result in of_run):.3f}")
        for name in ("changed", "attn_causal", "attn_spurious", "attn_other"):
            if name in of_run[0]:
                titles.append(name.removeprefix("attn_"))
                row.append(f"{statistics.mean(result[name] for result in of_run):.1%}")
        rows.append(row)

    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    print()
    for row in [titles] + rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        print("  ".join([row[0].ljust(widths[0])] + cells).rstrip())
    for split in ("iid", "ood"):
        if f"most_{split}" in results[0]:
            most = statistics.mean(result[f"most_{split}"] for result in results)
            print(f"{split.upper()}: share of right answers; {most:.3f} for the most frequent one")
    if "worst" in titles:
        print("worst: OOD of the worst seed; before it, mean ± standard deviation over seeds")
    if "changed" in titles:
        print("changed: OOD answers that change when only the spurious numbers do")
    if "causal" in titles:
        print("causal, spurious, other: where the attention of the answer goes")


# ----------------------------------------------------------------------------
# Questions to a checkpoint

def readable_pieces(tokenizer, tokens):
    """The text of tokens in pieces, [(text, positions of its tokens)]: a token each, or all the
    bytes of one character."""
    text = tokenizer.decode(tokens)
    positions = {}  # span: the tokens that have it
    for t, span in enumerate(token_offsets(tokenizer, tokens)):
        positions.setdefault(span, []).append(t)
    return [(text[start:end], where) for (start, end), where in positions.items()]


@torch.no_grad()
def ask(path, question, device):
    """Prints a question with the attention that its answer pays, and the answer."""
    checkpoint = load_checkpoint(path)
    tokenizer = tokenizer_of(checkpoint["pieces"], checkpoint["pattern"])
    model = GPT(GPTConfig(**checkpoint["config"])).to(device)
    model.load_state_dict(checkpoint["model"])
    if not question.strip():
        raise UserError("--ask: the question is empty: give a text as in training")
    tokens = tokenizer.encode_ordinary(question.rstrip() + checkpoint["prompt_end"])
    if len(tokens) >= model.config.block_size:
        raise UserError(f"--ask: the question has {len(tokens)} tokens, and the model takes "
                        f"{model.config.block_size}: shorten it")

    idx = torch.tensor([tokens], device=device)  # (1, T)
    _, attentions = model(idx)
    attn = supervised_attention(attentions, argparse.Namespace(**checkpoint["flags"]))[0, -1]
    for text, positions in readable_pieces(tokenizer, tokens):
        share = attn[positions].sum().item()
        print(text, end="")
        if share >= MARKED:
            print(f"[{share:.0%}]", end="")
    print()
    answer = model.generate(idx, 64, stop=tokenizer.encode_single_token(END))
    print(tokenizer.decode(answer))


# ----------------------------------------------------------------------------
# The two pictures

ORANGE, BLUE = "#e69f00", "#0072b2"  # told apart by colour-blind people too
COLOURS = {"no-cat": ORANGE, "cat": BLUE}
FULL_SHADE = 0.5  # the share of attention from which on a token is shaded in full


def svg(width, height, font_size, parts):
    """An SVG picture on white, so that it can be read on a dark page too."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'font-family="monospace" font-size="{font_size}">\n'
            f'<rect width="{width}" height="{height}" fill="#fff"/>\n'
            + "\n".join(parts) + "\n</svg>\n")


def svg_text(x, y, text, style=""):
    printable = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufffe\uffff]", "\ufffd", text)  # not in XML
    return f'<text x="{x}" y="{y}" xml:space="preserve" {style}>{html.escape(printable)}</text>'


def text_width(text):
    """The width of a text in characters: those of East Asia are two wide, marks have none."""
    width = 0
    for char in text:
        if unicodedata.east_asian_width(char) in "WF":
            width += 2
        elif not unicodedata.combining(char):
            width += 1
    return width


def attention_svg(runs, examples, tokenizer):
    """A question, once a run, shaded by what its answer looks at: the first that the runs answer
    differently, or else the first. runs is {run: Answers to the examples}."""
    chosen = 0
    for n in reversed(range(len(examples))):
        if len({answers.given[n] for answers in runs.values()}) > 1:
            chosen = n
    example = examples[chosen]
    n_question = example.answer.nonzero()[0].item() + 1
    tokens = example.idx[:n_question].tolist()

    char, line, margin, width = 8, 24, 16, 800
    parts, y = [], 30
    for run, answers in runs.items():
        given, right = answers.given[chosen], answers.right[chosen]
        verdict = "right" if given == right else f"wrong: it is {right}"
        parts.append(svg_text(margin, y, f"{NAMES[run]} answers {given}, which is {verdict}",
                              f'fill="{COLOURS[run]}" font-weight="bold"'))
        x, y = margin, y + line
        for text, positions in readable_pieces(tokenizer, tokens):
            share = answers.attn[chosen][positions].sum().item()
            if x + char * text_width(text) > width - margin:
                x, y = margin, y + line
                text = text.lstrip()
            piece_width = char * text_width(text)
            style = ""
            if example.causal[positions].any():
                style = 'font-weight="bold"'
            elif example.spurious[positions].any():
                style = 'font-style="italic" text-decoration="underline"'
            parts.append(f'<rect x="{x}" y="{y - 15}" width="{piece_width}" height="20" '
                         f'fill="{ORANGE}" fill-opacity="{min(share / FULL_SHADE, 1):.2f}"/>')
            parts.append(svg_text(x, y, text, style))
            x += piece_width
        y += 2 * line

    # What the shade and the letters mean.
    x = margin
    parts.append(svg_text(x, y, "attention of the answer:"))
    x += 25 * char
    for fifth in range(6):
        share = FULL_SHADE * fifth / 5
        parts.append(f'<rect x="{x}" y="{y - 15}" width="{5 * char}" height="20" '
                     f'fill="{ORANGE}" fill-opacity="{fifth / 5}"/>')
        parts.append(svg_text(x + char, y, f"{share:.0%}"))
        x += 5 * char
    parts.append(svg_text(x, y, "and more"))
    parts.append(svg_text(x + 12 * char, y, "causal", 'font-weight="bold"'))
    parts.append(svg_text(x + 20 * char, y, "spurious",
                          'font-style="italic" text-decoration="underline"'))
    return svg(width, y + line, 13, parts)


def curves_svg(metrics):
    """Accuracy over steps, the mean over seeds: a line for each run and split."""
    left, top, right, bottom = 70, 20, 560, 320
    n_steps = metrics[0]["steps"]

    def place(step, value):
        x = left + (right - left) * step / n_steps
        y = bottom - (bottom - top) * value
        return f"{x:.1f},{y:.1f}"

    parts = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - (bottom - top) * value
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y}" y2="{y}" stroke="#ccc"/>')
        parts.append(svg_text(left - 8, y + 6, f"{value:g}", 'text-anchor="end"'))
    for quarter in (0, 1, 2, 3, 4):
        x = left + (right - left) * quarter / 4
        parts.append(svg_text(x, bottom + 24, f"{n_steps * quarter // 4}", 'text-anchor="middle"'))
    parts.append(svg_text((left + right) / 2, bottom + 48, "step", 'text-anchor="middle"'))
    parts.append(svg_text(20, (top + bottom) / 2, "accuracy", 'text-anchor="middle" '
                          f'transform="rotate(-90 20 {(top + bottom) / 2})"'))

    legend_y = bottom + 80
    for run in NAMES:
        for split in ("train", "iid", "ood"):
            values = {}  # step: accuracies of the seeds
            for line in metrics:
                if line["run"] == run and f"acc_{split}" in line:
                    values.setdefault(line["step"], []).append(line[f"acc_{split}"])
            if not values:
                continue
            style = f'fill="none" stroke="{COLOURS[run]}" stroke-width="3"'
            if split != "ood":
                style += ' stroke-dasharray="8 5"'
            points = " ".join(place(step, statistics.mean(values[step])) for step in sorted(values))
            parts.append(f'<polyline points="{points}" {style}/>')
            x = left if run == "no-cat" else left + 260
            name = {"train": "training examples", "iid": "IID", "ood": "OOD"}[split]
            y = legend_y if split != "ood" else legend_y + 26
            parts.append(f'<polyline points="{x},{y - 6} {x + 50},{y - 6}" {style}/>')
            parts.append(svg_text(x + 60, y, f"{NAMES[run]}, {name}"))
    return svg(600, legend_y + 46, 18, parts)


# ----------------------------------------------------------------------------
# All of it

def main(argv, game=STG):
    """Trains and tests the runs of each seed on the game or on files, or asks a checkpoint."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.ask:
        path, question = args.ask
        return ask(path, question, args.device)

    files = read_files(args)
    if files and "cat" in args.runs and not any(example.edges for example in files["train"]):
        raise UserError(f'{args.train}: no example has causes: add "important", or give '
                        "--runs no-cat")
    fingerprint = fingerprint_of(game, files)
    begun = begun_runs(args, fingerprint)
    data = load_data(args, args.seed[0], game, files)
    model = GPT(GPTConfig(vocab_size=data.tokenizer.n_vocab))
    n_parameters = sum(weight.numel() for weight in model.parameters())
    print(f"on {args.device}: {n_parameters:,} parameters, {len(data.train):,} examples to train "
          f"on, {len(data.tested['iid']):,} in each test", flush=True)

    # All that a user gives has been looked at: only now files change. With --resume the runs go
    # on; without it they start anew.
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    metrics_path = out / "metrics.jsonl"
    kept = []
    if args.resume:
        for line in read_metrics(metrics_path):
            if line["step"] <= begun.get((line["run"], line["seed"]), 0):
                kept.append(line)
    else:
        for run, seed in begun:
            checkpoint_path(args, run, seed).unlink()
    metrics_path.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")

    results, written = [], []
    for seed in args.seed:
        if seed != args.seed[0]:
            data = load_data(args, seed, game, files)
        answers = {}
        for run in args.runs:
            model = train(args, run, seed, data, fingerprint, metrics_path)
            scores, answers[run] = test(model, data.tested, data.tokenizer, args)
            for split in ("iid", "ood"):
                if split in answers[run]:
                    scores[f"most_{split}"] = share_of_most_frequent(answers[run][split].right)
            results.append({"run": run, "seed": seed, **scores})
            written.append(checkpoint_path(args, run, seed).name)

    split = "ood" if "ood" in data.tested else "iid"
    shown = {run: answers[run][split] for run in args.runs}
    (out / "attention.svg").write_text(
        attention_svg(shown, data.tested[split], data.tokenizer), "utf-8")
    (out / "curves.svg").write_text(curves_svg(read_metrics(metrics_path)), "utf-8")
    print_table(results)
    written += ["metrics.jsonl", "attention.svg", "curves.svg"]
    print(f"wrote {', '.join(written)} in {out}{os.sep}")


if __name__ == "__main__":
    run_main(main, on_interrupt="interrupted: the same command with --resume goes on")
