"""The exercises of chapter 6, classification."""

import math
import re

import torch
from torch import Tensor

from support.checks import Exercise
from support.classify import GPTForClassification
from support.gpt import GPTConfig


def _random(*shape, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# 6.1


def _by_class(counts, zero=0.0, transposed=False):
    """Return the precision, the recall and the F1 of each class of a confusion matrix."""
    counts = counts.double().T if transposed else counts.double()
    hits, called, there = counts.diag(), counts.sum(dim=0), counts.sum(dim=1)

    def share(part, whole):
        return torch.where(whole > 0, part / whole.clamp(min=1e-9), zero)

    return share(hits, called), share(hits, there), share(2 * hits, called + there)


def _macro_f1(counts):
    return _by_class(counts)[2].mean().item()


COUNTS = torch.tensor([[50, 2, 3], [10, 5, 0], [4, 1, 25]])

macro_f1 = Exercise(
    "6.1",
    _macro_f1,
    [
        (torch.tensor([[8, 2], [1, 3]]),),
        (COUNTS,),
        (torch.tensor([[7, 3, 0], [1, 9, 0], [0, 0, 0]]),),
        (torch.tensor([[5, 0, 0], [4, 0, 1], [0, 2, 6]]),),
    ],
    [
        (
            lambda counts: (counts.diag().sum() / counts.sum()).item(),
            "This is the accuracy, in which a large class counts more: take the F1 of each class.",
        ),
        (
            lambda counts: _by_class(counts)[2][-1].item(),
            "This is the F1 of one class: average over all of them.",
        ),
        (
            lambda counts: (_by_class(counts)[2] @ counts.sum(1).double() / counts.sum()).item(),
            "You weigh each class by its size; here each counts the same.",
        ),
        (
            lambda counts: sum(_by_class(counts)[:2]).mean().item() / 2,
            "You average precision and recall; F1 is their harmonic mean, 2 p r / (p + r).",
        ),
        (
            lambda counts: _by_class(counts)[0].mean().item(),
            "This is the mean precision; F1 needs the recall too.",
        ),
        (
            lambda counts: _by_class(counts)[1].mean().item(),
            "This is the mean recall; F1 needs the precision too.",
        ),
        (
            lambda counts: _harmonic(*(x.mean() for x in _by_class(counts)[:2])),
            "You average precision and recall over the classes first; take the F1 of each, then "
            "the mean.",
        ),
        (
            lambda counts: _by_class(counts, zero=1.0)[2].mean().item(),
            "A class without a label and without an answer has an F1 of 0 here.",
        ),
        (
            lambda counts: _by_class(counts)[2][counts.sum(1) > 0].mean().item(),
            "You leave out the classes that do not occur; here they count, with an F1 of 0.",
        ),
        (
            lambda counts: (2 * counts.diag() / (counts.sum(0) + counts.sum(1))).mean().item(),
            "NaN comes of 0 / 0: a class without a label and without an answer has an F1 of 0.",
        ),
        (
            lambda counts: (_by_class(counts)[2] / 2).mean().item(),
            "The 2 is missing: F1 is 2 p r / (p + r).",
        ),
        (
            lambda counts: _by_class(counts)[2].sum().item(),
            "You add up the classes: divide by their number.",
        ),
    ],
)


def _harmonic(p, r):
    return (2 * p * r / (p + r)).item()


# 6.2


def _pairs(labels, scores, tie=0.5, flip=False):
    """Return for each pair of a positive and a negative what it counts."""
    labels = [1 - y for y in labels] if flip else labels
    ups = [s for s, y in zip(scores, labels, strict=True) if y == 1]
    downs = [s for s, y in zip(scores, labels, strict=True) if y == 0]
    return [(a > b) + (tie if a == b else 0) for a in ups for b in downs]


def _share(found, of):
    return found / of if of else math.nan


def _pair_auroc(labels, scores):
    won = _pairs(labels, scores)
    return _share(sum(won), len(won))


def _neighbors(labels, scores):
    ranked = [y for _, y in sorted(zip(scores, labels, strict=True))]
    ups = [b for a, b in zip(ranked, ranked[1:], strict=False) if a != b]
    return _share(sum(ups), len(ups))


pair_auroc = Exercise(
    "6.2",
    _pair_auroc,
    [
        ([1, 0, 1, 0], [0.9, 0.8, 0.3, 0.1]),
        ([1, 0, 0, 1, 0], [0.5, 0.5, 0.2, 0.2, 0.2]),
        ([0, 0, 1], [0.4, 0.7, 0.1]),
        ([1, 1, 0, 1, 0, 0, 0], [3, 2, 2, 1, 1, 0, -5]),
        ([1, 0], [2.0, 2.0]),
    ],
    [
        (
            lambda y, s: _share(sum(_pairs(y, s, tie=0)), len(_pairs(y, s))),
            "A tie counts half, not nothing.",
        ),
        (
            lambda y, s: _share(sum(_pairs(y, s, tie=1)), len(_pairs(y, s))),
            "A tie counts half, not as a win.",
        ),
        (
            lambda y, s: _share(sum(_pairs(y, s, flip=True)), len(_pairs(y, s))),
            "The wrong way round: count the pairs in which the positive has the higher score.",
        ),
        (
            lambda y, s: _share(sum(_pairs(y, s)), len(y) * (len(y) - 1) / 2),
            "You divide by all pairs; only pairs of a positive and a negative are asked.",
        ),
        (
            lambda y, s: _share(sum(_pairs(y, s)), len(y) ** 2),
            "You divide by the square of the number of examples; divide by positives × negatives.",
        ),
        (
            lambda y, s: sum(_pairs(y, s)),
            "This is the number of pairs that are right: divide by the number of pairs.",
        ),
        (
            lambda y, s: sum((b >= 0.5) == a for a, b in zip(y, s, strict=True)) / len(y),
            "This is the accuracy at a threshold of 0.5; AUROC needs no threshold.",
        ),
        (
            _neighbors,
            "You compare neighbors in the ranking; compare each positive with each negative.",
        ),
        (
            lambda y, s: _share(sum(_pairs(y, s, tie=0)), sum(w != 0.5 for w in _pairs(y, s))),
            "You leave ties out of the count; each is a pair, and counts half.",
        ),
    ],
)


# 6.3


def _last_real(states, mask):
    last = [int(row.nonzero().max()) for row in mask]
    return states[torch.arange(len(states)), last]


def _at(states, places):
    return states[torch.arange(len(states)), torch.as_tensor(places)]


RIGHT = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 0]]).bool()

