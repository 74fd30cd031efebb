"""One step of training, forward, backward, clip, step, and all that decides about it."""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.parallel import all_sum, ranks


class LossError(FloatingPointError):
    """The loss or the gradient is no longer a finite number."""


@dataclass
class TrainConfig:
    """How to train.

    Args:
        steps: how often the weights change.
        batch_size: rows B of a step, of all processes together.
        lr: the highest learning rate.
        min_lr_share: the share of it that is left at the end; 1 keeps it constant.
        warmup: steps in which the learning rate rises to lr.
        decay: how it falls then: "cosine", or "trapezoid": not until the last decay_share of steps.
        weight_decay: how strongly AdamW pulls matrices to 0.
        betas: AdamW's memory of the gradients and of their squares.
        clip: a longer gradient is cut to this length; None leaves it.
        micro_batch: rows that a process computes at once, to save memory; None for all.
        eval_every, save_every, sample_every: steps between; None for at the end only.
        seed: of dropout; each process adds its rank.
    """

    steps: int
    batch_size: int
    lr: float = 1e-3
    min_lr_share: float = 0.1
    warmup: int = 0
    decay: str = "cosine"
    decay_share: float = 0.2
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0
    micro_batch: int | None = None
    eval_every: int | None = None
    save_every: int | None = None
    sample_every: int | None = None
    seed: int = 0

    def __post_init__(self):
        counts = ("steps", "batch_size", "micro_batch", "eval_every", "save_every", "sample_every")
        for name in counts:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup={self.warmup} must be from 0 to steps={self.steps}.")
        if self.decay not in ("cosine", "trapezoid"):
            raise ValueError(f'decay={self.decay!r} must be "cosine" or "trapezoid".')


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step, counted from 0: it rises in a line, then falls.

    Cosine: Loshchilov and Hutter, SGDR, 2017, section 3. Trapezoid: Zhai et al., Scaling Vision
    Transformers, 2022, section 3.5.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)  # 0 to 1
    if config.decay == "cosine":
        height = (1 + math.cos(math.pi * done)) / 2
    else:
        height = min(1, (config.steps - step) / max(config.steps * config.decay_share, 1))
    return config.lr * (config.min_lr_share + (1 - config.min_lr_share) * height)


def decayed_and_not(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters that weight decay pulls to 0, and the others: biases and norms."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [p for p in learned if p.dim() >= 2], [p for p in learned if p.dim() < 2]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW for a model. Loshchilov and Hutter, Decoupled Weight Decay, 2019, section 2."""
    decayed, others = decayed_and_not(model)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}]
    groups += [{"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Return the cross-entropy summed over the targets, in nats, and their number.

    A sum, because the parts of a batch may differ in the number of targets. A target of -100 does
    not count. Shapes: inputs (B, T), targets (B, T), or (B,) for a model that returns (B, V).
    """
    logits = model(inputs)  # (B, T, V)
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
    return total, int((targets != -100).sum())


def mixed_precision(device: torch.device):
    """Return a context in which matrices multiply in bfloat16, where the device is made for it."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


def own_rows(batch, device: torch.device) -> list[Tensor]:
    """Return this process's rows of a batch: of n processes each takes every n-th."""
    rank, n_ranks = ranks()
    if (rows := len(batch[0])) < n_ranks:
        raise ValueError(f"A batch of {rows} rows has no row for each of {n_ranks} processes.")
    return [tensor[rank::n_ranks].to(device) for tensor in batch]


def share(batch, config: TrainConfig, device: torch.device) -> list[tuple[Tensor, ...]]:
    """Return this process's rows of a batch, cut into micro batches."""
    if (rows := len(batch[0])) != config.batch_size:
        raise ValueError(f"The data gave {rows} rows, but batch_size={config.batch_size}.")
    mine = own_rows(batch, device)
    parts = [tensor.split(config.micro_batch or config.batch_size) for tensor in mine]
    return list(zip(*parts, strict=True))


def train_step(model, optimizer, batch, step, config, loss=token_loss) -> dict:
    """Let a model learn from one batch; return what the log says about it.

    The gradient is that of the mean over all the batch's targets, whatever part of them a micro
    batch or a process has: each adds the gradient of its sum, and their number divides at the end.
    Raises LossError, and leaves the weights as they are, where that is not finite.
    """
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    n_ranks, device = ranks()[1], learned[0].device
    lr = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    total, n = 0.0, 0
    parts = share(batch, config, device)
    for i, part in enumerate(parts, 1):
        alone = n_ranks == 1 or i == len(parts)  # the last backward exchanges the gradients
        with nullcontext() if alone else model.no_sync():
            with mixed_precision(device):
                summed, count = loss(model, *part)  # forward
            summed.backward()  # backward
        total, n = total + summed.item(), n + count
    total, n = all_sum(device, total, n)
    if not n:
        raise ValueError(f"Step {step} has nothing to learn from: all its targets are -100.")
    for parameter in learned:
        if parameter.grad is not None:
            parameter.grad *= n_ranks / n  # the mean over processes → the mean over targets
    norm = nn.utils.clip_grad_norm_(learned, config.clip or math.inf).item()  # clip
    if not math.isfinite(total) or not math.isfinite(norm):
        raise LossError(
            f"At step {step}, with lr={lr:g}, the loss is {total / n} and the length of the "
            f"gradient {norm}: try a lower lr or a longer warmup, and look for wrong values in "
            "the data; the last checkpoint is still good."
        )
    optimizer.step()  # step
    return {"tokens": int(n), "lr": lr, "loss": total / n, "grad_norm": norm}
