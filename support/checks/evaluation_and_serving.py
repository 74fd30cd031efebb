"""The exercises of appendix B, evaluation and serving."""

import heapq
import math

import torch

from support.checks import Exercise
from support.evaluate import windows

# B.1


def _context_of(t, n, window, stride):
    for context, continuation in windows(range(n), window, stride):
        if t in continuation:
            return len(context) + continuation.index(t)
    return 0


def _by_hand(t, n, window, stride, end_at=None):
    if t <= window:
        return t
    end = window + math.ceil((t - window) / stride) * stride
    return t - (min(end, n - 1) - window)


context_of = Exercise(
    "B.1",
    _context_of,
    [(3, 12, 4, 2), (5, 12, 4, 2), (6, 12, 4, 2), (11, 12, 4, 2), (17, 30, 8, 4), (29, 30, 8, 8)]
    + [(1, 5, 4, 4), (25, 27, 8, 3)],
    [
        (
            lambda t, n, window, stride: min(t, window),
            "This would need a window of its own for each token, a stride of 1.",
        ),
        (
            lambda t, n, window, stride: _by_hand(t, 10**9, window, stride),
            "The last window ends with the text, at n − 1, so it reaches further back.",
        ),
        (
            lambda t, n, window, stride: _context_of(t, n, window, stride) + 1,
            "You count the token itself; its context is what comes before it.",
        ),
        (
            lambda t, n, window, stride: t if t <= window else (t - window - 1) % window + 1,
            "You begin each window anew: but a later window looks back over tokens already scored.",
        ),
        (
            lambda t, n, window, stride: (
                t if t <= window else window - stride + (t - window - 1) % stride
            ),
            "One too few: the first token of a window that scores `stride` tokens has "
            "window − stride + 1 before it.",
        ),
        (
            lambda t, n, window, stride: t if t <= window else window - stride + 1,
            "This is the context of the first token that a window scores; each later one has one "
            "more.",
        ),
        (
            lambda t, n, window, stride: window,
            "Only the last token of a window has all of it for a context.",
        ),
        (
            lambda t, n, window, stride: t,
            "The model never sees more than `window` tokens.",
        ),
    ],
    others=[_by_hand],
)


# B.2


def _pass_at_k(n, c, k):
    return 1 - math.comb(n - c, k) / math.comb(n, k)


pass_at_k = Exercise(
    "B.2",
    _pass_at_k,
    [(10, 3, 1), (10, 3, 5), (5, 0, 2), (4, 4, 2), (10, 8, 5), (200, 1, 100), (2000, 40, 100)],
    [
        (
            lambda n, c, k: c / n,
            "This is pass@1: with k tries there are more chances.",
        ),
        (
            lambda n, c, k: 1 - (1 - c / n) ** k,
            "This draws with replacement, as if one try could be taken twice: the estimate comes "
            "out too low.",
        ),
        (
            lambda n, c, k: math.comb(n - c, k) / math.comb(n, k),
            "This is the probability that all k fail: take it from 1.",
        ),
        (
            lambda n, c, k: math.comb(c, k) / math.comb(n, k),
            "This is the probability that all k are right; one is enough.",
        ),
        (
            lambda n, c, k: min(1.0, k * c / n),
            "Probabilities of events that can happen together do not add up.",
        ),
        (
            lambda n, c, k: 1 - math.comb(n - 1, k) / math.comb(n, k),
            "The c right ones must all be missed, not one of them: choose from n − c.",
        ),
        (
            lambda n, c, k: float(c > 0),
            "That one try was right is not certain to be among the k that you draw.",
        ),
    ],
)


# B.3


