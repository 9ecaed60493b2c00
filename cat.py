"""Causal Attention Tuning (CAT, arXiv 2509.01535): the Re-Attention loss on a model's attention.
A query is a row of the attention map, a key a column. A causal key holds a cause of what its query
predicts; it has nothing to do with the causal mask."""
import math

import torch

EPS = 1e-8  # added before attention divides or enters a logarithm: 0 stays finite
log_hinge = lambda c, o, n, alpha: math.log(alpha) - c.log() + o.log()
FORMS = {  # the penalties of `re_attention_loss`
    "hinge": lambda c, o, n, alpha: alpha - c / o,
    "log": log_hinge,
    "each": log_hinge,
    "uniform": lambda c, o, n, _: -(n * c).log() + 0 * o,  # o's NaN
    "div": lambda c, o, *_: -c.log1p() / o.log1p(),
    "div2": lambda c, o, *_: -(c / (1 + o)).log1p(),
    "nll": lambda c, o, *_: -c / (c + o),
}
KEY_BY_KEY = ("each", "uniform")  # c is each causal key's own, not their mean


def average_attention(attentions):
    """Mean over heads, then over layers (the paper's Re-Attention mechanism): (B, T, T), float32 or
    wider. attentions: list or tuple of the (B, H, T, T) of each layer to supervise; H may differ.
    Raises ValueError for a missing map, wrong shapes, and as `widen`."""
    if not attentions or not all(torch.is_tensor(attn) for attn in attentions):
        raise ValueError('no map for a layer: load the model with attn_implementation="eager", and '
                         "use one forward pass (not generate) with output_attentions=True")
    B, T = attentions[0].shape[0], attentions[0].shape[-1]
    for attn in attentions:
        if attn.shape != (B, attn.shape[1], T, T):
            raise ValueError(f"attn {tuple(attn.shape)}: must be (B, H, T, T), B and T equal")
    # not mean(dim=1), whose backward is slower
    return sum(widen(a).sum(dim=1) / (a.shape[1] * len(attentions)) for a in attentions)


def supervised_queries(adjacency, mask=None):
    """The R queries that count, those with at least one causal and one other key, and their keys.
    adjacency: (B, T, T), bool or 0/1; [b, i, j] says that query i should look at key j <= i.
    mask: (B, T), bool or 0/1, 0 for padding on either side; or (B, T, T), 1 where query i sees key
    j (sliding window, packed sequences). A key that is not seen is neither causal nor other.
    Returns (b, i, causal_keys, other_keys): places (R,), keys (R, T) bool.
    Raises ValueError for wrong shapes, values other than 0 and 1, and edges above the diagonal."""
    B, T = adjacency.shape[0], adjacency.shape[-1]
    if adjacency.shape != (B, T, T):
        raise ValueError(f"adjacency {tuple(adjacency.shape)}: must be (B, T, T)")
    if mask is not None and mask.shape not in ((B, T), (B, T, T)):
        raise ValueError(f"mask {tuple(mask.shape)}: must be (B, T) or (B, T, T), B={B}, T={T}")
    # few queries have edges: carrying only these on makes the loss cheap
    b, i = adjacency.bool().sum(dim=-1).nonzero(as_tuple=True)
    edges = adjacency[b, i]  # (R, T)
    for name, given in (("adjacency", edges), ("mask", mask)):
        if given is not None and (given != given.bool()).any():
            raise ValueError(f"{name} holds values other than 0 and 1: give a boolean tensor")
    edges = edges.bool()
    seen = torch.arange(T, device=edges.device) <= i[:, None]  # the causal mask
    if (edges & ~seen).any():
        raise ValueError("adjacency has an edge to a later key, above the diagonal: transpose it?")
    if mask is not None:
        mask = mask.bool()
        seen = seen & (mask[b, i] if mask.dim() == 3 else mask[b] & mask[b, i][:, None])
    causal_keys, other_keys = edges & seen, seen & ~edges
    both = (causal_keys.sum(dim=-1) > 0) & (other_keys.sum(dim=-1) > 0)
    return b[both], i[both], causal_keys[both], other_keys[both]


