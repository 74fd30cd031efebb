"""Four sizes of GPT on the same stories, three times each: the validation loss on the way.

Run `python tests/bench/scaling.py`, half an hour. Writes `data/models/scaling.csv`; chapter 5 draws
it.
"""

import pandas as pd
import torch

from support.data import DATA
from support.gpt import GPTConfig, GPTModel, count_parameters
from support.house import WORK, prepare
from support.shards import Shards, Windows
from support.train import TrainConfig, train

SIZES = [(32, 2), (64, 3), (96, 4), (160, 5)]  # width and blocks
SEEDS = range(3)  # of the first weights and of the order of the stories
CONTEXT, BATCH, STEPS = 128, 8, 700


def main() -> None:
    vocab_size = prepare().vocab_size
    ids, val = (Shards(WORK / split) for split in ("train", "validation"))
    evaluations, logs = [Windows(val, CONTEXT, BATCH)(i) for i in range(12)], []
    # a constant rate, so that every point of a curve is a run of that length
    config = TrainConfig(STEPS, BATCH, 3e-3, min_lr_share=1, warmup=30, eval_every=STEPS // 7)
    for seed in SEEDS:
        for width, n_layers in SIZES:
            torch.manual_seed(seed)
            model = GPTModel(GPTConfig(vocab_size, CONTEXT, width, width // 32, n_layers))
            log = train(model, Windows(ids, CONTEXT, BATCH, seed), config, evaluations=evaluations)
            what = {"parameters": count_parameters(model), "seed": seed}
            logs.append(log.dropna(subset="val_loss").assign(**what))
            print(what, logs[-1].val_loss.iloc[-1], flush=True)
    table = pd.concat(logs)[["parameters", "seed", "tokens", "val_loss"]].round(4)
    table.sort_values(["parameters", "seed"], kind="stable").to_csv(
        DATA / "models" / "scaling.csv", index=False
    )


if __name__ == "__main__":
    main()
