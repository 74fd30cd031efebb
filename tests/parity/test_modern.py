"""The parts of appendix C equal those of transformers: the window, the experts, and the whole."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.llama import modeling_llama
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)

from support.experts import MixtureOfExperts, balancing_loss, route
from support.llama import GroupedQueryAttention, RMSNorm, RotaryEmbedding, SwiGLU, rotate
from support.window import SlidingWindowAttention, WindowCache, sliding_mask

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import record


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def changed(config, **settings):
    return type(config)(**config.to_diff_dict() | {"attn_implementation": "eager"} | settings)


def test_what_is_recorded_is_what_transformers_computes():
    stored, fresh = load_file(record.PATH), record.record()
    assert stored.keys() == fresh.keys()
    for name, tensor in stored.items():
        same(tensor, fresh[name])
    assert {name.split("/")[0] for name in stored} == {
        *("RMSNorm", "rotate", "SwiGLU", "attention", "window", "experts", "balancing", "Llama")
    }


@pytest.mark.parametrize("width", [1, 3, 17, 144])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rms_norm_of_odd_widths(width, eps):
    torch.manual_seed(width)
    theirs, ours = record.shaken(modeling_llama.LlamaRMSNorm(width, eps)), RMSNorm(width, eps)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, width) * 3 + 1
    same(ours(x), theirs(x))


@pytest.mark.parametrize(("d_model", "d_ff"), [(24, 41), (9, 1), (1, 7)])
def test_swiglu_of_odd_widths(d_model, d_ff):
    torch.manual_seed(0)
    sizes = {"hidden_size": d_model, "intermediate_size": d_ff}
    config = changed(record.LLAMA, **sizes, num_attention_heads=1, num_key_value_heads=1)
    theirs, ours = record.shaken(modeling_llama.LlamaMLP(config)), SwiGLU(d_model, d_ff)
    ours.load_state_dict({k.replace("_proj", ""): v for k, v in theirs.state_dict().items()})
    x = torch.randn(3, 1, d_model)
    same(ours(x), theirs(x))


@pytest.mark.parametrize("start", [0, 1, 63, 8000])
@pytest.mark.parametrize("d", [2, 6, 16])
def test_rotations_from_any_position(start, d):
    torch.manual_seed(d)
    q, positions = torch.randn(2, 3, 5, d), torch.arange(start, start + 5)
    config = changed(record.LLAMA, head_dim=d)
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(q, positions[None])
    want = modeling_llama.apply_rotary_pos_emb(q, q, cos, sin)[0]
    same(rotate(q, *RotaryEmbedding(d, 100.0)(positions)), want)


@pytest.mark.parametrize(("h", "g"), [(6, 1), (6, 2), (6, 3), (6, 6), (2, 1), (12, 4)])
@pytest.mark.parametrize("T", [1, 5])
def test_attention_of_all_groupings(h, g, T):
    torch.manual_seed(h * g)
    config = changed(record.LLAMA, num_attention_heads=h, num_key_value_heads=g, head_dim=24 // h)
    theirs = record.shaken(modeling_llama.LlamaAttention(config, 0))
    ours, x = GroupedQueryAttention(24, h, g), torch.randn(2, T, 24)
    ours.load_state_dict(record.by_our_names(theirs))
    positions = torch.arange(11, 11 + T)  # not from 0
    cos_sin = modeling_llama.LlamaRotaryEmbedding(config)(x, positions[None])
    causal = torch.full((T, T), -torch.inf).triu(1)[None, None]
    same(ours(x, RotaryEmbedding(24 // h, 100.0)(positions)), theirs(x, cos_sin, causal)[0])


# ---- the window ---------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 3, 6, 7, 50])
def test_sliding_mask_is_that_of_transformers(window):
    config = changed(record.MISTRAL, sliding_window=window)
    theirs = create_sliding_window_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(1, 7, 24),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(7)[None],
    )
    want = torch.ones(7, 7).tril().bool() if theirs is None else theirs[0, 0] == 0
    assert torch.equal(sliding_mask(7, 7, window), want)
    assert torch.equal(sliding_mask(3, 7, window), want[4:])


@pytest.mark.parametrize("window", [1, 2, 5, 9, 20])
@pytest.mark.parametrize("steps", [[9], [1] * 9, [4, 1, 3, 1]])
def test_window_attention_is_mistrals_also_from_a_cache(window, steps):
    torch.manual_seed(window)
    config = changed(record.MISTRAL, sliding_window=window)
    theirs, x = record.shaken(MistralAttention(config, 0)), torch.randn(2, 9, 24)
    ours, rope = SlidingWindowAttention(24, 6, 2, window), RotaryEmbedding(4, 100.0)
    ours.load_state_dict(record.by_our_names(theirs))
    cos_sin = modeling_llama.LlamaRotaryEmbedding(record.LLAMA)(x, torch.arange(9)[None])
    mask = torch.zeros(9, 9).masked_fill(~sliding_mask(9, 9, window), -torch.inf)[None, None]
    want, cache, end = theirs(x, cos_sin, mask)[0], WindowCache(window), 0
    for step in steps:
        start, end = end, end + step
        same(ours(x[:, start:end], rope(torch.arange(start, end)), cache), want[:, start:end])
        assert cache.k.shape[2] == cache.v.shape[2] == min(end, window - 1)
        assert cache.k.untyped_storage().nbytes() == cache.k.nbytes  # nothing else is held
    assert cache.length == 9


def test_a_window_as_long_as_the_text_changes_nothing():
    torch.manual_seed(0)
    full, rotation = GroupedQueryAttention(24, 6, 2), RotaryEmbedding(4)(torch.arange(9))
    x = torch.randn(2, 9, 24)
    for window, equal in ((8, False), (9, True), (10, True)):
        ours = SlidingWindowAttention(24, 6, 2, window)
        ours.load_state_dict(full.state_dict())
        assert torch.allclose(ours(x, rotation), full(x, rotation), atol=1e-6) == equal


def test_no_window_at_all_is_refused():
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        sliding_mask(3, 3, 0)


# ---- the experts --------------------------------------------------------------------------------


@pytest.mark.parametrize(("E", "k"), [(5, 2), (5, 1), (5, 5), (8, 3), (1, 1)])
def test_mixture_of_experts_is_mixtrals(E, k):
    torch.manual_seed(E + k)
    config = changed(record.MIXTRAL, num_local_experts=E, num_experts_per_tok=k)
    theirs, ours = record.shaken(MixtralSparseMoeBlock(config)), MixtureOfExperts(24, 40, E, k)
    ours.load_state_dict(record.experts(theirs))
    inputs = [torch.randn(3, 7, 24).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    outputs = [net(x) for net, x in zip((ours, theirs), inputs, strict=True)]
    same(*outputs)
    for output in outputs:
        output.pow(2).sum().backward()
    same(inputs[0].grad, inputs[1].grad, 1e-4)
    same(ours.router.weight.grad, theirs.gate.weight.grad, 1e-4)
    assert ours.load.sum() == pytest.approx(1) and len(ours.load) == E


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balancing_loss_is_theirs_for_each_choice(k):
    torch.manual_seed(k)
    logits = torch.randn(40, 6) * 2
    _, chosen = route(logits, k)
    # transformers adds up the k choices, and we take their mean, so that 1 is balanced for any k
    same(balancing_loss(logits, chosen) * k, load_balancing_loss_func((logits,), 6, top_k=k))


def test_balancing_loss_is_least_when_balanced_and_most_when_all_go_to_one():
    everywhere, chosen = torch.zeros(12, 4), torch.arange(12)[:, None] % 4
    assert balancing_loss(everywhere, chosen).item() == pytest.approx(1)
    one = torch.tensor([[50.0, 0, 0, 0]]).expand(12, 4)
    assert balancing_loss(one, torch.zeros(12, 1, dtype=torch.long)).item() == pytest.approx(4)


def test_more_experts_for_a_token_than_there_are():
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k={k} must be from 1 to n_experts=5"):
            MixtureOfExperts(24, 40, 5, k)