def _users(memory, weights, layers, kv_heads, d_head, tokens, bytes_per_number):
    each = 2 * layers * kv_heads * d_head * tokens * bytes_per_number
    return max(0, (memory - weights) // each)


GPU = 24 * 10**9
users = Exercise(
    "B.3",
    _users,
    [
        (1000, 200, 1, 1, 10, 5, 4),
        (1000, 999, 1, 1, 10, 5, 4),
        (GPU, 16 * 10**9, 32, 8, 128, 4096, 2),
        (GPU, 13 * 10**9, 32, 32, 128, 2048, 2),
        (GPU, 30 * 10**9, 32, 8, 128, 4096, 2),
    ],
    [
        (
            lambda memory, weights, layers, kv_heads, d_head, tokens, size: max(
                0, (memory - weights) // (layers * kv_heads * d_head * tokens * size)
            ),
            "There are keys and values: two numbers for each place.",
        ),
        (
            lambda memory, weights, *rest: _users(memory, 0, *rest),
            "The weights lie in the same memory: take them off first.",
        ),
        (
            lambda memory, weights, layers, kv_heads, d_head, tokens, size: (
                (memory - weights) // (2 * layers * kv_heads * d_head * tokens * size)
            ),
            "Where not even the weights fit, nobody can be served: 0, not a negative number.",
        ),
        (
            lambda memory, weights, layers, kv_heads, d_head, tokens, size: max(
                0, math.ceil((memory - weights) / (2 * layers * kv_heads * d_head * tokens * size))
            ),
            "Round down: half a cache is of no use.",
        ),
        (
            lambda memory, weights, layers, kv_heads, d_head, tokens, size: max(
                0, (memory - weights) / (2 * layers * kv_heads * d_head * tokens * size)
            ),
            "Return a whole number of users: // rounds down.",
        ),
        (
            lambda memory, weights, layers, kv_heads, d_head, tokens, size: max(
                0, (memory - weights) // (2 * layers * kv_heads * d_head * tokens)
            ),
            "These are numbers; each takes bytes_per_number bytes.",
        ),
        (
            lambda memory, weights, layers, kv_heads, d_head, tokens, size: max(
                0, (memory - weights) // (2 * layers * kv_heads * d_head * size)
            ),
            "This is how many tokens fit; each user has `tokens` of them.",
        ),
        (
            lambda memory, weights, layers, kv_heads, d_head, tokens, size: max(
                0, (memory - weights) // (2 * kv_heads * d_head * tokens * size)
            ),
            "Every layer has a cache of its own.",
        ),
    ],
)


# B.4


def _steps(lengths, places):
    free_at = [0] * places
    for length in lengths:
        heapq.heapreplace(free_at, free_at[0] + length)
    return max(free_at)


def _static(lengths, places):
    return sum(max(lengths[i : i + places]) for i in range(0, len(lengths), places))


def _one_late(lengths, places):
    free_at, last = [0] * places, 0
    for length in lengths:
        start = free_at[0]
        last = max(last, start + length)
        heapq.heapreplace(free_at, start + length + 1)
    return last


def _round_robin(lengths, places):
    return max(sum(lengths[i::places]) for i in range(places))


steps = Exercise(
    "B.4",
    _steps,
    [
        ([3, 1, 2], 2),
        ([5, 1, 1, 1, 1, 1], 2),
        ([4, 4, 4], 5),
        ([2, 7, 1, 8, 2, 8, 1, 8], 3),
        ([1, 1, 9], 2),
        ([6], 1),
        ([3, 1, 4, 1, 5, 9, 2, 6], 1),
    ],
    [
        (
            _static,
            "This is static batching: a new request need not wait until the whole batch is done.",
        ),
        (
            lambda lengths, places: math.ceil(sum(lengths) / places),
            "The work does not always divide evenly: a long text cannot be spread over places.",
        ),
        (
            lambda lengths, places: max(lengths),
            "This would need a place for each of them at once.",
        ),
        (
            lambda lengths, places: sum(lengths),
            "This is one after the other; `places` of them run at the same time.",
        ),
        (
            lambda lengths, places: _steps(sorted(lengths, reverse=True), places),
            "Requests come in the order of the list: do not sort them.",
        ),
        (
            _round_robin,
            "You deal the requests out beforehand; each goes to the place that is free first.",
        ),
        (
            _one_late,
            "A place that becomes free after a step is taken before the next one.",
        ),
    ],
)


# B.5


def _groups(row, group, largest=7, rounding=torch.round):
    parts = row.view(-1, group)
    scale = parts.abs().amax(dim=1, keepdim=True) / largest
    scale = torch.where(scale == 0, 1.0, scale)
    return (rounding(parts / scale) * scale).flatten()


def _random(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def _wide(row, group):
    scale = row.view(-1, group).amax(dim=1, keepdim=True) / 7
    return ((row.view(-1, group) / scale).round() * scale).flatten()


int4 = Exercise(
    "B.5",
    _groups,
    [
        (torch.tensor([0.7, 0.11, -7.0, 2.4]), 2),
        (torch.tensor([0.0, 0.0, 1.0, -0.3]), 2),
        (_random(32), 8),
        (_random(24, 1) * torch.tensor([100.0, 1, 1]).repeat_interleave(8), 8),
        (_random(6, 2), 6),
    ],
    [
        (
            lambda row, group: _groups(row, len(row)),
            "You use one scale for the whole row; each group has its own.",
        ),
        (
            lambda row, group: _groups(row, group, 127),
            "127 is the largest number of eight bits; with four bits, the same on both sides, it "
            "is 7.",
        ),
        (
            lambda row, group: _groups(row, group, 8),
            "Four bits go from −8 to 7: to have the same on both sides of 0, use 7.",
        ),
        (
            lambda row, group: _groups(row, group, 15),
            "Half of the 16 numbers are negative: the largest is 7.",
        ),
        (
            lambda row, group: row,
            "Nothing is rounded here: divide by the scale, round, multiply by it again.",
        ),
        (
            lambda row, group: _groups(row, group, rounding=torch.trunc),
            "You cut the decimals off; round to the nearest whole number.",
        ),
        (
            lambda row, group: _groups(row, group, rounding=torch.floor),
            "You round down; round to the nearest whole number.",
        ),
        (
            _wide,
            "The largest without its sign counts: take abs() before the maximum.",
        ),
        (
            lambda row, group: (
                (
                    row.view(-1, group)
                    / (row.view(-1, group).abs().amax(dim=1, keepdim=True) / 7).clamp(min=1e-9)
                )
                .round()
                .flatten()
            ),
            "These are the whole numbers: multiply them by their scale to get the weights back.",
        ),
        (
            lambda row, group: (
                (
                    row.view(-1, group) / (row.view(-1, group).abs().amax(dim=1, keepdim=True) / 7)
                ).round()
                * (row.view(-1, group).abs().amax(dim=1, keepdim=True) / 7)
            ).flatten(),
            "A group of zeros has scale 0, and 0 / 0 is NaN: use scale 1 there.",
        ),
    ],
)


# B.6


def _overlap(text, stop):
    return max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def _safe_text(text, stops):
    return text[: len(text) - max((_overlap(text, stop) for stop in stops), default=0)]


def _shortest(text, stops):
    found = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return text[: len(text) - min(found, default=0)]


def _anywhere(text, stops):
    places = [text.find(stop[0]) for stop in stops if stop[0] in text]
    return text[: min(places)] if places else text


safe_text = Exercise(
    "B.6",
    _safe_text,
    [
        ("The end", ["\n\n", "END"]),
        ("The EN", ["\n\n", "END"]),
        ("one\n", ["\n\n"]),
        ("I see ST", ["STOP"]),
        ("a b ab", ["abad"]),
        ("aba", ["abac", "bad"]),
        ("aXb X", ["XY"]),
        ("word", []),
        ("###", ["####"]),
        ("yes. No", ["No.", "!"]),
    ],
    [
        (
            lambda text, stops: text,
            "The end of the text may be the beginning of a stop sequence: hold it back.",
        ),
        (
            lambda text, stops: text[: len(text) - max((len(s) - 1 for s in stops), default=0)],
            "You always hold back the longest stop sequence less one; only what could be the "
            "beginning of one has to wait.",
        ),
        (
            lambda text, stops: _safe_text(text, stops[:1]),
            "You look at the first stop sequence only.",
        ),
        (
            lambda text, stops: text[:-1] if any(text.endswith(s[0]) for s in stops) else text,
            "More than one letter can be the beginning: try every length.",
        ),
        (
            _shortest,
            "Of several beginnings that fit, hold back the longest.",
        ),
        (
            _anywhere,
            "A beginning counts only at the end of the text: what goes on otherwise is harmless.",
        ),
        (
            lambda text, stops: text[len(_safe_text(text, stops)) :],
            "This is what has to wait; return the text before it.",
        ),
        (
            lambda text, stops: len(_safe_text(text, stops)),
            "This is how many letters are sure; return the text.",
        ),
    ],
)
