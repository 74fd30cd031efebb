"""From GPT-2 to a llama one change at a time, each model with the same operations to train.

Run `OMP_NUM_THREADS=1 python tests/bench/modern.py`; 50 minutes of one quiet core.
Writes `data/models/modern.csv`, a row for each run, and skips the runs that it has; appendix C
shows it. Part "rate" is the search for a learning rate; in part "path" each model makes one change
more than the one before it. Part "GPT-2" is the first model with the tied head that GPT-2 really
has, and "bias" the one without biases that gets a single one again, in the head.
"""

import time
from itertools import islice

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from support.costs import step_flops
from support.data import DATA
from support.gpt import count_parameters
from support.house import END
from support.llama import LlamaConfig
from support.modern import CHANGES, MixedModel
from support.pretrained import load
from support.shards import Windows
from support.step import TrainConfig, make_optimizer, train_step
from support.storyworld import stories
from support.train import evaluate

PATH = DATA / "models" / "modern.csv"
# SmolLM2 in miniature: a quarter of its width, its 9 and 3 heads, 4 blocks of its 30.
SHAPE = LlamaConfig(2048, 128, 144, 9, 3, n_layers=4, d_ff=384, rope_base=10_000.0)
BATCH, BUDGET, N_STORIES = 8, 2e12, 1500  # rows; operations of each run; no token twice
RATE, HIGHER, SEARCH_SEED = 3e-3, 6e-3, 100  # the rate of all runs, and the one beside it
FARTHER = (1.5e-3, 1.2e-2)  # for the first and the last model only
SEEDS = (0, 1, 2, 3, 4)


def tokens(split: str, n_stories: int) -> list[int]:
    """Return the ids of the first stories of a split, one after the other."""
    _, tokenizer = load("story")
    texts = (story.text for story in islice(stories(0, split), n_stories))
    return [i for text in texts for i in (*tokenizer.encode(text), tokenizer.special_tokens[END])]


def build(changes, seed: int) -> MixedModel:
    """Return a model at its beginning; "head bias" gives it a bias for each token of the head."""
    torch.manual_seed(seed)
    model = MixedModel(SHAPE, [change for change in changes if change != "head bias"])
    if "head bias" in changes:
        model.head.bias = nn.Parameter(torch.zeros(SHAPE.vocab_size))
    return model


def flops(model, ids) -> int:
    """Return the operations of one step, counted."""
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels are not counted
        return sum(step_flops(model, Windows(ids, SHAPE.context_length, BATCH)(0)).values())


def learn(model, ids, lr: float, seed: int, steps: int, until: int | None = None) -> dict:
    """Train up to step `until` of `steps`; return the losses, and seconds of the processor."""
    data = Windows(ids, SHAPE.context_length, BATCH, seed)
    config = TrainConfig(steps, BATCH, lr, warmup=20)
    optimizer, start = make_optimizer(model, config), time.process_time()
    rows = [
        train_step(model, optimizer, data(step), step, config) for step in range(until or steps)
    ]
    return {
        "loss 5": rows[4]["loss"],
        "loss": sum(row["loss"] for row in rows[-20:]) / len(rows[-20:]),
        "seconds": time.process_time() - start,
    }


@torch.no_grad()
def beyond(model, ids) -> dict:
    """Return the loss on tokens 128 to 511 of long windows, and on the same ones in short windows.

    A long window goes beyond the positions of training; in short ones a position never does.
    """
    T = SHAPE.context_length
    batches = [Windows(ids, 4 * T, BATCH)(i) for i in range(4)]
    far = near = 0.0
    for inputs, targets in batches:
        long = F.cross_entropy(model(inputs).mT, targets, reduction="none")  # (B, 4T)
        short = F.cross_entropy(
            model(inputs.reshape(-1, T)).mT, targets.reshape(-1, T), reduction="none"
        )
        far += long[:, T:].mean().item() / len(batches)
        near += short.view_as(long)[:, T:].mean().item() / len(batches)
    return {"far": far, "near": near}


def planned() -> list[dict]:
    """Return what is to be run, in order."""
    path = [CHANGES[:n] for n in range(len(CHANGES) + 1)]
    runs = [("rate", c, lr, SEARCH_SEED) for c in path for lr in (RATE, HIGHER)]
    runs += [("rate", path[-1], HIGHER, 0)]
    runs += [("rate", c, lr, SEARCH_SEED) for c in (path[0], path[-1]) for lr in FARTHER]
    runs += [("path", c, RATE, seed) for seed in SEEDS for c in path]
    runs += [("GPT-2", CHANGES[-1:], RATE, seed) for seed in SEEDS]
    runs += [("bias", (*path[-2], "head bias"), RATE, seed) for seed in SEEDS]
    names = ("part", "changes", "lr", "seed")
    return [
        dict(zip(names, (p, " + ".join(c) or "none", lr, s), strict=True)) for p, c, lr, s in runs
    ]


def changes_of(row: dict) -> tuple[str, ...]:
    """Return the changes that a row names."""
    return () if row["changes"] == "none" else tuple(row["changes"].split(" + "))


def main() -> None:
    ids, validation = tokens("train", N_STORIES), tokens("validation", 400)
    T = SHAPE.context_length
    batches = [Windows(validation, T, BATCH)(i) for i in range(40)]
    runs = pd.read_csv(PATH).to_dict("records") if PATH.exists() else []
    for row in planned():
        if any(row.items() <= done.items() for done in runs):
            continue  # an earlier call came so far
        model = build(changes_of(row), row["seed"])
        steps = round(BUDGET / (per_step := flops(model, ids)))
        found = {"parameters": count_parameters(model), "flops": per_step, "steps": steps}
        found |= learn(model, ids, row["lr"], row["seed"], steps)
        found |= {"val_loss": evaluate(model, batches)}
        if model.pos_emb is None:
            found |= beyond(model, validation)
        runs.append(row | found)
        print(runs[-1], flush=True)
        pd.DataFrame(runs).to_csv(PATH, index=False, float_format="%.5f")


if __name__ == "__main__":
    main()
