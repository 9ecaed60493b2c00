"""Labels by an assistant, played by lines of shell, and the commands of data.py."""
import os
import signal
from pathlib import Path

import pytest

from data import (STG, UserError, annotate, generate, main, parse_reply, read, run_assistant,
                  run_main, to_line)

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


def test_a_list_holds_several_labels():
    assert parse_reply(f'[{LABEL}, {{"8": ["5", "7"]}}]') == [("High", ["8"]), ("8", ["5", "7"])]


@pytest.mark.parametrize("start, end", [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("Thinking...\n", "\n...done thinking.\n\n"),
])
def test_a_draft_is_no_label(start, end):
    assert parse_reply(f"{start}{OTHER} or {{{end}{LABEL}") == [("High", ["8"])]
    assert parse_reply(f"{start}{LABEL}{end}[]") == []
    with pytest.raises(ValueError, match="no JSON"):
        parse_reply(f"{start}{LABEL}{end}I can't say.")
    with pytest.raises(ValueError, match="a draft that does not end"):
        parse_reply(f"{start}{LABEL}")


@pytest.mark.parametrize("reply, message", [
    ("", "no JSON in the reply"),
    (f"{LABEL} is wrong.", "Extra data"),
    (f"{LABEL}\n{OTHER}", "Extra data"),
    (f"As in [1]: {LABEL}", "Extra data"),
    (f"[{LABEL}, ", "Expecting value"),
    (f"[{LABEL}", "Expecting ','"),
    ('{"High": ["8', "Unterminated string"),
    ("{'High': ['8']}", "Expecting property name"),
    ("[" * 100_000, "too many brackets"),
    (ECHO, "an echo"),
    (f"[{ECHO}]", "an echo"),
    ('["8"]', "no label: '8'"),
    ('{"High": [8]}', "no label: {'High'"),
    ('{"important": "8"}', "no label: '8'"),
    ('{"High": ["\\ud83d"]}', "no label: {'High'"),
    ('{"High": ["8"], "High": ["5"]}', "'High' stands twice"),
])
def test_anything_else_is_no_label(reply, message):
    with pytest.raises(ValueError, match=message):
        parse_reply(reply)


# ----------------------------------------------------------------------------
# The assistant's command

def test_the_shell_runs_the_command_and_its_pipes():
    assert run_assistant("cat | tr 5 8", "é: 5", timeout=60) == "é: 8"


def test_a_reply_that_is_not_utf8_is_read():
    assert run_assistant("printf 'caf\\351'", "", timeout=60) == "caf\ufffd"


def test_what_the_assistant_says_to_stderr_is_seen(capfd):
    run_assistant("echo loading >&2", "", timeout=60)
    assert capfd.readouterr().err == "loading\n"


def test_a_command_that_fails_gives_no_reply():
    with pytest.raises(ValueError, match="the command failed with code 3"):
        run_assistant("echo '[]'; exit 3", "", timeout=60)


@pytest.mark.parametrize("command", ["no-such-program", "cat | /"])
def test_a_command_that_can_not_be_run_is_the_users_mistake(command):
    with pytest.raises(UserError, match="--assistant '.*': the shell can't run it: give"):
        run_assistant(command, "", timeout=60)


