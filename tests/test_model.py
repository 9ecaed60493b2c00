"""The GPT: what attention may see, how it is scored, how weights start, and greedy generation."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig, rotate


def small_model(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 8}
    return GPT(GPTConfig(**sizes | changes)).double()


def test_nothing_sees_the_future():
    model, idx = small_model(n_layer=3), torch.randint(0, 11, (1, 12))
    logits, attentions = model(idx)
    assert logits.shape == (1, 12, 11) and len(attentions) == 3
    for attn in attentions:
        assert torch.allclose(attn.sum(dim=-1), torch.ones(1, 2, 12).double())
        assert not attn.triu(1).any() and (attn >= 0).all()
    for t in range(12):  # a token changes its own and later logits only
        changed = idx.clone()
        changed[0, t] = (idx[0, t] + 1) % 11
        same = torch.isclose(model(changed)[0], logits).all(dim=-1)[0]
        assert same[:t].all() and not same[t:].any()


def test_the_written_out_attention_is_torchs_own_of_normed_and_rotated_vectors():
    model = small_model(n_layer=1)
    layer, x, turn = model.blocks[0].attn, torch.randn(3, 12, 8).double(), (model.cos, model.sin)
    y, attn = layer(x, *turn, model.future)
    q, k, v = layer.qkv(x).view(3, 12, 3, 2, 4).permute(2, 0, 3, 1, 4)
    q, k = (rotate(x / x.pow(2).mean(-1, keepdim=True).sqrt(), *turn) for x in (q, k))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(y, layer.proj(expected.transpose(1, 2).reshape(3, 12, 8)))
    assert torch.allclose(attn @ v, expected)


def test_positions_show_in_the_scores_by_their_distance_only():
    model, q, k = small_model(), *torch.randn(2, 4).double()
    at = lambda x, i: rotate(x, model.cos[i], model.sin[i])
    near, same, far = at(q, 5) @ at(k, 3), at(q, 11) @ at(k, 9), at(q, 5) @ at(k, 2)
    assert torch.allclose(near, same) and not torch.allclose(near, far)
    assert GPT(GPTConfig(9)).cos[63, -1] < math.cos(1)  # the slowest turns in a short text too
    _, attentions = model(torch.zeros(1, 6, dtype=torch.long))  # equal tokens differ by place alone
    assert attentions[0][..., -1, :].std(dim=-1).min() > 1e-3


def test_the_mlp_is_gelu_and_blocks_add_to_the_residual_stream():
    model, idx = small_model(n_layer=1), torch.randint(0, 11, (1, 12))
    block, x = model.blocks[0], model.embed(idx)
    x = x + block.attn(block.norm1(x), model.cos, model.sin, model.future)[0]
    wide = block.mlp[0](block.norm2(x))
    x = x + block.mlp[2](wide * (1 + torch.erf(wide / math.sqrt(2))) / 2)
    assert torch.allclose(model(idx)[0], model.head(model.norm(x)))


def test_initial_weights_keep_a_signal_of_size_one():
    model = small_model(vocab_size=200, n_embd=64).float().requires_grad_(False)
    for layer, std in ((model.embed, 1), (model.head, 1 / 8), (model.blocks[0].mlp[2], 1 / 16)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
    assert not model.blocks[0].mlp[0].bias.any()
    ids = {b"7": 3, b"8": 4, b"60": 5, b"x": 6}
    model.start_alike(SimpleNamespace(token_byte_values=lambda: ids, encode_single_token=ids.get))
    for layer, std in ((model.embed, 1), (model.head, 1 / 8)):
        near, far = F.cosine_similarity(layer.weight[[3, 3], :32], layer.weight[[4, 5], :32])
        assert near > 0.9 > far
        assert layer.weight[3, :32].square().mean().sqrt().item() == pytest.approx(std)


def test_generate_is_greedy_and_stops():
    model, idx = small_model(), torch.randint(0, 11, (1, 5))
    whole = torch.cat((idx, torch.tensor([new := model.generate(idx, 7)])), dim=1)
    assert len(new) == 7 and new == model(whole)[0][0, 4:-1].argmax(dim=-1).tolist()
    assert model.generate(idx, 7, stop=new[2]) == new[:new.index(new[2])]
    assert len(model.generate(idx, 100)) == 8  # the last of them from a full block of 12


def test_wrong_sizes_are_errors():
    for changes, part in (({"n_layer": 0}, "n_layer is 0"), ({"n_head": 2.0}, "n_head is 2.0"),
                          ({"n_embd": 10}, "n_embd is 10: give a multiple of 4")):
        with pytest.raises(ValueError, match=part):
            small_model(**changes)
    with pytest.raises(ValueError, match="13 tokens, over block_size 12"):
        small_model()(torch.zeros(1, 13, dtype=torch.long))
