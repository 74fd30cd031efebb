"""Many texts at once: a batch that rows join and leave between any two tokens.

Yu et al., Orca: A Distributed Serving System for Transformer-Based Generative Models, 2022,
section 3 (iteration-level scheduling; today mostly called continuous batching).
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.attention import KVCache
from support.generate import sample


def kv_bytes(config, n_tokens: int, bytes_per_number: int = 4) -> int:
    """Return the memory of the keys and values of n_tokens tokens, in bytes."""
    kv_heads = getattr(config, "n_kv_heads", config.n_heads)
    d_head = config.d_model // config.n_heads
    return 2 * config.n_layers * kv_heads * d_head * bytes_per_number * n_tokens


class Row:
    """One text on its way through a batch: its ids so far, how to go on, and when to end.

    Args:
        prompt: ids; at least one.
        max_new_tokens: how many may follow, at least 1.
        stop_ids: the row ends with any of these.
        seed: with the same one the same tokens are drawn, whatever else is in the batch.
        deadline: the moment, by `time.monotonic`, at which it ends wherever it is.
        sampling: temperature, top_k, top_p; see `next_token_probs`.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        seed: int | None = None,
        deadline: float = math.inf,
        **sampling,
    ):
        self.ids, self.n_prompt, self.limit = [*prompt], len(prompt), len(prompt) + max_new_tokens
        self.stop_ids, self.deadline, self.sampling = stop_ids, deadline, sampling
        self.generator = torch.Generator()
        _ = self.generator.seed() if seed is None else self.generator.manual_seed(seed)
        self.finish: str | None = None  # why it ended: "stop", "length", "cancelled" or "error"
        self.cancelled = False  # set it from any thread

    def draw(self, logits: Tensor) -> int:
        """Return the next id for logits (V,)."""
        return sample(logits[None], **self.sampling, generator=self.generator).item()

    def add(self, token: int) -> None:
        """Append a token, and say in `finish` if it was the last."""
        self.ids.append(token)
        if self.cancelled:
            self.finish = "cancelled"
        elif token in self.stop_ids:
            self.finish = "stop"
        elif len(self.ids) == self.limit or time.monotonic() > self.deadline:
            self.finish = "length"

    def fail(self, error: Exception) -> None:
        """Hear that no more tokens will come."""
        self.finish = "cancelled" if self.cancelled else "error"


def memory(caches: list[KVCache], i: int, n: int) -> Tensor:
    """Return the last n keys and values of row i in all layers, (layers, 2, h, n, d)."""
    last = slice(caches[0].length - n, caches[0].length)
    return torch.stack([torch.stack([c.k[i, :, last], c.v[i, :, last]]) for c in caches])


def side_by_side(memories: list[Tensor], size: int) -> tuple[list[KVCache], Tensor]:
    """Return a cache for each layer, with room for `size` tokens, and the mask (B, S) of a batch.

    The rows end together: shorter ones have padding on their left.
    """
    lengths = torch.tensor([m.shape[3] for m in memories], device=memories[0].device)
    S = int(lengths.max())
    mask = torch.arange(S, device=lengths.device) >= S - lengths[:, None]
    padded = torch.stack([F.pad(m, (0, 0, S - m.shape[3], 0)) for m in memories])
    caches = []
    for layer in padded.unbind(dim=1):  # (B, 2, h, S, d)
        caches.append(KVCache(size))
        caches[-1].append(*layer.unbind(dim=1))
    return caches, mask


class Batch:
    """Rows that get one token each at every step; each row is what it would be alone."""

    def __init__(self, model: nn.Module):
        self.model, self.rows = model, []

    @torch.no_grad()
    def join(self, row: Row) -> None:
        """Read a row's prompt, by itself, and put it beside the others."""
        device = next(self.model.parameters()).device
        caches = [KVCache(len(row.ids)) for _ in self.model.blocks]
        last = self.model.hidden(torch.tensor([row.ids], device=device), cache=caches)[:, -1]
        logits = self.model.head(last)  # (1, V)
        kept = [self._memory(i) for i in range(len(self.rows))]
        self._arrange([*self.rows, row], [*kept, memory(caches, 0, len(row.ids))])
        self.logits = torch.cat([self.logits, logits]) if kept else logits

    @torch.no_grad()
    def step(self) -> None:
        """Add a token to each row, let the done ones leave, and run the model for the rest."""
        for row, logits in zip(self.rows, self.logits.cpu(), strict=True):
            row.add(row.draw(logits))
        going = [i for i, row in enumerate(self.rows) if not row.finish]
        if len(going) < len(self.rows):
            self._arrange([self.rows[i] for i in going], [self._memory(i) for i in going])
        if going:
            ids = self.mask.new_tensor([[row.ids[-1]] for row in self.rows], dtype=torch.long)
            self.mask = F.pad(self.mask, (0, 1), value=True)
            mask = None if self.mask.all() else self.mask
            self.logits = self.model(ids, mask, self.caches)[:, -1]  # (B, V)

    def _memory(self, i: int) -> Tensor:
        return memory(self.caches, i, int(self.mask[i].sum()))

    def _arrange(self, rows: list[Row], memories: list[Tensor]) -> None:
        self.rows = rows
        if rows:
            self.caches, self.mask = side_by_side(memories, max(row.limit for row in rows))


class Engine:
    """A thread that owns a model: it takes waiting rows into its batch and steps until closed.

    Args:
        max_batch: rows in the batch; the others wait.
        on_step: called after each step with the number of rows that got a token.

    An error in the model ends the rows of that batch, and the engine goes on with the next.
    """

    def __init__(self, model: nn.Module, max_batch: int, on_step: Callable[[int], None] = id):
        self.batch, self.max_batch, self.on_step = Batch(model.eval()), max_batch, on_step
        self.waiting, self.news, self.closing = deque(), threading.Condition(), False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, row: Row) -> None:
        """Let a row wait for its turn. Call it from any thread. Raises RuntimeError when closed."""
        with self.news:
            if self.closing or not self.thread.is_alive():
                raise RuntimeError("The engine is closed: it takes no more rows.")
            self.waiting.append(row)
            self.news.notify()

    def close(self) -> None:
        """Finish all rows, then end the thread."""
        with self.news:
            self.closing = True
            self.news.notify()
        self.thread.join()

    def _run(self) -> None:
        while True:
            with self.news:
                while not (self.waiting or self.batch.rows or self.closing):
                    self.news.wait()
                if not (self.waiting or self.batch.rows):
                    return
                new = self._admit()
            try:
                for row in new:
                    self.batch.join(row)
                if n := len(self.batch.rows):
                    self.batch.step()
                    self.on_step(n)
            except Exception as error:
                for row in {*self.batch.rows, *new}:
                    if not row.finish:
                        row.fail(error)
                self.batch = Batch(self.batch.model)

    def _admit(self) -> list[Row]:
        """Take from the queue the rows whose turn it is, and those that wait in vain."""
        now, admitted = time.monotonic(), []
        for row in [*self.waiting]:
            if row.cancelled or row.deadline < now:
                row.fail(TimeoutError("The request's time was over before its turn came."))
            elif len(self.batch.rows) + len(admitted) < self.max_batch:
                admitted.append(row)
            else:
                continue
            self.waiting.remove(row)
        return admitted
