"""train.py: its flags, the data of a run, the two losses, a step, what a run learns, the table."""
import math
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import train
from cat import re_attention_loss
from data import (END, Example, Feature, Game, UserError, collate, encode, game_line, generate,
                  to_line)
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


def load(flags=""):
    args = parse(flags)
    return train.load_data(args, 1, TINY, train.read_files(args))


def train_on(data, run, flags=""):
    """The model of a run with seed 1, and its lines of metrics.jsonl."""
    args = parse(flags)
    with TemporaryDirectory() as args.out:
        metrics_path = Path(args.out, "metrics.jsonl")
        model = train.train(args, run, 1, data, "fingerprint", metrics_path)
        return model, train.read_metrics(metrics_path)


def watch_one(data):
    return replace(data, watched={"train": data.train[:1]})


def write_game(path, n, ood=False, seed=0):
    """Writes n examples of the game to a file; returns their texts."""
    examples = generate(TINY, n, ood, seed)
    Path(path).write_text("".join(game_line(example) for example in examples))
    return [example.input + example.target for example in examples]


@pytest.fixture(scope="module")
def data():
    """Eight examples to train on, and one to look at during a run."""
    return watch_one(load())


@pytest.fixture(scope="module")
def learned():
    """Both runs of the tiny game: their models, scores and answers."""
    flags = "--rows 512 --test-rows 200 --steps 60"
    data = load(flags)
    result = SimpleNamespace(data=data, models={}, scores={}, answers={})
    for run in ("no-cat", "cat"):
        model, _ = train_on(watch_one(data), run, flags)
        scores, answers = train.test(model, data.tested, data.tokenizer, parse())
        result.models[run] = model
        result.scores[run] = scores
        result.answers[run] = answers
    return result


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ----------------------------------------------------------------------------
# Flags

@pytest.mark.parametrize("flags, named", [
    ("--rows 0", "--rows is 0"),
    ("--test-rows 0", "--test-rows is 0"),
    ("--steps -1", "--steps is -1"),
    ("--batch-size 0", "--batch-size is 0"),
    ("--threads 0", "--threads is 0"),
    ("--threads 99999999999", "--threads is 99999999999"),
    ("--seed 99999999999999999999", "--seed is 99999999999999999999"),
    ("--device meta", "--device is meta"),
    ("--device cpu:3", "--device is cpu:3"),
    ("--lr 0", "--lr is 0.0"),
    ("--lr nan", "--lr is nan"),
    ("--alpha inf", "--alpha is inf"),
    ("--gamma -0.1", "--gamma is -0.1"),
    ("--gamma inf", "--gamma is inf"),
    ("--decay nan", "--decay is nan"),
    ("--runs cat cat", "--runs names one twice"),
    ("--seed 1 2 1", "--seed names one twice"),
    ("--train a.jsonl", "only --train given"),
    ("--val 0.1", "only --val given"),
    ("--train a.jsonl --iid b.jsonl", "only --train --iid given"),
    ("--train a.jsonl --iid b.jsonl --ood c.jsonl --val 0.1", "--val given"),
    ("--device nonsense", "--device is nonsense"),
    ("--steps many", "'many'"),
    ("--form square", "'square'"),
    ("--layers 2", "'2'"),
    ("--causes none", "'none'"),
    ("--runs both", "'both'"),
    ("--step 5", "--step 5"),  # no abbreviations
    ("--ask cat-1.pt", "--ask"),
])
def test_a_bad_flag_is_one_line_and_changes_nothing(flags, named, own_folder):
    with pytest.raises(UserError) as error:
        train.main((SMALL + flags).split(), game=TINY)

    message = str(error.value)
    assert named in message and "\n" not in message
    assert not list(Path().iterdir())


# ----------------------------------------------------------------------------
# The data of a run

def telling_numbers(example, tokenizer):
    """What tells examples apart: all that is not spurious."""
    text = tokenizer.decode(example.idx.tolist())
    return re.search(r"Smoking: \d+", text)[0], re.search(r"Room: \d+", text)[0]


