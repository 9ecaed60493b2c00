"""What train.py leaves behind, how it goes on, and what it says: checkpoints, answers,
metrics.jsonl, pictures, and errors of one line."""
import io
import os
import re
import shutil
from contextlib import redirect_stderr
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import train
from data import UserError, build_tokenizer, encode, game_line, generate, link, to_line
from test_train import TINY

FLAGS = "--train game.jsonl --iid game.jsonl --ood game.jsonl --steps 10 --threads 1 "
QUESTION = "Patient. Room: 7, Fingers: 5, Smoking: 2 Answer: "


def run(flags=""):
    train.main((FLAGS + flags).split(), game=TINY)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a file of examples and all that a command on it left behind."""
    folder = tmp_path_factory.mktemp("finished")
    lines = [game_line(example) for example in generate(TINY, 20)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("game.jsonl").write_text("".join(lines))
        run()
    return folder


@pytest.fixture(autouse=True)
def own_copy(finished, tmp_path, monkeypatch):
    """Each test works in a copy of that folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def read_metrics():
    return train.read_metrics(Path("out/metrics.jsonl"))


def left_behind():
    """The metrics without what the clock says, and the last weights of each run to the bit."""
    left = read_metrics()
    for line in left:
        del line["seconds"]
    for path in sorted(Path("out").glob("*cat-1.pt")):
        left.append(train.load_checkpoint(path)["model"]["lm_head.weight"].tolist())
    return left


# ----------------------------------------------------------------------------
# What is printed, and metrics.jsonl

def test_without_a_terminal_there_is_a_line_at_each_tenth(capsys):
    run()
    printed = capsys.readouterr().out
    line = r"(?m)^(?:no )?CAT +\d+/10: loss \d+\.\d\d, train \d\.\d\d$"
    assert len(re.findall(line, printed)) == 20
    assert re.search(f"\nwrote no-cat-1.pt, cat-1.pt, .*curves.svg in out{os.sep}\n$", printed)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_in_a_terminal_a_bar_says_how_it_goes():
    with redirect_stderr(Terminal()) as terminal:
        run("--runs cat --out new")
    bar = terminal.getvalue().split("\r")[-1].rstrip()
    assert re.match(r"CAT .*\| 10/10 \[.*, loss \d+\.\d\d, train \d\.\d\d\]$", bar)
    assert len(bar) <= 80


def test_metrics_are_all_that_is_known_at_each_tenth_of_a_run():
    lines = read_metrics()
    assert [line["step"] for line in lines] == list(range(1, 11)) * 2
    # There is no acc_iid: test files are not looked at during a run.
    assert " ".join(lines[0]) == (
        "run seed step steps loss loss_next loss_attn lr gamma "
        "acc_train attn_causal attn_spurious attn_other seconds")


def test_the_loss_is_what_is_minimised():
    for line in read_metrics():
        expected = line["loss_next"] + line["gamma"] * line["loss_attn"]
        assert line["loss"] == pytest.approx(expected)


# ----------------------------------------------------------------------------
# Questions to a checkpoint

def ask(capsys, question, checkpoint="out/cat-1.pt"):
    """The question with the attention of its answer, and the answer, as they are printed."""
    train.main(["--ask", checkpoint, question, "--device", "cpu", "--threads", "1"])
    return capsys.readouterr().out


def test_a_question_shows_where_its_answer_looks(capsys, monkeypatch):
    def supervised_attention(attentions, args):
        attn = torch.zeros(1, 15, 15)
        attn[0, -1] = 0.04  # is not marked
        attn[0, -1, 4] = 0.6
        return attn

    monkeypatch.setattr(train, "supervised_attention", supervised_attention)
    shown = ask(capsys, QUESTION)
    assert shown.startswith("Patient. Room: 7[60%], Fingers: 5, Smoking: 2 Answer: \n")


