"""The training script: what a step does, what the table measures, and what is left behind."""
import io
import json
import math
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import mean, stdev
from xml.etree import ElementTree

import pytest
import torch

import train
from cat import gamma_at, re_attention_loss
from data import (END, GAMES, ROLES, Example, Feature, Game, adjacency_of, build_tokenizer, dump,
                  encode, generate, inside_of, redraw_spurious)

SHAPE = dict(causal=(Feature("Smoking", weight=1.0),), irrelevant=(Feature("Room", 1, 999),),
             spurious=(Feature("Fingers", copies="Smoking", ratio=1.0),),
             question="Patient. {features} Answer: ")
TINY = Game("tiny", bands=((5.5, "High"), (-math.inf, "Low")), **SHAPE)
FLAGS = ("--game tiny --rows 64 --n-embd 16 --n-head 2 --batch-size 8 --steps 10 --threads 1 "
         "--device cpu").split()
LEARNED = []


@pytest.fixture(autouse=True)
def tiny_game_in_own_folder(monkeypatch, tmp_path):
    monkeypatch.setitem(GAMES, "tiny", TINY)
    monkeypatch.setattr(train, "TEST", 100)
    monkeypatch.setattr(train, "WATCH", 20)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def learned(tmp_path_factory):
    """The folder of a training of both runs that learned the game, and what it printed."""
    if not LEARNED:
        folder = tmp_path_factory.mktemp("learned")
        more = "--rows 512 --n-embd 32 --steps 160 --batch-size 16".split()
        LEARNED[:] = folder, *run(*more, "--out", folder)[:2]
    return LEARNED


