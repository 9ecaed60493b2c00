"""Tests of cat.py: an example by hand, the definition of the loss in plain loops, its gradients,
and the attention that must not count."""
import math

import pytest
import torch

from cat import FORMS, attention_ratio, average_attention, gamma_at, re_attention_loss, split_keys

torch.set_num_threads(1)

ALPHA = 1.5  # in the random case, some ratios are below this and some above
EPS = 1e-8
each_form = pytest.mark.parametrize("form", FORMS)
each_mask = pytest.mark.parametrize("mask_name", ["none", "padding", "window"])


# An example by hand

def example():
    """Query 3 looks at four keys, and keys 1 and 2 are causal. The mean attention is 0.4 on these
    and 0.1 on the others: a ratio of 4."""
    attn = torch.zeros(1, 4, 4)
    adjacency = torch.zeros(1, 4, 4)
    #            at the keys:   0    1    2    3
    attn[0, 3] = torch.tensor([0.1, 0.6, 0.2, 0.1])
    adjacency[0, 3] = torch.tensor([0, 1, 1, 0])
    return attn, adjacency


@pytest.mark.parametrize("form, penalty", [
    ("hinge", 20 - 4),
    ("div", -math.log(1.4) / math.log(1.1)),
    ("log", math.log(20 / 4)),
    ("each", (math.log(20 / 6) + math.log(20 / 2)) / 2),
    ("uniform", -(math.log(2 * 0.6) + math.log(2 * 0.2)) / 2),
])
def test_loss_by_hand(form, penalty):
    attn, adjacency = example()
    loss = re_attention_loss(attn, adjacency, 20, form)
    assert loss.item() == pytest.approx(penalty, rel=1e-5)


@pytest.mark.parametrize("form, penalty", [
    ("hinge", 0),
    ("div", 0),
    ("log", 0),
    ("each", (0 + math.log(3.9 / 2)) / 2),  # key 1 has a ratio of 6, but key 2 one of 2
])
def test_a_mean_is_content_with_one_key(form, penalty):
    attn, adjacency = example()
    loss = re_attention_loss(attn, adjacency, 3.9, form)
    assert loss.item() == pytest.approx(penalty, rel=1e-5)


@pytest.mark.parametrize("form", ["hinge", "div", "log", "each"])
def test_a_ratio_of_exactly_alpha_is_enough(form):
    _, adjacency = example()
    attn = torch.full((1, 4, 4), 0.25)
    loss = re_attention_loss(attn, adjacency, 1, form)
    assert loss.item() == 0


def test_uniform_wants_all_attention_in_equal_shares():
    attn, adjacency = example()
    attn[0, 3] = torch.tensor([0.0, 0.5, 0.5, 0.0])
    loss = re_attention_loss(attn, adjacency, alpha=None, form="uniform")
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_attention_ratio_is_causal_and_other_in_the_order_of_the_queries():
    attn, adjacency = example()
    attn[0, 2] = torch.tensor([0.3, 0.7, 0.0, 0.0])
    adjacency[0, 2, 1] = 1
    causal, other = attention_ratio(attn, adjacency)
    assert causal.tolist() == pytest.approx([0.7, 0.4])
    assert other.tolist() == pytest.approx([0.15, 0.1])


# The definition, query by query and key by key

def random_case(mask_name):
    """attn, adjacency and a mask, for 4 texts of 8 tokens."""
    torch.manual_seed(0)
    B, T = 4, 8
    future = torch.ones(T, T).triu(1).bool()
    scores = torch.randn(B, T, T, dtype=torch.float64)
    attn = scores.masked_fill(future, -math.inf).softmax(dim=-1)

    adjacency = torch.rand(B, T, T) < 0.4
    adjacency[:, 4] = False  # no causal key
    adjacency[:, 5] = True  # no other key
    adjacency[:, future] = False

    mask = None
    if mask_name == "padding":
        mask = torch.ones(B, T)
        mask[0, :3] = 0  # on the left
        mask[1, 6:] = 0  # on the right
    if mask_name == "window":
        mask = torch.ones(B, T, T).triu(-3)  # a query sees its last four keys
    return attn, adjacency, mask


def sees(mask, batch, query, key):
    if key > query:
        return False
    if mask is None:
        return True
    if mask.dim() == 2:
        return mask[batch, query] and mask[batch, key]
    return mask[batch, query, key]


def queries_that_count(adjacency, mask):
    """A list of (batch, query, its causal keys, its other keys)."""
    B, T, _ = adjacency.shape
    queries = []
    for batch in range(B):
        for query in range(T):
            causal_keys = []
            other_keys = []
            for key in range(T):
                if not sees(mask, batch, query, key):
                    continue
                if adjacency[batch, query, key]:
                    causal_keys.append(key)
                else:
                    other_keys.append(key)
            if causal_keys and other_keys:
                queries.append((batch, query, causal_keys, other_keys))
    return queries