def test_no_question_of_the_game_is_asked_twice(learned):
    data = learned.data
    examples = data.train + data.watched["iid"] + data.watched["ood"]
    examples = examples + data.tested["iid"] + data.tested["ood"]

    different = set()
    for example in examples:
        different.add(telling_numbers(example, data.tokenizer))

    assert len(different) == len(examples) == 512 + 2 * train.WATCHED + 2 * 200


def names_of_causes(examples, tokenizer):
    """The names before the keys of all edges, such as Smoking in "Smoking: 8"."""
    names = set()
    for example in examples:
        for _, key in example.edges.tolist():
            before = tokenizer.decode(example.idx[:key].tolist())
            names.add(before.split()[-1].strip(":,"))
    return names


@pytest.mark.parametrize("causes, names", [
    ("value", {"Smoking"}),
    ("spurious", {"Fingers"}),
    ("random", {"Room", "Fingers"}),
])
def test_controls_have_wrong_causes_in_training_only(causes, names):
    data = load(f"--causes {causes}")
    assert names_of_causes(data.train, data.tokenizer) == names
    assert names_of_causes(data.tested["ood"], data.tokenizer) == {"Smoking"}
    assert names_of_causes(data.watched["iid"], data.tokenizer) == {"Smoking"}


def test_whole_spans_are_looked_at_in_training_and_in_tests():
    data = load("--causes span")
    for example in data.train + data.tested["ood"]:
        # Two tokens of the answer look at each of "Smoking", ": " and the number.
        assert len(example.edges) == 2 * 3


def texts(examples, tokenizer):
    return [tokenizer.decode(example.idx.tolist()) for example in examples]


def test_a_run_on_files_watches_training_examples_only(own_folder):
    train_texts = write_game("train.jsonl", 2)
    iid_texts = write_game("iid.jsonl", 2, seed=1)
    ood_texts = write_game("ood.jsonl", 2, ood=True, seed=1)

    data = load("--train train.jsonl --iid iid.jsonl --ood ood.jsonl")

    assert data.watched.keys() == {"train"}
    assert texts(data.watched["train"], data.tokenizer) == train_texts
    assert texts(data.tested["iid"], data.tokenizer) == iid_texts
    assert texts(data.tested["ood"], data.tokenizer) == ood_texts


def test_val_holds_out_a_share_of_the_training_file(own_folder):
    all_texts = write_game("train.jsonl", 4)

    data = load("--train train.jsonl --val 0.25")

    train_texts = texts(data.watched["train"], data.tokenizer)
    held_out = texts(data.tested["iid"], data.tokenizer)
    assert len(train_texts) == 3 and len(held_out) == 1
    assert sorted(train_texts + held_out) == sorted(all_texts)


def test_the_blanks_that_most_questions_end_with_are_kept(own_folder):
    lines = [to_line("one", "a"), to_line("two \n", "b"), to_line("three \n", "c")]
    Path("rows.jsonl").write_text("".join(lines))
    data = load("--train rows.jsonl --iid rows.jsonl --ood rows.jsonl")
    assert data.prompt_end == " \n"


# ----------------------------------------------------------------------------
# The two losses

def test_the_answer_counts_twice_in_the_next_token_loss():
    probabilities = torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.1, 0.9], [0.5, 0.5]]])
    batch = SimpleNamespace(
        targets=torch.tensor([[0, 0, 1, -100]]),  # the last is padding
        answer=torch.tensor([[False, False, True, False]]),
    )
    loss = train.next_token_loss(probabilities.log(), batch)
    of_all = -(math.log(0.5) + math.log(0.25) + math.log(0.9)) / 3
    of_answer = -math.log(0.9)
    assert loss.item() == pytest.approx(of_all + of_answer)


@pytest.fixture(scope="module")
def three_layers(data):
    """A batch, and the maps that a model of three layers has of it, a list of (B, T, T)."""
    torch.manual_seed(0)
    batch = collate(data.train)
    model = GPT(GPTConfig(vocab_size=data.tokenizer.n_vocab, n_layer=3))
    _, attentions = model(batch.idx)
    maps = [attn.mean(dim=1) for attn in attentions]  # over heads
    return batch, attentions, maps