def test_a_question_needs_the_checkpoint_alone_and_no_blanks_at_its_end(capsys):
    expected = ask(capsys, QUESTION)
    shutil.move("out/cat-1.pt", "moved.pt")
    os.remove("game.jsonl")
    assert ask(capsys, QUESTION.rstrip() + "\n", "moved.pt") == expected


def test_the_tokens_of_one_character_are_shown_together():
    tokenizer = build_tokenizer([])  # a token for each byte
    tokens = tokenizer.encode_ordinary("漢b")
    assert train.readable_pieces(tokenizer, tokens) == [("漢", [0, 1, 2]), ("b", [3])]


def test_a_file_that_is_no_checkpoint_is_refused_and_runs_nothing(capsys):
    Path("x.pt").write_bytes(b"cos\nmkdir\n(S'made'\ntR.")  # a pickle that calls os.mkdir("made")
    with pytest.raises(UserError, match="^x.pt: no checkpoint of train.py: .*$"):
        ask(capsys, QUESTION, "x.pt")
    assert not Path("made").exists()


def test_other_tensors_are_no_checkpoint(capsys):
    torch.save({"model": torch.ones(2)}, "x.pt")
    with pytest.raises(UserError, match="x.pt: no checkpoint of train.py"):
        ask(capsys, QUESTION, "x.pt")


@pytest.mark.parametrize("question, message", [
    (" \n", "the question is empty"),
    # A blank is added, and then no place is left for the answer.
    ("x" * 2047, "the question has 2048 tokens, and the model takes 2048"),
], ids=["blank", "long"])
def test_a_question_that_can_not_be_answered_is_an_error(question, message, capsys):
    with pytest.raises(UserError, match=f"^--ask: {message}.*$"):
        ask(capsys, question)


# ----------------------------------------------------------------------------
# Going on, and starting anew

