"""The shipped `story-sft` is what its recipe and its log say, and it does what it is asked."""

import tomllib
from itertools import islice

import pandas as pd
import pytest
import torch
from safetensors import safe_open

from support.house_sft import FOLDER, examples
from support.instruct import follow, with_targets
from support.pretrained import load
from support.recipe import filled
from support.storyworld import stories
from support.tasks import TASKS, requests
from support.train import TrainConfig, evaluate, token_loss

RECIPE = tomllib.loads((FOLDER / "recipe.toml").read_text())


@pytest.fixture(scope="module")
def shipped():
    return load("story-sft")


def test_the_recipe_has_every_task_and_the_log_every_step():
    config, log = filled(TrainConfig, RECIPE["train"], "train"), pd.read_csv(FOLDER / "log.csv")
    assert set(RECIPE["tasks"]) == set(TASKS)
    assert len(log) == config.steps == log.step.iloc[-1]
    assert log.loss[:10].mean() > 2 * log.loss[-10:].mean()


def test_examples_fit_and_come_in_turn(shipped):
    tokenizer = shipped[1]
    rows = examples(tokenizer, 40, 200, tasks=["who", "write"])
    assert len(rows) == 40 and max(len(row.ids) for row in rows) <= 200
    assert not any(row.learned[0] for row in rows) and all(row.learned[-1] for row in rows)
    every = examples(tokenizer, 6, 384, tasks=["who", "write"])
    assert all(sum(every[i].learned) < 20 < sum(every[i + 1].learned) for i in (0, 2, 4))
    assert every != examples(tokenizer, 6, 384, split="test", tasks=["who", "write"])


def test_the_shipped_model_has_the_recorded_loss(shipped):
    model, tokenizer = shipped
    val = examples(tokenizer, 160, model.config.context_length, split="validation")
    loss = evaluate(model, [with_targets(val[i : i + 16]) for i in range(0, 160, 16)])
    recorded = pd.read_csv(FOLDER / "log.csv").val_loss.dropna().iloc[-1]
    assert loss == pytest.approx(recorded, abs=5e-3)  # its numbers have 16 bits, not 32


def test_the_shipped_model_does_what_it_is_asked(shipped):
    stored = pd.read_csv(FOLDER / "test.csv", index_col="task").loc["mean"]
    assert stored["story"] < 0.2 and stored["story-sft"] >= 0.9
    asked = list(islice(requests(77, "test"), 48))  # not those of test.csv
    shares, _ = follow(*shipped, asked, temperature=0)
    assert shares["mean"] > 0.8


def test_the_shipped_model_still_tells_stories(shipped):
    model, tokenizer = shipped
    base, base_tokenizer = load("story")
    assert model.config == base.config
    assert tokenizer.special_tokens == base_tokenizer.special_tokens
    for story in islice(stories(5, "test"), 3):
        ids = torch.tensor([tokenizer.encode(story.text)])
        with torch.no_grad():
            losses = [token_loss(m, ids[:, :-1], ids[:, 1:])[0] for m in (base, model)]
        assert losses[1] < losses[0] + 0.3 * ids.shape[1]


def test_the_weights_fit_on_the_page(shipped):
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size <= 16e6
    with safe_open(path, "pt") as weights:
        assert all(weights.get_tensor(name).isfinite().all() for name in weights.keys())  # noqa: SIM118
    assert shipped[0].tok_emb.weight.dtype == torch.float32
