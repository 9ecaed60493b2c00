"""The training script: CAT helps on a tiny game, checkpoints say the same again, and every failure is one line and leaves nothing."""
import errno
import json
import math
import os
import pickle
import platform
import random
import re
import signal
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch

import train
from data import END, GAMES, Feature, Game, dump, encode, generate

TINY = Game("tiny", causal=(Feature("Smoking", weight=1.0),), spurious=(Feature("Fingers", copies="Smoking", ratio=1.0),),
            irrelevant=(Feature("Room", 1, 999),), question="{features} Answer: ", bands=((5.5, "High"), (-math.inf, "Low")))
FLAGS = ["--game", "tiny", "--rows", "512", "--n-embd", "32", "--n-head", "2", "--block-size", "32", "--threads", "1",
         "--device", "cpu"]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Runs train.py on the tiny game, in tmp_path."""
    monkeypatch.setitem(GAMES, "tiny", TINY)
    monkeypatch.setattr(train, "TEST_ROWS", 200)
    monkeypatch.setattr(train, "STEPS", 192)
    monkeypatch.chdir(tmp_path)
    return lambda *flags: train.main([*FLAGS, *map(str, flags)])


def metrics(out="out"):
    with open(f"{out}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def test_cat_holds_out_of_distribution(tiny, capsys):
    tiny("--seed", 3)
    lines = metrics()
    without, with_cat = ([line for line in lines if line["run"] == run] for run in ("no CAT", "CAT"))
    assert [line["epoch"] for line in without] == [line["epoch"] for line in with_cat] == [1, 2, 3, 4, 5, 6]
    assert without[-1]["iid"] > 0.95 and with_cat[-1]["iid"] > 0.95
    assert with_cat[-1]["ood"] > 0.95 and without[-1]["ood"] < 0.85
    assert with_cat[-1]["ratio"] > 100 > without[-1]["ratio"]
    assert with_cat[-1]["loss"] < with_cat[0]["loss"] and with_cat[-1]["attn_loss"] < with_cat[0]["attn_loss"]
    table = capsys.readouterr().out
    row = next(line for line in table.splitlines() if line.startswith("CAT, seed 3"))
    assert f"{with_cat[-1]['iid']:.3f}" in row and f"{with_cat[-1]['ood']:.3f}" in row
    assert "majority class" in table

    tiny("--eval", "out/cat-3.pt")
    assert row in capsys.readouterr().out

    for number, answer in ((9, "High"), (2, "Low")):
        tiny("--eval", "out/cat-3.pt", "--ask", f"Room: 1, Fingers: 5, Smoking: {number}")
        shown = capsys.readouterr().out.splitlines()
        assert shown[-1] == answer
        assert int(re.search(rf"{number}\[(\d+)%\]", shown[0])[1]) > 50


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        tiny("--cat", "--epochs", 1, "--out", out, "--seed", seed)
    assert metrics("a") == metrics("b") != metrics("c")
    a, b = (torch.load(f"{out}/cat-1.pt", weights_only=True)["model"] for out in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_several_seeds_print_mean_and_spread(tiny, capsys):
    tiny("--no-cat", "--epochs", 1, "--seed", 1, 2)
    values = [line["ood"] for line in metrics()]
    assert f"mean {sum(values) / 2:.3f}, standard deviation {abs(values[0] - values[1]) / math.sqrt(2):.3f}" in capsys.readouterr().out
    assert sorted(os.listdir("out")) == ["attention.svg", "curves.svg", "metrics.jsonl", "no-cat-1.pt", "no-cat-2.pt"]


@pytest.mark.parametrize("flags", [("--loss", "answer"), ("--layers", "all"), ("--layers", "0,1"), ("--form", "hinge", "--alpha", 5),
                                   ("--edges", "span"), ("--tokenizer", "digits"), ("--n-layer", 1), ("--decay", 3),
                                   ("--weight-decay", 50), ("--init-std", 0.02), ("--orders", 3)])
def test_every_setting_trains(tiny, flags):
    tiny("--rows", 64, "--epochs", 2, *flags)
    lines = metrics()
    assert lines[1]["loss"] < lines[0]["loss"] and lines[3]["loss"] < lines[2]["loss"]
    tiny("--rows", 64, "--epochs", 2, "--out", "default")
    assert [line["ratio"] for line in metrics("default")] != [line["ratio"] for line in lines]  # the flag does something


def test_train_validation_and_tests_share_no_row(tiny):
    splits = train.load_examples(train.parse_args(FLAGS), 1)
    rows = [frozenset(example.input.removesuffix(" Answer: ").split(", ")) for examples in splits.values() for example in examples]
    assert {name: len(examples) for name, examples in splits.items()} == {"train": 512, "val": 200, "iid": 200, "ood": 200}
    assert len(set(rows)) == len(rows)


def test_answer_loss_is_the_loss_of_the_answer_alone(tiny):
    examples = generate(TINY, 8)
    args = train.parse_args([*FLAGS, "--loss", "answer"])
    tokenizer = train.load_tokenizer(args, examples)
    data = encode(examples, tokenizer, 32)
    model, _ = train.make_model(args, tokenizer.n_vocab, 0)
    logp = model(data.idx)[0].log_softmax(-1)
    expected = [-logp[n, t, data.targets[n, t]] for n, t in data.answer.nonzero().tolist()]
    assert torch.allclose(train.losses(model, data, torch.arange(8), args, False)[0], sum(expected) / len(expected))


@pytest.mark.parametrize("flags, part", [
    (["--rows", "0"], "--rows"), (["--rows", "x"], "'x'"), (["--lr", "0"], "above 0"), (["--lr", "nan"], "'nan'"),
    (["--alpha", "-1"], "--alpha"), (["--gamma", "inf"], "--gamma"), (["--form", "hing"], "hinge"), (["--layers", "2"], "--layers"),
    (["--layers", "first"], "first"), (["--layers", ""], "--layers"), (["--train", "x"], "--iid"), (["--ask", "x"], "--eval"),
    (["--n-embd", "30"], "n_embd is 30"), (["--block-size", "3"], "block_size 3"), (["--eval", "none.pt"], "none.pt"),
    (["--train", "a", "--iid", "b", "--ood", "c"], "a: no such file"), (["--lr", "1e30"], "lower --lr"), (["--rows", "20000"], "too few"),
    (["--nonsense"], "--nonsense"), (["--bench", "--resume"], "three different jobs"), (["--gamma", "1e38", "--cat"], "lower --lr"),
    (["--batch-size", "9" * 400], "--batch-size"), (["--epochs", "9" * 400], "--epochs"), (["--seed", "9" * 40], "--seed"),
    (["--layers", "9" * 5000], "--layers"), (["--tokenizer", "gpt2"], "--tokenizer words"),
    (["--device", "mps" if torch.cuda.is_available() else "cuda"], "--device cpu")])
def test_bad_flags_are_one_line_and_leave_nothing(tiny, capsys, monkeypatch, flags, part):
    def no_network(name):
        raise ConnectionError

    monkeypatch.setattr(train.tiktoken, "get_encoding", no_network)
    with pytest.raises(SystemExit) as stop:
        tiny(*([] if "--cat" in flags else ["--no-cat"]), "--rows", 32, *flags)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert stop.value.code == 2 and len(error) == 1 and part in error[0]
    left = [name for _, _, names in os.walk(".") for name in names]
    assert left == (["metrics.jsonl"] if "lower --lr" in part else [])  # a loss that explodes has metrics behind it


def test_epochs_default_to_a_number_of_steps(tiny, monkeypatch):
    monkeypatch.setattr(train, "STEPS", 12)
    for rows, size, epochs in ((64, 16, 3), (20, 16, 6), (20, 1000, 12), (64, 1, 1)):
        tiny("--no-cat", "--rows", rows, "--batch-size", size)
        assert len(metrics()) == epochs


def test_a_file_that_is_no_checkpoint(tiny, capsys):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, ("hacked",)

    tiny("--cat", "--epochs", 1, "--rows", 32)
    whole = open("out/cat-1.pt", "rb").read()
    wrong = torch.load("out/cat-1.pt", weights_only=True)
    wrong["config"]["n_embd"] = 64
    torch.save(wrong, "wrong.pt")
    for name, content in (("cut.pt", whole[:5000]), ("text.pt", b"hello"), ("empty.pt", b""), ("pickle.pt", pickle.dumps(Hostile(), 2)),
                          ("wrong.pt", None)):
        if content is not None:
            open(name, "wb").write(content)
        with pytest.raises(SystemExit) as stop:
            tiny("--eval", name)
        error = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and error.startswith(f"train.py: {name}: not a checkpoint")
    assert not os.path.exists("hacked")


def test_cat_without_any_edge_is_refused(tiny, capsys):
    with open("rows.jsonl", "w") as file:
        file.write('{"input": "Room: 1 Answer: ", "target": "Low"}\n')
    files = ["--train", "rows.jsonl", "--iid", "rows.jsonl", "--ood", "rows.jsonl"]
    with pytest.raises(SystemExit):
        tiny("--cat", *files)
    assert "rows.jsonl: no row has an edge" in capsys.readouterr().err and not os.path.exists("out")
    tiny("--no-cat", "--epochs", 1, *files)
    assert "majority class" in capsys.readouterr().out


def test_trains_on_files_and_on_a_held_out_share(tiny, capsys):
    for name, ood, seed in (("train", False, 1), ("iid", False, 2), ("ood", True, 3)):
        with open(f"{name}.jsonl", "w") as file:
            file.writelines(dump(generate(TINY, 400, ood, seed, "span")))
    tiny("--cat", "--train", "train.jsonl", "--iid", "iid.jsonl", "--ood", "ood.jsonl", "--epochs", 8)
    lines = metrics()
    assert "ood" not in lines[0] and lines[-1]["iid"] > 0.95  # the ood file is looked at once, after training
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("CAT, seed 1"))
    assert float(row.split()[4]) > 0.95
    tiny("--cat", "--train", "train.jsonl", "--val", 0.25, "--epochs", 8)
    assert "CAT, seed 1" in capsys.readouterr().out
    tiny("--eval", "out/cat-1.pt")
    for flags in (["--val", 0.5], ["--train", "train.jsonl", "--val", 0.5, "--ood", "ood.jsonl"], ["--train", "train.jsonl"]):
        with pytest.raises(SystemExit):
            tiny(*flags)
        assert "--val" in capsys.readouterr().err


def test_mean_error_of_numbers_of_one_token():
    tokenizer = train.build_tokenizer([])
    answer = lambda text: tokenizer.encode(text + END, allowed_special="all")
    assert train.mean_error([(answer("7"), answer("10")), (answer("20"), answer("19"))], tokenizer) == 2
    assert train.mean_error([(answer("x"), answer("10"))], tokenizer) is None
    assert train.mean_error([(answer("1000"), answer("1000"))], tokenizer) is None


def test_help_names_every_flag_in_one_line_with_its_default(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    text = capsys.readouterr().out
    for name, value in vars(train.parse_args([])).items():
        if name not in ("runs", "supervised", "device") and value not in (None, False):
            line = next(line for line in text.splitlines() if line.strip().startswith("--" + name.replace("_", "-") + " "))
            assert f"(default {value})" in line


KILLER = """
import os, random, signal, sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch, train
from data import GAMES
from test_train import FLAGS, TINY

