"""A run of training on disk: written whole or not at all, and continued bit for bit.

The two newest checkpoints stay in the run's folder. Each, like `step-00000200/`, holds the model's
weights, the optimizer's averages, and `state.json`: how far the run is, what it was configured
with, and where each process is in its random numbers.
"""

import csv
import hashlib
import json
import os
import random
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from support.data import write_atomic
from support.parallel import part_of, ranks, whole

COLUMNS = ["step", "tokens", "lr", "loss", "grad_norm"]  # of the log
COLUMNS += ["val_loss", "val_perplexity", "bits_per_byte", "seconds"]
UNFINISHED = ".unfinished-"  # how the name of a folder begins that is being written or deleted


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the file or the field."""


# ---- whole or not at all ------------------------------------------------------------------------


def flush(path: Path) -> None:
    """Return once a file, or a folder's list of names, is on the disk and outlives a power cut."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no such call
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that gets the name `path` once all that was put into it is on disk."""
    unfinished = path.with_name(UNFINISHED + path.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    for file in unfinished.iterdir():
        flush(file)
    flush(unfinished)
    unfinished.rename(path)
    flush(path.parent)


def discard(path: Path) -> None:
    """Delete a folder; if that is cut short, no part of it keeps the name."""
    doomed = path.with_name(UNFINISHED + "old-" + path.name)
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def clean(folder: Path) -> None:
    """Remove what a run that was killed had not finished writing or deleting."""
    for leftover in folder.glob(UNFINISHED + "*"):
        shutil.rmtree(leftover)


# ---- weights ------------------------------------------------------------------------------------


def whole_tensors(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as a file holds them; of a sharded model all processes must call this."""
    return {name: whole(tensor).contiguous() for name, tensor in named.items()}


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what a model's file holds; a weight with two names, a tied one, under its first."""
    first_names = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first_names.setdefault(id(tensor), (name, tensor.detach()))
    return dict(first_names.values())


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write a model's weights as safetensors."""
    save_file(whole_tensors(named_weights(model)), path)


def put_weights(model: nn.Module, saved: dict[str, Tensor], source: str | Path) -> None:
    """Copy `saved` into the model; ties stay. Raises CheckpointError if names or shapes differ."""
    weights = named_weights(model)
    found = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    refuse_others(found, {name: tuple(w.shape) for name, w in weights.items()}, source, "weight")
    for name, weight in weights.items():
        weight.copy_(part_of(saved[name], weight))


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy the weights that `save_weights` wrote into a model of the same shape."""
    put_weights(model, load_file(path), path)


# ---- the optimizer and the random numbers -------------------------------------------------------


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what the optimizer remembers, as `name of the parameter/name of the average`."""
    return {
        f"{name}/{key}": tensor
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }


def put_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Let the optimizer remember what `optimizer_tensors` returned."""
    parameters = dict(model.named_parameters())
    for both, tensor in saved.items():
        name, key = both.rsplit("/", 1)
        if key == "step":  # AdamW has it on the CPU, and whole
            optimizer.state[parameters[name]][key] = tensor.clone()
        else:
            part = part_of(tensor.to(parameters[name].device, copy=True), parameters[name])
            optimizer.state[parameters[name]][key] = part


def random_state() -> dict:
    """Return where the random numbers of PyTorch, NumPy and Python are, as JSON can hold it."""
    kind, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state().tolist(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().tolist()
    return state | {"numpy": [kind, keys.tolist(), *rest]}


def set_random_state(state: dict) -> None:
    """Go back to where `random_state` was called."""
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(state["numpy"])


# ---- the log ------------------------------------------------------------------------------------


def read_log(folder: Path, state: dict | None) -> list[dict]:
    """Return the rows that the checkpoint knows of; a run that was killed may have written more."""
    if state is None or not (folder / "log.csv").exists():
        return []
    with (folder / "log.csv").open(newline="") as file:
        rows = list(islice(csv.DictReader(file), state["step"]))
    return [
        {name: float(cell or "nan") for name, cell in row.items()}
        | {name: int(row[name]) for name in ("step", "tokens")}
        for row in rows
    ]


def write_log(folder: Path, log: list[dict]) -> None:
    """Begin the log with these rows."""
    write_atomic(
        folder / "log.csv", pd.DataFrame(log, columns=COLUMNS).to_csv(index=False).encode()
    )


def append_log(folder: Path, row: dict) -> None:
    """Add a row to the log."""
    pd.DataFrame([row]).to_csv(folder / "log.csv", mode="a", header=False, index=False)


# ---- checkpoints --------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, the oldest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 8))


def prepare(folder: Path, resume: bool) -> None:
    """Make the folder of a run, remove what a killed run left, and all of it for a new run."""
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    if not resume:
        for path in checkpoints(folder):
            discard(path)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(folder: Path, model, optimizer, state: dict, keep: int = 2) -> None:
    """Write `step-…/` for state["step"], and only then delete all but the last `keep`.

    All processes call this, because each has a part of a model that is sharded; the first writes.
    """
    weights = whole_tensors(named_weights(model))
    averages = whole_tensors(optimizer_tensors(model, optimizer))
    if ranks()[0] > 0:
        return
    path = folder / f"step-{state['step']:08d}"
    flush(folder / "log.csv")
    if path.exists():
        discard(path)  # it was damaged, so that the run went back and came here again
    with whole_folder(path) as unfinished:
        save_file(weights, unfinished / "model.safetensors")
        save_file(averages, unfinished / "optimizer.safetensors")
        hashes = {file.name: sha256(file) for file in unfinished.iterdir()}
        (unfinished / "state.json").write_text(json.dumps(state | {"sha256": hashes}))
    kept = [other for other in checkpoints(folder) if other <= path][-keep:]
    for other in set(checkpoints(folder)) - set(kept):
        discard(other)


def read_checkpoint(path: Path) -> tuple[dict, dict, dict]:
    """Return the weights, the optimizer's tensors and the state. Raises CheckpointError."""
    file = path / "state.json"
    try:
        state = json.loads(file.read_bytes())
        for name, hashed in state["sha256"].items():
            file = path / name
            if sha256(file) != hashed:
                raise ValueError("its content is not what was written")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{file} is missing, cut off or changed ({error})") from error
    weights = load_file(path / "model.safetensors")
    return weights, load_file(path / "optimizer.safetensors"), state


def load_checkpoint(folder: Path, model, optimizer, wanted: dict) -> dict | None:
    """Put the newest whole checkpoint into model and optimizer; return its state, or None.

    A damaged one gives a warning, and the one before it is used. Raises CheckpointError if none is
    whole, or if the state differs from `wanted`: {part: {field: value}}.
    """
    problem = ""
    for path in reversed(checkpoints(folder)):
        try:
            weights, averages, state = read_checkpoint(path)
        except CheckpointError as error:
            problem = str(error)
            continue
        if problem:
            warnings.warn(f"{problem}, so {path} is used instead.", stacklevel=2)
        for part, fields in json.loads(json.dumps(wanted)).items():
            refuse_others(state[part], fields, path, f"{part}'s")
        put_weights(model, weights, path)
        put_optimizer(model, optimizer, averages)
        return state
    if problem:
        raise CheckpointError(f"{problem}, and no other is left: to begin anew, delete {folder}.")
    return None


def refuse_others(found: dict, wanted: dict, source, what: str) -> None:
    """Raise CheckpointError for the first name whose values differ."""
    for name in wanted | found:
        if found.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{source} has the {what} {name}={found.get(name)}, but here it is "
                f"{wanted.get(name)}: take the same, or begin in another folder."
            )
