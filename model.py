"""A small GPT that returns the attention of every layer, so that a loss can be put on it."""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model, checked when made: ValueError names the field, its value and the remedy."""
    vocab_size: int
    block_size: int = 128  # longest sequence, in tokens
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    init_std: float = 0.0  # of all weight matrices at the start; 0 for the choice in `init_weights`

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "init_std" and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}: give a whole number of at least 1")
        size = 12 * self.n_layer * self.n_embd ** 2 + 2 * self.vocab_size * self.n_embd
        if size > 1e9:
            raise ValueError(f"n_layer is {self.n_layer}, n_embd is {self.n_embd}: {size:.1e} parameters, lower them to at most "
                             "1e9")
        if not 0 <= self.init_std < math.inf:
            raise ValueError(f"init_std is {self.init_std}: give a finite number of at least 0")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd is {self.n_embd}: rotary positions turn pairs of channels, so "
                             f"give a multiple of 2 * n_head = {2 * self.n_head}")


def rotate(x, cos, sin):
    """Rotary positions (arXiv 2104.09864): turn each pair of channels of x, (B, n_head, T, D), by its angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class CausalSelfAttention(nn.Module):
    """Multi-head attention, written out so that the map can be returned."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, hidden):
        """x: (B, T, C); cos, sin: (T, D / 2); hidden: (T, T), True above the diagonal. Returns (B, T, C) and the map."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, n_head, T, D) each
        # Scores bounded by sqrt(D): without it one key wins all of a head's attention and others get no gradient any more.
        q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        scores = q @ k.transpose(-2, -1) / math.sqrt(C // self.n_head)  # (B, n_head, T, T)
        attn = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        y = (attn @ v).transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.proj(y), attn


class Block(nn.Module):
    """Pre-norm: attention, then a two-layer perceptron, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.norm2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.Sequential(nn.Linear(config.n_embd, 4 * config.n_embd), nn.GELU(),
                                 nn.Linear(4 * config.n_embd, config.n_embd))

    def forward(self, x, cos, sin, hidden):
        y, attn = self.attn(self.norm1(x), cos, sin, hidden)
        x = x + y
        return x + self.mlp(self.norm2(x)), attn


class GPT(nn.Module):
    """Decoder-only transformer: `logits, attentions = model(idx)`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        D = config.n_embd // config.n_head
        # base 100, not the usual 10000: a head has few pairs of channels, and all should turn within a short row
        angles = torch.outer(torch.arange(config.block_size), 100.0 ** (-torch.arange(0, D, 2) / D))  # (block_size, D / 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        hidden = torch.ones(config.block_size, config.block_size, dtype=torch.bool).triu(1)
        self.register_buffer("hidden", hidden, persistent=False)
        self.apply(self.init_weights)

    def init_weights(self, module):
        """GPT-2's std of 0.02 is meant for width 768: at width 64 every layer starts near zero, and training sits on a
        plateau. Std 1 / sqrt(fan_in) keeps a signal of size 1 through any width; embeddings start at that size."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.init_std or 1 / math.sqrt(module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std or 1.0)

    def forward(self, idx):
        """idx: (B, T) token ids, T <= block_size (else ValueError). Returns logits (B, T, vocab_size) and a list of
        n_layer attention maps (B, n_head, T, T): rows sum to 1, exactly zero above the diagonal."""
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens, but block_size is {self.config.block_size}: shorten the text or raise it")
        x = self.embed(idx)  # (B, T, n_embd)
        attentions = []
        for block in self.blocks:
            x, attn = block(x, self.cos[:T], self.sin[:T], self.hidden[:T, :T])
            attentions.append(attn)
        return self.head(self.norm(x)), attentions

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, stop=None):
        """Greedy continuation of idx, (1, T): up to max_new_tokens ids, ended early by the id `stop` (not returned).
        ValueError when T + max_new_tokens is over block_size."""
        if idx.shape[1] + max_new_tokens > self.config.block_size:
            raise ValueError(f"{idx.shape[1]} + {max_new_tokens} new tokens is over block_size "
                             f"{self.config.block_size}: shorten the text or ask for fewer")
        new = []
        for _ in range(max_new_tokens):
            token = self(idx)[0][:, -1].argmax(dim=-1, keepdim=True)  # (1, 1)
            if token.item() == stop:
                break
            new.append(token.item())
            idx = torch.cat((idx, token), dim=1)
        return new
