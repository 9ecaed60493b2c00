"""Labelling with an assistant: against a rule-based stand-in that also misbehaves, and scores recomputed by hand."""
import fcntl
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data import dump, finished, label, main, read

STAND_IN = '''
import fcntl, json, os, signal, subprocess, sys, time
prompt = sys.stdin.read()
row = json.loads(prompt.split("\\n")[-2])
mode, target = row["input"].split()[0], row["target"]
with open("tries", "a") as file:
    file.write(mode + "\\n")
again = open("tries").read().split().count(mode)
lock = os.open("lock", os.O_CREAT | os.O_RDWR)
fcntl.flock(lock, fcntl.LOCK_SH)  # held until this process and its children are gone
good = json.dumps({target: ["Smoking: 8"]})
if mode == "saves":
    json.dump([prompt, sys.argv], open("saved", "w"))
if mode == "interrupts" and again == 1:
    while not os.path.getsize("out.jsonl"):
        time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGINT)
    signal.pause()
if mode in ("blocks", "closes") or mode == "once" and again == 1:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(8); open('orphan', 'w')"], pass_fds=[lock])
    if mode == "closes":
        os.close(1)
    signal.pause()
print({
    "fenced": f"Sure {{as asked}} [1]:\\n```json\\n{good}\\n```\\nHope [that] helps {{really}}.",
    "list": json.dumps([{target: "Smoking: 8"}, {"Room": ["smoking", "smoking"]}], indent=1),
    "whole": json.dumps(row | {"important": [{target: ["Smoking: 8"]}]}),
    "draft": json.dumps({target: ["Room: 5"]}) + " no: " + good + ' as {"effect": ["cause"]}',
    "partly": json.dumps({target: ["Height: 1", "Smoking: 8", ""], "Smoking": ["Room: 5"], "Health": ["Room"]}),
    "foreign": '{"Low Risk": ["Smoking: 8"]}', "late": '{"Smoking": ["Room: 5"]}', "shape": f'{{"{target}": [8]}}',
    "garbage": "{" * 100 + '{"' * 100 + "[[{" * 100, "silent": "", "huge": " " * 3_000_000 + good, "broken": good[:-1],
    "third": good if again == 3 else "",
}.get(mode, good))
sys.exit(3 if mode == "fails" else 0)
'''
GOOD = [{"High Risk": ["Smoking: 8"]}]


def row(mode, important=None, text="Smoking: 8, Room: 5 é Answer: "):
    return {"input": f"{mode} {text}", "target": "High Risk"} | ({"important": important} if important else {})


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return name


