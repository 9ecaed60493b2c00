"""Labelling with an assistant, against a stand-in that also misbehaves, and scores made by hand."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data import Example, main, parse_reply, read

STAND_IN = '''
import json, os, signal, sys
prompt = sys.stdin.read()
row = json.loads(prompt.split("\\n")[-2])
mode, target = row["input"].split()[0], row["target"]
with open("tries", "a") as file:
    file.write(mode + "\\n")
again = open("tries").read().split().count(mode)
good = json.dumps({target: ["Smoking: 8"]})
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
GOOD = [{"High Risk": ["Smoking: 8"]}]
TEXT = "Smoking: 8, Room: 5 é Answer: "


def line(mode, important=None, text=TEXT):
    fields = {"input": f"{mode} {text}", "target": "High Risk"}
    return fields | ({"important": important} if important else {})


def write(name, lines):
    Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def lines_of(name):
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def tries():
    return Path("tries").read_text().split() if os.path.exists("tries") else []


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs data.py in a folder with demos.jsonl: run(*arguments) is (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    Path("assistant.py").write_text(STAND_IN)
    write("demos.jsonl", [line("demo", GOOD)])

    def run(*arguments):
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run


ASSISTANT = f"{sys.executable} -S assistant.py"
LABEL = ["annotate", "questions.jsonl", "--demos", "demos.jsonl", "--assistant", ASSISTANT,
         "--out", "out.jsonl"]
SMOKE, ROOM = {"High Risk": ["Smoking: 8"]}, {"Room": ["Smoking"]}
WHOLE = {"input": TEXT, "target": "High Risk", "important": [SMOKE]}
EXAMPLE = Example(TEXT, "High Risk")


@pytest.mark.parametrize("reply, important", [
    (f"Sure {{as asked}} [1]:\n```json\n{json.dumps(SMOKE)}\n```\nHope [that] helps {{really}}.",
     [SMOKE]),
    (json.dumps([SMOKE, ROOM], indent=1), [SMOKE, ROOM]), (json.dumps(WHOLE), [SMOKE]),
    (f"{json.dumps(SMOKE)}\n{json.dumps(ROOM)}", [SMOKE, ROOM]),
    (json.dumps({"important": [SMOKE]}), [SMOKE]),
    (f"<think>{json.dumps(ROOM)} {{</think>{json.dumps(SMOKE)}", [SMOKE]),
    (f"{json.dumps(ROOM)} no, better: {json.dumps(SMOKE)}", [SMOKE]),
    ('{"High Risk": ["Smoking: 8"], "High Risk": ["Room: 5"]}',
     [{"High Risk": ["Smoking: 8", "Room: 5"]}]),
    (json.dumps(WHOLE | {"input": "Other "}) + json.dumps(ROOM), [ROOM])])
def test_all_objects_of_the_answer_count(reply, important):
    assert list(parse_reply(reply, EXAMPLE).important) == important


@pytest.mark.parametrize("reply", [
    f"<think>{json.dumps(SMOKE)}</think> I don't know", f"<think>{json.dumps(SMOKE)}",  # a draft
    f"{json.dumps(SMOKE)} no, better: {json.dumps({'High Risk': ['Height: 1']})}",
    json.dumps(WHOLE | {"input": "Other "}) + "\n" + json.dumps(WHOLE | {"important": []}),
    json.dumps([SMOKE, ROOM])[:-5], json.dumps(SMOKE)[:-1], f"[{json.dumps(SMOKE)}",  # cut
    '{"High Risk": ["Smoking: 8",]}', "{'High Risk': ['Smoking: 8']}",
    "{“High Risk”: [“Smoking: 8”]}", '{"effect": "High Risk", "causes": ["Smoking: 8"]}',
    '{"High Risk": [8]}', '[{"High Risk": ["8"]}, 8]', '{"Low Risk": ["Smoking: 8"]}',
    '{"Smoking": ["Room: 5"]}', "[]", "", "{" * 100 + '{"' * 100, '{"a": ' * 3000,
    '{"High Risk": ["\\ud800"]}', json.dumps({"High Risk": ["Smoking: 8"] + ["x"] * 99_999})])
def test_what_the_assistant_did_not_say_is_no_label(reply):
    with pytest.raises(ValueError):
        parse_reply(reply, EXAMPLE)


def test_a_reply_that_is_of_no_use_is_asked_for_three_times_and_counted(run):
    modes = ["plain", "cat", "third", "silent", "fails"]
    write("questions.jsonl", map(line, modes))
    code, out, err = run(*LABEL)
    assert code == 0 and err == ""
    usable = {mode: GOOD for mode in ("plain", "third")}
    wanted = [line(mode, usable.get(mode)) for mode in modes]
    assert sorted(lines_of("out.jsonl"), key=str) == sorted(wanted, key=str)
    assert [tries().count(mode) for mode in modes] == [1, 3, 3, 3, 3]
    assert "5 examples, 2 with edges" in out
    assert "3 asked now have no usable reply, such as questions.jsonl:" in out


def test_a_command_that_is_not_done_in_time_is_no_answer(run):
    write("questions.jsonl", [line("blocks")])
    code, out, _ = run(*LABEL, "--time-limit", 0.3)
    assert code == 0 and "0.3 seconds" in out and lines_of("out.jsonl") == [line("blocks")]


def test_the_text_goes_to_standard_input_only_and_no_shell_sees_it(run):
    text = "Smoking: 8; touch hacked; $(touch hacked) `touch hacked`\n' \" \\ \u2028 Answer: "
    question = line("saves", [{"High Risk": ["touch"]}], text)
    write("questions.jsonl", [question | {"spurious": ["hacked"]}])
    assert run(*LABEL, "--assistant", f"{ASSISTANT} '$(touch hacked)' ; touch hacked")[0] == 0
    prompt, argv = json.loads(Path("saved").read_text())
    assert argv == ["assistant.py", "$(touch hacked)", ";", "touch", "hacked"]
    assert not os.path.exists("hacked")
    *_, demo, question, end = prompt.split("\n")
    assert json.loads(demo) == line("demo", GOOD) and end == ""
    assert json.loads(question) == line("saves", None, text)  # without what it was labelled with
    [labelled] = read("out.jsonl")[0]
    assert labelled.input == f"saves {text}" and labelled.spurious == ("hacked",)
    assert list(labelled.important) == GOOD


@pytest.mark.parametrize("kept", [40, -1, 1])  # bytes of a line that a kill has cut
def test_a_cut_output_is_continued_and_no_answer_is_asked_for_twice(run, kept):
    write("questions.jsonl", map(line, ["a", "twin", "b", "silent", "twin", "c"]))
    run(*LABEL, "--jobs", 1)
    lines = Path("out.jsonl").read_bytes().splitlines(keepends=True)
    assert [json.loads(one)["input"][0] for one in lines] == ["a", "t", "b", "s", "c"]  # twins once
    Path("out.jsonl").write_bytes(lines[3] + lines[0] + lines[1][:kept])
    os.remove("tries")
    asked = ["b", "c"] if kept == -1 else ["twin", "b", "c"]
    assert run(*LABEL, "--jobs", 1)[0] == 0 and tries() == asked
    assert Path("out.jsonl").read_bytes() == lines[3] + lines[0] + lines[1] + lines[2] + lines[4]
    assert run(*LABEL)[0] == 0 and tries() == asked


@pytest.mark.parametrize("content", [
    b'{"input": "x"\n{"input": "x", "target": "y"}\n', b"my notes", b'{"input": 3, "target": 4}\n'])
def test_an_output_that_is_something_else_is_left_alone(run, content):
    write("questions.jsonl", [line("a")])
    Path("out.jsonl").write_bytes(content)
    code, _, err = run(*LABEL)
    assert code == 2 and err.startswith("data.py: out.jsonl:1: ") and err.count("\n") == 1
    assert Path("out.jsonl").read_bytes() == content and not tries()


def test_an_output_that_is_removed_meanwhile_loses_no_later_answer(run):
    write("questions.jsonl", map(line, ["a", "removes", "b"]))
    assert run(*LABEL, "--jobs", 1)[0] == 0
    assert lines_of("out.jsonl") == [line("removes", GOOD), line("b", GOOD)]


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(run):
    write("questions.jsonl", map(line, ["a", "interrupts", "b", "c", "d", "e"]))
    code = ("import signal, data; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "data.main()")
    root = str(Path(__file__).parent.parent)
    stopped = subprocess.run([sys.executable, "-c", code, *LABEL, "--jobs", "1"], text=True,
                             capture_output=True, timeout=200,
                             env=os.environ | {"PYTHONPATH": root})
    assert stopped.returncode == 130
    assert stopped.stderr == "data.py: interrupted: the same command goes on\n"
    first = tries()
    assert [one["input"].split()[0] for one in lines_of("out.jsonl")] == first and "e" not in first
    assert run(*LABEL)[0] == 0 and len(lines_of("out.jsonl")) == 6 == len(tries())


@pytest.mark.parametrize("change, part", [
    ({"--assistant": "no-such-program -x"}, "--assistant is 'no-such-program -x': give"),
    ({"--assistant": "python 'x"}, "No closing quotation"), ({"--demos": "none.jsonl"}, "none"),
    ({"--demos": "plain.jsonl"}, 'plain.jsonl:2: no usable "important": give'),
    ({"--out": "questions.jsonl"}, "--out is questions.jsonl: give"), ({"--out": "."}, "'.'"),
    ({"--out": "no/out.jsonl"}, "no/out.jsonl"), ({"--jobs": 0}, "--jobs is 0: give")])
def test_a_wrong_argument_is_one_line_before_anything_is_written(run, change, part):
    write("questions.jsonl", [line("a")])
    write("plain.jsonl", [line("a", GOOD), line("b", [{"High Risk": ["Height: 1"]}])])
    before = {path: path.read_bytes() for path in Path().iterdir()}
    arguments = dict(zip(LABEL[2::2], LABEL[3::2])) | change
    code, _, err = run(*LABEL[:2], *(word for pair in arguments.items() for word in pair))
    assert code == 2 and part in err and err.startswith("data.py: ") and err.count("\n") == 1
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_check_gives_the_scores_and_the_phrases_that_differ(run):
    def make(mode, *phrases):
        return line(mode, [{"High Risk": list(phrases)}], "Smoking: 8, Weight: 4, Room: 5 Answer: ")

    write("labelled.jsonl", [make("over", "8", "5"), make("none"), make("mine", "5"),
                             make("under", "8", "4"), make("same", "5")])
    write("truth.jsonl", [make("theirs", "8"), make("under", "8", "4", "5"), make("none", "8"),
                          make("over", "8"), make("same", "5")])
    code, out, err = run("check", "labelled.jsonl", "--against", "truth.jsonl")
    # over 1 of 2 labelled and 1 true, none 0 of 0 and 1, under 2 of 2 and 3, same 1 of 1 and 1
    assert code == 0 and err == "" and out.splitlines()[1:] == [
        "4 examples compared, 1 have no true labels",
        f"edges: precision {4 / 5:.3f}, recall {4 / 6:.3f}, F1 {8 / 11:.3f}",
        "labelled.jsonl:1: missing [], too many ['5']",
        "labelled.jsonl:2: missing ['8'], too many []",
        "labelled.jsonl:4: missing ['5'], too many []"]
    write("other.jsonl", [line("other", GOOD)])
    code, _, err = run("check", "labelled.jsonl", "--against", "other.jsonl")
    assert code == 2 and err.count("\n") == 1 and "labelled.jsonl:1" in err
