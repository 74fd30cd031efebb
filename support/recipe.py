"""A training run described in a file: `python -m support.train RECIPE.toml`."""

import argparse
import os
import sys
import tomllib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch

from support.checkpoint import CheckpointError
from support.gpt import GPTConfig, GPTModel
from support.parallel import processes, shard
from support.shards import Shards, Windows
from support.train import LossError, TrainConfig, train


def filled(kind: type, table: dict, section: str):
    """Return a dataclass from a table of a recipe. Raises ValueError for a wrong or missing key."""
    known = {field.name: field for field in fields(kind)}
    if unknown := [key for key in table if key not in known]:
        raise ValueError(f"[{section}] has no key {unknown[0]!r}, only: {', '.join(known)}.")
    needed = [name for name, field in known.items() if field.default is MISSING]
    if missing := [name for name in needed if name not in table]:
        raise ValueError(f"[{section}] needs the key {missing[0]!r}.")
    return kind(**table)


@dataclass
class DataConfig:
    """Where the tokens are.

    Args:
        train, val: folders of shards, seen from the recipe's own folder.
        val_batches: how many batches of the validation set to evaluate on.
        seed: of the order of the windows.
        end_id: if given, each window begins where a text does; see `Windows`.
    """

    train: str
    val: str
    val_batches: int = 20
    seed: int = 0
    end_id: int | None = None


def from_recipe(path: str | Path, **changes) -> dict:
    """Return the arguments of `train` that a recipe describes: a TOML file with three tables.

    [model] has the fields of GPTConfig, [train] those of TrainConfig, which `changes` overrule, and
    [data] those of DataConfig.
    """
    path = Path(path)
    recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    if wrong := set(recipe) ^ {"model", "train", "data"}:
        raise ValueError(f"{path} needs [model], [train] and [data] only; wrong: [{min(wrong)}].")
    shape = filled(GPTConfig, recipe["model"], "model")
    config = filled(TrainConfig, recipe["train"] | changes, "train")
    data = filled(DataConfig, recipe["data"], "data")
    train_ids, val_ids = (Shards(path.parent / folder) for folder in (data.train, data.val))
    if shape.vocab_size < (largest := max(train_ids.vocab_size, val_ids.vocab_size)):
        raise ValueError(f"vocab_size={shape.vocab_size} is too small: the shards need {largest}.")
    T, B = shape.context_length, config.batch_size
    val = Windows(val_ids, T, B, end_id=data.end_id)
    torch.manual_seed(config.seed)
    return {
        "model": GPTModel(shape),
        "data": Windows(train_ids, T, B, data.seed, data.end_id),
        "config": config,
        "evaluations": [val(i) for i in range(min(data.val_batches, max(len(val) // B, 1)))],
        "bytes_per_token": val_ids.n_bytes / len(val_ids),
    }


def best_device() -> torch.device:
    """Return this process's GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def main() -> None:
    """Train from a recipe, and go on where an earlier run ended."""
    parser = argparse.ArgumentParser(prog="python -m support.train", description=main.__doc__)
    parser.add_argument("recipe", type=Path, help="a TOML file: [model], [train], [data]")
    parser.add_argument("--out", type=Path, help="the run's folder; else the recipe's name")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--shard", action="store_true", help="each process keeps a part only")
    options = parser.parse_args()
    changes = {"steps": options.steps} if options.steps is not None else {}
    try:
        arguments = from_recipe(options.recipe, **changes)
        model = arguments["model"].to(device := best_device())
        with processes(device):
            if options.shard:
                shard(model)
            log = train(**arguments, folder=options.out or options.recipe.with_suffix(""))
    except (CheckpointError, LossError, OSError, ValueError) as error:
        sys.exit(str(error))
    if os.environ.get("RANK", "0") == "0":
        print(log.tail(1).to_string(index=False))
