"""The exercises of chapter 2, working with text."""

from collections import Counter
from itertools import pairwise

import torch
import torch.nn.functional as F

from support.checks import Exercise
from support.embeddings import sinusoidal_positions
from support.tokenizer import BPETokenizer

END = "<|endoftext|>"
TEXT = "double double toil and trouble fire burn and cauldron bubble naïve café 🎭 愛 "
TOKENIZER = BPETokenizer.train(TEXT * 3, 300, [END])


# 2.1


def _bytes_per_token(tokenizer, text):
    return len(text.encode()) / len(tokenizer.encode(text))


bytes_per_token = Exercise(
    "2.1",
    _bytes_per_token,
    [
        (TOKENIZER, text)
        for text in ("double trouble", "café 🎭🎭", "xyz", "愛", "a double a double")
    ],
    [
        (
            lambda tokenizer, text: len(text) / len(tokenizer.encode(text)),
            "You count characters, but “é” is two bytes. Encode the text to UTF-8 first.",
        ),
        (
            lambda tokenizer, text: len(tokenizer.encode(text)) / len(text.encode()),
            "You divide the tokens by the bytes; it is the other way round.",
        ),
        (
            lambda tokenizer, text: len(text.encode()) // len(tokenizer.encode(text)),
            "You use // , which drops the fraction. Use / .",
        ),
        (
            lambda tokenizer, text: len(text.encode()) / len(set(tokenizer.encode(text))),
            "You count each distinct token once; count every token of the text.",
        ),
    ],
)


# 2.2


def _pair_counts(words, weighted=True):
    counts = Counter()
    for word, n in words.items():
        for pair in pairwise(word):
            counts[pair] += n if weighted else 1
    return counts


def _top_pair(words):
    counts = _pair_counts(words)
    return max(counts, key=lambda pair: (counts[pair], pair), default=())


def _smallest_on_ties(words):
    counts = _pair_counts(words)
    return min(counts, key=lambda pair: (-counts[pair], pair), default=())


def _first_on_ties(words):
    counts = _pair_counts(words)
    return max(counts, key=counts.get, default=())


def _unweighted(words):
    counts = _pair_counts(words, weighted=False)
    return max(counts, key=lambda pair: (counts[pair], pair), default=())


def _once_a_word(words):
    counts = Counter()
    for word, n in words.items():
        for pair in set(pairwise(word)):
            counts[pair] += n
    return max(counts, key=lambda pair: (counts[pair], pair), default=())


def _across_words(words):
    row = [unit for word, n in words.items() for unit in word * n]
    counts = Counter(pairwise(row))
    return max(counts, key=lambda pair: (counts[pair], pair), default=())


top_pair = Exercise(
    "2.2",
    _top_pair,
    [
        ({("l", "o", "w"): 5, ("l", "o"): 2},),
        ({tuple("double"): 2, tuple("trouble"): 1, tuple("bubble"): 1},),
        ({("a", "b"): 1, ("a", "b", "c"): 1, ("x", "y"): 7},),
        ({tuple("banana"): 3, tuple("ab"): 4},),
        ({tuple("ab"): 3, tuple("cd"): 3, tuple("ba"): 1},),
        ({("a",): 9},),
    ],
    [
        (
            _unweighted,
            "A word's count matters: a word that occurs 7 times adds 7 to each of its pairs.",
        ),
        (_once_a_word, "A pair that stands twice in one word counts twice: “an” in “banana”."),
        (_across_words, "A pair must lie inside one word; you also count pairs across two words."),
        (
            _smallest_on_ties,
            "Among equally frequent pairs the alphabetically last wins, not the first.",
        ),
        (
            _first_on_ties,
            "Among equally frequent pairs the alphabetically last wins; you take the first found.",
        ),
    ],
)


# 2.3


