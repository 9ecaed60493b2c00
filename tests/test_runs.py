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
from contextlib import redirect_stderr
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import train
from data import (END, UserError, build_tokenizer, encode, game_line, generate, link, to_line,
                  tokenizer_of)
from model import GPT, GPTConfig
from test_train import TINY

FLAGS = "--train train.jsonl --iid iid.jsonl --ood ood.jsonl --steps 10 --threads 1 "
QUESTION = "Patient. Room: 7, Fingers: 5, Smoking: 2 Answer: "


def run(flags=""):
    train.main((FLAGS + flags).split(), game=TINY)


def write_game(path, n, **options):
    lines = [game_line(example) for example in generate(TINY, n, **options)]
    Path(path).write_text("".join(lines))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with three files of examples and all that a command on them left behind."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_game("train.jsonl", 20)
        write_game("iid.jsonl", 6, seed=1)
        write_game("ood.jsonl", 6, ood=True, seed=1)
        run()
    return folder


@pytest.fixture(autouse=True)
def own_copy(finished, tmp_path, monkeypatch):
    """Each test works in a copy of that folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def read_metrics():
    lines = Path("out/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def left_behind():
    """The weights to the bit, and the metrics without what the clock says."""
    left = read_metrics()
    for line in left:
        del line["seconds"]
    for path in sorted(Path("out").glob("*cat-1.pt")):
        for weight in load(path)["model"].values():
            left.append(weight.tolist())
    return left


def stop_at_save(monkeypatch, nth):
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
            run()


def process(program, flags, **options):
    """Runs a program in a process of its own, until it ends."""
    command = [sys.executable, program, *flags.split()]
    return subprocess.run(command, capture_output=True, text=True, **options)


# ----------------------------------------------------------------------------
# What is printed, and metrics.jsonl

def test_without_a_terminal_there_is_a_line_at_each_tenth(capsys):
    run()
    printed = capsys.readouterr().out
    progress = re.findall(r"^(CAT|no CAT) +(\d+)/10: loss \d+\.\d\d, train \d\.\d\d$", printed,
                          re.MULTILINE)
    assert [int(step) for _, step in progress] == [*range(1, 11)] * 2
    assert re.search(f"\nwrote no-cat-1.pt, cat-1.pt, .*curves.svg in out{os.sep}\n$", printed)


def test_in_a_terminal_a_bar_says_how_it_goes():
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    with redirect_stderr(terminal):
        run("--runs cat --out new")
    bar = terminal.getvalue().split("\r")[-1].rstrip()
    assert re.match(r"CAT .*\| 10/10 \[.*, loss \d+\.\d\d, train \d\.\d\d\]$", bar)
    assert len(bar) <= 80


def test_metrics_are_all_that_is_known_at_each_tenth_of_a_run():
    lines = read_metrics()
    assert [line["step"] for line in lines] == [*range(1, 11)] * 2
    # There is no acc_iid: test files are not looked at during a run.
    assert " ".join(lines[0]) == (
        "run seed step steps loss loss_next loss_attn lr gamma "
        "acc_train attn_causal attn_spurious attn_other seconds")


def test_the_loss_is_what_is_minimised():
    for line in read_metrics():
        assert line["gamma"] == {"no-cat": 0, "cat": 0.3}[line["run"]]
        expected = line["loss_next"] + line["gamma"] * line["loss_attn"]
        assert line["loss"] == pytest.approx(expected)


# ----------------------------------------------------------------------------
# Questions to a checkpoint

def ask(capsys, question, checkpoint="out/cat-1.pt"):
    """The question with the attention of its answer, and the answer, as they are printed."""
    capsys.readouterr()
    train.main(["--ask", checkpoint, question, "--device", "cpu", "--threads", "1"])
    return capsys.readouterr().out


def test_a_question_shows_where_its_answer_looks(capsys):
    checkpoint = load("out/cat-1.pt")
    tokenizer = tokenizer_of(checkpoint["pieces"], checkpoint["pattern"])
    model = GPT(GPTConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    tokens = tokenizer.encode_ordinary(QUESTION)
    idx = torch.tensor([tokens])
    _, attentions = model(idx)
    attn = attentions[-1][0, :, -1].mean(dim=0)  # of the last query, over heads

    expected = ""
    for token, share in zip(tokens, attn.tolist()):
        expected += tokenizer.decode([token])
        if share >= 0.05:
            expected += f"[{share:.0%}]"
    answer = model.generate(idx, 64, stop=tokenizer.encode_single_token(END))
    assert ask(capsys, QUESTION) == f"{expected}\n{tokenizer.decode(answer)}\n"


def test_a_question_needs_the_checkpoint_alone_and_no_blanks_at_its_end(capsys):
    expected = ask(capsys, QUESTION)
    shutil.move("out/cat-1.pt", "moved.pt")
    os.remove("train.jsonl")
    assert ask(capsys, QUESTION.rstrip() + "\n", "moved.pt") == expected


def test_the_tokens_of_one_character_are_shown_together():
    tokenizer = build_tokenizer([])  # a token for each byte
    tokens = tokenizer.encode_ordinary("a漢b")
    pieces = train.readable_pieces(tokenizer, tokens)
    assert pieces == [("a", [0]), ("漢", [1, 2, 3]), ("b", [4])]


@pytest.mark.parametrize("content", [
    b"a text",
    b"cos\nmkdir\n(S'made'\ntR.",  # a pickle that calls os.mkdir("made")
])
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
    (" \n", "the question is empty"),
    ("Room: 7, " * 511 + "Room: 7", "the question has 2048 tokens, and the model takes 2048"),
], ids=["blank", "long"])
def test_a_question_that_can_not_be_answered_is_an_error(question, message, capsys):
    with pytest.raises(UserError, match=f"^--ask: {message}.*$"):
        ask(capsys, question)


def test_a_character_that_can_not_be_printed_is_escaped():
    env = os.environ | {"PYTHONIOENCODING": "cp1252"}
    ended = process(train.__file__, "--ask out/cat-1.pt 漢 --threads 1", env=env)
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
    with open("out/metrics.jsonl", "a") as file:
        file.write('{"run": "cat", "se')  # a line that was cut off
    run("--resume")
    assert left_behind() == unbroken


def test_the_same_command_starts_anew_and_writes_the_same(capsys):
    before = left_behind()
    Path("out/cat.pt").write_bytes(b"of another program")
    run()
    assert capsys.readouterr().out.count("/10: ") == 20
    assert left_behind() == before


def test_a_run_goes_on_in_another_folder_with_other_threads(capsys):
    os.rename("out", "moved")
    run("--resume --out moved --threads 2")
    assert "/10: " not in capsys.readouterr().out  # all was done before
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


@pytest.mark.parametrize("flags, named", [
    ("--steps 11", "--steps"),
    ("--lr 0.1 --batch-size 5 --resume", "--batch-size, --lr"),
    ("--open-path", "--open-path"),
    ("--train iid.jsonl", "--train"),
])
def test_other_flags_are_refused_by_name(flags, named):
    before = left_behind()
    with pytest.raises(UserError, match=f"with other {named}: give another --out$"):
        run(flags)
    assert left_behind() == before


@pytest.mark.parametrize("old, new", [("Patient", "Person"), ('["Smoking', '["Room')])
def test_other_training_data_is_refused(old, new):
    rows = Path("train.jsonl").read_text()
    Path("train.jsonl").write_text("\n" + rows)
    run("--resume")  # an empty line is no other data
    Path("train.jsonl").write_text(rows.replace(old, new, 1))
    with pytest.raises(UserError, match="with other training data: give another --out$"):
        run()


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(monkeypatch):
    resource = pytest.importorskip("resource")

    def allow_small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    stop_at_save(monkeypatch, 5)
    before = {path.name: path.read_bytes() for path in Path("out").glob("*.pt*")}
    ended = process(train.__file__, FLAGS + "--resume", preexec_fn=allow_small_files_only)
    assert ended.returncode == 2
    assert ended.stderr == f"train.py: [Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}\n"
    assert {path.name: path.read_bytes() for path in Path("out").glob("*.pt*")} == before


# ----------------------------------------------------------------------------
# Pictures

def picture_of(question, given):
    """The picture of a question whose right answer is Flu, as runs answer it: {run: answer}. They
    look at the 2, which is causal, and half as much at the 5, which is spurious."""
    example, _ = link(question, "Flu", [("Flu", ["2"])], ["5"])
    tokenizer = build_tokenizer([question])
    encoded = encode(example, tokenizer)
    attn = 0.2 * encoded.causal + 0.1 * encoded.spurious
    runs = {}
    for run, answer in given.items():
        runs[run] = train.Answers(["Flu", answer], ["Flu", "Flu"], [attn, attn])
    return train.attention_svg(runs, [encoded, encoded], tokenizer)


def test_a_picture_is_of_a_question_that_the_runs_answer_differently():
    picture = picture_of("Room: 2 ", {"no-cat": "Cold", "cat": "Flu"})
    assert ">no CAT answers Cold, which is wrong: it is Flu<" in picture
    assert ">CAT answers Flu, which is right<" in picture


@pytest.mark.parametrize("piece", [
    'fill-opacity="0.40"/>\n.* font-weight="bold">2<',
    'fill-opacity="0.20"/>\n.* font-style="italic" text-decoration="underline">5<',
    'fill-opacity="0.00"/>\n.*preserve" >56<',
    'fill-opacity="0.4"/>\n.*>20%<',  # the legend
])
def test_the_shade_is_the_attention_and_the_font_says_what_is_causal(piece):
    assert re.search(piece, picture_of("Smoking: 2, Room: 56, Fingers: 5 ", {"cat": "Flu"}))


def test_a_long_question_is_wrapped_inside_the_picture():
    picture = picture_of("漢字 " * 40, {"cat": "Flu"})
    for x, width in re.findall(r'<rect x="(\d+)".* width="(\d+)"', picture):
        assert int(x) + int(width) <= 800


@pytest.mark.parametrize("text, width", [("a", 1), ("漢", 2), ("e\u0301", 1)])
def test_the_width_of_a_text(text, width):
    assert train.text_width(text) == width


def test_what_xml_forbids_is_replaced_in_a_picture():
    text = train.svg_text(0, 0, "\x00\x1b\ufffe <&\t")
    assert ElementTree.fromstring(text).text == "\ufffd\ufffd\ufffd <&\t"


def test_a_curve_is_the_mean_over_seeds_and_stands_on_the_axes():
    metrics = []
    for step, accuracy in [(10, 0.0), (20, 0.5), (10, 0.0), (20, 1.0)]:  # of two seeds
        metrics.append({"run": "cat", "steps": 20, "step": step, "acc_ood": accuracy})
    picture = train.curves_svg(metrics)
    assert 'points="315.0,320.0 560.0,95.0"' in picture  # 0 after 10 steps, 0.75 after 20
    assert re.search('x="315.0" y="344".*>10<', picture)
    assert re.search('y="101.0".*>0.75<', picture)


# ----------------------------------------------------------------------------
# Errors, and devices

@pytest.mark.parametrize("flags, message", [
    ("--train none.jsonl", "No such file or directory: 'none.jsonl'"),
    ("--train plain.jsonl", "plain.jsonl: no example has causes"),
    ("--ood long.jsonl", "long.jsonl:1: 2563 tokens, and the model takes 2048"),
])
def test_bad_data_is_one_line_and_changes_nothing(flags, message):
    question = "Room: 1 Answer: "
    Path("plain.jsonl").write_text(to_line(question, "Low"))
    Path("long.jsonl").write_text(to_line(question * 512, "Low"))
    with pytest.raises((UserError, OSError), match=rf"^.*{message}.*\Z"):
        run(f"--out new {flags}")
    assert not Path("new").exists()
    run("--out new --train plain.jsonl --runs no-cat")  # needs no causes


def test_a_mistake_in_cat_py_ends_in_a_traceback():
    for name in ("cat.py", "model.py", "data.py", "train.py"):
        shutil.copy(Path(train.__file__).with_name(name), name)
    with open("cat.py", "a") as file:
        file.write("def re_attention_loss(*arguments):\n    raise ValueError('an edit')\n")
    ended = process("train.py", FLAGS + "--out new")
    assert ended.returncode == 1
    assert 'cat.py", line' in ended.stderr
    assert "ValueError: an edit" in ended.stderr
