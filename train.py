"""Train a small GPT without and with Causal Attention Tuning (CAT): in and out of distribution."""
import signal
import sys

if __name__ == "__main__":  # before the slow imports: Ctrl-C is one line at any moment
    signal.signal(signal.SIGINT, lambda *_: sys.exit("train.py: interrupted: go on with --resume"))

import argparse
import functools
import html
import io
import json
import math
import random
import zlib
from collections import Counter
from pathlib import Path
from statistics import fmean as mean, stdev

import torch
import torch.nn.functional as F

from cat import FORMS, attention_ratio, average_attention, gamma_at, re_attention_loss
from data import (EDGES, END, GAMES, ROLES, adjacency_of, build_tokenizer, character_tokens, encode,
                  generate, hold_out, inside_of, read, redraw_spurious, reorder, save)
from model import GPT, GPTConfig

RUNS = ["no-cat", "cat"]
TEST, WATCH = 1000, 200  # examples in a generated test set; examples watched while training


def parse_args(argv=None):
    def error(message):
        raise ValueError(message)

    parser = argparse.ArgumentParser(prog="train.py", description=__doc__,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = error  # one line, by main, instead of the usage
    add = parser.add_argument
    add("--runs", nargs="+", choices=RUNS, default=RUNS, help="without and with CAT")
    add("--game", choices=GAMES, default="STG", help="to generate")
    add("--rows", type=int, default=8000, help="training examples to generate")
    add("--train", help="JSON Lines file; then give --iid and --ood too, or --val")
    add("--iid", help="test file, in distribution")
    add("--ood", help="test file, out of distribution")
    add("--val", type=float, help="share of --train to test on; OOD: with numbers shuffled")
    add("--orders", type=int, default=1, help='of "Name: number" items to show an example in')
    add("--edges", choices=EDGES, default="value", help="what of a cause to look at; controls")
    add("--steps", type=int, help="default: those of the game, 1200 for a file")
    add("--batch-size", type=int, default=16, help="examples in a step")
    add("--lr", type=float, default=4e-3, help="learning rate, falls to 0 as a cosine")
    add("--loss", choices=("all", "answer", "both"), default="both", help="tokens to predict")
    add("--form", choices=FORMS, default="each", help="of L_attn, see cat.py")
    add("--alpha", type=float, default=1000.0, help="ratio of causal to other attention to reach")
    add("--gamma", type=float, default=0.3, help="weight of L_attn")
    add("--decay", type=float, default=0.0, help="gamma falls to exp(-decay) of that")
    add("--layers", type=int, nargs="+", default=[-1], help="that look at the causes")
    add("--open-path", action="store_true", help="leave the layers below these alone")
    for size in "layer", "head", "embd":
        add(f"--n-{size}", type=int, default=getattr(GPTConfig, f"n_{size}"), help="of the model")
    add("--seed", type=int, nargs="+", default=[1], help="of data, weights and order")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="such as mps")
    add("--threads", type=int, default=torch.get_num_threads(), help="of a CPU")
    add("--out", default="out", help="folder for checkpoints, metrics.jsonl and pictures")
    add("--resume", action="store_true", help="go on with this command's runs in --out")
    add("--eval", metavar="CHECKPOINT", help="test it again, and train nothing")
    add("--ask", nargs=2, metavar=("CHECKPOINT", "TEXT"), help="answer a question")
    args = parser.parse_args(argv)
    args.argv = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
    if args.steps is None:
        args.steps = 1200 if args.train else GAMES[args.game].steps
    args.runs, args.seed = ([*dict.fromkeys(some)] for some in (args.runs, args.seed))
    for flag in ("rows", "orders", "steps", "batch_size", "threads"):
        if getattr(args, flag) < 1:
            error(f"--{flag.replace('_', '-')} is {getattr(args, flag)}: give at least 1")
    if not 0 < args.lr < math.inf:
        error(f"--lr is {args.lr}: give a finite number above 0")
    given = [flag for flag in ("train", "iid", "ood", "val") if getattr(args, flag) is not None]
    if given not in ([], ["train", "iid", "ood"], ["train", "val"]):
        error(f"--{' --'.join(given)}: give --train --iid --ood, --train --val, or none")
    # what is checked where it is used is tried now, before a file is touched
    GPTConfig(1, 1, args.n_layer, args.n_head, args.n_embd)
    if not all(-args.n_layer <= layer < args.n_layer for layer in args.layers):
        error(f"--layers is {args.layers}: give numbers from 0 to {args.n_layer - 1}")
    gamma_at(0, args.gamma, args.decay)
    re_attention_loss(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), args.alpha, args.form)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError):
        error(f"--device is {args.device}, which this torch does not find: give cpu")
    return args


