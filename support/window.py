"""Sliding-window attention: each token looks at the last `window` tokens only, itself among them.

What a layer has to remember is then bounded, however long the text.
Beltagy et al., Longformer, 2020, section 3.1; Jiang et al., Mistral 7B, 2023, section 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from support.llama import GroupedQueryAttention


def sliding_mask(
    n_queries: int, n_keys: int, window: int, device: torch.device | None = None
) -> Tensor:
    """Return where a query may look, (T, S): at itself and at the window - 1 tokens before it.

    The queries are the last of the keys. Raises ValueError for a window of less than 1.
    """
    if window < 1:
        raise ValueError(f"window={window} must be at least 1: each token sees itself.")
    query = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]  # (T, 1)
    key = torch.arange(n_keys, device=device)  # (S,)
    return (key <= query) & (key > query - window)


class WindowCache:
    """The keys and values of the last tokens that a later one may still look at, window - 1."""

    def __init__(self, window: int):
        self.window, self.length = window, 0  # how many tokens have been seen
        self.k: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new tokens' k and v (B, g, T, d); return the kept ones and the new (B, g, S, d).

        Then all are forgotten but the last window - 1.
        """
        self.length += k.shape[2]
        if self.k is not None:
            k, v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        first = max(0, k.shape[2] - (self.window - 1))
        self.k, self.v = k[:, :, first:].clone(), v[:, :, first:].clone()  # so the rest is freed
        return k, v


class SlidingWindowAttention(GroupedQueryAttention):
    """Grouped-query attention in which each token sees only the last `window` tokens."""

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, window: int):
        super().__init__(d_model, n_heads, n_kv_heads)
        self.window = window

    def forward(self, x: Tensor, rotation, cache: WindowCache | None = None) -> Tensor:
        """Return (B, T, C) for x (B, T, C) and the rotation of its positions."""
        B, T, C = x.shape
        q, k, v = self.project(x, rotation)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, g, S, d), with S of at most window - 1 + T
        allowed = sliding_mask(T, k.shape[2], self.window, x.device)
        heads = F.scaled_dot_product_attention(q, k, v, allowed, enable_gqa=True)
        return self.W_o(heads.transpose(1, 2).reshape(B, T, C))
