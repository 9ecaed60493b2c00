"""Tests of model.py: its maps, positions, layers, first weights, and greedy generation."""
import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig, rotary_angles, rotate

torch.set_num_threads(1)


@pytest.fixture
def model():
    """Three layers, with two heads of four channels each, in double precision."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=11, block_size=12, n_layer=3, n_head=2, n_embd=8)
    return GPT(config).double()


IDX = torch.randint(11, (1, 12), generator=torch.Generator().manual_seed(1))


# Maps

def test_a_map_has_rows_that_sum_to_one_and_exact_zeros_above_the_diagonal(model):
    _, attentions = model(IDX[:, :9])
    for attn in attentions:
        assert attn.shape == (1, 2, 9, 9)
        assert not attn.triu(1).any()
        assert torch.allclose(attn.sum(dim=-1), torch.ones(9).double())


# Positions

def test_rotary_angles_by_hand():
    cos, sin = rotary_angles(block_size=12, head_size=4)
    # The first pair turns by 1 at each position, the second by 10000 ** (-2 / 4) = 0.01.
    angle = torch.tensor([7, 0.07])
    assert torch.allclose(cos[7], angle.cos())
    assert torch.allclose(sin[7], angle.sin())


def test_a_score_depends_on_the_distance_only():
    cos, sin = rotary_angles(block_size=12, head_size=4)
    q = rotate(torch.arange(4.0), cos, sin)  # (12, 4): at each position
    k = rotate(torch.ones(4), cos, sin)
    scores = q @ k.T
    assert scores[5, 3] == pytest.approx(scores[11, 9])
    assert scores[5, 3] != pytest.approx(scores[5, 2])


# Layers

def test_the_model_is_a_gpt_with_normed_and_rotated_queries_and_keys(model):
    x = model.wte(IDX)
    for block in model.blocks:
        torch.nn.init.normal_(block.ln_1.bias)  # so that ln_1 and ln_2 differ
        qkv = block.attn.c_attn(block.ln_1(x))  # (1, 12, 24)
        heads = qkv.view(1, 12, 6, 4).transpose(1, 2)
        q, k, v = heads.split(2, dim=1)  # of two heads each
        # A mean square of 1 makes a length of 2 with four channels.
        q = rotate(2 * F.normalize(q, dim=-1), model.cos, model.sin)
        k = rotate(2 * F.normalize(k, dim=-1), model.cos, model.sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
        hidden = F.gelu(block.mlp.c_fc(block.ln_2(x)))
        x = x + block.mlp.c_proj(hidden)
    logits, _ = model(IDX)
    assert torch.allclose(logits, model.lm_head(model.ln_f(x)))


def test_a_loss_on_the_last_map_reaches_its_queries_and_keys_and_the_layers_below(model):
    _, attentions = model(IDX)
    attentions[-1][0, :, 11, 0].sum().backward()
    last_layer = model.blocks[-1].attn.c_attn
    q, k, v = last_layer.weight.grad.chunk(3)
    assert q.any()
    assert k.any()
    assert not v.any()  # a map does not depend on the values of its own layer
    assert model.blocks[0].attn.c_attn.weight.grad.all()


# Weights

@pytest.mark.parametrize("width", [32, 128])
def test_initial_weights_keep_a_signal_of_size_one_at_any_width(width):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, n_embd=width))
    logits, _ = model(torch.arange(500)[None])
    assert logits.std().item() == pytest.approx(1, rel=0.1)
    assert model.wte.weight.std().item() == pytest.approx(1, rel=0.05)


def test_checkpoints_hold_parameters_only(model):
    parameters = dict(model.named_parameters())
    assert model.state_dict().keys() == parameters.keys()


# Texts

def test_generate_takes_the_likeliest_token_each_time_until_the_stop_token(model):
    idx = IDX[:, :5]
    new = model.generate(idx, 4)
    assert len(new) == 4
    assert model.generate(idx, 4, stop=new[1]) == new[:1]  # the first two differ
    for token in new:
        logits, _ = model(idx)
        assert token == logits[0, -1].argmax()
        new_idx = torch.tensor([[token]])
        idx = torch.cat((idx, new_idx), dim=1)


def test_generate_ends_at_a_full_block(model):
    new = model.generate(IDX[:, :5], 100)
    assert len(new) == 8  # seven fill the block of 12, and it predicts one more


def test_too_long_a_text_is_an_error(model):
    with pytest.raises(ValueError, match="the text has 13 tokens, block_size is 12"):
        model(torch.zeros(1, 13, dtype=torch.long))
