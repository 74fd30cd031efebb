"""Models on the way from GPT-2 to a llama: each of six changes is made or not.

With none of them it is a `GPTModel` with a head of its own, with all of them a `LlamaModel`; the
parts are theirs. It is made to be trained and compared, so there is no mask and no cache.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from support.attention import MultiHeadAttention
from support.gpt import FeedForward, LayerNorm, initialize
from support.llama import GroupedQueryAttention, LlamaConfig, RMSNorm, RotaryEmbedding, SwiGLU

CHANGES = ("RMSNorm", "RoPE", "SwiGLU", "grouped queries", "no biases", "tied head")


class MixedBlock(nn.Module):
    """A transformer block in which some of CHANGES are made; the arguments as in `MixedModel`."""

    def __init__(self, config: LlamaConfig, changes: Collection[str]):
        super().__init__()
        C, h = config.d_model, config.n_heads
        self.ln1, self.ln2 = (make_norm(config, changes) for _ in range(2))
        if "RoPE" in changes or "grouped queries" in changes:
            g = config.n_kv_heads if "grouped queries" in changes else h
            self.attention = GroupedQueryAttention(C, h, g)
        else:  # nothing to turn, and nothing to share
            self.attention = MultiHeadAttention(C, h, config.context_length)
        self.ff = SwiGLU(C, config.d_ff) if "SwiGLU" in changes else FeedForward(C)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                zeros = nn.Parameter(torch.zeros(part.out_features))
                part.bias = None if "no biases" in changes else zeros

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Return (B, T, C) for x (B, T, C) and the cosines and sines of its positions."""
        turned = isinstance(self.attention, GroupedQueryAttention)
        x = x + self.attention(self.ln1(x), *([rotation] if turned else []))
        return x + self.ff(self.ln2(x))


class MixedModel(nn.Module):
    """Token ids → a score for each next token, with some of CHANGES made, and no others.

    Args:
        config: the shape with all changes; without SwiGLU the feed-forward layers are 4 C wide,
            and without grouped queries each head has keys and values of its own.
        changes: some of CHANGES.

    Raises ValueError for another change.
    """

    def __init__(self, config: LlamaConfig, changes: Collection[str]):
        super().__init__()
        if unknown := set(changes) - set(CHANGES):
            raise ValueError(f"There is no change {min(unknown)!r}: choose {', '.join(CHANGES)}.")
        self.config, C, V = config, config.d_model, config.vocab_size
        self.tok_emb = nn.Embedding(V, C)
        self.pos_emb = None if "RoPE" in changes else nn.Embedding(config.context_length, C)
        self.rope = RotaryEmbedding(C // config.n_heads, config.rope_base)
        self.blocks = nn.ModuleList(MixedBlock(config, changes) for _ in range(config.n_layers))
        self.ln = make_norm(config, changes)
        self.head = nn.Linear(C, V, bias=False)
        if "tied head" in changes:
            self.head.weight = self.tok_emb.weight
        initialize(self, config.n_layers)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits (B, T, V) for ids (B, T)."""
        positions, x = torch.arange(ids.shape[1], device=ids.device), self.tok_emb(ids)
        cos, sin = self.rope(positions)
        if self.pos_emb is not None:  # learned positions are added, and nothing is turned
            x, cos, sin = x + self.pos_emb(positions), torch.ones_like(cos), torch.zeros_like(sin)
        for block in self.blocks:
            x = block(x, (cos, sin))
        return self.head(self.ln(x))


def make_norm(config: LlamaConfig, changes: Collection[str]) -> nn.Module:
    """Return the norm of a model in which some of CHANGES are made."""
    return (RMSNorm if "RMSNorm" in changes else LayerNorm)(config.d_model, config.eps)
