"""Attention equals PyTorch's two own versions and a double loop; it never looks ahead."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from support.attention import KVCache, MultiHeadAttention, attention_weights, causal_mask

B, T, C, H = 3, 7, 24, 4
RIGHT = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]).bool()
LEFT = RIGHT.flip(1)


def build(seed=0, **options) -> MultiHeadAttention:
    torch.manual_seed(seed)
    attention = MultiHeadAttention(C, H, context_length=16, **options).eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def by_loops(q, k, v, allowed):
    """Attention of one head written out: q, k, v (T, d), allowed (T, T)."""
    out = torch.zeros_like(v)
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if allowed[i][j]]
        scores = [sum(a * b for a, b in zip(q[i], k[j], strict=True)) for j in seen]
        powers = [math.exp(float(s) / math.sqrt(q.shape[1])) for s in scores]
        for j, power in zip(seen, powers, strict=True):
            out[i] += power / sum(powers) * v[j]
    return out


@torch.no_grad()
def test_equals_attention_by_loops():
    attention = build(qkv_bias=True).double()
    x = torch.randn(1, T, C, dtype=torch.float64)
    q, k, v = (W(x)[0].chunk(H, dim=1) for W in (attention.W_q, attention.W_k, attention.W_v))
    past = [[j <= i for j in range(T)] for i in range(T)]
    heads = torch.cat([by_loops(*qkv, past) for qkv in zip(q, k, v, strict=True)], dim=1)
    same(attention(x)[0], attention.W_o(heads), 1e-10)
    out, weights = attention(x, need_weights=True)
    same(out[0], attention.W_o(heads), 1e-10)
    same(torch.cat([w @ values for w, values in zip(weights[0], v, strict=True)], 1), heads, 1e-10)


@pytest.mark.parametrize("shape", [(T, T), (1, T), (3, T)])
def test_formula_equals_the_fused_kernel(shape):
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, shape[0], 6), *torch.randn(2, B, H, shape[1], 6)
    allowed = torch.ones(shape, dtype=torch.bool).tril(shape[1] - shape[0])
    assert torch.equal(causal_mask(*shape), allowed)
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    weights = attention_weights(q, k, causal_mask(*shape))
    same(weights @ v, fused, 1e-6)
    same(weights.sum(-1), torch.ones(B, H, shape[0]), 1e-6)
    assert (weights.masked_select(~allowed) == 0).all()


def torch_twin(attention: MultiHeadAttention) -> nn.MultiheadAttention:
    """Return PyTorch's module with the same weights."""
    twin = nn.MultiheadAttention(C, H, batch_first=True).eval()
    parts = (attention.W_q, attention.W_k, attention.W_v)
    with torch.no_grad():
        twin.in_proj_weight.copy_(torch.cat([W.weight for W in parts]))
        twin.in_proj_bias.zero_()
        if parts[0].bias is not None:
            twin.in_proj_bias.copy_(torch.cat([W.bias for W in parts]))
        twin.out_proj.load_state_dict(attention.W_o.state_dict())
    return twin


FUTURE = torch.ones(T, T, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("mask", [None, RIGHT, LEFT], ids=["no mask", "right", "left"])
def test_equals_nn_multihead_attention(qkv_bias, mask):
    attention, x = build(qkv_bias=qkv_bias), torch.randn(B, T, C)
    want, want_weights = torch_twin(attention)(
        *(x, x, x),
        attn_mask=FUTURE,
        key_padding_mask=None if mask is None else ~mask,
        average_attn_weights=False,
    )
    got, weights = attention(x, mask, need_weights=True)
    real = torch.ones(B, T, dtype=torch.bool) if mask is None else mask  # theirs are NaN elsewhere
    same(got[real], want[real])
    same(attention(x, mask)[real], want[real])
    same(weights.transpose(1, 2)[real], want_weights.transpose(1, 2)[real])


def test_gradients_equal_nn_multihead_attention():
    attention = build(qkv_bias=True)
    twin, x = torch_twin(attention).double(), torch.randn(B, T, C, dtype=torch.float64)
    x = torch.stack([x, x]).requires_grad_()
    attention.double()(x[0]).pow(2).sum().backward()
    twin(x[1], x[1], x[1], attn_mask=FUTURE)[0].pow(2).sum().backward()
    same(x.grad[0], x.grad[1], 1e-10)
    parts = (attention.W_q, attention.W_k, attention.W_v)
    same(torch.cat([W.weight.grad for W in parts]), twin.in_proj_weight.grad, 1e-10)
    same(torch.cat([W.bias.grad for W in parts]), twin.in_proj_bias.grad, 1e-10)
    same(attention.W_o.weight.grad, twin.out_proj.weight.grad, 1e-10)


@pytest.mark.parametrize("mask", [None, LEFT], ids=["no mask", "left"])
def test_no_token_looks_ahead(mask):
    attention, x = build(), torch.randn(B, T, C)
    before, weights = attention(x, mask, need_weights=True)
    assert (weights.triu(1) == 0).all()
    for t in range(T):
        changed = x.clone()
        changed[:, t] += 1.0
        after = attention(changed, mask)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[0, t:] - before[0, t:]).abs().amax(-1).min() > 1e-4  # and all later ones do


