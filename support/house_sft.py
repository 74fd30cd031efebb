"""The house model `story-sft`: the house model once it has learned to answer requests (chapter 7).

`python -m support.house_sft` makes it anew in an hour and a half, by the recipe in
`data/models/story-sft`, and goes on where an earlier run was stopped.
"""

import tomllib
from collections.abc import Sequence
from itertools import islice

import pandas as pd

from support.data import DATA, write_atomic
from support.instruct import Batches, Example, follow, to_row, with_targets
from support.pretrained import export, load
from support.recipe import filled
from support.tasks import TASKS, requests
from support.train import TrainConfig, train

FOLDER = DATA / "models" / "story-sft"
WORK = DATA / "cache" / "story-sft"  # the checkpoints on the way


def examples(
    tokenizer, number: int, context_length: int, seed=0, split="train", tasks: Sequence = TASKS
) -> list[Example]:
    """Return requests of a split with their answers, as rows; those too long are left out."""
    rows = (to_row(tokenizer, r.prompt, r.answer) for r in requests(seed, split, tasks))
    return list(islice((row for row in rows if len(row.ids) <= context_length), number))


def examine(tokenizer, number: int = 400) -> pd.DataFrame:
    """Return which share of test requests is followed before and after, by task and on average."""
    asked, shares = list(islice(requests(2, "test"), number)), {}
    for name in ("story", "story-sft"):
        model, _ = load(name)
        shares[name], _ = follow(model, tokenizer, asked, temperature=0)
    return pd.DataFrame(shares).rename_axis("task").round(4)


def main() -> None:
    """Train the model, and store it with the log and the shares of requests that it followed."""
    recipe = tomllib.loads((FOLDER / "recipe.toml").read_text(encoding="utf-8"))
    config = filled(TrainConfig, recipe["train"], "train")
    model, tokenizer = load("story")
    T, B = model.config.context_length, config.batch_size
    rows = examples(tokenizer, config.steps * B, T, tasks=recipe["tasks"])
    val = examples(tokenizer, 160, T, split="validation")
    evaluations = [with_targets(val[i : i + B]) for i in range(0, len(val), B)]
    asked = list(islice(requests(1, "validation"), 96))
    kept = WORK / "shares.csv"

    def measure(row: dict) -> None:
        """Every eval_every steps, write down how many requests of each task it follows."""
        if row["step"] % config.eval_every == 0:
            shares, _ = follow(model, tokenizer, asked, temperature=0)
            before = pd.read_csv(kept) if kept.exists() else pd.DataFrame({"step": []})
            before = before[before.step < row["step"]]  # of a run that was continued
            table = pd.concat([before, pd.DataFrame([{"step": row["step"]} | shares.to_dict()])])
            write_atomic(kept, table.astype({"step": int}).round(4).to_csv(index=False).encode())
            print(table.tail(1).round(2).to_string(index=False), flush=True)

    log = train(
        model, Batches(rows, B), config, WORK / "run", evaluations=evaluations, on_step=measure
    )
    export(model.half(), tokenizer, FOLDER)
    write_atomic(FOLDER / "log.csv", log.round(5).to_csv(index=False).encode())
    write_atomic(FOLDER / "shares.csv", kept.read_bytes())
    write_atomic(FOLDER / "test.csv", examine(tokenizer).to_csv().encode())


if __name__ == "__main__":
    main()
