"""Causal Attention Tuning (arXiv 2509.01535): the Re-Attention loss. Copy this file beside any model that returns attention."""
import math

import torch

EPS = 1e-8  # added to a mean before it divides or enters a logarithm: an exact 0 stays finite, gradient included
FORMS = ("hinge", "log", "div", "div2", "nll")


def average_attention(attentions):
    """Mean over heads, then over layers (the paper's Re-Attention mechanism).

    attentions: sequence of (B, H, T, T), one per layer; H may differ. To supervise some layers only, pass that slice.
    Returns (B, T, T) in float32 or wider.
    Raises ValueError for None, an empty sequence or a layer that is None (the model returned no attention), and for maps
    that are not (B, H, T, T) with equal B and T.
    """
    shapes = [None if attn is None else tuple(attn.shape) for attn in ([] if attentions is None else attentions)]
    if not shapes or None in shapes:
        raise ValueError(f"attentions of shapes {shapes}: a Hugging Face model returns a map per layer only when loaded with "
                         'attn_implementation="eager" and called with output_attentions=True')
    if any(len(s) != 4 or (s[0], s[2], s[3]) != (shapes[0][0], *shapes[0][-1:] * 2) for s in shapes):
        raise ValueError(f"attentions of shapes {shapes}: give one (B, H, T, T) per layer, with equal B and T")
    # sum / H, not mean, whose backward divides a whole (B, H, T, T) and not a (B, T, T)
    return sum(attn.to(torch.promote_types(attn.dtype, torch.float32)).sum(dim=1) / (attn.shape[1] * len(attentions))
               for attn in attentions)  # (B, T, T)


def supervised_rows(adjacency, mask=None):
    """The queries that count, those with at least one causal and one other visible key, and their keys.

    adjacency: (B, T, T), bool or 0/1; [b, i, j] says that query i should look at key j, so nothing above the diagonal.
    mask: (B, T), bool or 0/1, 1 for a token and 0 for padding on either side; None when there is no padding.
    Returns (b, i, causal_keys, other_keys) for the R queries that count: b and i are their places, (R,), and the keys are
    bool, (R, T). Mostly few queries have edges: carrying only these on makes the loss cheap.
    Raises ValueError for wrong shapes, for values other than 0 and 1, and for edges above the diagonal.
    """
    B, T = adjacency.shape[0], adjacency.shape[-1]
    if adjacency.shape != (B, T, T):
        raise ValueError(f"adjacency {tuple(adjacency.shape)}: must be (B, T, T)")
    if mask is not None and mask.shape != (B, T):
        raise ValueError(f"mask {tuple(mask.shape)}: must be (B, T) = {(B, T)}")
    adjacency = as_bool("adjacency", adjacency)
    b, i = adjacency.sum(dim=-1).nonzero(as_tuple=True)  # queries with an edge; `any` is slower than a sum
    edges = adjacency[b, i]
    visible = torch.arange(T, device=edges.device) <= i[:, None]  # j <= i
    if (edges & ~visible).any():
        raise ValueError("adjacency has an edge above the diagonal: a query cannot look at a later key; is it transposed?")
    if mask is not None:
        mask = as_bool("mask", mask)
        visible = visible & mask[b] & mask[b, i][:, None]  # padding is neither query nor key
    causal_keys, other_keys = edges & visible, visible & ~edges
    counts = causal_keys.any(dim=-1) & other_keys.any(dim=-1)
    if counts.all():
        return b, i, causal_keys, other_keys
    return b[counts], i[counts], causal_keys[counts], other_keys[counts]


