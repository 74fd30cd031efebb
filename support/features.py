"""What frozen blocks compute, computed once: a classifier in two parts, and hidden states on disk.

Blocks that do not learn give the same hidden states in every epoch. So the model is cut: `bottom`
reads each message once, and `top` trains on what it found, as the whole model would.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from support.classify import GPTForClassification, by_length, pad
from support.data import DATA, write_atomic
from support.generate import evaluating
from support.gpt import GPTModel
from support.widgets import progress

FEATURES = DATA / "cache" / "features"


class Given(nn.Module):
    """Stands where the embedding was: what comes in is hidden states already."""

    def forward(self, states: Tensor, positions: Tensor | None = None) -> Tensor:
        return states


def reassemble(model: nn.Module, **parts: nn.Module) -> nn.Module:
    """Return a language model of the same parts, not copied, but for those that are named."""
    with torch.device("meta"):
        whole = type(model)(replace(model.config, n_layers=0))
    for name, part in (dict(model.named_children()) | parts).items():
        setattr(whole, name, part)
    whole.config = replace(model.config, n_layers=len(whole.blocks))
    return whole.train(model.training)


def bottom(model: GPTForClassification, n_blocks: int) -> nn.Module:
    """Return the embedding and the first blocks: ids (B, T) → hidden states (B, T, C)."""
    return reassemble(
        model.backbone,
        blocks=model.backbone.blocks[:n_blocks],
        ln=nn.Identity(),
        head=nn.Identity(),
    )


def top(model: GPTForClassification, n_blocks: int) -> GPTForClassification:
    """Return the rest, which takes what `bottom` gives: hidden states (B, T, C) → scores (B, K).

    The weights are the model's own: what the top learns, the model knows.
    """
    backbone = model.backbone
    embedding = "embed" if isinstance(backbone, GPTModel) else "tok_emb"
    rest = {embedding: Given(), "blocks": backbone.blocks[n_blocks:]}
    with torch.device("meta"):
        upper = type(model)(replace(model.config, n_layers=0), 2, model.pooling)
    upper.backbone = reassemble(backbone, **rest)
    upper.config = upper.backbone.config
    return upper.train(model.training)


# ---- hidden states, computed once ---------------------------------------------------------------


@torch.no_grad()
def hidden_states(model: nn.Module, rows: Sequence) -> list[Tensor]:
    """Return what a `bottom` gives for each row: (T, C) for T ids, or for states (T, C)."""
    states, device = [None] * len(rows), next(model.parameters()).device
    with evaluating(model):
        for batch in progress(list(by_length(rows)), "hidden states"):
            inputs, _ = pad([rows[i] for i in batch])
            for i, x in zip(batch, model(inputs.to(device)).cpu(), strict=True):
                states[i] = x[: len(rows[i])].clone()
    return states


def add_tensor(digest, tensor: Tensor) -> None:
    """Let a hash depend on a tensor: its shape, its kind of numbers, and each of their bytes."""
    digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def fingerprint(model: nn.Module, rows: Sequence) -> str:
    """Return a hash of all that the hidden states depend on: the model, its weights, the rows."""
    digest = hashlib.sha256(f"{type(model).__name__} {model.config}".encode())
    named = [*model.state_dict().items(), *(("row", torch.as_tensor(row)) for row in rows)]
    for name, tensor in named:
        digest.update(f"{name} ".encode())
        add_tensor(digest, tensor)
    return digest.hexdigest()


def cached_states(model: nn.Module, rows: Sequence, folder: Path = FEATURES) -> list[Tensor]:
    """Return `hidden_states`, rounded to float16, from disk if they have been computed before.

    A file is used only if it is whole and was made by this model from these rows.
    """
    key = fingerprint(model, rows)
    path = folder / f"{key[:16]}.safetensors"
    if (flat := read_states(path, key)) is None:
        flat = torch.cat(hidden_states(model, rows)).half()
        if not flat.isfinite().all():
            raise ValueError("A hidden state is too large for float16: use hidden_states instead.")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save({"states": flat}, {"key": key, "sha256": content_hash(flat)}))
    return list(flat.float().split([len(row) for row in rows]))


def read_states(path: Path, key: str) -> Tensor | None:
    """Return the states in a file (all tokens, C), or None if it is not whole, or another's."""
    try:
        with safe_open(path, "pt") as file:
            said, flat = file.metadata(), file.get_tensor("states")
        whole = said == {"key": key, "sha256": content_hash(flat)}
    except (OSError, SafetensorError):
        return None
    return flat if whole else None


def content_hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy()).hexdigest()
