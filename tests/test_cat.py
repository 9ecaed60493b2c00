"""The Re-Attention loss: values against a loop, gradients against theory and finite differences, invariances, errors."""
import math

import pytest
import torch

from cat import FORMS, attention_ratio, average_attention, gamma_at, re_attention_loss
from oracle import EPS, dense_loss, loop_loss, random_case

ALPHA = 1.5  # some rows of a random case are below, some above


def weights_case():
    attn, adjacency, _ = random_case(2, 6, 0, padded=False)
    return attn.requires_grad_(), adjacency


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_loop(form, padded):
    for seed, (B, T) in enumerate([(2, 6), (3, 8), (4, 13)]):
        attn, adjacency, mask = random_case(B, T, seed, padded=padded)
        expected = loop_loss(attn, adjacency, ALPHA, form, mask)
        assert expected != 0
        assert torch.allclose(re_attention_loss(attn, adjacency, ALPHA, form, mask), expected, rtol=1e-12, atol=0)


def test_equals_the_loss_of_all_rows():
    attn, adjacency, _ = random_case(3, 9, 5, padded=False)
    assert torch.allclose(re_attention_loss(attn, adjacency, ALPHA), dense_loss(attn, adjacency, ALPHA), rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_low_precision_is_accumulated_in_float32(form, dtype, tolerance):
    attn, adjacency, mask = random_case(3, 12, 7, dtype)
    loss = re_attention_loss(attn, adjacency, ALPHA, form, mask)
    assert loss.dtype == torch.float32
    assert math.isclose(loss.item(), loop_loss(attn.double(), adjacency, ALPHA, form, mask).item(), rel_tol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    attn, adjacency = weights_case()
    causal, other, _ = attention_ratio(attn, adjacency)
    assert ((causal / other - ALPHA).abs() > 1e-3).all()  # finite differences must not step over the kink
    assert 0 < (causal / other < ALPHA).sum() < len(causal)
    assert torch.autograd.gradcheck(lambda a: re_attention_loss(a, adjacency, ALPHA, form), attn)


def test_hinge_gradient_is_the_closed_form():
    attn, adjacency, mask = random_case(3, 9, 3)
    attn.requires_grad_()
    re_attention_loss(attn, adjacency, ALPHA, mask=mask).backward()
    causal, other, rows = attention_ratio(attn.detach(), adjacency, mask)
    expected = torch.zeros_like(attn)
    for (b, i), c, o in zip(rows.nonzero().tolist(), causal + EPS, other + EPS):
        visible = torch.arange(9).le(i) & mask[b]
        if c / o < ALPHA:
            for j in visible.nonzero()[:, 0].tolist():
                n_causal, n_other = (adjacency[b, i] & visible).sum(), (~adjacency[b, i] & visible).sum()
                expected[b, i, j] = -1 / (n_causal * o) if adjacency[b, i, j] else c / (n_other * o ** 2)
    assert torch.allclose(attn.grad, expected / rows.sum(), rtol=1e-10)


def test_a_hand_computed_row():
    attn = torch.tensor([[[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.6, 0.2, 0.1]]])
    adjacency = torch.zeros(1, 4, 4)
    adjacency[0, 3, 1] = adjacency[0, 3, 2] = 1
    causal, other, rows = attention_ratio(attn, adjacency)
    assert rows.tolist() == [[False, False, False, True]]
    assert torch.allclose(causal, torch.tensor([0.4])) and torch.allclose(other, torch.tensor([0.1]))
    assert math.isclose(re_attention_loss(attn, adjacency, 20.0).item(), 16.0, rel_tol=1e-5)
    assert re_attention_loss(attn, adjacency, 3.9).item() == 0
    assert math.isclose(re_attention_loss(attn, adjacency, 8.0, "log").item(), math.log(2), rel_tol=1e-5)
    assert math.isclose(re_attention_loss(attn, adjacency, 8.0, "nll").item(), -0.8, rel_tol=1e-5)


def test_no_supervised_row_is_an_exact_zero_with_a_gradient():
    attn, _ = weights_case()
    everything = torch.ones(6, 6).tril().bool().expand(2, 6, 6)  # no other key is left: no row counts either
    for adjacency in (torch.zeros(2, 6, 6), everything):
        loss = re_attention_loss(attn, adjacency, 5.0)
        assert loss.item() == 0
        grad, = torch.autograd.grad(loss, attn)
        assert (grad == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", [[0.0, 0.0, 1.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])
def test_exact_zeros_stay_finite(form, dtype, row):
    attn = torch.zeros(1, 3, 3, dtype=dtype)
    attn[0, 2] = torch.tensor(row)
    attn.requires_grad_()
    adjacency = torch.zeros(1, 3, 3, dtype=torch.bool)
    adjacency[0, 2, 0] = adjacency[0, 2, 1] = True
    for alpha in (1e-3, 20.0, 1e6):
        loss = re_attention_loss(attn, adjacency, alpha, form)
        grad, = torch.autograd.grad(loss, attn)
        assert loss.isfinite() and grad.isfinite().all()


def test_order_of_heads_layers_and_batch_does_not_matter():
    g = torch.Generator().manual_seed(0)
    layers = [torch.rand(3, heads, 7, 7, generator=g, dtype=torch.float64).tril() for heads in (4, 2)]  # H may differ
    _, adjacency, mask = random_case(3, 7, 1)
    loss = re_attention_loss(average_attention(layers), adjacency, ALPHA, mask=mask)
    heads = [layers[0][:, [2, 0, 3, 1]], layers[1][:, [1, 0]]]
    batch = torch.tensor([2, 0, 1])
    assert torch.allclose(re_attention_loss(average_attention(heads), adjacency, ALPHA, mask=mask), loss)
    assert torch.allclose(re_attention_loss(average_attention(layers[::-1]), adjacency, ALPHA, mask=mask), loss)
    permuted = average_attention([layer[batch] for layer in layers])
    assert torch.allclose(re_attention_loss(permuted, adjacency[batch], ALPHA, mask=mask[batch]), loss)
    assert torch.allclose(average_attention(layers), (layers[0].mean(1) + layers[1].mean(1)) / 2)


@pytest.mark.parametrize("left, right", [(0, 3), (3, 0), (2, 4)])
def test_padding_on_either_side_changes_nothing(left, right):
    attn, adjacency = weights_case()
    wide, wide_adjacency = torch.rand(2, 6 + left + right, 6 + left + right).double().tril(), torch.ones(2, 6 + left + right, 6 + left + right).tril()
    inside = slice(left, left + 6)
    wide[:, inside, inside], wide_adjacency[:, inside, inside] = attn.detach(), adjacency.double()
    mask = torch.zeros(2, 6 + left + right)
    mask[:, inside] = 1
    assert torch.allclose(re_attention_loss(wide, wide_adjacency, ALPHA, mask=mask), re_attention_loss(attn, adjacency, ALPHA))


def test_gradient_scales_with_gamma_and_stays_in_supervised_rows():
    attn, adjacency = weights_case()
    adjacency = adjacency.clone()
    adjacency[:, :3] = False
    grad, = torch.autograd.grad(re_attention_loss(attn, adjacency, ALPHA), attn)
    gamma = gamma_at(3, 0.3, 0.1)
    scaled, = torch.autograd.grad(gamma * re_attention_loss(attn, adjacency, ALPHA), attn)
    assert torch.allclose(scaled, 0.3 * math.exp(-0.3) * grad)
    _, _, rows = attention_ratio(attn, adjacency)
    assert (grad[~rows] == 0).all() and (grad[rows] != 0).any()
    assert (grad.triu(1) == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_one_step_raises_the_ratio(form):
    torch.manual_seed(0)
    scores = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    _, adjacency, _ = random_case(2, 8, 5, padded=False)

    def attention():
        return average_attention([scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -math.inf).softmax(-1)])

    before = attention_ratio(attention(), adjacency)
    grad, = torch.autograd.grad(re_attention_loss(attention(), adjacency, 50.0, form), scores)
    with torch.no_grad():
        scores -= 0.1 * grad / grad.norm()
    after = attention_ratio(attention(), adjacency)
    assert (after[0] / after[1]).log().mean() > (before[0] / before[1]).log().mean()


def test_gamma_decays_exponentially():
    assert gamma_at(0, 0.3, 0.5) == 0.3
    assert gamma_at(7, 0.3, 0) == 0.3
    assert math.isclose(gamma_at(4, 0.3, 0.5) / gamma_at(3, 0.3, 0.5), math.exp(-0.5))


def test_errors_name_the_value():
    attn, adjacency, mask = random_case(2, 4, 0)
    later = torch.zeros(2, 4, 4)
    later[1, 0, 2] = 1
    for call, part in [
        (lambda: re_attention_loss(attn, adjacency[:1], 2.0), "(1, 4, 4)"),
        (lambda: re_attention_loss(attn[0], adjacency[0], 2.0), "(4, 4)"),
        (lambda: re_attention_loss(attn[:, :3], adjacency[:, :3], 2.0), "(2, 3, 4)"),
        (lambda: re_attention_loss(attn, adjacency, 2.0, mask=mask[:, :3]), "(2, 3)"),
        (lambda: re_attention_loss(attn, adjacency * 0.5, 2.0), "0 and 1"),
        (lambda: re_attention_loss(attn, adjacency, 2.0, mask=mask * 2), "mask"),
        (lambda: re_attention_loss(attn, later, 2.0), "above the diagonal"),
        (lambda: re_attention_loss(attn, adjacency, 0), "alpha is 0"),
        (lambda: re_attention_loss(attn, adjacency, -1.0), "alpha is -1.0"),
        (lambda: re_attention_loss(attn, adjacency, math.nan), "alpha is nan"),
        (lambda: re_attention_loss(attn, adjacency, 2.0, "hing"), "'hing'"),
        (lambda: gamma_at(0, -0.1, 1), "gamma is -0.1"),
        (lambda: gamma_at(0, 0.1, -1), "decay is -1"),
        (lambda: average_attention([]), "[]"),
        (lambda: average_attention([attn]), "(2, 4, 4)"),
        (lambda: average_attention([torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 5, 5)]), "(2, 1, 5, 5)"),
    ]:
        with pytest.raises(ValueError) as error:
            call()
        assert part in str(error.value) and "\n" not in str(error.value)
