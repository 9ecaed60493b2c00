"""The Re-Attention loss query by query and key by key, as slow and plain as its definition."""
import math

import torch

EPS = 1e-8


def penalty_of(a, o, alpha, form):
    """What a query costs: a, (n,), attention on its causal keys; o, mean attention on others."""
    c, o, n = a.mean() + EPS, o + EPS, len(a)
    if form == "each":
        terms = [math.log(alpha) - torch.log((a_j + EPS) / o) for a_j in a]
        return sum(term if term > 0 else 0 * term for term in terms) / n
    if form == "uniform":
        return sum(-torch.log(n * (a_j + EPS)) for a_j in a) / n
    if c / o >= alpha:
        return 0 * c
    if form == "hinge":
        return alpha - c / o
    if form == "log":
        return math.log(alpha) - torch.log(c / o)
    if form == "div":
        return -torch.log(1 + c) / torch.log(1 + o)
    if form == "div2":
        return -torch.log(1 + c / (1 + o))
    if form == "nll":
        return -c / (c + o)
    raise ValueError(f"the oracle does not know form {form!r}: add its formula to penalty_of in "
                     "tests/oracle.py, for one query")


def supervised(adjacency, mask=None):
    """For each query that counts, in order: (b, i, its causal keys, its other keys)."""
    found = []
    for b, i in torch.cartesian_prod(*map(torch.arange, adjacency.shape[:2])).tolist():
        keys = range(i + 1)
        if mask is not None:
            sees = mask[b, i] if mask.dim() == 3 else mask[b] & mask[b, i]
            keys = [j for j in keys if sees[j]]
        causal = [j for j in keys if adjacency[b, i, j]]
        other = [j for j in keys if not adjacency[b, i, j]]
        if causal and other:
            found.append((b, i, causal, other))
    return found


def loop_loss(attn, adjacency, alpha, form="hinge", mask=None, reduction="mean"):
    """`re_attention_loss` from its definition, and so slow."""
    penalties = torch.stack([penalty_of(attn[b, i, causal], attn[b, i, other].mean(), alpha, form)
                             for b, i, causal, other in supervised(adjacency, mask)])
    return penalties if reduction == "none" else penalties.mean()


def random_case(B, T, seed, mask="padding"):
    """Attention (B, T, T) whose rows sum to 1, adjacency with some rows empty and some full, and a
    mask: None, "padding" (B, T) on alternating sides, or that within a "window" (B, T, T)."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(B, T, T, generator=g, dtype=torch.float64)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    attn = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    some = torch.rand(B, T, 1, generator=g) < 0.8
    adjacency = ((torch.rand(B, T, T, generator=g) < 0.4) & some).tril()
    adjacency[:, T // 2] = torch.arange(T) <= T // 2  # causal keys only: must not count
    if mask is None:
        return attn, adjacency, None
    pad = torch.randint(1, T // 2, (B, 1), generator=g)
    seen = torch.arange(T) >= pad
    seen[::2] = seen[::2].flip(1)
    if mask == "window":
        seen = (seen[:, :, None] & seen[:, None]).triu(-(T // 2))
    return attn, adjacency, seen
