"""Who did what to whom: sentences in which only the order of the words tells.

Each comes with its mirror image, in which the two animals have changed places, so that no
classifier that only counts words can be right more often than in half of the cases.
"""

import random
from itertools import combinations

from support.storybook import vocabulary

ANIMALS = ["bear", "cat", "dog", "fox", "frog", "mouse", "otter", "owl"]  # the classes
VERBS = "helped found followed called thanked carried hugged chased caught saved pulled pushed"
KNOWN = [
    "{when} the {who} {verb} the {whom}.",
    "{when} the {whom} was {verb} by the {who}.",
    "the {who} with the {thing} {verb} the {whom}.",
    "it was the {who} that {verb} the {whom}.",
    "it was the {whom} that the {who} {verb}.",
]
NEW = [
    "the {whom} with the {thing} was {verb} by the {who}.",
    "it was the {who} with the {thing} that {verb} the {whom}.",
    "{when} it was the {whom} that was {verb} by the {who}.",
]
SPLITS = {"train": (True, KNOWN), "test": (False, KNOWN), "new wordings": (False, NEW)}


def who_did_what(n: int, seed: int = 0, split: str = "train") -> tuple[list[str], list[int]]:
    """Return n sentences and for each the number of the animal that did it, in ANIMALS.

    No pair of animals of "train" occurs in "test" or "new wordings"; the latter has other wordings.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}: choose {', '.join(SPLITS)}.")
    pairs = list(combinations(ANIMALS, 2))
    random.Random(0).shuffle(pairs)
    cut, (first, wordings) = len(pairs) * 3 // 4, SPLITS[split]
    pairs = pairs[:cut] if first else pairs[cut:]
    world, rng = vocabulary(), random.Random(f"{split} {seed}")
    texts, labels = [], []
    while len(texts) < n:
        thing, about = rng.choice(list(world["objects"].items()))
        fillers = {
            "verb": rng.choice(VERBS.split()),
            "thing": f"{about['looks'].split()[0]} {thing}",
            "when": f"one {rng.choice(world['weather'])} {rng.choice(['morning', 'evening'])}",
        }
        wording, (one, other) = rng.choice(wordings), rng.choice(pairs)
        for who, whom in ((one, other), (other, one)):
            text = wording.format(who=who, whom=whom, **fillers)
            texts.append(text[0].upper() + text[1:])
            labels.append(ANIMALS.index(who))
    return texts[:n], labels[:n]