def attention_ratio(attn, adjacency, mask=None):
    """Mean attention on the causal keys and on the other visible keys, row by row (the paper's Re-Attention mechanism).

    attn: (B, T, T), attention of query i on key j at [b, i, j], e.g. from `average_attention`.
    adjacency, mask: as in `supervised_rows`.
    Returns (causal, other, rows): causal and other are (R,), in the order of `supervised_rows`, and rows, (B, T) bool,
    marks the queries that count. The ratio is causal / other.
    Raises ValueError for shapes that differ, and what `supervised_rows` raises.
    """
    if attn.shape != adjacency.shape:
        raise ValueError(f"attn {tuple(attn.shape)}, adjacency {tuple(adjacency.shape)}: both must be (B, T, T)")
    b, i, causal_keys, other_keys = supervised_rows(adjacency, mask)
    attn = attn[b, i].to(torch.promote_types(attn.dtype, torch.float32))  # (R, T)
    causal = (attn * causal_keys).sum(dim=-1) / causal_keys.sum(dim=-1)
    other = (attn * other_keys).sum(dim=-1) / other_keys.sum(dim=-1)
    rows = torch.zeros(adjacency.shape[:2], dtype=torch.bool, device=attn.device)
    rows[b, i] = True
    return causal, other, rows


def re_attention_loss(attn, adjacency, alpha, form="hinge", mask=None, reduction="mean"):
    """The Re-Attention loss: the mean, over the queries that `supervised_rows` counts, of a penalty on ratio < alpha.

    attn, adjacency, mask: as in `attention_ratio`. alpha > 0: the ratio of causal to other attention to be reached.
    With c = causal + EPS, o = other + EPS and ratio = c / o, a row below alpha costs

        form     penalty                     source
        hinge    alpha - ratio               the paper's equation
        log      log(alpha) - log(ratio)     here: the slope does not explode as o shrinks
        div      -log(1 + c) / log(1 + o)    released code
        div2     -log(1 + c / (1 + o))       released code
        nll      -c / (c + o)                released code

    and a row at or above alpha costs 0. Hinge gradient: with R rows counted, and in row i n_c causal and n_o other
    keys, d loss / d attn[i, j] = -1 / (R n_c o) for a causal j and +c / (R n_o o^2) for another visible j.
    Returns a scalar; exactly 0 with a zero gradient when no row counts (a batch without supervision trains on). With
    reduction="none" the R penalties themselves, (R,), in the order of `supervised_rows`: to sum and divide by another count.
    Raises ValueError for alpha <= 0 or not finite, an unknown form or reduction, and what `attention_ratio` raises.
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha}: the ratio to reach must be a finite number above 0")
    if form not in FORMS:
        raise ValueError(f"form is {form!r}: choose one of {', '.join(FORMS)}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction is {reduction!r}: choose mean or none")
    causal, other, _ = attention_ratio(attn, adjacency, mask)
    c, o = causal + EPS, other + EPS  # (R,) each
    if form == "hinge":
        penalty = alpha - c / o
    elif form == "log":
        penalty = math.log(alpha) - c.log() + o.log()
    elif form == "div":
        penalty = -c.log1p() / o.log1p()
    elif form == "div2":
        penalty = -(c / (1 + o)).log1p()
    else:
        penalty = -c / (c + o)
    penalty = torch.where(c < alpha * o, penalty, 0.0)
    return penalty if reduction == "none" else penalty.sum() / max(len(penalty), 1)


def gamma_at(epoch, gamma0, decay):
    """Weight of the Re-Attention loss in L = L_next + gamma * L_attn at `epoch` (from 0; fractions allowed):
    gamma0 * exp(-decay * epoch) (the paper's total loss). ValueError for a negative or non-finite gamma0 or decay."""
    for name, value in (("gamma", gamma0), ("decay", decay)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}: give a finite number of at least 0")
    return gamma0 * math.exp(-decay * epoch)


def as_bool(name, tensor):
    """`tensor` as bool. ValueError when it holds anything but 0 and 1."""
    if tensor.dtype == torch.bool:
        return tensor
    if not ((tensor == 0) | (tensor == 1)).all():
        raise ValueError(f"{name} holds values other than 0 and 1: give a boolean tensor")
    return tensor.bool()
