"""The house model `story`: a small GPT that learned to tell stories of the story world.

`make pretrain` makes it anew in an hour, by the recipe in `data/models/story`, and goes on where an
earlier run was stopped.
"""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from support.data import DATA, write_atomic
from support.gpt import GPTModel
from support.pretrained import export
from support.recipe import from_recipe
from support.shards import write_shards
from support.storyworld import stories
from support.tokenizer import BPETokenizer
from support.train import train

FOLDER = DATA / "models" / "story"
WORK = DATA / "cache" / "story"  # the tokens, and the checkpoints on the way
VOCAB_SIZE = 2048
END = "<|endoftext|>"
SPECIAL_TOKENS = (END, "<|im_start|>", "<|im_end|>")  # the last two are for chapter 7
NUMBER_OF_STORIES = {"train": 60_000, "validation": 1_000}
FOR_THE_TOKENIZER = 10_000


def texts(split: str, number: int) -> Iterator[str]:
    """Yield the first stories of a split."""
    return (story.text for story in islice(stories(0, split), number))


def prepare(work: Path = WORK) -> BPETokenizer:
    """Train the tokenizer, and write the tokens of all stories to disk, if that is not done.

    Raises ValueError if what is there comes from other stories.
    """
    first = "\n\n".join(texts("train", 100))
    mark = hashlib.sha256(f"{first} {VOCAB_SIZE} {NUMBER_OF_STORIES}".encode()).hexdigest()
    work.mkdir(parents=True, exist_ok=True)
    if (work / "stories.sha256").exists():
        if (work / "stories.sha256").read_text() != mark:
            raise ValueError(f"The stories are others than those in {work}: delete that folder.")
    else:
        text = (END + "\n").join(texts("train", FOR_THE_TOKENIZER))
        BPETokenizer.train(text, VOCAB_SIZE, SPECIAL_TOKENS).save(work / "tokenizer.json")
        write_atomic(work / "stories.sha256", mark.encode())
    tokenizer = BPETokenizer.load(work / "tokenizer.json")
    end_id = tokenizer.special_tokens[END]
    for split, number in NUMBER_OF_STORIES.items():
        if not (work / split).exists():
            write_shards(texts(split, number), tokenizer, work / split, end_id=end_id)
    return tokenizer


@torch.no_grad()
def begin_by_copying(model: GPTModel) -> None:
    """Let attention begin by writing what it reads, and reading what is like the reader.

    A story's names can only be copied from its beginning, and from GPT-2's first weights so small
    a model took more stories to find that out than it has. So each head's output starts as its
    values turned back, and its keys as its queries; larger embeddings keep the names apart.
    After Trockman and Kolter, Mimetic Initialization of Self-Attention Layers, 2023, section 3.
    """
    model.tok_emb.weight.mul_(10)
    model.embed.pos_emb.weight.mul_(5)
    for block in model.blocks:
        attention = block.attention
        nn.init.orthogonal_(attention.W_v.weight, 0.7)
        attention.W_o.weight.copy_(0.5 * attention.W_v.weight.T)
        nn.init.orthogonal_(attention.W_q.weight, 0.7)
        attention.W_k.weight.copy_(attention.W_q.weight)


def recipe(path: Path = FOLDER / "recipe.toml") -> dict:
    """Return the arguments of `train` for the house model, which is at its beginning."""
    arguments = from_recipe(path)
    begin_by_copying(arguments["model"])
    return arguments


def main() -> None:
    """Train the house model and store it in Hugging Face's format, with the log of its training."""
    tokenizer, arguments = prepare(), recipe()
    log = train(**arguments, folder=WORK / "run")
    export(arguments["model"], tokenizer, FOLDER)
    write_atomic(FOLDER / "log.csv", (WORK / "run" / "log.csv").read_bytes())
    print(log.dropna(subset="val_loss").tail(1).to_string(index=False))


if __name__ == "__main__":
    main()
