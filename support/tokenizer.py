"""Byte-level byte-pair encoding: the tokenizer of GPT-2, trained from scratch or loaded.

Sennrich et al., Neural Machine Translation of Rare Words with Subword Units, 2016, section 3.2;
Radford et al., Language Models are Unsupervised Multitask Learners, 2019, section 2.2.
"""

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path

import regex

from support.data import fetch, write_atomic

# GPT-2's rule for cutting text into pieces that merges never cross: contractions, then runs of
# letters, of digits, or of other signs, each with at most one space before it, then white space.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class GreatestFirst(tuple):
    """A tuple that sorts backwards, so that heapq, which pops the smallest, pops the greatest."""

    def __lt__(self, other):
        return tuple.__gt__(self, other)


def merge_pair(word: list[bytes], pair: tuple[bytes, bytes]):
    """Join every `pair` in `word`, from the left.

    Returns the new word, the adjacent pairs that this destroyed, and those that it made.
    """
    first, second = pair
    merged, lost, gained, i = [], [], [], 0
    while i < len(word):
        if word[i] != first or i + 1 == len(word) or word[i + 1] != second:
            merged.append(word[i])
            i += 1
            continue
        if merged:  # a neighbor on the left
            lost.append((merged[-1], first))
            gained.append((merged[-1], first + second))
        if i + 2 < len(word):  # a neighbor on the right
            lost.append((second, word[i + 2]))
            gained.append((first + second, word[i + 2]))
        merged.append(first + second)
        i += 2
    return merged, lost, gained


