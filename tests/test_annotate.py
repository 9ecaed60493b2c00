"""Labelling with an assistant, against a stand-in that also misbehaves, and scores made by hand."""
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data import Example, dump, main, parse_reply

STAND_IN = '''
import json, os, signal, sys
prompt = sys.stdin.read()
mode = json.loads(prompt.split("\\n")[-2])["input"].split()[0]
with open("tries", "a") as file:
    file.write(mode + "\\n")
again = open("tries").read().split().count(mode)
good = '{"High Risk": ["Smoking: 8"]}'
if mode == "saves":
    json.dump([prompt, sys.argv], open("saved", "w"))
if mode == "removes":
    os.remove("out.jsonl")
if mode == "interrupts" and again == 1:
    os.kill(os.getppid(), signal.SIGINT)
if mode == "blocks":
    signal.pause()
print({"cat": prompt, "third": good if again == 3 else "", "silent": ""}.get(mode, good))
sys.exit(3 if mode == "fails" else 0)
'''
ASSISTANT = f"{sys.executable} -S assistant.py"
LABEL = ["annotate", "questions.jsonl", "--demos", "demos.jsonl", "--assistant", ASSISTANT,
         "--out", "out.jsonl"]
TEXT = "Smoking: 8, Room: 5 é Answer: "
GOOD = {"High Risk": ["Smoking: 8"]}
lines = lambda: Path("out.jsonl").read_text().splitlines(keepends=True)


def question(mode, *important, text=TEXT):
    return Example(f"{mode} {text}", "High Risk", important)


def write(name, examples):
    Path(name).write_text("".join(map(dump, examples)))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs data.py in a folder with demos.jsonl: run(*arguments) is (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    Path("assistant.py").write_text(STAND_IN)
    Path("tries").touch()
    write("demos.jsonl", [question("demo", GOOD)])

    def run(*arguments):
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run


SMOKE, ROOM = json.dumps(GOOD), '{"Room": ["Smoking"]}'
WHOLE = json.dumps({"input": TEXT, "target": "High Risk", "important": [GOOD]})
OTHER = WHOLE.replace("Room", "Tax")


@pytest.mark.parametrize("reply, important", [
    (f"Sure [1]:\n```json\n{SMOKE}\n```\nHope [that] helps.", [GOOD]), (WHOLE, [GOOD]),
    (f"[{SMOKE},\n {ROOM}]", [GOOD, json.loads(ROOM)]), (f'{{"important": [{SMOKE}]}}', [GOOD]),
    (f"{SMOKE}\n{ROOM}", [GOOD, json.loads(ROOM)]),
    (f"<think>{ROOM} {{</think>{SMOKE}", [GOOD]),
    ('{"High Risk": ["8"], "High Risk": "5"}', [{"High Risk": ["8", "5"]}])])
def test_all_objects_of_the_answer_count(reply, important):
    labelled = parse_reply(reply, Example(TEXT, "High Risk", spurious=("5",), source="x:1"))
    assert labelled == Example(TEXT, "High Risk", tuple(important), ("5",), "x:1")


@pytest.mark.parametrize("reply", [
    f"<think>{SMOKE}</think> I don't know", f"<think>{SMOKE}", f"{SMOKE} no, better: {ROOM}",
    OTHER, f"{OTHER}\n{WHOLE}",  # echoes
    f"[{SMOKE}, {ROOM}]"[:-5], f"[{SMOKE}",  # cut
    '{"High Risk": ["Smoking: 8",]}', "{'High Risk': ['Smoking: 8']}",
    '{"effect": "High Risk", "causes": ["Smoking: 8"]}', '[{"High Risk": ["8"]}, 8]',
    '{"important": [8]}', '{"Smoking": ["Room: 5"]}', "[]", "", '{"a": ' * 3000,
    json.dumps({"High Risk": ["Smoking: 8"] + ["x"] * 9_999})])
def test_what_the_assistant_did_not_say_is_no_label(reply):
    with pytest.raises((ValueError, AttributeError, RecursionError)):
        parse_reply(reply, Example(TEXT, "High Risk"))


def test_what_has_no_usable_reply_is_counted_and_asked_again(run):
    modes = ["plain", "cat", "third", "silent", "fails"]
    write("questions.jsonl", map(question, modes))
    for usable in 1, 1, 2:
        code, out, err = run(*LABEL)
        assert code == 0 and err == ""
        assert f"{5 - usable} without a usable reply, such as questions.jsonl:2: " in out
        assert lines() == [dump(question(mode, GOOD)) for mode in ("plain", "third")[:usable]]
    assert [Path("tries").read_text().split().count(mode) for mode in modes] == [1, 3, 3, 3, 3]


def test_a_command_that_is_not_done_in_time_is_no_answer(run, monkeypatch):
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *words, **k: real(*words, **k | {"timeout": 0.3}))
    write("questions.jsonl", [question("blocks")])
    assert "1 without a usable reply" in (out := run(*LABEL)[1]) and "0.3 seconds" in out
    assert lines() == []


