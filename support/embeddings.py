"""From token ids to vectors: embeddings learned from neighbors, and positions."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoidal_positions(n_positions: int, d_model: int) -> Tensor:
    """Return the fixed position vectors of the first transformer, (n_positions, d_model).

    Dimensions 2i and 2i+1 are the sine and the cosine of position / 10000^(2i / d_model) radians.
    Vaswani et al., Attention Is All You Need, 2017, section 3.5.
    """
    if d_model % 2:
        raise ValueError(f"d_model={d_model} is odd: each sine needs a cosine beside it.")
    position = torch.arange(n_positions, dtype=torch.float32)[:, None]
    speed = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10_000) / d_model))
    angle = position * speed  # (T, C/2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # (T, C)


class InputEmbedding(nn.Module):
    """What enters a GPT: the vector of each token plus the vector of its position.

    Args:
        vocab_size: how many tokens there are.
        context_length: how many positions have a vector.
        d_model: width C of a vector.
        dropout: share of the sum's entries set to 0 during training.
    """

    def __init__(self, vocab_size: int, context_length: int, d_model: int, dropout: float = 0.0):
        super().__init__()
        self.tok_emb = nn.Embedding(vocab_size, d_model)
        self.pos_emb = nn.Embedding(context_length, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return (B, T, C) for ids (B, T) at positions (T,) or (B, T), by default 0, 1, 2, ..."""
        length = ids.shape[-1]
        if length > self.pos_emb.num_embeddings:
            limit = self.pos_emb.num_embeddings
            raise ValueError(f"{length} tokens exceed context_length={limit}: crop the ids.")
        if positions is None:
            positions = torch.arange(length, device=ids.device)
        return self.dropout(self.tok_emb(ids) + self.pos_emb(positions))


class SkipGram(nn.Module):
    """Word vectors that tell a word's neighbors from random words.

    All the random words together weigh as much as `weight` true neighbors.
    Mikolov et al., Distributed Representations of Words and Phrases, 2013, section 2.2.
    """

    def __init__(self, vocab_size: int, d_model: int, weight: float = 5.0):
        super().__init__()
        self.weight = weight
        self.center = nn.Embedding(vocab_size, d_model)
        self.context = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.center.weight, std=d_model**-0.5)
        nn.init.zeros_(self.context.weight)

    def forward(self, centers: Tensor, neighbors: Tensor, randoms: Tensor) -> Tensor:
        """Return the mean loss for center words (B,), true neighbors (B,) and random words (K,)."""
        vectors = self.center(centers)  # (B, C)
        true = (vectors * self.context(neighbors)).sum(-1)  # (B,)
        false = vectors @ self.context(randoms).T  # (B, K)
        return -(F.logsigmoid(true) + self.weight * F.logsigmoid(-false).mean(-1)).mean()


def nearest(
    vectors: Tensor, query: Tensor, k: int = 5, exclude: Sequence[int] = ()
) -> list[tuple[int, float]]:
    """Return the k rows of `vectors` (V, C) most like `query` (C,): (row, cosine), best first."""
    similarity = F.normalize(vectors, dim=-1) @ F.normalize(query, dim=-1)
    similarity[list(exclude)] = -torch.inf
    best = similarity.topk(k)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
