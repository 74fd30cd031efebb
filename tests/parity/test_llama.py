"""The llama-style model equals transformers' Llama: each part by itself, and the whole."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from support.attention import KVCache, MultiHeadAttention
from support.generate import generate
from support.llama import (
    GroupedQueryAttention,
    LlamaBlock,
    LlamaConfig,
    LlamaModel,
    RMSNorm,
    RotaryEmbedding,
    SwiGLU,
    rotate,
)

theirs = pytest.importorskip("transformers.models.llama.modeling_llama")

RIGHT = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] + [0] * 8]).bool()
LEFT = RIGHT.flip(1)


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def settings(**options):
    """The settings of a small Llama, in transformers' words; no default of either is among them."""
    sizes = {
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "rms_norm_eps": 0.03,
        "rope_parameters": {"rope_theta": 700.0, "rope_type": "default"},
        "attn_implementation": "eager",
    }
    return theirs.LlamaConfig(**sizes | options)


def small(seed=0, **options) -> LlamaModel:
    """A small model far from its first state, so that every part of it shows in the logits."""
    torch.manual_seed(seed)
    config = LlamaConfig(61, 32, 48, 6, 2, n_layers=3, d_ff=80, rope_base=700.0, **options)
    return shake(LlamaModel(config).eval())


def shake(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


# ---- the parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-2, 100.0])  # at 1e-2 eps is as large as the square
def test_rms_norm(scale):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 24) * scale + scale
    ours, other = shake(RMSNorm(24, 1e-4)), theirs.LlamaRMSNorm(24, 1e-4)
    other.load_state_dict(ours.state_dict())
    formula = x / (x.square().mean(-1, keepdim=True) + 1e-4).sqrt() * ours.weight
    same(ours(x), other(x))
    same(ours(x), formula)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    ours(inputs[0]).pow(2).sum().backward()
    other(inputs[1]).pow(2).sum().backward()
    same(inputs[0].grad * scale, inputs[1].grad * scale)


@pytest.mark.parametrize("base", [700.0, 10_000.0, 100_000.0])
def test_rotation(base):
    config = settings(rope_parameters={"rope_theta": base, "rope_type": "default"})
    q, k = torch.randn(2, 6, 9, 8), torch.randn(2, 2, 9, 8)
    positions = torch.stack([torch.arange(9), torch.randint(8192, (9,))])
    cos, sin = theirs.LlamaRotaryEmbedding(config)(q, positions)
    want = theirs.apply_rotary_pos_emb(q, k, cos, sin)
    angles = RotaryEmbedding(8, base)(positions)
    same(rotate(q, *angles), want[0], 1e-6)
    same(rotate(k, *angles), want[1], 1e-6)


def test_rotation_by_hand_and_only_the_distance_counts():
    q, k = torch.randn(2, 1, 1, 1, 4, dtype=torch.float64)
    angle = torch.tensor([3.0, 3.0 / 100.0], dtype=torch.float64)  # position 3, base 10,000
    turned = torch.view_as_complex(torch.stack(q[0, 0].chunk(2, -1), -1))
    turned = torch.view_as_real(turned * torch.polar(torch.ones_like(angle), angle))
    rope = RotaryEmbedding(4)
    same(rotate(q, *rope(torch.tensor([3])))[0, 0, 0], turned.mT.flatten(), 1e-6)

    def score(i, j):
        return (rotate(q, *rope(torch.tensor([i]))) * rotate(k, *rope(torch.tensor([j])))).sum()

    same(score(7, 3), score(107, 103), 1e-5)
    assert (score(7, 3) - score(7, 4)).abs() > 1e-3


def test_swiglu():
    torch.manual_seed(0)
    config = settings()
    other = shake(theirs.LlamaMLP(config))
    ours = SwiGLU(48, 80)
    ours.load_state_dict({k.replace("_proj", ""): v for k, v in other.state_dict().items()})
    x = torch.randn(2, 5, 48)
    same(ours(x), other(x))
    assert (ours(x) - ours.down(ours.gate(x) * F.silu(ours.up(x)))).abs().max() > 0.1


