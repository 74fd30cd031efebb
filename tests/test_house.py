"""The shipped house model is the one that its recipe makes, and the recipe can go on from it."""

import shutil
from itertools import islice

import pandas as pd
import pytest
import torch
from safetensors import safe_open

from support import house
from support.house import FOLDER, SPECIAL_TOKENS, prepare
from support.pretrained import load
from support.recipe import from_recipe
from support.storyworld import stories, vocabulary
from support.train import evaluate, train


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Return a copy of the recipe beside stories and a tokenizer that are made anew."""
    data = tmp_path_factory.mktemp("data")
    (data / "models" / "story").mkdir(parents=True)
    shutil.copy(FOLDER / "recipe.toml", data / "models" / "story")
    tokenizer = prepare(data / "cache" / "story")
    return data / "models" / "story" / "recipe.toml", tokenizer


@pytest.fixture(scope="module")
def log():
    return pd.read_csv(FOLDER / "log.csv")


def test_the_tokenizer_is_the_one_that_the_stories_make(recipe):
    made, shipped = recipe[1], load("story")[1]
    assert shipped.merges == made.merges
    assert shipped.special_tokens == made.special_tokens
    assert list(shipped.special_tokens) == list(SPECIAL_TOKENS)


def test_the_first_steps_of_the_recipe_are_those_of_the_log(recipe, log):
    arguments = house.recipe(recipe[0]) | {"evaluations": ()}
    losses = []

    def stop_after_three(row):
        losses.append(row["loss"])
        if len(losses) == 3:
            raise KeyboardInterrupt

    train(**arguments, on_step=stop_after_three)
    assert losses == pytest.approx(log.loss[:3].tolist(), abs=1e-3)


def test_the_shipped_model_has_the_recorded_loss(recipe, log):
    model, _ = load("story")
    arguments = from_recipe(recipe[0])
    assert model.config == arguments["model"].config
    recorded = log.val_loss.dropna().iloc[-1]
    assert evaluate(model, arguments["evaluations"]) == pytest.approx(recorded, abs=1e-3)
    assert len(log) == arguments["config"].steps == log.step.iloc[-1]


def test_training_can_go_on_from_the_shipped_model(recipe, log):
    model, _ = load("story")
    arguments = from_recipe(recipe[0], steps=8, lr=1e-4, warmup=4, eval_every=None)
    arguments["evaluations"] = arguments["evaluations"][:5]
    before = evaluate(model, arguments["evaluations"])
    after = train(**arguments | {"model": model})
    assert after.loss.mean() == pytest.approx(log.loss[-100:].mean(), abs=0.15)
    assert after.val_loss.iloc[-1] == pytest.approx(before, abs=0.03)


def test_a_name_that_comes_again_is_copied():
    model, tokenizer = load("story")
    names = [name for group in vocabulary()["names"].values() for name in group]
    name_ids = {tokenizer.encode(" " + name)[0] for name in names}
    right = []
    for story in islice(stories(3, "test"), 20):
        ids = tokenizer.encode(story.text)
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0]  # (T, V)
        for at in range(1, len(ids)):
            if ids[at] in name_ids and ids[at] in ids[:at]:
                right.append(max(name_ids, key=logits[at - 1].tolist().__getitem__) == ids[at])
    assert len(right) > 100 and sum(right) / len(right) > 0.6  # of two names, half would be chance


def test_stories_that_changed_are_noticed(recipe, monkeypatch):
    monkeypatch.setattr("support.house.VOCAB_SIZE", 1024)
    with pytest.raises(ValueError, match="delete that folder"):
        prepare(recipe[0].parents[2] / "cache" / "story")


def test_the_weights_fit_on_the_page():
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size <= 16e6
    with safe_open(path, "pt") as weights:
        assert all(weights.get_tensor(name).isfinite().all() for name in weights.keys())  # noqa: SIM118
    assert load("story")[0].tok_emb.weight.dtype == torch.float32
