"""The Re-Attention loss row by row, as slow and plain as its definition; `python tests/oracle.py` times it against cat.py."""
import math
import time

import torch

EPS = 1e-8


def loop_loss(attn, adjacency, alpha, form="hinge", mask=None):
    B, T, _ = attn.shape
    penalties = []
    for b in range(B):
        for i in range(T):
            if mask is not None and not mask[b, i]:
                continue
            visible = torch.arange(T) <= i
            if mask is not None:
                visible = visible & mask[b].bool()
            causal_keys, other_keys = visible & adjacency[b, i].bool(), visible & ~adjacency[b, i].bool()
            if not causal_keys.any() or not other_keys.any():
                continue
            c, o = attn[b, i, causal_keys].mean() + EPS, attn[b, i, other_keys].mean() + EPS
            if c / o >= alpha:
                penalties.append(0 * c)
            elif form == "hinge":
                penalties.append(alpha - c / o)
            elif form == "log":
                penalties.append(math.log(alpha) - torch.log(c / o))
            elif form == "div":
                penalties.append(-torch.log(1 + c) / torch.log(1 + o))
            elif form == "div2":
                penalties.append(-torch.log(1 + c / (1 + o)))
            elif form == "nll":
                penalties.append(-c / (c + o))
    return sum(penalties) / len(penalties) if penalties else 0 * attn.sum()


def dense_loss(attn, adjacency, alpha):
    """The hinge with every row, supervised or not, carried through to the end."""
    T = attn.shape[-1]
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    causal_keys, other_keys = adjacency & visible, ~adjacency & visible  # (B, T, T) each
    n_causal, n_other = causal_keys.sum(dim=-1), other_keys.sum(dim=-1)  # (B, T) each
    c = (attn * causal_keys).sum(dim=-1) / n_causal.clamp(min=1) + EPS
    o = (attn * other_keys).sum(dim=-1) / n_other.clamp(min=1) + EPS
    rows = (n_causal > 0) & (n_other > 0)
    return ((alpha - c / o).clamp(min=0) * rows).sum() / rows.sum()


def random_case(B, T, seed, dtype=torch.float64, padded=True):
    """Attention (B, T, T) whose rows sum to 1, adjacency with some rows empty and some full, and a mask padded on either
    side or None."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(B, T, T, generator=g, dtype=torch.float64)
    mask = None
    if padded:
        mask = torch.ones(B, T, dtype=torch.bool)
        for b in range(B):
            pad = int(torch.randint(0, T // 2, (), generator=g))
            mask[b, :pad] = b % 2 == 0
            mask[b, T - pad:] = b % 2 == 1
    adjacency = (torch.rand(B, T, T, generator=g) < (torch.rand(B, T, 1, generator=g) < 0.8) * 0.4).tril()
    adjacency[:, T // 2] = torch.arange(T) <= T // 2  # a row of causal keys only, which must not count
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -1e9)
    return scores.softmax(dim=-1).to(dtype), adjacency, mask


if __name__ == "__main__":
    import sys
    from pathlib import Path
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from cat import re_attention_loss

    def seconds(loss, repeats):
        loss(attn, adjacency, 20.0).backward()
        start = time.perf_counter()
        for _ in range(repeats):
            loss(attn, adjacency, 20.0).backward()
        return (time.perf_counter() - start) / repeats

    attn, adjacency, _ = random_case(16, 256, 0, torch.float32, padded=False)
    attn.requires_grad_()
    loop, vectorised = seconds(loop_loss, 1), seconds(re_attention_loss, 50)
    print(f"loss and gradient, B=16, T=256: loop {loop:.2f} s, vectorised {1000 * vectorised:.1f} ms, {loop / vectorised:.0f} times faster")
    adjacency[:, :-2] = False
    dense, only = seconds(dense_loss, 50), seconds(re_attention_loss, 50)
    print(f"with 2 rows supervised: all rows through the loss {1000 * dense:.1f} ms, only those two {1000 * only:.1f} ms")
