"""The training loop: the steps of `support/step.py`, and all that makes a long run safe.

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
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
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
from support.parallel import all_of, all_sum, data_parallel, is_sharded, processes
from support.step import (  # noqa: F401 - the parts of a step can be had from here too
    LossError,
    TrainConfig,
    decayed_and_not,
    learning_rate,
    make_optimizer,
    mixed_precision,
    own_rows,
    share,
    token_loss,
    train_step,
)
from support.widgets import progress


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple], loss: Callable = token_loss) -> float:
    """Return the mean loss of a token in `batches`, in nats; dropout is off meanwhile.

    Of several processes each takes its rows, so all of them must call this.
    """
    device = next(model.parameters()).device
    total, n = 0.0, 0
    with evaluating(model):
        for batch in batches:
            with mixed_precision(device):
                summed, count = loss(model, *own_rows(batch, device))
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
    and ends with the same weights, or its part of them, if the model is `shard(model)`. Ctrl-C
    ends the run after the step, with a checkpoint.

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
        if sample and is_sharded(model):
            raise ValueError(
                "The first process alone cannot use a sharded model: leave out sample."
            )
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
        parallel = data_parallel(model)
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
                save_checkpoint(folder, model, optimizer, state)
            if stop:
                if rank == 0:
                    kept = f"train again with {folder} to go on" if folder else "nothing was saved"
                    tqdm.write(f"Stopped by Ctrl-C after step {done}: {kept}.")
                break
        del parallel  # before its processes part: the other way round PyTorch can wait for ever
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
