"""The training loop: forward, backward, clip, step, and all that makes a long run safe.

It runs in one process, or under `torchrun` in several that share the work; it can be stopped at any
moment and continued bit for bit. `python -m support.train RECIPE.toml` trains from the command
line.
"""

import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from support.checkpoint import (
    COLUMNS,
    append_log,
    load_checkpoint,
    prepare,
    random_state,
    read_log,
    save_checkpoint,
    set_random_state,
    write_log,
)
from support.generate import evaluating
from support.parallel import all_of, all_sum, processes, ranks
from support.widgets import progress


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


# ---- the parts of a step ------------------------------------------------------------------------


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
    logits = model(inputs).float()  # (B, T, V)
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
    return total, int((targets != -100).sum())


def mixed_precision(device: torch.device):
    """Return a context in which matrices multiply in bfloat16, where the device is made for it."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple], loss: Callable = token_loss) -> float:
    """Return the mean loss of a token in `batches`, in nats; dropout is off meanwhile.

    Of several processes each takes its share, so all of them must call this.
    """
    device, (rank, n_ranks) = next(model.parameters()).device, ranks()
    total, n = 0.0, 0
    with evaluating(model):
        for batch in list(batches)[rank::n_ranks]:
            with mixed_precision(device):
                summed, count = loss(model, *(tensor.to(device) for tensor in batch))
            total, n = total + summed.item(), n + count
    total, n = all_sum(device, total, n)
    if not n:
        raise ValueError("There is nothing to evaluate: no batch has a target other than -100.")
    return total / n


def bits_per_byte(loss: float, n_tokens: float, n_bytes: float) -> float:
    """Return the loss of a token in nats as bits for a byte of text, which compares tokenizers."""
    return loss / math.log(2) * n_tokens / n_bytes


@contextmanager
def held_interrupts() -> Iterator[list]:
    """Let a step end before Ctrl-C counts: yield a list that fills; a second one stops at once."""
    pressed = []

    def hold(*_):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    if threading.current_thread() is not threading.main_thread():
        yield pressed  # only the main thread hears Ctrl-C
        return
    before = signal.signal(signal.SIGINT, hold)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


# ---- the loop -----------------------------------------------------------------------------------


def share(batch, config: TrainConfig, device: torch.device) -> list[tuple[Tensor, ...]]:
    """Return this process's rows of a batch, cut into micro batches."""
    if (rows := len(batch[0])) != config.batch_size:
        raise ValueError(f"The data gave {rows} rows, but batch_size={config.batch_size}.")
    rank, n_ranks = ranks()
    mine = [tensor[rank::n_ranks].to(device) for tensor in batch]
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


def train(
    model: nn.Module,
    data: Callable[[int], tuple[Tensor, ...]],
    config: TrainConfig,
    folder: str | Path | None = None,
    evaluations: Iterable[tuple] = (),
    bytes_per_token: float | None = None,
    sample: Callable[[nn.Module], str] | None = None,
    on_step: Callable[[dict], None] | None = None,
    resume: bool = True,
    loss: Callable = token_loss,
) -> pd.DataFrame:
    """Train `model` where it is, and return the log: a row for each step.

    Under torchrun each process calls this with the same arguments, takes its rows of every batch,
    and ends with the same weights. Ctrl-C ends the run after the step, with a checkpoint.

    Args:
        data: step, from 0 → a batch: tensors of config.batch_size rows, the same at every call.
        folder: where `log.csv` and the checkpoints go; None keeps nothing.
        evaluations: batches for the validation loss, the same ones each time.
        bytes_per_token: of the text in `evaluations`, for bits per byte.
        sample: model → text that is printed; it does not change the run.
        on_step: gets each row of the log, on the first process.
        resume: go on from the newest checkpoint in `folder`; False deletes what is there.
        loss: (model, *batch) → the summed loss of a part of a batch, and how much it counts.

    Raises LossError for a loss or gradient that is not finite, CheckpointError for a checkpoint
    that is damaged or of another run, ValueError for batches that do not fit.
    """
    folder, evaluations = folder and Path(folder), list(evaluations)
    optimizer, device = make_optimizer(model, config), next(model.parameters()).device
    with processes(device) as (rank, n_ranks), held_interrupts() as interrupts:
        if config.batch_size < n_ranks:
            raise ValueError(f"batch_size={config.batch_size} has no row for each of {n_ranks}.")
        set_seed(config.seed + rank)  # each process draws its own dropout masks
        wanted = {"config": asdict(config) | {"processes": n_ranks}, "model": shape_of(model)}
        state, log = None, []
        if folder:
            if rank == 0:
                prepare(folder, resume)
            all_of(None)  # nobody reads before the folder is in order
            state = load_checkpoint(folder, model, optimizer, wanted)
            log = read_log(folder, state)
            if rank == 0:
                write_log(folder, log)
        state = state or {"step": 0, "tokens": 0, "seconds": 0.0}
        if "random" in state:
            set_random_state(state["random"][rank])
        parallel = DistributedDataParallel(model) if n_ranks > 1 else model
        started = time.perf_counter() - state["seconds"]
        tokens, steps = state["tokens"], range(state["step"], config.steps)
        if rank == 0:
            steps = progress(steps, "training", initial=state["step"], total=config.steps)
        model.train()
        for step in steps:
            row = train_step(parallel, optimizer, data(step), step, config, loss)
            done, tokens = step + 1, tokens + row["tokens"]
            row = dict.fromkeys(COLUMNS, math.nan) | row | {"step": done, "tokens": tokens}
            if evaluations and due(config.eval_every, done, config):
                row["val_loss"] = evaluate(model, evaluations, loss)
                row["val_perplexity"] = math.exp(min(row["val_loss"], 700))  # still a number
                if bytes_per_token:
                    row["bits_per_byte"] = bits_per_byte(row["val_loss"], 1, bytes_per_token)
            row["seconds"] = time.perf_counter() - started
            log.append(row)
            if rank == 0:
                steps.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
                if folder:
                    append_log(folder, row)
                if sample and due(config.sample_every, done, config):
                    before = random_state()
                    tqdm.write(sample(model))
                    set_random_state(before)
                try:
                    if on_step:
                        on_step(row)
                except KeyboardInterrupt:
                    interrupts.append(True)
            (stop,) = all_sum(device, len(interrupts))
            if folder and (stop or due(config.save_every, done, config)):
                state = {"step": done, "tokens": tokens, "seconds": row["seconds"]} | wanted
                state["random"] = all_of(random_state())
                if rank == 0:
                    save_checkpoint(folder, model, optimizer, state)
            if stop:
                if rank == 0:
                    kept = f"train again with {folder} to go on" if folder else "nothing was saved"
                    tqdm.write(f"Stopped by Ctrl-C after step {done}: {kept}.")
                break
    return pd.DataFrame(log, columns=COLUMNS)


def due(every: int | None, done: int, config: TrainConfig) -> bool:
    """Return whether what happens `every` so many steps happens now; it does at the end."""
    return done == config.steps or bool(every) and done % every == 0


def set_seed(seed: int) -> None:
    """Start the random numbers of PyTorch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def shape_of(model: nn.Module) -> dict:
    """Return the fields of a model's own configuration, if it has one."""
    config = getattr(model, "config", None)
    return asdict(config) if is_dataclass(config) else {}


if __name__ == "__main__":
    from support.recipe import main  # here, because a recipe needs all of the above

    main()
