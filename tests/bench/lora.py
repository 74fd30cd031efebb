"""LoRA beside full fine-tuning, the last block and the head alone, on two tasks, with three seeds.

Run `OMP_NUM_THREADS=1 python tests/bench/lora.py`; a quarter of an hour on one quiet core. Writes
`data/models/lora.csv`, a row for each run, and skips the runs that it has; appendix A shows it.
"""

import copy
import time
from itertools import islice

import pandas as pd
import torch

from support.classify import Batches, GPTForClassification, class_loss, encode, freeze, predict
from support.costs import state_bytes
from support.data import DATA
from support.instruct import Batches as RowBatches
from support.instruct import follow, to_row, with_targets
from support.lora import add_adapter, count_learning
from support.pretrained import load
from support.step import make_optimizer, token_loss, train_step
from support.tasks import requests
from support.train import TrainConfig, evaluate, set_seed
from support.who import animals, who_did_it

SEEDS = (0, 1, 2)
TARGETS = ["attention.*", "ff.*"]
# For "who" found beforehand, on other sentences with the first seed; for "continue" not searched.
RATES = {
    "who": {"LoRA": 5e-3, "full": 1e-3, "last block": 3e-3, "head": 3e-2},
    "continue": {"LoRA": 1e-2, "full": 1e-3, "last block": 3e-3},
}
RANKS = (1, 32)  # of LoRA on the first task, besides 8
STORY, TOKENIZER = load("story")
TOLD = who_did_it()
TESTS = {"test": "new pairs", "new wordings": "new pairs, new wordings"}  # column: what it is of


def adapt(model, method: str, rank: int):
    """Let learn what the method says; return the model."""
    if method == "LoRA":
        return add_adapter(model, TARGETS, rank, 2 * rank)
    if method == "last block":
        model.requires_grad_(False)
        for part in (model.blocks[-1], model.ln):
            part.requires_grad_(True)
    return model


def learn(model, data, config, loss) -> dict:
    """Train; return what it cost."""
    set_seed(config.seed)
    optimizer = make_optimizer(model, config)
    model.train()
    start = time.process_time()  # others who use the machine do not count
    for step in range(config.steps):
        train_step(model, optimizer, data(step), step, config, loss)
    seconds = (time.process_time() - start) / config.steps
    model.eval()
    return {
        "learning": count_learning(model),
        "adamw_bytes": state_bytes(optimizer),
        "seconds": seconds,
    }


def who(method: str, lr: float, seed: int, rank: int = 8) -> dict:
    """Return the accuracies after 200 steps of 16 sentences, as in chapter 6."""
    torch.manual_seed(seed)
    model = GPTForClassification.from_pretrained(STORY, len(animals()))
    if method in ("head", "last block"):
        freeze(model, int(method != "head"))
    else:
        adapt(model, method, rank)
    model.backbone.head.requires_grad_(True)
    rows = {part: encode([text for text, _ in made], TOKENIZER) for part, made in TOLD.items()}
    labels = {part: torch.tensor([who for _, who in made]) for part, made in TOLD.items()}
    batches = Batches(rows["training"], labels["training"], 16, seed)
    config = TrainConfig(200, 16, lr, warmup=15, weight_decay=0.01, seed=seed)
    found = learn(model, batches, config, class_loss)
    for column, part in TESTS.items():
        right = predict(model, rows[part]).argmax(dim=1) == labels[part]
        found[column] = right.float().mean().item()
    return found


def tell(method: str, lr: float, seed: int, rank: int = 8) -> dict:
    """Return how well a story is continued when asked, after 16 steps of 4 requests."""
    torch.manual_seed(seed)
    model = adapt(copy.deepcopy(STORY), method, rank)
    made = {
        split: list(islice(requests(1, split, ["continue"]), n))
        for split, n in (("train", 80), ("test", 64))
    }
    rows = {
        split: [to_row(TOKENIZER, r.prompt, r.answer) for r in found]
        for split, found in made.items()
    }
    fits = STORY.config.context_length
    rows = {split: [row for row in found if len(row.ids) <= fits] for split, found in rows.items()}
    config = TrainConfig(16, 4, lr, warmup=3, weight_decay=0.01, seed=seed)
    found = learn(model, RowBatches(rows["train"], 4, seed=seed), config, token_loss)
    parts = [with_targets(rows["test"][i : i + 4]) for i in range(0, len(rows["test"]), 4)]
    shares, _ = follow(model, TOKENIZER, made["test"], max_new_tokens=120, temperature=0)
    return found | {"test loss": evaluate(model, parts), "test": shares["mean"]}


def main() -> None:
    path = DATA / "models" / "lora.csv"
    runs = pd.read_csv(path).to_dict("records") if path.exists() else []
    planned = [("who", method, 8, seed) for method in RATES["who"] for seed in SEEDS]
    planned += [("who", "LoRA", rank, seed) for rank in RANKS for seed in SEEDS]
    planned += [("continue", method, 8, seed) for seed in SEEDS for method in RATES["continue"]]
    for task, method, rank, seed in planned:
        lr = RATES[task][method]
        row = {"task": task, "method": method, "rank": rank, "lr": lr, "seed": seed}
        if any(row.items() <= done.items() for done in runs):
            continue  # an earlier call came so far
        runs.append(row | {"who": who, "continue": tell}[task](method, lr, seed, rank))
        print(runs[-1], flush=True)
        pd.DataFrame(runs).to_csv(path, index=False, float_format="%.4f")


if __name__ == "__main__":
    main()
