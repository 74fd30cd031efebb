"""Instruction tuning: requests and answers become tokens, and only the answers are learned.

Shapes: B rows of T tokens. Ouyang et al., Training Language Models to Follow Instructions with
Human Feedback, 2022, section 3.4 (SFT).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from support.generate import generate
from support.tasks import Request, passes
from support.widgets import progress

START, STOP = "<|im_start|>", "<|im_end|>"


# ---- formats ------------------------------------------------------------------------------------


def inst_format(instruction: str) -> str:
    """Return what a model reads before its answer in the format of Llama 2 and Mistral."""
    return f"[INST] {instruction} [/INST] "


def alpaca_format(instruction: str) -> str:
    """Return what a model reads before its answer in the format of Stanford's Alpaca."""
    return (
        "Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    )


def chatml_format(instruction: str) -> str:
    """Return what a model reads before its answer in ChatML, the format of this course."""
    return f"{START}user\n{instruction}{STOP}\n{START}assistant\n"


def prompt_ids(tokenizer, instruction: str) -> list[int]:
    """Return the ids of `chatml_format(instruction)`.

    Only the format's own marks become special tokens: whoever writes <|im_end|> into an
    instruction gets the letters, and cannot end the turn.
    """
    start, stop = (tokenizer.special_tokens[mark] for mark in (START, STOP))
    user, assistant = tokenizer.encode(f"user\n{instruction}"), tokenizer.encode("assistant\n")
    return [start, *user, stop, *tokenizer.encode("\n"), start, *assistant]


class Example(NamedTuple):
    """A request with its answer: T ids, and for each whether it is to be learned."""

    ids: list[int]
    learned: list[bool]


def to_row(tokenizer, instruction: str, answer: str) -> Example:
    """Return a request and an answer as one row; the answer and the mark that ends it are learned.

    Raises ValueError for an answer without text.
    """
    if not answer.strip():
        raise ValueError(f"The answer to {instruction!r:.60} is empty: there is nothing to learn.")
    prompt = prompt_ids(tokenizer, instruction)
    said = [*tokenizer.encode(answer), tokenizer.special_tokens[STOP]]
    return Example(prompt + said, [False] * len(prompt) + [True] * len(said))


# ---- batches ------------------------------------------------------------------------------------


def pad_examples(rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return rows as ids (B, T) and a mask (B, T), True for what is learned; padded on the right.

    No token looks to its right, and nothing is learned from padding: it changes no loss.
    """
    longest = max(len(row.ids) for row in rows)
    ids = [row.ids + [0] * (longest - len(row.ids)) for row in rows]
    mask = [row.learned + [False] * (longest - len(row.ids)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def with_targets(rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, both (B, T - 1), for `token_loss`: -100 where nothing is asked."""
    ids, mask = pad_examples(rows)
    return ids[:, :-1], ids[:, 1:].masked_fill(~mask[:, 1:], -100)


def pack(rows: Iterable[Example], length: int) -> list[Example]:
    """Return rows put one after another into as few rows of at most `length` ids as come of it.

    It saves padding, at a price: a text sees the ones before it in its row, and stands at later
    positions. So the loss is not that of the rows by themselves. Raises ValueError for a row that
    is too long.
    """
    packed = []
    for row in rows:
        if len(row.ids) > length:
            raise ValueError(f"A row of {len(row.ids)} ids does not fit into {length}: cut it.")
        if not packed or len(packed[-1].ids) + len(row.ids) > length:
            packed.append(Example([], []))
        packed[-1].ids.extend(row.ids)
        packed[-1].learned.extend(row.learned)
    return packed


class Batches:
    """Batches of items, each once an epoch: `batches(step)`. A batch depends on the step alone.

    Args:
        items: what to learn from, such as rows.
        batch_size: items B of a batch. What is left over at the end of an epoch is dropped.
        collate: makes tensors of B items.
        length: of an item. If given, a batch has items of about the same length, so that there is
            little padding: the shuffled items are sorted in pools of 16 batches.
    """

    def __init__(
        self,
        items: Iterable,
        batch_size: int,
        collate: Callable = with_targets,
        length: Callable | None = lambda row: len(row.ids),
        seed: int = 0,
    ):
        self.items, self.batch_size = list(items), batch_size
        self.collate, self.length, self.seed = collate, length, seed
        self.epoch, self.order = None, []
        if not 1 <= batch_size <= len(self.items):
            raise ValueError(f"batch_size={batch_size} must be from 1 to {len(self.items)} items.")

    def __len__(self) -> int:
        return len(self.items) // self.batch_size

    def __call__(self, step: int):
        epoch, i = divmod(step, len(self))
        if epoch != self.epoch:
            self.epoch, self.order = (
                epoch,
                self._shuffled(np.random.default_rng((self.seed, epoch))),
            )
        return self.collate([self.items[j] for j in self.order[i]])

    def _shuffled(self, rng: np.random.Generator) -> list[list[int]]:
        order = rng.permutation(len(self.items)).tolist()
        if self.length is not None:
            size = 16 * self.batch_size
            pools = [order[i : i + size] for i in range(0, len(order), size)]
            order = [j for p in pools for j in sorted(p, key=lambda j: self.length(self.items[j]))]
        batches = [order[i * self.batch_size :][: self.batch_size] for i in range(len(self))]
        return [batches[i] for i in rng.permutation(len(batches))]


# ---- answers ------------------------------------------------------------------------------------


def respond(
    model: nn.Module,
    tokenizer,
    instructions: Sequence[str],
    max_new_tokens: int = 300,
    batch_size: int = 32,
    **sampling,
) -> list[tuple[str, bool]]:
    """Return the model's answer to each instruction, and whether it ended by itself.

    An answer also ends where the context is full, its own or that of the longest prompt in its
    batch. The options are those of `generate`.
    """
    stop_id = tokenizer.special_tokens[STOP]
    prompts = [prompt_ids(tokenizer, instruction) for instruction in instructions]
    context = model.config.context_length
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike, so little padding
    roomy = sum(len(prompt) + max_new_tokens <= context for prompt in prompts)
    parts = order[:roomy], order[roomy:]  # no long prompt cuts a story short
    batches = [p[i : i + batch_size] for p in parts for i in range(0, len(p), batch_size)]
    answers = [("", False)] * len(prompts)
    for batch in progress(batches, "answers"):
        asked = [prompts[i] for i in batch]
        room = context - len(asked[-1])
        if room < 1:
            raise ValueError(f"A prompt of {len(asked[-1])} tokens leaves no room for an answer.")
        rows = generate(model, asked, min(max_new_tokens, room), stop_id=stop_id, **sampling)
        for i, prompt, row in zip(batch, asked, rows, strict=True):
            said = row[len(prompt) :]
            ended = said[-1] == stop_id
            answers[i] = (tokenizer.decode(said[:-1] if ended else said), ended)
    return answers


def follow(
    model: nn.Module, tokenizer, requests: Sequence[Request], **options
) -> tuple[pd.Series, list[str]]:
    """Return the share of requests that a model follows, by task and on average, and its answers.

    The options are those of `respond`.
    """
    answers = respond(model, tokenizer, [request.prompt for request in requests], **options)
    done = [passes(request, *answer) for request, answer in zip(requests, answers, strict=True)]
    shares = pd.Series(done).groupby([r.task for r in requests], sort=False).mean()
    return pd.concat([shares, pd.Series({"mean": shares.mean()})]), [text for text, _ in answers]
