"""What the first weights decide: the loss on names that come again, while a model trains.

Run `python tests/bench/first_weights.py`. A model of the house model's size starts with GPT-2's
first weights, and with those of `begin_by_copying`. Writes `data/models/first_weights.csv`; chapter
5 draws it.
"""

import pandas as pd
import torch
from torch import Tensor

from support.data import DATA
from support.gpt import GPTConfig, GPTModel
from support.house import END, WORK, begin_by_copying, prepare
from support.shards import Shards, Windows
from support.storyworld import vocabulary
from support.train import TrainConfig, train

SEEDS = range(3)  # of the first weights and of the order of the stories
CONTEXT, BATCH, STEPS = 128, 8, 1200


def only_names_again(inputs: Tensor, targets: Tensor, names: set, end_id: int) -> tuple:
    """Return a batch of which only the names count that its story has mentioned before."""
    kept = torch.full_like(targets, -100)
    for b, (row, following) in enumerate(zip(inputs.tolist(), targets.tolist(), strict=True)):
        told = set()
        for t, (now, next_id) in enumerate(zip(row, following, strict=True)):
            told = set() if now == end_id else told | {now}
            if next_id in names & told:
                kept[b, t] = next_id
    return inputs, kept


def main() -> None:
    tokenizer = prepare()
    end_id = tokenizer.special_tokens[END]
    names = {
        tokenizer.encode(" " + name)[0]
        for group in vocabulary()["names"].values()
        for name in group
    }
    ids, val = (Shards(WORK / split) for split in ("train", "validation"))
    batches = (Windows(val, CONTEXT, 32, end_id=end_id)(i) for i in range(6))
    evaluations = [only_names_again(*batch, names, end_id) for batch in batches]
    shape = GPTConfig(tokenizer.vocab_size, CONTEXT, d_model=192, n_heads=6, n_layers=6)
    config = TrainConfig(STEPS, BATCH, 2e-3, min_lr_share=1, warmup=100, eval_every=STEPS // 12)
    logs = []
    for seed in SEEDS:
        for start, change in (("GPT-2", lambda model: None), ("copying", begin_by_copying)):
            torch.manual_seed(seed)
            change(model := GPTModel(shape))
            data = Windows(ids, CONTEXT, BATCH, seed, end_id)
            log = train(model, data, config, evaluations=evaluations)
            logs.append(log.dropna(subset="val_loss").assign(start=start, seed=seed))
            print(start, seed, logs[-1].val_loss.iloc[-1], flush=True)
    table = pd.concat(logs).rename(columns={"val_loss": "loss_on_names"})
    columns = ["start", "seed", "tokens", "loss", "loss_on_names"]
    table[columns].round(4).to_csv(DATA / "models" / "first_weights.csv", index=False)


if __name__ == "__main__":
    main()
