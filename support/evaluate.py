"""How good is a model? Likelihoods of texts and of answers, and how sure the numbers are.

Everything rests on one function, `continuation_log_probs`: the log-probability of each token of a
continuation, given what comes before it.
"""

import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from support.generate import evaluating
from support.tokenizer import BPETokenizer
from support.tokenizer_files import end_of_text

# ---- likelihood ---------------------------------------------------------------------------------


@torch.no_grad()
def continuation_log_probs(
    model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int = 8
) -> list[tuple[Tensor, bool]]:
    """Return for each (context, continuation) the log-probabilities of the continuation's tokens.

    They are in nats, (n,); with them comes whether each of these tokens was the likeliest. Of a
    pair that is too long the model sees the last context_length tokens before the last one.

    Args:
        pairs: token ids; a context has at least one.
        batch_size: pairs computed at once, of similar lengths.

    Raises ValueError for an empty context or continuation, or a continuation that does not fit.
    """
    most, device = model.config.context_length, next(model.parameters()).device
    for context, continuation in pairs:
        if not context or not continuation:
            raise ValueError("A context and a continuation have at least one token each.")
        if len(continuation) > most:
            raise ValueError(
                f"A continuation of {len(continuation)} tokens exceeds {most}: cut it."
            )
    inputs = [[*context, *continuation][-most - 1 : -1] for context, continuation in pairs]
    results: list = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(inputs[i]))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            longest = len(inputs[batch[-1]])
            # On the right the padding needs no mask: no token looks to its right.
            rows = [inputs[i] + [0] * (longest - len(inputs[i])) for i in batch]
            vectors = model.hidden(torch.tensor(rows, device=device))  # (B, T, C)
            for i, x in zip(batch, vectors, strict=True):
                end, wanted = len(inputs[i]), torch.tensor(pairs[i][1], device=device)
                logits = model.head(x[end - len(wanted) : end])  # (n, V), only where we ask
                log_probs = logits.float().log_softmax(dim=-1)
                likeliest = bool((log_probs.argmax(dim=-1) == wanted).all())
                results[i] = log_probs.gather(1, wanted[:, None])[:, 0].cpu(), likeliest
    return results


