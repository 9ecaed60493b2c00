"""Tests of cat.py: the loss by hand, by its definition and by its gradients, the attention that
counts, the averages, gamma, and errors."""
import math

import pytest
import torch

from cat import FORMS, attention_ratio, average_attention, gamma_at, re_attention_loss, split_keys

torch.set_num_threads(1)


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


@pytest.mark.parametrize("form, alpha, penalty", [
    ("hinge", 20, 20 - 4),
    ("div", 20, -math.log(1.4) / math.log(1.1)),
    ("log", 20, math.log(20 / 4)),
    ("each", 20, (math.log(20 / 6) + math.log(20 / 2)) / 2),
    ("uniform", None, -(math.log(2 * 0.6) + math.log(2 * 0.2)) / 2),
    # A mean is content: the ratio is 4. "each" still asks for key 2, whose own ratio is 2.
    ("log", 3.9, 0),
    ("each", 3.9, math.log(3.9 / 2) / 2),
])
def test_loss_by_hand(form, alpha, penalty):
    attn, adjacency = example()
    loss = re_attention_loss(attn, adjacency, alpha, form)
    assert loss.item() == pytest.approx(penalty, rel=1e-5)


def test_the_two_sides_of_the_ratio():
    attn, adjacency = example()
    causal, other = attention_ratio(attn, adjacency)
    assert causal.tolist() == pytest.approx([0.4])  # one query counts
    assert other.tolist() == pytest.approx([0.1])


# The definition, query by query

each_form = pytest.mark.parametrize("form", FORMS)
each_mask = pytest.mark.parametrize("mask_name", ["none", "padding", "window"])

ALPHA = 1.2  # in the random case, some ratios are below this and some above


def random_case(mask_name):
    """attn and adjacency of 4 texts of 8 tokens, a mask, and which keys each query sees."""
    torch.manual_seed(0)
    attn = torch.rand(4, 8, 8, dtype=torch.float64)
    sees = torch.ones(4, 8, 8).tril().bool()
    adjacency = (torch.rand(4, 8, 8) < 0.4) & sees
    adjacency[:, 4] = False  # no causal key
    adjacency[:, 5, :6] = True  # no other key

    mask = None
    if mask_name == "padding":
        mask = torch.ones(4, 8)
        mask[0, 6] = 0
        sees[0, 6] = False  # padding is no query
        sees[0, :, 6] = False  # and no key
    if mask_name == "window":
        mask = torch.ones(4, 8, 8).triu(-3)  # a query sees its last four keys
        sees = sees.triu(-3)
    return attn, adjacency, mask, sees


def penalty_of_query(on_causal, on_other, form):
    """on_causal and on_other hold the attention of one query on each causal and each other key."""
    causal = on_causal.mean()
    other = on_other.mean()
    ratio = causal / other
    if form == "uniform":
        return -torch.log(len(on_causal) * on_causal).mean()
    if form == "each":
        return (math.log(ALPHA) - torch.log(on_causal / other)).relu().mean()
    if ratio >= ALPHA:
        return 0
    if form == "hinge":
        return ALPHA - ratio
    if form == "div":
        return -math.log(1 + causal) / math.log(1 + other)
    if form == "log":
        return math.log(ALPHA) - math.log(ratio)


@each_form
@each_mask
def test_loss_equals_its_definition(form, mask_name):
    attn, adjacency, mask, sees = random_case(mask_name)
    penalties = []
    for text in range(4):
        for query in range(8):
            seen = sees[text, query]
            looks = adjacency[text, query]
            on_causal = attn[text, query, seen & looks]
            on_other = attn[text, query, seen & ~looks]
            if len(on_causal) and len(on_other):
                penalty = penalty_of_query(on_causal, on_other, form)
                penalties.append(float(penalty))
    loss = re_attention_loss(attn, adjacency, ALPHA, form, mask)
    assert loss.item() == pytest.approx(sum(penalties) / len(penalties), rel=1e-5)


# Gradients

