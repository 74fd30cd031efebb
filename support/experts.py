"""A mixture of experts: many feed-forward networks, of which each token uses a few.

N tokens, E experts, k of them for each token.
Shazeer et al., Outrageously Large Neural Networks, 2017, section 2; Fedus et al., Switch
Transformers, 2021, section 2; Jiang et al., Mixtral of Experts, 2024, section 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.llama import SwiGLU


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return each token's weights and experts, both (N, k), for the router's logits (N, E).

    The k best experts are chosen, and a softmax over these alone gives the weights.
    """
    best, chosen = logits.topk(k, dim=-1)
    return best.softmax(dim=-1), chosen


def balancing_loss(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return E · Σ f · p over the experts, least where all have the same load: then it is 1.

    f is the share of the choices (N, k) that fell on an expert, and p its mean probability. Only p
    has a gradient, and f is its factor: what has much to do becomes less likely.
    Fedus et al., 2021, section 2.2.
    """
    E = logits.shape[-1]
    f = F.one_hot(chosen, E).float().mean(dim=(0, 1))  # (E,)
    p = logits.softmax(dim=-1).mean(dim=0)  # (E,)
    return E * (f * p).sum()


class MixtureOfExperts(nn.Module):
    """Feed-forward layers of which each token uses k: a router chooses, and weighs the results.

    After a forward pass `load` is the share of the choices for each expert, (E,), and `balance`
    the `balancing_loss`. Raises ValueError for a k that is not from 1 to n_experts.
    """

    def __init__(self, d_model: int, d_ff: int, n_experts: int, k: int):
        super().__init__()
        if not 1 <= k <= n_experts:
            raise ValueError(f"k={k} must be from 1 to n_experts={n_experts}.")
        self.k = k
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(d_model, d_ff) for _ in range(n_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, C) for x (B, T, C)."""
        tokens = x.flatten(0, -2)  # (N, C)
        logits = self.router(tokens)  # (N, E)
        weights, chosen = route(logits, self.k)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            token, place = (chosen == i).nonzero(as_tuple=True)  # who chose it, and as which
            result = weights[token, place, None] * expert(tokens[token])
            out = out.index_add(0, token, result)
        self.load = chosen.flatten().bincount(minlength=len(self.experts)) / chosen.numel()
        self.balance = balancing_loss(logits, chosen)
        return out.view_as(x)
