"""A small GPT that returns the attention of every layer, so that a loss can be put on it."""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model. ValueError for one that does not fit, with the remedy."""
    vocab_size: int
    block_size: int = 128  # longest sequence, in tokens
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}: give a whole number of at least 1")
        if self.n_embd % (2 * self.n_head):  # rotary positions turn pairs of channels
            raise ValueError(f"n_embd is {self.n_embd}: give a multiple of {2 * self.n_head}")


def rotate(x, cos, sin):
    """Rotary positions (arXiv 2104.09864): turn each pair of channels of x, (B, n_head, T, D), by
    the angles whose cos and sin, (T, D / 2), are given."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class CausalSelfAttention(nn.Module):
    """Multi-head attention, written out so that the map can be returned."""
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, future):
        """x: (B, T, C); future: (T, T), True above the diagonal. Returns (B, T, C) and the map."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, n_head, T, D) each
        # bounds scores by sqrt(D): no key can win all of a head's attention and starve the others
        q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, n_head, T, T)
        attn = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        y = (attn @ v).transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.proj(y), attn


class Block(nn.Module):
    """Pre-norm: attention, then an MLP, each added to the residual stream."""
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.norm2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.Sequential(nn.Linear(config.n_embd, 4 * config.n_embd), nn.GELU(),
                                 nn.Linear(4 * config.n_embd, config.n_embd))

    def forward(self, x, cos, sin, future):
        y, attn = self.attn(self.norm1(x), cos, sin, future)
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
        # base 100, not the usual 10000: all of a small head's few pairs turn within a short text
        angles = torch.outer(torch.arange(config.block_size), 100.0 ** (-torch.arange(0, D, 2) / D))
        future = torch.ones(config.block_size, config.block_size, dtype=torch.bool).triu(1)
        for name, buffer in ("cos", angles.cos()), ("sin", angles.sin()), ("future", future):
            self.register_buffer(name, buffer, persistent=False)
        # Std 1 / sqrt(fan_in) keeps a signal of size 1 through any width; GPT-2's 0.02 is meant for
        # width 768 and sits on a plateau here. Embeddings start at size 1.
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:  # (fan_out, fan_in)
                nn.init.normal_(weight, std=1 if "embed" in name else weight.shape[1] ** -0.5)

    @torch.no_grad()
    def start_alike(self, tokenizer):
        """Half of the channels of each number of a tiktoken.Encoding start as sines and cosines of
        its value: 7 and 8 begin as neighbours, not as strangers."""
        numbers = [piece for piece in tokenizer.token_byte_values() if piece.isdigit()]
        ids = [tokenizer.encode_single_token(piece) for piece in numbers]
        frequency = 0.5 ** torch.arange(1, self.config.n_embd // 4 + 1)
        angles = torch.outer(torch.tensor([*map(float, numbers)]), frequency).to(self.embed.weight)
        waves = math.sqrt(2) * torch.cat((angles.sin(), angles.cos()), dim=1)  # of mean square 1
        self.embed.weight[ids, :waves.shape[1]] = waves
        self.head.weight[ids, :waves.shape[1]] = waves / math.sqrt(self.config.n_embd)

    def forward(self, idx):
        """idx: (B, T) token ids, T <= block_size. Returns logits (B, T, vocab_size) and a list of
        n_layer maps (B, n_head, T, T): rows sum to 1, exactly zero above the diagonal."""
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens, over block_size {self.config.block_size}: shorten it")
        x, attentions = self.embed(idx), []  # (B, T, n_embd)
        for block in self.blocks:
            x, attn = block(x, self.cos[:T], self.sin[:T], self.future[:T, :T])
            attentions.append(attn)
        return self.head(self.norm(x)), attentions

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, stop=None):
        """Greedy continuation of idx, (1, T): at most max_new_tokens ids, ended early by the id
        `stop`, not returned, or by block_size."""
        new = []
        while len(new) < max_new_tokens and idx.shape[1] <= self.config.block_size:
            token = self(idx)[0][:, -1].argmax(dim=-1, keepdim=True)  # (1, 1)
            if token.item() == stop:
                break
            new.append(token.item())
            idx = torch.cat((idx, token), dim=1)
        return new