last_real = Exercise(
    "6.3",
    _last_real,
    [
        (_random(3, 5, 2), RIGHT),
        (_random(4, 4, 3, seed=1), LEFT),
        (_random(2, 3, 4, seed=2), torch.tensor([[0, 1, 0], [1, 0, 1]]).bool()),
        (_random(1, 1, 2, seed=3), torch.ones(1, 1).bool()),
    ],
    [
        (lambda x, mask: x[:, -1], "The last column may be padding: look at the mask."),
        (
            lambda x, mask: _at(x, mask.sum(1) - 1),
            "The number of real tokens gives the place only while padding is on the right: find "
            "the last True.",
        ),
        (
            lambda x, mask: _at(x, mask.sum(1).clamp(max=x.shape[1] - 1)),
            "Places count from 0: you are one token too far.",
        ),
        (
            lambda x, mask: _at(x, mask.long().argmax(1)),
            "This is the first real token of each row; find the last.",
        ),
        (lambda x, mask: x[:, 0], "This is the first column; find the last real token."),
        (
            lambda x, mask: (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
            "This is the mean over the real tokens; take the last one alone.",
        ),
        (
            lambda x, mask: x[mask],
            "These are all the real tokens; keep one for each row.",
        ),
        (
            lambda x, mask: _at(x, [int(row.nonzero().max()) for row in mask])[None],
            "Return (B, C): one vector for each row, and no dimension more.",
        ),
        (
            lambda x, mask: _at(x, (mask.long().flip(1).argmax(1))),
            "You count from the right end: turn it round, T − 1 − that.",
        ),
    ],
)


# 6.4


def _cost(labels, scores, threshold, miss, alarm, strict=False):
    total = 0
    for y, s in zip(labels, scores, strict=True):
        called = s > threshold if strict else s >= threshold
        total += miss * (y == 1 and not called) + alarm * (y == 0 and called)
    return total


def _candidates(scores):
    return sorted({*scores, math.inf}, reverse=True)


def _best_threshold(labels, scores, miss, alarm):
    return min(_candidates(scores), key=lambda t: _cost(labels, scores, t, miss, alarm))


def _lowest(labels, scores, miss, alarm):
    return min(_candidates(scores)[::-1], key=lambda t: _cost(labels, scores, t, miss, alarm))


def _most_accurate(labels, scores, miss, alarm):
    return _best_threshold(labels, scores, 1, 1)


SURE = [0.95, 0.9, 0.7, 0.6, 0.4, 0.35, 0.1]
TRUTH = [1, 0, 1, 1, 0, 1, 0]

best_threshold = Exercise(
    "6.4",
    _best_threshold,
    [
        ([1, 0, 1, 0], [0.9, 0.6, 0.4, 0.2], 1, 10),
        ([1, 0, 1, 0], [0.9, 0.6, 0.4, 0.2], 10, 1),
        (TRUTH, SURE, 1, 1),
        (TRUTH, SURE, 1, 20),
        (TRUTH, SURE, 3, 2),
        ([0, 0, 1], [0.8, 0.8, 0.8], 1, 1),
        ([1, 1, 0], [0.3, 0.3, 0.3], 1, 1),
        ([0, 1, 1, 0], [0.2, 0.4, 0.4, 0.3], 1, 5),
    ],
    [
        (
            lambda y, s, miss, alarm: _best_threshold(y, s, alarm, miss),
            "You mix up the two: a miss is spam that is let through, an alarm is ham that is "
            "called spam.",
        ),
        (_most_accurate, "You count mistakes; the two kinds have different costs."),
        (_lowest, "If several thresholds cost the same, return the highest."),
        (
            lambda y, s, miss, alarm: min(
                sorted(set(s), reverse=True), key=lambda t: _cost(y, s, t, miss, alarm)
            ),
            "To call nothing spam may be cheapest: math.inf is a threshold too.",
        ),
        (
            lambda y, s, miss, alarm: min(
                _candidates(s), key=lambda t: _cost(y, s, t, miss, alarm, strict=True)
            ),
            "A score that equals the threshold is called spam: compare with >=.",
        ),
        (
            lambda y, s, miss, alarm: min(_cost(y, s, t, miss, alarm) for t in _candidates(s)),
            "This is the lowest cost; return the threshold that has it.",
        ),
        (
            lambda y, s, miss, alarm: alarm / (alarm + miss),
            "That is the right threshold for perfectly calibrated probabilities; find the one that "
            "is cheapest on these messages.",
        ),
        (
            lambda y, s, miss, alarm: max(
                _candidates(s), key=lambda t: _cost(y, s, t, miss, alarm)
            ),
            "This is the most expensive threshold.",
        ),
    ],
)


# 6.5


def _shingles(text, n, tokens=r"\w+", keep=tuple):
    words = re.findall(tokens, text.lower())
    return {keep(words[i : i + n]) for i in range(len(words) - n + 1)}


def _alike(a, b):
    return len(a & b) / len(a | b) if a | b else 0.0


def _leaked(train, test, n, threshold, how=_shingles, alike=_alike, beats=None):
    known = [how(text, n) for text in train]
    beats = beats or (lambda likeness: likeness >= threshold)
    return [
        i for i, text in enumerate(test) if any(beats(alike(how(text, n), old)) for old in known)
    ]


def _leaked_reference(train, test, n, threshold):
    return _leaked(train, test, n, threshold)


_leaked_reference.__name__ = "_leaked"

TRAIN = [
    "Win a new phone now, call me",
    "see you at the station at eight",
    "are you at home",
    "Reply YES to get your free prize today",
]
TEST = [
    "WIN a NEW PHONE now call US",
    "See you, at the station: at eight!",
    "at the station I see you",
    "ok",
    "you are home at eight",
    "get your free prize today",
    "are you at home are you at home",
    "new phone",
]

leaked = Exercise(
    "6.5",
    _leaked_reference,
    [
        (["the cat sat here"], ["the cat sat there", "here sat the cat"], 2, 0.5),
        (TRAIN, TEST, 2, 0.5),
        (TRAIN, TEST, 3, 0.4),
        (TRAIN, TEST, 1, 0.6),
        (TRAIN, TEST, 2, 0.7),
        (["ok"], ["ok", "OK then"], 2, 0.5),
        (["a b c", "b c d"], ["a b c d"], 2, 0.6),
    ],
    [
        (
            lambda train, test, n, threshold: _leaked(train, test, 1, threshold),
            "You compare single words; compare runs of n neighbors.",
        ),
        (
            lambda train, test, n, threshold: _leaked(
                train, test, n, threshold, alike=lambda a, b: len(a & b) / len(a) if a else 0.0
            ),
            "You divide by the runs of one message; divide by all that either has.",
        ),
        (
            lambda train, test, n, threshold: _leaked(
                train,
                test,
                n,
                threshold,
                alike=lambda a, b: len(a & b) / (len(a) + len(b)) if a or b else 0.0,
            ),
            "Runs that both have count once in the union: take len(a | b), not the sum.",
        ),
        (
            lambda train, test, n, threshold: _leaked(
                train, test, n, threshold, beats=lambda likeness: likeness > threshold
            ),
            "A likeness that equals the threshold counts too: compare with >=.",
        ),
        (
            lambda train, test, n, threshold: _leaked(test, train, n, threshold),
            "Return the numbers of the test messages, not those of the training messages.",
        ),
        (
            lambda train, test, n, threshold: _leaked(
                train,
                test,
                n,
                threshold,
                how=lambda text, n: {
                    tuple(w[i : i + n])
                    for w in [re.findall(r"\w+", text)]
                    for i in range(len(w) - n + 1)
                },
            ),
            "Small letters first: WIN and win are the same word.",
        ),
        (
            lambda train, test, n, threshold: _leaked(
                train, test, n, threshold, how=lambda text, n: _shingles(text, n, r"\S+")
            ),
            "Punctuation sticks to your words: r'\\w+' finds words without it.",
        ),
        (
            lambda train, test, n, threshold: [
                i for i, text in enumerate(test) if _near(text, train, n, threshold) == len(train)
            ],
            "One near-duplicate in training is enough: any, not all.",
        ),
        (
            lambda train, test, n, threshold: [
                text for i, text in enumerate(test) if i in _leaked(train, test, n, threshold)
            ],
            "Return the numbers of the messages, not their texts.",
        ),
        (
            lambda train, test, n, threshold: _leaked(
                train,
                test,
                n,
                threshold,
                how=lambda text, n: _shingles(text, n, keep=lambda w: tuple(sorted(w))),
            ),
            "The order within a run matters: do not sort its words.",
        ),
    ],
)


def _near(text, train, n, threshold):
    return sum(_alike(_shingles(text, n), _shingles(old, n)) >= threshold for old in train)


# 6.6


class _Lexicon:
    """A judge of texts: each different word counts once, and "not free" is no offer."""

    def __init__(self, words: dict):
        self.words = words
        self.__name__ = "score"

    def __call__(self, text: str) -> float:
        words = text.split()
        bonus = sum(pair == ("not", "free") for pair in zip(words, words[1:], strict=False))
        return sum(self.words.get(word, 0.0) for word in set(words)) - 2.0 * bonus

    def __deepcopy__(self, _):
        return self


def _without(words, i, size):
    return " ".join(words[:i] + words[i + size :])


def _most_important(text, score, size):
    words = text.split()
    falls = [score(text) - score(_without(words, i, size)) for i in range(len(words) - size + 1)]
    best = max(range(len(falls)), key=lambda i: falls[i])
    return " ".join(words[best : best + size])


def _ranked(value):
    """Return the answer that takes the run with the highest `value(words, i, size, score)`."""

    def answer(text, score, size):
        words = text.split()
        best = max(range(len(words) - size + 1), key=lambda i: value(words, i, size, score))
        return " ".join(words[best : best + size])

    return answer


def _one_by_one(text, score, size):
    words = text.split()
    falls = {i: score(text) - score(_without(words, i, 1)) for i in range(len(words))}
    return " ".join(words[i] for i in sorted(sorted(falls, key=lambda i: -falls[i])[:size]))


JUDGE = _Lexicon({"win": 2.0, "free": 3.0, "prize": 2.5, "mum": -2.0, "now": 1.0})

most_important = Exercise(
    "6.6",
    _most_important,
    [
        ("win a free phone", JUDGE, 1),
        ("win a free phone from mum and a prize now", JUDGE, 2),
        ("this is not free of charge mum", JUDGE, 1),
        ("win this not free prize of mum now", JUDGE, 2),
        ("free call now free phone for a win", JUDGE, 1),
        ("a prize not free", JUDGE, 1),
        ("win it now with a free chance free as a bird", JUDGE, 3),
        ("free as mum says but the prize comes now", JUDGE, 3),
        ("hello mum", JUDGE, 2),
    ],
    [
        (
            _ranked(lambda words, i, size, score: score(_without(words, i, size))),
            "You take the run after whose removal the score is highest; it should fall the most.",
        ),
        (
            _ranked(lambda words, i, size, score: score(" ".join(words[i : i + size]))),
            "You score each run alone; leave it out, and see what the rest is worth without it.",
        ),
        (_one_by_one, "You leave out one word at a time; leave out `size` neighbors together."),
        (
            _ranked(
                lambda words, i, size, score: abs(
                    score(" ".join(words)) - score(_without(words, i, size))
                )
            ),
            "You take the largest change in either direction; look for the largest fall.",
        ),
        (
            lambda text, score, size: _most_important(
                " ".join(text.split()[:-1]) if len(text.split()) > size else text, score, size
            ),
            "The last run is missing: it begins at len(words) − size.",
        ),
        (
            lambda text, score, size: max(
                score(text) - score(_without(text.split(), i, size))
                for i in range(len(text.split()) - size + 1)
            ),
            "This is how far the score falls; return the words.",
        ),
        (
            lambda text, score, size: _most_important(text, score, size).split(),
            "Return one text: join the words with spaces.",
        ),
        (
            _ranked(
                lambda words, i, size, score: (
                    score(" ".join(words[: i + size])) - score(" ".join(words[:i]))
                )
            ),
            "You look at what the run adds to the words before it; leave it out of the whole text.",
        ),
    ],
)


# 6.7


def _classifier(kind=GPTConfig, n_layers=3) -> GPTForClassification:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = kind(23, 8, d_model=8, n_heads=2, n_layers=n_layers)
        return GPTForClassification(config, 2)


def _rates(model, lr, decay, depth):
    """Return each parameter's rate by its depth below the head, as `depth(name, n_blocks)` says."""
    n = len(model.backbone.blocks)
    return {name: lr * decay ** depth(name, n) for name, _ in model.named_parameters()}


def _depth(name, n, first=1):
    if ".blocks." in name:
        return n - int(name.split(".")[2]) - 1 + first
    return n + first if "embed" in name else 0


def _layer_rates(model, lr, decay):
    return _rates(model, lr, decay, _depth)


layer_rates = Exercise(
    "6.7",
    _layer_rates,
    [(_classifier(), 0.01, 0.5), (_classifier(n_layers=2), 1.0, 0.1), (_classifier(), 1e-3, 1.0)]
    + [(_classifier(n_layers=12), 1.0, 0.5)],
    [
        (
            lambda model, lr, decay: _rates(
                model, lr, decay, lambda name, n: n + 1 - _depth(name, n)
            ),
            "The wrong way round: the head learns fastest, the embedding slowest.",
        ),
        (
            lambda model, lr, decay: _rates(
                model, lr, decay, lambda name, n: _depth(name, n, first=0)
            ),
            "The last block is one step below the head: lr · decay.",
        ),
        (
            lambda model, lr, decay: _rates(
                model, lr, decay, lambda name, n: _depth(name, n) if ".blocks." in name else 0
            ),
            "The embeddings lie below the first block: they learn the slowest.",
        ),
        (
            lambda model, lr, decay: _rates(
                model, lr, decay, lambda name, n: min(_depth(name, n), 1)
            ),
            "You use the factor once; it is multiplied once more for each block down.",
        ),
        (
            lambda model, lr, decay: (
                {
                    name: rate
                    for name, rate in _layer_rates(model, lr, decay).items()
                    if "ln." in name
                }
                | {
                    name: rate
                    for name, rate in _layer_rates(model, lr, decay).items()
                    if "blocks" in name
                }
            ),
            "Some parameters are missing: also those of the embeddings and the head have a rate.",
        ),
        (
            lambda model, lr, decay: _rates(
                model, lr, decay, lambda name, n: _depth(name, n) + (".ln." in name)
            ),
            "The last norm learns at the same rate as the head.",
        ),
        (
            lambda model, lr, decay: _rates(
                model,
                lr,
                decay,
                lambda name, n: (
                    n - int(re.findall(r"\d", name)[0]) if ".blocks." in name else _depth(name, n)
                ),
            ),
            "A block's number may have two digits: name.split('.')[2] is all of it.",
        ),
        (
            lambda model, lr, decay: {
                name: lr - decay * lr * _depth(name, len(model.backbone.blocks))
                for name, _ in model.named_parameters()
            },
            "You subtract; multiply by the factor once for each step down.",
        ),
        (
            lambda model, lr, decay: list(_layer_rates(model, lr, decay).values()),
            "Return a dictionary: the parameter's name → its rate.",
        ),
    ],
)
