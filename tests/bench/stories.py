"""How well the house model tells stories, beside a model of two minutes and a 5-gram model.

Run `python tests/bench/stories.py`: each goes on with 200 beginnings from the test split, and
`review` counts what they keep. Writes `data/models/story/review.csv`; the pages show it.
"""

import random
import time
from collections import Counter, defaultdict
from itertools import islice

import pandas as pd
import torch

from support.generate import generate
from support.gpt import GPTConfig, GPTModel
from support.house import FOLDER, WORK, prepare
from support.pretrained import load
from support.shards import Shards, Windows
from support.storyworld import Story, review, stories
from support.train import TrainConfig, train

N, LONGEST, SECONDS = 200, 250, 120
SAMPLING = {"temperature": 0.7, "top_p": 0.95}


def beginnings(n: int) -> list[tuple[Story, str]]:
    """Return n stories of the test split, each with its first paragraph, which has the object."""
    first = ((story, story.text.split("\n\n")[0]) for story in stories(11, "test"))
    told = ((story, start + "\n\n") for story, start in first if story.facts.object in start)
    return list(islice(told, n))


def two_minute_model(ids: Shards, vocab_size: int) -> GPTModel:
    """Return a model of one million parameters, trained for SECONDS."""
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(vocab_size, context_length=256, d_model=128, n_heads=4, n_layers=4))
    data, start = Windows(ids, 256, 8), time.perf_counter()
    train(model, data, TrainConfig(steps=30, batch_size=8))  # how long does a step take?
    steps = int(SECONDS / ((time.perf_counter() - start) / 30))
    train(model, data, TrainConfig(steps, 8, lr=3e-3, warmup=min(20, steps)))
    return model


class NGram:
    """Writes what followed the last four tokens somewhere, or three, or two, or one."""

    def __init__(self, ids, order: int = 5):
        self.order, self.next = order, [defaultdict(Counter) for _ in range(order)]
        for at in range(order, len(ids)):
            gram = tuple(ids[at - order + 1 : at + 1])
            for n in range(order):
                self.next[n][gram[order - 1 - n : -1]][gram[-1]] += 1

    def write(self, prompt: list[int], stop_id: int, rng: random.Random) -> list[int]:
        ids = list(prompt)
        while len(ids) < len(prompt) + LONGEST and (len(ids) == len(prompt) or ids[-1] != stop_id):
            contexts = (tuple(ids[len(ids) - n :]) for n in range(self.order - 1, -1, -1))
            n, seen = next((len(c), c) for c in contexts if c in self.next[len(c)])
            choices = self.next[n][seen]
            ids += rng.choices(list(choices), [count**1.4 for count in choices.values()])  # T = 0.7
        return ids[len(prompt) :]


def main() -> None:
    tokenizer = prepare()
    stop_id = tokenizer.special_tokens["<|endoftext|>"]
    told = beginnings(N)
    prompts = [tokenizer.encode(text) for _, text in told]
    ids = Shards(WORK / "train")

    def from_model(model) -> list[list[int]]:
        draws, rows = torch.Generator().manual_seed(0), []
        for i in range(0, N, 50):
            part = prompts[i : i + 50]
            part = [p[-(model.config.context_length - LONGEST) :] for p in part]
            new = generate(model, part, LONGEST, stop_id=stop_id, generator=draws, **SAMPLING)
            rows += [row[len(p) :] for row, p in zip(new, part, strict=True)]
        return rows

    rng, counted = random.Random(0), NGram([int(i) for i in ids[: 3 * 10**6]])
    written = {
        "5-gram": [counted.write(prompt, stop_id, rng) for prompt in prompts],
        "two minutes": from_model(two_minute_model(ids, tokenizer.vocab_size)),
        "story": from_model(load("story")[0]),
        "the story world itself": [
            tokenizer.encode(story.text.removeprefix(start)) + [stop_id] for story, start in told
        ],
    }
    table = {}
    for name, rows in written.items():
        texts = [tokenizer.decode([i for i in row if i != stop_id]) for row in rows]
        checks = [
            review(text, story.facts, ended=row[-1] == stop_id)
            for text, row, (story, _) in zip(texts, rows, told, strict=True)
        ]
        table[name] = pd.DataFrame(checks).mean()
    table = pd.DataFrame(table).round(3)
    table.to_csv(FOLDER / "review.csv")
    print(table)


if __name__ == "__main__":
    main()
