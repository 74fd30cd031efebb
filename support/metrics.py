"""How good a classifier is: built by hand, equal to scikit-learn.

Everywhere `labels` (N,) are the true classes 0, 1, ..., `predicted` (N,) those that were answered,
and `scores` (N,) numbers that are the higher, the surer a classifier is of class 1. Lists, arrays
and tensors will do. ValueError names what does not fit.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor


def as_rows(*columns) -> list[np.ndarray]:
    """Return columns of equal length as arrays. Raises ValueError for other or no lengths."""
    arrays = [x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x) for x in columns]
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or not len(arrays[0]):
        raise ValueError(f"Columns of shape {shapes}: give one label, and one answer, for each.")
    return arrays


def as_binary(labels, scores) -> tuple[np.ndarray, np.ndarray]:
    """Return labels of 0 and 1, and scores as float64. Raises ValueError for any others."""
    labels, scores = as_rows(labels, scores)
    if not (known := np.isin(labels, (0, 1))).all():
        raise ValueError(f"A label is {labels[~known][0]!r}: a curve needs labels 0 and 1 only.")
    scores = scores.astype(np.float64)
    if np.isnan(scores).any():
        raise ValueError(f"Score {int(np.isnan(scores).argmax())} is NaN: it has no order.")
    return labels.astype(int), scores


def share(part, whole) -> float:
    """Return part / whole, and 0 for 0 / 0."""
    return float(part / whole) if whole else 0.0


# ---- of decisions -------------------------------------------------------------------------------


def confusion_matrix(labels, predicted, num_classes: int | None = None) -> np.ndarray:
    """Return how often each class (row) got each answer (column), (num_classes, num_classes)."""
    labels, predicted = as_rows(labels, predicted)
    highest = int(max(labels.max(), predicted.max()))
    n = highest + 1 if num_classes is None else num_classes
    if highest >= n or min(labels.min(), predicted.min()) < 0:
        raise ValueError(f"Classes go from 0 to {n - 1}, but one is {highest} or negative.")
    counts = np.zeros((n, n), dtype=int)
    np.add.at(counts, (labels.astype(int), predicted.astype(int)), 1)
    return counts


def accuracy(labels, predicted) -> float:
    """Return the share of answers that are right."""
    labels, predicted = as_rows(labels, predicted)
    return float((labels == predicted).mean())


def precision(labels, predicted, positive: int = 1) -> float:
    """Return how much of what was called positive is positive; 0 if nothing was called so."""
    labels, predicted = as_rows(labels, predicted)
    hits = ((labels == positive) & (predicted == positive)).sum()
    return share(hits, (predicted == positive).sum())


def recall(labels, predicted, positive: int = 1) -> float:
    """Return how much of what is positive was called so; 0 if nothing is positive."""
    return precision(predicted, labels, positive)


def f1_score(labels, predicted, positive: int = 1) -> float:
    """Return the harmonic mean of precision and recall; 0 if no answer and no label is positive.

    2 hits / (called positive + positive). van Rijsbergen, Information Retrieval, 1979, chapter 7.
    """
    labels, predicted = as_rows(labels, predicted)
    hits = ((labels == positive) & (predicted == positive)).sum()
    return share(2 * hits, (labels == positive).sum() + (predicted == positive).sum())


# ---- of scores, at every threshold --------------------------------------------------------------


def passing(labels, scores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return every threshold, from high to low, and the hits and false alarms that reach it.

    Equal scores pass together. The first threshold is infinite, and nothing reaches it.
    """
    labels, scores = as_binary(labels, scores)
    order = np.argsort(-scores, kind="stable")
    labels, scores = labels[order], scores[order]
    last = np.append(scores[1:] != scores[:-1], True)  # the last one of equal scores
    thresholds, hits = scores[last], labels.cumsum()[last]
    alarms = (1 - labels).cumsum()[last]
    return np.append(np.inf, thresholds), np.append(0, hits), np.append(0, alarms)


