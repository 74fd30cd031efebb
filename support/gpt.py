"""GPT-2: embeddings, a stack of transformer blocks, and a guess at every next token.

Radford et al., Language Models are Unsupervised Multitask Learners, 2019, section 2.3.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.attention import KVCache, MultiHeadAttention
from support.embeddings import InputEmbedding

# Radford et al., 2019, table 2. The names are the exact counts; the table's own were too low.
GPT2_SIZES = {
    "124M": {"d_model": 768, "n_heads": 12, "n_layers": 12},
    "355M": {"d_model": 1024, "n_heads": 16, "n_layers": 24},
    "774M": {"d_model": 1280, "n_heads": 20, "n_layers": 36},
    "1558M": {"d_model": 1600, "n_heads": 25, "n_layers": 48},
}


@dataclass
class GPTConfig:
    """The shape of a GPT; the defaults are those of the smallest GPT-2.

    Args:
        vocab_size: number of tokens V.
        context_length: the most tokens it sees at once.
        d_model: width C of the vector of each token.
        n_heads: attention heads in each block.
        n_layers: blocks.
        dropout: share of values set to 0 during training; GPT-2 was trained with 0.1.
        qkv_bias: whether queries, keys and values have a bias.
        tie_weights: whether the head is the token embedding, turned around.
    """

    vocab_size: int = 50_257
    context_length: int = 1024
    d_model: int = 768
    n_heads: int = 12
    n_layers: int = 12
    dropout: float = 0.0
    qkv_bias: bool = True
    tie_weights: bool = True

    @classmethod
    def gpt2(cls, size: str = "124M") -> "GPTConfig":
        """Return the configuration of a GPT-2 as published: 124M, 355M, 774M or 1558M."""
        if size not in GPT2_SIZES:
            raise ValueError(f"There is no GPT-2 of size {size!r}: choose {', '.join(GPT2_SIZES)}.")
        return cls(**GPT2_SIZES[size])

    def n_parameters(self) -> int:
        """Return how many parameters the model has, without building it."""
        C = self.d_model
        embeddings = (self.vocab_size + self.context_length) * C
        attention = 4 * C * C + C + (3 * C if self.qkv_bias else 0)  # W_q, W_k, W_v, W_o; biases
        feed_forward = 8 * C * C + 5 * C  # from C to 4C and back; biases
        layer_norm = 2 * C
        block = attention + feed_forward + 2 * layer_norm
        head = 0 if self.tie_weights else self.vocab_size * C
        return embeddings + self.n_layers * block + layer_norm + head


class LayerNorm(nn.Module):
    """Give each token's vector mean 0 and variance 1, then a learned scale and shift.

    (x - mean) / √(variance + eps) · weight + bias, as one fast kernel.
    Ba et al., Layer Normalization, 2016, section 3.
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., C) for x (..., C)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class GELU(nn.Module):
    """The smooth ReLU of GPT-2: 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), as one fast kernel.

    Hendrycks and Gimpel, Gaussian Error Linear Units, 2016, section 2.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        return F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, for each token by itself.

    Vaswani et al., Attention Is All You Need, 2017, section 3.3.
    """

    def __init__(self, d_model: int):
        super().__init__()
        self.up = nn.Linear(d_model, 4 * d_model)
        self.gelu = GELU()
        self.down = nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., C) for x (..., C)."""
        return self.down(self.gelu(self.up(x)))


class TransformerBlock(nn.Module):
    """Attention, then the feed-forward layers; each reads a normalized x and adds to x itself.

    Radford et al., 2019, section 2.3 (the LayerNorm comes first).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln1 = LayerNorm(config.d_model)
        self.attention = MultiHeadAttention(
            config.d_model, config.n_heads, config.context_length, config.dropout, config.qkv_bias
        )
        self.ln2 = LayerNorm(config.d_model)
        self.ff = FeedForward(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None):
        """Return (B, T, C) for x (B, T, C); mask and cache as in `MultiHeadAttention`."""
        x = x + self.dropout(self.attention(self.ln1(x), mask, cache))
        return x + self.dropout(self.ff(self.ln2(x)))


class GPTModel(nn.Module):
    """A GPT: tokens and positions → blocks → LayerNorm → a score for each possible next token.

    Radford et al., 2019, section 2.3.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embed = InputEmbedding(
            config.vocab_size, config.context_length, config.d_model, config.dropout
        )
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.ln = LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_weights:
            self.head.weight = self.tok_emb.weight
        initialize(self, config.n_layers)

    @property
    def tok_emb(self) -> nn.Embedding:
        """The token embedding, (V, C)."""
        return self.embed.tok_emb

    def hidden(
        self, ids: Tensor, mask: Tensor | None = None, cache: list[KVCache] | None = None
    ) -> Tensor:
        """Return each token's vector after the last LayerNorm, (B, T, C), for ids (B, T).

        Args:
            mask: (B, S), True for a real token and False for padding, on either side. Padding
                takes up no position, so a row gives what it gives alone. With padding on the right
                the mask may be left out, because no token looks to its right.
            cache: a `KVCache` for each block, with the tokens before `ids`; S counts these too.

        Raises ValueError for more than context_length tokens.
        """
        start = cache[0].length if cache else 0
        end = start + ids.shape[1]
        if end > self.config.context_length:
            limit = self.config.context_length
            raise ValueError(f"{end} tokens exceed context_length={limit}: crop the ids.")
        if mask is None:
            positions = torch.arange(start, end, device=ids.device)  # (T,)
        else:  # a row's first real token stands at 0
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, start:]  # (B, T)
        x = self.embed(ids, positions)  # (B, T, C)
        for block, kv in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x = block(x, mask, kv)
        return self.ln(x)

    def forward(self, ids: Tensor, mask=None, cache: list[KVCache] | None = None) -> Tensor:
        """Return the scores (logits) of every next token, (B, T, V); the rest as in `hidden`."""
        return self.head(self.hidden(ids, mask, cache))


def initialize(model: nn.Module, n_layers: int) -> None:
    """Draw GPT-2's first weights: normal with deviation 0.02, biases 0.

    The layers that add to the residual stream, two in each block, start smaller by √(2 n_layers):
    otherwise the stream's variance would grow with every block. Radford et al., 2019, section 2.3.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("W_o.weight", "down.weight")):
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layers))
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers a model learns; a tied weight counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_bytes(model: nn.Module) -> int:
    """Return the memory of a model's parameters in bytes; a tied weight counts once."""
    return sum(parameter.nbytes for parameter in model.parameters())
