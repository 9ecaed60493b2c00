"""What CAT costs: `python tests/speed.py [threads]` times training steps of 16 examples on the CPU,
the loss against the loop of its definition, and sizes the attention maps."""
import copy
import statistics
import sys
import time
from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from cat import average_attention, re_attention_loss  # noqa: E402
from data import STG, adjacency_of, build_tokenizer, encode, generate, inside_of  # noqa: E402
from model import GPT, GPTConfig, rotate  # noqa: E402
from oracle import loop_loss, random_case  # noqa: E402

B, T, VOCAB, PAIRS = 16, 55, 293, 200  # the size of the Spurious Token Game


def fused_forward(self, x, cos, sin, future):
    """CausalSelfAttention.forward with a fused kernel, which cannot return its map."""
    B, T, C = x.shape
    q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
    q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
    y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
    return self.proj(y.transpose(1, 2).reshape(B, T, C)), None


def make_models():
    """The same small GPT twice, the second with fused attention, each with its optimiser."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(VOCAB, block_size=T))
    fused = copy.deepcopy(model)
    for block in fused.blocks:
        block.attn.forward = MethodType(fused_forward, block.attn)
    return [(m, torch.optim.AdamW(m.parameters(), lr=1e-4)) for m in (model, fused)]


def step(model, optimizer, data, ix, use_cat):
    """One training step as in train.py: all tokens, the answer once more, CAT on both layers."""
    logits, attentions = model(data.idx[ix])
    targets, answer = data.targets[ix], data.answer[ix]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss = loss + F.cross_entropy(logits[answer], targets[answer])
    if use_cat:
        for attn, adjacency in ((average_attention(attentions[-1:]), adjacency_of(data, ix)),
                                (average_attention(attentions[:-1]), inside_of(data, ix))):
            loss = loss + 0.3 * re_attention_loss(attn, adjacency, 1000.0, "each")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def compare(first, second):
    """Median milliseconds of two functions and their ratio, called in pairs, order alternating."""
    pairs = []
    for pair in range(PAIRS + 10):
        times = {}
        for f in (first, second) if pair % 2 else (second, first):
            start = time.perf_counter()
            f()
            times[f] = 1000 * (time.perf_counter() - start)
        pairs.append((times[first], times[second], times[second] / times[first]))
    return [statistics.median(column) for column in zip(*pairs[10:])]  # the first 10 warm up


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads())
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, medians of {PAIRS} pairs")
    (plain, fused), examples = make_models(), generate(STG, B)
    data = encode(examples, build_tokenizer(e.input + e.target for e in examples))
    batch = data, torch.arange(B)
    without, with_cat, ratio = compare(lambda: step(*plain, *batch, False),
                                       lambda: step(*plain, *batch, True))
    print(f"a step without CAT {without:.2f} ms, with CAT {with_cat:.2f} ms, ratio {ratio:.3f}")
    sdpa, without, ratio = compare(lambda: step(*fused, *batch, False),
                                   lambda: step(*plain, *batch, False))
    print(f"a step with fused attention {sdpa:.2f} ms, without {without:.2f} ms, ratio {ratio:.3f}")

    attn, adjacency, _ = random_case(4, T, 0, torch.float32, mask=None)
    attn.requires_grad_()
    PAIRS = 3
    loop, fast, _ = compare(lambda: loop_loss(attn, adjacency, 300.0, "each").backward(),
                            lambda: re_attention_loss(attn, adjacency, 300.0, "each").backward())
    print(f"the loss of 4 examples, all queries: loop {loop:.0f} ms, cat.py {fast:.2f} ms")
    for length in (64, 256, 1024):
        attentions = GPT(GPTConfig(VOCAB, length))(torch.zeros(1, length, dtype=torch.long))[1]
        size = sum(attn.nbytes for attn in attentions) / 2 ** 20
        print(f"attention maps of an example of {length} tokens: {size:.1f} MiB")
