"""The training script: what a step does, what the table measures, and what is left behind."""
import io
import json
import math
import re
import runpy
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import make_dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

import train
from cat import gamma_at, re_attention_loss
from data import (EDGES, END, GAMES, ROLES, Example, Feature, Game, adjacency_of, dump, generate,
                  inside_of)
from model import GPTConfig

TINY = Game("tiny", causal=(Feature("Smoking", weight=1.0),), irrelevant=(Feature("Room", 1, 999),),
            spurious=(Feature("Fingers", copies="Smoking"),),
            bands=((5.5, "Risk High"), (-math.inf, "Risk Low")),
            question="Patient. {features} Answer: ")
files = lambda folder=".": {path.name: path.read_bytes() for path in Path(folder).rglob("*.*")}
FLAGS = "--game tiny --rows 64 --batch-size 8 --steps 10 --threads 1 --device cpu"
GAMES["tiny"], train.TEST, train.WATCH = TINY, 100, 20  # fewer examples to test and to watch


Small, Deep = (make_dataclass("Sizes", [("n_layer", int, n), ("n_head", int, 2), (
    "n_embd", int, 32)], bases=(GPTConfig,), frozen=True) for n in (2, 3))
train.GPTConfig = Small


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The folder of a training of both runs that learned the game, and what it printed."""
    folder = tmp_path_factory.mktemp("learned")
    return folder, *run("--rows 512 --steps 160 --batch-size 16 --out", folder)[:2]


def run(flags="", *words):
    """train.py with FLAGS, flags and words: (output, lines of standard error, exit code)."""
    code = 0
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            train.main([*FLAGS.split(), *flags.split(), *map(str, words)])
        except SystemExit as stop:
            code = stop.code
        except (ValueError, OSError) as error:
            print(error, file=err)
            code = 2
    return out.getvalue(), err.getvalue().splitlines(), code


def table(out):
    """{"run seed": {column: number}} of a printed table."""
    header, *lines = (re.split(r"\s{2,}", line.strip())
                      for line in out[out.index("run  "):].splitlines())
    return {f"{run} {seed}": dict(zip(header[2:], map(float, values)))
            for run, seed, *values in lines}


def write(name, examples):
    Path(f"{name}.jsonl").write_text("".join(map(dump, examples)))


def write_files():
    """train, iid and ood.jsonl of the tiny game; the flags that name them."""
    for seed, name in enumerate(("train", "iid", "ood")):
        write(name, generate(TINY, 64, name == "ood", seed))
    return "--train train.jsonl --iid iid.jsonl --ood ood.jsonl "


@pytest.mark.parametrize("flags, causes, inside", [
    ("", [1], [0]), ("--open-path", [1], []), ("--layers 0 1", [0, 1], [0]),
    ("--layers 2 --form log", [2], [0, 1])])
def test_losses(flags, causes, inside, monkeypatch):
    monkeypatch.setattr(train, "GPTConfig", Deep if causes == [2] else Small)
    args, ix = train.parse_args([*FLAGS.split(), *flags.split()]), torch.arange(9)
    data, *_ = train.load_data(args, 1)
    model, *_ = train.start(args, 1, "cat", data, Path("new"))
    seven, eight = (model.embed.weight[data.tokenizer.encode_single_token(n)][:16] for n in "78")
    assert torch.cosine_similarity(seven, eight, dim=0) > 0.9  # numbers start alike
    l_next, l_attn = train.losses(model, data, ix, args)
    logits, attentions = model(data.idx[ix])
    targets, maps = data.targets[ix], torch.stack(attentions).mean(dim=2)  # over heads
    costs = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]  # (B, T)
    assert torch.isclose(l_next, costs[targets >= 0].mean() + costs[data.answer[ix]].mean())
    expected = [re_attention_loss(maps[layers].mean(dim=0), adjacency, args.alpha, args.form)
                for layers, adjacency in ((causes, adjacency_of(data, ix)),
                                          (inside, inside_of(data, ix))) if layers]
    assert torch.isclose(l_attn, sum(expected))


def test_a_step_follows_the_gradient_of_the_whole_loss_alone(monkeypatch):
    """L = L_next + gamma L_attn, gamma falls with the share done; nothing is left from the step
    before; weights and order are the same without and with CAT; the rate falls as a cosine."""
    steps, asked, real = [], [], train.losses

    class Spy(torch.optim.AdamW):
        def step(self):
            args, group, done = asked.pop(), self.param_groups[0], len(steps) / 25
            l_next, l_attn = real(*args)
            loss = l_next + gamma_at(done - 1, 3.0, 2.0) * l_attn if done >= 1 else l_next
            weights = group["params"]
            for weight, grad in zip(weights, torch.autograd.grad(loss, weights)):
                assert torch.allclose(weight.grad, grad, rtol=1e-3, atol=1e-5)
            steps.append((args[2].tolist(), group["lr"], weights[0].sum().item(), l_next.item()))
            super().step()

    monkeypatch.setattr(train, "losses", lambda *args: asked.append(args) or real(*args))
    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    *_, last = map(json.loads, run("--steps 25 --gamma 3 --decay 2 --lr 0.01")[1])
    without, with_cat = (list(zip(*some)) for some in (steps[:25], steps[25:]))
    order, rates, weights, _ = without
    first, second = sum(order[:8], []), sum(order[8:16], [])  # 64 examples, 8 a step
    assert sorted(first) == sorted(second) == list(range(64)) and first != second
    assert [rates[0], rates[5], rates[20]] == pytest.approx([0.01, 0.00905, 0.00095], rel=0.01)
    assert with_cat[:2] == [order, rates]
    assert weights[0] == with_cat[2][0] and weights[1] != with_cat[2][1]
    assert last["loss"] == pytest.approx(with_cat[3][-1], abs=1e-3)


def test_cat_holds_out_of_distribution(learned):
    folder, out, err = learned
    lines = list(map(json.loads, err))  # progress, ten lines a run
    assert (folder / "metrics.jsonl").read_text().splitlines() == err
    assert [(line["run"], line["step"]) for line in lines] == [
        (name, step) for name in ("no-cat", "cat") for step in range(16, 161, 16)]
    without, first, with_cat = lines[9], lines[10], lines[19]
    assert {"loss", "iid", "ood"} < set(first) and with_cat["causal"] > 0.8 > without["causal"] > 0
    assert 0 < with_cat["attn_loss"] < first["attn_loss"] / 2 < without["attn_loss"]
    without, with_cat = (table(out)[name] for name in ("no-cat 1", "cat 1"))
    assert min(with_cat["iid"], with_cat["ood"]) > 0.9 and without["iid"] > without["ood"] + 0.1
    assert with_cat["changed"] < 0.1 < without["changed"] and with_cat["causal"] > 0.8
    dots = [dot for dot in ElementTree.parse(folder / "curves.svg").getroot()
            if dot.text in ("○", "●")]
    last = {dot.get("fill"): int(dot.get("y")) for dot in dots if dot.text == "●"}
    assert len(dots) == 40 and last["blue"] < last["orange"]  # with CAT it stands higher


def test_the_table_counts_greedy_answers_and_attention_by_role():
    result = table(run("--runs no-cat --steps 80 --lr 0.02")[0])["no-cat 1"]
    _, args = train.load_checkpoint("out/no-cat-1.pt")
    data, _, tested = train.load_data(args, 1)
    model, *_ = train.start(args, 1, "no-cat", data, Path("out/no-cat-1.pt"))
    tokenizer, answers, expected = data.tokenizer, {}, {}
    for split in ("iid", "redrawn", "ood"):
        answers[split], hits, looks = [], [], []
        for ids, at, role in zip(tested[split].idx, tested[split].answer, tested[split].role):
            prompt = ids[None, :at.nonzero()[0, 0] + 1]  # its last query predicts the answer
            answer = model.generate(prompt, 64, tokenizer.encode_single_token(END))
            answers[split].append(answer := tokenizer.decode(answer))
            smoking = re.search(r"Smoking: (\d+)", tokenizer.decode(ids.tolist()))[1]
            hits.append(answer == TINY.answer(int(smoking)))
            look = model(prompt)[1][-1][0, :, -1].mean(dim=0)  # (T,), over heads
            looks.append([look[role[:len(look)] == i].sum().item() for i in range(3)])
        expected[split] = mean(hits)
    del expected["redrawn"]
    expected["changed"] = mean(a != b for a, b in zip(answers["ood"], answers["redrawn"]))
    expected |= dict(zip(ROLES, map(mean, zip(*looks))))  # of "ood", the last
    assert expected["changed"] > 0
    assert {name: result[name] for name in expected} == pytest.approx(expected, abs=1e-3)


def test_scores_and_the_rows_of_several_seeds_by_hand(monkeypatch, capsys):
    answers, other = [[("7", "7"), ("8", "7"), ("High", "7"), ("9", "4")],  # (guess, right)
                      [("7", "7"), ("7", "7"), ("High", "7"), ("8", "4")]]
    monkeypatch.setattr(train, "evaluate", lambda _, data, args: (data.answers, torch.ones(4, 2)))
    ood, redrawn = (SimpleNamespace(answers=some, role=torch.zeros(4, 2))
                    for some in (answers, other))
    scores, *_ = train.test(None, {"ood": ood, "redrawn": redrawn}, None)
    assert scores == {"ood": 1 / 4, "ood constant": 3 / 4, "changed": 2 / 4}
    train.print_table([{"run": run, "seed": seed, "ood": ood} for run, seed, ood in (
        ("no-cat", 1, 0.5), ("cat", 1, 0.9), ("cat", 2, 0.8), ("cat", 3, 0.7))])
    assert " ".join(capsys.readouterr().out.split()) == (
        "run seed ood no-cat 1 0.500 cat 1 0.900 cat 2 0.800 cat 3 0.700 "
        "cat mean 0.800 cat stdev 0.100 cat lowest 0.700")


def test_the_attention_picture_is_of_a_question_whose_answers_differ(learned):
    parts = list(ElementTree.parse(learned[0] / "attention.svg").getroot())
    captions = [part.text for part in parts if " right is " in (part.text or "")]
    words = [(text.text, text.keys(), float(rect.get("fill-opacity")))
             for rect, text in pairwise(parts) if rect.get("fill-opacity")]
    words = words[len(words) // 2:]  # those of the run with CAT
    question = "".join(text for text, *_ in words)
    cause, copy = (re.search(rf"{name}: (\d+)", question)[1] for name in ("Smoking", "Fingers"))
    right, wrong = sorted(("Risk High", "Risk Low"), key=lambda a: a != TINY.answer(int(cause)))
    assert captions == [f"no-cat: {wrong}, right is {right}", f"cat: {right}, right is {right}"]
    shades = {text: shade for text, _, shade in words}
    assert shades.pop(cause) == 1 > 0.5 > max(shades.values())
    for number, style in (cause, "font-weight"), (copy, "font-style"):
        assert [text for text, styles, _ in words if style in styles] == [number]


def test_no_test_example_is_looked_at_while_training():
    for flags in "", write_files():
        args = train.parse_args([*FLAGS.split(), *flags.split()])
        data, watched, tested = train.load_data(args, 1)
        first = data.tokenizer.decode(tested["ood"].idx[0].tolist()).split(" Answer")[0]
        assert not flags or first in Path("ood.jsonl").read_text()
        T = data.idx.shape[1]  # others may be padded to more
        known, tested = ({tuple(ids[:T]) for part in some for ids in part.idx.tolist()}
                         for some in ((data, *watched.values()), (tested["iid"], tested["ood"])))
        assert len(known) >= 64 and len(tested) > 100 and not known & tested


def test_own_files_show_roles_and_without_spurious_phrases_no_ood():
    flags = "--runs cat " + write_files()
    out, err, _ = run(flags + "--seed 1 2")
    results = table(out)
    assert len(err) == 20 and results["cat 1"] != results["cat 2"] and "train" in json.loads(err[0])
    assert min(map(results["cat mean"].get, ROLES)) > 0 and "changed" in results["cat 1"]
    assert run("--eval out/cat-2.pt")[0].splitlines()[-1] in out.splitlines()
    orders, again = (train.load_data(train.parse_args(f"{flags} --orders 3".split()), 1)[0].idx
                     for _ in range(2))
    assert len(orders) == 3 * 64 and len(orders.unique(dim=0)) > 100 and orders.equal(again)
    write("words", [Example(f"A {cause} {n * '<very> & '}day. It is ", effect, ({effect: [cause]},))
                    for cause, effect in (("sunny", "good"), ("rainy", "bad")) for n in range(12)])
    for file, ood in ("train", True), ("words", False):
        out, err, _ = run(f"--runs cat --train {file}.jsonl --val 0.25 --out {file}")
        assert ("ood" in json.loads(err[0])) == ("ood" in table(out)["cat 1"]) == ood
        assert len(ElementTree.parse(f"{file}/attention.svg").getroot()) > 20


@pytest.mark.parametrize("how, causes", [*zip(EDGES[2:], ("Fingers", "Room Smoking Fingers"))])
def test_controls_have_wrong_causes_in_training_only(how, causes):
    (data, _, tested), (spans, *_) = (train.load_data(train.parse_args(
        [*FLAGS.split(), "--edges", edges]), 1) for edges in (how, "span"))
    assert spans.edges.shape[1] == 3 * 2  # name, colon, number; two tokens of the answer
    for part, expected in (data, causes), (tested["iid"], "Smoking"):
        named = {part.tokenizer.decode(ids[:edges[0][1]].tolist()).split()[-1].strip(":")
                 for ids, edges in zip(part.idx, part.edges)}  # what stands before the first key
        assert named == {*expected.split()}


def test_eval_prints_the_same_results_and_ask_answers(learned):
    folder, out, _ = learned
    again = run("--eval", folder / "cat-1.pt")[0].splitlines()
    assert len(again) == 2 and {*again} <= {*out.splitlines()}
    text = "Patient. Room: 1, Fingers: 5, Smoking: 2 Answer: "
    asked = {run("--ask", folder / "cat-1.pt", text[:end])[0] for end in (None, -1)}
    assert len(asked) == 1  # with the blanks at the end of training
    shown, answer = asked.pop().splitlines()
    assert answer == "Risk Low" and int(re.search(r"Smoking: 2\[(\d+)%\]", shown)[1]) > 50
    assert re.sub(r"\[\d+%\]", "", shown) == text


def test_killed_at_a_save_and_resumed_is_the_unbroken_run(monkeypatch):
    def replace(source, path):
        saved.append(path)
        if len(saved) == nth:
            raise OSError("killed")
        real(source, path)

    (out, err, _), whole, real = run(), files(), train.os.replace
    for nth in 1, 2, 10, 15:  # of the checkpoints written
        saved = []
        shutil.rmtree("out")
        with monkeypatch.context() as patch:
            patch.setattr(train.os, "replace", replace)
            assert run()[1:] == ([*err[:nth], "killed"], 2)
        assert run("--resume") == (out, err[nth - 1:], 0)
        assert files() == whole and len(whole) == 5


def test_a_folder_holds_the_runs_of_one_command(monkeypatch):
    run(flags := "--runs cat " + write_files())
    kept = Path("train.jsonl").read_text().splitlines(keepends=True)
    for other, lines, part in (
            ("", kept, "and --resume, or another --out"), ("--resume --seed 2", kept, FLAGS),
            ("--resume", kept[::-1], "is of other data"),
            ("--resume", ["?".join(kept[0].rsplit("Smoking", 1)), *kept[1:]], "is of other data")):
        Path("train.jsonl").write_text("".join(lines))
        before = files("out")
        _, err, code = run(flags + other)
        assert code == 2 and part in err[-1] and files("out") == before
    Path("train.jsonl").write_text("".join(kept))
    monkeypatch.setattr(train, "GPTConfig", Deep)
    assert "is of other data or sizes" in run("--eval out/cat-1.pt")[1][-1]


@pytest.mark.parametrize("change", [
    {"argv": ["--steps", 5]}, {"argv": 7}, {"argv": ["--nonsense"]}, b"",
    b"cos\nmkdir\n(S'hacked'\ntR."])  # a pickle that runs code
def test_a_file_that_is_no_checkpoint_is_refused(learned, change):
    if type(change) is dict:
        torch.save(torch.load(learned[0] / "cat-1.pt") | change, "x.pt")
    else:
        Path("x.pt").write_bytes(change)
    out, err, code = run("--ask x.pt", "Smoking: 3")
    assert (out, code) == ("", 2) and err[-1].startswith("x.pt: no checkpoint of train.py")
    assert not Path("hacked").exists()


@pytest.mark.parametrize("flags, part", [
    ("--rows 0", "--rows is 0"), ("--rows x", "'x'"), ("--alpha -1", "alpha is -1.0"),
    ("--gamma inf", "gamma is inf"), ("--layers 2", "--layers"), ("--lr -1", "-1.0"),
    ("--batch-size 0", "batch-size is 0"), ("--train a.jsonl --val 2", "--val is 2"),
    ("--train x", "--iid"), ("--train none.jsonl --val 0.5", "none.jsonl"),
    ("--device nonsense", "nonsense"), ("--lr 1e30 --steps 100", "lower --lr"),
    ("--train a.jsonl --iid a.jsonl --ood a.jsonl", "no edge")])
def test_bad_flags_are_one_line_and_change_nothing(flags, part):
    write("a", [Example("Room: 1 Answer: ", "Low")])
    Path("out").mkdir()
    Path("out/curves.svg").write_text("of an earlier run")
    before = files()
    _, err, code = run("--runs cat " + flags)
    assert code == 2 and part in err[-1] and (len(err) == 1 or part == "lower --lr")
    assert files() == before or part == "lower --lr"  # it explodes only after training began
    assert part != "no edge" or run("--runs no-cat " + flags)[2] == 0


@pytest.mark.parametrize("flags, line", [
    ("--val 3", r"train\.py: error: give --train .* none of them"),
    ("--eval none.pt", r"train\.py: none\.pt: no checkpoint of train\.py: give one of out/\*\.pt"),
    ("", r"train\.py: interrupted: go on with --resume")])
def test_errors_and_ctrl_c_are_one_line(flags, line, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    monkeypatch.setattr("data.generate", interrupted)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(train.__file__, run_name="__main__")
    assert stop.value.code == 2 and re.fullmatch(line + "\n", capsys.readouterr().err)
