"""The Re-Attention loss: by hand, against the loop of its definition, and what must not count."""
import math
import re
from pathlib import Path

import pytest
import torch

from cat import FORMS, average_attention, gamma_at, re_attention_loss, supervised_queries
from oracle import loop_loss, random_case, supervised

README = (Path(__file__).parent.parent / "README.md").read_text()
ALPHA = 1.5  # some queries of a random case are below, some above
all_forms = pytest.mark.parametrize("form", FORMS)
all_masks = pytest.mark.parametrize("mask", [None, "padding", "window"])


def by_hand():
    """Query 3 pays 0.1, 0.6, 0.2, 0.1 to the keys; keys 1 and 2 are causal."""
    attn, adjacency = torch.eye(4)[None], torch.zeros(1, 4, 4)
    attn[0, 3] = torch.tensor([0.1, 0.6, 0.2, 0.1])
    adjacency[0, 3, 1] = adjacency[0, 3, 2] = 1
    return attn, adjacency


def test_the_example_of_the_readme(capsys):
    code, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(code)
    printed = re.findall(r"\d+\.\d*", capsys.readouterr().out)
    assert [*map(float, printed)] == pytest.approx([0.4, 0.1, 16, 1.753], abs=1e-3)


@pytest.mark.parametrize("form, alpha, penalty", [
    ("hinge", 20, 16),
    ("log", 20, math.log(20 / 4)),
    ("each", 20, (math.log(20 / 6) + math.log(20 / 2)) / 2),
    ("each", 4, (0 + math.log(4 / 2)) / 2),  # a mean of 4 is enough for the others, see below
    ("uniform", None, -(math.log(2 * 0.6) + math.log(2 * 0.2)) / 2),
    ("div", 20, -math.log(1.4) / math.log(1.1)),
    ("div2", 20, -math.log(1 + 0.4 / 1.1)),
    ("nll", 20, -0.4 / 0.5),
    *((form, 3.9, 0) for form in ("hinge", "log", "div", "div2", "nll")),  # content with one key
])
def test_each_form_by_hand(form, alpha, penalty):
    assert re_attention_loss(*by_hand(), alpha, form).item() == pytest.approx(penalty, rel=1e-5)


@all_forms
@all_masks
def test_equals_the_loop(form, mask):
    for seed, (B, T) in enumerate([(2, 6), (3, 8), (4, 13)]):
        attn, adjacency, seen = random_case(B, T, seed, mask=mask)
        case = attn, adjacency, ALPHA, form, seen
        each, loss = re_attention_loss(*case, "none"), re_attention_loss(*case)
        expected = loop_loss(*case, "none")
        torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(loss, expected.mean(), rtol=1e-12, atol=0)
        b, i, *_ = supervised_queries(adjacency, seen)
        assert list(zip(b.tolist(), i.tolist())) == [q[:2] for q in supervised(adjacency, seen)]
        if seen is not None:  # 0 and 1 mean what False and True do
            case = attn, adjacency.long(), ALPHA, form, seen.long()
            assert torch.equal(re_attention_loss(*case), loss)


@all_forms
@all_masks
def test_gradcheck(form, mask):
    attn, adjacency, seen = random_case(2, 6, 0, mask=mask)
    loss = lambda a: re_attention_loss(a, adjacency, ALPHA, form, seen)
    assert torch.autograd.gradcheck(loss, attn.requires_grad_())


@pytest.mark.parametrize("nothing", [torch.zeros(2, 6, 6), torch.ones(2, 6, 6).tril()])
def test_no_query_that_counts_is_an_exact_zero_with_a_gradient(nothing):
    attn = random_case(2, 6, 0)[0].requires_grad_()
    loss = re_attention_loss(attn, nothing, ALPHA)  # all keys causal: no other to compare with
    grad, = torch.autograd.grad(loss, attn)
    assert loss.item() == 0 and (grad == 0).all()
    assert re_attention_loss(attn, nothing, ALPHA, reduction="none").shape == (0,)


@all_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [[0.0, 0, 1], [0.5, 0.5, 0], [1, 0, 0], [0, 0, 0]])
def test_exact_zeros_stay_finite_and_bfloat16_is_summed_in_float32(form, dtype, weights):
    attn = torch.tensor([[[0.0, 0, 0], [0, 0, 0], weights]], dtype=dtype, requires_grad=True)
    adjacency = torch.tensor([[[0, 0, 0], [0, 0, 0], [1, 1, 0]]])
    for alpha in (1e-3, 20.0, 1e6):
        loss = re_attention_loss(attn, adjacency, alpha, form)
        grad, = torch.autograd.grad(loss, attn)
        assert loss.isfinite() and grad.isfinite().all() and loss.dtype == torch.float32


