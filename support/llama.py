"""A llama-style model: what changed between GPT-2 and the open models of today.

Rotations in place of learned positions, RMSNorm in place of LayerNorm, SwiGLU in place of GELU,
several query heads for each key/value head, and no biases. Shapes as in `support.attention`, with g
key/value heads. Touvron et al., LLaMA: Open and Efficient Foundation Language Models, 2023.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.attention import KVCache, causal_mask
from support.gpt import initialize


@dataclass
class LlamaConfig:
    """The shape of a llama-style model; the defaults are those of SmolLM2-135M.

    Args:
        vocab_size: number of tokens V.
        context_length: the most tokens it sees at once.
        d_model: width C of the vector of each token.
        n_heads: query heads h in each block.
        n_kv_heads: key/value heads g; each serves n_heads / n_kv_heads query heads.
        n_layers: blocks.
        d_ff: width inside the feed-forward layers.
        rope_base: the larger, the slower the slowest rotation, and the longer the contexts.
        eps: keeps RMSNorm from dividing by 0.
        tie_weights: whether the head is the token embedding, turned around.
    """

    vocab_size: int = 49_152
    context_length: int = 8192
    d_model: int = 576
    n_heads: int = 9
    n_kv_heads: int = 3
    n_layers: int = 30
    d_ff: int = 1536
    rope_base: float = 100_000.0
    eps: float = 1e-5
    tie_weights: bool = True


class RMSNorm(nn.Module):
    """Divide each token's vector by its root mean square, then scale; no mean, no shift.

    x / √(mean(x²) + eps) · weight, as one fast kernel.
    Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, section 3.
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., C) for x (..., C)."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class RotaryEmbedding(nn.Module):
    """The angles by which RoPE turns queries and keys: position / base^(2i / d) radians.

    Raises ValueError for an odd width d.
    Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, section 3.2.
    """

    def __init__(self, d_head: int, base: float = 10_000.0):
        super().__init__()
        if d_head % 2:
            raise ValueError(f"d_head={d_head} is odd: RoPE turns its numbers in pairs.")
        self.d_head, self.base = d_head, base

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, (1, T, d/2) for positions (T,), (B, 1, T, d/2) for (B, T)."""
        pair = torch.arange(0, self.d_head, 2, device=positions.device)  # 2i
        speed = 1 / self.base ** (pair / self.d_head)  # (d/2,)
        angle = (positions[..., None] * speed).unsqueeze(-3)  # the same for all heads
        return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + d/2) of x (B, h, T, d) by its angle.

    The dot product of two turned vectors depends only on how far apart they stand.
    """
    a, b = x.chunk(2, dim=-1)  # (B, h, T, d/2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class SwiGLU(nn.Module):
    """Feed-forward layers with a gate: down(silu(gate(x)) · up(x)), for each token by itself.

    Shazeer, GLU Variants Improve Transformer, 2020, section 2.
    """

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., C) for x (..., C)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GroupedQueryAttention(nn.Module):
    """Causal self-attention in which n_heads / n_kv_heads query heads share their keys and values.

    The cache shrinks by as much. With n_kv_heads equal to n_heads it is multi-head attention.
    Raises ValueError for numbers that do not divide.
    Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models, 2023, section 2.2.
    """

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int):
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model={d_model} must be a multiple of n_heads={n_heads}.")
        if n_heads % n_kv_heads:
            raise ValueError(f"n_heads={n_heads} must be a multiple of n_kv_heads={n_kv_heads}.")
        self.d_head = d_model // n_heads
        self.W_q = nn.Linear(d_model, d_model, bias=False)
        self.W_k = nn.Linear(d_model, n_kv_heads * self.d_head, bias=False)
        self.W_v = nn.Linear(d_model, n_kv_heads * self.d_head, bias=False)
        self.W_o = nn.Linear(d_model, d_model, bias=False)

    def project(self, x: Tensor, rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, h, T, d), keys and values (B, g, T, d); q and k are turned."""
        B, T, _ = x.shape
        q, k, v = (
            W(x).view(B, T, -1, self.d_head).transpose(1, 2)  # (B, h or g, T, d)
            for W in (self.W_q, self.W_k, self.W_v)
        )
        return rotate(q, *rotation), rotate(k, *rotation), v

    def forward(self, x: Tensor, rotation, mask=None, cache: KVCache | None = None) -> Tensor:
        """Return (B, T, C) for x (B, T, C).

        Args:
            rotation: the cosines and sines of the positions of x, from `RotaryEmbedding`.
            mask, cache: as in `MultiHeadAttention`.
        """
        B, T, C = x.shape
        q, k, v = self.project(x, rotation)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, g, S, d)
        S = k.shape[2]
        # Without padding, all tokens at once or one at the end: the kernel needs no mask from us.
        plain = mask is None and T in (1, S)
        allowed = None if plain else causal_mask(T, S, mask, x.device)
        how = {"is_causal": plain and T > 1, "enable_gqa": True}  # each k serves its group of q
        heads = F.scaled_dot_product_attention(q, k, v, allowed, **how)
        return self.W_o(heads.transpose(1, 2).reshape(B, T, C))


class LlamaBlock(nn.Module):
    """Attention, then the feed-forward layers; each reads a normalized x and adds to x itself."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.ln1 = RMSNorm(config.d_model, config.eps)
        self.attention = GroupedQueryAttention(config.d_model, config.n_heads, config.n_kv_heads)
        self.ln2 = RMSNorm(config.d_model, config.eps)
        self.ff = SwiGLU(config.d_model, config.d_ff)

    def forward(self, x: Tensor, rotation, mask=None, cache: KVCache | None = None) -> Tensor:
        """Return (B, T, C) for x (B, T, C); the others as in `GroupedQueryAttention`."""
        x = x + self.attention(self.ln1(x), rotation, mask, cache)
        return x + self.ff(self.ln2(x))


class LlamaModel(nn.Module):
    """A llama-style model, used like a `GPTModel`: token ids → a score for each next token."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.d_model)
        self.rope = RotaryEmbedding(config.d_model // config.n_heads, config.rope_base)
        self.blocks = nn.ModuleList(LlamaBlock(config) for _ in range(config.n_layers))
        self.ln = RMSNorm(config.d_model, config.eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_weights:
            self.head.weight = self.tok_emb.weight
        initialize(self, config.n_layers)

    def hidden(self, ids: Tensor, mask=None, cache: list[KVCache] | None = None) -> Tensor:
        """Return each token's vector after the last norm, (B, T, C); the rest as in `GPTModel`."""
        start = cache[0].length if cache else 0
        end = start + ids.shape[1]
        if end > (limit := self.config.context_length):
            raise ValueError(f"{end} tokens exceed context_length={limit}: crop the ids.")
        if mask is None:
            positions = torch.arange(start, end, device=ids.device)  # (T,)
        else:  # a row's first real token stands at 0
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, start:]  # (B, T)
        x = self.tok_emb(ids)  # (B, T, C)
        rotation = [part.to(x.dtype) for part in self.rope(positions)]
        for block, kv in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x = block(x, rotation, mask, kv)
        return self.ln(x)

    def forward(self, ids: Tensor, mask=None, cache: list[KVCache] | None = None) -> Tensor:
        """Return the logits (B, T, V) for ids (B, T); the rest as in `hidden`."""
        return self.head(self.hidden(ids, mask, cache))
