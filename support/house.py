"""The house model `story`: a small GPT that learned to tell stories of the story world.

`make pretrain` makes it anew, by the recipe beside it in `data/models/story`, and goes on where an
earlier run was stopped.
"""

import shutil
from itertools import islice

from support.data import DATA
from support.pretrained import export
from support.recipe import from_recipe
from support.shards import write_shards
from support.storyworld import stories
from support.tokenizer import BPETokenizer
from support.train import train

FOLDER = DATA / "models" / "story"
WORK = DATA / "cache" / "story"  # the tokens, and the checkpoints on the way
VOCAB_SIZE = 2048
END, *CHAT = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # for chapter 7
NUMBER_OF_STORIES = {"train": 60_000, "validation": 1_000}
FOR_THE_TOKENIZER = 10_000


def texts(split: str, number: int) -> list[str]:
    """Return the first stories of a split."""
    return [story.text for story in islice(stories(0, split), number)]


def prepare() -> BPETokenizer:
    """Train the tokenizer, and write the tokens of all stories to disk."""
    if not (WORK / "tokenizer.json").exists():
        text = (END + "\n").join(texts("train", FOR_THE_TOKENIZER))
        WORK.mkdir(parents=True, exist_ok=True)
        BPETokenizer.train(text, VOCAB_SIZE, SPECIAL_TOKENS).save(WORK / "tokenizer.json")
    tokenizer = BPETokenizer.load(WORK / "tokenizer.json")
    (end_id,) = tokenizer.encode(END, allowed_special={END})
    for split, number in NUMBER_OF_STORIES.items():
        if not (WORK / split).exists():
            told = (story.text for story in islice(stories(0, split), number))
            write_shards(told, tokenizer, WORK / split, end_id=end_id)
    return tokenizer


def main() -> None:
    """Train the house model and store it in Hugging Face's format."""
    tokenizer = prepare()
    arguments = from_recipe(FOLDER / "recipe.toml")
    log = train(**arguments, folder=WORK / "run")
    export(arguments["model"], tokenizer, FOLDER)
    shutil.copy(WORK / "run" / "log.csv", FOLDER / "log.csv")
    print(log.dropna(subset="val_loss").tail(1).to_string(index=False))


if __name__ == "__main__":
    main()
