"""What one step of training costs: bytes that lie in memory, operations, and seconds.

Counted and not guessed: the bytes from the tensors themselves, the operations from
every matrix product that PyTorch computes.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from support.gpt import count_bytes
from support.step import TrainConfig, make_optimizer, token_loss


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[dict[int, int]]:
    """Yield a dictionary that fills with what a forward pass keeps: bytes by address.

    These are the activations that the backward pass will need; weights do not count.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the memory of what an optimizer remembers, in bytes; AdamW: two numbers a weight."""
    return sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())


def step_bytes(model: nn.Module, batch: tuple, loss: Callable = token_loss) -> dict[str, int]:
    """Return the bytes of weights, gradients, AdamW's memory and activations in one step.

    The model stays as it is. `batch` and `loss` are as in `train`.
    """
    optimizer = make_optimizer(model, TrainConfig(steps=1, batch_size=1, lr=0.0))
    with kept_for_backward(model) as kept:
        total, _ = loss(model, *batch)
    activations = sum(kept.values())
    total.backward()
    optimizer.step()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    return {
        "weights": count_bytes(model),
        "gradients": gradients,
        "AdamW": state_bytes(optimizer),
        "activations": activations,
    }


def step_flops(model: nn.Module, batch: tuple, loss: Callable = token_loss) -> dict[str, int]:
    """Return the floating-point operations of the matrix products, forward and backward."""
    with FlopCounterMode(display=False) as forward:
        total, _ = loss(model, *batch)
    with FlopCounterMode(display=False) as backward:
        total.backward()
    model.zero_grad()
    return {"forward": forward.get_total_flops(), "backward": backward.get_total_flops()}


def step_seconds(
    model: nn.Module, batch: tuple, loss: Callable = token_loss, repeats: int = 5
) -> dict[str, float]:
    """Return the seconds of forward, backward and AdamW's step, each the least of `repeats`.

    They are those of the processor, which other programs do not change; of several threads they
    are the sum. The model stays as it is.
    """
    optimizer = make_optimizer(model, TrainConfig(steps=1, batch_size=1, lr=0.0))
    times = {"forward": [], "backward": [], "AdamW": []}
    for _ in range(repeats + 1):  # the first one also makes AdamW's memory
        start = time.process_time()
        total, _ = loss(model, *batch)
        forward = time.process_time()
        total.backward()
        backward = time.process_time()
        optimizer.step()
        spans = forward - start, backward - forward, time.process_time() - backward
        for name, seconds in zip(times, spans, strict=True):
            times[name].append(seconds)
        optimizer.zero_grad()
    return {name: min(seconds[1:]) for name, seconds in times.items()}