def test_float16_is_refused_where_its_gradients_would_overflow():
    attn, adjacency = by_hand()
    half = attn.half().requires_grad_()
    for call in (lambda: re_attention_loss(half, adjacency, 20.0),
                 lambda: average_attention([half[:, None]])):
        with pytest.raises(ValueError, match="use bfloat16, or autocast with a GradScaler"):
            call()
        with torch.autocast("cpu", torch.float16):  # a scaler steps back when a gradient overflows
            call().sum().backward()
    assert re_attention_loss(half.detach(), adjacency, 20.0).item() == pytest.approx(16, rel=1e-2)


@all_forms
@all_masks
def test_nan_shows_where_it_counts_and_nowhere_else(form, mask):
    attn, adjacency, seen = random_case(2, 6, 1, mask=mask)
    loss = lambda a: re_attention_loss(a, adjacency, 1e6, form, seen)
    b, i, causal_keys, other_keys = supervised_queries(adjacency, seen)
    counts = torch.zeros_like(adjacency).index_put((b, i), causal_keys | other_keys)
    dirty = attn.masked_fill(~counts, math.nan)
    for f in (loss, lambda a: torch.autograd.functional.jacobian(loss, a)):
        assert torch.equal(f(dirty), f(attn))
    for place in counts.nonzero():
        one = attn.clone()
        one[tuple(place)] = math.nan
        assert loss(one).isnan()


def test_heads_then_layers_are_averaged():
    four = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 2, 2)  # head h pays h, mean 1.5
    two = torch.full((1, 2, 2, 2), 10.0)  # fewer heads, but a layer weighs as much as another
    assert (average_attention((four, two)) == (1.5 + 10) / 2).all()
    assert average_attention([four.bfloat16()]).dtype == torch.float32


def test_gamma_decays_with_progress():
    assert gamma_at(0, 0.3, 0.5) == 0.3 and gamma_at(7, 0.3, 0) == 0.3
    assert gamma_at(2.5, 0.3, 0.5) == pytest.approx(0.3 * math.exp(-1.25))  # half an epoch counts


def test_errors_are_one_line_with_the_value_and_the_remedy():
    attn, adjacency, mask = random_case(2, 4, 0)
    maps, loss = attn[:, None], re_attention_loss
    for call, part in [
        (lambda: loop_loss(attn, adjacency, 2.0, "none"), "add its formula to penalty_of in tests"),
        (lambda: loss(attn, adjacency[:1], 2.0), "(2, 4, 4) is not as adjacency (1, 4, 4)"),
        (lambda: loss(attn[:, :3], adjacency[:, :3], 2.0), "adjacency (2, 3, 4): must be"),
        (lambda: loss(attn, adjacency, 2.0, mask=mask[:, :3]), "mask (2, 3): must be (B, T)"),
        (lambda: loss(attn, adjacency * 0.5, 2.0), "adjacency holds values other than 0 and 1"),
        (lambda: loss(attn, adjacency, 2.0, mask=mask * 2), "mask holds values other than 0 and 1"),
        (lambda: loss(attn, adjacency.transpose(1, 2), 2.0), "transpose it?"),
        (lambda: loss(attn, adjacency, math.inf), "alpha is inf: give the ratio to reach"),
        (lambda: loss(attn, adjacency, 2.0, "hing"), "form is 'hing': choose one of hinge"),
        (lambda: loss(attn, adjacency, 2.0, reduction="sum"), "'sum': choose mean or none"),
        (lambda: gamma_at(0, 0.1, math.inf), "decay is inf: give finite numbers of at least 0"),
        (lambda: average_attention((maps, None)), 'attn_implementation="eager"'),
        (lambda: average_attention(((maps, maps), (maps, maps))), "forward pass (not generate)"),
        (lambda: average_attention([attn]), "attn (2, 4, 4): must be (B, H, T, T)"),
        (lambda: average_attention([maps, torch.zeros(2, 1, 5, 5)]), "attn (2, 1, 5, 5)"),
    ]:
        with pytest.raises(ValueError) as error:
            call()
        assert part in str(error.value) and "\n" not in str(error.value)
