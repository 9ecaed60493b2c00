"""The README's Python code that runs alone. Its commands of train.py and data.py: see .ci/run."""
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from model import GPT, GPTConfig

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def code_with(words):
    """The one Python block of the README that begins with some words."""
    found, = re.findall(rf"```python\n({words}.*?)```", README, re.DOTALL)
    return found


def test_the_loss_by_hand_prints_the_numbers_beside_it(capsys):
    exec(code_with("import torch"), {})
    printed = re.findall(r"\d+\.\d*", capsys.readouterr().out)
    assert [float(number) for number in printed] == pytest.approx([0.4, 0.1, 16, 1.753], abs=1e-3)


def test_the_loop_for_your_own_model_lowers_the_attention_loss():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=32))
    ids = torch.randint(32, (8, 12))
    adjacency = torch.zeros(8, 12, 12)
    adjacency[:, 10, 5] = 1

    def model(input_ids, attention_mask, output_attentions):
        _, attentions = gpt(input_ids)
        return SimpleNamespace(loss=0.0, attentions=attentions)

    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = {"model": model, "optimizer": torch.optim.Adam(gpt.parameters())}
    losses = []
    for n_batches in (1, 20):
        names["loader"] = [(batch, adjacency)] * n_batches
        exec(code_with("from cat import"), names)
        losses.append(names["loss_attn"].item())
    assert losses[1] < losses[0] / 2


def test_the_metrics_are_plotted(tmp_path, monkeypatch):
    pytest.importorskip("pandas", reason="needs pandas")
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    monkeypatch.chdir(tmp_path)
    train.main("--rows 64 --test-rows 8 --steps 10 --threads 1".split())
    names = {}
    exec(code_with("import pandas"), names)
    steps = names["metrics"].groupby("run").step.count()
    assert steps.to_dict() == {"cat": 10, "no-cat": 10}
