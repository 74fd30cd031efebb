"""The exercises of chapter 2, working with text."""

import codecs
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
MANY_SPECIAL = BPETokenizer.train(TEXT * 3, 302, ["<|pad|>", END, "<|user|>"])

# Two of its tokens end within a character: " \xf0" and "\xad\xf0".
BYTES = {bytes([b]): b for b in range(256)}
AWKWARD = BPETokenizer(
    BYTES | {b" \xf0": 256, b"\xad\xf0": 257}, [(b" ", b"\xf0"), (b"\xad", b"\xf0")]
)


# 2.1

TEXTS = ["double trouble", "café 🎭🎭", "xyz", "愛", "a double a double", "🦉 owl", " fire, water"]


def _bytes_per_token(tokenizer, text):
    return len(text.encode()) / len(tokenizer.encode(text))


bytes_per_token = Exercise(
    "2.1",
    _bytes_per_token,
    [(TOKENIZER, text) for text in TEXTS],
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
            lambda tokenizer, text: len(tokenizer.encode(text)) / len(text),
            "The fraction is turned around, and you count characters where bytes are asked for.",
        ),
        (
            lambda tokenizer, text: len(text.encode()) // len(tokenizer.encode(text)),
            "You use // , which drops the fraction. Use / .",
        ),
        (
            lambda tokenizer, text: round(len(text.encode()) / len(tokenizer.encode(text)), 1),
            "Return the number itself, not a rounded one.",
        ),
        (
            lambda tokenizer, text: len(text.encode()) / len(set(tokenizer.encode(text))),
            "You count each distinct token once; count every token of the text.",
        ),
        (
            lambda tokenizer, text: len(text.encode()) / len(text.split()),
            "Divide by the number of tokens, not of words.",
        ),
        (lambda tokenizer, text: len(text.encode()), "Divide by the number of tokens."),
    ],
)


# 2.2


def _pair_counts(words):
    counts = Counter()
    for word, n in words.items():
        for pair in pairwise(word):
            counts[pair] += n
    return counts


def _best_pair(counts):
    return max(counts, key=lambda pair: (counts[pair], pair), default=())


def _top_pair(words):
    return _best_pair(_pair_counts(words))


def _once_a_word(words):
    counts = Counter()
    for word, n in words.items():
        for pair in set(pairwise(word)):
            counts[pair] += n
    return _best_pair(counts)


def _smallest_on_ties(words):
    counts = _pair_counts(words)
    return min(counts, key=lambda pair: (-counts[pair], pair), default=())


def _first_on_ties(words):
    counts = _pair_counts(words)
    return max(counts, key=counts.get, default=())


def _second_unit_on_ties(words):
    counts = _pair_counts(words)
    return max(counts, key=lambda pair: (counts[pair], pair[1]), default=())


