"""The GPT: causality, attention against torch's own, generation, and the gradient of the whole loss by finite differences."""
import math

import pytest
import torch
import torch.nn.functional as F

from cat import average_attention, re_attention_loss
from model import GPT, GPTConfig, rotate


def small_model(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{"vocab_size": 11, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 8} | changes)).double()


def test_attention_rows_sum_to_one_and_see_no_future():
    model, idx = small_model(n_layer=3), torch.randint(0, 11, (4, 9))
    logits, attentions = model(idx)
    assert logits.shape == (4, 9, 11) and len(attentions) == 3
    for attn in attentions:
        assert attn.shape == (4, 2, 9, 9)
        assert torch.allclose(attn.sum(-1), torch.ones(4, 2, 9).double())
        assert (attn.triu(1) == 0).all() and (attn.tril() >= 0).all()


def test_a_token_changes_no_earlier_logits():
    model, idx = small_model(), torch.randint(0, 11, (1, 12))
    logits = model(idx)[0]
    for t in range(12):
        changed = idx.clone()
        changed[0, t] = (idx[0, t] + 1) % 11
        after = model(changed)[0]
        assert torch.allclose(after[:, :t], logits[:, :t])
        assert not torch.allclose(after[:, t], logits[:, t])


def test_equals_scaled_dot_product_attention():
    model = small_model(n_layer=1)
    block, x = model.blocks[0].attn, torch.randn(3, 7, 8).double()
    cos, sin = model.cos[:7], model.sin[:7]
    y, attn = block(x, cos, sin, model.hidden[:7, :7])
    q, k, v = block.qkv(x).view(3, 7, 3, 2, 4).permute(2, 0, 3, 1, 4)
    q, k = (rotate(x / x.pow(2).mean(-1, keepdim=True).sqrt(), cos, sin) for x in (q, k))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(y, block.proj(expected.transpose(1, 2).reshape(3, 7, 8)))
    assert torch.allclose(attn @ v, expected)


def test_rotary_scores_depend_on_the_distance_only():
    model = small_model()
    q, k = torch.randn(4).double(), torch.randn(4).double()
    score = lambda i, j: rotate(q, model.cos[i], model.sin[i]) @ rotate(k, model.cos[j], model.sin[j])
    assert torch.allclose(score(5, 3), score(11, 9)) and not torch.allclose(score(5, 3), score(5, 2))


def test_finite_differences_through_the_whole_model():
    model = small_model()
    idx, gamma = torch.randint(0, 11, (2, 7)), 0.3
    adjacency = torch.zeros(2, 7, 7, dtype=torch.bool)
    adjacency[:, 5, 1] = adjacency[:, 5, 3] = adjacency[0, 6, 2] = True

    def loss(form):
        logits, attentions = model(idx)
        l_next = F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
        return l_next + gamma * re_attention_loss(average_attention(attentions), adjacency, 30.0, form)

    chosen = [(model.embed.weight, (idx[0, 1].item(), 2)), (model.blocks[0].attn.qkv.weight, (3, 1)),
              (model.blocks[1].attn.qkv.weight, (9, 5)), (model.blocks[0].mlp[0].weight, (7, 0)), (model.norm.weight, (4,))]
    for form in ("hinge", "log"):
        grads = torch.autograd.grad(loss(form), [weight for weight, _ in chosen])
        for (weight, place), grad in zip(chosen, grads):
            with torch.no_grad():
                values = []
                for delta in (1e-6, -2e-6):
                    weight[place] += delta
                    values.append(loss(form))
                weight[place] += 1e-6
            assert torch.allclose((values[0] - values[1]) / 2e-6, grad[place], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("init_std, embed, fan_in_64, fan_in_256", [(0.0, 1, 1 / 8, 1 / 16), (0.02, 0.02, 0.02, 0.02)])
def test_initial_weights(init_std, embed, fan_in_64, fan_in_256):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=200, n_embd=64, init_std=init_std))
    block = model.blocks[0]
    for layer, std in ((model.embed, embed), (block.attn.qkv, fan_in_64), (model.head, fan_in_64), (block.mlp[2], fan_in_256)):
        assert math.isclose(layer.weight.std().item(), std, rel_tol=0.05)


def test_generate_is_greedy_and_stops():
    model, idx = small_model(), torch.randint(0, 11, (1, 5))
    new = model.generate(idx, 7)
    for i, token in enumerate(new):
        logits = model(torch.cat((idx, torch.tensor([new[:i]], dtype=torch.long)), dim=1))[0]
        assert token == logits[0, -1].argmax().item()
    assert len(new) == 7
    assert model.generate(idx, 7, stop=new[2]) == new[:new.index(new[2])]


def test_never_past_block_size():
    model = small_model()
    with pytest.raises(ValueError, match="13 tokens, but block_size is 12"):
        model(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="block_size 12"):
        model.generate(torch.zeros(1, 5, dtype=torch.long), 8)


@pytest.mark.parametrize("changes, part", [
    ({"vocab_size": 0}, "vocab_size is 0"), ({"n_layer": -1}, "n_layer is -1"), ({"n_head": 2.0}, "n_head is 2.0"),
    ({"block_size": True}, "block_size is True"), ({"n_embd": 10}, "n_embd is 10"), ({"init_std": -1.0}, "init_std is -1.0"),
    ({"n_layer": 64, "n_embd": 4096}, "1.3e+10 parameters")])
def test_config_checks_itself(changes, part):
    with pytest.raises(ValueError) as error:
        small_model(**changes)
    assert part in str(error.value)
