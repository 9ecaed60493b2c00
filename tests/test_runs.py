"""What train.py leaves behind, how it goes on, and what it says: checkpoints, answers,
metrics.jsonl, pictures, and errors of one line."""
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

import train
from data import (END, Example, UserError, build_tokenizer, choose_causes, encode, generate,
                  to_line, tokenizer_of)
from model import GPT, GPTConfig
from test_train import SMALL, TINY, write_game

FLAGS = ("--train train.jsonl --iid iid.jsonl --ood ood.jsonl --steps 10 --batch-size 4 "
         "--device cpu --threads 1 ")
QUESTION = "Patient. Room: 7, Fingers: 5, Smoking: 2 Answer: "


def run(flags=""):
    train.main((FLAGS + flags).split(), game=TINY)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with three files of examples and all that a command on them left behind."""
    folder = tmp_path_factory.mktemp("finished")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_game("train.jsonl", 20)
        write_game("iid.jsonl", 6, seed=1)
        write_game("ood.jsonl", 6, ood=True, seed=1)
        with redirect_stdout(printed), redirect_stderr(printed):
            run()
    Path(folder, "printed.txt").write_text(printed.getvalue())
    return folder


@pytest.fixture(autouse=True)
def own_copy(finished, tmp_path, monkeypatch):
    """Each test works in a copy of that folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def read_metrics(folder="out"):
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(path):
    """The weights of a checkpoint, bit for bit."""
    model = torch.load(path, map_location="cpu", weights_only=True)["model"]
    return {name: weight.numpy().tobytes() for name, weight in model.items()}


def left_behind():
    """All that a command left in out/, without what the clock says."""
    found = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    for name in ("no-cat-1.pt", "cat-1.pt"):
        found[name] = weights(Path("out", name))
    found["metrics.jsonl"] = read_metrics()
    for line in found["metrics.jsonl"]:
        del line["seconds"]
    return found