def test_the_last_layer_looks_at_causes_and_those_below_inside_of_items(three_layers):
    batch, attentions, maps = three_layers
    loss = train.attention_loss(attentions, batch, parse("--form log --alpha 7"))
    causes = re_attention_loss(maps[2], batch.adjacency, 7.0, "log")
    items = re_attention_loss((maps[0] + maps[1]) / 2, batch.inside, 7.0, "log")
    assert_close(loss, causes + items)


def test_an_open_path_leaves_the_layers_below_alone(three_layers):
    batch, attentions, maps = three_layers
    loss = train.attention_loss(attentions, batch, parse("--open-path"))
    assert_close(loss, re_attention_loss(maps[2], batch.adjacency, 100.0, "each"))


def test_all_layers_together_look_at_causes(three_layers):
    batch, attentions, maps = three_layers
    loss = train.attention_loss(attentions, batch, parse("--layers all"))
    mean = (maps[0] + maps[1] + maps[2]) / 3
    causes = re_attention_loss(mean, batch.adjacency, 100.0, "each")
    items = re_attention_loss((maps[0] + maps[1]) / 2, batch.inside, 100.0, "each")
    assert_close(loss, causes + items)


def test_a_model_of_one_layer_has_no_layers_below(three_layers):
    batch, attentions, maps = three_layers
    loss = train.attention_loss(attentions[:1], batch, parse())
    assert_close(loss, re_attention_loss(maps[0], batch.adjacency, 100.0, "each"))


# ----------------------------------------------------------------------------
# A step

@pytest.mark.parametrize("run", ["no-cat", "cat"])
def test_a_step_follows_the_gradient_of_the_whole_loss(run, data):
    flags = "--steps 20 --batch-size 4 --lr 0.01 --gamma 0.5 --decay 2"
    trained, _ = train_on(data, run, flags)

    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=data.tokenizer.n_vocab))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    order = []
    for _ in range(10):
        order += torch.randperm(8).tolist()  # an epoch is two batches
    for step in range(20):
        done = step / 20
        batch = collate([data.train[i] for i in order[4 * step:4 * step + 4]])
        logits, attentions = model(batch.idx)
        loss = train.next_token_loss(logits, batch)
        if run == "cat":
            gamma = 0.5 * math.exp(-2 * done)
            loss = loss + gamma * train.attention_loss(attentions, batch, parse(flags))
        rising = (step + 1) / 2  # over the first tenth of the steps
        falling = (1 + math.cos(math.pi * done)) / 2
        optimizer.param_groups[0]["lr"] = 0.01 * min(rising, falling)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert_close(dict(trained.state_dict()), dict(model.state_dict()))


