"""The README's "cat.py beyond this repo": its code runs as it stands, in one process and in two, and averages as it says."""
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from cat import FORMS, attention_ratio, average_attention, gamma_at, re_attention_loss, supervised_rows
from model import GPT, GPTConfig
from oracle import loop_loss, random_case

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "README.md").read_text().split("\n## cat.py beyond this repo\n")[1].split("\n## ")[0]
LOOP, DISTRIBUTED, FINETUNE = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
COMMAND, = re.findall(r"^torchrun .*finetune.py .*$", SECTION, re.MULTILINE)
VOCAB = 32


def row(T, supervised, seed):
    """A row of T tokens: labels on the last 4, as many in every row so that micro-batches of next-token loss weigh the same,
    and adjacency for `supervised` of the queries that predict them."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (T,), generator=g)
    adjacency = torch.zeros(T, T, dtype=torch.bool)
    for query in range(T - 1 - supervised, T - 1):
        adjacency[query, torch.randperm(T - 6, generator=g)[:2]] = True
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "adjacency": adjacency,
            "labels": ids.masked_fill(torch.arange(T) < T - 4, -100)}


def collate(rows, left=False):
    """A batch padded to 12 tokens and its adjacency, with edges in the padding, which must not count."""
    batch = {name: torch.full((len(rows),) + (12,) * rows[0][name].dim(), -100 if name == "labels" else 0) for name in rows[0]}
    batch["adjacency"][:, 1:, 0] = 1
    for b, example in enumerate(rows):
        inside = slice(12 - len(example["input_ids"]), 12) if left else slice(len(example["input_ids"]))
        for name, tensor in example.items():
            batch[name][(b, *[inside] * tensor.dim())] = tensor
    return batch, batch.pop("adjacency")


class Tiny(torch.nn.Module):
    """The repo's GPT behind the interface of a Hugging Face model, in float64 so that sums in another order agree."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gpt = GPT(GPTConfig(VOCAB, n_head=2, n_embd=16)).double()

    def forward(self, input_ids, attention_mask, labels, output_attentions):
        logits, attentions = self.gpt(input_ids)
        return SimpleNamespace(loss=F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), attentions=attentions)


# supervised rows of each example, for two steps of two processes with two micro-batches of two examples
SUPERVISED = [[[[4, 3], [0, 1]], [[0, 0], [0, 0]]],
              [[[0, 0], [1, 0]], [[2, 4], [4, 4]]]]


def steps():
    """Examples in the nesting of SUPERVISED."""
    seeds = iter(range(100))
    return [[[[row(9 + i, n, next(seeds)) for i, n in enumerate(examples)] for examples in micro_batches]
             for micro_batches in processes] for processes in SUPERVISED]


def plain(loader):
    """What the README's loops start from."""
    model = Tiny()
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "loader": loader, "epochs": 2}


def distributed(rank, world_size):
    """`plain` for one process of one or two."""
    def micro_batches(processes):
        return processes[rank] if world_size == 2 else sum(processes, [])
    return plain([[collate(examples) for examples in micro_batches(step)] for step in steps()])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors are many times slower on several threads when the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole():
    """Weights of the README's first loop with each step's whole batch in one piece."""
    namespace = plain([collate(sum(sum(step, []), [])) for step in steps()])
    exec(LOOP, namespace)
    return namespace["model"].state_dict()


def torchrun(folder, script, flags=""):
    """The README's torchrun command on `script`, which can import this module."""
    (folder / "finetune.py").write_text(script)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *COMMAND.split()[1:], *flags.split()]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


def assert_same(weights, expected, **tolerance):
    assert weights.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], **tolerance, msg=lambda m: f"{name}: {m}")


def test_micro_batches_in_one_process_equal_the_whole_batch(whole, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    namespace = distributed(rank=0, world_size=1)
    model = namespace["model"]
    try:
        exec(DISTRIBUTED, namespace)
    finally:
        dist.destroy_process_group()
    assert_same(model.state_dict(), whole, rtol=1e-9, atol=1e-12)


def test_two_processes_equal_the_whole_batch(whole, tmp_path):
    torchrun(tmp_path, f"""
import os, torch
from test_beyond import distributed
globals().update(distributed(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])))
{DISTRIBUTED}
torch.save(model.module.state_dict(), f"weights{{dist.get_rank()}}.pt")
dist.destroy_process_group()
""")
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"weights{rank}.pt"), whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_reduction_none_is_the_penalty_of_each_counted_row(form):
    attn, adjacency, mask = random_case(3, 9, 2)
    penalty = re_attention_loss(attn, adjacency, 1.5, form, mask, reduction="none")
    *_, rows = attention_ratio(attn, adjacency, mask)
    assert penalty.shape == (rows.sum(),)
    for value, (b, i) in zip(penalty, rows.nonzero().tolist()):
        one = torch.zeros_like(adjacency)
        one[b, i] = adjacency[b, i]
        assert torch.allclose(value, loop_loss(attn, one, 1.5, form, mask))
    assert torch.allclose(penalty.mean(), re_attention_loss(attn, adjacency, 1.5, form, mask, "mean"))
    assert torch.equal(torch.stack(supervised_rows(adjacency, mask)[:2], dim=1), rows.nonzero())


def test_reduction_none_without_supervision_is_empty_with_a_gradient():
    attn, adjacency, _ = random_case(2, 6, 0, padded=False)
    attn.requires_grad_()
    penalty = re_attention_loss(attn, torch.zeros_like(adjacency), 1.5, reduction="none")
    grad, = torch.autograd.grad(penalty.sum(), attn)
    assert penalty.shape == (0,) and (grad == 0).all()


