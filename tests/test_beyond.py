"""The README's "cat.py beyond this repo": its code runs as it stands, alone and in two processes,
and every supervised query weighs the same however they are split."""
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cat import attention_ratio, average_attention, gamma_at, re_attention_loss
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SECTION = README.split("\n## cat.py beyond this repo\n")[1].split("\n## ")[0]
LOOP, FINETUNE = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
COMMAND, = re.findall(r"^torchrun .*finetune.py .*$", SECTION, re.MULTILINE)
VOCAB, LIMIT = 32, 240  # tokens, and seconds for a command
FLAGS = ("--optim sgd --learning_rate 0.1 --lr_scheduler_type constant --max_grad_norm 0 --seed 0 "
         "--num_train_epochs 2 --use_cpu True --save_strategy no --disable_tqdm True")


def example(T, supervised, seed):
    """T tokens with labels on the last 4, so that micro-batches weigh the same in the loss on next
    tokens, and adjacency for `supervised` of the queries that predict them."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (T,), generator=g)
    adjacency = torch.zeros(T, T, dtype=torch.bool)
    for query in range(T - 1 - supervised, T - 1):
        adjacency[query, torch.randperm(T - 6, generator=g)[:2]] = True
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "adjacency": adjacency,
            "labels": ids.masked_fill(torch.arange(T) < T - 4, -100)}


EXAMPLES = [example(8 + i % 3, n, seed=i) for i, n in enumerate([4, 0, 0, 1, 0, 0, 3, 0])]


def left_padded(examples):
    """A batch of 12 tokens and its adjacency, with edges in the padding, which must not count."""
    batch = {name: torch.zeros((len(examples),) + (12,) * tensor.dim(), dtype=tensor.dtype)
             for name, tensor in examples[0].items()}
    batch["labels"][:] = -100
    batch["adjacency"][:, 1:, 0] = 1
    for b, tensors in enumerate(examples):
        for name, tensor in tensors.items():
            batch[name][(b, *[slice(-len(tensor), None)] * tensor.dim())] = tensor
    return batch, batch.pop("adjacency")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors are many times slower on several threads when the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_loop_moves_attention_to_the_causal_keys():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(VOCAB, n_head=2, n_embd=16))
    batch, adjacency = left_padded(EXAMPLES)

    def model(input_ids, attention_mask, labels, output_attentions):  # as a Hugging Face model does
        logits, attentions = gpt(input_ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, attentions=attentions)

    def ratio():
        attn = average_attention(gpt(batch["input_ids"])[1][-1:])
        causal, other = attention_ratio(attn, adjacency, batch["attention_mask"])
        return (causal.mean() / other.mean()).item()

    before = ratio()
    optimizer = torch.optim.Adam(gpt.parameters(), lr=0.01)
    loader = [(batch, adjacency)] * 2
    exec(LOOP, {"model": model, "optimizer": optimizer, "epochs": 10, "loader": loader})
    assert ratio() > 3 * before


@pytest.fixture(scope="module")
def hf():
    reason = "needs pip install transformers==5.24.0 accelerate==1.15.0"
    pytest.importorskip("accelerate", reason=reason)
    return pytest.importorskip("transformers", reason=reason)


def random_model(hf, name, attn_implementation="eager"):
    """4 query heads share 2 key-value heads."""
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation=attn_implementation,
        initializer_range=0.3)  # at the usual 0.02 attention is all but uniform
    return getattr(hf, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hugging_face_attention(hf, name, dtype):
    model = random_model(hf, name).to(dtype)
    batch, adjacency = left_padded(EXAMPLES)
    attentions = model(**batch, output_attentions=True).attentions
    assert [a.shape for a in attentions] == [(8, 4, 12, 12)] * 2 and attentions[0].dtype == dtype
    attn = average_attention(attentions)
    loss = re_attention_loss(attn, adjacency, 300.0, "each", batch["attention_mask"])
    loss.backward()
    assert attn.dtype == loss.dtype == torch.float32
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            assert projection.weight.grad.isfinite().all() and (projection.weight.grad != 0).any()
    penalties = []
    for one in EXAMPLES:  # without padding
        maps = model(one["input_ids"][None], output_attentions=True).attentions
        penalties.append(re_attention_loss(average_attention(maps), one["adjacency"][None], 300.0,
                                           "each", reduction="none"))
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 2e-2, "atol": 0}
    torch.testing.assert_close(torch.cat(penalties).mean(), loss, **tolerance)


def test_forgetting_eager_or_calling_generate_is_a_clear_error(hf):
    batch, _ = left_padded(EXAMPLES)
    output = random_model(hf, "Llama", "sdpa")(**batch, output_attentions=True)
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        average_attention(output.attentions[-1:])
    output = random_model(hf, "Llama").generate(
        batch["input_ids"], max_new_tokens=2, pad_token_id=0, output_attentions=True,
        return_dict_in_generate=True)
    with pytest.raises(ValueError, match="one forward pass"):
        average_attention(output.attentions)


@pytest.fixture(scope="module")
def whole(hf, tmp_path_factory):
    """A folder with a random Llama, and without the Trainer: the model after two steps on all of
    EXAMPLES at once, and their mean loss."""
    path = tmp_path_factory.mktemp("llama")
    model = random_model(hf, "Llama")
    model.save_pretrained(path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch, adjacency = left_padded(EXAMPLES)
    losses = []
    for epoch in range(2):
        output = model(**batch, output_attentions=True)
        attn = average_attention(output.attentions[-1:])
        l_attn = re_attention_loss(attn, adjacency, 300.0, "each", batch["attention_mask"])
        losses.append(output.loss + gamma_at(epoch, 0.1, 0.1) * l_attn)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return path, model, sum(losses).item() / 2


def assert_same(weights, expected):
    assert weights.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accepts_loss_kwargs", [True, False])
@pytest.mark.parametrize("batch_size, micro_batches", [(8, 1), (2, 4)])
def test_trainer(whole, batch_size, micro_batches, accepts_loss_kwargs, monkeypatch, tmp_path):
    """Without loss kwargs (Gemma 3n) the Trainer divides by the number of micro-batches itself."""
    path, expected, mean_loss = whole
    monkeypatch.setattr(type(expected), "accepts_loss_kwargs", accepts_loss_kwargs, raising=False)
    flags = (f"{FLAGS} --per_device_train_batch_size {batch_size} --gradient_accumulation_steps "
             f"{micro_batches} --output_dir {tmp_path}")
    monkeypatch.setattr(sys, "argv", ["finetune.py", *flags.split()])
    namespace = {"path": path, "rows": EXAMPLES}
    exec(FINETUNE, namespace)
    trainer = namespace["trainer"]
    assert trainer.model_accepts_loss_kwargs == accepts_loss_kwargs
    assert_same(namespace["model"].state_dict(), expected.state_dict())
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(mean_loss, rel=1e-4)
    l_next = expected(**left_padded(EXAMPLES)[0]).loss.item()
    assert trainer.evaluate(EXAMPLES)["eval_loss"] == pytest.approx(l_next, rel=1e-4)


def run(command, folder):
    """Runs a command that must succeed within LIMIT seconds; otherwise fails with what it said."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"  # gloo, too, would look up the name of the host
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.STDOUT, start_new_session=True)
    try:
        said, _ = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, said
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes, which have sessions of their own
        try:
            said, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said = "nothing, not even when told to end"
        pytest.fail(f"{' '.join(command)} took more than {LIMIT} s and said: {said}")


def test_trainer_in_two_processes(whole, tmp_path):
    path, expected, mean_loss = whole
    (tmp_path / "finetune.py").write_text(f"""
import torch
from test_beyond import EXAMPLES as rows
path = {str(path)!r}
{FINETUNE}
result = model.state_dict(), trainer.state.log_history[-1]["train_loss"]
torch.save(result, f"trained{{args.process_index}}.pt")
torch.distributed.destroy_process_group()
""")
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    run([*torchrun, *COMMAND.split()[1:], *FLAGS.split()], tmp_path)
    weights, losses = zip(*(torch.load(tmp_path / f"trained{rank}.pt") for rank in range(2)))
    for rank in range(2):
        assert_same(weights[rank], expected.state_dict())
    assert sum(losses) / 2 == pytest.approx(mean_loss, rel=1e-4)  # each reports its own share