@pytest.mark.parametrize("g", [1, 2, 3, 6])
def test_grouped_query_attention(g):
    torch.manual_seed(0)
    config = settings(num_key_value_heads=g)
    other = shake(theirs.LlamaAttention(config, 0))
    ours, x = GroupedQueryAttention(48, 6, g), torch.randn(2, 9, 48)
    ours.load_state_dict(
        {f"W_{name[0]}.weight": weight for name, weight in other.state_dict().items()}
    )
    cos_sin = theirs.LlamaRotaryEmbedding(config)(x, torch.arange(9)[None])
    causal = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    rotation = RotaryEmbedding(8, 700.0)(torch.arange(9))
    same(ours(x, rotation), other(x, cos_sin, causal)[0])


def test_without_rotation_and_groups_it_is_multi_head_attention():
    ours, plain = GroupedQueryAttention(48, 6, 6), MultiHeadAttention(48, 6, 32)
    plain.load_state_dict(ours.state_dict(), strict=False)
    nn.init.zeros_(plain.W_o.bias)
    x = torch.randn(2, 9, 48)
    same(ours(x, (torch.ones(4), torch.zeros(4))), plain(x))


def test_block_reads_normalized_and_adds():
    block, x = small().blocks[1], torch.randn(2, 6, 48)
    rotation = RotaryEmbedding(8, 700.0)(torch.arange(6))
    middle = x + block.attention(block.ln1(x), rotation)
    same(block(x, rotation), middle + block.ff(block.ln2(middle)), 1e-6)
    assert isinstance(block, LlamaBlock)


# ---- the whole ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
def test_a_padded_row_gives_what_it_gives_alone(mask):
    model, ids = small(), torch.randint(61, (3, 9))
    logits = model(ids, mask)
    assert logits.isfinite().all()
    for i in range(3):
        same(logits[i][mask[i]], model(ids[i : i + 1, mask[i]])[0])
    other_padding = torch.where(mask, ids, (ids + 1) % 61)
    assert torch.equal(model(other_padding, mask)[mask], logits[mask])
    logits[mask].pow(2).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_padding_takes_up_no_position():
    """The logits cannot show it, because only distances count, up to the rounding of angles."""
    model, seen = small(), []
    model.rope.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].tolist()))
    model(torch.zeros(3, 9, dtype=torch.long), LEFT)
    model(torch.zeros(3, 9, dtype=torch.long))
    assert seen[0] == [[*range(9)], [0] * 4 + [*range(5)], [0] * 9]
    assert seen[1] == [*range(9)]


def test_no_token_looks_ahead():
    model, ids = small(), torch.randint(61, (2, 16))
    before = model(ids)
    for t in range(16):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % 61
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["no mask", "left", "right"])
@pytest.mark.parametrize("steps", [[1] * 9, [4, 1, 1, 3], [9]])
def test_cache_on_equals_cache_off(mask, steps):
    model, ids = small(), torch.randint(61, (3, 9))
    want, cache, end = model(ids, mask), [KVCache(16) for _ in model.blocks], 0
    for step in steps:
        start, end = end, end + step
        seen = None if mask is None else mask[:, :end]
        same(model(ids[:, start:end], seen, cache), want[:, start:end])
    assert cache[0].k.shape == (3, 2, 16, 8)  # only the key/value heads


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_of_prompts_together_equals_each_alone(use_cache):
    model, prompts = small(), [[5, 6, 7, 8], [9], [10, 11]]
    together = generate(model, prompts, 40, temperature=0, use_cache=use_cache)  # past the context
    assert together == [generate(model, [p], 40, temperature=0)[0] for p in prompts]


def test_bfloat16():
    model, ids = small().bfloat16(), torch.randint(61, (3, 9))
    assert model(ids, LEFT).dtype == torch.bfloat16


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="d_model=50 must be a multiple of n_heads=4"):
        GroupedQueryAttention(50, 4, 2)
    with pytest.raises(ValueError, match="n_heads=6 must be a multiple of n_kv_heads=4"):
        GroupedQueryAttention(48, 6, 4)
    with pytest.raises(ValueError, match="d_head=5 is odd"):
        RotaryEmbedding(5)
    with pytest.raises(ValueError, match="33 tokens exceed context_length=32: crop the ids"):
        small()(torch.zeros(1, 33, dtype=torch.long))
