"""Train a small GPT without and with Causal Attention Tuning (CAT): in and out of distribution."""
import argparse
import html
import json
import math
import os
import random
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean as mean, stdev

import torch
import torch.nn.functional as F

from cat import FORMS, average_attention, gamma_at, re_attention_loss
from data import (EDGES, END, GAMES, ROLES, adjacency_of, build_tokenizer, character_tokens, encode,
                  generate, hold_out, inside_of, mislabel, read, redraw, reorder)
from model import GPT, GPTConfig

TEST, WATCH = 1000, 200  # examples of a game to test on, and to watch


def parse_args(argv):
    """The flags, and argv."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--runs", nargs="+", choices=["no-cat", "cat"], default=["no-cat", "cat"])
    add("--game", choices=GAMES, default="STG", help="to generate")
    add("--rows", type=int, default=8000, help="to train on")
    for split in "train", "iid", "ood":
        add(f"--{split}", help="JSON Lines")
    add("--val", type=float, help="share to test on")
    add("--orders", type=int, default=1, help='of "Name: number" items')
    add("--edges", choices=EDGES, default="value", help="what to look at")
    add("--steps", type=int, help="those of the game; 1200 for a file")
    add("--batch-size", type=int, default=16, help="examples a step")
    add("--lr", type=float, default=4e-3, help="falls to 0")
    add("--form", choices=FORMS, default="each", help="of L_attn")
    add("--alpha", type=float, default=1000.0, help="ratio to reach")
    add("--gamma", type=float, default=0.3, help="weight of L_attn")
    add("--decay", type=float, default=0.0, help="gamma falls by exp(-decay)")
    add("--layers", type=int, nargs="+", default=[-1], help="that look at the causes")
    add("--open-path", action="store_true", help="leave the layers below alone")
    add("--seed", type=int, nargs="+", default=[1], help="of data, weights")
    devices = ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    devices += ["cuda"] * torch.cuda.is_available()
    add("--device", choices=devices, default=devices[-1])
    add("--threads", type=int, default=2, help="of a CPU")
    add("--out", default="out", help="folder")
    add("--resume", action="store_true", help="go on in --out")
    add("--eval", metavar="CHECKPOINT")
    add("--ask", nargs=2, metavar=("CHECKPOINT", "TEXT"))
    args = parser.parse_args(argv)
    args.argv = [word for word in argv if word != "--resume"]
    if args.steps is None:
        args.steps = 1200 if args.train else GAMES[args.game].steps
    for flag in "rows", "steps", "batch_size", "threads":
        if vars(args)[flag] < 1:
            parser.error(f"--{flag.replace('_', '-')} is {vars(args)[flag]}: give at least 1")
    given = [flag for flag in ("train", "iid", "ood", "val") if vars(args)[flag] is not None]
    if given not in ([], ["train", "iid", "ood"], ["train", "val"]):
        parser.error("give --train --iid --ood, --train --val, or none of them")
    n = GPTConfig.n_layer
    if not {*args.layers} <= {*range(-n, n)}:
        parser.error(f"--layers is {args.layers}: give numbers from 0 to {n - 1}")
    return args


def load_data(args, seed):
    """(train, watched, tested): a Dataset and {split: Dataset} twice; only --val watches what it
    tests. "redrawn": ood with other spurious phrases."""
    rng = random.Random(seed)
    if args.train is None:
        game, n = GAMES[args.game], TEST + WATCH
        iid = generate(game, n + args.rows, False, seed)
        ood = generate(game, n, True, seed, exclude=iid)
        train, tested = iid[n:], {"iid": iid[:TEST], "ood": ood[:TEST]}
        watched = {"iid": iid[TEST:n], "ood": ood[TEST:]}
    elif args.val is not None:
        train, tested = hold_out(read(args.train), args.val, seed)
        watched = {split: examples[:WATCH] for split, examples in tested.items()}
    else:
        train, tested = read(args.train), {"iid": read(args.iid), "ood": read(args.ood)}
        watched = {"train": train[:WATCH]}
    tested["redrawn"] = redraw(tested["ood"], seed)
    if args.edges in ("spurious", "random"):
        train = [mislabel(e, args.edges, rng) for e in train]
    train = train + [reorder(e, rng) for _ in range(args.orders - 1) for e in train]
    tokenizer = build_tokenizer(e.input + e.target for e in train)
    encoded = lambda splits: {split: encode(examples, tokenizer, args.edges, args.device)
                              for split, examples in splits.items() if examples}
    return encoded({"train": train})["train"], encoded(watched), encoded(tested)


def read_out(attentions, args):
    """The attention that should look at the causes: mean over heads and --layers, (B, T, T)."""
    return average_attention([attentions[layer] for layer in args.layers])


def losses(model, data, ix, args):
    """L_next and L_attn on the examples ix, (B,), of a Dataset."""
    logits, attentions = model(data.idx[ix])
    targets, answer = data.targets[ix], data.answer[ix]  # (B, T) each
    l_next = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    # the answer counts twice: it drowns among numbers that nobody can predict
    l_next = l_next + F.cross_entropy(logits[answer], targets[answer])
    attn, adjacency = read_out(attentions, args), adjacency_of(data, ix)
    l_attn = re_attention_loss(attn, adjacency, args.alpha, args.form)
    below = attentions[:max(layer % len(attentions) for layer in args.layers)]
    if below and not args.open_path:
        # there, causes and answer look inside their items, so that nothing else rides along
        attn, adjacency = average_attention(below), inside_of(data, ix)
        l_attn = l_attn + re_attention_loss(attn, adjacency, args.alpha, args.form)
    return l_next, l_attn


@torch.no_grad()
def evaluate(model, data, args):
    """N pairs (guess, right) of answers, each token guessed after the right ones: equal just when
    the greedy answer is right; and (N, T), the attention that the answer pays."""
    answers, attn = [], []
    for ix in torch.arange(len(data.idx)).split(64):
        logits, attentions = model(data.idx[ix])
        for guess, right, at in zip(logits.argmax(dim=-1), data.targets[ix], data.answer[ix]):
            answers.append([data.tokenizer.decode(ids[at].tolist()).removesuffix(END)
                            for ids in (guess, right)])
        first = data.answer[ix].int().argmax(dim=1)  # (B,)
        attn.append(read_out(attentions, args)[torch.arange(len(ix)), first].cpu())
    return answers, torch.cat(attn)


def test(model, splits, args):
    """({column: value}, answers, attn), the latter two of ood. "constant": the commonest answer;
    "changed": share of answers that change with the spurious phrases."""
    seen, scores = {split: evaluate(model, data, args) for split, data in splits.items()}, {}
    redrawn = seen.pop("redrawn", None)
    for split, (answers, attn) in seen.items():
        often = max(Counter(right for _, right in answers).values())
        scores[split] = mean(guess == right for guess, right in answers)
        scores[f"{split} constant"] = often / len(answers)
    if redrawn:
        scores["changed"] = mean(a != b for (a, _), (b, _) in zip(answers, redrawn[0]))
    role = splits[split].role.cpu()  # (N, T), 0 without labels
    for i in role.unique().tolist() if role.any() else ():
        scores[ROLES[i]] = (attn * (role == i)).sum(dim=1).mean().item()
    return scores, answers, attn


def load_checkpoint(path):
    """(state, args) of a file that `train` wrote; ValueError for any other."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # never runs code
        return state, parse_args(state["argv"])
    except (Exception, SystemExit):
        raise ValueError(f"{path}: no checkpoint of train.py: give one of out/*.pt") from None