GAMES["tiny"], train.TEST_ROWS, train.SAVE_EVERY = TINY, 16, 2
flags = [*FLAGS, "--rows", "64", "--epochs", "3"]
train.main([*flags, "--out", "whole"])


def trace_lines(lines):
    def trace(frame, event, arg):  # counts the lines run in train.py and data.py from the first step on, and kills at the last
        nonlocal lines
        if event == "line":
            lines -= 1
            if lines == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    return lambda frame, event, arg: trace if frame.f_code.co_name in ("train", "step", "losses", "save") else None


rng, killed, reached = random.Random(0), 0, set()
while killed < 20:
    child = os.fork()
    if child == 0:
        sys.settrace(trace_lines(rng.randrange(1, 600)))
        train.main([*flags, "--out", "cut", "--resume"])
        os._exit(0)
    rng.random()
    if os.waitpid(child, 0)[1] == signal.SIGKILL:
        killed += 1
        if os.path.exists("cut/cat-1.pt"):
            reached.add(torch.load("cut/cat-1.pt")["progress"][0])
    else:  # it came to the end: start again
        for name in os.listdir("cut"):
            os.rename(f"cut/{{name}}", f"cut-{{killed}}-{{name}}")
assert any(0 < done < 12 for done in reached), reached  # some went on from the middle of a run
train.main([*flags, "--out", "cut", "--resume"])
"""


def test_killed_at_any_line_and_resumed_is_the_same_run(tmp_path):
    tests = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run([sys.executable, "-c", KILLER.format(tests=tests, root=os.path.dirname(tests))], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("cat-1.pt", "no-cat-1.pt"):
        whole, cut = (torch.load(tmp_path / out / name, weights_only=True)["model"] for out in ("whole", "cut"))
        assert all(torch.equal(whole[key], cut[key]) for key in whole)
    for name in ("metrics.jsonl", "attention.svg", "curves.svg"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_ctrl_c_saves_and_resume_goes_on(tiny, capsys, monkeypatch):
    flags = ["--cat", "--rows", 64, "--epochs", 3]
    tiny(*flags, "--out", "whole")
    steps, step = [], train.step

    def step_and_interrupt(*args):
        steps.append(1)
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(train, "step", step_and_interrupt)
    with pytest.raises(SystemExit) as stop:
        tiny(*flags)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 130 and "step 6 of 12" in error and "--resume" in error
    tiny(*flags, "--resume")
    assert len(steps) == 12 and metrics() == metrics("whole")
    with pytest.raises(SystemExit) as stop:
        tiny(*flags, "--resume", "--lr", 0.1)
    assert stop.value.code == 2 and "--lr is 0.1, but out/cat-1.pt was begun with 0.004" in capsys.readouterr().err
    assert metrics() == metrics("whole")
    tiny(*flags, "--resume")  # nothing is left to do
    assert len(steps) == 12 and metrics() == metrics("whole")


def test_a_full_disk_leaves_the_last_checkpoint(tiny, capsys, monkeypatch):
    tiny("--cat", "--rows", 32, "--epochs", 1)
    before = open("out/cat-1.pt", "rb").read()

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        tiny("--cat", "--rows", 32, "--epochs", 2)
    assert stop.value.code == 2 and "No space left on device: 'out/metrics.jsonl': check" in capsys.readouterr().err.splitlines()[-1]
    assert open("out/cat-1.pt", "rb").read() == before and not os.path.exists("out/cat-1.pt.tmp")


def test_pictures(tiny, capsys):
    tiny("--rows", 64, "--epochs", 2, "--seed", 1, 2)
    assert capsys.readouterr().out.splitlines()[-2:] == ["wrote out/attention.svg", "wrote out/curves.svg"]
    space = "{http://www.w3.org/2000/svg}"
    picture = ElementTree.parse("out/attention.svg").getroot()
    words = [text.text for text in picture.iter(space + "text")]
    assert "without CAT" in words and "with CAT" in words
    assert sum(word.endswith((": right", ": wrong")) for word in words) == 2
    shares = [int(word.split("%")[0]) for word in words if "% on " in word]
    assert len(shares) == 8 and abs(sum(shares) - 200) <= 4
    dashes = [path.get("stroke-dasharray") for path in picture.iter(space + "path")]
    assert dashes.count("none") == dashes.count("3 2") == 3  # the legend and one number a run
    curves = ElementTree.parse("out/curves.svg").getroot()
    words = [text.text for text in curves.iter(space + "text")]
    final = [line for line in metrics() if line["epoch"] == 2]
    for run, name in (("no CAT", "without CAT"), ("CAT", "with CAT")):
        mean = sum(line["ood"] for line in final if line["run"] == run) / 2
        assert f"{name}, OOD {mean:.2f}" in words
    assert any(word.startswith("majority class") for word in words) and {"accuracy", "epoch"} <= set(words)
    assert len(list(curves.iter(space + "polygon"))) == 4  # a band over the seeds for each line


def test_pictures_hold_any_text():
    text = "<&\"'\x00\x1b￾é日"
    assert ElementTree.fromstring(train.svg(10, [train.svg_text(1, 2, text)]))[1].text == "<&\"'   é日"


def test_out_of_memory_is_one_line(tiny, capsys, monkeypatch):
    monkeypatch.setattr(train, "step", lambda *args: torch.empty(2 ** 60))  # more than any machine has
    with pytest.raises(SystemExit) as stop:
        tiny("--rows", 32)
    assert stop.value.code == 2 and "lower --batch-size" in capsys.readouterr().err.splitlines()[-1]


def test_random_flags_and_random_files_end_in_0_or_2(tiny, capsys, monkeypatch):
    monkeypatch.setattr(train, "STEPS", 2)
    monkeypatch.setattr(train, "TEST_ROWS", 8)
    monkeypatch.setattr(train, "PAIRS", 2)
    monkeypatch.setattr(train.tiktoken, "get_encoding", lambda name: 1 / 0)
    rng, codes = random.Random(0), []
    values = ["0", "1", "2", "3", "-1", "0.5", "1e9", "1e400", "nan", "", "x", "last", "0,1", ",", "hinge", "tiny", "STG", "digits", "gpt2",
              "cpu", "answer", "span", "rows.jsonl", "noise.jsonl", "out/cat-1.pt", ".", "é\x00", "9" * 400]
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    flags = re.findall(r"^ +(--[a-z-]+)", capsys.readouterr().out, re.M)
    assert len(flags) > 30
    good = "".join(dump(generate(TINY, 16))).encode()
    for _ in range(150):
        with open("noise.jsonl", "wb") as file:
            cut = rng.randrange(len(good))
            file.write(rng.choice((rng.randbytes(200), good[:cut], good[:cut] + rng.randbytes(3) + good[cut + 3:])))
        with open("rows.jsonl", "wb") as file:
            file.write(good)
        chosen = ["--rows", "16", "--epochs", "1"] + rng.choice(([], ["--train", "noise.jsonl", "--val", "0.5"],
                                                               ["--eval", "noise.jsonl"], ["--eval", "out/cat-1.pt"]))
        for flag in rng.sample(flags, rng.randrange(4)):
            chosen += [flag] if rng.random() < 0.2 else [flag, rng.choice(values)]
        try:
            tiny(*chosen)
            codes.append(0)
        except SystemExit as stop:
            codes.append(stop.code)
            error = [line for line in capsys.readouterr().err.splitlines() if line and "|" not in line]
            assert stop.code in (0, 2) and len(error) == (stop.code == 2), (chosen, error)  # help is on standard output
    assert codes.count(0) > 15 and codes.count(2) > 15


def test_attention_picture_shows_the_first_row_that_only_cat_gets_right():
    examples = generate(TINY, 4, seed=1)
    tokenizer = train.build_tokenizer(e.input + e.target for e in examples)
    data = encode(examples, tokenizer, 32)
    high, low = tokenizer.encode("High"), tokenizer.encode("Low")
    rows = [{"run": run, "looks": torch.zeros(4, 32), "answers": [(guess, high) for guess in guesses]}
            for run, guesses in (("no CAT", (high, low, low, low)), ("CAT", (high, low, high, high)))]
    assert "OOD row 3, High: the first that only" in train.attention_svg(rows, data, tokenizer)
    assert "OOD row 1, High<" in train.attention_svg(rows[1:], data, tokenizer)


def test_a_step_that_is_not_finite_leaves_the_weights(tiny):
    args, examples = train.parse_args(FLAGS), generate(TINY, 8)
    tokenizer = train.load_tokenizer(args, examples)
    model, optimizer = train.make_model(args, tokenizer.n_vocab, 0)
    before = [weight.clone() for weight in model.parameters()]
    data = encode(examples, tokenizer, 32)
    train.step(model, optimizer, data, torch.arange(8), args, math.inf, 0.1, True)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters()))
    train.step(model, optimizer, data, torch.arange(8), args, 0.1, 0.1, True)
    assert not any(torch.equal(*pair) for pair in zip(before, model.parameters()))


def test_val_holds_rows_out_and_shuffles_only_labelled_ones(tiny, tmp_path):
    rows = generate(TINY, 40, edges="span")
    (tmp_path / "rows.jsonl").write_text("".join(dump(rows)) + '{"input": "Room: 8, Fingers: 3 Answer: ", "target": "Low"}\n' * 10)
    flags = ["--train", "rows.jsonl", "--val", "0.5"]
    splits = train.load_splits(train.parse_args(flags), 1)
    assert {name: len(examples) for name, examples in splits.items() if name != "ood"} == {"train": 25, "iid": 25}
    assert not {e.source for e in splits["train"]} & {e.source for e in splits["iid"]}
    assert [e.source for e in splits["ood"]] == [e.source for e in splits["iid"] if e.edges] and 15 < len(splits["ood"]) < 25
    more = train.load_examples(train.parse_args([*flags, "--orders", "3"]), 1)["train"]
    assert more[:25] == splits["train"] and [e.source for e in more] == 3 * [e.source for e in splits["train"]]
    assert more[25:50] != more[:25] != more[50:] != more[25:50]
    (tmp_path / "rows.jsonl").write_text("".join(dump(rows[:1])))
    with pytest.raises(ValueError, match="rows.jsonl: too few labelled rows for --val 0.5"):
        train.read_once.cache_clear()
        train.load_splits(train.parse_args(flags), 1)


def test_bench(tiny, capsys, monkeypatch):
    kept = []
    monkeypatch.setattr(train, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(train, "PAIRS", 5)
    tiny("--bench", "--batch-size", 2)
    assert kept
    lines = capsys.readouterr().out.splitlines()
    assert "ratio" in lines[0] and "%" in lines[1] and [line.split(": ")[1] for line in lines[2:]] == ["1 MiB", "4 MiB", "16 MiB", "64 MiB"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back in this way")
def test_freed_memory_is_kept():
    code = """if True:
        import resource, torch, train
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(20):
                held = [torch.ones(2 ** 20) for _ in range(16)]
                del held
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        before = faults()
        train.keep_freed_memory()
        faults()  # takes the memory that is then kept
        print(before, faults())"""
    run = subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(train.__file__), check=True, capture_output=True, text=True)
    before, after = map(int, run.stdout.split())
    assert after < before / 10


def test_the_labels_of_the_curves_stay_in_the_picture():
    for accuracy in (0.0, 0.5, 1.0):
        rows = [{"run": run, "iid": accuracy, "ood": accuracy, "lines": [{"epoch": 1, "iid": accuracy}]} for run in ("no CAT", "CAT")]
        heights = [float(text.get("y")) for text in ElementTree.fromstring(train.curves_svg(rows, accuracy)) if text.get("x") == "602.0"]
        assert len(heights) == 5 and 15 < min(heights) and max(heights) < 395
        assert all(b - a >= 17 for a, b in zip(sorted(heights), sorted(heights)[1:]))