@each_form
@each_mask
def test_gradients_are_those_of_the_loss(form, mask_name):
    attn, adjacency, mask, _ = random_case(mask_name)
    arguments = (attn.requires_grad_(), adjacency, ALPHA, form, mask)
    assert torch.autograd.gradcheck(re_attention_loss, arguments)


# What counts

@each_form
def test_where_no_query_counts_the_loss_is_0_and_has_a_gradient(form):
    attn, _ = example()
    attn.requires_grad_()
    loss = re_attention_loss(attn, torch.zeros(1, 4, 4), 20, form)
    loss.backward()
    assert loss.item() == 0
    assert not attn.grad.any()


@each_form
@pytest.mark.parametrize("key", range(4))
def test_nan_at_a_key_that_counts_shows(form, key):
    attn, adjacency = example()
    attn[0, 3, key] = math.nan
    assert re_attention_loss(attn, adjacency, 20, form).isnan()


@each_form
@each_mask
def test_nan_elsewhere_changes_neither_loss_nor_gradient(form, mask_name):
    attn, adjacency, mask, sees = random_case(mask_name)
    _, _, counted = split_keys(adjacency, mask)
    with_nan = attn.masked_fill(~(sees & counted[:, :, None]), math.nan)

    losses = []
    for leaf in [attn, with_nan]:
        leaf.requires_grad_()
        losses.append(re_attention_loss(leaf, adjacency, ALPHA, form, mask))
        losses[-1].backward()
    assert losses[0] == losses[1]
    assert torch.equal(attn.grad, with_nan.grad)


# Numbers of few digits

@each_form
@pytest.mark.parametrize("key", [1, 3])  # a causal key, another key
def test_exact_zeros_stay_finite_and_bfloat16_becomes_float32(form, key):
    attn, adjacency = example()
    attn[0, 3] = 0.0
    attn[0, 3, key] = 1.0
    attn = attn.bfloat16().requires_grad_()
    loss = re_attention_loss(attn, adjacency, 20, form)
    loss.backward()
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    assert attn.grad.isfinite().all()


# The other parts of the total loss

def test_attention_is_averaged_over_heads_and_then_over_layers():
    four_heads = torch.arange(4.0).view(1, 4, 1, 1)  # of one token
    one_head = torch.full((1, 1, 1, 1), 10.0)
    attn = average_attention([four_heads, one_head])
    assert attn.item() == (1.5 + 10) / 2  # layers weigh the same, heads do not


def test_gamma_decays():
    assert gamma_at(2, gamma0=0.3, decay=0.5) == pytest.approx(0.3 / math.e)


# Errors

MAP = torch.zeros(2, 4, 4)
HEADS = torch.zeros(2, 3, 4, 4)
HALF = MAP.half().requires_grad_()


@pytest.mark.parametrize("function, arguments, part", [
    (re_attention_loss, (MAP, MAP, 2, "hing"), "form is 'hing': choose one of hinge"),
    (re_attention_loss, (MAP, MAP, 0), "alpha is 0"),
    (re_attention_loss, (HALF, MAP, 2), "attn is float16, whose gradients would overflow"),
    (attention_ratio, (MAP, MAP[:1]), "attn is (2, 4, 4) and adjacency (1, 4, 4)"),
    (split_keys, (HEADS,), "adjacency is (2, 3, 4, 4)"),
    (split_keys, (MAP + 0.5,), "adjacency holds values other than 0 and 1"),
    (split_keys, ((MAP + 1).tril(1),), "above the diagonal: transpose it?"),
    (split_keys, (MAP, torch.ones(2, 3)), "mask is (2, 3)"),
    (average_attention, ([],), 'attn_implementation="eager"'),
    (average_attention, ([HEADS, None],), 'attn_implementation="eager"'),
    (average_attention, ([HEADS, HEADS[:1]],), "attn is (1, 3, 4, 4)"),
    (gamma_at, (0, -0.1, 1), "gamma is -0.1"),
])
def test_errors_are_one_line_and_say_what_is_wrong(function, arguments, part):
    with pytest.raises(ValueError) as error:
        function(*arguments)
    assert part in str(error.value)
    assert "\n" not in str(error.value)
