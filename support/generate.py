"""Text from a model: look at the scores of the next token, choose one, append it, repeat.

It works with any model that has `.blocks`, a `.config` with `context_length` and `vocab_size`, and
`model(ids, mask=..., cache=...)` that returns logits (B, T, V).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.attention import KVCache


def next_token_probs(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return the probabilities (..., V) from which to draw the next token, for logits (..., V).

    Args:
        temperature: divides the logits: below 1, likely tokens get likelier; at 0 the best is sure.
        top_k: keep the k best tokens, and any that equal the k-th.
        top_p: of these, keep the fewest best ones that together have at least probability top_p.

    Raises ValueError for values that make no sense.
    Top-k: Fan et al., Hierarchical Neural Story Generation, 2018, section 5.1. Top-p: Holtzman et
    al., The Curious Case of Neural Text Degeneration, 2020, section 3.1.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be 0 (always the best token) or more.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} would keep no token: use 1 or more, or None for all.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1, or None for all tokens.")
    logits = logits.float()
    if temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
    logits = logits / temperature
    if top_k is not None:
        kth_best = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth_best, -math.inf)
    if top_p is not None and top_p < 1:
        probs, order = logits.softmax(dim=-1).sort(descending=True)
        surplus = probs.cumsum(dim=-1) - probs >= top_p  # better tokens reach top_p without it
        logits = logits.masked_fill(surplus.scatter(-1, order, surplus), -math.inf)
    return logits.softmax(dim=-1)


def sample(
    logits: Tensor, temperature: float = 1.0, top_k=None, top_p=None, generator=None
) -> Tensor:
    """Return the next ids (B,) for logits (B, V), drawn as `next_token_probs` says."""
    probs = next_token_probs(logits, temperature, top_k, top_p)
    if temperature == 0:  # nothing to draw, so no random number is used up
        return probs.argmax(dim=-1)
    return torch.multinomial(probs, num_samples=1, generator=generator)[:, 0]


def left_pad(prompts: Sequence[Sequence[int]], vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return prompts of any lengths as ids (B, T) and a mask (B, T), True where a token is real.

    The padding is on the left, so that each row ends with the token which the new one follows.
    Raises ValueError for an empty prompt and for an id that the vocabulary does not have.
    """
    if any(isinstance(prompt, int) for prompt in prompts):
        raise ValueError("Each prompt is a row of its own: give [[1, 2]] instead of [1, 2].")
    if not len(prompts) or not all(map(len, prompts)):
        raise ValueError("A prompt is empty: begin it with at least one token id.")
    if wrong := [i for prompt in prompts for i in prompt if not 0 <= i < vocab_size]:
        raise ValueError(f"No token has id {wrong[0]}: ids go from 0 to {vocab_size - 1}.")
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]  # any id would do
    mask = [[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


@contextmanager
def evaluating(model: nn.Module):
    """Switch dropout off for a while, then leave every module in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def next_ids(
    model, prompts, max_new_tokens, stop_id=None, use_cache=True, **sampling
) -> Iterator[list[int | None]]:
    """Yield, step by step, the new id of each prompt, or None for one that has had its stop_id.

    The arguments are those of `generate`, with the prompts as lists.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 0 or more.")
    context_length, device = model.config.context_length, next(model.parameters()).device
    ids, mask = (x.to(device) for x in left_pad(prompts, model.config.vocab_size))  # (B, T)
    size = min(context_length, ids.shape[1] + max_new_tokens)
    cache = [KVCache(size) for _ in model.blocks] if use_cache else None
    stopped = [False] * len(prompts)
    with evaluating(model):
        for _ in range(max_new_tokens):
            if ids.shape[1] > context_length:
                # The window slides: every token changes its position, so no cached key stays true.
                ids, mask, cache = ids[:, -context_length:], mask[:, -context_length:], None
            unseen = ids[:, cache[0].length :] if cache else ids
            logits = model(unseen, mask=None if mask.all() else mask, cache=cache)
            new = sample(logits[:, -1], **sampling)  # (B,)
            step = [None if end else i for i, end in zip(new.tolist(), stopped, strict=True)]
            yield step
            stopped = [i is None or i == stop_id for i in step]
            if all(stopped):
                return
            ids = torch.cat([ids, new[:, None]], dim=1)
            mask = F.pad(mask, (0, 1), value=True)


def generate(
    model: nn.Module,
    ids: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_id: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Tensor | list[list[int]]:
    """Return each prompt with up to max_new_tokens ids after it.

    The model sees the last context_length tokens; once there are more, each step computes the
    whole window anew. Dropout is off meanwhile.

    Args:
        ids: prompts as a tensor (B, T), or as lists, which may differ in length. The result is of
            the same kind; each row is what it would be alone.
        temperature, top_k, top_p: see `next_token_probs`; temperature 0 is greedy.
        stop_id: a row ends with this token. In a tensor, it also fills up rows that end early.
        generator: draws the random numbers; with the same seed it draws the same ones.
        use_cache: remember the keys and values of earlier tokens; the result is the same.

    Raises ValueError for an empty prompt, an unknown id, and options that make no sense.
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    prompts = ids.tolist() if isinstance(ids, Tensor) else ids
    steps = list(next_ids(model, prompts, max_new_tokens, stop_id, use_cache, **options))
    rows = [list(prompt) for prompt in prompts]
    for step in steps:
        for row, new in zip(rows, step, strict=True):
            if new is not None:
                row.append(new)
    if not isinstance(ids, Tensor):
        return rows
    longest = max(map(len, rows))
    rows = [row + [stop_id] * (longest - len(row)) for row in rows]
    return torch.tensor(rows, device=ids.device)


def stream(
    model: nn.Module,
    prompt: Sequence[int],
    max_new_tokens: int,
    tokenizer=None,
    stop_id: int | None = None,
    **options,
) -> Iterator[int] | Iterator[str]:
    """Yield the new ids of one prompt as they come, or their text if there is a tokenizer.

    A character may be spread over several tokens: its text comes once it is whole. Of stop_id no
    text is shown. The options are those of `generate`.
    """
    held = []  # tokens that end within a character
    for (new,) in next_ids(model, [prompt], max_new_tokens, stop_id, **options):
        if tokenizer is None:
            yield new
        elif new != stop_id:
            held.append(new)
            if not (text := tokenizer.decode(held)).endswith("\ufffd"):
                yield text
                held = []
    if held:
        yield tokenizer.decode(held)