def windows(ids: Sequence[int], window: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """Cut a long text into pairs (context, continuation) that score each token but the first once.

    The first pair scores `window` tokens, each later one the next `stride` tokens with all the
    context that fits before them. A small stride gives more context and more work.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} must be from 1 to the window, {window} tokens.")
    ids, done, pairs = list(ids), 1, []
    while done < len(ids):
        end = min(done + (stride if pairs else window), len(ids))
        pairs.append((ids[max(end - 1 - window, 0) : done], ids[done:end]))
        done = end
    return pairs


def text_log_probs(
    model: nn.Module, ids: Sequence[int], stride: int | None = None, window: int | None = None
) -> Tensor:
    """Return the log-probability of each token but the first, (T - 1,), in nats.

    Args:
        ids: a text of any length; begin it with the end-of-text token to score all of the text.
        stride: how far the window moves; None for a quarter of it.
        window: the most tokens that the model sees at once; None for its context_length.
    """
    window = window or model.config.context_length
    pairs = windows(ids, window, stride or max(window // 4, 1))
    if not pairs:
        raise ValueError(f"There is nothing to score in {len(ids)} tokens: give at least 2.")
    return torch.cat([scores for scores, _ in continuation_log_probs(model, pairs)])


def score_texts(
    model: nn.Module, tokenizer: BPETokenizer, texts: Iterable[str], stride: int | None = None
) -> pd.DataFrame:
    """Return a row for each text: its loss in nats (a sum), its tokens, and its bytes.

    Each text begins after an end-of-text token and is scored by itself.
    """
    begin, rows = tokenizer.special_tokens[end_of_text(tokenizer)], []
    for text in texts:
        log_probs = text_log_probs(model, [begin, *tokenizer.encode(text)], stride)
        loss = -log_probs.sum(dtype=torch.float64).item()
        rows.append({"nats": loss, "tokens": len(log_probs), "bytes": len(text.encode())})
    return pd.DataFrame(rows)


# ---- multiple choice ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question with its choices: each continues the context, and one of them is right."""

    context: str
    choices: tuple[str, ...]
    answer: int


def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the ids of a context and of what follows it, cut where their common text is cut.

    Spaces at the end of the context belong to the continuation, for there a token begins. After an
    empty context stands the end-of-text token.
    """
    whole = tokenizer.encode(context + continuation)
    if n := len(tokenizer.encode(context.rstrip())):
        return whole[:n], whole[n:]
    return [tokenizer.special_tokens[end_of_text(tokenizer)]], whole


def choice_scores(
    model: nn.Module,
    tokenizer: BPETokenizer,
    questions: Sequence[Question],
    neutral: str = "Answer:",
    batch_size: int = 8,
) -> pd.DataFrame:
    """Return a row for each choice of each question, with its score by four rules.

    `sum` is the log-probability of the choice after the context; `per token` and `per byte` divide
    it by the choice's length (its bytes without the space before it); `calibrated` subtracts its
    log-probability after a neutral context.
    Brown et al., Language Models are Few-Shot Learners, 2020, section 2.4; Holtzman et al., Surface
    Form Competition, 2021, section 3.
    """
    where = [(q, c) for q, question in enumerate(questions) for c in range(len(question.choices))]
    pairs = []
    for start in (None, neutral):
        for q, c in where:
            context = questions[q].context if start is None else start
            pairs.append(encode_pair(tokenizer, context, questions[q].choices[c]))
    sums = [
        log_probs.sum().item() for log_probs, _ in continuation_log_probs(model, pairs, batch_size)
    ]
    rows = []
    for (q, c), (_, ids), total, plain in zip(where, pairs, sums, sums[len(where) :], strict=False):
        scores = {
            "sum": total,
            "per token": total / len(ids),
            "per byte": total / len(questions[q].choices[c].strip().encode()),
            "calibrated": total - plain,
        }
        rows.append({"question": q, "choice": c, "right": c == questions[q].answer} | scores)
    return pd.DataFrame(rows)


def accuracy_by_rule(scores: pd.DataFrame) -> pd.DataFrame:
    """Return for each question (row) and each rule (column) whether the best choice is right."""
    rules = scores.columns.drop(["question", "choice", "right"])
    best = {rule: scores.loc[scores.groupby("question")[rule].idxmax(), "right"] for rule in rules}
    return pd.DataFrame({rule: right.to_numpy() for rule, right in best.items()})


# ---- written answers ----------------------------------------------------------------------------


def normalize_answer(text: str) -> str:
    """Return a text without capitals, punctuation, articles and superfluous spaces.

    Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, 2016, section 6.
    """
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Return whether a text, normalized, is one of the right answers, normalized."""
    return normalize_answer(text) in map(normalize_answer, answers)


# ---- contamination ------------------------------------------------------------------------------


def word_runs(text: str, n: int) -> list[tuple[str, ...]]:
    """Return all runs of n words, without capitals and punctuation."""
    words = re.findall(r"\w+", text.lower())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def overlap(text: str, seen: set[tuple[str, ...]], n: int) -> float:
    """Return the share of the text's runs of n words that are in `seen`; NaN if it is too short.

    Brown et al., 2020, appendix C, counts a text as contaminated if it shares a single run of 13.
    """
    runs = word_runs(text, n)
    return sum(run in seen for run in runs) / len(runs) if runs else float("nan")


# ---- how sure -----------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A measured value, and where it would probably lie with other items of the same kind."""

    value: float
    low: float
    high: float

    def __str__(self):
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    items, statistic: Callable = np.mean, level: float = 0.95, n: int = 2000, seed: int = 0
) -> Interval:
    """Return a statistic of the items with its percentile interval.

    The items, (N,) or (N, columns), are drawn n times anew with replacement, whole rows each time:
    so two models that answered the same items stay paired.
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    items, rng = np.asarray(items), np.random.default_rng(seed)
    if len(items) < 2:
        raise ValueError(f"{len(items)} items say nothing about others: give at least 2.")
    drawn = [statistic(items[rng.integers(len(items), size=len(items))]) for _ in range(n)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(items)), float(low), float(high))