# After lines 1 (nothing is saved yet), 10 (the last of no-cat) and 14 (inside cat).
@pytest.mark.parametrize("nth", [1, 10, 14])
def test_a_run_that_goes_on_ends_as_the_unbroken_one(nth, monkeypatch):
    unbroken = left_behind()
    save = train.save_checkpoint

    def save_or_stop(path, checkpoint):
        if len(read_metrics()) == nth:  # each line is written at once, before its checkpoint
            raise KeyboardInterrupt
        save(path, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", save_or_stop)
        with pytest.raises(KeyboardInterrupt):
            run()
    with open("out/metrics.jsonl", "a") as file:
        file.write('{"run": "cat", "se')  # a line that was cut off
    run("--resume")
    assert left_behind() == unbroken


def test_the_same_command_starts_anew_and_writes_the_same(capsys):
    before = left_behind()
    Path("out/cat.pt").write_bytes(b"of another program")  # has not the name of a run
    run()
    assert capsys.readouterr().out.count("/10: ") == 20
    assert left_behind() == before


def test_a_run_goes_on_in_another_folder_with_other_threads(capsys):
    os.rename("out", "moved")
    run("--resume --out moved --threads 2")
    assert "/10: " not in capsys.readouterr().out  # all was done before
    assert torch.get_num_threads() == 2


def test_each_seed_has_its_own_data():
    train.main("--rows 8 --test-rows 4 --steps 1 --runs cat --seed 1 2 --out two".split(), TINY)
    checkpoints = [train.load_checkpoint(f"two/cat-{seed}.pt") for seed in (1, 2)]
    assert checkpoints[0]["pieces"] != checkpoints[1]["pieces"]  # numbers that occur in training


def test_other_flags_are_refused_by_name():
    before = left_behind()
    with pytest.raises(UserError, match="with other --batch-size, --lr: give another --out$"):
        run("--lr 0.1 --batch-size 5")
    assert left_behind() == before


def test_other_training_data_is_refused():
    rows = Path("game.jsonl").read_text()
    Path("game.jsonl").write_text(rows.replace('["Smoking', '["Room', 1))  # another cause
    with pytest.raises(UserError, match="with other training data: give another --out$"):
        run()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a full disk")
def test_a_full_disk_is_an_error_and_leaves_the_last_checkpoint():
    checkpoint = Path("out/cat-1.pt")
    before = checkpoint.read_bytes()
    os.symlink("/dev/full", "out/cat-1.tmp")
    with pytest.raises(OSError, match="No space left"):
        train.save_checkpoint(checkpoint, {})
    assert checkpoint.read_bytes() == before
    assert not os.path.lexists("out/cat-1.tmp")


# ----------------------------------------------------------------------------
# Pictures

def picture_of(question):
    """The picture of a question, answered twice: without CAT the second answer is wrong. Both
    runs look at the 2, which is causal, and half as much at the 5, which is spurious."""
    example, _ = link(question, "Flu", [("Flu", ["2"])], ["5"])
    tokenizer = build_tokenizer([question])
    encoded = encode(example, tokenizer)
    attn = 0.2 * encoded.causal + 0.1 * encoded.spurious
    right = ["Flu", "Flu"]
    runs = {
        "no-cat": train.Answers(["Flu", "Cold"], right, [attn, attn]),
        "cat": train.Answers(right, right, [attn, attn]),
    }
    return train.attention_svg(runs, [encoded, encoded], tokenizer)


def test_a_picture_is_of_a_question_that_the_runs_answer_differently():
    picture = picture_of("Room: 2 ")
    assert ">no CAT answers Cold, which is wrong: it is Flu<" in picture
    assert ">CAT answers Flu, which is right<" in picture


@pytest.mark.parametrize("piece", [
    # The shade is full, 1.00, from an attention of 0.5 on, so 0.2 gives 0.40.
    'fill-opacity="0.40"/>\n.* font-weight="bold">2<',
    'fill-opacity="0.20"/>\n.* font-style="italic" text-decoration="underline">5<',
    'fill-opacity="0.00"/>\n.*preserve" >56<',
    'fill-opacity="0.4"/>\n.*>20%<',  # the legend
])
def test_the_shade_is_the_attention_and_the_font_says_what_is_causal(piece):
    assert re.search(piece, picture_of("Smoking: 2, Room: 56, Fingers: 5 "))


def test_a_long_question_is_wrapped_inside_the_picture():
    for x, width in re.findall(r'<rect x="(\d+)".* width="(\d+)"', picture_of("漢字 " * 40)):
        assert int(x) + int(width) <= 800


def test_east_asian_characters_are_two_wide_and_accents_have_no_width():
    assert train.text_width("a漢e\u0301") == 1 + 2 + 1


def test_what_xml_forbids_is_replaced_in_a_picture():
    text = train.svg_text(0, 0, "\x00\x1b\ufffe <&\t")
    assert ElementTree.fromstring(text).text == "\ufffd\ufffd\ufffd <&\t"


def test_a_curve_is_the_mean_over_seeds_and_stands_on_the_axes():
    metrics = []
    for step, accuracy in [(20, 0.5), (20, 1.0), (10, 0.0)]:  # step 20 of two seeds
        metrics.append({"run": "cat", "steps": 20, "step": step, "acc_ood": accuracy})
    picture = train.curves_svg(metrics)
    # The axes: x from 70 (step 0) to 560 (step 20), y from 320 (accuracy 0) up to 20 (1).
    assert 'points="315.0,320.0 560.0,95.0"' in picture  # 0 after 10 steps, 0.75 after 20
    assert ">CAT, OOD<" in picture
    assert "dasharray" not in picture  # is for IID


# ----------------------------------------------------------------------------
# Errors

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


def test_without_cat_no_example_needs_a_cause():
    Path("plain.jsonl").write_text(to_line("Room: 1 Answer: ", "Low"))
    run("--out new --train plain.jsonl --runs no-cat")