def learn_merges(pieces: Counter[bytes], n_merges: int) -> list[tuple[bytes, bytes]]:
    """Return the merges that BPE learns from `pieces` (piece -> count), the first one first.

    Of equally frequent pairs the greatest (bytes, bytes) wins. Ends early when no pair is left.
    """
    if n_merges and not pieces:
        raise ValueError("The text is empty: there is nothing to learn merges from.")
    words = [([bytes([b]) for b in piece], n) for piece, n in pieces.items()]
    counts, where = Counter(), defaultdict(set)  # pair -> how often; pair -> the words it is in
    for i, (word, n) in enumerate(words):
        for pair in pairwise(word):
            counts[pair] += n
            where[pair].add(i)
    heap = [(-n, GreatestFirst(pair)) for pair, n in counts.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < n_merges:
        n, pair = heapq.heappop(heap)
        if -n != counts[pair]:  # an old entry: the count has fallen or risen since
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        merges.append(tuple(pair))
        changed = set()
        for i in where.pop(pair):
            word, n = words[i]
            word[:], lost, gained = merge_pair(word, pair)
            for old in lost:
                counts[old] -= n
            for new in gained:
                counts[new] += n
                where[new].add(i)
            changed.update(gained)
        del counts[pair]
        for new in changed:
            if counts[new] > 0:  # a pair that a merge made may fall to the next: a a a a → aa aa
                heapq.heappush(heap, (-counts[new], GreatestFirst(new)))
    return merges


def apply_merges(ids: list[int], ranks: dict[tuple[int, int], tuple[int, int]]) -> list[int]:
    """Return `ids` after all merges that apply: the lowest rank first, and from the left.

    `ranks` gives for each pair of ids (its rank, the id of the joined token). The row is a linked
    list and the candidates are a heap, so each merge costs a few steps, however many ids there are.
    """
    ids, n = list(ids), len(ids)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    heap = []

    def consider(i):
        j = after[i]
        if i >= 0 and j < n and (ids[i], ids[j]) in ranks:
            heapq.heappush(heap, (ranks[ids[i], ids[j]], i, ids[i], ids[j]))

    for i in range(n):
        consider(i)
    while heap:
        (_, joined), i, left, right = heapq.heappop(heap)
        j = after[i]
        if ids[i] != left or j == n or ids[j] != right:
            continue  # an earlier merge took one of the two
        ids[i], ids[j], after[i] = joined, None, after[j]
        if after[i] < n:
            before[after[i]] = i
        consider(before[i])
        consider(i)
    return [i for i in ids if i is not None]


class Remember(dict):
    """A function that remembers its results, and forgets them all once there are `limit`."""

    def __init__(self, function, limit: int = 1_000_000):
        super().__init__()
        self.function, self.limit = function, limit

    def __missing__(self, key):
        if len(self) >= self.limit:
            self.clear()
        value = self.function(key)
        if len(key) < 100:  # long pieces seldom come twice
            self[key] = value
        return value


def as_names(names: str | Collection[str]) -> list[str]:
    """Return each of `names` once, in order; a string alone is one name, an empty one is none."""
    names = [names] if isinstance(names, str) else names
    return list(dict.fromkeys(name for name in names if name))


def split_special(text: str, names: Collection[str]) -> list[str]:
    """Cut `text` before and after each of `names`; the names stay in the list."""
    if not names:
        return [text]
    longest_first = sorted(names, key=len, reverse=True)
    return regex.split("(" + "|".join(map(regex.escape, longest_first)) + ")", text)


def count_pieces(text: str, special_tokens: Collection[str] = ()) -> Counter[bytes]:
    """Return how often each piece (in UTF-8) stands in `text`; special tokens are not pieces."""
    parts = [part for part in split_special(text, special_tokens) if part not in special_tokens]
    counts = Counter(chain.from_iterable(regex.findall(GPT2_PATTERN, part) for part in parts))
    return Counter({piece.encode(): n for piece, n in counts.items()})


def repair_surrogates(text: str) -> str:
    """Read surrogate pairs as the characters they stand for, and a lone half as U+FFFD.

    A lone half is no character and has no UTF-8 bytes; tiktoken reads it as U+FFFD too.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, not {type(text).__name__}: {text!r:.60}")
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def byte_letters() -> dict[str, int]:
    """Return the 256 letters that GPT-2's files write for the 256 bytes, so that each can be seen.

    Bytes that print stand for themselves; the others, in order, are the characters from U+0100 on.
    """
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(b): b for b in printing} | {chr(256 + i): b for i, b in enumerate(others)}


def read_saved(path: str | Path) -> tuple[dict, list, dict, str]:
    """Return the vocabulary, merges, special tokens and pattern that `BPETokenizer.save` wrote."""
    try:
        parts = json.loads(Path(path).read_bytes())
        vocab = {token.encode("latin-1"): i for token, i in parts["vocab"].items()}
        merges = [(a.encode("latin-1"), b.encode("latin-1")) for a, b in parts["merges"]]
        return vocab, merges, parts["special_tokens"], parts["pattern"]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole file written by `save`: {error}") from error


def read_gpt2() -> tuple[dict, list, dict]:
    """Return the vocabulary, merges and special tokens in OpenAI's two files."""
    folder, byte_of = fetch("gpt2-bpe"), byte_letters()

    def to_bytes(token):
        return bytes(byte_of[letter] for letter in token)

    encoder = json.loads((folder / "encoder.json").read_bytes())
    special_tokens = {"<|endoftext|>": encoder.pop("<|endoftext|>")}
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(map(to_bytes, line.split(" "))) for line in lines]
    return {to_bytes(token): i for token, i in encoder.items()}, merges, special_tokens