def mean(numbers):
    return sum(numbers) / len(numbers)


def penalty_of_query(on_causal, on_other, alpha, form):
    """on_causal and on_other are lists: the attention on each causal key and each other key."""
    causal = mean(on_causal) + EPS
    other = mean(on_other) + EPS
    ratio = causal / other
    n = len(on_causal)

    if form == "uniform":
        penalties = [-math.log(n * (weight + EPS)) for weight in on_causal]
        return mean(penalties)
    if form == "each":
        ratios = [(weight + EPS) / other for weight in on_causal]
        penalties = [math.log(max(alpha / ratio, 1)) for ratio in ratios]
        return mean(penalties)
    if ratio >= alpha:
        return 0
    if form == "hinge":
        return alpha - ratio
    if form == "div":
        return -math.log(1 + causal) / math.log(1 + other)
    if form == "log":
        return math.log(alpha) - math.log(ratio)


def loss_by_definition(attn, adjacency, alpha, form, mask):
    penalties = []
    for batch, query, causal_keys, other_keys in queries_that_count(adjacency, mask):
        on_causal = attn[batch, query, causal_keys].tolist()
        on_other = attn[batch, query, other_keys].tolist()
        penalty = penalty_of_query(on_causal, on_other, alpha, form)
        penalties.append(penalty)
    return mean(penalties)


@each_form
@each_mask
def test_loss_equals_its_definition(form, mask_name):
    attn, adjacency, mask = random_case(mask_name)
    loss = re_attention_loss(attn, adjacency, ALPHA, form, mask)
    expected = loss_by_definition(attn, adjacency, ALPHA, form, mask)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_zeros_and_ones_mean_what_bools_mean():
    attn, adjacency, mask = random_case("padding")
    numbers = re_attention_loss(attn, adjacency.long(), ALPHA, mask=mask)
    bools = re_attention_loss(attn, adjacency, ALPHA, mask=mask.bool())
    assert numbers == bools


# Gradients

@each_form
@each_mask
def test_gradients_are_those_of_the_loss(form, mask_name):
    attn, adjacency, mask = random_case(mask_name)
    attn.requires_grad_()
    arguments = (attn, adjacency, ALPHA, form, mask)
    assert torch.autograd.gradcheck(re_attention_loss, arguments)


@each_form
def test_a_step_down_the_gradient_raises_the_ratio(form):
    _, adjacency = example()
    scores = torch.zeros(1, 2, 4, 4, requires_grad=True)  # of two heads
    attn = average_attention([scores.softmax(dim=-1)])
    loss = re_attention_loss(attn, adjacency, 20, form)
    loss.backward()

    scores = scores - 0.01 * scores.grad
    attn = average_attention([scores.softmax(dim=-1)])
    causal, other = attention_ratio(attn, adjacency)
    assert causal / other > 1  # it was 1, since all keys were equal


# What counts

@pytest.mark.parametrize("tokens, expected", [
    ([1, 1, 1, 1], [False, False, True, True]),
    ([0, 1, 1, 1], [False, False, False, True]),  # the causal key of query 2 is padding
    ([1, 1, 1, 0], [False, False, True, False]),  # query 3 is padding
], ids=["no padding", "left", "right"])
def test_a_query_counts_with_a_causal_and_another_key(tokens, expected):
    adjacency = torch.tensor([[
        [1, 0, 0, 0],  # no other key
        [0, 0, 0, 0],  # no causal key
        [1, 0, 0, 0],
        [1, 1, 1, 0],
    ]])
    mask = torch.tensor([tokens])
    _, _, counts = split_keys(adjacency, mask)
    assert counts[0].tolist() == expected


@each_form
@pytest.mark.parametrize("adjacency", [
    torch.zeros(4, 8, 8),
    torch.ones(4, 8, 8).tril(),
], ids=["no causal key", "no other key"])
def test_no_query_that_counts_is_an_exact_zero_with_a_gradient(form, adjacency):
    attn, _, _ = random_case("none")
    attn.requires_grad_()
    loss = re_attention_loss(attn, adjacency, ALPHA, form)
    loss.backward()
    assert loss.item() == 0
    assert not attn.grad.any()


@each_form
@each_mask
def test_nan_at_a_key_that_counts_shows(form, mask_name):
    attn, adjacency, mask = random_case(mask_name)
    for batch, query, causal_keys, other_keys in queries_that_count(adjacency, mask):
        for key in causal_keys + other_keys:
            with_nan = attn.clone()
            with_nan[batch, query, key] = math.nan
            loss = re_attention_loss(with_nan, adjacency, ALPHA, form, mask)
            assert loss.isnan()


