"""What CAT costs: `python -m tests.speed --threads 1` times training steps on the CPU, in turns
with CAT, without it, and of a GPT-2 of the same size with fused attention, as nanoGPT trains it."""
import argparse
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from data import STG, collate
from model import GPT, MLP, GPTConfig


class FusedAttention(nn.Module):
    """Attention in one kernel, which cannot return its map."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class FusedBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = FusedAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class FusedGPT(nn.Module):
    """GPT-2: learned positions, and a head that shares the weights of the embeddings."""

    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList([FusedBlock(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def fused_step(model, optimizer, batch):
    logits = model(batch.idx)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def step(model, optimizer, batch, args, with_cat):
    """A step as train.py takes it."""
    logits, attentions = model(batch.idx)
    loss = train.next_token_loss(logits, batch)
    if with_cat:
        loss = loss + args.gamma * train.attention_loss(attentions, batch, args)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    args = train.parse_args(["--rows", "160", "--test-rows", "1", "--device", "cpu"])
    data = train.load_data(args, 1, STG, files={})
    config = GPTConfig(vocab_size=data.tokenizer.n_vocab)
    model, fused = GPT(config), FusedGPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    fused_optimizer = torch.optim.AdamW(fused.parameters(), lr=1e-4, fused=True)

    times = {"with CAT": [], "without": [], "fused": []}
    for i in range(flags.steps + 10):
        start = i * args.batch_size % len(data.train)
        batch = collate(data.train[start:start + args.batch_size])
        for name in times:
            begin = time.perf_counter()
            if name == "fused":
                fused_step(fused, fused_optimizer, batch)
            else:
                step(model, optimizer, batch, args, with_cat=name == "with CAT")
            times[name].append(1000 * (time.perf_counter() - begin))

    medians = {name: statistics.median(values[10:]) for name, values in times.items()}  # warm
    print(f"{flags.threads} threads, torch {torch.__version__}, {flags.steps} steps in turns")
    for name, milliseconds in medians.items():
        print(f"{name:8} {milliseconds:6.2f} ms, {milliseconds / medians['fused']:.2f} of fused")


if __name__ == "__main__":
    main()
