"""A small training run for the tests to kill, to interrupt, and to start several times at once.

`python tests/tools/small_run.py FOLDER '{"steps": 5}'`; the options are TrainConfig's and `main`'s.
"""

import gc
import json
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from support import checkpoint
from support.checkpoint import save_weights
from support.gpt import GPTConfig, GPTModel
from support.parallel import processes, shard
from support.shards import Windows
from support.train import TrainConfig, token_loss, train

IDS = torch.arange(2000) * 7 % 31


def data(step: int):
    """Return 6 rows of 8 tokens, of which some, and in the first rows most, are not to learn."""
    inputs, targets = Windows(IDS, 8, 6)(step)
    first = torch.arange(6)[:, None] < 3
    return inputs, targets.masked_fill((targets % 7 == 1) | (first & (targets % 3 > 0)), -100)


def noisy_loss(model, inputs, targets):
    """Return a loss that uses random numbers of NumPy and Python, as changed data would."""
    total, n = token_loss(model, inputs, targets)
    return total * (1 + 0.1 * random.random() + 0.1 * np.random.random()), n


def small_model(dropout: float = 0.0) -> GPTModel:
    torch.manual_seed(1)
    return GPTModel(GPTConfig(31, 8, d_model=16, n_heads=2, n_layers=1, dropout=dropout))


def config(**options) -> TrainConfig:
    return TrainConfig(**{"steps": 20, "batch_size": 6, "warmup": 5, "eval_every": 7} | options)


def kill_at_call(name: str, number: int) -> None:
    """Let this process die when it calls a function of `support.checkpoint` for the n-th time."""
    function, calls = getattr(checkpoint, name), []

    def call(*arguments, **options):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(checkpoint, name, call)


def watch_the_end() -> None:
    """Fail if the processes part while DDP is there: PyTorch's gloo then hangs now and then."""
    destroy = dist.destroy_process_group

    def call():
        assert not any(type(thing) is DistributedDataParallel for thing in gc.get_objects())
        destroy()

    dist.destroy_process_group = call


def main(
    folder: Path,
    dropout=0.0,
    stop_at=None,
    die_in=None,
    env=None,
    double=False,
    sharded=False,
    **options,
) -> None:
    """Train in `folder`, and leave this process's weights there.

    Args:
        stop_at: the step at which to stop as by Ctrl-C.
        die_in: the arguments of `kill_at_call`.
        env: environment variables, such as RANK.
        double: whether to compute in float64, where another order of a sum hardly shows.
        sharded: whether each process keeps a part of the model only.
    """
    os.environ.update({"COURSE_QUIET": "1"} | (env or {}))
    torch.set_num_threads(1)
    watch_the_end()
    if die_in:
        kill_at_call(*die_in)

    def on_step(row):
        if row["step"] == stop_at:
            raise KeyboardInterrupt

    model = small_model(dropout).to(torch.float64 if double else torch.float32)
    loss = noisy_loss if dropout else token_loss
    evaluations = [data(500), data(501), data(502)]
    with processes(torch.device("cpu")):
        if sharded:
            shard(model)
        train(model, data, config(**options), folder, evaluations, 2.5, on_step=on_step, loss=loss)
        save_weights(model, folder / f"final-{os.environ.get('RANK', '0')}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