@functools.cache  # once for all seeds
def load(path):
    examples, summary = read(path)
    print(summary)
    return examples


def load_data(args, seed):
    """A Dataset for each of "train", "iid", "ood", "redrawn" (ood with other spurious numbers), and
    what is watched while training: no part of a generated test set or a test file."""
    if args.train is None:
        iid = generate(GAMES[args.game], args.rows + TEST + WATCH, False, seed)
        ood = generate(GAMES[args.game], TEST + WATCH, True, seed, exclude=iid)
        splits = {"train": iid[TEST + WATCH:], "iid": iid[:TEST], "ood": ood[:TEST],
                  "watch iid": iid[TEST:TEST + WATCH], "watch ood": ood[TEST:]}
    elif args.val is not None:
        splits = dict(zip(("train", "iid", "ood"), hold_out(load(args.train), args.val, seed)))
        print(f"held out {len(splits['iid'])}, {len(splits['ood'])} with numbers to shuffle")
        splits |= {f"watch {name}": splits[name][:WATCH] for name in ("iid", "ood")}
    else:
        splits = {name: load(getattr(args, name)) for name in ("train", "iid", "ood")}
        splits["watch train"] = splits["train"][:WATCH]
    if any(example.spurious for example in splits["ood"]):
        splits["redrawn"] = redraw_spurious(splits["ood"], seed)
    rng, train = random.Random(seed), splits["train"]
    splits["train"] = train + [reorder(e, rng) for _ in range(args.orders - 1) for e in train]
    tokenizer = build_tokenizer(e.input + e.target for e in splits["train"])
    return {name: encode(examples, tokenizer, args.edges, args.device, seed)
            for name, examples in splits.items() if examples}


def read_out(attentions, args):
    """The attention that should look at the causes: mean over heads and --layers, (B, T, T)."""
    return average_attention([attentions[layer] for layer in args.layers])


def losses(model, data, ix, args):
    """L_next and L_attn on the examples ix, (B,), of a Dataset."""
    logits, attentions = model(data.idx[ix])
    targets, answer = data.targets[ix], data.answer[ix]  # (B, T) each
    l_next = 0.0
    if args.loss != "answer":
        l_next = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    if args.loss != "all":  # once more: it drowns among numbers that nobody can predict
        l_next = l_next + F.cross_entropy(logits[answer], targets[answer])
    attn, adjacency = read_out(attentions, args), adjacency_of(data, ix)
    l_attn = re_attention_loss(attn, adjacency, args.alpha, args.form)
    below = attentions[:max(layer % args.n_layer for layer in args.layers)]
    if below and not args.open_path:
        # there, causes and answer look inside their own items, so that nothing else rides along
        attn, adjacency = average_attention(below), inside_of(data, ix)
        l_attn = l_attn + re_attention_loss(attn, adjacency, args.alpha, args.form)
    return l_next, l_attn


@torch.no_grad()
def evaluate(model, data, args):
    """Answers to a Dataset of N examples: N pairs (guess, right) of texts, each token guessed given
    the right ones before it, so that they are equal just when the greedy answer is right; and
    (N, T), the attention of the query that predicts the answer."""
    answers, look = [], []
    for ix in torch.arange(len(data.idx)).split(64):
        logits, attentions = model(data.idx[ix])
        for guess, right, at in zip(logits.argmax(dim=-1), data.targets[ix], data.answer[ix]):
            answers.append([data.tokenizer.decode(ids[at].tolist()).removesuffix(END)
                            for ids in (guess, right)])
        first = data.answer[ix].int().argmax(dim=1)  # (B,)
        look.append(read_out(attentions, args)[torch.arange(len(ix)), first].cpu())
    return answers, torch.cat(look)


@torch.no_grad()
def watch(model, data, ix, args):
    """Ratio of causal to other attention on the training examples ix, and accuracies."""
    attn = read_out(model(data["train"].idx[ix])[1], args)
    causal, other = attention_ratio(attn, adjacency_of(data["train"], ix))  # (R,) each
    seen = {"ratio": (causal.sum() / other.sum()).item()} if len(causal) else {}
    for split in ("train", "iid", "ood"):
        if f"watch {split}" in data:
            answers, _ = evaluate(model, data[f"watch {split}"], args)
            seen[split] = mean(guess == right for guess, right in answers)
    return seen