def test_errors_are_one_line_and_say_what_to_do():
    attn, adjacency, _ = random_case(2, 4, 0, padded=False)
    for call, part in [
        (lambda: re_attention_loss(attn, adjacency, 2.0, reduction="sum"), "'sum'"),
        (lambda: supervised_rows(adjacency[0]), "(4, 4)"),
        (lambda: average_attention(None), 'attn_implementation="eager"'),
        (lambda: average_attention(()), 'attn_implementation="eager"'),
        (lambda: average_attention((None, None)), 'attn_implementation="eager"'),
        (lambda: average_attention((attn[:, None], None)), "[(2, 1, 4, 4), None]"),
    ]:
        with pytest.raises(ValueError) as error:
            call()
        assert part in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def hf():
    reason = "needs pip install transformers==5.24.0 accelerate==1.15.0"
    pytest.importorskip("accelerate", reason=reason)
    return pytest.importorskip("transformers", reason=reason)


def random_model(hf, name, attn_implementation="eager"):
    """4 query heads share 2 key-value heads."""
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.3, attn_implementation=attn_implementation)  # at the usual 0.02 attention is all but uniform
    return getattr(hf, f"{name}ForCausalLM")(config)


ROWS = [row(8 + i % 3, n, seed=i) for i, n in enumerate([4, 0, 0, 1, 0, 0, 3, 0])]


@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hugging_face_attention(hf, name, dtype):
    model = random_model(hf, name).to(dtype)
    batch, adjacency = collate(ROWS, left=True)
    assert batch["attention_mask"].tolist()[0] == [0] * 4 + [1] * 8
    attentions = model(**batch, output_attentions=True).attentions
    assert [attn.shape for attn in attentions] == [(8, 4, 12, 12)] * 2 and attentions[0].dtype == dtype
    attn = average_attention(attentions)
    loss = re_attention_loss(attn, adjacency, 200.0, "log", batch["attention_mask"])
    loss.backward()
    assert attn.dtype == loss.dtype == torch.float32 and 0 < loss < 10
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(grad.isfinite().all() for grad in grads.values())
    assert all((grads[f"model.layers.{i}.self_attn.{p}_proj.weight"] != 0).any() for i in range(2) for p in "qk")
    unpadded = [re_attention_loss(average_attention(model(example["input_ids"][None], output_attentions=True).attentions),
                                  example["adjacency"][None], 200.0, "log", reduction="none") for example in ROWS]
    torch.testing.assert_close(torch.cat(unpadded).mean(), loss, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=0)


def test_forgetting_eager_is_a_clear_error(hf):
    batch, _ = collate(ROWS, left=True)
    output = random_model(hf, "Llama", "sdpa")(**batch, output_attentions=True)
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        average_attention(output.attentions[-1:])


FLAGS = "--optim sgd --learning_rate 0.1 --lr_scheduler_type constant --max_grad_norm 0 --num_train_epochs 2 --seed 0 " \
        "--use_cpu True --save_strategy no --report_to none --disable_tqdm True"


@pytest.fixture(scope="module")
def finetuned(hf, tmp_path_factory):
    """A folder with a random Llama, and without the Trainer: the model after two steps on all of ROWS, and their mean loss."""
    path = tmp_path_factory.mktemp("llama")
    model = random_model(hf, "Llama")
    model.save_pretrained(path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch, adjacency = collate(ROWS, left=True)
    losses = []
    for epoch in range(2):
        output = model(**batch, output_attentions=True)
        l_attn = re_attention_loss(average_attention(output.attentions[-1:]), adjacency, 200.0, "log", batch["attention_mask"])
        losses.append(output.loss + gamma_at(epoch, 0.1, 0.1) * l_attn)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return path, model, sum(losses).item() / 2


@pytest.mark.parametrize("batch_size, micro_batches", [(8, 1), (2, 4)])
def test_trainer_equals_the_whole_batch(finetuned, batch_size, micro_batches, monkeypatch, tmp_path):
    path, expected, mean_loss = finetuned
    flags = f"{FLAGS} --per_device_train_batch_size {batch_size} --gradient_accumulation_steps {micro_batches}"
    monkeypatch.setattr(sys, "argv", ["finetune.py", *flags.split(), "--output_dir", str(tmp_path)])
    namespace = {"path": path, "rows": ROWS}
    exec(FINETUNE, namespace)
    assert_same(namespace["model"].state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-6)
    assert namespace["trainer"].state.log_history[-1]["train_loss"] == pytest.approx(mean_loss, rel=1e-4)
    batch, _ = collate(ROWS, left=True)
    l_next = namespace["trainer"].evaluate(ROWS)["eval_loss"]
    assert l_next == pytest.approx(expected(**batch).loss.item(), rel=1e-4)


def test_trainer_in_two_processes_equals_the_whole_batch(finetuned, tmp_path):
    path, expected, mean_loss = finetuned
    torchrun(tmp_path, f"""
import torch
from test_beyond import ROWS as rows
path = {str(path)!r}
{FINETUNE}
torch.save((model.state_dict(), trainer.state.log_history[-1]["train_loss"]), f"trained{{args.process_index}}.pt")
torch.distributed.destroy_process_group()
""", FLAGS)
    weights, train_loss = zip(*(torch.load(tmp_path / f"trained{rank}.pt") for rank in range(2)))
    for rank in range(2):
        assert_same(weights[rank], expected.state_dict(), rtol=1e-4, atol=1e-6)
    assert sum(train_loss) / 2 == pytest.approx(mean_loss, rel=1e-4)  # each process reports its own share
