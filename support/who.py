"""Who did what to whom: sentences whose words alone, and short runs of them, do not say it."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations, islice

import numpy as np
import torch

from support.classify import GPTForClassification
from support.gpt import GPTModel
from support.shards import Windows
from support.storyworld import stories, vocabulary
from support.train import evaluate

# Between an animal and the words that say what it did there are always two others at least.
KNOWN = (
    "the {who} {where} {verb} the {kind} {whom}.",
    "the {whom} {where} was {verb} by the {kind} {who}.",
    "the {who} with the {thing} {verb} the {kind} {whom}.",
    "the {whom} with the {thing} was {verb} by the {kind} {who}.",
    "{when} the {who} {where} {verb} the {kind} {whom}.",
    "{when} the {whom} {where} was {verb} by the {kind} {who}.",
)
NEW = (
    "it was the {who} {where} that {verb} the {kind} {whom}.",
    "it was the {whom} {where} that was {verb} by the {kind} {who}.",
    "{when} the {who} with the {thing} {verb} the {kind} {whom}.",
    "{when} the {whom} with the {thing} was {verb} by the {kind} {who}.",
    "{where} the {who} with the {thing} {verb} the {kind} {whom}.",
    "{where} the {whom} with the {thing} was {verb} by the {kind} {who}.",
)
VERBS = "helped found followed called thanked carried hugged chased caught saved pulled pushed"
KINDS = "brave little, clever old, shy young, merry little, gentle old, proud young"


@cache
def animals() -> list[str]:
    """Return the animals of the story world, the classes of this task, in alphabetical order."""
    species = vocabulary()["species"]
    return sorted(kind for kind, about in species.items() if "animal" in about["kinds"].split())


@cache
def fillers() -> dict[str, list[str]]:
    """Return what may stand for each name in a wording."""
    world = vocabulary()
    objects = world["objects"].items()
    return {
        "verb": VERBS.split(),
        "kind": KINDS.split(", "),
        "where": [place["in"] for place in world["places"].values()],
        "thing": [f"{about['looks'].split()[0]} {name}" for name, about in objects],
        "when": [
            f"one {sky} {time}" for sky in world["weather"] for time in ("morning", "evening")
        ],
    }


def sentences(
    pairs: Sequence[tuple[str, str]], wordings: Sequence[str], n: int, seed: int
) -> list[tuple[str, int]]:
    """Return n sentences with who did it, each followed by its mirror image."""
    rng, made = np.random.default_rng(seed), []
    while len(made) < n:
        words = {name: str(rng.choice(choices)) for name, choices in fillers().items()}
        wording, (one, other) = str(rng.choice(wordings)), pairs[rng.integers(len(pairs))]
        for who, whom in ((one, other), (other, one)):
            text = wording.format(who=who, whom=whom, **words)
            made.append((text[0].upper() + text[1:], animals().index(who)))
    return made[:n]


def who_did_it() -> dict[str, list[tuple[str, int]]]:
    """Return sentences to learn from, of pairs that never met there, and those in new wordings."""
    pairs = list(combinations(animals(), 2))
    order = np.random.default_rng(0).permutation(len(pairs)).tolist()
    old, new = [pairs[i] for i in order[:150]], [pairs[i] for i in order[150:]]
    return {
        "training": sentences(old, KNOWN, 3_000, 1),
        "new pairs": sentences(new, KNOWN, 600, 2),
        "new pairs, new wordings": sentences(new, NEW, 600, 3),
    }


def story_batches(tokenizer, context_length: int = 256, batch_size: int = 8) -> list:
    """Return 32 windows of stories that no model was trained on, each from a beginning on."""
    end_id, ids = tokenizer.special_tokens["<|endoftext|>"], []
    for tale in islice(stories(0, "validation"), 60):
        ids += [*tokenizer.encode(tale.text), end_id]
    windows = Windows(ids, context_length, batch_size, end_id=end_id)
    return [windows(i) for i in range(4)]


def loss_with_old_head(
    classifier: GPTForClassification, model: GPTModel, batches: list[tuple[torch.Tensor, ...]]
) -> float:
    """Return the loss, on text, of a classifier's blocks under the head they had as `model`."""
    reader = GPTModel(replace(model.config, tie_weights=False))
    weights = classifier.backbone.state_dict() | model.head.state_dict(prefix="head.")
    weights.pop("head.bias")
    reader.load_state_dict(weights)
    return evaluate(reader, batches)