def begin(args, seed, run, data):
    """(model, optimizer, batches, state) of a run, at its start or, with --resume, at its last
    checkpoint; batches are the examples of each step. ValueError when it was begun otherwise."""
    torch.manual_seed(seed)  # of weights and order, the same without and with CAT
    tokenizer, T = data["train"].tokenizer, max(part.idx.shape[1] for part in data.values())
    pieces = [tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.n_vocab - 1)]
    sizes = [tokenizer.n_vocab, T, args.n_layer, args.n_head, args.n_embd]
    model = GPT(GPTConfig(*sizes))
    model.start_alike({i: float(piece) for i, piece in enumerate(pieces) if piece.isdigit()})
    optimizer = torch.optim.AdamW(model.to(args.device).parameters())
    # Going on ends as an unbroken run would, since nothing random happens in a step: the order of
    # the examples follows from the seed; weights, optimiser and step stand in the checkpoint.
    n, B = len(data["train"].idx), args.batch_size
    order = torch.cat([torch.randperm(n) for _ in range(args.steps * B // n + 1)])
    begun = {"argv": args.argv, "run": run, "seed": seed, "threads": args.threads,
             "data": checksum(data), "sizes": sizes}
    state, path = {**begun, "steps_done": 0, "metrics": []}, Path(args.out, f"{run}-{seed}.pt")
    if args.resume and path.exists():
        state = load_checkpoint(path, args.device)[-1]
        if {name: state[name] for name in begun} != begun:
            raise ValueError(f"{path} was begun with other data or threads: give those, "
                             f"--threads {state['threads']}, or another --out")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    return model, optimizer, order[:args.steps * B].split(B), state


def train(args, seed, run, data, earlier=()):
    """One run, "no-cat" or "cat". After every tenth of it writes a line of JSON to metrics.jsonl,
    behind those of earlier runs, and a checkpoint. Returns the model and its lines. ValueError for
    a loss that is not finite."""
    model, optimizer, batches, state = begin(args, seed, run, data)
    recent = []  # L_next and L_attn since the last line
    for step in range(state["steps_done"], args.steps):
        # 1. the share of training done sets the learning rate and the weight of L_attn
        done = step / args.steps
        optimizer.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * done)) / 2
        gamma = gamma_at(done, args.gamma, args.decay) if run == "cat" else 0.0
        # 2. L = L_next + gamma * L_attn on the next examples
        l_next, l_attn = losses(model, data["train"], batches[step], args)
        loss = l_next + gamma * l_attn if gamma else l_next  # no way back through an idle term
        if not math.isfinite(loss.item()):
            raise ValueError(f"loss is {loss.item()} at step {step} ({run}): lower --lr or --gamma")
        # 3. one update of the weights
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recent.append((l_next.item(), l_attn.item()))
        # 4. whenever another tenth of the run is full: watch, log, save
        if (step + 1) * 10 // args.steps > step * 10 // args.steps:
            l_next, l_attn = map(mean, zip(*recent))
            line = {"run": run, "seed": seed, "step": step + 1, "loss": l_next, "attn_loss": l_attn,
                    **watch(model, data, batches[step], args)}
            line = json.dumps({k: round(x, 4) if type(x) is float else x for k, x in line.items()})
            print(line, file=sys.stderr)
            recent, state["steps_done"] = [], step + 1
            state["metrics"].append(line + "\n")
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save(Path(args.out, "metrics.jsonl"), "".join([*earlier, *state["metrics"]]).encode())
            torch.save(state, file := io.BytesIO())
            save(Path(args.out, f"{run}-{seed}.pt"), file.getvalue())
    return model, state["metrics"]


def checksum(data):
    return zlib.crc32(data["train"].idx.cpu().numpy())


def load_checkpoint(path, device):
    """(model, args, state) of a file that `train` wrote; ValueError for any other."""
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location=device, weights_only=True)  # never runs code
            args = parse_args([*state["argv"], "--device", device])
            model = GPT(GPTConfig(*state["sizes"])).to(device)
            model.load_state_dict(state["model"])
            torch.optim.AdamW(model.parameters()).load_state_dict(state["optimizer"])
            assert {"threads", "data"} < state.keys() and all(map(json.loads, state["metrics"]))
            assert state["run"] in args.runs and state["seed"] in args.seed
            assert state["steps_done"] in range(1, args.steps + 1)
        except (Exception, SystemExit) as error:  # foreign and changed files fail in many ways
            raise ValueError(f"{path}: no checkpoint of train.py ({type(error).__name__}): "
                             "give one of out/*.pt") from None
    return model, args, state


