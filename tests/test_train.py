"""train.py: its flags, the data of a run, the two losses, a training, the scores, what a run
learns, and the table."""
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import train
from cat import re_attention_loss
from data import Example, Feature, Game, UserError, collate, encode, generate
from model import GPT, GPTConfig

torch.set_num_threads(1)

# A game with one feature of each kind, which is learned in seconds.
TINY = Game(
    causal=[Feature("Smoking", weight=1.0)],
    spurious=[Feature("Fingers", copies="Smoking")],
    irrelevant=[Feature("Room", high=200)],
    question="Patient. {features} Answer: ",
    answers=[(5.5, "Risk High"), (-math.inf, "Risk Low")],
)
SMALL = "--rows 8 --test-rows 4 --steps 1 --device cpu --threads 1 "


def parse(flags=""):
    return train.parse_args((SMALL + flags).split())


def load(flags="", files=None):
    return train.load_data(parse(flags), 1, TINY, files)


@pytest.fixture(scope="module")
def data():
    return load()


def scores_of(run):
    """What a run of a few seconds scores on the tiny game."""
    flags = "--rows 512 --test-rows 200 --steps 60 --out ."
    data = load(flags)
    model = train.train(parse(flags), run, 1, data, "", "metrics.jsonl")
    scores, _ = train.test(model, data.tested, data.tokenizer, parse())
    return scores


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ----------------------------------------------------------------------------
# Flags

@pytest.mark.parametrize("flags", [
    "--rows 0", "--test-rows 0", "--steps -1", "--batch-size 0", "--threads 0",
    "--threads 99999999999", "--seed 99999999999999999999", "--device meta", "--device cpu:3",
    "--lr 0.0", "--lr nan", "--alpha inf", "--gamma -0.1", "--gamma inf", "--decay nan",
])
def test_a_bad_value_is_named(flags):
    name, value = flags.split()
    with pytest.raises(UserError, match=rf"^{name} is {value}: give .*\Z"):
        parse(flags)


@pytest.mark.parametrize("flags, named", [
    ("--runs cat cat", "--runs names one twice"),
    ("--seed 1 2 1", "--seed names one twice"),
    ("--train a.jsonl --iid b.jsonl", "only --train --iid given"),
    ("--train a.jsonl --iid b.jsonl --ood c.jsonl --val 0.1", "--val given"),
    ("--step 5", "--step 5"),  # no abbreviations
])
def test_other_bad_flags_are_named(flags, named):
    with pytest.raises(UserError, match=rf"^.*{named}.*\Z"):
        parse(flags)


# ----------------------------------------------------------------------------
# The data of a run

def test_no_question_of_the_game_is_asked_twice():
    data = load("--rows 512 --test-rows 200")
    questions = set()
    for example in data.train + data.tested["iid"] + data.tested["ood"]:
        text = data.tokenizer.decode(example.idx.tolist())
        numbers = re.findall(r"(?:Smoking|Room): \d+", text)
        questions.add(tuple(sorted(numbers)))
    assert len(questions) == 512 + 2 * 200


def test_a_control_has_wrong_causes_in_training_only(data):
    control = load("--causes spurious")
    assert control.train[0].causal.equal(data.train[0].spurious)
    assert control.tested["ood"][0].causal.equal(data.tested["ood"][0].causal)


def test_whole_spans_are_looked_at_in_training_and_in_tests():
    data = load("--causes span")
    for example in data.train + data.tested["ood"]:
        # Two tokens of the answer look at each of "Smoking", ": " and the number.
        assert len(example.edges) == 2 * 3


def test_a_run_on_files_watches_training_examples_only():
    files = {"train": generate(TINY, 2), "iid": generate(TINY, 3), "ood": generate(TINY, 4)}
    data = load(files=files)
    assert data.watched.keys() == {"train"}
    assert len(data.watched["train"]) == 2
    assert len(data.tested["iid"]) == 3
    assert len(data.tested["ood"]) == 4


def test_val_holds_out_a_share_of_the_training_file():
    data = load("--train x.jsonl --val 0.25", {"train": generate(TINY, 4)})
    assert len(data.watched["train"]) == 3
    assert len(data.tested["iid"]) == 1


# ----------------------------------------------------------------------------
# The two losses

def test_the_answer_counts_twice_in_the_next_token_loss():
    targets = torch.tensor([[0, 1, -100]])  # the last is padding
    batch = SimpleNamespace(targets=targets, answer=targets == 1)
    probabilities = torch.tensor([[[0.5, 0.5], [0.1, 0.9], [0.5, 0.5]]])
    loss = train.next_token_loss(probabilities.log(), batch)
    of_all = -(math.log(0.5) + math.log(0.9)) / 2
    of_answer = -math.log(0.9)
    assert loss.item() == pytest.approx(of_all + of_answer)


def test_causes_are_looked_at_above_and_items_below(data):
    batch = collate(data.train)
    causes, items = batch.adjacency, batch.inside  # (B, T, T) each
    maps = torch.rand(3, *causes.shape)  # of three layers, averaged over heads

    def penalty(layers, keys):
        return re_attention_loss(maps[layers].mean(dim=0), keys, 7.0, "log")

    def loss(flags):
        attentions = list(maps[:, :, None])  # one head in each
        return train.attention_loss(attentions, batch, parse(f"{flags} --form log --alpha 7"))

    assert_close(loss(""), penalty([2], causes) + penalty([0, 1], items))
    assert_close(loss("--layers all"), penalty([0, 1, 2], causes) + penalty([0, 1], items))
    assert_close(loss("--open-path"), penalty([2], causes))