def assert_same_weights(model, other):
    assert_close(dict(model.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


def test_both_runs_start_with_the_same_weights_and_see_the_same_order(data):
    without, _ = train_on(data, "no-cat", "--steps 5")
    with_cat, _ = train_on(data, "cat", "--steps 5 --gamma 0")
    assert_same_weights(without, with_cat)


def test_the_run_without_cat_ignores_causes(data):
    other_causes = watch_one(load("--causes random"))
    assert not other_causes.train[0].edges.equal(data.train[0].edges)

    model, _ = train_on(data, "no-cat", "--steps 5")
    other, _ = train_on(other_causes, "no-cat", "--steps 5")

    assert_same_weights(model, other)


def test_the_learning_rate_falls_as_a_cosine(data):
    _, lines = train_on(data, "no-cat", "--steps 10 --lr 0.01")

    rates = [line["lr"] for line in lines]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 0.01
    assert rates[5] == pytest.approx(0.005)  # half of it, when half of the training is done
    assert rates[9] == pytest.approx(0.01 * 0.0245, rel=0.01)  # (1 + cos 162°) / 2


def test_gamma_falls_to_half_at_the_half(data):
    _, lines = train_on(data, "cat", f"--steps 10 --gamma 0.4 --decay {2 * math.log(2)}")

    gammas = [line["gamma"] for line in lines]
    assert gammas[0] == 0.4
    assert gammas[5] == pytest.approx(0.2)


def test_the_last_step_is_logged_too(data):
    _, lines = train_on(data, "no-cat", "--steps 11")
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 11]


def test_a_loss_that_is_not_finite_ends_the_run(data):
    with pytest.raises(UserError, match="the loss is .* at step .* give a lower --lr"):
        train_on(data, "cat", "--steps 20 --lr 1e30")


# ----------------------------------------------------------------------------
# Evaluation

@pytest.mark.parametrize("lengths, groups", [
    ([10, 20, 30], [[10, 20, 30]]),
    ([2048, 2048, 1], [[2048, 2048], [1]]),  # 4096 tokens, the most
    ([30, 2000, 1500, 20], [[30, 2000], [1500, 20]]),  # three of 2000 would be too many
    ([10, 5000, 20], [[10], [5000], [20]]),  # a long one is alone
])
def test_a_group_has_at_most_4096_tokens_with_its_padding(lengths, groups):
    examples = [SimpleNamespace(idx=range(length)) for length in lengths]
    found = []
    for group in train.eval_batches(examples):
        found.append([len(example.idx) for example in group])

    assert found == groups


def test_an_answer_does_not_depend_on_the_examples_beside_it(learned):
    tokenizer, model = learned.data.tokenizer, learned.models["no-cat"]
    long = encode(Example("Smoking: 3. " * 400, "Risk High"), tokenizer)
    examples = learned.data.tested["ood"][:20] + [long]

    together = train.evaluate(model, examples, tokenizer, parse())
    for i, example in enumerate(examples):
        alone = train.evaluate(model, [example], tokenizer, parse())
        assert alone.given == [together.given[i]]
        assert alone.right == [together.right[i]]
        assert_close(alone.attn[0], together.attn[i], rtol=0, atol=1e-5)


def test_an_answer_is_right_just_when_the_one_that_the_model_writes_is(learned):
    tokenizer, model = learned.data.tokenizer, learned.models["no-cat"]
    answers = learned.answers["no-cat"]["ood"]
    for i, example in enumerate(learned.data.tested["ood"][:40]):
        n_question = example.answer.nonzero()[0].item() + 1
        question = example.idx[None, :n_question]
        written = model.generate(question, 64, stop=tokenizer.encode_single_token(END))
        is_right = tokenizer.decode(written) == answers.right[i]
        assert is_right == (answers.given[i] == answers.right[i])


def test_the_answers_attention_is_that_of_the_last_token_of_the_question(learned):
    example = learned.data.tested["ood"][0]
    _, attentions = learned.models["cat"](example.idx[None])
    last = example.answer.nonzero()[0].item()

    expected = attentions[-1][0, :, last].mean(dim=0)
    assert_close(learned.answers["cat"]["ood"].attn[0], expected, rtol=0, atol=1e-5)


def test_scores_by_hand():
    answers = train.Answers(["High", "Low", "Low"], ["High", "Low", "High"], [])
    assert train.accuracy(answers) == 2 / 3
    assert train.share_of_most_frequent(["High", "Low", "Low", "Low"]) == 3 / 4


def test_attention_shares_are_a_mean_over_examples_with_causes():
    attn = [torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.7, 0.1]), torch.ones(3)]
    none = torch.tensor([False, False, False])
    second = torch.tensor([False, True, False])
    third = torch.tensor([False, False, True])
    examples = [SimpleNamespace(causal=second, spurious=third),
                SimpleNamespace(causal=second, spurious=none),
                SimpleNamespace(causal=none, spurious=third)]

    shares = train.attention_shares(train.Answers([], [], attn), examples)
    expected = {"attn_causal": 0.5, "attn_spurious": 0.1, "attn_other": 0.4}
    assert shares == pytest.approx(expected)


def test_a_share_of_attention_that_is_not_known_is_left_out():
    none, first = torch.tensor([False, False]), torch.tensor([True, False])
    answers = train.Answers([], [], [torch.tensor([0.75, 0.25])])
    no_causes = [SimpleNamespace(causal=none, spurious=none)]
    no_spurious = [SimpleNamespace(causal=first, spurious=none)]
    assert train.attention_shares(answers, no_causes) == {}
    shares = train.attention_shares(answers, no_spurious)
    assert shares == {"attn_causal": 0.75, "attn_other": 0.25}


