"""Real text messages, spam and ham, made ready: cleaned, and split so that no test has leaked.

Almeida, Gómez Hidalgo and Yamakami, Contributions to the Study of SMS Spam Filtering, 2011.
"""

import html
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise

import numpy as np
import pandas as pd

from support.data import load_text

# Who collected the ham took out what could tell on people; of the spam nothing was taken out. So
# the marks that were left in its place would give the label away.
MARKS = {
    "<#>": "15",
    "<DECIMAL>": "2.50",
    "<TIME>": "7:30",
    "<URL>": "www.example.com",
    "<EMAIL>": "me@example.com",
}


def load_messages() -> pd.DataFrame:
    """Return the 4,862 messages as they were published: columns `label` ("ham", "spam"), `text`."""
    lines = load_text("sms-spam").removesuffix("\n").split("\n")  # quotation marks are text here
    return pd.DataFrame([line.split("\t") for line in lines], columns=["label", "text"])


def clean(text: str) -> str:
    """Return a message as it was sent: no HTML, a value for each mark, single spaces."""
    text = html.unescape(text)
    for mark, value in MARKS.items():
        text = text.replace(mark, value)
    return " ".join(text.split())


# ---- near-duplicates ----------------------------------------------------------------------------


def skeleton(text: str) -> str:
    """Return a message without capitals, punctuation and spaces, each digit as 0."""
    return re.sub(r"[\W_]", "", re.sub(r"\d", "0", text.lower()))


def word_pairs(text: str) -> frozenset:
    """Return the pairs of neighboring words, each digit as 0; of a single word, that word."""
    words = re.findall(r"\w+", re.sub(r"\d", "0", text.lower()))
    return frozenset(pairwise(words)) or frozenset([tuple(words)])


def jaccard(a: frozenset, b: frozenset) -> float:
    """Return how much of what either has both have, 0 to 1. Jaccard, 1901."""
    return len(a & b) / len(a | b)


def near_duplicates(texts: Sequence[str], threshold: float = 0.5) -> dict[tuple[int, int], float]:
    """Return the pairs (i, j), i < j, that are nearly the same, and their likeness.

    That is 1 for the same skeleton, and else the Jaccard index of their word pairs, if that is at
    least `threshold`. Broder, On the Resemblance and Containment of Documents, 1997, section 2.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must be above 0 and at most 1.")
    pairs, with_pair, with_skeleton = list(map(word_pairs, texts)), defaultdict(list), {}
    found = {}
    for i, text in enumerate(texts):
        for pair in pairs[i]:
            with_pair[pair].append(i)
        if bare := skeleton(text):
            with_skeleton.setdefault(bare, []).append(i)
    shared = Counter()  # only messages that share a word pair are compared
    for rows in with_pair.values():
        shared.update(combinations(rows, 2))
    for (i, j), n in shared.items():
        if (likeness := n / (len(pairs[i]) + len(pairs[j]) - n)) >= threshold:
            found[i, j] = likeness
    for rows in with_skeleton.values():
        found |= dict.fromkeys(combinations(rows, 2), 1.0)
    return found


def group(n: int, pairs) -> np.ndarray:
    """Return for each of n messages the first one that it is connected to by `pairs`, (n,)."""
    first = list(range(n))

    def root(i):
        while first[i] != i:
            i = first[i]
        return i

    for i, j in sorted(pairs):
        low, high = sorted((root(i), root(j)))
        first[high] = low
    return np.array([root(i) for i in range(n)])


def split(
    groups: Sequence[int], labels: Sequence, sizes: Mapping[str, int], seed: int = 0
) -> dict[str, list[int]]:
    """Return the rows of each named part, drawn by group, so that no group is in two parts.

    Each part gets the same share of each label as there is in all, to within a group, and what is
    left over is in none. A group has the label of its first row. Raises ValueError if more rows are
    asked for than there are.
    """
    if (asked := sum(sizes.values())) > len(groups):
        raise ValueError(f"{asked:,} rows are asked for, but there are only {len(groups):,}.")
    members, parts = defaultdict(list), {part: [] for part in sizes}
    for row, name in enumerate(groups):
        members[name].append(row)
    rng = np.random.default_rng(seed)
    for label in sorted(set(labels)):
        mine = [rows for rows in members.values() if labels[rows[0]] == label]
        share = sum(map(len, mine)) / len(groups)
        order = iter(rng.permutation(len(mine)).tolist())
        for part, size in sizes.items():
            taken = 0
            while taken < round(size * share) and (i := next(order, None)) is not None:
                parts[part] += mine[i]
                taken += len(mine[i])
    return parts