@each_form
@each_mask
def test_nan_elsewhere_changes_neither_loss_nor_gradient(form, mask_name):
    attn, adjacency, mask = random_case(mask_name)
    with_nan = torch.full_like(attn, math.nan)
    for batch, query, causal_keys, other_keys in queries_that_count(adjacency, mask):
        keys = causal_keys + other_keys
        with_nan[batch, query, keys] = attn[batch, query, keys]

    losses = []
    for leaf in [attn, with_nan]:
        leaf.requires_grad_()
        loss = re_attention_loss(leaf, adjacency, ALPHA, form, mask)
        loss.backward()
        losses.append(loss)
    assert losses[0] == losses[1]
    assert torch.equal(attn.grad, with_nan.grad)


# Numbers of few digits

@each_form
@pytest.mark.parametrize("alpha", [20, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key", [1, 3], ids=["causal", "other"])
def test_exact_zeros_stay_finite_in_float32(form, alpha, dtype, key):
    attn, adjacency = example()
    attn[0, 3] = 0.0
    attn[0, 3, key] = 1.0
    attn = attn.to(dtype).requires_grad_()
    loss = re_attention_loss(attn, adjacency, alpha, form)
    loss.backward()
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    assert attn.grad.isfinite().all()


def test_float16_is_refused_where_gradients_would_overflow():
    attn, adjacency = example()
    half = attn.half().requires_grad_()
    with pytest.raises(ValueError, match="attn is float16"):
        re_attention_loss(half, adjacency, 20)

    # Autocast goes with a GradScaler, which steps back after an overflow.
    with torch.autocast("cpu", torch.float16):
        loss = re_attention_loss(half, adjacency, 20)
    loss.backward()
    assert loss.item() == pytest.approx(16, rel=0.01)


def test_float16_is_allowed_without_a_gradient():
    attn, adjacency = example()
    loss = re_attention_loss(attn.half(), adjacency, 20)
    assert loss.item() == pytest.approx(16, rel=0.01)


# The other parts of the total loss

def test_attention_is_averaged_over_heads_and_then_over_layers():
    four_heads = torch.zeros(1, 4, 2, 2)
    four_heads[0, 3] = 1.0
    one_head = torch.full((1, 1, 2, 2), 10.0)
    attn = average_attention([four_heads, one_head])
    expected = torch.full((1, 2, 2), (0.25 + 10) / 2)  # layers weigh the same, heads do not
    assert torch.equal(attn, expected)


def test_the_average_of_bfloat16_is_in_float32():
    heads = torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16)
    attn = average_attention([heads])
    assert attn.dtype == torch.float32


def test_gamma_decays():
    assert gamma_at(0, gamma0=0.3, decay=0.5) == 0.3
    assert gamma_at(7, gamma0=0.3, decay=0) == 0.3
    assert gamma_at(2, gamma0=0.3, decay=0.5) == pytest.approx(0.3 / math.e)
    assert gamma_at(0.5, gamma0=0.3, decay=2) == pytest.approx(0.3 / math.e)


# Errors

MAP = torch.zeros(2, 4, 4)
HEADS = torch.zeros(2, 3, 4, 4)
TOKENS = torch.ones(2, 4)


@pytest.mark.parametrize("function, arguments, part", [
    (re_attention_loss, (MAP, MAP, 2, "hing"), "form is 'hing': choose one of hinge"),
    (re_attention_loss, (MAP, MAP, 0), "alpha is 0"),
    (re_attention_loss, (MAP, MAP, None), "alpha is None"),
    (re_attention_loss, (MAP, MAP, math.inf, "each"), "alpha is inf"),
    (attention_ratio, (MAP, MAP[:1]), "attn is (2, 4, 4) and adjacency (1, 4, 4)"),
    (split_keys, (HEADS,), "adjacency is (2, 3, 4, 4)"),
    (split_keys, (MAP + 0.5,), "adjacency holds values other than 0 and 1"),
    (split_keys, ((MAP + 1).tril(1),), "above the diagonal: transpose it?"),
    (split_keys, (MAP, TOKENS[:, 1:]), "mask is (2, 3)"),
    (split_keys, (MAP, TOKENS * 2), "mask holds values other than 0 and 1"),
    (average_attention, ([],), 'attn_implementation="eager"'),
    (average_attention, ([HEADS, None],), 'attn_implementation="eager"'),
    (average_attention, ([MAP],), "attn is (2, 4, 4)"),
    (average_attention, ([HEADS, HEADS[:1]],), "attn is (1, 3, 4, 4)"),
    (gamma_at, (0, -0.1, 1), "gamma is -0.1"),
    (gamma_at, (0, 0.1, math.inf), "decay is inf"),
])
def test_errors_name_the_value_in_one_line(function, arguments, part):
    with pytest.raises(ValueError) as error:
        function(*arguments)
    message = str(error.value)
    assert part in message
    assert "\n" not in message
