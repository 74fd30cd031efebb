"""Our metrics equal scikit-learn's on any labels and scores: ties, one class, empty classes."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn import metrics as theirs
from sklearn.calibration import calibration_curve

from support import metrics as ours

FAST = settings(deadline=None, max_examples=200, derandomize=True, database=None)

# Few different scores, so that most of them are tied; now and then all labels are the same.
scores = st.one_of(st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.floats(0, 1))
label = st.one_of(st.integers(0, 1), st.just(0))
scored = st.lists(st.tuples(label, scores), min_size=1, max_size=40)
answers = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)
one_class = [[(0, 0.3)], [(1, 0.3), (1, 0.3)], [(0, 0.1), (0, 0.7), (0, 0.7)]]


def columns(pairs):
    return (np.array(column) for column in zip(*pairs, strict=True))


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12, equal_nan=True)


@pytest.fixture(autouse=True)
def quiet():
    """scikit-learn warns where a class is missing; what it returns there is what we compare."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@FAST
@given(answers)
def test_decisions(pairs):
    labels, predicted = columns(pairs)
    close(ours.accuracy(labels, predicted), theirs.accuracy_score(labels, predicted))
    table = theirs.confusion_matrix(labels, predicted, labels=range(4))
    assert (ours.confusion_matrix(labels, predicted, 4) == table).all()
    for positive in range(4):  # now and then a class that has no label, no answer, or neither
        truth, called = labels == positive, predicted == positive
        want = theirs.precision_recall_fscore_support(
            truth, called, average="binary", zero_division=0
        )
        functions = (ours.precision, ours.recall, ours.f1_score)
        close([f(labels, predicted, positive) for f in functions], want[:3])


@FAST
@given(scored)
@example(one_class[0])
@example(one_class[1])
@example(one_class[2])
def test_curves(pairs):
    labels, values = columns(pairs)
    for mine, other in zip(
        ours.roc_curve(labels, values),
        theirs.roc_curve(labels, values, drop_intermediate=False),
        strict=True,
    ):
        close(mine, other)
    close(ours.auroc(labels, values), theirs.roc_auc_score(labels, values))
    precisions, recalls, thresholds = ours.precision_recall_curve(labels, values)
    other = theirs.precision_recall_curve(labels, values)
    for mine, curve in zip((precisions, recalls, thresholds[1:]), other, strict=True):
        close(mine[::-1], curve)
    close(ours.average_precision(labels, values), theirs.average_precision_score(labels, values))


@FAST
@given(scored)
def test_auroc_is_the_share_of_pairs_in_the_right_order(pairs):
    labels, values = columns(pairs)
    ups, downs = values[labels == 1], values[labels == 0]
    won = [(a > b) + (a == b) / 2 for a in ups for b in downs]
    assert ours.auroc(labels, values) == pytest.approx(
        sum(won) / len(won) if won else math.nan, nan_ok=True
    )


@FAST
@given(scored, st.integers(1, 12))
def test_calibration(pairs, n_bins):
    labels, probs = columns(pairs)
    bins = ours.reliability(labels, probs, n_bins)
    observed, predicted = calibration_curve(labels, probs, n_bins=n_bins)
    close(bins.observed, observed)
    close(bins.predicted, predicted)
    assert bins["count"].sum() == len(pairs)
    close(ours.brier_score(labels, probs), np.mean((probs - labels) ** 2))
    if len(set(labels)) == 2:
        close(ours.brier_score(labels, probs), theirs.brier_score_loss(labels, probs))
    weights = bins["count"] / len(pairs)
    error = (weights * (bins.predicted - bins.observed).abs()).sum()
    close(ours.calibration_error(labels, probs, n_bins), error)


def test_infinite_scores_tie_and_integers_tensors_and_lists_will_do():
    labels, values = [0, 1, 1, 0], [-math.inf, math.inf, math.inf, math.inf]
    assert ours.auroc(labels, values) == pytest.approx(0.75)
    assert ours.auroc(torch.tensor(labels), torch.tensor([1.0, 3, 2, 2])) == pytest.approx(0.875)
    assert ours.auroc(labels, np.array([1, 3, 2, 2], dtype=np.uint8)) == pytest.approx(0.875)
    assert ours.auroc([True, False], torch.tensor([2.0, 1.0], requires_grad=True)) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ours.accuracy([0, 1], [0]), r"\(2,\), \(1,\)"),
        (lambda: ours.accuracy([], []), "one label"),
        (lambda: ours.accuracy([[0]], [[0]]), r"\(1, 1\)"),
        (lambda: ours.auroc([0, 2], [0.1, 0.2]), "A label is .*2"),
        (lambda: ours.auroc([0, 1], [0.1, math.nan]), "Score 1 is NaN"),
        (lambda: ours.confusion_matrix([0, 3], [1, 1], 3), "0 to 2, but one is 3"),
        (lambda: ours.confusion_matrix([0, -1], [1, 1], 3), "negative"),
        (lambda: ours.reliability([0, 1], [0.5, 1.5]), "1.5 is no probability"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_bootstrap_is_paired_and_draws_whole_groups():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 400)
    b = np.where(rng.random(400) < 0.8, labels, 1 - labels)
    a = np.where((b != labels) & (rng.random(400) < 0.25), labels, b)  # b, a few mistakes mended
    better = ours.paired_difference(ours.accuracy, labels, a, b)
    assert better.value == pytest.approx((a == labels).mean() - (b == labels).mean())
    assert 0 < better.low < better.value < better.high < 0.1
    assert ours.paired_difference(ours.accuracy, labels, a, a)[1:] == (0, 0)
    # The standard error of a mean of paired differences, without any resampling.
    error = ((a == labels).astype(float) - (b == labels)).std() / 20
    assert (better.high - better.low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    # Four copies of each example are no new evidence: only as groups they leave the interval.
    copies = [np.repeat(x, 4) for x in (labels, a, b)]
    naive = ours.paired_difference(ours.accuracy, *copies)
    grouped = ours.paired_difference(ours.accuracy, *copies, groups=np.repeat(np.arange(400), 4))
    assert naive.high - naive.low < 0.6 * (better.high - better.low)
    assert grouped == pytest.approx(better)
    assert str(ours.Interval(0.0123, -0.001, 0.02)) == "+0.012 [-0.001, +0.020]"
