"""Weights in eight bits: a quarter of the memory, and nearly the same numbers.

Each row of a weight, which makes one output, gets a scale of its own, so that a few large numbers
coarsen only their own row. Dettmers et al., LLM.int8(), 2022, section 2 (vector-wise absmax).
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 127  # not 128: the same on both sides of 0


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight (out, in) as whole numbers from -127 to 127, and each row's scale (out, 1).

    Raises ValueError for a weight that is not finite.
    """
    if not weight.isfinite().all():
        raise ValueError("The weight has NaN or infinite numbers: they have no place in int8.")
    scale = weight.abs().amax(dim=1, keepdim=True) / LARGEST
    scale = torch.where(scale == 0, 1.0, scale)  # a row of zeros stays one
    return (weight / scale).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer whose weight lies in memory as int8, and is made float again to multiply."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = quantize(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for x (..., in)."""
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale[:, 0]
        return y if self.bias is None else y + self.bias


def quantized(model: nn.Module) -> nn.Module:
    """Return a copy of a model with int8 in the linear layers of its blocks; embeddings stay."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, last = name.rpartition(".")
                setattr(block.get_submodule(parent), last, Int8Linear(module))
    return model


def stored_bytes(model: nn.Module) -> int:
    """Return the memory of all parameters and buffers; what is tied counts once."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(tensor.nbytes for tensor in tensors.values())