# ----------------------------------------------------------------------------
# A step

def test_training_follows_the_gradient_of_the_whole_loss(data):
    args = parse("--steps 20 --batch-size 4 --lr 0.01 --gamma 0.5 --decay 2 --out .")
    trained = train.train(args, "cat", 1, data, "", "metrics.jsonl")

    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=data.tokenizer.n_vocab))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for step in range(20):
        if step % 2 == 0:  # an epoch is two batches
            order = torch.randperm(8).split(4)
        batch = collate([data.train[i] for i in order[step % 2]])
        logits, attentions = model(batch.idx)
        done = step / 20
        gamma = 0.5 * math.exp(-2 * done)
        loss_attn = train.attention_loss(attentions, batch, args)
        loss = train.next_token_loss(logits, batch) + gamma * loss_attn
        rising = (step + 1) / 2  # over the first tenth of the steps
        falling = (1 + math.cos(math.pi * done)) / 2
        optimizer.param_groups[0]["lr"] = 0.01 * min(rising, falling)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert_close(trained.state_dict(), model.state_dict())


def test_the_last_step_is_logged_too(data):
    args = parse("--steps 11 --out .")
    train.train(args, "cat", 1, data, "", "metrics.jsonl")
    steps = [line["step"] for line in train.read_metrics(Path("metrics.jsonl"))]
    assert steps == [2, 4, 6, 8, 10, 11]


def test_a_loss_that_is_not_finite_ends_the_run(data):
    args = parse("--steps 20 --lr 1e30 --out .")
    with pytest.raises(UserError, match="the loss is .* at step .* give a lower --lr"):
        train.train(args, "cat", 1, data, "", "metrics.jsonl")


# ----------------------------------------------------------------------------
# Evaluation

def test_an_answer_does_not_depend_on_the_examples_beside_it(data):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=data.tokenizer.n_vocab))
    long = encode(Example("Smoking: 3. " * 400, "Risk High"), data.tokenizer)
    examples = data.watched["ood"][:20] + [long]
    together = train.evaluate(model, examples, data.tokenizer, parse())
    for i, example in enumerate(examples):
        alone = train.evaluate(model, [example], data.tokenizer, parse())
        assert alone.given == [together.given[i]]
        assert_close(alone.attn[0], together.attn[i], rtol=0, atol=1e-5)


def test_scores_by_hand():
    answers = train.Answers(["High", "Low", "Low"], ["High", "Low", "High"], [])
    assert train.accuracy(answers) == 2 / 3
    assert train.share_of_most_frequent(["High", "Low", "Low", "Low"]) == 3 / 4


def test_attention_shares_are_a_mean_over_examples_with_causes():
    _, second, third = torch.eye(3).bool()  # which of three tokens
    with_causes = SimpleNamespace(causal=second, spurious=third)
    without = SimpleNamespace(causal=second & third, spurious=third)
    attn = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.5, 0.1], [1.0, 1.0, 1.0]])
    answers = train.Answers([], [], attn)
    shares = train.attention_shares(answers, [with_causes, with_causes, without])
    expected = {"attn_causal": 0.4, "attn_spurious": 0.1, "attn_other": 0.5}
    assert shares == pytest.approx(expected)


# ----------------------------------------------------------------------------
# What a run learns

def test_with_cat_the_game_is_learned_out_of_distribution_too():
    scores = scores_of("cat")
    assert min(scores["acc_iid"], scores["acc_ood"]) > 0.9
    assert scores["changed"] < 0.1  # of the OOD answers, when only spurious numbers change
    assert scores["attn_causal"] > 0.7


def test_without_cat_the_game_is_learned_in_distribution_only():
    scores = scores_of("no-cat")
    assert scores["acc_iid"] > 0.9 > scores["acc_ood"]
    assert scores["changed"] > 0.1
    assert scores["attn_causal"] < 0.3


# ----------------------------------------------------------------------------
# The table

RESULT = {
    "run": "cat", "seed": 1, "acc_iid": 0.98, "acc_ood": 0.96, "changed": 0.015,
    "attn_causal": 0.9, "attn_spurious": 0.02, "attn_other": 0.08,
    "most_iid": 0.4, "most_ood": 0.375,
}


def test_the_table_of_one_seed(capsys):
    other = {"run": "no-cat", "acc_iid": 0.95, "acc_ood": 0.5, "changed": 0.25}
    train.print_table([RESULT | other, RESULT])
    assert capsys.readouterr().out.startswith("""
          IID    OOD  changed  causal  spurious  other
no CAT  0.950  0.500    25.0%   90.0%      2.0%   8.0%
CAT     0.980  0.960     1.5%   90.0%      2.0%   8.0%
IID: share of right answers; 0.400 for the most frequent one
OOD: share of right answers; 0.375 for the most frequent one
""")


def test_several_seeds_are_a_mean_with_its_spread_and_the_worst(capsys):
    other = {"seed": 2, "acc_iid": 0.96, "acc_ood": 0.92, "changed": 0.025}
    train.print_table([RESULT, RESULT | other])
    printed = capsys.readouterr().out
    # The standard deviation of 0.96 and 0.92 is 0.04 / sqrt(2).
    assert "CAT  0.970 ± 0.014  0.940 ± 0.028  0.920     2.0%   90.0%      2.0%   8.0%" in printed


def test_what_is_not_known_is_left_out_of_the_table(capsys):
    train.print_table([{"run": "cat", "seed": 1, "acc_iid": 0.5, "most_iid": 0.25}])
    assert capsys.readouterr().out.startswith("\n       IID\nCAT  0.500\nIID: share")
