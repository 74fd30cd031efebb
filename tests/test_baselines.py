"""The opponents are tuned, and none sees the validation labels while it is fitted."""

import numpy as np

from support.baselines import choose, opponents
from support.metrics import accuracy

TEXTS = ["WIN £100 now!", "free prize, call 0871", "see you at eight", "ok lor", "are you home"] * 6
LABELS = np.array([1, 1, 0, 0, 0] * 6)
OTHERS = ["call now for a FREE prize £5", "win 0871!", "see you home", "you ok?"]


def test_every_opponent_learns_from_text_and_gives_probabilities():
    for variants in opponents().values():
        model = choose(variants, TEXTS, LABELS, OTHERS, np.array([1, 1, 0, 0]))
        probs = model.predict_proba(OTHERS)
        assert probs.shape == (4, 2) and np.allclose(probs.sum(axis=1), 1)
        assert accuracy([1, 1, 0, 0], probs[:, 1] > 0.5) == 1


def test_the_best_on_validation_is_chosen_and_it_learned_from_the_training_texts_only():
    class Says:
        def __init__(self, answer):
            self.answer, self.seen = answer, []

        def fit(self, texts, labels):
            self.seen.append((texts, labels))
            return self

        def predict_proba(self, texts):
            return np.array([[1 - p, p] for p in self.answer])

    poor, good, same_but_surer = Says([0.9, 0.8]), Says([0.4, 0.2]), Says([0.1, 0.4])
    assert choose([poor, same_but_surer, good], "texts", "labels", ["a", "b"], [0, 0]) in (
        good,
        same_but_surer,
    )
    assert choose([poor, good], "texts", "labels", ["a", "b"], [1, 1]) is poor
    assert choose([same_but_surer, good], "texts", "labels", ["a", "b"], [1, 0]) is good
    assert good.seen == [("texts", "labels")] * 3