top_pair = Exercise(
    "2.2",
    _top_pair,
    [
        ({("l", "o", "w"): 5, ("l", "o"): 2},),
        ({tuple("double"): 2, tuple("trouble"): 1, tuple("bubble"): 1},),
        ({("a", "b"): 1, ("a", "b", "c"): 1, ("x", "y"): 7},),
        ({tuple("banana"): 3, tuple("ab"): 4},),
        ({tuple("ab"): 3, tuple("cd"): 3, tuple("ba"): 1},),
        ({("th", "e"): 3, ("th", "a", "t"): 1},),
        ({("a", "bc"): 2, ("ab", "b"): 2},),
        ({("x", "a"): 2, ("x", "b"): 2},),
        ({("a", "b"): 2, ("z",): 9},),
        ({("a",): 9},),
    ],
    [
        (
            lambda words: _best_pair(_pair_counts(dict.fromkeys(words, 1))),
            "A word's count matters: a word that occurs 7 times adds 7 to each of its pairs.",
        ),
        (_once_a_word, "A pair that stands twice in one word counts twice: “an” in “banana”."),
        (
            lambda words: _top_pair({tuple(u for w, n in words.items() for u in w * n): 1}),
            "A pair must lie inside one word; you also count pairs across two words.",
        ),
        (_smallest_on_ties, "Among equally frequent pairs the alphabetically last wins."),
        (
            _first_on_ties,
            "Among equally frequent pairs the alphabetically last wins; you take the first found.",
        ),
        (_second_unit_on_ties, "For ties compare first units before you compare second units."),
        (
            lambda words: (_top_pair(words), _pair_counts(words)[_top_pair(words)]),
            "Return the pair alone, without its count.",
        ),
        (lambda words: "".join(_top_pair(words)), "Return the pair as two units, not joined."),
        (lambda words: _top_pair(words) or None, "If no word has two units, return ()."),
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


def _bytes_complete(tokenizer, ids):
    """Show at once what is complete; hold back the bytes of the unfinished character alone."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    token_of = {i: token for token, i in tokenizer.vocab.items()}
    return [decoder.decode(token_of[i]) for i in ids]


def _drops_unfinished(tokenizer, ids):
    texts = [tokenizer.decode([i]) for i in ids]
    return ["" if "\ufffd" in text else text for text in texts]


def _all_so_far(tokenizer, ids):
    texts = [tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
    return ["" if text.endswith("\ufffd") else text for text in texts]


stream_text = Exercise(
    "2.3",
    _stream_text,
    [
        (TOKENIZER, list("é!".encode())),
        (TOKENIZER, TOKENIZER.encode("double trouble, naïve!")),
        (TOKENIZER, TOKENIZER.encode("a 愛 of 🦉🦉 owls")),
        (AWKWARD, AWKWARD.encode("a 🎭🎭 b")),
        (TOKENIZER, []),
    ],
    [
        (
            lambda tokenizer, ids: [tokenizer.decode([i]) for i in ids],
            "You decode each token alone, so half a character shows as �. Wait for the rest.",
        ),
        (
            _drops_unfinished,
            "You drop the bytes of unfinished characters; keep them until the rest.",
        ),
        (_all_so_far, "You give the whole text so far each time; give only what is new."),
        (
            lambda tokenizer, ids: [tokenizer.decode(ids[: n + 1]) for n in range(len(ids))],
            "You give the whole text so far each time, with half characters; give what is new.",
        ),
        (
            lambda tokenizer, ids: [text for text in _stream_text(tokenizer, ids) if text],
            "Give one string for each id: an empty one while a character is unfinished.",
        ),
        (
            lambda tokenizer, ids: list(tokenizer.decode(ids)),
            "Give one string for each id, not one for each character.",
        ),
    ],
    others=[_bytes_complete],
)


# 2.4

NEAR_A = torch.tensor([[1.0, 0.0], [4.0, 0.4], [0.2, 1.0], [1.0, 1.2], [-1.0, 1.0]])
ALL_NEGATIVE = torch.tensor(
    [[1.0, 0.0], [1.0, 1.0], [2.0, 1.0], [-1.0, -1.2], [-1.0, 0.3], [-1.0, -0.2]]
)


def _vectors(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = 0.2 + 3 * torch.rand(40, 1, generator=generator)
    return torch.randn(40, 6, generator=generator) * lengths


def _scores(vectors, target):
    return F.normalize(vectors, dim=-1) @ target


def _target(vectors, a, b, c):
    return vectors[b] - vectors[a] + vectors[c]


def _best_row(scores, exclude, fill=-torch.inf):
    scores = scores.clone()
    scores[list(exclude)] = fill
    return scores.argmax().item()


def _analogy(vectors, a, b, c):
    return _best_row(_scores(vectors, _target(vectors, a, b, c)), (a, b, c))


def _deleted_rows(vectors, a, b, c):
    others = [i for i in range(len(vectors)) if i not in (a, b, c)]
    return _scores(vectors[others], _target(vectors, a, b, c)).argmax().item()


analogy = Exercise(
    "2.4",
    _analogy,
    [(_vectors(seed), seed % 40, (seed + 7) % 40, (seed + 19) % 40) for seed in range(12)]
    + [(NEAR_A, 0, 1, 2), (ALL_NEGATIVE, 0, 1, 2)],
    [
        (
            lambda v, a, b, c: _best_row(_scores(v, _target(v, a, b, c)), ()),
            "The answer may not be a, b or c itself: leave these three rows out.",
        ),
        (
            lambda v, a, b, c: _best_row(_scores(v, _target(v, a, b, c)), (b, c)),
            "You leave out b and c, but a may not be the answer either.",
        ),
        (
            lambda v, a, b, c: _best_row(_scores(v, _target(v, b, a, c)), (a, b, c)),
            "The sign is turned around: the target is b − a + c.",
        ),
        (
            lambda v, a, b, c: _best_row(_scores(v, v[a] + v[b] - v[c]), (a, b, c)),
            "You computed a + b − c; the target is b − a + c.",
        ),
        (
            lambda v, a, b, c: _best_row(v @ _target(v, a, b, c), (a, b, c)),
            "A plain product favors long rows; normalize the rows to compare directions.",
        ),
        (
            lambda v, a, b, c: _analogy(F.normalize(v, dim=-1), a, b, c),
            "Build b − a + c from the rows as they are; normalize only for the comparison.",
        ),
        (
            lambda v, a, b, c: _best_row(-(v - _target(v, a, b, c)).norm(dim=1), (a, b, c)),
            "You take the smallest distance; the exercise asks for the greatest cosine.",
        ),
        (
            lambda v, a, b, c: _best_row(-_scores(v, _target(v, a, b, c)), (a, b, c)),
            "You take the smallest cosine; the greatest is asked for.",
        ),
        (
            lambda v, a, b, c: _best_row(_scores(v, _target(v, a, b, c)), (a, b, c), fill=0),
            "A score of 0 does not exclude a row where all cosines are negative; use −∞.",
        ),
        (
            _deleted_rows,
            "Deleting rows changes the numbers of those behind them; set scores to −∞.",
        ),
    ],
)


# 2.5


def _turn(vector, k, sine_sign=1, cosine_sign=-1, exponent=1.0, halves=False):
    """Turn every hand by its angle; the options are typical slips."""
    angle = k * 10_000 ** (-exponent * torch.arange(0, len(vector), 2) / len(vector))
    sines, cosines = vector.chunk(2) if halves else (vector[0::2], vector[1::2])
    new_sines = sines * angle.cos() + sine_sign * cosines * angle.sin()
    new_cosines = cosines * angle.cos() + cosine_sign * sines * angle.sin()
    return torch.stack([new_sines, new_cosines], dim=-1)


def _shift_position(vector, k):
    return _turn(vector, k).flatten()


def _overwritten(vector, k):
    angle = k * 10_000 ** (-torch.arange(0, len(vector), 2) / len(vector))
    sines = vector[0::2] * angle.cos() + vector[1::2] * angle.sin()
    cosines = vector[1::2] * angle.cos() - sines * angle.sin()
    return torch.stack([sines, cosines], dim=-1).flatten()


shift_position = Exercise(
    "2.5",
    _shift_position,
    [(sinusoidal_positions(50, 16)[t], k) for t, k in ((3, 5), (0, 1), (20, 17), (30, -4))],
    [
        (lambda v, k: _turn(v, -k).flatten(), "You turn the hands backward: check both signs."),
        (
            lambda v, k: _turn(v, k, sine_sign=-1).flatten(),
            "The sign in the new sine is wrong: sin · cos(ωk) + cos · sin(ωk).",
        ),
        (
            lambda v, k: _turn(v, k, cosine_sign=1).flatten(),
            "The sign in the new cosine is wrong: cos · cos(ωk) − sin · sin(ωk).",
        ),
        (_overwritten, "You use the new sines for the cosines: keep the old ones for both."),
        (
            lambda v, k: _turn(v, k, exponent=0).flatten(),
            "Every hand has its own speed: ω is 10000^(−2i/C).",
        ),
        (
            lambda v, k: _turn(v, k, exponent=2).flatten(),
            "Check the speeds: hand i has 10000^(−2i/C), and arange(0, C, 2) is 2i already.",
        ),
        (
            lambda v, k: _turn(v, k, halves=True).T.flatten(),
            "Sines and cosines stand in turn (sin, cos, sin, cos, …), not in two halves.",
        ),
        (
            lambda v, k: _turn(v, k).T.flatten(),
            "The values are right but in the wrong order: interleave sines and cosines.",
        ),
        (
            lambda v, k: _turn(v, k).flip(1).flatten(),
            "Sines stand at the even places and cosines at the odd ones; you have them swapped.",
        ),
        (_turn, "The values are right, but one row is asked for: flatten them."),
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
    [(10, 4, 2), (10, 4, 4), (9, 4, 4), (5, 4, 1), (4, 4, 1), (4, 4, 2), (2, 4, 1), (65, 64, 64)],
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
            lambda n, t, s: max(0, int((n - t - 1) / s) + 1),
            "int() rounds toward 0, so −1 / 2 becomes 0; // rounds down.",
        ),
        (
            lambda n, t, s: max(0, (n - t - 1) / s + 1),
            "The number of windows is whole: divide with // .",
        ),
        (
            lambda n, t, s: max(1, (n - t - 1) // s + 1),
            "A text may be too short for any window: then return 0.",
        ),
        (
            lambda n, t, s: (n - t - 1) // s + 1 if n > t else None,
            "Where there is no window, the number of windows is 0, not None.",
        ),
        (lambda n, t, s: n // t, "Windows may overlap: the stride says where the next one starts."),
        (
            lambda n, t, s: (n - 1) // t,
            "Windows may overlap, so the stride must be part of the answer.",
        ),
        (lambda n, t, s: -(-n // s), "A window needs room: not every start has a whole one."),
    ],
)


# 2.7


def _end(tokenizer):
    return tokenizer.special_tokens[END]


def _join(tokenizer, documents, first=False, last=False):
    ids = []
    for i, document in enumerate(documents):
        ids += [_end(tokenizer)] * (i > 0 or first) + tokenizer.encode(document)
    return ids + [_end(tokenizer)] * last


def _join_documents(tokenizer, documents):
    return _join(tokenizer, documents)


def _guarded(tokenizer, documents):
    ids = []
    for document in documents:
        ids += [_end(tokenizer)] * bool(ids) + tokenizer.encode(document)
    return ids


def _other_end(tokenizer, documents, other):
    return [other if i == _end(tokenizer) else i for i in _join(tokenizer, documents)]


join_documents = Exercise(
    "2.7",
    _join_documents,
    [
        (TOKENIZER, ["double trouble", "fire burn"]),
        (TOKENIZER, ["one", "two <|endoftext|> three", "four"]),
        (TOKENIZER, ["alone"]),
        (MANY_SPECIAL, ["", "fire", "fire", ""]),
        (MANY_SPECIAL, [" burn ", "", "toil"]),
        (MANY_SPECIAL, []),
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
        (
            _guarded,
            "“if ids” asks whether there are ids yet; after an empty document there are none.",
        ),
        (
            lambda tokenizer, documents: _join(tokenizer, [d for d in documents if d]),
            "An empty document is a document too: its separator must stay.",
        ),
        (
            lambda tokenizer, documents: _join(tokenizer, [d.replace(END, "") for d in documents]),
            "Keep what people wrote: encode <|endoftext|> in a document as mere text.",
        ),
        (
            lambda tokenizer, documents: _other_end(tokenizer, documents, 50256),
            "50256 is GPT-2's id; ask this tokenizer for its own.",
        ),
        (
            lambda tokenizer, documents: _other_end(
                tokenizer, documents, min(tokenizer.special_tokens.values())
            ),
            "The tokenizer has several special tokens: ask for this one by its name.",
        ),
    ],
)
