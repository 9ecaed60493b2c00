"""Tests of model.py: what a token sees, how attention is scored, and greedy generation."""
import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig, rotary_angles, rotate

torch.set_num_threads(1)


def small_model():
    """Three layers, with two heads of four channels each, in double precision."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=11, block_size=12, n_layer=3, n_head=2, n_embd=8)
    return GPT(config).double()


def random_text(T):
    torch.manual_seed(1)
    return torch.randint(11, (1, T))


# What a token sees

def test_a_map_has_rows_that_sum_to_one_and_exact_zeros_above_the_diagonal():
    model = small_model()
    logits, attentions = model(random_text(9))
    assert logits.shape == (1, 9, 11)
    assert len(attentions) == 3
    for attn in attentions:
        assert attn.shape == (1, 2, 9, 9)
        assert attn.min() >= 0
        assert not attn.triu(1).any()
        assert torch.allclose(attn.sum(dim=-1), torch.ones(9).double())


def test_a_changed_token_changes_only_its_own_and_later_logits():
    model = small_model()
    idx = random_text(12)
    logits, _ = model(idx)
    for place in range(12):
        changed = idx.clone()
        changed[0, place] = (idx[0, place] + 1) % 11
        changed_logits, _ = model(changed)
        same = torch.isclose(changed_logits, logits).all(dim=-1)[0]
        assert same[:place].all()
        assert not same[place:].any()


# Positions

def test_rotary_angles_by_hand():
    cos, sin = rotary_angles(block_size=12, head_size=4)
    # The first pair turns by 1 at each position, the second by 10000 ** (-2 / 4) = 0.01.
    angle = torch.tensor([7, 0.07])
    assert torch.allclose(cos[7], angle.cos())
    assert torch.allclose(sin[7], angle.sin())


def test_rotate_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])  # the pairs are (1, 3) and (2, 4)
    cos = torch.tensor([0.0, 1.0])  # a quarter turn of the first pair, none of the second
    sin = torch.tensor([1.0, 0.0])
    assert rotate(x, cos, sin).tolist() == [-3, 2, 1, 4]


def score(query_at, key_at):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4)
    cos, sin = rotary_angles(block_size=12, head_size=4)
    q = rotate(q, cos[query_at], sin[query_at])
    k = rotate(k, cos[key_at], sin[key_at])
    return (q @ k).item()


def test_a_score_depends_on_the_distance_only():
    assert score(5, 3) == pytest.approx(score(11, 9), abs=1e-5)
    assert score(5, 3) != pytest.approx(score(5, 2), abs=0.01)


# Layers

def test_attention_is_that_of_torch_with_normed_and_rotated_vectors():
    model = small_model()
    layer = model.blocks[0].attn
    x = torch.randn(5, 12, 8).double()
    y, attn = layer(x, model.cos, model.sin, model.causal_mask)

    qkv = layer.c_attn(x).view(5, 12, 3, 2, 4)  # three vectors for two heads, four channels each
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (5, 2, 12, 4)
    q = 2 * F.normalize(q, dim=-1)  # a mean square of 1 makes a length of 2 with four channels
    k = 2 * F.normalize(k, dim=-1)
    q = rotate(q, model.cos, model.sin)
    k = rotate(k, model.cos, model.sin)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(attn @ v, expected)

    head_0, head_1 = expected.unbind(dim=1)
    side_by_side = torch.cat((head_0, head_1), dim=-1)
    assert torch.allclose(y, layer.c_proj(side_by_side))


def test_a_block_adds_attention_and_then_the_mlp_to_its_input():
    model = small_model()
    block = model.blocks[0]
    torch.nn.init.normal_(block.ln_1.bias)  # or both norms would do the same
    x = torch.randn(5, 12, 8).double()
    out, _ = block(x, model.cos, model.sin, model.causal_mask)

    y, _ = block.attn(block.ln_1(x), model.cos, model.sin, model.causal_mask)
    x = x + y
    hidden = F.gelu(block.mlp.c_fc(block.ln_2(x)))
    x = x + block.mlp.c_proj(hidden)
    assert torch.allclose(out, x)


def test_maps_and_logits_come_from_the_first_block_to_the_last():
    model = small_model()
    idx = random_text(12)
    logits, attentions = model(idx)
    x = model.wte(idx)
    for layer, block in enumerate(model.blocks):
        x, attn = block(x, model.cos, model.sin, model.causal_mask)
        assert torch.equal(attentions[layer], attn)
    assert torch.allclose(logits, model.lm_head(model.ln_f(x)))


def test_a_loss_on_a_map_reaches_queries_and_keys():
    model = small_model()
    _, attentions = model(random_text(12))
    attentions[2][0, :, 11, 0].sum().backward()
    q, k, v = model.blocks[2].attn.c_attn.weight.grad.chunk(3)
    assert q.any()
    assert k.any()
    assert not v.any()  # a map does not depend on the values of its own layer


# Weights

@pytest.mark.parametrize("width", [32, 128])
def test_initial_weights_keep_a_signal_of_size_one_at_any_width(width):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, n_embd=width))
    block = model.blocks[0]
    assert model.wte.weight.std().item() == pytest.approx(1, rel=0.05)
    for layer in [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, model.lm_head]:
        assert layer.weight.std().item() == pytest.approx(width ** -0.5, rel=0.05)
    assert not block.mlp.c_fc.bias.any()

    logits, _ = model(torch.arange(500)[None])
    assert logits.std().item() == pytest.approx(1, rel=0.1)


def test_checkpoints_hold_parameters_only():
    model = small_model()
    parameters = dict(model.named_parameters())
    assert model.state_dict().keys() == parameters.keys()


def test_bfloat16_agrees_with_double_precision():
    model = small_model()
    idx = random_text(12)
    expected, _ = model(idx)
    logits, _ = model.bfloat16()(idx)
    assert expected.dtype == torch.float64
    assert logits.dtype == torch.bfloat16
    assert torch.allclose(logits.double(), expected, atol=0.1)


def test_the_whole_model_moves_to_another_device():
    # Tensors of the device "meta" have a shape but no content; they do not mix with others.
    model = small_model().to("meta")
    logits, _ = model(random_text(12).to("meta"))
    assert logits.device.type == "meta"


# Texts

def test_generate_takes_the_likeliest_token_each_time():
    model = small_model()
    idx = random_text(5)
    new = model.generate(idx, 4)
    assert len(new) == 4
    for token in new:
        logits, _ = model(idx)
        assert token == logits[0, -1].argmax()
        idx = torch.cat((idx, torch.tensor([[token]])), dim=1)


def test_generate_ends_before_the_stop_token():
    model = small_model()
    idx = random_text(5)
    first, second = model.generate(idx, 2)
    assert first != second
    assert model.generate(idx, 2, stop=second) == [first]


def test_generate_ends_at_a_full_block():
    new = small_model().generate(random_text(5), 100)
    assert len(new) == 8  # seven fill the block of 12, and it predicts one more


def test_too_long_a_text_is_an_error():
    model = small_model()
    model(random_text(12))
    with pytest.raises(ValueError, match="the text has 13 tokens, block_size is 12"):
        model(random_text(13))
