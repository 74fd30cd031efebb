"""The arithmetic of scale: against PyTorch's counter and numbers that others have published."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from support.gpt import GPTConfig, GPTModel
from support.scale import (
    activation_bytes,
    flops_per_token,
    plan,
    state_bytes,
    training_flops,
    usual_shape,
)
from support.train import token_loss


@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_what_pytorch_counts(tied):
    config = GPTConfig(97, 24, d_model=32, n_heads=4, n_layers=3, tie_weights=tied)
    ids = torch.randint(97, (5, 24))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        token_loss(GPTModel(config), ids, ids)[0].backward()
    assert counter.get_total_flops() == flops_per_token(config) * ids.numel()


def test_published_numbers_come_out():
    assert training_flops(175e9, 300e9) == pytest.approx(3.14e23, rel=0.01)  # GPT-3, table D.1
    assert training_flops(1e9, 20.2e9) == pytest.approx(1.21e20, rel=0.01)  # Chinchilla, table 3
    # ZeRO, figure 1: 7.5 billion parameters on 64 GPUs.
    gigabytes = [sum(state_bytes(7.5e9, 64, stage).values()) / 1e9 for stage in range(4)]
    assert gigabytes == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)
    assert usual_shape(175e9) == (12288, 96)  # GPT-3, table 2.1


def test_a_plan_adds_up():
    a, b = (plan(7e9, 140e9, n) for n in (8, 16))
    assert a.days == 2 * b.days and a.dollars == b.dollars
    assert a.dollars == pytest.approx(a.days * 24 * 8 * 2)
    assert a.whole == b.whole and a.fits() == {"whole": False, "sharded": True}
    kept = activation_bytes(*usual_shape(7e9), 4096)
    assert sum(a.sharded.values()) == pytest.approx(16 * 7e9 / 8 + kept)
    assert plan(7e9, 140e9, 8, mfu=0.2).days == 2 * a.days


def test_errors_name_the_values():
    with pytest.raises(ValueError, match="stage=4 must be 0 to 3"):
        state_bytes(1e9, 8, 4)
    with pytest.raises(ValueError, match="mfu=40 must be above 0 and at most 1"):
        plan(1e9, 1e9, 8, mfu=40)