def number(text):
    try:
        return float(text)
    except ValueError:
        return math.nan


def score(split, answers):
    """{column: value} of pairs (guess, right): the share of right guesses, that of the most
    frequent answer and, where answers are numbers, the share within 1 and the mean error."""
    often = Counter(right for _, right in answers).most_common(1)[0][1] / len(answers)
    scores = {split: mean(guess == right for guess, right in answers), f"{split} constant": often}
    errors = [abs(number(guess) - number(right)) for guess, right in answers]
    if known := [error for error in errors if error < math.inf]:  # not NaN
        scores |= {f"{split} +-1": mean(e <= 1 for e in errors), f"{split} error": mean(known)}
    return scores


def test(model, data, args):
    """A run's scores, and the answers and looks of the last split. `changed`: share of OOD answers
    that change when spurious numbers are drawn anew, 0 when none is read. Roles: shares of the
    attention that the answer pays."""
    scores = {}
    for split in ("iid", "ood") if "ood" in data else ("iid",):
        answers, look = evaluate(model, data[split], args)  # the last ones are used below
        scores |= score(split, answers)
    if "redrawn" in data:
        redrawn, _ = evaluate(model, data["redrawn"], args)
        scores["changed"] = mean(a != b for (a, _), (b, _) in zip(answers, redrawn))
    role = data[split].role.cpu()  # (N, T); a test file without labels has none
    for i, name in enumerate(ROLES):
        if role.any() and (role == i).any():
            scores[name] = (look * (role == i)).sum(dim=1).mean().item()
    return scores, (answers, look)


def print_table(results):
    """Prints results, {column: value}, and those of several seeds of a run as one."""
    columns, rows = dict.fromkeys(c for result in results for c in result), []
    for run in dict.fromkeys(result["run"] for result in results):
        of_run = [result for result in results if result["run"] == run]
        shared = [c for c in list(columns)[2:] if all(c in result for result in of_run)]
        rows += of_run
        if len(of_run) > 1:
            for name, f in ("mean", mean), ("stdev", stdev), ("lowest", min):
                rows.append({"run": run, "seed": name,
                             **{c: f([result[c] for result in of_run]) for c in shared}})
    for row in [dict(zip(columns, columns)), *rows]:
        cells = [(row.get(c, ""), max(8, len(c) + 2)) for c in columns]
        print("".join(f"{x:<{w}.3f}" if type(x) is float else f"{x:<{w}}" for x, w in cells))


def ask_model(model, data, args, text):
    """Prints a question, the attention of its answer on a token where it is 5% or more, and the
    answer. What all inputs of the training data begin and end with need not be typed."""
    before, after = data.question
    typed = next(n for n in range(len(after), -1, -1) if text.endswith(after[:n]))
    text = before + text.removeprefix(before) + after[typed:]
    if not (tokens := data.tokenizer.encode_ordinary(text)):
        raise ValueError("--ask is empty: give a question")
    idx = torch.tensor([tokens], device=args.device)
    new = model.generate(idx, 64, data.tokenizer.encode_single_token(END))
    look = read_out(model(idx)[1], args)[0, -1]  # (T,)
    for piece, positions in character_tokens(data.tokenizer, tokens):
        share = look[positions].sum().item()
        print(piece + f"[{share:.0%}]" * (share >= 0.05), end="")
    answer = data.tokenizer.decode(new)
    print(f"\n{answer}" + " (no training target)" * (answer not in data.answers))


def svg(height, parts):
    return ('<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" font-family="monospace" '
            f'font-size="13" viewBox="0 0 800 {height}"><rect width="800" height="{height}" '
            f'fill="#fff"/>\n{"".join(parts)}</svg>\n').encode()


def words(x, y, text, style=""):
    text = html.escape("".join(c if c.isprintable() else " " for c in text))
    return f'<text x="{x}" y="{y:.0f}" {style}>{text}</text>\n'