def start(args, seed, run, data, path):
    """(model, optimizer, batches, state) of a run, at its checkpoint if there is one; batches: the
    examples of each step. ValueError when "data" differs."""
    torch.manual_seed(seed)  # of weights and order, the same without and with CAT
    model = GPT(GPTConfig(data.tokenizer.n_vocab, block_size=2048))
    model.start_alike(data.tokenizer)
    optimizer = torch.optim.AdamW(model.to(args.device).parameters(), args.lr)
    # Going on ends as an unbroken run would: nothing random happens in a step,
    # the order of the examples follows from the seed,
    # weights, optimiser and step stand in the checkpoint.
    n, B = len(data.idx), args.batch_size
    order = torch.cat([torch.randperm(n) for _ in range(args.steps * B // n + 1)])
    state = {"argv": args.argv, "run": run, "seed": seed, "steps_done": 0, "metrics": [],
             "data": f"{data.idx.cumsum(0).sum()} {data.edges.cumsum(0).sum()} {model.config}"}
    if path.exists():
        begun, (state, _) = state, load_checkpoint(path)
        if begun["data"] != state["data"]:
            raise ValueError(f"{path} is of other data or sizes: give these, or another --out")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    return model, optimizer, order.split(B), state


def train(args, seed, run, data, watched):
    """One run, "no-cat" or "cat": the model and its lines of metrics.jsonl. ValueError for a loss
    that is not finite."""
    path = Path(args.out, f"{run}-{seed}.pt")
    model, optimizer, batches, state = start(args, seed, run, data, path)
    for step in range(state["steps_done"], args.steps):
        # 1. the share done, the `epoch` of gamma_at, sets the learning rate and gamma
        done = step / args.steps
        optimizer.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * done)) / 2
        gamma = gamma_at(done, args.gamma, args.decay) * (run == "cat")
        # 2. L = L_next + gamma * L_attn on the next examples
        l_next, l_attn = losses(model, data, batches[step], args)
        loss = l_next + gamma * l_attn if gamma else l_next  # no way back through an idle term
        if not loss.isfinite():
            raise ValueError(f"loss is {loss.item()} at step {step}: lower --lr or --gamma")
        # 3. one update of the weights
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # 4. whenever another tenth of the run is full: watch, log, save
        if (step + 1) * 10 // args.steps > step * 10 // args.steps:
            seen = {"step": step + 1, "loss": l_next.item(), "attn_loss": l_attn.item()}
            seen = {name: round(x, 4) for name, x in (seen | test(model, watched, args)[0]).items()}
            state["metrics"].append(json.dumps({"run": run, "seed": seed, **seen}) + "\n")
            print(state["metrics"][-1], end="", file=sys.stderr)
            state |= {"steps_done": step + 1, "model": model.state_dict(),
                      "optimizer": optimizer.state_dict()}
            torch.save(state, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
    return model, state["metrics"]


def print_table(results):
    """Prints results, {column: value}, and those of several seeds of a run as one."""
    columns = [c for c in results[0] if all(c in r for r in results)]
    table = [dict(zip(columns, columns)), *results]
    for run in {r["run"]: 0 for r in results}:
        of_run = [r for r in results if r["run"] == run]
        for name, f in (("mean", mean), ("stdev", stdev), ("lowest", min)) * (len(of_run) > 1):
            values = {c: f([r[c] for r in of_run]) for c in columns[2:]}
            table.append({"run": run, "seed": name, **values})
    for result in table:
        cells = [(result[c], max(8, len(c) + 2)) for c in columns]
        print("".join(f"{x:<{w}.3f}" if type(x) is float else f"{x:<{w}}" for x, w in cells))


@torch.no_grad()
def ask_model(model, data, args, text):
    """Prints a question, with the attention of its answer from 5% a token on, and the answer."""
    tokenizer = data.tokenizer
    end = tokenizer.decode([data.idx[0, data.answer[0].int().argmax()].item()])
    text = text.rstrip() + end[len(end.rstrip()):]  # blanks as in training
    tokens = tokenizer.encode_ordinary(text)
    idx = torch.tensor([tokens], device=args.device)
    attn = read_out(model(idx)[1], args)[0, -1]  # (T,)
    for piece, positions in character_tokens(tokenizer, tokens):
        share = attn[positions].sum().item()
        print(piece + f"[{share:.0%}]" * (share >= 0.05), end="")
    print("\n" + tokenizer.decode(model.generate(idx, 64, tokenizer.encode_single_token(END))))


def svg(height, parts):
    return ('<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" font-family="monospace" '
            f'font-size="13" viewBox="0 0 800 {height}"><rect width="800" height="{height}" '
            f'fill="#fff"/>\n{"".join(parts)}</svg>\n')


def words(x, y, text, style=""):
    return f'<text x="{x}" y="{y}" {style}>{html.escape(text)}</text>\n'


def attention_svg(shown, data):
    """The first question whose answers differ, or the first, shaded by what its answer looks
    at; shown: {run: (answers, attn)}."""
    pairs = zip(*(answers for answers, _ in shown.values()))
    n = next((n for n, pair in enumerate(pairs) if pair[0] != pair[-1]), 0)
    tokens, y = data.idx[n, :data.answer[n].int().argmax() + 1].tolist(), 0
    parts = [words(20, 24, "shade: attention of the answer; bold: causes; italic: spurious")]
    for run, (answers, attn) in shown.items():
        x, y = 20, y + 70
        parts.append(words(20, y - 24, "{}: {}, right is {}".format(run, *answers[n])))
        for piece, positions in character_tokens(data.tokenizer, tokens):
            shade = min(1, 3 * attn[n, positions].sum().item())
            style = ("", 'font-weight="bold"', 'font-style="italic"')[data.role[n, positions[0]]]
            parts += [f'<rect x="{x}" y="{y - 14}" width="{8 * len(piece)}" height="19" '
                      f'fill="orange" fill-opacity="{shade:.2f}"/>', words(x, y, piece, style)]
            x, y = (x + 8 * len(piece), y) if x < 680 else (20, y + 24)
    return svg(y + 24, parts)


def curves_svg(metrics):
    """Accuracy on what is watched while training."""
    parts = [words(0, 24, "1"), words(0, 324, "0"), words(20, 340, "blue: CAT, full: OOD")]
    for line in metrics:
        style = 'fill="blue"' if line["run"] == "cat" else 'fill="orange"'
        for split, dot in zip(("train", "iid", "ood"), "○○●"):
            if split in line:
                x, y = 780 * line["step"] // metrics[-1]["step"], 320 - round(300 * line[split])
                parts.append(words(x, y, dot, style))
    return svg(350, parts)


def main(argv):
    """Trains all seeds without and with CAT, or tests or asks a checkpoint."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if path := args.ask[0] if args.ask else args.eval:
        state, saved = load_checkpoint(path)
        run, seed, saved.device = state["run"], state["seed"], args.device
        data, _, tested = load_data(saved, seed)
        model, *_ = start(saved, seed, run, data, Path(path))
        if args.ask:
            return ask_model(model, data, saved, args.ask[1])
        return print_table([{"run": run, "seed": seed, **test(model, tested, saved)[0]}])
    out, results, metrics = Path(args.out), [], []
    write = lambda name, text: (out / name).write_text(text, "utf-8")
    for path in out.glob("*.pt"):
        flags = load_checkpoint(path)[0]["argv"]
        if not args.resume or flags != args.argv:
            raise ValueError(f"{path} is there, of flags {' '.join(flags)}: give these and "
                             "--resume, or another --out")
    for seed in args.seed:
        data, watched, tested = load_data(args, seed)
        if "cat" in args.runs and not data.edges.numel():
            raise ValueError(f'{args.train}: no edges: add "important", or give --runs no-cat')
        out.mkdir(parents=True, exist_ok=True)
        shown = {}
        for run in args.runs:
            model, lines = train(args, seed, run, data, watched)
            metrics += lines
            write("metrics.jsonl", "".join(metrics))
            scores, *shown[run] = test(model, tested, args)
            results.append({"run": run, "seed": seed, **scores})
    write("attention.svg", attention_svg(shown, tested.get("ood", tested["iid"])))
    write("curves.svg", curves_svg([json.loads(line) for line in metrics]))
    print_table(results)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, KeyboardInterrupt) as error:
        print(f"train.py: {str(error) or 'interrupted: go on with --resume'}", file=sys.stderr)
        sys.exit(2)