def _stream_text(tokenizer, ids):
    shown, waiting = [], []
    for i in ids:
        waiting.append(i)
        text = tokenizer.decode(waiting)
        if text.endswith("\ufffd"):
            shown.append("")
        else:
            shown.append(text)
            waiting = []
    return shown


def _each_alone(tokenizer, ids):
    return [tokenizer.decode([i]) for i in ids]


def _drops_unfinished(tokenizer, ids):
    return ["" if "\ufffd" in tokenizer.decode([i]) else tokenizer.decode([i]) for i in ids]


def _all_so_far(tokenizer, ids):
    texts = [tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
    return ["" if text.endswith("\ufffd") else text for text in texts]


def _skips_empty(tokenizer, ids):
    return [text for text in _stream_text(tokenizer, ids) if text]


stream_text = Exercise(
    "2.3",
    _stream_text,
    [
        (TOKENIZER, list("é!".encode())),
        (TOKENIZER, TOKENIZER.encode("double trouble, naïve!")),
        (TOKENIZER, TOKENIZER.encode("a 愛 of 🦉🦉 owls")),
        (TOKENIZER, []),
    ],
    [
        (
            _each_alone,
            "You decode each token alone, so half a character shows as �. Wait for the rest.",
        ),
        (
            _drops_unfinished,
            "You drop the bytes of unfinished characters; keep them until the rest comes.",
        ),
        (_all_so_far, "You give the whole text so far each time; give only what is new."),
        (
            _skips_empty,
            "Give one string for each id: an empty one while a character is unfinished.",
        ),
    ],
)


# 2.4


def _analogy_scores(vectors, a, b, c):
    return F.normalize(vectors, dim=-1) @ (vectors[b] - vectors[a] + vectors[c])


def _best(scores, exclude):
    scores = scores.clone()
    scores[list(exclude)] = -torch.inf
    return scores.argmax().item()


def _analogy(vectors, a, b, c):
    return _best(_analogy_scores(vectors, a, b, c), (a, b, c))


def _wrong_sign(vectors, a, b, c):
    return _best(_analogy_scores(vectors, b, a, c), (a, b, c))


def _normalized_parts(vectors, a, b, c):
    return _analogy(F.normalize(vectors, dim=-1), a, b, c)


def _vectors(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = 0.2 + 3 * torch.rand(40, 1, generator=generator)
    return torch.randn(40, 6, generator=generator) * lengths


analogy = Exercise(
    "2.4",
    _analogy,
    [(_vectors(seed), seed % 40, (seed + 7) % 40, (seed + 19) % 40) for seed in range(12)],
    [
        (
            lambda v, a, b, c: _analogy_scores(v, a, b, c).argmax().item(),
            "The answer may not be a, b or c itself: leave these three rows out.",
        ),
        (_wrong_sign, "The sign is turned around: the target is b − a + c."),
        (
            lambda v, a, b, c: _best(v @ (v[b] - v[a] + v[c]), (a, b, c)),
            "A plain product favors long rows; normalize the rows to compare directions.",
        ),
        (
            _normalized_parts,
            "Build b − a + c from the rows as they are; normalize only for the comparison.",
        ),
        (
            lambda v, a, b, c: _best(-torch.cdist(v, (v[b] - v[a] + v[c])[None])[:, 0], (a, b, c)),
            "You take the smallest distance; the exercise asks for the greatest cosine.",
        ),
    ],
)


# 2.5


def _shift(vector, k, sign=1, scale=True, halves=False):
    n = len(vector)
    speed = 10_000 ** (-torch.arange(0, n, 2) / n) if scale else torch.ones(n // 2)
    angle = sign * speed * k
    sines, cosines = vector.chunk(2) if halves else (vector[0::2], vector[1::2])
    new_sines = sines * angle.cos() + cosines * angle.sin()
    new_cosines = cosines * angle.cos() - sines * angle.sin()
    if halves:
        return torch.cat([new_sines, new_cosines])
    return torch.stack([new_sines, new_cosines], dim=-1).flatten()


def _shift_position(vector, k):
    return _shift(vector, k)


shift_position = Exercise(
    "2.5",
    _shift_position,
    [(sinusoidal_positions(50, 16)[t], k) for t, k in ((0, 1), (3, 5), (20, 17), (30, -4))],
    [
        (
            lambda v, k: _shift(v, k, sign=-1),
            "You turn the hands backward: check the signs of the sines.",
        ),
        (
            lambda v, k: _shift(v, k, scale=False),
            "Every hand has its own speed: ω is 10000^(−2i/C).",
        ),
        (
            lambda v, k: _shift(v, k, halves=True),
            "Sines and cosines stand in turn (sin, cos, sin, cos, …), not in two halves.",
        ),
        (
            lambda v, k: torch.cat([_shift(v, k)[0::2], _shift(v, k)[1::2]]),
            "The values are right but in the wrong order: put sines and cosines in turn.",
        ),
        (
            lambda v, k: v + sinusoidal_positions(abs(k) + 1, len(v))[abs(k)],
            "Adding position k does not move by k; the hands have to be turned.",
        ),
    ],
)


# 2.6


def _window_count(n_tokens, context_length, stride):
    return max(0, (n_tokens - context_length - 1) // stride + 1)


window_count = Exercise(
    "2.6",
    _window_count,
    [(10, 4, 2), (10, 4, 4), (9, 4, 4), (5, 4, 1), (4, 4, 1), (2, 4, 1), (100, 7, 3), (65, 64, 64)],
    [
        (
            lambda n, t, s: max(0, (n - t) // s + 1),
            "You forget that the target ends one token later than the input.",
        ),
        (
            lambda n, t, s: max(0, (n - t - 1) // s),
            "One window is missing: the first one needs no stride before it.",
        ),
        (
            lambda n, t, s: (n - t - 1) // s + 1,
            "Your number is below zero for a short text; there may be no window, but not fewer.",
        ),
        (
            lambda n, t, s: max(0, -(-(n - t - 1) // s) + 1),
            "You round up, and count a last window that is not whole.",
        ),
        (
            lambda n, t, s: max(0, (n - t - 1) / s + 1),
            "The number of windows is whole: divide with // .",
        ),
        (
            lambda n, t, s: n // t,
            "Windows may overlap: the stride decides where the next one starts.",
        ),
    ],
)


# 2.7


def _join(tokenizer, documents, first=False, last=False):
    ids, end = [], tokenizer.special_tokens[END]
    for i, document in enumerate(documents):
        ids += [end] * (i > 0 or first) + tokenizer.encode(document)
    return ids + [end] * last


def _join_documents(tokenizer, documents):
    return _join(tokenizer, documents)


join_documents = Exercise(
    "2.7",
    _join_documents,
    [
        (TOKENIZER, ["double trouble", "fire burn"]),
        (TOKENIZER, ["one", "two <|endoftext|> three", "four"]),
        (TOKENIZER, ["alone"]),
    ],
    [
        (
            lambda tokenizer, documents: tokenizer.encode(
                END.join(documents), allowed_special="all"
            ),
            "A document that contains <|endoftext|> fakes an end. Encode each document by itself.",
        ),
        (
            lambda tokenizer, documents: tokenizer.encode(END.join(documents)),
            "Your separators were read as mere text. Put the special token's id between the ids.",
        ),
        (
            lambda tokenizer, documents: _join(tokenizer, documents, last=True),
            "The token stands between two documents, not after the last.",
        ),
        (
            lambda tokenizer, documents: _join(tokenizer, documents, first=True),
            "The token stands between two documents, not before the first.",
        ),
        (
            lambda tokenizer, documents: tokenizer.encode("".join(documents)),
            "There is no separator between the documents.",
        ),
        (
            lambda tokenizer, documents: [tokenizer.encode(document) for document in documents],
            "Return one row of ids, not a list of rows.",
        ),
    ],
)
