"""A language model turned into a classifier: its head scores classes instead of tokens.

B messages of T tokens, C the width, K classes. Padding is on the right: there causal attention
never looks at it, and all that is left to do is to read the answer at the last *real* token.
"""

from collections.abc import Callable, Iterator, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.generate import evaluating
from support.gpt import GPTConfig, GPTModel
from support.llama import LlamaConfig, LlamaModel

POOLINGS = ("last", "mean", "first")


class GPTForClassification(nn.Module):
    """A GPT or llama with a new head: token ids (B, T) → a score for each class (B, K).

    Radford et al., Improving Language Understanding by Generative Pre-Training, 2018, section 3.2.

    Args:
        config: of the language model; its kind decides which one is built, with random weights.
        num_classes: K, at least 2.
        pooling: whose answer counts: the "last" real token's, the "mean" over all real tokens, or
            the "first" token's, which has seen nothing but itself.
    """

    def __init__(self, config: GPTConfig | LlamaConfig, num_classes: int, pooling: str = "last"):
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes} must be at least 2.")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r} must be one of {', '.join(POOLINGS)}.")
        self.config, self.pooling = config, pooling
        self.backbone = (LlamaModel if isinstance(config, LlamaConfig) else GPTModel)(config)
        self.backbone.head = nn.Linear(config.d_model, num_classes)

    @classmethod
    def from_pretrained(cls, model: nn.Module, num_classes: int, pooling: str = "last"):
        """Return a classifier with a copy of a language model's weights, all but its head's."""
        with torch.device("meta"):  # shapes without memory
            classifier = cls(model.config, num_classes, pooling)
        head = nn.Linear(model.config.d_model, num_classes, device=model.tok_emb.weight.device)
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        weights |= head.state_dict(prefix="head.")
        classifier.backbone.load_state_dict(weights, assign=True)
        return classifier.eval()

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the scores (logits) of the classes, (B, K).

        Args:
            inputs: token ids (B, T); of what `top` returns, hidden states (B, T, C).
            mask: (B, T), True for a real token and False for padding; None if all are real.

        Raises ValueError for a row without a real token, or with padding on its left.
        """
        if mask is None:
            mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        mask = mask.bool()
        if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError("Each row needs its real tokens first, at least one, then padding.")
        scores = self.backbone(inputs)  # (B, T, K), as if each token were asked
        if self.pooling == "mean":
            return (scores * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        at = mask.sum(dim=1) - 1 if self.pooling == "last" else 0
        return scores[torch.arange(len(scores), device=scores.device), at]


# ---- which weights learn ------------------------------------------------------------------------


def freeze(model: GPTForClassification, learning_blocks: int | None) -> None:
    """Let the head learn, and with any blocks, the last ones, also the last norm; None for all."""
    model.requires_grad_(learning_blocks is None)
    backbone = model.backbone
    if learning_blocks:
        for part in (backbone.ln, *backbone.blocks[-learning_blocks:]):
            part.requires_grad_(True)
    backbone.head.requires_grad_(True)


def layers(model: GPTForClassification) -> pd.DataFrame:
    """Return a row for each layer from the input to the output: its parameters, and how many learn.

    The columns are `parameters` and `learning`, the index is the layer's name.
    """
    parts = dict(model.backbone.named_children())
    blocks = {f"block {i}": block for i, block in enumerate(parts.pop("blocks"), 1)}
    ends = {name: parts.pop(name) for name in ("ln", "head")}
    rows = {}
    for name, part in (parts | blocks | ends).items():
        if sizes := [(p.numel(), p.requires_grad) for p in part.parameters()]:
            all_of_them, learning = (
                sum(n for n, _ in sizes),
                sum(n for n, learns in sizes if learns),
            )
            rows[name] = {"parameters": all_of_them, "learning": learning}
    return pd.DataFrame(rows).T


# ---- batches ------------------------------------------------------------------------------------


def encode(texts: Sequence[str], tokenizer, max_tokens: int | None = None) -> list[list[int]]:
    """Return the first ids of each text; an empty one is read as a space, to have a last token."""
    return [tokenizer.encode(text or " ")[:max_tokens] for text in texts]


def pad(rows: Sequence) -> tuple[Tensor, Tensor]:
    """Return rows of ids (T,) or of states (T, C) as one tensor with 0 on the right, and a mask."""
    rows = [torch.as_tensor(row) for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T) or (B, T, C)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


class Batches:
    """Batches (inputs, mask, labels) to train on: `batches(step)`, every row once an epoch.

    A batch is drawn from (seed, epoch) and depends on the step alone. What does not fill a batch at
    the end of an epoch waits for the next one. Within a batch the longest row comes first.
    """

    def __init__(self, rows: Sequence, labels: Sequence[int], batch_size: int, seed: int = 0):
        if not 1 <= batch_size <= len(rows) or len(rows) != len(labels):
            raise ValueError(
                f"{len(rows)} rows, {len(labels)} labels and batch_size={batch_size}: give a label "
                "for each row, and at most as many rows to a batch as there are."
            )
        self.rows, self.labels = rows, torch.as_tensor(labels)
        self.batch_size, self.seed = batch_size, seed

    def __len__(self):
        """Return the number of batches in an epoch."""
        return len(self.rows) // self.batch_size

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        epoch, i = divmod(step, len(self))
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        chosen = torch.randperm(len(self.rows), generator=draws)[i * self.batch_size :]
        chosen = sorted(chosen[: self.batch_size].tolist(), key=lambda i: -len(self.rows[i]))
        return *pad([self.rows[i] for i in chosen]), self.labels[chosen]


def class_loss(model, inputs, mask, labels, weights=None) -> tuple[Tensor, float]:
    """Return the cross-entropy summed over the rows, in nats, and their number, for `train`.

    Args:
        inputs, mask, labels: (B, T) or (B, T, C), (B, T), (B,).
        weights: (K,), how much a row of each class counts; then it is not the number of the rows
            that is returned, but the sum of their weights.
    """
    longest = int(mask.sum(dim=1).max())  # of a micro batch: the rest of it is padding
    scores = model(inputs[:, :longest], mask[:, :longest])
    total = F.cross_entropy(scores, labels, weights, reduction="sum")
    return total, len(labels) if weights is None else weights[labels].sum().item()


# ---- answers ------------------------------------------------------------------------------------


def by_length(rows: Sequence, max_tokens: int = 1024) -> Iterator[list[int]]:
    """Yield the numbers of the rows in batches of similar length, padded to at most max_tokens."""
    batch = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if batch and (len(batch) + 1) * len(rows[i]) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def predict(model: GPTForClassification, rows: Sequence) -> Tensor:
    """Return the probability of each class for each row, (N, K)."""
    probs, device = [None] * len(rows), model.backbone.head.weight.device
    with evaluating(model):
        for batch in by_length(rows):
            inputs, mask = (x.to(device) for x in pad([rows[i] for i in batch]))
            for i, p in zip(batch, model(inputs, mask).softmax(dim=-1).cpu(), strict=True):
                probs[i] = p
    return torch.stack(probs)


def occlusion(text: str, score: Callable[[list[str]], Sequence[float]]) -> list[tuple[str, float]]:
    """Return each word of a text, and by how much its score falls where this word is left out.

    Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, 2014, section 4.2.
    """
    words = text.split()
    without = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
    whole, *others = map(float, score([text, *without]))
    return [(word, whole - other) for word, other in zip(words, others, strict=True)]
