"""LoRA beside full fine-tuning, the last block and the head alone, on two tasks, with three seeds.

Run `python tests/bench/lora.py`; about ten minutes on one quiet core. Writes
`data/models/lora.csv`, a row for each run; appendix A shows it. Each method has the learning rate,
of those tried, that is best on validation rows with the first seed.
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
from support.mirrored import ANIMALS, who_did_what
from support.pretrained import load
from support.step import make_optimizer, token_loss, train_step
from support.tasks import requests
from support.train import TrainConfig, evaluate, set_seed

SEEDS = (0, 1, 2)
TARGETS = {"LoRA, attention": ["attention.*"], "LoRA": ["attention.*", "ff.*"]}
RATES = {
    "who": {
        "head": (1e-2, 3e-2),
        "last block": (1e-3, 3e-3),
        "LoRA, attention": (5e-3, 1e-2),
        "LoRA": (3e-3, 5e-3),
        "full": (1e-3, 2e-3),
    },
    "continue": {"last block": (1e-3, 3e-3), "LoRA": (5e-3, 1e-2), "full": (5e-4, 1e-3)},
}
RANKS = (1, 2, 4, 16)  # of LoRA on the first task, besides 8
STORY, TOKENIZER = load("story")
SENTENCES = {
    "train": who_did_what(2400, 1),
    "validation": who_did_what(200, 3),
    "test": who_did_what(400, 2, "test"),
    "new wordings": who_did_what(400, 2, "new wordings"),
}


def adapt(model, method: str, rank: int):
    """Let learn what the method says; return the model."""
    if method.startswith("LoRA"):
        return add_adapter(model, TARGETS[method], rank, 2 * rank)
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
    start = time.perf_counter()
    for step in range(config.steps):
        train_step(model, optimizer, data(step), step, config, loss)
    seconds = (time.perf_counter() - start) / config.steps
    model.eval()
    return {
        "learning": count_learning(model),
        "adamw_bytes": state_bytes(optimizer),
        "seconds": seconds,
    }


def who(method: str, lr: float, seed: int, rank: int = 8) -> dict:
    """Return the accuracies after 60 steps of 32 sentences."""
    torch.manual_seed(seed)
    model = GPTForClassification.from_pretrained(STORY, len(ANIMALS))
    if method in ("head", "last block"):
        freeze(model, int(method != "head"))
    else:
        adapt(model, method, rank)
    model.backbone.head.requires_grad_(True)
    rows = {part: encode(texts, TOKENIZER) for part, (texts, _) in SENTENCES.items()}
    batches = Batches(rows["train"], SENTENCES["train"][1], 32, seed)
    config = TrainConfig(60, 32, lr, warmup=5, weight_decay=0.01, seed=seed)
    found = learn(model, batches, config, class_loss)
    for part in ("validation", "test", "new wordings"):
        right = predict(model, rows[part]).argmax(dim=1) == torch.tensor(SENTENCES[part][1])
        found[part] = right.float().mean().item()
    return found


def tell(method: str, lr: float, seed: int, rank: int = 8) -> dict:
    """Return how well a story is continued when asked, after 20 steps of 4 requests."""
    torch.manual_seed(seed)
    model = adapt(copy.deepcopy(STORY), method, rank)
    made = {
        split: list(islice(requests(1, name, ["continue"]), n))
        for split, name, n in (
            ("train", "train", 100),
            ("validation", "validation", 24),
            ("test", "test", 24),
        )
    }
    rows = {
        split: [to_row(TOKENIZER, r.prompt, r.answer) for r in found]
        for split, found in made.items()
    }
    fits = STORY.config.context_length
    batches = RowBatches([row for row in rows["train"] if len(row.ids) <= fits], 4, seed=seed)
    config = TrainConfig(20, 4, lr, warmup=3, weight_decay=0.01, seed=seed)
    found = learn(model, batches, config, token_loss)
    for split in ("validation", "test"):
        fitting = [row for row in rows[split] if len(row.ids) <= fits]
        parts = [with_targets(fitting[i : i + 4]) for i in range(0, len(fitting), 4)]
        found[f"{split} loss"] = evaluate(model, parts)
    shares, _ = follow(model, TOKENIZER, made["test"], max_new_tokens=120, temperature=0)
    return found | {"test": shares["mean"]}


def main() -> None:
    runs = []

    def run(task, function, method, lr, seed, rank=8):
        row = {"task": task, "method": method, "rank": rank, "lr": lr, "seed": seed}
        runs.append(row | function(method, lr, seed, rank))
        print(runs[-1], flush=True)
        pd.DataFrame(runs).to_csv(DATA / "models" / "lora.csv", index=False, float_format="%.4f")
        return runs[-1]

    for task, function, judge in (
        ("who", who, lambda row: row["validation"]),
        ("continue", tell, lambda row: -row["validation loss"]),
    ):
        best = {}
        for method, rates in RATES[task].items():
            tried = [run(task, function, method, lr, SEEDS[0]) for lr in rates]
            best[method] = max(tried, key=judge)["lr"]
            for seed in SEEDS[1:]:
                run(task, function, method, best[method], seed)
        if task == "who":
            for rank in RANKS:
                for seed in SEEDS:
                    run(task, function, "LoRA", best["LoRA"], seed, rank)


if __name__ == "__main__":
    main()