def run(*more):
    """train.py with FLAGS and more: (output, lines of standard error, exit code)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            train.main([*FLAGS, *map(str, more)])
        except SystemExit as stop:
            code = stop.code
    return out.getvalue(), err.getvalue().splitlines(), code


def table(out):
    """{run: {column: number}} of a printed table."""
    header, *lines = (re.split(r"\s{2,}", line.strip())
                      for line in out[out.index("run  "):].splitlines())
    return {run: dict(zip(header[1:], map(float, cells))) for run, *cells in lines}


def files(folder="."):
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def write_files():
    """train, iid and ood.jsonl of the tiny game; the flags that name them."""
    paths = {name: Path(f"{name}.jsonl").absolute() for name in ("train", "iid", "ood")}
    for seed, (name, path) in enumerate(paths.items()):
        path.write_text("".join(map(dump, generate(TINY, 64, name == "ood", seed))))
    return [str(word) for name, path in paths.items() for word in (f"--{name}", path)]


def datasets(game=TINY):
    """The Datasets of a game that the table needs, of 64 examples."""
    examples = {name: generate(game, 64, name == "ood", seed)
                for name, seed in (("train", 1), ("iid", 2), ("ood", 2))}
    examples["redrawn"] = redraw_spurious(examples["ood"], 1)
    tokenizer = build_tokenizer(e.input + e.target for part in examples.values() for e in part)
    return {name: encode(part, tokenizer) for name, part in examples.items()}


def reader(tokenizer, name, answer, end=END):
    """A model that sees only the number of one feature, and looks at it to answer."""
    def model(idx):
        B, T = idx.shape
        logits, attn = torch.zeros(B, T, tokenizer.n_vocab), torch.zeros(B, 1, T, T)
        for b, ids in enumerate(idx.tolist()):
            pieces = [tokenizer.decode([i]).strip() for i in ids]
            at, after = pieces.index(name) + 2, pieces.index("Answer") + 1
            attn[b, 0, after, at] = 1
            logits[b, :, tokenizer.encode_ordinary(answer(int(pieces[at])))[0]] = 1
            logits[b, after + 1:, tokenizer.encode(end, allowed_special="all")[0]] = 2
        return logits, [attn]
    return model


@pytest.mark.parametrize("more, next_terms, causes, inside", [
    ("", "all answer", [1], [0]), ("--loss all", "all", [1], [0]),
    ("--loss answer", "answer", [1], [0]), ("--open-path", "all answer", [1], []),
    ("--layers 0", "all answer", [0], []), ("--layers 0 1", "all answer", [0, 1], [0]),
    ("--layers 2 --n-layer 3 --form log", "all answer", [2], [0, 1])])
def test_losses(more, next_terms, causes, inside):
    args, part = train.parse_args([*FLAGS, *more.split()]), datasets()["train"]
    torch.manual_seed(0)
    ix, sizes = torch.tensor([3, 0, 9]), (part.tokenizer.n_vocab, part.idx.shape[1], args.n_layer)
    model = train.GPT(train.GPTConfig(*sizes))
    l_next, l_attn = train.losses(model, part, ix, args)
    logits, attentions = model(part.idx[ix])
    targets, maps = part.targets[ix], torch.stack(attentions).mean(dim=2)  # over heads
    costs = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]  # (B, T)
    length, place = (targets >= 0).sum(dim=1)[:, None], torch.arange(targets.shape[1])
    tokens = {"all": place < length, "answer": (place < length) & (place >= length - 2)}
    assert torch.isclose(l_next, sum(costs[tokens[term]].mean() for term in next_terms.split()))
    expected = [re_attention_loss(maps[layers].mean(dim=0), adjacency, args.alpha, args.form)
                for layers, adjacency in ((causes, adjacency_of(part, ix)),
                                          (inside, inside_of(part, ix))) if layers]
    assert torch.isclose(l_attn, sum(expected))


def test_one_function_says_what_is_supervised(monkeypatch, learned):
    """Who changes `read_out` changes the loss, the table and --ask at once."""
    def first_key(attentions, args):
        B, _, T, _ = attentions[0].shape
        return torch.eye(T)[:1].expand(B, T, T)

    monkeypatch.setattr(train, "read_out", first_key)
    part, args = datasets()["ood"], train.parse_args([*FLAGS, "--open-path"])
    model = train.GPT(train.GPTConfig(part.tokenizer.n_vocab, part.idx.shape[1]))
    _, l_attn = train.losses(model, part, torch.arange(4), args)
    assert l_attn > math.log(args.alpha * 1e8 / part.idx.shape[1])  # no cause has any attention
    assert train.evaluate(model, part, args)[1][:, 0].eq(1).all()
    out, _, _ = run("--eval", learned[0] / "cat-1.pt", "--ask", "Smoking: 1")
    assert out.startswith("Patient[100%]") and out.count("%") == 1


def test_a_step_follows_the_gradient_of_the_whole_loss_alone(monkeypatch):
    """L = L_next + gamma L_attn, gamma falls with the share done; nothing is left from the step
    before; weights and order are the same without and with CAT; the rate falls as a cosine."""
    seen, steps, real = [], {"no-cat": [], "cat": []}, train.losses

    def losses(*args):
        seen[:] = args
        return real(*args)

    class Spy(torch.optim.AdamW):
        def step(self):
            name = "cat" if len(steps["no-cat"]) == 25 else "no-cat"
            gamma = gamma_at(len(steps[name]) / 25, 3.0, 2.0) if name == "cat" else 0
            (l_next, l_attn), (group,) = real(*seen), self.param_groups
            grads = torch.autograd.grad(l_next + gamma * l_attn, group["params"])
            assert all(torch.allclose(weight.grad, grad, rtol=1e-3, atol=1e-5)
                       for weight, grad in zip(group["params"], grads))
            steps[name].append((seen[2].tolist(), group["lr"], group["params"][0].sum().item(),
                                l_next.item()))
            super().step()

    monkeypatch.setattr(train, "losses", losses)
    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    lines = [json.loads(line) for line in
             run("--steps", 25, "--gamma", 3, "--decay", 2, "--lr", 0.01)[1]]
    for name in steps:
        order, rates, _, l_next = zip(*steps[name])
        first, second = sum(order[:8], []), sum(order[8:16], [])  # 64 examples, 8 a step
        assert sorted(first) == sorted(second) == list(range(64)) and first != second
        assert [rates[0], rates[5], rates[20]] == pytest.approx([0.01, 0.00905, 0.00095], rel=0.01)
        ends = [line["step"] for line in lines if line["run"] == name]
        assert ends == [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]  # a line each tenth, of what was since
        assert [line["loss"] for line in lines if line["run"] == name] == pytest.approx(
            [mean(l_next[start:end]) for start, end in zip([0, *ends], ends)], abs=1e-3)
    without, with_cat = steps.values()
    assert [step[0] for step in without] == [step[0] for step in with_cat]
    assert without[0][2] == with_cat[0][2] and without[1][2] != with_cat[1][2]


def test_cat_holds_out_of_distribution(learned):
    folder, out, err = learned
    lines = [json.loads(line) for line in err]  # progress
    assert Path(folder, "metrics.jsonl").read_text().splitlines() == err
    assert [(line["run"], line["step"]) for line in lines] == [
        (name, step) for name in ("no-cat", "cat") for step in range(16, 161, 16)]
    fields = {"run", "seed", "step", "loss", "attn_loss", "ratio", "iid", "ood"}
    assert all(set(line) == fields and line["attn_loss"] > 0 for line in lines)
    without, with_cat = lines[9], lines[19]
    assert with_cat["ratio"] > 20 > 5 > without["ratio"] > 0
    assert with_cat["attn_loss"] < lines[10]["attn_loss"] / 2 < without["attn_loss"]
    without, with_cat = (table(out)[name] for name in ("no-cat, seed 1", "cat, seed 1"))
    assert min(with_cat["iid"], with_cat["ood"]) > 0.9 and without["iid"] > without["ood"] + 0.1
    assert with_cat["changed"] < 0.1 and with_cat["causal"] > 0.8


def test_changed_and_roles_tell_what_a_model_reads():
    def said_by(name, part):  # the answers that the numbers of one feature give
        texts = map(part.tokenizer.decode, part.idx.tolist())
        return [TINY.answer(int(re.search(rf"{name}: (\d+)", text)[1])) for text in texts]

    parts, args = datasets(), train.parse_args(FLAGS)
    tokenizer, ood = parts["ood"].tokenizer, parts["ood"]
    line, constant, _ = train.test("x", reader(tokenizer, "Smoking", TINY.answer), parts, args)
    roles = dict.fromkeys(ROLES, 0) | {"causal": 1}
    assert line == {"run": "x", "iid": 1, "ood": 1, "changed": 0} | roles
    right, read = said_by("Smoking", ood), said_by("Fingers", ood)
    assert constant["ood"] == max(right.count("High"), right.count("Low")) / 64
    line, _, (answers, look) = train.test(
        "x", reader(tokenizer, "Fingers", TINY.answer), parts, args)
    assert line["iid"] == line["spurious"] == 1 and line["causal"] == 0
    assert line["ood"] == mean(a == b for a, b in zip(read, right)) < 0.8
    redrawn = said_by("Fingers", parts["redrawn"])
    assert line["changed"] == mean(a != b for a, b in zip(read, redrawn)) > 0.3
    assert answers == list(map(list, zip(read, right))) and look.shape == ood.idx.shape
    endless = reader(tokenizer, "Smoking", TINY.answer, end="!")  # right, but not to its end
    assert not any(a == b for a, b in train.evaluate(endless, ood, args)[0])


def test_number_games_are_scored_by_distance_too():
    parts = datasets(Game("numbers", scale=(0, 100), **SHAPE))
    too_low = reader(parts["ood"].tokenizer, "Smoking", lambda number: str(number - number % 3))
    line, _, (answers, _) = train.test("x", too_low, parts, train.parse_args(FLAGS))
    errors = [int(right) % 3 for _, right in answers]
    exact, within_1 = (mean(error <= most for error in errors) for most in (0, 1))
    assert (line["ood"], line["ood +-1"], line["ood error"]) == (exact, within_1, mean(errors))


def test_several_seeds_print_mean_deviation_and_lowest():
    results = table(run("--no-cat", "--seed", 1, 2, 3)[0])
    seeds = [results.pop(f"no-cat, seed {seed}") for seed in (1, 2, 3)]
    assert len({tuple(seed.values()) for seed in seeds}) == 3
    for column in ("iid", "ood", "changed", "causal"):
        values = [seed[column] for seed in seeds]
        for name, f in (("mean", mean), ("deviation", stdev), ("lowest", min)):
            if name != "lowest" or column in ("iid", "ood"):  # else it would show the best
                assert results[f"no-cat, {name}"][column] == pytest.approx(f(values), abs=2e-3)


@pytest.mark.parametrize("source, watched", [("game", {"iid", "ood"}), ("files", {"train"})])
def test_no_test_example_is_looked_at_while_training(monkeypatch, source, watched):
    seen, looked, real = set(), train.GPT.forward, train.test

    def forward(model, idx):
        seen.update(map(tuple, idx.tolist()))
        return looked(model, idx)

    def test(name, model, parts, args):
        tested = {tuple(ids) for split in ("iid", "ood") for ids in parts[split].idx.tolist()}
        assert len(tested) > 100 and len(seen) >= 64 and not tested & seen
        return real(name, model, parts, args)

    monkeypatch.setattr(train.GPT, "forward", forward)
    monkeypatch.setattr(train, "test", test)
    _, err, code = run("--cat", *([] if source == "game" else write_files()))
    assert code == 0 and {"iid", "ood", "train"} & set(json.loads(err[0])) == watched


def test_own_files_show_roles_and_without_numbers_no_ood():
    more = write_files()
    result = table(run("--cat", *more)[0])["cat, seed 1"]
    assert min(map(result.get, ROLES)) > 0 and "changed" in result
    out, err, _ = run("--cat", *more[:2], "--val", 0.25, "--out", "val")
    assert "ood" in table(out)["cat, seed 1"] and "ood" in json.loads(err[0])
    orders = train.load_data(train.parse_args([*FLAGS, *more, "--orders", "3"]), 1)["train"]
    assert len(orders.idx) == 3 * 64 and 100 < len(orders.idx.unique(dim=0)) <= 3 * 64
    path = Path("words.jsonl").absolute()
    path.write_text("".join(
        dump(Example(f"A {word} {n * 'very '}day. Sentiment: ", answer, ({answer: [word]},)))
        for word, answer in (("sunny", "good"), ("rainy", "bad")) for n in range(12)))
    out, err, _ = run("--cat", "--train", path, "--val", 0.5, "--out", "words")
    assert "ood" not in json.loads(err[0]) and "ood" not in table(out)["cat, seed 1"]


def test_eval_prints_the_same_results_and_ask_answers(learned):
    folder, out, _ = learned
    again = run("--eval", folder / "cat-1.pt")[0].splitlines()
    assert len(again) == 3 and set(again) <= set(out.splitlines())
    for number in (9, 2):
        text = f"Room: 1, Fingers: 5, Smoking: {number}"
        asked = {run("--eval", folder / "cat-1.pt", "--ask", before + text + after)[0]
                 for before in ("", "Patient. ") for after in ("", " Answer:", " Answer: ")}
        assert len(asked) == 1  # what all questions begin and end with need not be typed
        shown, answer = asked.pop().splitlines()
        assert answer == TINY.answer(number)
        assert int(re.search(rf"Smoking: {number}\[(\d+)%\]", shown)[1]) > 50
        assert re.sub(r"\[\d+%\]", "", shown) == f"Patient. {text} Answer: "
    torch.save(torch.load(folder / "cat-1.pt") | {"answers": ["Middle"]}, "other.pt")
    assert "Low (no training target)" in run("--eval", "other.pt", "--ask", "Smoking: 2")[0]
    _, err, code = run("--eval", folder / "cat-1.pt", "--ask", "Smoking " * 100)
    assert code == 2 and len(err) == 1 and "shorten" in err[0]


def test_killed_at_a_save_and_resumed_is_the_unbroken_run(monkeypatch):
    real, saved = train.save, []

    def save(path, content):
        saved.append(path)
        if len(saved) == nth:
            raise OSError("killed")
        real(path, content)

    (out, err, _), whole = run(), files()
    for nth in (2, 9, 20, 25, 41):  # metrics and a checkpoint ten times, twice, then the pictures
        saved.clear()
        monkeypatch.setattr(train, "save", save)
        assert run()[1:] == ([*err[:(nth + 1) // 2], "train.py: killed"], 2)
        monkeypatch.setattr(train, "save", real)
        assert run("--resume") == (out, err[(nth - 1) // 2:], 0)
        assert files() == whole and len(whole) == 5


def test_a_folder_holds_the_runs_of_one_command(monkeypatch):
    more, left = write_files(), []
    run(*more)
    before = files("out")
    for other, part in (("--resume --lr 0.1", "begun with other data"),
                        ("--resume --threads 2", " ".join(more)),
                        ("--no-cat", "cat-1.pt is of another command"), ("--resume", "begun")):
        if other == "--resume":  # all flags are the same, but not the file
            Path("train.jsonl").write_text("".join(map(dump, generate(TINY, 64, seed=4))))
            train.load.cache_clear()
        _, err, code = run(*more, *other.split())
        assert code == 2 and len(err) == 1 and part in err[0] and files("out") == before
    monkeypatch.setattr(train, "train", lambda *_: left.append(files("out")) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()
    assert left == [{}]  # a fresh start takes away what it will write, before the first step


@pytest.mark.parametrize("change", [
    {"argv": ["--steps", 5]}, {"argv": ["--nonsense"]}, {"argv": 7}, {"steps_done": "3"},
    {"steps_done": 161}, {"steps_done": 0}, {"tokenizer": ["a"]}, {"tokenizer": [7]},
    {"tokenizer": slice(-1)}, {"sizes": [300, 20, 2, 2, 17]}, {"sizes": [9]}, {"model": {}},
    b"", b"hello", slice(5000), slice(-20), b"cos\nmkdir\n(S'hacked'\ntR."])  # it would run code
def test_a_file_that_is_no_checkpoint_is_refused(learned, change):
    whole = (learned[0] / "cat-1.pt").read_bytes()
    if type(change) is dict:
        state = torch.load(io.BytesIO(whole), weights_only=True)
        for name, value in change.items():
            state[name] = state[name][value] if type(value) is slice else value
        torch.save(state, "x.pt")
    else:
        Path("x.pt").write_bytes(whole[change] if type(change) is slice else change)
    out, err, code = run("--eval", "x.pt", "--ask", "Smoking: 3")
    assert (out, code, len(err)) == ("", 2, 1) and err[0].startswith("train.py: x.pt: no")
    assert not Path("hacked").exists()


@pytest.mark.parametrize("more, part", [
    ("--rows 0", "--rows is 0"), ("--rows x", "'x'"), ("--steps 0", "--steps is 0"),
    ("--batch-size 0", "--batch-size is 0"), ("--threads 0", "--threads is 0"),
    ("--alpha -1", "alpha is -1.0"), ("--gamma inf", "gamma is inf"), ("--form hing", "hinge"),
    ("--layers 2", "--layers"), ("--layers -3", "--layers"), ("--n-embd 30", "n_embd is 30"),
    ("--nonsense", "nonsense"), ("--rows 9999", "too few"), ("--no-cat", "not allowed"),
    ("--train x", "--iid"), ("--val 0.5", "--val"), ("--train x --iid y --val 0.5", "--val"),
    ("--train none.jsonl --val 0.5", "none.jsonl"), ("--eval none.pt", "none.pt"),
    ("--train a.jsonl --iid a.jsonl --ood a.jsonl", "no edge"), ("--ask x", "--eval"),
    ("--device nonsense", "nonsense"), ("--lr 1e30 --steps 100", "lower --lr")])
def test_bad_flags_are_one_line_and_change_nothing(more, part):
    Path("a.jsonl").write_text('{"input": "Room: 1 Answer: ", "target": "Low"}\n')
    Path("out").mkdir()
    Path("out/curves.svg").write_text("of an earlier run")
    before = files()
    _, err, code = run("--cat", *more.split())
    assert code == 2 and len(err) == 1 and err[0].startswith("train.py: ") and part in err[0]
    assert files() == before or part == "lower --lr"  # the loss explodes only after training began


def test_the_attention_picture_shades_by_attention():
    part, n, name = datasets()["ood"], 2, "<&\"'é日"
    cause, copy, last = (is_it[n].nonzero()[0, 0].item()
                         for is_it in (part.role == 1, part.role == 2, part.answer))
    look = torch.zeros(part.idx.shape)
    look[n, cause], look[n, copy], look[n, last] = 0.2, 0.1, 0.7
    right, wrong = ["High", "High"], ["Low", "High"]
    tests = {name: ([right] + [wrong] * 63, torch.zeros_like(look)),
             "cat": ([right, wrong] + [right] * 62, look)}  # n is the first that only it gets right
    picture = list(ElementTree.fromstring(train.attention_svg(tests, part)))
    words, shades = zip(*((text, float(rect.get("fill-opacity")))
                          for rect, text in zip(picture, picture[1:]) if rect.get("fill-opacity")))
    tokens = [part.tokenizer.decode([token]) for token in part.idx[n, :last + 1].tolist()]
    assert [text.text for text in words] == tokens * 2
    assert sum(shade > 0 for shade in shades) == 3 and shades[-1] == 1
    assert shades[last + 1 + cause] == pytest.approx(2 * shades[last + 1 + copy])
    for style, place in (("font-weight", cause), ("font-style", copy)):
        assert [at for at, text in enumerate(words) if text.get(style)] == [place, last + 1 + place]
    assert f"{name}: Low, right is High" in [text.text for text in picture]


def test_curves_are_the_mean_over_seeds():
    def curves(*lines):
        fields = ("run", "seed", "step", "iid", "ood")
        picture = train.curves_svg([dict(zip(fields, line)) for line in lines])
        return {(line.get("stroke"), line.get("stroke-dasharray")):
                [[float(x) for x in point.split(",")] for point in line.get("points").split()]
                for line in ElementTree.fromstring(picture).iterfind("{*}polyline")}

    two = curves(("cat", 1, 5, 0.1, 0.2), ("cat", 1, 10, 0.9, 0.3),
                 ("cat", 2, 5, 0.3, 0.4), ("cat", 2, 10, 0.7, 0.5))
    assert two == curves(("cat", 1, 5, 0.2, 0.3), ("cat", 1, 10, 0.8, 0.4))
    ood, (iid,) = two.pop((train.COLORS["cat"], "none")), two.values()
    assert iid[1][1] < ood[1][1] < ood[0][1] < iid[0][1] and iid[1][0] > iid[0][0]  # y goes down
    assert len(curves(("cat", 1, 5, 0.5, 0.5), ("no-cat", 1, 5, 0.5, 0.5))) == 4
