"""More tokens than memory holds: files of ids on disk that behave like one long array."""

import json
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from support.checkpoint import whole_folder


def write_shards(
    texts: Iterable[str],
    tokenizer,
    folder: str | Path,
    shard_tokens: int = 2**24,
    end_id: int | None = None,
) -> None:
    """Encode `texts`, one at a time, into files of `shard_tokens` ids and an `index.json`.

    Memory holds one shard and one text. `end_id` follows each text. The folder appears once all of
    it is written. Raises ValueError for a folder that is there, and for no texts.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} is there already: delete it, or write to another folder.")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens} must be at least 1.")
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    shard, used, sizes, n_bytes = np.empty(shard_tokens, dtype), 0, [], 0
    with whole_folder(folder) as unfinished:

        def save():
            np.save(unfinished / f"{len(sizes):06d}.npy", shard[:used])
            sizes.append(used)

        for text in texts:
            n_bytes += len(text.encode())
            ids = np.array(tokenizer.encode(text) + ([] if end_id is None else [end_id]), dtype)
            while len(ids):
                part, ids = np.split(ids, [shard_tokens - used])
                shard[used : used + len(part)] = part
                used += len(part)
                if used == shard_tokens:
                    save()
                    used = 0
        if used:
            save()
        if not sizes:
            raise ValueError("There are no texts, or all are empty: there is nothing to write.")
        index = {"sizes": sizes, "n_bytes": n_bytes, "vocab_size": tokenizer.vocab_size}
        (unfinished / "index.json").write_text(json.dumps(index))


class Shards:
    """What `write_shards` wrote, as one array: `len`, `[i]` and `[a:b]` read only what they ask.

    `n_bytes` is the length of the texts in UTF-8, for bits per byte. Raises ValueError for a file
    that is not what the index says.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        try:
            index = json.loads((folder / "index.json").read_bytes())
            sizes, self.n_bytes = index["sizes"], index["n_bytes"]
            self.vocab_size = index["vocab_size"]
        except (OSError, ValueError, LookupError) as error:
            raise ValueError(f"{folder} has no whole index.json: {error}") from error
        self.shards = []
        for i, size in enumerate(sizes):
            path = folder / f"{i:06d}.npy"
            try:
                self.shards.append(np.load(path, mmap_mode="r"))
                if len(self.shards[i]) != size:
                    raise ValueError(f"it has {len(self.shards[i])} ids")
            except (OSError, ValueError) as error:
                raise ValueError(f"{path} should have {size} ids: {error}") from error
        self.starts = list(accumulate(sizes, initial=0))

    def __len__(self):
        return self.starts[-1]

    def __getitem__(self, where: int | slice):
        chosen = range(len(self))[where]
        if isinstance(chosen, int):
            return self[chosen : chosen + 1][0]
        if chosen.step != 1:
            raise ValueError(f"step={chosen.step}: only neighboring ids can be read.")
        parts, start = [self.shards[0][:0]], chosen.start
        while start < chosen.stop:
            i = bisect_right(self.starts, start) - 1
            parts.append(self.shards[i][start - self.starts[i] : chosen.stop - self.starts[i]])
            start += len(parts[-1])
        return np.concatenate(parts)


def text_starts(ids, end_id: int, last: int) -> np.ndarray:
    """Return the places up to `last` where a text begins: 0, and those after an `end_id`."""
    parts = [np.array([0])]
    for start in range(0, last, 2**20):  # not all at once: there may be more than memory holds
        part = np.asarray(ids[start : min(start + 2**20, last)])
        parts.append(np.flatnonzero(part == end_id) + start + 1)
    return np.concatenate(parts)


class Windows:
    """Batches (inputs, targets), each (B, T), from one long row of ids: `windows(step)`.

    The row is cut into windows of T ids, and each comes once an epoch, in an order drawn from
    (seed, epoch). So a batch depends on the step alone, and a run that is continued needs no more.

    Args:
        ids: list, array, `np.memmap` or `Shards`; only the windows asked for are read.
        context_length: T.
        batch_size: B; a batch may end one epoch and begin the next.
        end_id: what ends a text. If given, a window begins where a text does, and holds the T ids
            from there on, of the next texts too; else the row is cut wherever T ids are full.
    """

    def __init__(
        self, ids, context_length: int, batch_size: int, seed: int = 0, end_id: int | None = None
    ):
        if context_length < 1 or batch_size < 1:
            raise ValueError(
                f"context_length and batch_size must be at least 1, not {context_length} "
                f"and {batch_size}."
            )
        if len(ids) <= context_length:
            raise ValueError(
                f"{len(ids)} tokens are too few for a window: context_length={context_length} "
                f"needs at least {context_length + 1}, because the target ends one token later."
            )
        self.ids, self.context_length, self.batch_size = ids, context_length, batch_size
        self.seed, self.epoch, self.order = seed, None, None
        last = len(ids) - context_length - 1  # where the last whole window begins
        self.starts = range(0, last + 1, context_length)
        if end_id is not None:
            self.starts = text_starts(ids, end_id, last)

    def __len__(self):
        return len(self.starts)

    def window(self, place: int) -> np.ndarray:
        """Return the (T + 1,) ids of the window at a place in the row of all epochs."""
        epoch, i = divmod(place, len(self))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng((self.seed, epoch)).permutation(len(self))
        start = int(self.starts[self.order[i]])
        return np.asarray(self.ids[start : start + self.context_length + 1], dtype=np.int64)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        first = step * self.batch_size
        places = range(first, first + self.batch_size)
        windows = torch.from_numpy(np.stack([self.window(place) for place in places]))  # (B, T+1)
        return windows[:, :-1], windows[:, 1:]
