"""Letter by letter: our best recipe against a plain one, at the same wall time.

Run `python tests/bench/shakespeare.py`. Both train a GPT of 4 layers, width 128 and context 64 on
the first 1.1 MB of the plays, the size of the text in nanoGPT's README, which reports a validation
loss of 1.88 for the plain recipe: 2,000 steps of 12 x 64 letters. The last tenth is held out.
"""

import os
import time

import torch

from support.data import load_text
from support.gpt import GPTConfig, GPTModel
from support.shards import Windows
from support.train import TrainConfig, evaluate, train

LETTERS, CONTEXT = 1_115_394, 64
PLAIN = TrainConfig(2000, 12, lr=1e-3, min_lr_share=0.1, warmup=100, betas=(0.9, 0.99))
BEST = {"batch_size": 32, "lr": 6e-3, "min_lr_share": 0.0, "warmup": 100, "betas": (0.9, 0.98)}


def run(config: TrainConfig, ids: torch.Tensor, vocab_size: int) -> tuple[GPTModel, float]:
    """Return a model trained by `config`, and the seconds that it took."""
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(vocab_size, CONTEXT, d_model=128, n_heads=4, n_layers=4))
    start = time.perf_counter()
    train(model, Windows(ids, CONTEXT, config.batch_size), config)
    return model, time.perf_counter() - start


def main() -> None:
    os.environ["COURSE_QUIET"] = "1"
    text = load_text("shakespeare")[:LETTERS]
    letters = sorted(set(text))
    ids = torch.tensor([letters.index(letter) for letter in text])
    cut = len(ids) * 9 // 10
    val = Windows(ids[cut:], CONTEXT, 128)
    evaluations = [val(i) for i in range(len(ids[cut:]) // CONTEXT // 128)]

    plain, seconds = run(PLAIN, ids[:cut], len(letters))
    _, trial = run(TrainConfig(60, **BEST | {"warmup": 10}), ids[:cut], len(letters))
    best, took = run(TrainConfig(int(seconds / trial * 60), **BEST), ids[:cut], len(letters))
    print(f"Shakespeare by letters, {len(letters)} of them, {len(ids):,} in all")
    for name, model, time_taken in (("plain", plain, seconds), ("best", best, took)):
        print(f"  {name:<30}{evaluate(model, evaluations):6.3f} nats/letter in {time_taken:5.1f} s")


if __name__ == "__main__":
    main()