@pytest.mark.parametrize("command", [
    "(exec >{pipe}; sleep 2; echo alive) | cat",
    "(exec 3>{pipe}; sleep 2; echo alive >&3) &",
], ids=["the shell waits", "the shell has ended"])
def test_a_time_out_ends_what_the_shell_started_too(command, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    command = command.format(pipe=pipe)
    with pytest.raises(ValueError, match="no reply in 0.5 seconds"):
        run_assistant(command, "", timeout=0.5)
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


def label(assistant):
    annotate("questions.jsonl", "demos.jsonl", assistant, "out.jsonl")


def labelled(*names):
    return "".join(to_line(f"{name} {TEXT}", "High Risk", IMPORTANT) for name in names)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with three questions and a demonstration."""
    monkeypatch.chdir(tmp_path)
    questions = [to_line(f"{name} {TEXT}", "High Risk") for name in ("one", "two", "three")]
    Path("questions.jsonl").write_text("".join(questions))
    Path("demos.jsonl").write_text(DEMO)
    return tmp_path


def test_usable_replies_become_labels(folder, capsys):
    label(SAY)
    assert Path("out.jsonl").read_text() == labelled("one", "two", "three")
    assert capsys.readouterr().out == "3 labelled, 0 without a usable reply\n"


def test_the_prompt_ends_with_the_demonstrations_and_the_bare_question(folder):
    text = "$(touch hacked) `touch hacked`; 'é' \u2028 \\"
    Path("questions.jsonl").write_text(to_line(text, "x", [("x", ["é"])], ["hacked"]))
    label("""cat > prompt; echo '{"x": ["touch"]}'""")
    prompt = Path("prompt").read_text()
    assert prompt.endswith("\n\n" + DEMO + to_line(text, "x"))
    assert not Path("hacked").exists()
    # The spurious phrases stay, and the assistant's causes replace the old ones.
    assert Path("out.jsonl").read_text() == to_line(text, "x", [("x", ["touch"])], ["hacked"])


@pytest.mark.parametrize("reply, message", [
    ("I don't know", "no JSON in the reply"),
    ("[]", "no cause that stands before its effect"),
    ('{"High Risk": ["Height: 8"]}', "no cause that stands before its effect"),
    ('{"Smoking": ["Room: 5"]}', "no cause that stands before its effect"),
])
def test_an_unusable_reply_is_counted_and_not_saved(folder, capsys, reply, message):
    Path("reply").write_text(reply)
    label("cat reply")
    count, first = capsys.readouterr().out.splitlines()
    assert count == "0 labelled, 3 without a usable reply"
    assert first.startswith(f"the first of them: questions.jsonl:1: {message}; ")
    assert Path("out.jsonl").read_text() == ""


def test_only_what_has_no_label_is_asked_again(folder):
    label(f"tail -n 1 | grep -q two && {SAY}")
    assert Path("out.jsonl").read_text() == labelled("two")
    label(f"echo asked >> asked; {SAY}")
    assert Path("out.jsonl").read_text() == labelled("two", "one", "three")
    assert Path("asked").read_text() == "asked\n" * 2


def test_a_command_that_is_not_there_ends_the_work_at_the_first_question(folder):
    with pytest.raises(UserError, match="no-such-program"):
        label("echo asked >> asked; no-such-program")
    assert Path("asked").read_text() == "asked\n"


def test_ctrl_c_loses_no_label(folder):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been ignored
    interrupt = f"tail -n 1 | grep -q two && kill -INT {os.getpid()} && sleep 10; {SAY}"
    with pytest.raises(KeyboardInterrupt):
        label(interrupt)
    assert Path("out.jsonl").read_text() == labelled("one")


def test_an_output_without_a_last_newline_loses_no_label(folder):
    Path("out.jsonl").write_text(labelled("one").rstrip())
    label(SAY)
    assert Path("out.jsonl").read_text() == labelled("one", "two", "three")


# ----------------------------------------------------------------------------
# The commands

def test_show_says_what_should_look_at_what_and_the_items(folder, capsys):
    important = [("7", ["Tax: 5", "Age"])]
    Path("rows.jsonl").write_text(labelled("one") + to_line("Age, Tax: 5 ", "7", important))
    main(["show", "rows.jsonl", "--row", "2"])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "Age, Tax: 5 7",
        "'7' at 12 should look at '5' at 10, in the item 'Tax: 5'",
        "'7' at 12 should look at 'Age' at 0, in the item 'Age'",
    ]


def test_generate_writes_the_game(folder, capsys):
    main(["generate", "--rows", "20", "--ood", "--seed", "4", "--out", "game.jsonl"])
    assert capsys.readouterr().out == "wrote 20 examples to game.jsonl\n"
    expected = generate(STG, 20, ood=True, seed=4)
    for example, row in zip(expected, read("game.jsonl"), strict=True):
        assert (row.input, row.target) == (example.input, example.target)


def test_annotate_is_a_command(folder):
    words = "annotate questions.jsonl --demos demos.jsonl --out out.jsonl --assistant".split()
    main(words + [SAY])
    assert Path("out.jsonl").read_text() == labelled("one", "two", "three")


@pytest.mark.parametrize("arguments, message", [
    ("", "required: command"),
    ("show none.jsonl", "none.jsonl"),
    ("show demos.jsonl --row 0", "--row is 0: demos.jsonl has the rows 1 to 1"),
    ("show demos.jsonl --row 2", "--row is 2"),
    ("generate --rows 0 --out game.jsonl", "0 examples are asked for"),
    ("generate --out none/game.jsonl", "none/game.jsonl"),
    ("annotate questions.jsonl --demos none.jsonl --assistant cat --out out.jsonl", "none.jsonl"),
    ("annotate questions.jsonl --demos demos.jsonl --assistant cat --out notes", "notes:1: no"),
])
def test_a_mistake_is_one_line(folder, arguments, message, capsys):
    Path("notes").write_bytes(b"caf\xe9\n")
    before = sorted(Path().iterdir())
    with pytest.raises((UserError, OSError), match=rf"^.*{message}.*\Z"):
        main(arguments.split())
    assert sorted(Path().iterdir()) == before
    assert Path("notes").read_bytes() == b"caf\xe9\n"


@pytest.mark.parametrize("error, line", [
    (UserError("rows.jsonl:1: no JSON"), ": rows.jsonl:1: no JSON\n"),
    (UserError("\u2028 \udcff"), ": \u2028 \\udcff\n"),
    (FileNotFoundError(2, "Not there", "x"), ": [Errno 2] Not there: 'x'\n"),
    (KeyboardInterrupt(), "it goes on\n"),
])
def test_the_program_ends_with_that_line(error, line, capsys):
    def fail(arguments):
        raise error

    with pytest.raises(SystemExit) as end:
        run_main(fail, on_interrupt="it goes on")
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(line)


def test_a_mistake_in_the_code_ends_in_its_traceback():
    def fail(arguments):
        raise ValueError("a shape")

    with pytest.raises(ValueError, match="a shape"):
        run_main(fail, on_interrupt="it goes on")