def attention_ratio(attn, adjacency, mask=None):
    """Mean attention on the causal and on the other keys of each query (Re-Attention mechanism).
    attn: (B, T, T), attention of query i on key j. adjacency, mask: as in `supervised_queries`.
    Returns (causal, other), (R,) each, in its order; the ratio of a query is causal / other.
    Raises ValueError for shapes that differ, and as `supervised_queries` and `widen`."""
    attn, causal_keys, other_keys = supervised_attention(attn, adjacency, mask)
    return mean_over(causal_keys, attn), mean_over(other_keys, attn)


def re_attention_loss(attn, adjacency, alpha=None, form="hinge", mask=None, reduction="mean"):
    """The Re-Attention loss: mean over the queries that count of a penalty on ratio < alpha.
    attn, adjacency, mask: as in `attention_ratio`. alpha > 0: the ratio to be reached.
    With c = causal + EPS, o = other + EPS, a_j = EPS + attention on the j-th of n causal keys:

        hinge    max(alpha - c / o, 0)                the paper's equation
        log      max(log alpha - log(c / o), 0)       here: no slope 1 / o that explodes
        each     mean_j max(log alpha - log(a_j / o), 0)     here: log, key by key
        uniform  mean_j -log(n a_j)                   guided attention; alpha is not used
        div      -log(1 + c) / log(1 + o)             released code; these three are 0
        div2     -log(1 + c / (1 + o))                where c / o >= alpha
        nll      -c / (c + o)

    A mean is content with one key: c is the same whether n keys share the attention or one has it
    all, and nothing favours the rest. Only `each` and `uniform` ask for every key.
    Returns a scalar, 0 with zero gradient when no query counts; with reduction="none" the
    (R,) penalties. NaN at keys that count shows, elsewhere it changes nothing.
    Raises ValueError for a wrong alpha, form or reduction, and as `attention_ratio`."""
    if form not in FORMS:
        raise ValueError(f"form is {form!r}: choose one of {', '.join(FORMS)}")
    if form != "uniform" and (alpha is None or not 0 < alpha < math.inf):
        raise ValueError(f"alpha is {alpha}: give the ratio to reach, a finite number over 0")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction is {reduction!r}: choose mean or none")
    attn, causal_keys, other_keys = supervised_attention(attn, adjacency, mask)
    o, n = mean_over(other_keys, attn) + EPS, causal_keys.sum(dim=-1)  # (R,) each
    if form in KEY_BY_KEY:  # c: (R, T), 1 off causal keys
        c, o, n = torch.where(causal_keys, attn + EPS, 1.0), o[:, None], n[:, None]
    else:
        c = mean_over(causal_keys, attn) + EPS  # (R,)
    penalty = FORMS[form](c, o, n, alpha)
    if form != "uniform":
        penalty = torch.where(c >= alpha * o, 0.0, penalty)  # NaN is not >=, so it stays
    if form in KEY_BY_KEY:
        penalty = mean_over(causal_keys, penalty)
    return penalty if reduction == "none" else penalty.sum() / max(len(penalty), 1)


def gamma_at(epoch, gamma0, decay):
    """gamma0 * exp(-decay * epoch), gamma of L = L_next + gamma * L_attn (the paper's total loss).
    epoch: training progress >= 0, fractions too. ValueError for gamma0, decay < 0 or not finite."""
    if not (0 <= gamma0 < math.inf and 0 <= decay < math.inf):
        raise ValueError(f"gamma is {gamma0}, decay is {decay}: give finite numbers of at least 0")
    return gamma0 * math.exp(-decay * epoch)


def supervised_attention(attn, adjacency, mask):
    """(R, T) each: attn of the queries that count, their causal and their other keys."""
    if attn.shape != adjacency.shape:
        raise ValueError(f"attn {tuple(attn.shape)} is not as adjacency {tuple(adjacency.shape)}")
    b, i, causal_keys, other_keys = supervised_queries(adjacency, mask)
    return widen(attn[b, i]), causal_keys, other_keys


def mean_over(keys, values):
    """(R,) mean of values over keys, (R, T) each. Values elsewhere are out, even NaN."""
    return torch.where(keys, values, 0.0).sum(dim=-1) / keys.sum(dim=-1)


def widen(x):
    """x in float32 or wider. ValueError when gradients would overflow in float16."""
    if x.dtype == torch.half and x.requires_grad and not torch.is_autocast_enabled(x.device.type):
        raise ValueError("attn is float16: use bfloat16, or autocast with a GradScaler")
    return x.to(torch.promote_types(x.dtype, torch.float32))