def rows_of(name):
    return [json.loads(line) for line in Path(name).read_text().split("\n")[:-1]]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs data.py in an empty folder with demos.jsonl: run(*arguments) is (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    Path("assistant.py").write_text(STAND_IN)
    write("demos.jsonl", [row("demo", GOOD)])

    def run(*arguments):
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run


ASSISTANT = f"{sys.executable} assistant.py"
LABEL = ["--annotate", "questions.jsonl", "--demos", "demos.jsonl", "--assistant", ASSISTANT, "--out", "out.jsonl"]


def test_usable_replies_are_kept_and_others_are_asked_for_three_times_and_counted(run):
    usable = {"plain": GOOD, "fenced": GOOD, "list": [GOOD[0] | {"Room": ["Smoking"]}], "whole": GOOD, "draft": GOOD,
              "partly": GOOD, "third": GOOD}
    useless = ["foreign", "late", "shape", "garbage", "silent", "huge", "broken", "fails"]
    modes = [mode for pair in zip(usable, useless) for mode in pair] + ["fails"]
    write("questions.jsonl", map(row, modes))
    code, out, err = run(*LABEL)
    assert code == 0 and err == ""
    assert rows_of("out.jsonl") == [row(mode, usable.get(mode)) for mode in modes]
    assert f"{len(modes)} rows, 7 supervised; 8 without a usable reply, such as questions.jsonl:" in out.splitlines()[-1]
    tries = Path("tries").read_text().split()
    assert {mode: tries.count(mode) for mode in modes} == {mode: 3 if mode in useless + ["third"] else 1 for mode in modes}
    assert "dropped" not in read("out.jsonl")[1]


@pytest.mark.parametrize("mode, why", [
    ("huge", "over 1000000 bytes"), ("fails", "exit status 3"), ("foreign", "no {effect: [causes]}")])
def test_the_summary_says_why_a_reply_was_useless(run, mode, why):
    write("questions.jsonl", [row("plain"), row(mode)])
    assert f"1 without a usable reply, such as questions.jsonl:2: {why}" in run(*LABEL)[1]


def test_a_command_that_is_not_done_in_time_is_killed_with_its_children(run):
    write("questions.jsonl", map(row, ["blocks", "closes"]))
    code, out, _ = run(*LABEL, "--time-limit", 1)
    with open("lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # returns when no child is left
    assert not os.path.exists("orphan")
    assert code == 0 and "not done in 1 seconds" in out and rows_of("out.jsonl") == [row("blocks"), row("closes")]


def test_the_text_goes_to_standard_input_only_and_no_shell_sees_it(run):
    text = "Smoking: 8; touch hacked; $(touch hacked) `touch hacked` | touch hacked\n' \" \\ \u2028 Answer: "
    write("questions.jsonl", [row("saves", [{"High Risk": ["touch"]}], text)])
    assert run(*LABEL, "--assistant", f"{ASSISTANT} '$(touch hacked)' ; touch hacked")[0] == 0
    prompt, argv = json.loads(Path("saved").read_text())
    assert argv == ["assistant.py", "$(touch hacked)", ";", "touch", "hacked"] and not os.path.exists("hacked")
    *_, demo, question, end = prompt.split("\n")
    assert json.loads(demo) == row("demo", GOOD) and json.loads(question) == row("saves", None, text) and end == ""
    assert rows_of("out.jsonl") == [row("saves", GOOD, text)]


def test_bad_lines_are_skipped_on_demand(run):
    for name, mode in (("questions.jsonl", "plain"), ("demos.jsonl", "demo")):
        Path(name).write_text("{\n" + json.dumps(row(mode, GOOD)) + "\n")
    code, out, _ = run(*LABEL, "--skip-bad")
    assert code == 0 and out.count("skipped 1 bad") == 2 and rows_of("out.jsonl") == [row("plain", GOOD)]


def test_a_cut_and_shuffled_output_is_continued_to_the_same_file(run):
    modes = ["a", "twin", "b", "silent", "twin", "c"]
    write("questions.jsonl", map(row, modes))
    run(*LABEL)
    whole = Path("out.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    cut = lines[2][:lines[2].index("é".encode()) + 1]  # within the two bytes of é
    Path("out.jsonl").write_bytes(b"\xef\xbb\xbf" + lines[5] + lines[3] + lines[1] + cut)
    os.remove("tries")
    assert run(*LABEL)[0] == 0
    assert Path("out.jsonl").read_bytes() == whole
    assert sorted(Path("tries").read_text().split()) == ["a", "b", "twin"]  # one of the twins was there, and the silent one too
    os.remove("tries")
    write("questions.jsonl", map(row, modes[:3]))
    assert run(*LABEL)[0] == 0 and not os.path.exists("tries")
    assert Path("out.jsonl").read_bytes() == b"".join(lines[:3] + sorted(lines[3:], key=[lines[4], lines[3], lines[5]].index))


def test_an_output_cut_anywhere_loses_only_the_cut_row(run):
    whole = Path(write("out.jsonl", map(row, "abc"))).read_bytes()
    for size in range(len(whole) + 1):
        Path("out.jsonl").write_bytes(whole[:size])
        ends = [n for n, byte in enumerate(whole) if byte == ord("\n")]
        assert len(finished("out.jsonl")) == sum(end <= size for end in ends)


@pytest.mark.parametrize("content", [
    b'{"input": "x"\n{"input": "x", "target": "y"}\n', b"my notes", b'{"input": 3, "target": 4}\n'])
def test_an_output_that_is_something_else_is_left_alone(run, content):
    write("questions.jsonl", [row("a")])
    Path("out.jsonl").write_bytes(content)
    code, out, err = run(*LABEL)
    assert code == 2 and err.startswith("data.py: out.jsonl:1: ") and err.count("\n") == 1 and "another --out" in err
    assert Path("out.jsonl").read_bytes() == content and not os.path.exists("tries")


def test_ctrl_c_stops_cleanly_and_the_same_command_continues(run):
    write("questions.jsonl", map(row, ["a", "interrupts", "once", "b"]))
    code = "import signal, data; signal.signal(signal.SIGINT, signal.default_int_handler); data.main()"
    stopped = subprocess.run([sys.executable, "-c", code, *LABEL, "--jobs", "3", "--time-limit", "20"], capture_output=True,
                             text=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)})
    with open("lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
    assert stopped.returncode == 130 and not os.path.exists("orphan")
    rows = rows_of("out.jsonl")
    assert stopped.stderr == f"data.py: stopped with {len(rows)} of 4 rows in out.jsonl: the same command continues\n"
    assert row("a", GOOD) in rows and row("once") not in rows
    assert run(*LABEL)[0] == 0
    assert rows_of("out.jsonl") == [row(mode, GOOD) for mode in ("a", "interrupts", "once", "b")]
    assert Path("tries").read_text().split().count("a") == 1


def test_kept_phrases_read_back_as_the_same_edges(tmp_path):
    rng, alphabet = random.Random(0), "aAbB1 2-.,É\n"
    some = lambda low, high: "".join(rng.choices(alphabet, k=rng.randint(low, high)))
    examples = []
    while len(examples) < 500:
        input, target = some(5, 30) + "x", some(1, 6) + "x"
        reply = json.dumps([{some(1, 2): [some(1, 2) for _ in range(5)]} for _ in range(3)])
        try:
            examples.append(label(reply, input, target))
        except ValueError:
            pass
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(dump(examples)))
    again, summary = read(path, "span")
    assert "500 rows, 500 supervised" in summary and "dropped" not in summary
    assert [set(row.edges) for row in again] == [set(row.edges) for row in examples]


@pytest.mark.parametrize("change, part", [
    ({"--assistant": "no-such-program -x"}, "--assistant is 'no-such-program -x': no such command"),
    ({"--assistant": " "}, "--assistant is ' '"), ({"--assistant": "python 'x"}, "No closing quotation"),
    ({"--demos": "none.jsonl"}, "'none.jsonl': check"), ({"--demos": "bad.jsonl"}, "bad.jsonl:2: broken JSON"),
    ({"--demos": "plain.jsonl"}, 'plain.jsonl:2: no usable "important"'), ({"--annotate": "none.jsonl"}, "'none.jsonl': check"),
    ({"--annotate": "bad.jsonl"}, "bad.jsonl:2: broken JSON"), ({"--out": "questions.jsonl"}, "--out is questions.jsonl"),
    ({"--out": "demos.jsonl"}, "--out is demos.jsonl"), ({"--out": "link.jsonl"}, "--out is link.jsonl"),
    ({"--out": "."}, "--out is ."), ({"--out": "no/out.jsonl"}, "no/out.jsonl"), ({"--jobs": 0}, "--jobs is 0"),
    ({"--jobs": 101}, "--jobs is 101"), ({"--time-limit": 0}, "--time-limit 0"), ({"--time-limit": "nan"}, "--time-limit nan"),
    ({"--demos": None}, "needs --demos"), ({"--assistant": None}, "needs --assistant"), ({"--out": None}, "needs --out"),
    ({"--annotate": None}, "give one of"), ({"--game": "STG"}, "give one of"), ({"--check": "out.jsonl"}, "give one of"),
    ({"--against": "demos.jsonl"}, "--against"), ({"--edges": "span"}, "--edges"), ({"--rows": 5}, "--rows")])
def test_a_wrong_argument_is_one_line_before_anything_is_written(run, change, part):
    write("questions.jsonl", [row("a")])
    write("plain.jsonl", [row("a", GOOD), row("b", [{"High Risk": ["Height: 1"]}])])
    Path("bad.jsonl").write_text(json.dumps(row("a", GOOD)) + "\n{\n")
    os.symlink("questions.jsonl", "link.jsonl")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    arguments = dict(zip(LABEL[::2], LABEL[1::2])) | change
    code, out, err = run(*(word for flag, value in arguments.items() if value is not None for word in (flag, value)))
    assert code == 2 and part in err and err.startswith("data.py: ") and err.count("\n") == 1
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


@pytest.mark.parametrize("arguments, part", [
    (["--check", "demos.jsonl"], "needs --against"),
    (["demos.jsonl", "--against", "demos.jsonl"], "--against does not go with FILE"),
    (["--check", "demos.jsonl", "--against", "demos.jsonl", "--out", "x"], "--out does not go with --check"),
    (["--check", "demos.jsonl", "--against", "none.jsonl"], "none.jsonl"),
    (["--check", "demos.jsonl", "--against", "other.jsonl"], "demos.jsonl: no row is in other.jsonl too"),
    (["--game", "STG", "--jobs", 2], "--jobs does not go with --game")])
def test_a_wrong_check_is_one_line(run, arguments, part):
    write("other.jsonl", [row("other", GOOD)])
    code, out, err = run(*arguments)
    assert code == 2 and part in err and err.count("\n") == 1 and out == "" and not os.path.exists("x")


def test_check_gives_the_scores_of_each_row_and_of_all_edges(run):
    text = "Smoking: 8, Weight: 4, Room: 5 Answer: "
    numbers = lambda *phrases: [{"High Risk": list(phrases)}] if phrases else None
    make = lambda mode, *phrases: row(mode, numbers(*phrases), text)
    write("labelled.jsonl", [
        make("over", "Smoking: 8", "Room: 5"), make("none"), make("under", "Smoking: 8", "Weight: 4"), make("empty"),
        make("twin", "Weight: 4"), make("twin", "Room: 5"), make("twin"), make("mine", "Room: 5")])
    write("truth.jsonl", [make("theirs", "8"), make("theirs", "8"), make("twin", "4"), make("twin", "5"), make("empty"),
                          make("under", "8", "4", "5"), make("none", "8"), make("over", "8")])
    code, out, err = run("--check", "labelled.jsonl", "--against", "truth.jsonl")
    assert code == 0 and err == "" and out.splitlines()[2:] == [
        "6 rows compared; without a partner: 2 labelled, 2 true",
        # rows: over 1 of 2 labelled and 1 true, none 0 of 0 and 1, under 2 of 2 and 3, empty all right, each twin 1 of 1 and 1
        f"all edges: precision {5 / 6:.3f}, recall {5 / 7:.3f}, F1 {10 / 13:.3f} (6 labelled, 7 true, 5 both)",
        f"mean over rows: precision {(1 / 2 + 0 + 1 + 1 + 1 + 1) / 6:.3f}, recall {(1 + 0 + 2 / 3 + 1 + 1 + 1) / 6:.3f}, "
        f"F1 {(2 / 3 + 0 + 4 / 5 + 1 + 1 + 1) / 6:.3f}",
        "worst: labelled.jsonl:2: precision 0.000, recall 0.000, F1 0.000",
        f"worst: labelled.jsonl:1: precision 0.500, recall 1.000, F1 {2 / 3:.3f}",
        f"worst: labelled.jsonl:3: precision 1.000, recall {2 / 3:.3f}, F1 0.800"]
    assert "worst" not in run("--check", "truth.jsonl", "--against", "truth.jsonl")[1]
    out = run("--check", "labelled.jsonl", "--against", "truth.jsonl", "--edges", "span")[1]
    assert "all edges: precision 0.000, recall 0.000, F1 0.000 (6 labelled, 7 true, 0 both)" in out
