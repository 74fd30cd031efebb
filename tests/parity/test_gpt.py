"""Our GPT equals transformers' GPT-2; its parts equal PyTorch's."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from support.attention import KVCache
from support.gpt import (
    GELU,
    GPT2_SIZES,
    FeedForward,
    GPTConfig,
    GPTModel,
    LayerNorm,
    TransformerBlock,
    count_bytes,
    count_parameters,
)

RIGHT = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] + [0] * 8]).bool()
LEFT = RIGHT.flip(1)


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def small(seed=0, **options) -> GPTModel:
    """A small model far from its first state, so that every part of it shows in the logits."""
    torch.manual_seed(seed)
    model = GPTModel(GPTConfig(61, 16, d_model=32, n_heads=4, n_layers=3, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


# ---- the parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-3, 100.0])  # at 1e-3 eps is as large as the variance
def test_layer_norm(scale):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 24, dtype=torch.float64) * scale + 2 * scale
    ours, theirs = LayerNorm(24).double(), nn.LayerNorm(24).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    deviation = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    formula = (x - x.mean(-1, keepdim=True)) / deviation * ours.weight + ours.bias
    same(ours(x), theirs(x), 1e-12)
    same(ours(x), formula, 1e-12)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    ours(inputs[0]).pow(3).sum().backward()
    theirs(inputs[1]).pow(3).sum().backward()
    same(inputs[0].grad, inputs[1].grad, 1e-10)
    same(ours.weight.grad, theirs.weight.grad, 1e-10)
    same(ours.bias.grad, theirs.bias.grad, 1e-10)


def test_gelu():
    x = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    formula = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    same(GELU()(x), formula, 1e-14)
    same(GELU()(x), F.gelu(x, approximate="tanh"), 0)


def test_block_reads_normalized_and_adds():
    block, x = small().blocks[1], torch.randn(2, 6, 32)
    middle = x + block.attention(block.ln1(x))
    same(block(x), middle + block.ff(block.ln2(middle)), 1e-6)
    assert block.ff.up.weight.shape == (128, 32)


# ---- the whole ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tie_weights", [True, False])
def test_equals_transformers_gpt2(gpt_pair, tie_weights):
    theirs, ours = gpt_pair(tie_weights=tie_weights)
    ids = torch.randint(61, (3, 16))
    want = theirs(ids, labels=ids)
    logits = ours(ids)
    assert want.logits.std() > 1
    same(logits, want.logits)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    same(loss, want.loss)
    loss.backward()
    want.loss.backward()
    gpt, compared = theirs.transformer, 0
    pairs = [
        (ours.tok_emb, gpt.wte),
        (ours.embed.pos_emb, gpt.wpe),
        (ours.ln, gpt.ln_f),
        (ours.head, theirs.lm_head),
    ]
    for mine, block in zip(ours.blocks, gpt.h, strict=True):
        pairs += [(mine.ln1, block.ln_1), (mine.ln2, block.ln_2)]
        pairs += [(mine.ff.up, block.mlp.c_fc), (mine.ff.down, block.mlp.c_proj)]
        pairs += [(mine.attention.W_o, block.attn.c_proj)]
        parts = (mine.attention.W_q, mine.attention.W_k, mine.attention.W_v)
        same(torch.cat([W.weight.grad for W in parts]).T, block.attn.c_attn.weight.grad)
        same(torch.cat([W.bias.grad for W in parts]), block.attn.c_attn.bias.grad)
        compared += 6
    for mine, other in pairs:
        turned = type(other).__name__ == "Conv1D"
        same(mine.weight.grad, other.weight.grad.T if turned else other.weight.grad)
        compared += 1
        if getattr(mine, "bias", None) is not None:
            same(mine.bias.grad, other.bias.grad)
            compared += 1
    assert compared == len(list(ours.parameters())) + tie_weights  # the tied one, twice


def test_padding_equals_transformers_gpt2(gpt_pair):
    theirs, ours = gpt_pair()
    ids = torch.randint(61, (3, 9))
    for mask in (RIGHT, LEFT):
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        want = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits
        same(ours(ids, mask)[mask], want[mask])


@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
def test_a_padded_row_gives_what_it_gives_alone(mask):
    model, ids = small(), torch.randint(61, (3, 9))
    logits = model(ids, mask)
    assert logits.isfinite().all()
    for i in range(3):
        same(logits[i][mask[i]], model(ids[i : i + 1, mask[i]])[0])
    other_padding = torch.where(mask, ids, (ids + 1) % 61)
    assert torch.equal(model(other_padding, mask)[mask], logits[mask])
    if mask is RIGHT:  # causal attention needs no mask to be blind to its right
        same(model(ids)[mask], logits[mask])
    model(ids, mask)[mask].pow(2).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


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


@pytest.mark.parametrize("size", GPT2_SIZES)
def test_parameters_counted_by_formula_by_us_and_by_transformers(size):
    transformers = pytest.importorskip("transformers")
    known = {"124M": 124439808, "355M": 354823168, "774M": 774030080, "1558M": 1557611200}
    config = GPTConfig.gpt2(size)
    settings = transformers.GPT2Config(
        n_embd=config.d_model, n_head=config.n_heads, n_layer=config.n_layers
    )
    with torch.device("meta"):
        model = GPTModel(config)
        theirs = transformers.GPT2LMHeadModel(settings)
    assert config.n_parameters() == count_parameters(model) == known[size]
    assert sum(p.numel() for p in theirs.parameters()) == known[size]
    assert count_bytes(model) == 4 * known[size]
    assert count_bytes(model.bfloat16()) == 2 * known[size]
    assert model(torch.empty(2, 5, dtype=torch.long, device="meta")).shape == (2, 5, 50257)


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_parameters_counted_by_formula(tie_weights, qkv_bias):
    model = small(tie_weights=tie_weights, qkv_bias=qkv_bias)
    assert model.config.n_parameters() == count_parameters(model)
    assert (model.head.weight is model.tok_emb.weight) == tie_weights
    assert (model.blocks[0].attention.W_q.bias is not None) == qkv_bias


def test_first_weights_are_gpt2s(gpt_pair):
    torch.manual_seed(0)
    n_layers = 8
    model = GPTModel(GPTConfig(500, 64, 64, 4, n_layers=n_layers, tie_weights=False))
    for name, parameter in model.named_parameters():
        if "ln" in name and name.endswith("weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            residual = name.endswith(("W_o.weight", "down.weight"))
            deviation = 0.02 / math.sqrt(2 * n_layers) if residual else 0.02
            assert abs(parameter.std() / deviation - 1) < 0.05, name
            assert abs(parameter.mean()) < 0.1 * deviation, name
    ids = torch.randint(500, (4, 64))
    loss = F.cross_entropy(model(ids).flatten(0, 1), torch.randint(500, (256,)))
    assert abs(loss - math.log(500)) < 0.05  # it starts by knowing nothing


def test_dropout_only_in_training():
    model, ids = small(dropout=0.3), torch.randint(61, (2, 9))
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    rates += [block.attention.dropout for block in model.blocks]
    assert rates == [0.3] * 7  # the input; in each block the weights, and both branches


def test_state_is_weights_alone_and_can_be_copied():
    model, ids = small(), torch.randint(61, (2, 9))
    assert set(model.state_dict()) == {*dict(model.named_parameters()), "head.weight"}
    assert not list(model.buffers())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.head.weight is twin.tok_emb.weight
        assert torch.equal(twin(ids), model(ids))
    other = small(seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids), model(ids))
    assert other.head.weight is other.tok_emb.weight
    moved = copy.deepcopy(model).to(torch.float64)
    assert moved.head.weight is moved.tok_emb.weight
    same(moved(ids).float(), model(ids))


def test_lower_precision_and_autocast():
    model, ids = small(), torch.randint(61, (3, 9))
    want = model(ids, LEFT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(ids, LEFT)
    assert (got.float() - want).abs().max() < 0.05 * want.abs().max()
    assert model.bfloat16()(ids, LEFT).dtype == torch.bfloat16
    assert model(ids, LEFT).isfinite().all()


def test_compiles_as_one_graph():
    model, ids = small(), torch.randint(61, (3, 9))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    same(compiled(ids), model(ids))
    same(compiled(ids, LEFT), model(ids, LEFT))


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(20, 8, d_model=16, n_heads=2, n_layers=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(20, (2, 9))
    for _ in range(120):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_errors_name_the_values():
    with pytest.raises(ValueError, match="'125M'.*124M"):
        GPTConfig.gpt2("125M")
    with pytest.raises(ValueError, match="d_model=10 .* n_heads=4"):
        TransformerBlock(GPTConfig(d_model=10, n_heads=4))
    model, cache = small(), None
    with pytest.raises(ValueError, match="17 tokens exceed context_length=16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    cache = [KVCache(16) for _ in model.blocks]
    model(torch.zeros(1, 16, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="17 tokens exceed context_length=16"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="17 tokens exceed context_length=16"):
        model.embed(torch.zeros(1, 17, dtype=torch.long))


def test_defaults_are_the_smallest_gpt2():
    assert GPTConfig() == GPTConfig.gpt2("124M") == GPTConfig.gpt2()
    assert isinstance(FeedForward(8).gelu, GELU)
