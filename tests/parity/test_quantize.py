"""Weights in int8 equal torch's own, bit for bit, and a plain NumPy loop."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization.observer import PerChannelMinMaxObserver

from support.gpt import GPTConfig, GPTModel, count_bytes
from support.llama import LlamaConfig, LlamaModel
from support.quantize import Int8Linear, quantize, quantized, stored_bytes

WEIGHTS = [
    torch.randn(7, 5, generator=torch.Generator().manual_seed(0)),
    torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    * torch.logspace(-4, 3, 64)[:, None],
    torch.tensor([[0.0, 0.0], [-2.0, 1.0], [127.0, 0.5], [127.0, 1.5]]),  # zeros, and ties
]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_equals_torch(weight):
    observer = PerChannelMinMaxObserver(
        ch_axis=0,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        quant_min=-127,
        quant_max=127,
    )
    observer(weight)
    scales, zeros = observer.calculate_qparams()
    q, scale = quantize(weight)
    some = weight.abs().amax(dim=1) > 0  # a row of zeros has any scale
    assert torch.equal(scale[some, 0], scales[some]) and not zeros.any()
    theirs = torch.fake_quantize_per_channel_affine(weight, scale[:, 0], zeros.int(), 0, -127, 127)
    assert torch.equal(q * scale, theirs)
    assert len(q.unique()) > 3


@pytest.mark.parametrize("weight", WEIGHTS)
def test_equals_a_plain_loop(weight):
    q, scale = quantize(weight)
    for row, (numbers, s) in zip(
        weight.numpy(), zip(q.numpy(), scale[:, 0].numpy(), strict=True), strict=True
    ):
        greatest = np.abs(row).max()
        s_want = np.float32(greatest / np.float32(127)) if greatest else np.float32(1)
        assert s == s_want
        assert numbers.tolist() == [int(np.rint(np.float32(x / s_want))) for x in row]
        assert np.abs(numbers).max() in (0, 127)
        assert (np.abs(numbers * s - row) <= s / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_equals_the_float_layer_with_the_rounded_weight(bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(96, 64, bias=bias), torch.randn(3, 5, 96)
    layer = Int8Linear(linear)
    q, scale = quantize(linear.weight.detach())
    want = F.linear(x, q * scale, linear.bias)
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    assert layer(x).dtype == torch.float32
    assert (layer(x) - linear(x)).abs().max() > 1e-4  # it is rounded
    assert (layer(x) - linear(x)).abs().max() < 0.02


def test_whole_numbers_can_be_multiplied_as_such():
    """The product that fast int8 kernels do, on torch's own: integers throughout."""
    torch.manual_seed(0)
    layer, x = Int8Linear(nn.Linear(96, 64, bias=False)), torch.randint(-127, 128, (32, 96))
    exact = torch._int_mm(x.to(torch.int8), layer.weight.T.contiguous())
    assert torch.equal(layer(x.float()), exact.float() * layer.scale[:, 0])


@pytest.mark.parametrize(
    "model",
    [
        lambda: GPTModel(GPTConfig(61, 16, d_model=32, n_heads=4, n_layers=3)),
        lambda: LlamaModel(LlamaConfig(61, 16, 48, 6, 2, 3, 80, tie_weights=False)),
    ],
)
def test_a_model(model):
    torch.manual_seed(0)
    model = model()
    before, ids = copy.deepcopy(model.state_dict()), torch.randint(61, (2, 16))
    small = quantized(model)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
    linears = [m for block in small.blocks for m in block.modules() if isinstance(m, nn.Linear)]
    layers = [m for m in small.modules() if isinstance(m, Int8Linear)]
    assert not linears and len(layers) == sum(
        isinstance(m, nn.Linear) for m in model.blocks.modules()
    )
    assert isinstance(small.head, nn.Linear)
    n = sum(layer.weight.numel() for layer in layers)
    rows = sum(len(layer.weight) for layer in layers)
    assert stored_bytes(model) == count_bytes(model)
    assert stored_bytes(small) == stored_bytes(model) - 3 * n + 4 * rows
    difference = (small(ids) - model(ids)).abs().max()
    assert 1e-6 < difference < 0.05


def test_numbers_that_are_none_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        quantize(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="infinite"):
        quantize(torch.tensor([[1.0, float("inf")]]))