def roc_curve(labels, scores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the false positive rate, the true positive rate and the threshold of each point.

    A rate of a class that does not occur is NaN.
    """
    thresholds, hits, alarms = passing(labels, scores)
    with np.errstate(invalid="ignore"):
        return alarms / alarms[-1], hits / hits[-1], thresholds


def auroc(labels, scores) -> float:
    """Return the area under the ROC curve; NaN if only one class occurs.

    It is the chance that a positive scores higher than a negative, where a tie counts half.
    Hanley and McNeil, The Meaning and Use of the Area under a ROC Curve, 1982.
    """
    false, true, _ = roc_curve(labels, scores)
    return float((np.diff(false) * (true[1:] + true[:-1]) / 2).sum())


def precision_recall_curve(labels, scores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return precision, recall and threshold, from the highest threshold to the lowest.

    It begins with precision 1 at recall 0. Without a positive the recall of all others is 1.
    """
    thresholds, hits, alarms = passing(labels, scores)
    found = hits[1:] / hits[-1] if hits[-1] else np.ones(len(hits) - 1)
    return np.append(1.0, hits[1:] / (hits + alarms)[1:]), np.append(0.0, found), thresholds


def average_precision(labels, scores) -> float:
    """Return the precision, averaged over the recall that each threshold adds; 0 without hits."""
    precisions, recalls, _ = precision_recall_curve(labels, scores)
    return float((np.diff(recalls) * precisions[1:]).sum())


# ---- of probabilities ---------------------------------------------------------------------------


def reliability(labels, probs, n_bins: int = 10) -> pd.DataFrame:
    """Return for each bin of equal width what was predicted, on average, and what came true.

    A row for each bin that is not empty: `predicted`, `observed`, `count`. An edge belongs to the
    bin below it. Raises ValueError for a probability outside of 0 to 1.
    """
    labels, probs = as_binary(labels, probs)
    if (wrong := (probs < 0) | (probs > 1)).any():
        raise ValueError(f"{probs[wrong][0]} is no probability: they go from 0 to 1.")
    bins = np.searchsorted(np.linspace(0, 1, n_bins + 1)[1:-1], probs)
    table = pd.DataFrame({"bin": bins, "predicted": probs, "observed": labels})
    grouped = table.groupby("bin")
    return grouped.mean().assign(count=grouped.size()).reset_index(drop=True)


def calibration_error(labels, probs, n_bins: int = 10) -> float:
    """Return the expected calibration error: how far predicted is from observed, by bin, weighted.

    Naeini et al., Obtaining Well Calibrated Probabilities Using Bayesian Binning, 2015.
    """
    bins = reliability(labels, probs, n_bins)
    distance = (bins.predicted - bins.observed).abs()
    return float((distance * bins["count"]).sum() / bins["count"].sum())


def brier_score(labels, probs) -> float:
    """Return the mean squared distance of the probability from 0 or 1. Brier, 1950."""
    labels, probs = as_binary(labels, probs)
    return float(((probs - labels) ** 2).mean())


# ---- of two classifiers on the same examples ----------------------------------------------------


class Interval(NamedTuple):
    """A number, and the bounds between which 95 % of its resampled values lie."""

    value: float
    low: float
    high: float

    def __str__(self):
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired_difference(
    metric: Callable, labels, a, b, groups=None, n_resamples: int = 1000, seed: int = 0
) -> Interval:
    """Return metric(labels, a) − metric(labels, b) with a bootstrap interval of 95 %.

    Each resample draws as many examples as there are, with repetition, the same ones for a and b.
    With `groups` (N,) it draws whole groups, because messages that are alike stand or fall
    together. Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.
    """
    labels, a, b = as_rows(labels, a, b)
    (groups,) = as_rows(range(len(labels)) if groups is None else groups)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order])) + 1
    members = np.split(order, starts)

    def difference(rows):
        return metric(labels[rows], a[rows]) - metric(labels[rows], b[rows])

    rng, found = np.random.default_rng(seed), []
    for _ in range(n_resamples):
        drawn = rng.integers(len(members), size=len(members))
        found.append(difference(np.concatenate([members[i] for i in drawn])))
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(float(difference(slice(None))), float(low), float(high))
