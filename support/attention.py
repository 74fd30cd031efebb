"""Attention: each token takes what it needs from the tokens before it.

Shapes here and in every later module: B rows of T tokens, S keys (the T tokens, after those in the
cache if there is one), width C = d_model, h heads of width d = C / h.
Vaswani et al., Attention Is All You Need, 2017, section 3.2.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def causal_mask(
    n_queries: int, n_keys: int, mask: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """Return where a query may look, (T, S): at itself and at the real tokens before it.

    The queries are the last of the keys. With `mask` (B, S), True for a real token and False for
    padding, the result is (B, 1, T, S). Padding may look at itself like all others, because a
    softmax over nothing at all is NaN.
    """
    query = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]  # (T, 1)
    key = torch.arange(n_keys, device=device)  # (S,)
    if mask is None:
        return key <= query
    return (key < query) & mask[:, None, None, :].bool() | (key == query)


def attention_weights(q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
    """Return softmax(Q Kᵀ / √d): how much each query takes from each key, (..., T, S).

    Args:
        q, k: queries (..., T, d) and keys (..., S, d).
        allowed: where a query may look, broadcast to (..., T, S); all else gets weight 0.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (..., T, S)
    return scores.masked_fill(~allowed, -math.inf).softmax(dim=-1)


class KVCache:
    """The keys and values of one layer's earlier tokens, so that they are computed only once.

    Room for `size` tokens is made once: concatenating would copy all of them at every step.
    Raises ValueError for more than `size` tokens.
    """

    def __init__(self, size: int):
        self.size, self.length = size, 0  # how many tokens there is room for, and there are

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new tokens' k and v (B, h, T, d); return those of all tokens (B, h, S, d)."""
        B, h, T, d = k.shape
        start, end = self.length, self.length + T
        if end > self.size:
            raise ValueError(f"{end} tokens do not fit into KVCache({self.size}): make it larger.")
        if start == 0:
            room = (B, h, self.size, d)
            self.k, self.v = k.new_empty(room), v.new_empty(room)
        self.k[:, :, start:end], self.v[:, :, start:end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class MultiHeadAttention(nn.Module):
    """Causal self-attention: n_heads heads side by side, concatenated, projected by W_O.

    Args:
        d_model: width C; a multiple of n_heads.
        n_heads: number of heads h.
        context_length: the most tokens it accepts, cached ones included.
        dropout: share of the attention weights set to 0 during training.
        qkv_bias: whether queries, keys and values have a bias (GPT-2's do).

    Raises ValueError for widths that do not divide, and for too many tokens.
    Vaswani et al., 2017, section 3.2.2.
    """

    def __init__(
        self, d_model: int, n_heads: int, context_length: int, dropout=0.0, qkv_bias=False
    ):
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model={d_model} must be a multiple of n_heads={n_heads}.")
        self.n_heads, self.context_length, self.dropout = n_heads, context_length, dropout
        self.W_q = nn.Linear(d_model, d_model, bias=qkv_bias)
        self.W_k = nn.Linear(d_model, d_model, bias=qkv_bias)
        self.W_v = nn.Linear(d_model, d_model, bias=qkv_bias)
        self.W_o = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, mask=None, cache: KVCache | None = None, need_weights=False):
        """Return (B, T, C) for x (B, T, C); with need_weights also the weights (B, h, T, S).

        Args:
            mask: (B, S), True for a real token and False for padding, which nobody looks at.
            cache: the earlier tokens' keys and values; x is what comes after them, and is added.
            need_weights: return the weights too, as they are before dropout.
        """
        B, T, C = x.shape
        S = T if cache is None else cache.length + T
        if self.context_length < S:
            raise ValueError(
                f"{S} tokens exceed context_length={self.context_length}: crop the input."
            )
        q, k, v = (
            W(x).view(B, T, self.n_heads, -1).transpose(1, 2)  # (B, h, T, d)
            for W in (self.W_q, self.W_k, self.W_v)
        )
        if cache is not None:
            k, v = cache.append(k, v)  # (B, h, S, d)
        # Without padding, all tokens at once or one at the end: the kernel needs no mask from us.
        plain = mask is None and T in (1, S)
        allowed = None if plain else causal_mask(T, S, mask, x.device)
        dropout = self.dropout if self.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, allowed, dropout, is_causal=plain and T > 1)
        out = self.W_o(heads.transpose(1, 2).reshape(B, T, C))
        if need_weights:
            return out, attention_weights(q, k, causal_mask(T, S, mask, x.device))
        return out