def test_the_text_goes_to_standard_input_only_and_no_shell_sees_it(run):
    text = "Smoking: 8; touch hacked; $(touch hacked) `touch hacked`\n' \" \\ \u2028 Answer: "
    labelled = replace(question("saves", {"High Risk": ["touch"]}, text=text), spurious=("hacked",))
    write("questions.jsonl", [labelled])
    assert run(*LABEL, "--assistant", f"{ASSISTANT} '$(touch hacked)' ; touch hacked")[0] == 0
    prompt, argv = json.loads(Path("saved").read_text())
    assert argv == ["assistant.py", "$(touch hacked)", ";", "touch", "hacked"]
    assert not os.path.exists("hacked")
    *_, demo, asked, end = prompt.split("\n")
    assert f"{demo}\n" == dump(question("demo", GOOD)) and end == ""
    assert f"{asked}\n" == dump(question("saves", text=text))  # without what it was labelled with
    assert Path("out.jsonl").read_text() == dump(replace(labelled, important=[GOOD]))


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(run):
    write("questions.jsonl", map(question, ["a", "interrupts", "removes", "b"]))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # may have been ignored
    assert run(*LABEL)[::2] == (2, "data.py: interrupted: the same command goes on\n")
    signal.signal(signal.SIGINT, before)
    assert lines() == [dump(question("a", GOOD))]
    assert run(*LABEL)[0] == 0
    assert lines() == [dump(question(mode, GOOD)) for mode in ("removes", "b")]  # no later one lost
    assert Path("tries").read_text().split() == ["a", "interrupts", "interrupts", "removes", "b"]


@pytest.mark.parametrize("flag, value, part", [
    ("--assistant", "no-such-program -x", "no-such-program"), ("--assistant", "", "''"),
    ("--assistant", "python 'x", "No closing quotation"), ("--demos", "none.jsonl", "none"),
    ("--out", ".", "'.'"), ("--out", "notes", "notes:1: "), ("--out", "cut", "cut:2: ")])
def test_a_wrong_argument_is_one_line_before_anything_is_written(run, flag, value, part):
    write("questions.jsonl", [question("a")])
    Path("notes").write_text("my notes")  # an output that is something else
    Path("cut").write_text(dump(question("a")) + '{"input": "x')
    before = {path: path.read_bytes() for path in Path().iterdir() if path.stat().st_size}
    code, _, err = run(*LABEL, flag, value)
    assert code == 2 and part in err and err.startswith("data.py: ") and err.count("\n") == 1
    assert {path: path.read_bytes() for path in Path().iterdir() if path.stat().st_size} == before


def test_check_gives_the_scores_and_the_phrases_that_differ(run):
    for name, labels in (("labelled", dict(over="8 5", none="", mine="5", same="5", under="8 4")),
                         ("truth", dict(theirs="8", under="8 4 5", none="8", over="8", same="5"))):
        write(f"{name}.jsonl", [question(mode, {"High Risk": phrases.split()}, text="5, 8, 4: ")
                                for mode, phrases in labels.items()])
    code, out, err = run("check", "labelled.jsonl", "--against", "truth.jsonl")
    # over 1 of 2 labelled and 1 true, none 0 of 0 and 1, under 2 of 2 and 3, same 1 of 1 and 1
    assert code == 0 and err == "" and out.splitlines()[2:] == [
        f"4 of 5 compared; edges: precision {4 / 5:.3f}, recall {4 / 6:.3f}, "
        f"F1 {8 / 11:.3f}", "labelled.jsonl:1: missing [], too many ['5']",
        "labelled.jsonl:2: missing ['8'], too many []",
        "labelled.jsonl:5: missing ['5'], too many []"]
