"""LoRA: a model learns through small matrices beside its large ones, which stay as they are.

A linear layer maps x (..., in) to x Wᵀ (..., out). What is learned beside it is the product of A
(in, r) and B (r, out), with a rank r far below both widths.
Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, section 4.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn


class LoRALayer(nn.Module):
    """The update of one linear layer, x → (alpha / rank) · x A B. It begins as 0, because B does.

    Args:
        in_features, out_features: those of the layer that it changes.
        rank: r, the columns of A and rows of B.
        alpha: the update's strength; because rank divides it, a rate that suits one rank is not
            far off for another.

    Raises ValueError for a rank below 1 and an alpha that is not above 0.
    Hu et al., 2021, section 4.1.
    """

    def __init__(self, in_features: int, out_features: int, rank: int = 8, alpha: float = 16.0):
        super().__init__()
        if rank < 1 or not alpha > 0:
            raise ValueError(f"rank={rank} must be at least 1, and alpha={alpha} above 0.")
        self.rank, self.alpha = rank, alpha
        self.A = nn.Parameter(torch.empty(in_features, rank))
        self.B = nn.Parameter(torch.zeros(rank, out_features))
        bound = 1 / math.sqrt(in_features)  # with which nn.Linear begins, too
        nn.init.uniform_(self.A, -bound, bound)

    @property
    def scale(self) -> float:
        """By how much the product of A and B is multiplied."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for x (..., in)."""
        return x @ self.A @ self.B * self.scale

    def update(self) -> Tensor:
        """Return what it adds to the layer's weight, (out, in)."""
        return (self.A @ self.B).T * self.scale


class LoRALinear(nn.Module):
    """A linear layer with adapters beside it, each a `LoRALayer` with a name; one may be active."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, self.adapters = linear, nn.ModuleDict()
        self.active: str | None = None
        self.original: Tensor | None = None  # the layer's weight while an adapter is merged

    @property
    def weight(self) -> Tensor:
        """The layer's own weight, (out, in), without any adapter."""
        return self.linear.weight if self.original is None else self.original

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for x (..., in)."""
        y = self.linear(x)
        if self.active in self.adapters and self.original is None:
            y = y + self.adapters[self.active](x)
        return y

    @torch.no_grad()
    def merge(self) -> None:
        """Add the active adapter's update to the weight."""
        if self.active in self.adapters and self.original is None:
            self.original = self.linear.weight.clone()
            self.linear.weight += self.adapters[self.active].update()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the weight back; to subtract the update would leave rounding errors."""
        if self.original is not None:
            self.linear.weight.copy_(self.original)
            self.original = None


# ---- which layers -------------------------------------------------------------------------------


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the layers that have adapters, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | LoRALinear]:
    """Return the layers that may have adapters, by name: linear, with a weight of their own.

    A head that is tied to the embedding is none of them: its update would be the embedding's too.
    """
    users = Counter(id(getattr(module, "weight", None)) for module in model.modules())
    found = adapted(model)
    inside = {id(layer.linear) for layer in found.values()}
    for name, module in model.named_modules():
        alone = isinstance(module, nn.Linear) and users[id(module.weight)] == 1
        if name and alone and id(module) not in inside:
            found[name] = module
    return found


def chosen_layers(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Return the names of the linear layers that `targets` mean; see `add_adapter`."""
    names, chosen = list(linear_layers(model)), set()
    for target in [targets] if isinstance(targets, str) else targets:
        found = {n for n in names if fnmatchcase(n, target) or fnmatchcase(n, f"*.{target}")}
        if not found:
            there = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
            raise ValueError(f"No linear layer is called {target!r}: there are {', '.join(there)}.")
        chosen |= found
    return [name for name in names if name in chosen]


# ---- adapters -----------------------------------------------------------------------------------


def add_adapter(
    model: nn.Module,
    targets: str | Sequence[str],
    rank: int = 8,
    alpha: float = 16.0,
    name: str = "default",
) -> nn.Module:
    """Put an adapter beside the chosen layers of a model, and return the model.

    It is active, and from then on nothing else learns. If a new head should learn too, say so
    afterwards: `head.requires_grad_(True)`.

    Args:
        targets: names of linear layers, or how they end, such as "W_q" or "ff.up"; * stands for
            anything, as in "attention.*".
        rank, alpha: as in `LoRALayer`.
        name: of the adapter; a model may have several.

    Raises ValueError for a target that no layer fits, and a name that is taken or has a dot.
    """
    chosen = chosen_layers(model, targets)
    put_adapter(model, dict.fromkeys(chosen, (rank, alpha)), name)
    return model


def put_adapter(model: nn.Module, layers: dict[str, tuple[int, float]], name: str) -> None:
    """Put a new adapter beside the named layers, each with its own rank and alpha; activate it."""
    if name in adapter_names(model) or not name or "." in name:
        raise ValueError(f"An adapter cannot be called {name!r}: take a new name without dots.")
    found = linear_layers(model)
    for path, (rank, alpha) in layers.items():
        layer = found[path]
        if isinstance(layer, nn.Linear):
            layer = LoRALinear(layer)
            model.set_submodule(path, layer)
        new = LoRALayer(layer.linear.in_features, layer.linear.out_features, rank, alpha)
        layer.adapters[name] = new.to(layer.weight)
    model.requires_grad_(False)
    use_adapter(model, name)


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of a model's adapters."""
    return list(dict.fromkeys(n for layer in adapted(model).values() for n in layer.adapters))


def use_adapter(model: nn.Module, name: str | None) -> None:
    """Let another adapter be active, and learn, or None; one that was merged is taken out first."""
    if name is not None and name not in (names := adapter_names(model)):
        raise ValueError(f"There is no adapter {name!r}, only: {', '.join(names) or 'none'}.")
    for layer in adapted(model).values():
        layer.unmerge()
        layer.active = name
        for other, adapter in layer.adapters.items():
            adapter.requires_grad_(other == name)


def merge_adapter(model: nn.Module) -> nn.Module:
    """Add the active adapter to the weights, where it costs no time; return the model."""
    for layer in adapted(model).values():
        layer.merge()
    return model


def unmerge_adapter(model: nn.Module) -> nn.Module:
    """Undo `merge_adapter`, bit for bit; return the model."""
    for layer in adapted(model).values():
        layer.unmerge()
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """Take the adapters off, and return the model, which may learn again as a whole.

    The layers are plain ones with the weights that they have now: call `merge_adapter` first to
    keep an adapter's update, as before an export.
    """
    for path, layer in adapted(model).items():
        model.set_submodule(path, layer.linear)
    return model.requires_grad_(True)


def count_learning(model: nn.Module) -> int:
    """Return how many numbers learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def low_rank(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (in, r) and B (r, out): of all their products, theirs is nearest to an update's.

    The update is (out, in), as the difference of two weights is, and (A B)ᵀ stands for it.
    Eckart and Young, The Approximation of One Matrix by Another of Lower Rank, 1936.
    """
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    root = S[:rank].sqrt()  # half of each singular value to A, half to B
    return Vh[:rank].T * root, (U[:, :rank] * root).T