def stop_at_save(monkeypatch, nth, flags=""):
    """Runs the command until it is about to save its nth checkpoint."""
    save, paths = train.save_checkpoint, []

    def save_or_stop(path, checkpoint):
        paths.append(path)
        if len(paths) == nth:
            raise KeyboardInterrupt
        save(path, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", save_or_stop)
        with pytest.raises(KeyboardInterrupt):
            run(flags)


def process(program, flags, **options):
    """Runs a program in a process of its own, until it ends."""
    command = [sys.executable, program, *flags.split()]
    return subprocess.run(command, capture_output=True, text=True, **options)


# ----------------------------------------------------------------------------
# What is printed, and metrics.jsonl

def test_without_a_terminal_there_is_a_line_at_each_tenth():
    lines = Path("printed.txt").read_text().splitlines()
    progress = [line for line in lines if "/10: " in line]

    assert len(progress) == 20
    assert re.fullmatch(r"no CAT     1/10: loss \d+\.\d\d, train \d\.\d\d", progress[0])
    assert progress[19].startswith("CAT       10/10: ")


def test_without_a_terminal_there_are_no_control_characters():
    printed = Path("printed.txt").read_text()
    assert printed.replace("\n", "").isprintable()


def test_in_a_terminal_a_bar_says_how_it_goes():
    terminal = io.StringIO()
    terminal.isatty = lambda: True

    with redirect_stderr(terminal):
        train.main((SMALL + "--runs cat --out new").split(), game=TINY)

    bar = terminal.getvalue().split("\r")[-1].rstrip()
    assert re.match(r"CAT .*\| 1/1 \[.*, loss \d+\.\d\d, ood \d\.\d\d\]$", bar)
    assert len(bar) <= 80


def test_the_first_line_says_device_and_sizes():
    n_parameters = sum(weight.numel() for weight in saved_model("cat").parameters())
    expected = (f"on cpu: {n_parameters:,} parameters, 20 examples to train on, "
                "6 in each test\n")
    assert expected in Path("printed.txt").read_text()


def test_the_last_line_says_what_was_written():
    last = Path("printed.txt").read_text().splitlines()[-1]
    names = re.findall(r"[\w-]+\.\w+", last)

    assert last.startswith("wrote ") and last.endswith(f" in out{os.sep}")
    assert sorted(names) == sorted(path.name for path in Path("out").iterdir())


def test_the_table_is_of_the_saved_models():
    args = train.parse_args(FLAGS.split())
    data = train.load_data(args, 1, TINY, train.read_files(args))
    printed = Path("printed.txt").read_text()
    for run in ("no-cat", "cat"):
        scores, answers = train.test(saved_model(run), data.tested, data.tokenizer, args)
        row = rf"\n{train.NAMES[run]} +{scores['acc_iid']:.3f} +{scores['acc_ood']:.3f} "
        assert re.search(row, printed)
        most = train.share_of_most_frequent(answers["ood"].right)
        assert f"{most:.3f} for the most frequent" in printed


def test_each_seed_has_its_own_data():
    train.main((SMALL + "--seed 1 2 --runs no-cat --out seeds").split(), game=TINY)
    first = torch.load("seeds/no-cat-1.pt", weights_only=True)
    second = torch.load("seeds/no-cat-2.pt", weights_only=True)
    assert first["pieces"] != second["pieces"]  # numbers that occur in training


def test_metrics_have_ten_lines_a_run_with_all_that_is_known():
    lines = read_metrics()
    assert [line["run"] for line in lines] == ["no-cat"] * 10 + ["cat"] * 10
    assert [line["step"] for line in lines] == list(range(1, 11)) * 2
    for line in lines:
        # There is no acc_iid: test files are not looked at during a run.
        assert line.keys() == {
            "run", "seed", "step", "steps", "loss", "loss_next", "loss_attn", "lr", "gamma",
            "acc_train", "attn_causal", "attn_spurious", "attn_other", "seconds"}


def test_loss_is_what_is_minimised():
    for line in read_metrics():
        gamma = {"no-cat": 0.0, "cat": 0.3}[line["run"]]
        assert line["gamma"] == gamma
        assert line["loss"] == pytest.approx(line["loss_next"] + gamma * line["loss_attn"])


# ----------------------------------------------------------------------------
# Questions to a checkpoint

def saved_model(run):
    checkpoint = torch.load(f"out/{run}-1.pt", weights_only=True)
    model = GPT(GPTConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    return model


def ask(capsys, question, checkpoint="out/cat-1.pt", device="cpu"):
    """The question with the attention of its answer, and the answer, as they are printed."""
    capsys.readouterr()
    train.main(["--ask", checkpoint, question, "--device", device, "--threads", "1"])
    return capsys.readouterr().out


@pytest.mark.parametrize("run", ["no-cat", "cat"])
def test_a_question_shows_where_its_answer_looks(run, capsys):
    checkpoint = torch.load(f"out/{run}-1.pt", weights_only=True)
    tokenizer = tokenizer_of(checkpoint["pieces"], checkpoint["pattern"])
    tokens = tokenizer.encode_ordinary(QUESTION)
    idx = torch.tensor([tokens])
    model = saved_model(run)
    _, attentions = model(idx)
    attn = attentions[-1][0, :, -1].mean(dim=0)  # of the last query, over heads


    expected = ""
    for token, share in zip(tokens, attn.tolist()):
        expected += tokenizer.decode([token])
        if share >= 0.05:
            expected += f"[{share:.0%}]"
    answer = model.generate(idx, 64, stop=tokenizer.encode_single_token(END))

    assert ask(capsys, QUESTION, f"out/{run}-1.pt") == f"{expected}\n{tokenizer.decode(answer)}\n"


def test_a_question_needs_the_checkpoint_alone(tmp_path_factory, monkeypatch, capsys):
    here = ask(capsys, QUESTION)
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copy("out/cat-1.pt", folder)
    monkeypatch.chdir(folder)

    assert ask(capsys, QUESTION, "cat-1.pt") == here


def test_blanks_at_the_end_of_a_question_change_nothing(capsys):
    expected = ask(capsys, QUESTION)
    assert ask(capsys, QUESTION.rstrip()) == expected
    assert ask(capsys, QUESTION + " \n") == expected


def test_the_tokens_of_one_character_are_shown_together():
    tokenizer = build_tokenizer([])  # a token for each byte
    tokens = tokenizer.encode_ordinary("a漢b")
    pieces = train.readable_pieces(tokenizer, tokens)
    assert pieces == [("a", [0]), ("漢", [1, 2, 3]), ("b", [4])]


@pytest.mark.parametrize("content", [
    b"",
    b"a text",
    b"cos\nmkdir\n(S'made'\ntR.",  # a pickle that calls os.mkdir("made")
], ids=["empty", "text", "pickle"])
def test_a_file_that_is_no_checkpoint_is_refused_and_runs_nothing(content, capsys):
    Path("x.pt").write_bytes(content)
    with pytest.raises(UserError, match="^x.pt: no checkpoint of train.py: .*$"):
        ask(capsys, QUESTION, "x.pt")

    assert not Path("made").exists()


def test_other_tensors_are_no_checkpoint(capsys):
    torch.save({"model": torch.ones(2)}, "x.pt")
    with pytest.raises(UserError, match="x.pt: no checkpoint of train.py"):
        ask(capsys, QUESTION, "x.pt")


@pytest.mark.parametrize("question, message", [
    ("", "the question is empty"),
    (" \n", "the question is empty"),
    ("Room: 7, " * 511 + "Room: 7", "the question has 2048 tokens, and the model takes 2048"),
], ids=["empty", "blank", "long"])
def test_a_question_that_can_not_be_answered_is_an_error(question, message, capsys):
    with pytest.raises(UserError, match=f"^--ask: {message}.*$"):
        ask(capsys, question)


def test_a_character_that_can_not_be_printed_is_escaped():
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    flags = "--ask out/cat-1.pt 漢 --device cpu --threads 1"
    ended = process(train.__file__, flags, env=environment)

    assert ended.returncode == 0
    assert "\\u6f22" in ended.stdout


# ----------------------------------------------------------------------------
# Going on, and starting anew

# Before the first checkpoint, at the end of the first run, and in the second.
@pytest.mark.parametrize("nth", [1, 10, 14])
def test_a_run_that_goes_on_ends_as_the_unbroken_one(nth, monkeypatch):
    unbroken = left_behind()
    stop_at_save(monkeypatch, nth)
    assert len(read_metrics()) == nth  # each line is written at once
    run("--resume")

    assert left_behind() == unbroken


def test_the_same_command_starts_anew_and_writes_the_same(capsys):
    before = left_behind()
    run()

    assert capsys.readouterr().out.count("/10: ") == 20
    assert left_behind() == before


def test_a_line_of_metrics_that_was_cut_off_is_left_out():
    before = read_metrics()
    with open("out/metrics.jsonl", "a") as file:
        file.write('{"run": "cat", "se')
    run("--resume")

    assert read_metrics() == before


def test_a_run_with_a_negative_seed_starts_anew_too(capsys):
    flags = "--seed -1 --runs no-cat --steps 1 --out negative"
    run(flags)
    run(flags)
    assert capsys.readouterr().out.count("1/1: ") == 2


def test_a_run_goes_on_in_another_folder(capsys):
    os.rename("out", "moved")

    run("--resume --out moved")

    printed = capsys.readouterr().out
    assert "/10: " not in printed and f"in moved{os.sep}" in printed  # all was done before


def test_as_many_threads_are_used_as_the_flag_says():
    torch.set_num_threads(2)
    run("--resume")
    assert torch.get_num_threads() == 1


def test_threads_and_folder_are_no_part_of_a_command():
    args = train.parse_args(FLAGS.split())
    other = train.parse_args((FLAGS + "--threads 2 --out moved --resume").split())
    assert train.result_flags(other) == train.result_flags(args)


@pytest.mark.parametrize("resume", ["", " --resume"])
@pytest.mark.parametrize("flags, named", [
    ("--steps 11", "--steps"),
    ("--lr 0.1 --batch-size 5", "--batch-size, --lr"),
    ("--seed 1 2", "--seed"),
    ("--open-path", "--open-path"),
])
def test_other_flags_are_refused_by_name(flags, named, resume):
    before = left_behind()
    with pytest.raises(UserError, match=f"with other {named}: give another --out$"):
        run(flags + resume)
    assert left_behind() == before


@pytest.mark.parametrize("before, after", [
    ("Patient", "Person"),
    ('["Smoking', '["Room'),
], ids=["text", "cause"])
def test_other_training_data_is_refused(before, after):
    rows = Path("train.jsonl").read_text()
    Path("train.jsonl").write_text(rows.replace(before, after, 1))

    unchanged = left_behind()
    with pytest.raises(UserError, match="with other training data: give another --out$"):
        run()
    assert left_behind() == unchanged


def test_an_empty_line_is_no_other_training_data():
    rows = Path("train.jsonl").read_text()
    Path("train.jsonl").write_text("\n" + rows)
    unchanged = left_behind()

    run("--resume")

    assert left_behind() == unchanged


@pytest.mark.parametrize("flags", ["", "--resume"])
def test_files_of_others_in_the_folder_harm_nothing(flags):
    for name in ("._cat-1.pt", "other.pt", "cat-1.pt.bak"):
        Path("out", name).write_bytes(b"no checkpoint")
    before = left_behind()
    run(flags)

    assert left_behind() == before


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(monkeypatch):
    resource = pytest.importorskip("resource")

    def allow_small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    stop_at_save(monkeypatch, 5, "--runs no-cat --out full")
    saved = weights("full/no-cat-1.pt")

    ended = process(train.__file__, FLAGS + "--runs no-cat --out full --resume",
                    preexec_fn=allow_small_files_only)

    assert ended.returncode == 2
    assert ended.stderr == f"train.py: [Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}\n"
    assert weights("full/no-cat-1.pt") == saved
    assert not list(Path("full").glob("*.tmp"))


# ----------------------------------------------------------------------------
# Pictures

def parts_of(picture):
    """The parts of an SVG, which must be XML."""
    return list(ElementTree.fromstring(picture))


@pytest.fixture
def shown():
    """Three questions, encoded, and Answers that are right. They look at the cause, and half as
    much at the spurious number."""
    examples = generate(TINY, 3, ood=True)
    tokenizer = build_tokenizer(example.input + example.target for example in examples)
    encoded = [encode(choose_causes(example, "value", None), tokenizer) for example in examples]
    right = [example.target for example in examples]
    attn = [0.2 * example.causal + 0.1 * example.spurious for example in encoded]
    answers = train.Answers(right, right, attn)
    return SimpleNamespace(examples=examples, tokenizer=tokenizer, encoded=encoded,
                           answers=answers)


def test_a_picture_is_of_the_first_question_that_the_runs_answer_differently(shown):
    right, attn = shown.answers.right, shown.answers.attn
    others = train.Answers([right[0], "Cold", "Flu"], right, attn)
    runs = {"no-cat": others, "cat": shown.answers}

    picture = train.attention_svg(runs, shown.encoded, shown.tokenizer)
    texts = [part.text for part in parts_of(picture) if part.text]

    assert f"no CAT answers Cold, which is wrong: it is {right[1]}" in texts
    assert f"CAT answers {right[1]}, which is right" in texts
    assert "".join(texts).count(shown.examples[1].input) == 2
    assert {"attention of the answer:", "0%", "causal", "spurious"} <= set(texts)


def test_the_picture_that_is_written_is_of_an_ood_question():
    parts = parts_of(Path("out/attention.svg").read_text())
    text = "".join(part.text or "" for part in parts)
    lines = Path("ood.jsonl").read_text().splitlines()
    assert any(json.loads(line)["input"] in text for line in lines)


def test_the_shade_is_the_attention_and_the_font_says_what_is_causal(shown):
    picture = train.attention_svg({"cat": shown.answers}, shown.encoded, shown.tokenizer)
    parts = parts_of(picture)

    shades, texts = {}, {}
    for rect, text in zip(parts, parts[1:]):
        shades[text.text] = float(rect.get("fill-opacity") or 0)
        texts[text.text] = text

    # The question is "Patient. Smoking: 2, Room: 56, Fingers: 5 Answer: ". The percentages are
    # those of the legend.
    assert shades["2"] == shades["20%"] > shades["5"] == shades["10%"]
    assert shades["56"] == shades["0%"] == 0
    assert texts["2"].get("font-weight") == "bold"
    assert texts["5"].get("font-style") == "italic"
    assert texts["56"].attrib.keys() == {"x", "y", "{http://www.w3.org/XML/1998/namespace}space"}


def picture_of(question):
    """The parts of the picture of a question, with a token for each character or byte."""
    tokenizer = build_tokenizer([])
    example = encode(Example(question, "Low"), tokenizer)
    answers = train.Answers(["Low"], ["Low"], [torch.zeros(len(example.idx))])
    return parts_of(train.attention_svg({"cat": answers}, [example], tokenizer))


def test_a_long_question_is_wrapped_inside_the_picture():
    background, *parts = picture_of("漢字 " * 40)
    for part in parts:
        end = float(part.get("x")) + float(part.get("width") or 0)
        assert end <= float(background.get("width"))


def test_a_wide_character_takes_two_places():
    parts = picture_of("a漢")
    widths = {}
    for rect, text in zip(parts, parts[1:]):
        widths[text.text] = float(rect.get("width") or 0)
    assert widths["漢"] == 2 * widths["a"] > 0


def test_what_xml_forbids_is_replaced_in_a_picture():
    text = train.svg_text(0, 0, "\x00\x1b\ufffe <&\t")
    part, = parts_of(f"<svg>{text}</svg>")
    assert part.text == "\ufffd\ufffd\ufffd <&\t"


def test_an_accent_takes_no_place():
    assert train.text_width("e\u0301") == 1


def test_a_curve_is_the_mean_over_seeds_and_stands_on_the_axes():
    line = {"run": "cat", "steps": 20}
    parts = parts_of(train.curves_svg([
        line | {"seed": 1, "step": 10, "acc_ood": 0.0},
        line | {"seed": 1, "step": 20, "acc_ood": 0.5},
        line | {"seed": 2, "step": 10, "acc_ood": 0.0},
        line | {"seed": 2, "step": 20, "acc_ood": 1.0},
    ]))

    label_x = {part.text: part.get("x") for part in parts}
    heights = [float(part.get("y1")) for part in parts if part.get("y1")]  # of 0, 0.25 ... 1
    curve, _ = [part.get("points") for part in parts if part.get("points")]  # and the legend's

    assert curve == f"{label_x['10']},{heights[0]} {label_x['20']},{heights[3]}"
    assert "CAT, OOD" in label_x


# ----------------------------------------------------------------------------
# Errors, and devices

def write_bad_files():
    question = "Room: 1 Answer: "
    Path("plain.jsonl").write_text(to_line(question, "Low") * 4)
    Path("long.jsonl").write_text(to_line(question, "Low") + to_line(question * 512, "Low"))


@pytest.mark.parametrize("flags, message", [
    ("--train none.jsonl --val 0.5", "No such file or directory: 'none.jsonl'"),
    ("--train plain.jsonl --val 0.5", "plain.jsonl: no example has causes"),
    ("--train train.jsonl --val 1", "--val is 1"),
    ("--train train.jsonl --iid iid.jsonl --ood long.jsonl", "long.jsonl:2: 2563 tokens"),
    ("--rows 5000", "5104 examples are asked for"),
])
def test_bad_data_is_one_line_and_changes_nothing(flags, message):
    write_bad_files()
    with pytest.raises((UserError, OSError)) as error:
        train.main((SMALL + "--out new " + flags).split(), game=TINY)

    assert message in str(error.value) and "\n" not in str(error.value)
    assert not Path("new").exists()


def test_without_cat_no_causes_are_needed():
    write_bad_files()
    flags = "--train plain.jsonl --iid plain.jsonl --ood plain.jsonl --runs no-cat --out new"

    train.main((SMALL + flags).split())

    assert Path("new/no-cat-1.pt").exists()


def test_a_mistake_in_cat_py_ends_in_a_traceback():
    for name in ("cat.py", "model.py", "data.py", "train.py"):
        shutil.copy(Path(train.__file__).with_name(name), name)
    with open("cat.py", "a") as file:
        file.write("def re_attention_loss(*arguments):\n    raise ValueError('an edit')\n")

    ended = process("train.py", FLAGS + "--out new")

    assert ended.returncode == 1
    assert 'cat.py", line' in ended.stderr and "ValueError: an edit" in ended.stderr


def devices():
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


@pytest.mark.parametrize("device", devices())
def test_a_device_has_the_losses_of_the_cpu_goes_on_and_answers(device, monkeypatch, capsys):
    flags = f"--device {device} --out there --runs cat"
    run(flags)
    unbroken = weights("there/cat-1.pt")

    for here, there in zip(read_metrics()[10:], read_metrics("there")):
        assert there["loss_next"] == pytest.approx(here["loss_next"], rel=0.02)
        assert there["loss_attn"] == pytest.approx(here["loss_attn"], rel=0.02)

    stop_at_save(monkeypatch, 5, flags)
    run(flags + " --resume")

    assert weights("there/cat-1.pt") == unbroken

    answer = ask(capsys, QUESTION, "there/cat-1.pt", device).splitlines()[1]
    assert ask(capsys, QUESTION, "there/cat-1.pt", "cpu").splitlines()[1] == answer
