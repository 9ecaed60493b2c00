"""Causal Attention Tuning (CAT, arXiv 2509.01535): the Re-Attention loss on a model's attention.

A row of an attention map is a query, a column is a key; both are positions in the text. The
adjacency says which keys a query should look at. Such a key is called causal, because it holds a
cause of the token that the query predicts; this has nothing to do with the causal mask, which
hides the future. The total loss is

    L = L_next + gamma * L_attn

with the usual next-token loss L_next, L_attn from `re_attention_loss` and gamma from `gamma_at`.
"""
import math

import torch

FORMS = ("hinge", "div", "log", "each", "uniform")  # see re_attention_loss
EPS = 1e-8  # is added to attention before a division or a logarithm, so that 0 stays finite


def average_attention(attentions):
    """The mean of attention over heads, then over layers (the paper's Re-Attention mechanism).

    attentions is a list with a tensor (B, n_head, T, T) for each layer to supervise; the number of
    heads may differ. Returns (B, T, T) in float32 or wider.
    """
    # Hugging Face models return None where a fused kernel made no map.
    if not attentions or not all(torch.is_tensor(attn) for attn in attentions):
        raise ValueError('a layer has no attention map: load the model with attn_implementation='
                         '"eager" and call it once, not generate, with output_attentions=True')
    B, T = attentions[0].shape[0], attentions[0].shape[-1]
    total = 0
    for attn in attentions:
        if attn.shape[0] != B or attn.shape[2:] != (T, T):
            raise ValueError(f"attn is {tuple(attn.shape)}: it must be (B, n_head, T, T), "
                             "with B and T the same in every layer")
        # A sum and a division do what attn.mean(dim=1) does, with a faster backward pass.
        total = total + widen(attn).sum(dim=1) / attn.shape[1]  # (B, T, T)
    return total / len(attentions)


def split_keys(adjacency, mask=None):
    """The causal and the other keys of each query, and which queries count.

    adjacency is (B, T, T), bool or 0/1: adjacency[b, i, j] says that query i should look at key j,
    which is not later than i. mask is 1 for tokens and 0 for padding, (B, T); or it is (B, T, T)
    and says which keys each query sees, as in a sliding window. A key that a query does not see is
    neither causal nor other.

    Returns causal_keys (B, T, T), other_keys (B, T, T) and counted (B, T), all bool. A query is
    counted when it has at least one causal and one other key: only then is there a ratio.
    """
    B, T = adjacency.shape[0], adjacency.shape[-1]
    if adjacency.shape != (B, T, T):
        raise ValueError(f"adjacency is {tuple(adjacency.shape)}: it must be (B, T, T)")
    adjacency = as_bool("adjacency", adjacency)
    if adjacency.triu(1).any():
        raise ValueError("adjacency has an edge to a later key, above the diagonal: transpose it?")

    sees = torch.ones(T, T, dtype=torch.bool, device=adjacency.device).tril()  # the causal mask
    if mask is not None:
        mask = as_bool("mask", mask)
        if mask.shape == (B, T):
            mask = mask[:, :, None] & mask[:, None, :]  # a token sees tokens: (B, T, T)
        if mask.shape != (B, T, T):
            raise ValueError(f"mask is {tuple(mask.shape)}: it must be (B, T) or (B, T, T), "
                             f"with B = {B} and T = {T}")
        sees = sees & mask

    causal_keys = adjacency & sees
    other_keys = sees & ~adjacency
    counted = causal_keys.any(dim=-1) & other_keys.any(dim=-1)
    return causal_keys, other_keys, counted


def attention_ratio(attn, adjacency, mask=None):
    """The mean attention on causal keys and on other keys (the paper's Re-Attention mechanism).

    attn is (B, T, T), as from `average_attention`; adjacency and mask are as in `split_keys`.
    Returns causal and other, (R,) each, for the R queries that count, batch by batch and from the
    first to the last; causal / other is the ratio that `re_attention_loss` wants at alpha or more.
    """
    attn, causal_keys, other_keys = rows_that_count(attn, adjacency, mask)
    return mean_over(causal_keys, attn), mean_over(other_keys, attn)


