"""What CAT costs: `python tests/speed.py [threads]` times training steps of 16 examples on the CPU:
with CAT, without, and without by F.scaled_dot_product_attention, which returns no map."""
import sys
import time
from pathlib import Path
from statistics import median
from types import MethodType

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from cat import average_attention, re_attention_loss  # noqa: E402
from data import STG, adjacency_of, build_tokenizer, encode, generate, inside_of  # noqa: E402
from model import GPT, GPTConfig, rotate  # noqa: E402


def fused_forward(self, x, cos, sin, future):
    """CausalSelfAttention.forward in one kernel, which cannot return its map."""
    B, T, C = x.shape
    q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
    q, k = (rotate(F.rms_norm(a, a.shape[-1:]), cos, sin) for a in (q, k))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return self.proj(y.transpose(1, 2).reshape(B, T, C)), None


def step(model, optimizer, data, ix, use_cat):
    """One training step as in train.py: all tokens, the answer once more, CAT on both layers."""
    logits, attentions = model(data.idx[ix])
    targets, answer = data.targets[ix], data.answer[ix]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss = loss + F.cross_entropy(logits[answer], targets[answer])
    if use_cat:
        for attn, adjacency in zip(attentions, (inside_of(data, ix), adjacency_of(data, ix))):
            loss = loss + 0.3 * re_attention_loss(average_attention([attn]), adjacency, 1e3, "each")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads())
    torch.manual_seed(0)
    examples, ix, times = generate(STG, 16), torch.arange(16), []
    data = encode(examples, build_tokenizer(e.input + e.target for e in examples))
    plain, fused = (GPT(GPTConfig(data.tokenizer.n_vocab, data.idx.shape[1])) for _ in range(2))
    for block in fused.blocks:
        block.attn.forward = MethodType(fused_forward, block.attn)
    plain, fused = ((model, torch.optim.AdamW(model.parameters())) for model in (plain, fused))
    for _ in range(210):
        times.append([])
        for model, use_cat in (plain, True), (plain, False), (fused, False):  # in turns
            start = time.perf_counter()
            step(*model, data, ix, use_cat)
            times[-1].append(1000 * (time.perf_counter() - start))
    cat, without, fused = zip(*times[10:])  # the first warm up
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, medians of 200 steps:")
    print(f"with CAT {median(cat):.2f} ms, without {median(without):.2f} ms, ratio "
          f"{median(a / b for a, b in zip(cat, without)):.3f}")
    print(f"fused, without map {median(fused):.2f} ms, ratio of the step without CAT to it "
          f"{median(a / b for a, b in zip(without, fused)):.3f}")