class BPECodec:
    """Text to token ids and back, given a vocabulary and merges.

    Args:
        vocab: token (bytes) -> id, all 256 single bytes among them.
        merges: pairs of tokens to join, the first learned first.
        special_tokens: name -> id; no text can spell them unless `encode` is told so.
        pattern: the regular expression that cuts text into pieces.
    """

    def __init__(self, vocab, merges, special_tokens=None, pattern=GPT2_PATTERN):
        self.vocab, self.merges, self.pattern = dict(vocab), list(merges), pattern
        self.special_tokens = dict(special_tokens or {})
        self._bytes = {i: token for token, i in self.vocab.items()}
        self._bytes |= {i: name.encode() for name, i in self.special_tokens.items()}
        pairs = enumerate(self.merges)
        self._ranks = {(vocab[a], vocab[b]): (rank, vocab[a + b]) for rank, (a, b) in pairs}
        self._cut = regex.compile(pattern)
        self._ids_of_piece = Remember(self._encode_piece)

    def _encode_piece(self, piece: str) -> list[int]:
        return apply_merges([self.vocab[bytes([b])] for b in piece.encode()], self._ranks)

    @property
    def vocab_size(self) -> int:
        return max(self._bytes) + 1

    def _allowed(self, names: str | Collection[str]) -> set[str]:
        names = set(self.special_tokens) if "all" in as_names(names) else set(as_names(names))
        if unknown := names - set(self.special_tokens):
            raise ValueError(f"No special token {min(unknown)!r}, only {list(self.special_tokens)}")
        return names

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Return the ids of `text`; special tokens count only if named, or if "all" are allowed."""
        names, ids = self._allowed(allowed_special), []
        for part in split_special(repair_surrogates(text), names):
            if part in names:
                ids.append(self.special_tokens[part])
            else:
                pieces = self._cut.findall(part)
                ids.extend(chain.from_iterable(map(self._ids_of_piece.__getitem__, pieces)))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are not valid UTF-8 become U+FFFD."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if unknown := [i for i in ids if isinstance(i, list) or i not in self._bytes]:
            what = f"{unknown[0]!r:.60} is no token id"
            raise ValueError(f"{what}: give one row of ids from 0 to {self.vocab_size - 1}.")
        return b"".join(map(self._bytes.__getitem__, ids)).decode(errors="replace")


class BPETokenizer(BPECodec):
    """A `BPECodec` that can be trained, saved, loaded, or taken over from GPT-2."""

    @classmethod
    def train(cls, text: str, vocab_size: int, special_tokens: Collection[str] = ()):
        """Learn merges from `text` until there are `vocab_size` tokens, or no pair is left."""
        special_tokens = as_names(special_tokens)
        if (n_merges := vocab_size - 256 - len(special_tokens)) < 0:
            raise ValueError(f"vocab_size={vocab_size} must be at least {vocab_size - n_merges}.")
        merges = learn_merges(count_pieces(repair_surrogates(text), special_tokens), n_merges)
        vocab = {bytes([b]): b for b in range(256)}
        for first, second in merges:
            vocab.setdefault(first + second, len(vocab))
        return cls(vocab, merges, {name: len(vocab) + i for i, name in enumerate(special_tokens)})

    def encode_iterable(self, chunks: Iterable[str], allowed_special=()) -> Iterator[int]:
        """Yield the ids of the chunks put together, without ever holding them all."""
        if spaced := [name for name in self._allowed(allowed_special) if regex.search(r"\s", name)]:
            raise ValueError(f"{spaced[0]!r} has white space, where chunks are cut: use encode.")
        last_break, rest = regex.compile(r"(?s).*\S(?=\s)"), ""
        for chunk in chunks:
            start = max(len(rest) - 1, 0)
            rest += chunk
            # Where white space follows anything else, a new piece begins, whatever comes later.
            if found := last_break.match(rest, start):
                yield from self.encode(rest[: found.end()], allowed_special)
                rest = rest[found.end() :]
        yield from self.encode(rest, allowed_special)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON, each byte of a token as the character of that number."""
        tokens = {token.decode("latin-1"): i for token, i in self.vocab.items()}
        merges = [[a.decode("latin-1"), b.decode("latin-1")] for a, b in self.merges]
        parts = {"vocab": tokens, "merges": merges, "special_tokens": self.special_tokens}
        write_atomic(Path(path), json.dumps(parts | {"pattern": self.pattern}).encode())

    @classmethod
    def load(cls, path: str | Path):
        """Return the tokenizer that `save` wrote."""
        return cls(*read_saved(path))

    @classmethod
    def gpt2(cls):
        """Return OpenAI's GPT-2 tokenizer: 50,257 tokens."""
        return cls(*read_gpt2())