@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
def test_padding_changes_nothing(mask):
    attention, x = build(), torch.randn(B, T, C)
    x.requires_grad = True
    out, weights = attention(x, mask, need_weights=True)
    assert out.isfinite().all() and weights.isfinite().all()
    for i in range(B):
        same(out[i][mask[i]], attention(x[i : i + 1, mask[i]])[0])
    to_padding = weights.masked_select(~mask[:, None, None, :] & mask[:, None, :, None])
    assert len(to_padding) and (to_padding == 0).all()
    out[mask].pow(2).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[~mask] == 0).all() and (x.grad[mask].abs().amax(-1) > 0).all()
    same(attention(x, mask.long()), out)  # as a tokenizer writes it


def test_a_row_of_nothing_but_padding_is_finite():
    attention, x = build(), torch.randn(2, T, C, requires_grad=True)
    mask = torch.tensor([[True] * T, [False] * T])
    out, weights = attention(x, mask, need_weights=True)
    (out.sum() + weights.sum()).backward()
    assert out.isfinite().all() and weights.isfinite().all() and x.grad.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["no mask", "left", "right"])
@pytest.mark.parametrize("steps", [[1] * T, [4, 1, 1, 1], [2, 3, 2], [T]])
def test_cache_on_equals_cache_off(mask, steps):
    attention, x = build(), torch.randn(B, T, C)
    want, want_weights = attention(x, mask, need_weights=True)
    cache, end = KVCache(16), 0
    for step in steps:
        start, end = end, end + step
        seen = None if mask is None else mask[:, :end]
        out, weights = attention(x[:, start:end], seen, cache, need_weights=True)
        same(out, want[:, start:end])
        same(weights, want_weights[:, :, start:end, :end])
        assert cache.length == end


def test_dropout_only_in_training():
    attention, x = build(dropout=0.5), torch.randn(1, T, C)
    expected = attention(x)
    assert torch.equal(attention(x), expected)
    many = attention.train()(x.expand(4000, T, C))
    assert not torch.equal(many[0], many[1])
    assert (many.mean(0) - expected).abs().max() < 0.1 * many.std(0).max()  # it scales what is left


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    attention, x = build(qkv_bias=True), torch.randn(B, T, C)
    want, want_weights = attention(x, LEFT, need_weights=True)
    got, weights = attention.to(dtype)(x.to(dtype), LEFT, need_weights=True)
    assert got.dtype == weights.dtype == dtype
    same(got.float(), want, 0.2 if dtype == torch.bfloat16 else 0.02)
    same(weights.float(), want_weights, 0.1 if dtype == torch.bfloat16 else 0.02)


def test_state_is_weights_alone_and_can_be_copied():
    attention, x = build(qkv_bias=True), torch.randn(B, T, C)
    names = [f"W_{part}.{kind}" for part in "qkvo" for kind in ("weight", "bias")]
    assert list(attention.state_dict()) == names
    assert list(build().state_dict()) == ["W_q.weight", "W_k.weight", "W_v.weight", *names[-2:]]
    assert not list(attention.buffers())
    for twin in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(twin(x), attention(x))
    with torch.device("meta"):
        out, weights = MultiHeadAttention(C, H, 16)(torch.empty(B, T, C), need_weights=True)
    assert out.shape == (B, T, C) and weights.shape == (B, H, T, T)


def test_errors_name_the_values():
    with pytest.raises(ValueError, match="d_model=10 .* n_heads=4"):
        MultiHeadAttention(10, 4, context_length=8)
    with pytest.raises(ValueError, match="17 tokens exceed context_length=16"):
        build()(torch.randn(1, 17, C))
    attention, cache = build(), KVCache(16)
    attention(torch.randn(1, 16, C), cache=cache)
    with pytest.raises(ValueError, match="17 tokens exceed context_length=16"):
        attention(torch.randn(1, 1, C), cache=cache)
    assert cache.length == 16
    with pytest.raises(ValueError, match=r"3 tokens .* KVCache\(2\)"):
        attention(torch.randn(1, 3, C), cache=KVCache(2))