def re_attention_loss(attn, adjacency, alpha, form="hinge", mask=None):
    """The Re-Attention loss: the mean of a penalty over the queries that count.

    attn, adjacency and mask are as in `attention_ratio`, and so are causal and other. alpha is
    the ratio = causal / other to reach: beyond it a query pays nothing. The forms of its penalty:

        hinge    max(alpha - ratio, 0)                  the paper's equation
        div      -log(1 + causal) / log(1 + other)      the released code's default; 0 beyond alpha
        log      max(log(alpha) - log(ratio), 0)        ours: the hinge's slope 1 / other explodes
        each     mean over the causal keys j of         ours, and the default of train.py
                 max(log(alpha) - log(attn_j / other), 0)
        uniform  mean over the n causal keys j of       guided attention; alpha is not used
                 -log(n * attn_j)

    The first three look at a mean, which is the same whether the causal keys share the attention
    or one of them has it all; only `each` and `uniform` ask for every key. Returns a scalar. When
    no query counts it is 0 and still part of the graph, so that backward() works. NaN in attention
    that counts is passed on, and elsewhere it changes nothing.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}: choose one of {', '.join(FORMS)}")
    if form != "uniform" and (alpha is None or not 0 < alpha < math.inf):
        raise ValueError(f"alpha is {alpha}: give the ratio to reach, a finite number over 0")

    attn, causal_keys, other_keys = rows_that_count(attn, adjacency, mask)  # (R, T) each
    causal = mean_over(causal_keys, attn) + EPS  # (R,)
    other = mean_over(other_keys, attn) + EPS  # (R,)
    ratio = causal / other

    if form == "hinge":
        penalty = torch.relu(alpha - ratio)
    elif form == "div":
        penalty = -torch.log1p(causal) / torch.log1p(other)
        # For NaN both >= and < are False; asked this way round, a NaN penalty stays.
        penalty = torch.where(ratio >= alpha, 0.0, penalty)
    elif form == "log":
        penalty = torch.relu(math.log(alpha) - torch.log(ratio))
    elif form == "each":
        ratio_of_key = (attn + EPS) / other[:, None]  # (R, T), of which the causal keys are used
        penalty_of_key = torch.relu(math.log(alpha) - torch.log(ratio_of_key))
        penalty = mean_over(causal_keys, penalty_of_key)
    elif form == "uniform":
        n = causal_keys.sum(dim=-1, keepdim=True)  # (R, 1)
        penalty = mean_over(causal_keys, -torch.log(n * (attn + EPS)))

    R = len(penalty)
    return penalty.sum() / max(R, 1)  # a mean that is 0 and not NaN when R is 0


def gamma_at(epoch, gamma0, decay):
    """The weight of L_attn: gamma0 * exp(-decay * epoch) (the paper's total loss).

    epoch says how far training has come, in any unit and in fractions too; decay is per that unit.
    """
    if not (0 <= gamma0 < math.inf and 0 <= decay < math.inf):
        raise ValueError(f"gamma is {gamma0}, decay is {decay}: give finite numbers of at least 0")
    return gamma0 * math.exp(-decay * epoch)


# Small helpers of the functions above

def rows_that_count(attn, adjacency, mask):
    """(R, T) each: the attention of the R queries that count, their causal and other keys."""
    if attn.shape != adjacency.shape:
        raise ValueError(f"attn is {tuple(attn.shape)} and adjacency {tuple(adjacency.shape)}: "
                         "both must be (B, T, T)")
    causal_keys, other_keys, counted = split_keys(adjacency, mask)
    attn, causal_keys, other_keys = attn[counted], causal_keys[counted], other_keys[counted]
    # Keys that are neither may hold anything, even NaN, which would survive a product with 0.
    attn = torch.where(causal_keys | other_keys, widen(attn), 0.0)
    return attn, causal_keys, other_keys


def mean_over(keys, values):
    """(R,): the mean of values over the keys, (R, T) each."""
    return (values * keys).sum(dim=-1) / keys.sum(dim=-1)


def as_bool(name, tensor):
    """The tensor as bool, if it holds nothing but 0 and 1."""
    if tensor.dtype != torch.bool and (tensor != tensor.bool()).any():
        raise ValueError(f"{name} holds values other than 0 and 1: give a boolean tensor")
    return tensor.bool()


def widen(x):
    """x in float32 or wider, since sums and ratios of small numbers need the digits."""
    if x.dtype == torch.half and x.requires_grad and not torch.is_autocast_enabled(x.device.type):
        raise ValueError("attn is float16, whose gradients would overflow: use bfloat16, or "
                         "autocast with a GradScaler")
    return x.to(torch.promote_types(x.dtype, torch.float32))
