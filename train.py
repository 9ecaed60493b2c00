"""Train the same small GPT without and with Causal Attention Tuning (CAT), and print how both do in and out of distribution."""
import argparse
import contextlib
import ctypes
import dataclasses
import functools
import html
import io
import json
import math
import os
import random
import re
import signal
import statistics
import sys
import time
import zlib
from collections import Counter

import tiktoken
import torch
import torch.nn.functional as F
from tqdm import tqdm

from cat import FORMS, attention_ratio, average_attention, gamma_at, re_attention_loss
from data import (END, GAMES, ROLES, adjacency_of, build_tokenizer, encode, generate, read, reorder, save, shuffle_numbers,
                  tokenizer_from)
from model import GPT, GPTConfig

TEST_ROWS = 1000  # in each of the generated test sets and the validation set
STEPS = 3000  # of a run, when --epochs is not given
SAVE_EVERY = 200  # steps between checkpoints
PAIRS = 300  # of steps that --bench times


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite `kind` from low (or above it) to high."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high or value == math.inf:
            what = "a whole number" if kind is int else "a number"
            limit = f"above {low}" if above else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"{text!r} is out of range: give {what} {limit}"
                                             + (f" and at most {high}" if high < math.inf else ""))
        return value
    return convert


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__,
                                     formatter_class=lambda prog: argparse.HelpFormatter(prog, width=150, max_help_position=32))
    parser.error = lambda message: parser.exit(2, f"train.py: {message}\n")  # one line, without the usage
    positive, at_least_0 = number(int, 1, 10 ** 9), number(float, 0)

    def add(flag, help, **options):
        if "choices" in options:
            help += ": " + ", ".join(options["choices"])
            options["metavar"] = flag[2:].upper()
        if options.get("default") is not None:
            help += f" (default {options['default']})"
        parser.add_argument(flag, help=help, **options)

    runs = parser.add_mutually_exclusive_group()
    runs.add_argument("--cat", help="train only the run with CAT", dest="runs", action="store_const", const=["CAT"])
    runs.add_argument("--no-cat", help="train only the run without CAT", dest="runs", action="store_const", const=["no CAT"])
    runs.add_argument("--both", help="train both, without CAT first (default)", dest="runs", action="store_const",
                      const=["no CAT", "CAT"])
    parser.set_defaults(runs=["no CAT", "CAT"])
    add("--game", "Spurious Token Game to generate", choices=GAMES, default="STG")
    add("--rows", "training rows to generate", type=positive, default=8000)
    add("--train", "train on this JSON Lines file instead of a game; needs --iid and --ood, or --val", metavar="FILE")
    add("--iid", "test file from the same distribution as --train", metavar="FILE")
    add("--ood", "test file in which the spurious correlations are broken", metavar="FILE")
    add("--val", "test on this share of --train, held out: as it is, and as ood with its other numbers shuffled", metavar="SHARE",
        type=number(float, 0, 0.9, above=True))
    add("--orders", 'train on each row in this many orders of its "Name: number" items, its own and random ones',
        type=number(int, 1, 1000), default=1)
    add("--skip-bad", "skip and count bad lines of these files instead of stopping", action="store_true")
    add("--edges", "what of a cause is causal, its number (8) or the whole span (Smoking: 8)", choices=("value", "span"),
        default="value")
    add("--tokenizer", "words has a token per number, digits one per digit, gpt2 is a download",
        choices=("words", "digits", "gpt2"), default="words")
    add("--epochs", f"passes over the training rows (default: as many as make {STEPS} steps)", type=positive)
    add("--batch-size", "rows in a step", type=positive, default=16)
    add("--lr", "highest learning rate of AdamW: warm-up, then cosine to 0", type=number(float, 0, above=True), default=4e-3)
    add("--weight-decay", "of AdamW, on matrices only", type=at_least_0, default=0.1)
    add("--loss", "tokens with next-token loss", choices=("all", "answer"), default="all")
    add("--form", "form of the Re-Attention loss, hinge is the paper's", choices=FORMS, default="log")
    add("--alpha", "ratio of causal to other attention to reach", type=number(float, 0, above=True), default=3000.0)
    add("--gamma", "weight of the Re-Attention loss at the start", type=at_least_0, default=0.1)
    add("--decay", "gamma falls by exp(-decay) each epoch", type=at_least_0, default=0.1)
    add("--layers", "layers whose attention is supervised: last, all, or numbers from 0 such as 0,1", default="last")
    add("--n-layer", "layers of the model", type=number(int, 1, 64), default=2)
    add("--n-head", "attention heads in a layer", type=number(int, 1, 64), default=4)
    add("--n-embd", "width of the model", type=number(int, 1, 4096), default=64)
    add("--init-std", "standard deviation of all weight matrices at the start, 0.02 as in GPT-2, 0 takes 1 / sqrt(fan_in)",
        type=at_least_0, default=0.0)
    add("--block-size", "longest row, in tokens", type=number(int, 1, 8192), default=256)
    add("--seed", "of data, weights and order; several give mean and spread", type=number(int, 0, 2 ** 63 - 1), nargs="+",
        default=[1])
    add("--device", "auto is the first of cuda, mps, cpu", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--threads", "CPU threads (default: torch's choice)", type=number(int, 1, 1024))
    add("--out", "folder for metrics.jsonl and checkpoints", default="out")
    add("--resume", "go on with the runs in --out: give the flags they were begun with", action="store_true")
    add("--eval", "print the row of a checkpoint again, and train nothing", metavar="CHECKPOINT")
    add("--ask", "answer a question with the --eval checkpoint, and show where it looks", metavar="TEXT")
    add("--bench", "time training steps without and with CAT, and train nothing", action="store_true")
    args = parser.parse_args(argv)
    names = [str(layer) for layer in range(args.n_layer)]
    layers = {"last": names[-1:], "all": names}.get(args.layers, args.layers.split(","))
    if not set(layers) <= set(names):
        parser.error(f"--layers is {args.layers[:40]!r}: give last, all, or numbers from 0 to {names[-1]} such as 0,1")
    args.supervised = [int(layer) for layer in layers]
    tests = [args.iid, args.ood, args.val]
    if args.train and tests.count(None) != (2 if args.val else 1) or not args.train and any(tests):
        parser.error("--train needs --iid and --ood, or --val: give these together, or none of them to generate a game")
    if (args.resume or args.bench) and args.eval or args.resume and args.bench:
        parser.error("--resume, --eval and --bench are three different jobs: give one of them")
    if args.ask is not None and not args.eval:
        parser.error("--ask needs a checkpoint: give --eval out/cat-1.pt too")
    try:
        GPTConfig(1, args.block_size, args.n_layer, args.n_head, args.n_embd, args.init_std)
    except ValueError as error:
        parser.error(str(error))
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if args.device == "auto":
        args.device = next(name for name, usable in available.items() if usable)
    if not available[args.device]:
        parser.error(f"--device is {args.device}, which this torch does not find: use --device cpu")
    return args


@functools.cache
def read_once(path, edges, skip_bad):
    """The examples of a file, whose summary is printed; further seeds neither read nor print it again."""
    examples, summary = read(path, edges, skip_bad)
    print(summary)
    return examples


def load_examples(args, seed):
    """{"train", "val", "iid", "ood"}: lists of Example, generated or read; a file has no val."""
    splits, rng = load_splits(args, seed), random.Random(seed)
    more = [reorder(example, rng) for _ in range(args.orders - 1) for example in splits["train"]]
    return {**splits, "train": splits["train"] + more}


def load_splits(args, seed):
    """`load_examples` with every training row once. ValueError when --val leaves no training row, or no labelled test row."""
    if args.train:
        names = ("train",) if args.val else ("train", "iid", "ood")
        splits = {name: read_once(getattr(args, name), args.edges, args.skip_bad) for name in names}
        if args.val:
            rows = random.Random(seed).sample(splits["train"], len(splits["train"]))
            held = max(1, round(args.val * len(rows)))
            labelled = [row for row in rows[:held] if row.edges]  # of others nobody knows which numbers may be shuffled
            if held == len(rows) or not labelled:
                raise ValueError(f"{args.train}: too few labelled rows for --val {args.val}: add some, or give --iid and --ood")
            splits = {"train": rows[held:], "iid": rows[:held], "ood": shuffle_numbers(labelled, seed)}
        return splits
    game = GAMES[args.game]
    rows = generate(game, args.rows + 2 * TEST_ROWS, False, seed, args.edges)
    return {"train": rows[:args.rows], "val": rows[args.rows:-TEST_ROWS], "iid": rows[-TEST_ROWS:],
            "ood": generate(game, TEST_ROWS, True, seed, args.edges, exclude=rows)}


def load_tokenizer(args, examples):
    """The tokenizer that --tokenizer names, built from the training examples where it is built at all."""
    if args.tokenizer == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever the download raises
            raise ValueError(f"--tokenizer gpt2 downloads its vocabulary, which failed ({type(error).__name__}): "
                             "connect, or use --tokenizer words") from None
    return build_tokenizer((e.input + e.target for e in examples), digits=1 if args.tokenizer == "digits" else 3)


@torch.no_grad()
def evaluate(model, data, args, limit=None):
    """How a model does on the first `limit` rows of a Dataset, N of them. Returns a dict:

    accuracy  share of rows whose whole greedy answer is right
    answers   N pairs of the tokens predicted for the answer, each given the right ones before it, and the right ones
    looks     (N, T), attention that the query predicting the answer pays each key, in the supervised layers
    shares    the same summed by ROLES, mean over rows, in the supervised and in all layers; None when no role is known
    ratio     mean causal over mean other attention of the supervised rows; None when there are none or it is infinite
    """
    hits, shares, causal, other, answers, looks = [], [], [], [], [], []
    N, T = data.idx.shape
    for rows in torch.arange(N, device=data.idx.device)[:limit].split(max(1, 2 ** 21 // T ** 2)):  # about 2M numbers a map
        logits, attentions = model(data.idx[rows])
        # every answer token right given the right ones before it: what greedy decoding of the answer would give
        answer, predicted = data.answer[rows], logits.argmax(dim=-1)
        hits.append(((predicted == data.targets[rows]) | ~answer).all(dim=1))
        first = answer.int().argmax(dim=1)  # (B,) the query that predicts the answer's first token
        supervised = average_attention([attentions[layer] for layer in args.supervised])  # (B, T, T)
        role = F.one_hot(data.role[rows].long(), len(ROLES)).float()  # (B, T, 4)
        b = torch.arange(len(rows), device=rows.device)
        answers += [(guess[keep].tolist(), right[keep].tolist())
                    for guess, right, keep in zip(predicted, data.targets[rows], answer)]
        looks.append(supervised[b, first])  # (B, T)
        shares.append(torch.stack([torch.einsum("bt,btr->br", attn[b, first], role)  # (B, 4) each
                                   for attn in (supervised, average_attention(attentions))], dim=1))
        row_causal, row_other, _ = attention_ratio(supervised, adjacency_of(data, rows))
        causal.append(row_causal)
        other.append(row_other)
    shares = torch.cat(shares).mean(dim=0).tolist()  # (2, 4)
    ratio = (torch.cat(causal).mean() / torch.cat(other).mean()).item()
    return {"accuracy": torch.cat(hits).float().mean().item(), "shares": shares if data.role.any() else None,
            "ratio": ratio if math.isfinite(ratio) else None, "answers": answers, "looks": torch.cat(looks).cpu()}


def losses(model, data, rows, args, cat):
    """L_next and L_attn of some rows of a Dataset; L_attn is 0 without CAT."""
    logits, attentions = model(data.idx[rows])
    targets = data.targets[rows]  # (B, T)
    if args.loss == "answer":
        targets = targets.masked_fill(~data.answer[rows], -100)
    l_next = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    if not cat:
        return l_next, torch.zeros(())
    attn = average_attention([attentions[layer] for layer in args.supervised])  # (B, T, T)
    return l_next, re_attention_loss(attn, adjacency_of(data, rows), args.alpha, args.form)


def make_model(args, vocab_size, seed):
    """The model and its optimiser; the same seed gives the same weights with and without CAT."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size, args.block_size, args.n_layer, args.n_head, args.n_embd, args.init_std)).to(args.device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    return model, torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay},
                                     {"params": others, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.99))


def step(model, optimizer, data, rows, args, gamma, lr, cat):
    """One update of the weights on L = L_next + gamma * L_attn. Returns L_next, L_attn and L as floats; when L is not finite,
    the weights stay as they were."""
    l_next, l_attn = losses(model, data, rows, args, cat)
    loss = l_next + gamma * l_attn
    if math.isfinite(loss.item()):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return l_next.item(), l_attn.item(), loss.item()


@contextlib.contextmanager
def first_ctrl_c():
    """Yields a list that the first Ctrl-C fills instead of stopping; a second one stops at once."""
    pressed = []

    def press(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, default)

    default = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, default)


def train(args, seed, run, data, tokenizer, lines):
    """One run, "CAT" or "no CAT", or what is left of it with --resume: adds a line an epoch to `lines` and writes them all to
    metrics.jsonl; writes a checkpoint every SAVE_EVERY steps, at the end and at Ctrl-C. Returns its result row.
    ValueError when the loss is not finite, or when the checkpoint to go on from was made with other flags or data."""
    path = os.path.join(args.out, f"{run.lower().replace(' ', '-')}-{seed}.pt")
    model, optimizer = make_model(args, tokenizer.n_vocab, seed)
    n = len(data["train"].idx)
    steps_per_epoch = math.ceil(n / args.batch_size)
    epochs = args.epochs or max(1, round(STEPS / steps_per_epoch))
    steps = epochs * steps_per_epoch
    pieces = [tokenizer.decode_single_token_bytes(i).decode("latin-1") for i in range(tokenizer.n_vocab - 1)]
    checkpoint = {"config": dataclasses.asdict(model.config), "tokenizer": pieces, "args": vars(args), "run": run, "seed": seed,
                  "data": zlib.crc32(data["train"].edges.cpu().numpy(), zlib.crc32(data["train"].idx.cpu().numpy())), "lines": []}
    done, loss, attn_loss, last = 0, 0.0, 0.0, []
    if args.resume and os.path.exists(path):
        checkpoint = same_run(path, checkpoint)
        model.load_state_dict(checkpoint["model"])
        done, loss, attn_loss, last, rng, optimizer_state = checkpoint["progress"]
        optimizer.load_state_dict(optimizer_state)
        torch.set_rng_state(rng)
        lines += checkpoint["lines"]
    elif args.resume:
        print(f"{path}: nothing to resume, starting at step 0")
    log = os.path.join(args.out, "metrics.jsonl")
    save(log, "".join(lines).encode())
    with first_ctrl_c() as interrupted, tqdm(total=steps, initial=done, desc=f"seed {seed}, {run:>6}", disable=None) as bar:
        while done < steps:
            epoch = done // steps_per_epoch
            gamma, rng = gamma_at(epoch, args.gamma, args.decay), torch.get_rng_state()
            for rows in torch.randperm(n).split(args.batch_size)[done % steps_per_epoch:]:
                warm_up, cosine = (done + 1) / max(1, steps // 20), 0.5 * (1 + math.cos(math.pi * done / steps))
                l_next, l_attn, total = step(model, optimizer, data["train"], rows.to(args.device), args, gamma,
                                             args.lr * min(warm_up, cosine), run == "CAT")
                if not math.isfinite(total):
                    raise ValueError(f"loss is {total} at step {done} ({run}), last finite {', '.join(last) or 'none'}: "
                                     f"lower --lr {args.lr}" + (f" or --gamma {args.gamma}" if run == "CAT" else ""))
                last = last[-2:] + [f"{total:.4g}"]
                loss += l_next * len(rows) / n
                attn_loss += l_attn * len(rows) / n
                done += 1
                bar.update()
                if done % steps_per_epoch == 0:
                    # the ood rows of a file are looked at once, after training
                    accuracy = {name: evaluate(model, data[name], args)["accuracy"] for name in data
                                if name in ("val", "iid") or name == "ood" and not args.ood}
                    ratio = evaluate(model, data["train"], args, limit=256)["ratio"]
                    line = {"run": run, "seed": seed, "epoch": epoch + 1, "threads": torch.get_num_threads(), "loss": loss,
                            "attn_loss": attn_loss, "ratio": ratio, **accuracy}
                    checkpoint["lines"].append(json.dumps(line) + "\n")
                    lines.append(checkpoint["lines"][-1])
                    save(log, "".join(lines).encode())
                    bar.set_postfix_str(f"loss {loss:.3f}, attention loss {attn_loss:.3f}, ratio {ratio or 0:.3g}")
                    rng, loss, attn_loss = torch.get_rng_state(), 0.0, 0.0
                if interrupted or done % SAVE_EVERY == 0 or done == steps:
                    file, progress = io.BytesIO(), [done, loss, attn_loss, last, rng, optimizer.state_dict()]
                    torch.save({**checkpoint, "model": model.state_dict(), "progress": progress}, file)
                    save(path, file.getvalue())
                if interrupted:
                    raise KeyboardInterrupt(f" at step {done} of {steps} ({run}, seed {seed}): "
                                            "the same command with --resume goes on")
    return {**result_row(model, tokenizer, data, args, seed, run), "lines": [json.loads(line) for line in checkpoint["lines"]]}


def same_run(path, new):
    """The checkpoint at path, when it is of the same run as `new`, the start of one: ValueError names what differs."""
    *_, old = load_checkpoint(path, "cpu")
    for name, value in new["args"].items():
        if name not in ("seed", "runs", "out", "device", "resume") and old["args"].get(name) != value:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, but {path} was begun with {old['args'].get(name)}: "
                             "give the same flags to resume, or leave --resume out to start again")
    if (old["data"], old["tokenizer"]) != (new["data"], new["tokenizer"]):
        raise ValueError(f"{path} was begun with other training rows: bring them back, or leave --resume out to start again")
    return old


def load_checkpoint(path, device):
    """(model, tokenizer, args, checkpoint) of a file that `train` wrote. ValueError when the file is not one."""
    with open(path, "rb") as file:
        try:
            checkpoint = torch.load(file, map_location=device, weights_only=True)  # tensors and plain values, never code
            pieces = [piece.encode("latin-1") for piece in checkpoint["tokenizer"]]
            args = argparse.Namespace(**{**vars(parse_args([])), **checkpoint["args"], "device": device})
            model = GPT(GPTConfig(**checkpoint["config"])).to(device)
            model.load_state_dict(checkpoint["model"])
            tokenizer = tokenizer_from(pieces, 1 if args.tokenizer == "digits" else 3)
            checkpoint["run"], checkpoint["seed"], checkpoint["progress"], checkpoint["lines"], checkpoint["data"]
        except Exception as error:  # a foreign or cut file fails in many ways, all of them the same to the reader
            raise ValueError(f"{path}: not a checkpoint of train.py ({type(error).__name__}): give one of out/*.pt") from None
    return model, load_tokenizer(args, ()) if args.tokenizer == "gpt2" else tokenizer, args, checkpoint


def mean_error(answers, tokenizer):
    """Mean absolute error of evaluate's "answers"; None unless all are numbers of one token: what is predicted for a second
    token follows the right first one, not the predicted one."""
    if any(len(right) != 2 for _, right in answers):  # the second token is END
        return None
    try:
        numbers = [[float(tokenizer.decode(tokens[:1])) for tokens in pair] for pair in answers]
        return statistics.mean(abs(guess - right) for guess, right in numbers)
    except ValueError:
        return None


def result_row(model, tokenizer, data, args, seed, run):
    """What a run is judged by: accuracy and error on both test sets, and what it answers and looks at on the OOD one."""
    iid, ood = (evaluate(model, data[name], args) for name in ("iid", "ood"))
    return {"seed": seed, "run": run, "iid": iid["accuracy"], "ood": ood["accuracy"], "shares": ood["shares"],
            "errors": [mean_error(result["answers"], tokenizer) for result in (iid, ood)],
            "answers": ood["answers"], "looks": ood["looks"]}


def print_header(args, row):
    """The head of the table; without shares, as in rows of a file, whose roles nobody knows, two columns."""
    print(f"\n{'':20}   IID     OOD", end="")
    if row["shares"]:
        print("   % of attention at the answer on causal / spurious / irrelevant / other tokens\n"
              f"{'':38}{f'layers {args.layers}':28}layers all", end="")
    print()


def print_row(row):
    """One line for a result row, and one for its error where answers are numbers."""
    shares = [" / ".join(f"{100 * share:4.1f}" for share in (*shares[1:], shares[0])) for shares in row["shares"] or ()]
    print(f"{row['run'] + ', seed ' + str(row['seed']):20}{row['iid']:6.3f}  {row['ood']:6.3f}    {'    '.join(shares)}")
    if None not in row["errors"]:
        print(f"{'  mean absolute error':20} {row['errors'][0]:5.2f}  {row['errors'][1]:6.2f}")


def majority(data):
    """Accuracy of always giving the most frequent answer of a Dataset: what every accuracy is to be held against."""
    answers = Counter(tuple(row[keep].tolist()) for row, keep in zip(data.targets, data.answer))
    return answers.most_common(1)[0][1] / len(data.idx)


def print_majority(iid, ood):
    """The last line of the table."""
    print(f"{'majority class':20}{iid:6.3f}  {ood:6.3f}")


def print_summary(rows):
    """Mean, standard deviation and lowest over seeds, for each run."""
    for run in dict.fromkeys(row["run"] for row in rows):
        for name in ("iid", "ood"):
            values = [row[name] for row in rows if row["run"] == run]
            print(f"{run:>6} {name.upper()}: mean {statistics.mean(values):.3f}, standard deviation "
                  f"{statistics.stdev(values):.3f}, lowest {min(values):.3f} of {len(values)} seeds")


def svg(height, parts):
    """An SVG picture 800 wide, on a light card of its own, so that it reads the same on a dark page."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height}" width="800" height="{height}" fill="#1b1f24" '
            'font-family="ui-monospace,Menlo,Consolas,DejaVu Sans Mono,monospace" font-size="12" xml:space="preserve">\n'
            f'<rect x="1" y="1" width="798" height="{height - 2}" rx="8" fill="#fff" stroke="#d0d7de"/>\n'
            + "\n".join(parts) + "\n</svg>\n")


def svg_text(x, y, text, attributes=""):
    """Any text at (x, y), in pixels from the top left."""
    text = html.escape(re.sub(r"[^ -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", " ", text))  # what XML can hold
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{text}</text>'


def svg_line(path, color="#1b1f24", dashes="none"):
    """A line along an SVG path, such as "M10 20h30"."""
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dashes}"/>'


def attention_svg(rows, data, tokenizer):
    """One OOD question for each result row, without CAT and with: its tokens shaded by the attention that the query
    predicting the answer pays them, causal numbers underlined, spurious ones underlined with dashes."""
    wrong = [[guess != right for guess, right in row["answers"]] for row in rows]
    n = next((i for i in range(len(data.idx)) if wrong[0][i] and not wrong[-1][i]), 0)
    answers = [[tokenizer.decode(answer).removesuffix(END) for answer in row["answers"][n]] for row in rows]
    title = f"OOD row {n + 1}, {answers[0][1][:20]}"
    if wrong[0][n] and not wrong[-1][n]:
        title += ": the first that only the run with CAT gets right"
    tokens = data.idx[n].tolist()[:data.answer[n].int().argmax() + 1]
    roles = [ROLES[role] for role in data.role[n].tolist()]
    parts = [svg_text(20, 28, title, 'font-weight="bold"'), svg_text(20, 50, "shade: attention paid by the answer")]
    if data.role.any():
        parts += [svg_text(340, 50, "causal"), svg_line("M340 56h44"),
                  svg_text(420, 50, "spurious"), svg_line("M420 56h58", dashes="3 2")]
    y = 50
    for row, (guess, right) in zip(rows, answers):
        top = y = y + 40
        parts += [svg_text(20, y, "with CAT" if row["run"] == "CAT" else "without CAT", 'font-weight="bold"'),
                  svg_text(590, y, f"{guess[:20]}: {'right' if guess == right else 'wrong'}", 'font-weight="bold"')]
        looks = row["looks"][n].tolist()
        for i, name in enumerate((*ROLES[1:], ROLES[0]) if data.role.any() else ()):
            share = sum(look for look, role in zip(looks, roles) if role == name)
            parts.append(svg_text(590, top + 20 + 17 * i, f"{share:4.0%} on {name} tokens"))
        x, y = 20, y + 24
        for token, look, role in zip(tokens, looks, roles):
            text = tokenizer.decode([token])
            if x + 7.2 * len(text) > 570:
                x, y, text = 20, y + 26, text.lstrip() or " "
            width = 7.2 * len(text)
            shade = min(1.0, 3 * look)  # full at a third of the attention, what one of three causal numbers can get
            parts.append(f'<rect x="{x:.1f}" y="{y - 13}" width="{width:.1f}" height="18" fill="#0072b2" '
                         f'fill-opacity="{shade:.2f}"/>')
            parts.append(svg_text(x, y, text, f'textLength="{width:.1f}"' + ' fill="#fff"' * (shade > 0.5)))
            if role in ("causal", "spurious"):
                parts.append(svg_line(f"M{x - 3:.1f} {y + 9}h{width + 6:.1f}", dashes="none" if role == "causal" else "3 2"))
            x += width
        y = max(y, top + 71)
    return svg(y + 24, parts)


def curves_svg(rows, majority):
    """IID and OOD accuracy over epochs, mean over seeds with a band from lowest to highest, and the majority class's."""
    epochs = max(line["epoch"] for row in rows for line in row["lines"])
    across, up = lambda epoch: 60 + 530 * epoch / epochs, lambda accuracy: 340 - 300 * accuracy
    parts = [svg_text(20, 24, "accuracy", 'font-weight="bold"'), svg_text(310, 382, "epoch", 'font-weight="bold"')]
    for tick in range(0, 101, 20):
        parts += [f'<path d="M60 {up(tick / 100)}h530" stroke="#d0d7de"/>', svg_text(24, up(tick / 100) + 4, f"{tick / 100:.1f}")]
    for epoch in range(0, epochs + 1, math.ceil(epochs / 6)):
        parts.append(svg_text(across(epoch) - 4, 358, str(epoch)))
    ends = [(majority, f"majority class {majority:.2f}", "#57606a")]
    parts.append(svg_line(f"M60 {up(majority):.1f}h530", "#57606a", "2 4"))
    for run, color in (("no CAT", "#d55e00"), ("CAT", "#0072b2")):
        for name in ("iid", "ood"):
            points = {}  # epoch: accuracies of the seeds
            for row in (row for row in rows if row["run"] == run):
                for line in row["lines"] if name in row["lines"][0] else [{"epoch": epochs, name: row[name]}]:
                    points.setdefault(line["epoch"], []).append(line[name])
            if not points:
                continue
            path = lambda pick, order=1: " ".join(f"{across(e):.1f},{up(pick(points[e])):.1f}" for e in list(points)[::order])
            parts.append(f'<polygon points="{path(min)} {path(max, -1)}" fill="{color}" fill-opacity="0.15"/>')
            parts.append(svg_line("M" + path(statistics.mean), color, "none" if name == "ood" else "7 4"))
            end = statistics.mean(points[epochs])
            parts.append(f'<circle cx="{across(epochs)}" cy="{up(end):.1f}" r="3.5" fill="{color}"/>')
            ends.append((end, f"{'with' if run == 'CAT' else 'without'} CAT, {name.upper()} {end:.2f}", color))
    y = 1000
    for above, (accuracy, label, color) in zip(range(len(ends))[::-1], sorted(ends)):
        y = max(min(up(accuracy) + 4, y - 17), 20 + 17 * above)  # beside its line, never on another, with room for those above
        parts.append(svg_text(602, y, label, f'fill="{color}"'))
    return svg(400, parts)


def encode_all(args, splits, tokenizer):
    """A Dataset for each list of examples, by name."""
    data = {name: encode(examples, tokenizer, args.block_size, args.device, args.skip_bad) for name, examples in splits.items()}
    for name in data:
        if len(data[name].idx) < len(splits[name]):
            print(f"{name}: skipped {len(splits[name]) - len(data[name].idx)} rows over --block-size {args.block_size}")
    return data


def run_all(args):
    """All seeds, without and with CAT, the table and the pictures."""
    table, lines, majorities = [], [], []
    for seed in args.seed:
        splits = load_examples(args, seed)
        if "CAT" in args.runs and not any(example.edges for example in splits["train"]):
            raise ValueError(f'{args.train}: no row has an edge to learn from: add "important", or pass --no-cat')
        tokenizer = load_tokenizer(args, splits["train"])
        data = encode_all(args, splits, tokenizer)
        os.makedirs(args.out, exist_ok=True)
        if not table:
            size = sum(weight.numel() for weight in make_model(args, tokenizer.n_vocab, seed)[0].parameters())
            print(f"{len(splits['train'])} training rows, {size:,} parameters")
        rows = [train(args, seed, run, data, tokenizer, lines) for run in args.runs]
        if not table:
            pictures = {"attention.svg": attention_svg(rows, data["ood"], tokenizer)}
            print_header(args, rows[0])
        for row in rows:
            print_row(row)
        majorities.append(majority(data["ood"]))
        print_majority(majority(data["iid"]), majorities[-1])
        table += rows
    if len(args.seed) > 1:
        print_summary(table)
    pictures["curves.svg"] = curves_svg(table, statistics.mean(majorities))
    for name, picture in pictures.items():
        save(os.path.join(args.out, name), picture.encode())
        print(f"wrote {os.path.join(args.out, name)}")


def ask(model, tokenizer, args, text):
    """Prints the answer to a question, and the question with each token marked by the attention the answer pays it:
    by its background on a terminal, otherwise by a percentage after tokens of 5% and more."""
    game = None if args.train else GAMES[args.game]
    if game and "Answer:" not in text:
        text = game.question.replace("{features}", text)
    tokens = tokenizer.encode_ordinary(text.rstrip() + " " if game else text)
    if not tokens:
        raise ValueError("--ask is empty: give a question")
    idx = torch.tensor([tokens], device=args.device)
    answer = model.generate(idx, min(16, model.config.block_size - len(tokens)), tokenizer.encode_single_token(END))
    with torch.no_grad():
        attentions = model(idx)[1]
    weights = average_attention([attentions[layer] for layer in args.supervised])[0, -1].tolist()  # (T,)
    shaded = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for token, weight in zip(tokens, weights):
        shown = tokenizer.decode([token])
        if shaded:
            shown = f"\x1b[48;5;{232 + round(23 * min(1, 3 * weight))};38;5;{16 if weight > 0.17 else 255}m{shown}\x1b[0m"
        elif weight >= 0.05:
            shown += f"[{weight:.0%}]"
        print(shown, end="")
    print(f"\n{tokenizer.decode(answer)}")


def bench(args):
    """Times the same training step without and with CAT, each first in every other pair, and prints the medians, what the
    step with CAT spends its time on, and the size of the attention maps by length."""
    splits = {"train": generate(GAMES[args.game], 40 * args.batch_size, False, args.seed[0], args.edges)}
    tokenizer = load_tokenizer(args, splits["train"])
    data = encode(splits["train"], tokenizer, args.block_size, args.device)
    model, optimizer = make_model(args, tokenizer.n_vocab, args.seed[0])  # one for both: another place in memory shifts the ratio
    times = []
    for i in range(PAIRS + 10):
        rows = torch.randperm(len(data.idx))[:args.batch_size].to(args.device)
        pair = [0.0, 0.0]
        for cat in (False, True) if i % 2 else (True, False):
            start = time.perf_counter()
            step(model, optimizer, data, rows, args, args.gamma, args.lr, cat)
            pair[cat] = time.perf_counter() - start
        times.append(pair)
    without, with_cat, ratio = (statistics.median(column) for column in zip(*((a, b, b / a) for a, b in times[10:])))
    print(f"a step of {args.batch_size} rows on {args.device}, {torch.get_num_threads()} threads, median of {PAIRS} pairs: "
          f"{1000 * without:.2f} ms without CAT, {1000 * with_cat:.2f} ms with, ratio {ratio:.3f}")
    with torch.profiler.profile() as profile:
        for _ in range(20):
            step(model, optimizer, data, torch.arange(args.batch_size, device=args.device), args, args.gamma, args.lr, True)
    spent = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in profile.key_averages()}
    most = sorted(spent, key=spent.get)[:-9:-1]
    print("on the CPU: " + ", ".join(f"{name} {spent[name] / sum(spent.values()):.0%}" for name in most))
    for T in (256, 512, 1024, 2048):
        other = GPT(dataclasses.replace(model.config, block_size=T))
        with torch.no_grad():
            maps = other(torch.zeros(1, T, dtype=torch.long))[1]
        print(f"attention maps of a row of {T:4} tokens: {sum(attn.nbytes for attn in maps) / 2 ** 20:.0f} MiB")


def keep_freed_memory():
    """Tells glibc to keep freed memory: it would give it back to the system within a step, and fault it in again page by page.
    Blocks over 32 MiB, the most that it takes on 64 bits, still come and go."""
    with contextlib.suppress(AttributeError, TypeError):  # macOS and musl have no mallopt, Windows no CDLL(None)
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2 ** 30)  # M_TRIM_THRESHOLD


