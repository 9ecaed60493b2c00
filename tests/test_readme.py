"""The README's code and commands, as they stand there, with flags that make them small."""
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
import train
from cat import attention_ratio, average_attention
from model import GPT, GPTConfig

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
SMALL = "--rows 64 --test-rows 8 --steps 10 --batch-size 4 --threads 1 --device cpu"


def code_with(words):
    """The one Python block of the README that contains some words."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    found = [block for block in blocks if words in block]
    assert len(found) == 1
    return found[0]


def command_with(words):
    """The arguments of the one command of the README that contains some words."""
    commands = re.findall(r"^python \S+\.py.*$", README, re.MULTILINE)
    found = [command for command in commands if words in command]
    assert len(found) == 1
    return shlex.split(found[0])[2:]


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_the_loss_by_hand_prints_the_numbers_beside_it(capsys):
    exec(code_with("attention_ratio"), {})

    printed = re.findall(r"\d+\.\d*", capsys.readouterr().out)

    expected = [0.4, 0.1, 16, 1.753]
    assert [float(number) for number in printed] == pytest.approx(expected, abs=1e-3)


def test_the_loop_for_your_own_model_moves_attention_to_the_causes():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=32, n_head=2, n_embd=16))
    optimizer = torch.optim.Adam(gpt.parameters(), lr=0.01)
    ids = torch.randint(32, (8, 12))
    adjacency = torch.zeros(8, 12, 12, dtype=torch.bool)
    adjacency[:, 10, 5] = True

    def model(input_ids, attention_mask, output_attentions):
        logits, attentions = gpt(input_ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
        return SimpleNamespace(loss=loss, attentions=attentions)

    def ratio():
        _, attentions = gpt(ids)
        causal, other = attention_ratio(average_attention(attentions[-1:]), adjacency)
        return (causal.mean() / other.mean()).item()

    before = ratio()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = {"model": model, "optimizer": optimizer, "loader": [(batch, adjacency)] * 40}
    exec(code_with("optimizer.step()"), names)

    assert ratio() > 3 * before


def test_the_commands_that_train_and_ask(capsys):
    train.main(SMALL.split())
    assert "wrote" in capsys.readouterr().out

    train.main(command_with("--ask"))
    assert "Yellow fingers: 12" in re.sub(r"\[\d+%\]", "", capsys.readouterr().out)


def test_the_metrics_are_plotted():
    pytest.importorskip("pandas", reason="needs pandas")
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    train.main(SMALL.split())

    names = {}
    exec(code_with("pandas"), names)

    steps = names["metrics"].groupby("run").step.count()
    assert steps.to_dict() == {"cat": 10, "no-cat": 10}


def test_the_commands_for_your_own_data(capsys):
    data.main(command_with("generate"))
    data.main(command_with("show game.jsonl"))
    assert "should look at" in capsys.readouterr().out

    train.main(command_with("--val 0.2") + SMALL.split())
    assert Path("out/game/cat-1.pt").exists()


def test_the_line_of_an_own_file_is_read():
    line, = re.findall(r'^\{"input".*$', README, re.MULTILINE)
    Path("own.jsonl").write_text(line, "utf-8")

    example, = data.read("own.jsonl")

    effect, cause = example.edges[0]
    text = example.input + example.target
    assert text[slice(*effect)] == "High Risk"
    assert text[slice(*cause)] == "Smoking: 8"


def test_the_command_that_has_questions_labelled():
    line, = re.findall(r'^\{"input".*$', README, re.MULTILINE)
    Path("questions.jsonl").write_text(line, "utf-8")
    Path("demos.jsonl").write_text(line, "utf-8")
    Path("model.py").write_text("""print('{"High Risk": ["Smoking: 8"]}')""")
    arguments = command_with("annotate")
    assistant = arguments.index("--assistant") + 1
    assert arguments[assistant] == "ollama run MODEL"
    arguments[assistant] = f"{shlex.quote(sys.executable)} model.py"

    data.main(arguments)

    assert len(data.read("labelled.jsonl")[0].edges) == 1


VARIANTS = re.findall(r"^\| `(--[^`]*)`", README, re.MULTILINE)


@pytest.mark.parametrize("flags", VARIANTS)
def test_the_flags_of_each_variant(flags):
    small = "--rows 16 --test-rows 4 --steps 2 --batch-size 4 --threads 1 --device cpu"
    train.main(f"--runs cat {flags} {small}".split())
    assert Path("out/cat-1.pt").exists()


RELEASED = os.environ.get("CAT_RELEASED_DATA")


@pytest.mark.skipif(not RELEASED, reason="CAT_RELEASED_DATA names no folder of the authors' data")
@pytest.mark.parametrize("words", ["--train spurious_token", "--train STG_H"])
def test_the_commands_for_the_files_of_the_authors(words):
    command, = re.findall(rf"`python train\.py ({words}[^`]*)`", README)
    for path in Path(RELEASED).rglob("*.jsonl"):
        first_lines = path.read_text("utf-8").splitlines(keepends=True)[:20]
        Path(path.name).write_text("".join(first_lines), "utf-8")
    small = "--runs cat --seed 71 --steps 2 --threads 1 --device cpu"

    train.main(f"{command} {small}".split())

    assert len(list(Path("out").rglob("cat-71.pt"))) == 1