def attention_svg(tests, data):
    """The first question that only the last run gets right, if any: for each run of tests, {name:
    (answers, look)}, its tokens shaded by the attention of the answer, causes bold, spurious ones
    italic."""
    hits = zip(*([guess == right for guess, right in answers] for answers, _ in tests.values()))
    n = next((n for n, hit in enumerate(hits) if hit[-1] and not hit[0]), 0)
    tokens, y = data.idx[n, :data.answer[n].int().argmax() + 1].tolist(), 16
    parts = [words(20, 28, "shade: attention paid by the answer; bold: causes; italic: spurious")]
    for name, (answers, look) in tests.items():
        x, y = 20, y + 60
        parts.append(words(20, y - 26, "{}: {}, right is {}".format(name, *answers[n])))
        for piece, positions in character_tokens(data.tokenizer, tokens):
            width, share = 8 * len(piece), look[n, positions].sum().item()
            if x + width > 780:
                x, y = 20, y + 26
            style = ("", 'font-weight="bold"', 'font-style="italic"')[data.role[n, positions[0]]]
            parts += [f'<rect x="{x}" y="{y - 14}" width="{width}" height="19" fill="#ffa600" '
                      f'fill-opacity="{min(1, 3 * share):.2f}"/>', words(x, y, piece, style)]
            x += width
    return svg(y + 24, parts)


def curves_svg(metrics):
    """Accuracy on what is watched while training, a curve a seed: OOD solid, the others dashed."""
    last, curves = metrics[-1]["step"], {}
    for line in metrics:
        for split in line.keys() & {"iid", "ood", "train"}:
            point = f"{30 + 570 * line['step'] / last:.0f},{320 - 300 * line[split]:.0f}"
            curves.setdefault((line["run"], line["seed"], split), []).append(point)
    parts = [words(0, 324 - 60 * i, f"{i / 5:.1f}") for i in range(6)]
    parts.append(words(540, 340, f"step {last}"))
    for (run, _, split), points in sorted(curves.items()):
        color, y = ("#0072b2", 24) if run == "cat" else ("#d55e00", 64)
        dash, y = ("none", y) if split == "ood" else ("6 4", y + 20)
        parts += [f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}" '
                  f'stroke-dasharray="{dash}"/>\n',
                  words(620, y, f"{run} {split}", f'fill="{color}"')]
    return svg(350, parts)


def run_all(args):
    """All seeds, without and with CAT, the table and the pictures."""
    out, results, metrics, pictured = Path(args.out), [], [], {}
    mine = [f"{run}-{seed}.pt" for run in args.runs for seed in args.seed]
    for path in out.glob("*.pt"):
        if path.name not in mine:
            raise ValueError(f"{path} is of another command: give another --out, or remove it")
        if args.resume and (argv := load_checkpoint(path, args.device)[-1]["argv"]) != args.argv:
            raise ValueError(f"{path} was begun with other flags: give those, {' '.join(argv)}")
    for seed in args.seed:
        data = load_data(args, seed)
        if "cat" in args.runs and not data["train"].edges.numel():
            raise ValueError(f'{args.train}: no edges: add "important", or give --runs no-cat')
        if seed == args.seed[0]:
            out.mkdir(parents=True, exist_ok=True)
            for name in [*mine, "metrics.jsonl", "attention.svg", "curves.svg"]:
                if not args.resume:  # so that two runs never mix
                    (out / name).unlink(missing_ok=True)
        for run in args.runs:
            model, lines = train(args, seed, run, data, metrics)
            metrics += lines
            scores, looks = test(model, data, args)
            results.append({"run": run, "seed": seed, **scores})
            pictured.setdefault(run, looks)
        if seed == args.seed[0]:
            save(out / "attention.svg", attention_svg(pictured, data.get("ood", data["iid"])))
    save(out / "curves.svg", curves_svg(list(map(json.loads, metrics))))
    print_table(results)


def main(argv=None):
    try:
        args = parse_args(argv)
        torch.set_num_threads(args.threads)
        if args.eval is None and args.ask is None:
            return run_all(args)
        path = args.ask[0] if args.ask else args.eval
        model, saved, state = load_checkpoint(path, args.device)
        data = load_data(saved, state["seed"])
        if checksum(data) != state["data"]:
            raise ValueError(f"{path}: its training data have changed: bring them back")
        if args.ask:
            return ask_model(model, data["train"], saved, args.ask[1])
        print_table([{"run": state["run"], "seed": state["seed"], **test(model, data, saved)[0]}])
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