def test_changed_is_the_share_of_ood_answers_that_redrawn_ones_differ_from(learned):
    answers = learned.answers["no-cat"]
    n_changed = 0
    for before, after in zip(answers["ood"].given, answers["redrawn"].given):
        if before != after:
            n_changed += 1
    assert learned.scores["no-cat"]["changed"] == n_changed / 200


def test_the_shares_of_a_test_are_those_of_ood(learned):
    scores = learned.scores["cat"]
    shares = train.attention_shares(learned.answers["cat"]["ood"], learned.data.tested["ood"])
    assert {name: scores[name] for name in shares} == shares
    assert scores.keys() == {"acc_iid", "acc_ood", "changed", *shares}


# ----------------------------------------------------------------------------
# What a run learns

def test_with_cat_the_game_is_learned_in_and_out_of_distribution(learned):
    scores = learned.scores["cat"]
    assert scores["acc_iid"] > 0.9
    assert scores["acc_ood"] > 0.9


def test_without_cat_it_is_learned_in_distribution_only(learned):
    scores = learned.scores["no-cat"]
    assert scores["acc_iid"] > 0.9 > scores["acc_ood"]


def test_spurious_numbers_change_fewer_answers_with_cat(learned):
    assert learned.scores["cat"]["changed"] < 0.1 < learned.scores["no-cat"]["changed"]


def test_with_cat_the_attention_goes_to_the_cause(learned):
    assert learned.scores["cat"]["attn_causal"] > 0.7
    assert learned.scores["no-cat"]["attn_causal"] < 0.3


# ----------------------------------------------------------------------------
# The table

RESULTS = [
    {"run": "no-cat", "seed": 1, "acc_iid": 0.95, "acc_ood": 0.5, "changed": 0.25,
     "attn_causal": 0.2, "attn_spurious": 0.15, "attn_other": 0.65,
     "most_iid": 0.4, "most_ood": 0.375},
    {"run": "cat", "seed": 1, "acc_iid": 0.98, "acc_ood": 0.96, "changed": 0.015,
     "attn_causal": 0.9, "attn_spurious": 0.02, "attn_other": 0.08,
     "most_iid": 0.4, "most_ood": 0.375},
]


def printed_table(results, capsys):
    train.print_table(results)
    return capsys.readouterr().out.splitlines()


def test_the_table_of_one_seed(capsys):
    lines = printed_table(RESULTS, capsys)
    assert lines[:4] == [
        "",
        "          IID    OOD  changed  causal  spurious  other",
        "no CAT  0.950  0.500    25.0%   20.0%     15.0%  65.0%",
        "CAT     0.980  0.960     1.5%   90.0%      2.0%   8.0%",
    ]
    assert "0.400 for the most frequent" in lines[4]
    assert "0.375 for the most frequent" in lines[5]


@pytest.fixture
def two_seeds():
    other = {"seed": 2, "acc_iid": 0.96, "acc_ood": 0.92, "changed": 0.025, "most_ood": 0.335}
    return RESULTS + [RESULTS[0] | {"seed": 2}, RESULTS[1] | other]


def test_several_seeds_are_a_mean_with_its_spread_and_the_worst(two_seeds, capsys):
    lines = printed_table(two_seeds, capsys)
    # The standard deviation of 0.96 and 0.92 is 0.04 / sqrt(2).
    row = "CAT 0.970 ± 0.014 0.940 ± 0.028 0.920 2.0% 90.0% 2.0% 8.0%"
    assert lines[3].split() == row.split()
    assert "0.365 for the most frequent" in lines[5]


def test_the_table_fits_80_columns(two_seeds, capsys):
    lines = printed_table(two_seeds, capsys)
    assert max(len(line) for line in lines) <= 80


def test_what_is_not_known_is_left_out_of_the_table(capsys):
    lines = printed_table([{"run": "cat", "seed": 1, "acc_iid": 0.5, "most_iid": 0.25}], capsys)
    assert lines[1:3] == ["       IID", "CAT  0.500"]
    assert len(lines) == 4