def fail(message, code):
    """Ends the program with one line on standard error."""
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(code)


def main(argv=None):
    args = parse_args(argv)
    read_once.cache_clear()  # of an earlier call in the same process
    keep_freed_memory()
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.bench:
            bench(args)
        elif not args.eval:
            run_all(args)
        else:
            model, tokenizer, saved, checkpoint = load_checkpoint(args.eval, args.device)
            if args.ask is not None:
                ask(model, tokenizer, saved, args.ask)
            else:
                run, seed = checkpoint["run"], checkpoint["seed"]
                splits = load_splits(saved, seed)
                data = encode_all(saved, {name: splits[name] for name in ("iid", "ood")}, tokenizer)
                row = result_row(model, tokenizer, data, saved, seed, run)
                print_header(saved, row)
                print_row(row)
                print_majority(majority(data["iid"]), majority(data["ood"]))
    except KeyboardInterrupt as interrupt:
        fail(f"interrupted{interrupt}", 130)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except FileNotFoundError as error:
        fail(f"{error.filename}: no such file: check the path", 2)
    except OSError as error:
        fail(f"{error}: check the path and the free space", 2)
    except ValueError as error:
        fail(error, 2)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower() and type(error) is not MemoryError:
            raise
        fail("out of memory: lower --batch-size, --n-layer or --n-embd, or shorten the rows", 2)


if __name__ == "__main__":
    main()
