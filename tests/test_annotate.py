"""Labels by an assistant, played by lines of shell, and the commands of data.py."""
import os
import signal
from pathlib import Path

import pytest

from data import UserError, annotate, main, parse_reply, run_assistant, run_main, to_line

# ----------------------------------------------------------------------------
# Replies

LABEL = '{"High": ["8"]}'
OTHER = '{"High": ["5"]}'
ECHO = '{"input": "8 ", "target": "High", "important": [{"High": ["8"]}]}'


@pytest.mark.parametrize("reply", [
    LABEL,
    '{"High": "8"}',
    f"[{LABEL}]",
    f'{{"important": [{LABEL}]}}',
    f"Sure, here it is:\n```json\n{LABEL}\n```\n",
])
def test_one_json_value_that_ends_the_reply_is_the_label(reply):
    assert parse_reply(reply) == [("High", ["8"])]


@pytest.mark.parametrize("start, end", [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("Thinking...\n", "\n...done thinking.\n\n"),
])
def test_a_draft_is_no_label(start, end):
    assert parse_reply(start + OTHER + " or {" + end + LABEL) == [("High", ["8"])]
    with pytest.raises(ValueError, match="no JSON"):
        parse_reply(f"{start}{LABEL}{end}I can't say.")
    with pytest.raises(ValueError, match="a draft that does not end"):
        parse_reply(f"{start}{LABEL}")


@pytest.mark.parametrize("reply, message", [
    ("", "no JSON in the reply"),
    (f"{LABEL} is wrong.", "Extra data"),
    (f"As in [1]: {LABEL}", "Extra data"),
    (f"[{LABEL}", "Expecting ','"),
    ("[" * 100_000, "too many brackets"),
    (ECHO, "an echo"),
    (f"[{ECHO}]", "an echo"),
    ('{"important": "8"}', "no label: '8'"),
    ('{"High": [8]}', "no label: {'High'"),
    ('{"High": ["8"], "High": ["5"]}', "'High' stands twice"),
])
def test_anything_else_is_no_label(reply, message):
    with pytest.raises(ValueError, match=message):
        parse_reply(reply)


# ----------------------------------------------------------------------------
# The assistant's command

def test_a_command_that_fails_gives_no_reply():
    with pytest.raises(ValueError, match="the command failed with code 3"):
        run_assistant("echo '[]'; exit 3", "", timeout=60)


