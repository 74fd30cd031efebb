"""How fast may a pretrained model learn? Fine-tuning all of the house model at several rates.

Run `python tests/bench/rates.py`, about ten minutes on one core. It writes
`data/models/rates.csv`, which chapter 6 shows: what was learned of "who did what to whom", and what
was forgotten of stories.
"""

import numpy as np
import pandas as pd
import torch

from support.classify import Batches, GPTForClassification, class_loss, encode, predict
from support.data import DATA
from support.metrics import accuracy
from support.pretrained import load
from support.train import TrainConfig, train
from support.who import animals, loss_with_old_head, story_batches, who_did_it

RATES, SEEDS, STEPS, BATCH = (1e-5, 1e-4, 1e-3, 1e-2), (0, 1, 2), 200, 16


def main() -> None:
    story, tokenizer = load("story")
    told = who_did_it()
    ids = {part: encode([text for text, _ in made], tokenizer) for part, made in told.items()}
    whos = {part: np.array([who for _, who in made]) for part, made in told.items()}
    batches, rows = story_batches(tokenizer), []
    for seed in SEEDS:
        for lr in RATES:
            torch.manual_seed(seed)
            model = GPTForClassification.from_pretrained(story, len(animals()))
            config = TrainConfig(STEPS, BATCH, lr, weight_decay=0.01, warmup=15, seed=seed)
            learned = Batches(ids["training"], whos["training"], BATCH, seed)
            train(model, learned, config, loss=class_loss)
            row = {
                "rate": lr,
                "seed": seed,
                "loss on stories": loss_with_old_head(model, story, batches),
            }
            for part in list(told)[1:]:
                row[part] = accuracy(whos[part], predict(model, ids[part]).argmax(dim=1))
            print(row, flush=True)
            rows.append(row)
    pd.DataFrame(rows).to_csv(DATA / "models" / "rates.csv", index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
