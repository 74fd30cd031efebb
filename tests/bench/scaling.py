"""Four sizes of GPT on the same stories: the validation loss on the way. About ten minutes.

Run `python tests/bench/scaling.py`. Writes `data/models/scaling.csv`; chapter 5 draws it.
"""

import pandas as pd
import torch

from support.data import DATA
from support.gpt import GPTConfig, GPTModel, count_parameters
from support.house import WORK, prepare
from support.shards import Shards, Windows
from support.train import TrainConfig, train

SIZES = [(32, 2), (64, 3), (96, 4), (160, 5)]  # width and blocks
CONTEXT, BATCH, STEPS = 128, 8, 700


def main() -> None:
    vocab_size = prepare().vocab_size
    ids, val = (Windows(Shards(WORK / name), CONTEXT, BATCH) for name in ("train", "validation"))
    evaluations, logs = [val(i) for i in range(12)], []
    for width, n_layers in SIZES:
        torch.manual_seed(0)
        model = GPTModel(GPTConfig(vocab_size, CONTEXT, width, width // 32, n_layers))
        # a constant rate, so that every point of a curve is a run of that length
        config = TrainConfig(STEPS, BATCH, 3e-3, min_lr_share=1, warmup=30, eval_every=STEPS // 7)
        log = train(model, ids, config, evaluations=evaluations).dropna(subset="val_loss")
        logs.append(log[["tokens", "val_loss"]].assign(parameters=count_parameters(model)))
        print(logs[-1].tail(1).to_string(index=False))
    table = pd.concat(logs)[["parameters", "tokens", "val_loss"]].round(4)
    table.to_csv(DATA / "models" / "scaling.csv", index=False)


if __name__ == "__main__":
    main()