@pytest.mark.parametrize("command", [
    "(exec >{pipe}; sleep 2; echo alive) | cat",
    "(exec 3>{pipe}; sleep 2; echo alive >&3) &",
], ids=["the shell waits", "the shell has ended"])
def test_a_time_out_ends_what_the_shell_started_too(command, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(ValueError, match="no reply in 0.5 seconds"):
        run_assistant(command.format(pipe=pipe), "", timeout=0.5)
    # This waits until nobody can write any more, and would read "alive" from who was left.
    os.set_blocking(reader, True)
    assert os.read(reader, 10) == b""
    os.close(reader)


# ----------------------------------------------------------------------------
# Files of labels

TEXT = "Smoking: 8, Room: 5 Answer: "
IMPORTANT = [("High Risk", ["Smoking: 8"])]
SAY = """echo '{"High Risk": ["Smoking: 8"]}'"""
DEMO = to_line("demo " + TEXT, "High Risk", IMPORTANT)


def labelled(names, important=IMPORTANT):
    """A line for each name."""
    lines = [to_line(f"{name} {TEXT}", "High Risk", important) for name in names.split()]
    return "".join(lines)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """The working folder, with three questions and a demonstration."""
    monkeypatch.chdir(tmp_path)
    Path("questions.jsonl").write_text(labelled("one two three", important=()))
    Path("demos.jsonl").write_text(DEMO)


def label(assistant):
    """What the assistant's labels make of out.jsonl."""
    annotate("questions.jsonl", "demos.jsonl", assistant, "out.jsonl")
    return Path("out.jsonl").read_text()


def test_usable_replies_become_labels(capsys):
    assert label(SAY) == labelled("one two three")
    assert capsys.readouterr().out == "3 labelled, 0 without a usable reply\n"


def test_the_prompt_ends_with_the_demonstrations_and_the_bare_question():
    text = "$(touch hacked) `touch hacked`; 'é' \u2028 \\"  # which no shell may run
    Path("questions.jsonl").write_text(to_line(text, "x", [("x", ["é"])]))
    label("cat > prompt")
    assert Path("prompt").read_text().endswith("\n\n" + DEMO + to_line(text, "x"))
    assert not Path("hacked").exists()


def test_new_causes_replace_the_old_ones_and_spurious_phrases_stay():
    Path("questions.jsonl").write_text(to_line(TEXT, "High Risk", [("High Risk", ["5"])], ["Room"]))
    assert label(SAY) == to_line(TEXT, "High Risk", IMPORTANT, ["Room"])


@pytest.mark.parametrize("reply, message", [
    ("I don't know", "no JSON in the reply"),
    ("[]", "no cause that stands before its effect"),
    ('{"Smoking": ["Room: 5"]}', "no cause that stands before its effect"),
])
def test_an_unusable_reply_is_counted_and_not_saved(capsys, reply, message):
    Path("reply").write_text(reply)
    assert label("cat reply") == ""
    assert capsys.readouterr().out.startswith(
        "0 labelled, 3 without a usable reply\n"
        f"the first of them: questions.jsonl:1: {message}; ")


def test_only_what_has_no_label_is_asked_again():
    assert label(f"tail -n 1 | grep -q two && {SAY}") == labelled("two")  # fails for the others
    assert label(f"echo asked >> asked; {SAY}") == labelled("two one three")
    assert Path("asked").read_text() == "asked\n" * 2


@pytest.mark.parametrize("command", ["no-such-program", "cat | /"])  # codes 127 and 126
def test_a_command_that_can_not_be_run_ends_the_work_at_the_first_question(command):
    with pytest.raises(UserError, match="^--assistant .*: the shell can't run it: give"):
        label(f"echo asked >> asked; {command}")
    assert Path("asked").read_text() == "asked\n"


def test_ctrl_c_loses_no_label():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been ignored
    with pytest.raises(KeyboardInterrupt):
        label(f"tail -n 1 | grep -q two && kill -INT {os.getpid()} && sleep 10; {SAY}")
    assert Path("out.jsonl").read_text() == labelled("one")


def test_an_output_without_a_last_newline_loses_no_label():
    Path("out.jsonl").write_text(labelled("one").rstrip())
    assert label(SAY) == labelled("one two three")


# ----------------------------------------------------------------------------
# The commands

def test_show_says_what_should_look_at_what_and_the_items(capsys):
    important = [("7", ["Tax: 5", "Age"])]
    Path("rows.jsonl").write_text(to_line("Age, Tax: 5 ", "7", important) + DEMO)
    main("show rows.jsonl".split())
    assert capsys.readouterr().out.endswith("""
Age, Tax: 5 7
'7' at 12 should look at '5' at 10, in the item 'Tax: 5'
'7' at 12 should look at 'Age' at 0, in the item 'Age'
""")


@pytest.mark.parametrize("arguments, message", [
    ("", "required: command"),
    ("show none.jsonl", "none.jsonl"),
    ("show demos.jsonl --row 0", "--row is 0: demos.jsonl has the rows 1 to 1"),
    ("show demos.jsonl --row 2", "--row is 2"),
    ("generate --rows 0 --out game.jsonl", "0 examples are asked for"),
    ("annotate questions.jsonl --demos none.jsonl --assistant cat --out out.jsonl", "none.jsonl"),
    ("annotate questions.jsonl --demos demos.jsonl --assistant cat --out notes", "notes:1: no"),
])
def test_a_mistake_is_one_line_and_changes_nothing(arguments, message):
    Path("notes").write_text("a note\n")
    before = sorted(Path().iterdir())
    with pytest.raises((UserError, OSError), match=rf"^.*{message}.*\Z"):
        main(arguments.split())
    assert sorted(Path().iterdir()) == before
    assert Path("notes").read_text() == "a note\n"


def run_and_raise(error):
    """Runs a program that prints half a character and ends with an error."""
    def fail(arguments):
        print("\ud83d")  # half a character, which no terminal shows, must not hide the error
        raise error

    run_main(fail, on_interrupt="it goes on")


@pytest.mark.parametrize("error, line", [
    (UserError("\u2028 \udcff"), ": \u2028 \\udcff\n"),
    (FileNotFoundError(2, "Not there", "x"), ": [Errno 2] Not there: 'x'\n"),
    (KeyboardInterrupt(), "it goes on\n"),
])
def test_a_mistake_of_the_user_ends_the_program_with_one_line(error, line, capsys):
    with pytest.raises(SystemExit) as end:
        run_and_raise(error)
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert printed.endswith(line)
    assert printed.count("\n") == 1


def test_a_mistake_in_the_code_ends_in_its_traceback():
    with pytest.raises(ValueError, match="a shape"):
        run_and_raise(ValueError("a shape"))
