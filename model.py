"""A small GPT that returns the attention map of every layer, so that a loss can be put on it.

It differs from GPT-2 in what current models such as Qwen3 and OLMo 2 do as well: rotary positions
instead of learned ones, and queries and keys that are normalised.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 2048  # the longest text, in tokens
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64  # a multiple of 2 * n_head, because rotary positions turn pairs of channels


def rotary_angles(block_size, head_size):
    """The cosine and the sine, (block_size, head_size / 2) each, of the angle by which each pair
    of channels is turned at each position (rotary positions, arXiv 2104.09864)."""
    frequency = 10000.0 ** (-torch.arange(0, head_size, 2) / head_size)  # (head_size / 2,)
    angle = torch.outer(torch.arange(block_size), frequency)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """x, (B, n_head, T, head_size), with channel pairs turned by the angles of their positions.
    A query's product with a key then depends on how far they are apart, not on where they are.
    A pair is a channel of the first half and its twin in the second."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % (2 * config.n_head) == 0
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, causal_mask):
        B, T, C = x.shape
        head_size = C // self.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, head_size).transpose(1, 2)  # (B, n_head, T, head_size)
        k = k.view(B, T, self.n_head, head_size).transpose(1, 2)
        v = v.view(B, T, self.n_head, head_size).transpose(1, 2)

        # Queries and keys of a fixed norm bound the scores: no key can win all of a head's
        # attention early in training and leave the others without a gradient.
        q = F.rms_norm(q, (head_size,))
        k = F.rms_norm(k, (head_size,))
        q = rotate(q, cos, sin) / math.sqrt(head_size)  # cheaper than dividing the scores
        k = rotate(k, cos, sin)

        # Written out, because fused kernels do not return the map.
        scores = q @ k.transpose(-2, -1) + causal_mask  # (B, n_head, T, T)
        attn = scores.softmax(dim=-1)
        y = attn @ v  # (B, n_head, T, head_size)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side
        return self.c_proj(y), attn


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, causal_mask):
        y, attn = self.attn(self.ln_1(x), cos, sin, causal_mask)
        x = x + y
        x = x + self.mlp(self.ln_2(x))
        return x, attn


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self._init_weights)

        # These follow from the sizes, so checkpoints do without them.
        cos, sin = rotary_angles(config.block_size, config.n_embd // config.n_head)
        causal_mask = torch.full((config.block_size, config.block_size), -math.inf).triu(1)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("causal_mask", causal_mask, persistent=False)

    def _init_weights(self, module):
        # A standard deviation of 1 / sqrt(fan_in) keeps a signal of size 1 through any width.
        # GPT-2's 0.02 is meant for a width of 768; at 64, training stands still at first.
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0)

    def forward(self, idx):
        """Logits and attention maps for token ids idx, (B, T), of at most block_size tokens.

        Returns logits (B, T, vocab_size) and a list with a map (B, n_head, T, T) for each layer,
        whose rows sum to 1 and are exactly 0 above the diagonal.
        """
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"the text has {T} tokens, block_size is {self.config.block_size}")
        cos, sin = self.cos[:T], self.sin[:T]
        causal_mask = self.causal_mask[:T, :T]

        x = self.wte(idx)  # (B, T, n_embd)
        attentions = []
        for block in self.blocks:
            x, attn = block(x, cos, sin, causal_mask)
            attentions.append(attn)
        logits = self.lm_head(self.ln_f(x))
        return logits, attentions

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, stop=None):
        """The likeliest next tokens after idx, (1, T), one after the other, as a list of ids.

        It ends after max_new_tokens, at a full block, or before the id `stop`.
        """
        new = []
        for _ in range(max_new_tokens):
            logits, _ = self(idx)
            token = logits[:, -1].argmax(dim=-1, keepdim=True)  # (1, 1)
            if token.item() == stop:
                break
            new.append(token.item())
            if idx.shape[1] == self.config.block_size:
                break  # there is no place for another token
            idx = torch.cat((idx, token), dim=1)
        return new
