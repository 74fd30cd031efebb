"""Scores of texts and answers equal plain ones, and intervals behave as intervals should."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from support import evaluate
from support.evaluate import (
    Interval,
    Question,
    accuracy_by_rule,
    bootstrap,
    choice_scores,
    continuation_log_probs,
    encode_pair,
    exact_match,
    normalize_answer,
    overlap,
    score_texts,
    text_log_probs,
    windows,
    word_runs,
)
from support.gpt import GPTConfig, GPTModel
from support.tokenizer import BPETokenizer

V, CONTEXT = 300, 16


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(
        "low lower lowest and the new newer newest " * 9, V, ["<|endoftext|>"]
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(V, CONTEXT, d_model=32, n_heads=4, n_layers=2, dropout=0.5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model  # in training mode, with dropout


@torch.no_grad()
def naive(model, before, token):
    """The plain way: one pass for one token."""
    was, model.training = model.training, False
    model.eval()
    log_probs = model(torch.tensor([before]))[0, -1].log_softmax(-1)
    model.train(was)
    return log_probs[token].item(), int(log_probs.argmax())


def some(n, seed=0):
    return torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


# ---- likelihood ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_continuations_equal_one_pass_for_each_token(model, batch_size):
    ids = some(60)
    cuts = [(0, 1, 1), (3, 5, 4), (8, 2, 9), (20, 10, 1), (1, 15, 1), (30, 16, 1), (2, 12, 8)]
    pairs = [(ids[i : i + a], ids[i + a : i + a + b]) for i, a, b in cuts]
    model.train()
    for (context, continuation), (scores, likeliest) in zip(
        pairs, continuation_log_probs(model, pairs, batch_size), strict=True
    ):
        whole, best = [*context, *continuation], []
        for t, score in zip(range(len(context), len(whole)), scores, strict=True):
            start = max(0, len(whole) - 1 - CONTEXT)  # what is too long loses its beginning
            want, top = naive(model, whole[start:t], whole[t])
            assert score.item() == pytest.approx(want, abs=1e-4)
            best.append(top == whole[t])
        assert likeliest == all(best)
    assert model.training


def test_a_likeliest_continuation_is_recognized(model):
    context = some(5)
    row = list(context)
    for _ in range(3):
        row.append(naive(model, row, 0)[1])
    (_, yes), (_, no) = continuation_log_probs(
        model, [(context, row[5:]), (context, [*row[5:7], (row[7] + 1) % V])]
    )
    assert yes and not no


def test_what_cannot_be_scored_is_refused(model):
    for pair in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="at least one token"):
            continuation_log_probs(model, [pair])
    with pytest.raises(ValueError, match="17 tokens exceeds 16"):
        continuation_log_probs(model, [([1], [2] * 17)])
    with pytest.raises(ValueError, match="nothing to score in 1 tokens"):
        text_log_probs(model, [5])
    for stride in (0, 17):
        with pytest.raises(ValueError, match=f"stride={stride}"):
            text_log_probs(model, some(30), stride) if stride else windows(some(30), 16, 0)


@pytest.mark.parametrize("n", [2, 3, 15, 16, 17, 18, 33, 50])
@pytest.mark.parametrize("stride", [1, 3, 8, 15, 16])
def test_every_token_is_scored_once_with_all_the_context_that_fits(n, stride):
    ids = list(range(n))
    pairs = windows(ids, CONTEXT, stride)
    assert [i for _, continuation in pairs for i in continuation] == ids[1:]
    for k, (context, continuation) in enumerate(pairs):
        assert [*context, *continuation] == ids[context[0] : continuation[-1] + 1]
        seen = len(context) + len(continuation) - 1  # the last token is only a target
        assert seen == min(CONTEXT, continuation[-1])
        assert len(continuation) == (stride if k else CONTEXT) or k == len(pairs) - 1


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_a_long_text_equals_one_pass_for_each_token(model, stride):
    ids = some(45)
    scores = text_log_probs(model, ids, stride)
    assert len(scores) == 44
    at = 0
    for context, continuation in windows(ids, CONTEXT, stride):
        for j, token in enumerate(continuation):
            want, _ = naive(model, [*context, *continuation[:j]], token)
            assert scores[at].item() == pytest.approx(want, abs=1e-4)
            at += 1
    assert at == 44


def test_a_window_that_is_cut_short_would_be_seen(model, monkeypatch):
    """The planted fault: a window that keeps one token less of context."""
    ids, right = some(45), windows
    before = text_log_probs(model, ids, 4)
    monkeypatch.setattr(
        evaluate, "windows", lambda *a: [(c[1:] if c[1:] else c, x) for c, x in right(*a)]
    )
    assert (text_log_probs(model, ids, 4) - before).abs().max() > 1e-3


def test_scores_of_texts(model, tokenizer):
    texts = ["low and lower", "newest é 😀 the lowest " * 6]
    rows = score_texts(model, tokenizer, texts, stride=4)
    for text, row in zip(texts, rows.itertuples(), strict=True):
        ids = [tokenizer.special_tokens["<|endoftext|>"], *tokenizer.encode(text)]
        assert row.nats == pytest.approx(-text_log_probs(model, ids, 4).sum().item(), rel=1e-5)
        assert (row.tokens, row.bytes) == (len(ids) - 1, len(text.encode()))


# ---- multiple choice ----------------------------------------------------------------------------


def test_pairs_are_cut_where_the_whole_is_cut(tokenizer):
    end = tokenizer.special_tokens["<|endoftext|>"]
    for context, continuation in [
        ("low", " lower"),
        ("low ", "lower"),
        ("a b  \n", "c"),
        ("", "x"),
    ]:
        first, second = encode_pair(tokenizer, context, continuation)
        assert (
            tokenizer.decode([i for i in [*first, *second] if i != end]) == context + continuation
        )
    assert encode_pair(tokenizer, "low ", "lower") == encode_pair(tokenizer, "low", " lower")
    assert encode_pair(tokenizer, "", "low")[0] == encode_pair(tokenizer, "  ", "low")[0] == [end]


QUESTIONS = [
    Question("low lower", (" lowest", " newest of the newer", " é"), 0),
    Question("the new", (" and", " newer and the lowest", " low low"), 1),
    Question("and", (" the", " a", " new"), 2),
]


def test_the_four_rules(model, tokenizer):
    table = choice_scores(model, tokenizer, QUESTIONS, neutral="the")
    assert len(table) == 9 and table.right.sum() == 3
    for row in table.itertuples(index=False):
        question = QUESTIONS[row.question]
        choice = question.choices[row.choice]
        context, ids = encode_pair(tokenizer, question.context, choice)
        totals = []
        for start in (context, encode_pair(tokenizer, "the", choice)[0]):
            whole = [*start, *ids]
            steps = range(len(start), len(whole))
            totals.append(
                sum(naive(model, whole[max(0, len(whole) - 17) : t], whole[t])[0] for t in steps)
            )
        want = [totals[0], totals[0] / len(ids), totals[0] / len(choice.strip().encode())]
        want.append(totals[0] - totals[1])
        assert list(row[3:]) == pytest.approx(want, abs=1e-3)


def test_the_best_choice_by_each_rule_counts():
    scores = pd.DataFrame(
        {
            "question": [0, 0, 1, 1],
            "choice": [0, 1, 0, 1],
            "right": [True, False, False, True],
            "sum": [-1.0, -2.0, -3.0, -4.0],
            "per byte": [-1.0, -2.0, -5.0, -4.0],
        }
    )
    right = accuracy_by_rule(scores)
    assert right["sum"].tolist() == [True, False] and right["per byte"].tolist() == [True, True]


# ---- written answers, contamination -------------------------------------------------------------


def test_normalized_answers():
    assert normalize_answer(" The  Fox, and an owl!\n") == "fox and owl"
    assert normalize_answer("theater a-b") == "theater ab"
    assert exact_match("Paris.", ["paris", "Rome"]) and exact_match("the fox", ["A fox"])
    assert not exact_match("Paris, France", ["Paris"]) and not exact_match("", ["Paris"])


def test_overlap():
    seen = set(word_runs("The fox ran home. The owl sat.", 3))
    assert ("home", "the", "owl") in seen and len(seen) == 5
    assert overlap("the FOX ran, home!", seen, 3) == 1
    assert overlap("the fox ran away", seen, 3) == 0.5
    assert overlap("no such words here", seen, 3) == 0
    assert math.isnan(overlap("too short", seen, 3))


# ---- intervals ----------------------------------------------------------------------------------


def test_the_interval_of_three_items_is_that_of_all_their_samples():
    items = [1.0, 2.0, 6.0]
    means = [np.mean(drawn) for drawn in itertools.product(items, repeat=3)]
    low, high = np.quantile(means, [0.1, 0.9])
    got = bootstrap(items, level=0.8, n=20_000)
    assert got.value == 3 and (got.low, got.high) == pytest.approx((low, high), abs=0.05)
    assert str(Interval(0.5, 0.25, 1.0)) == "0.500 [0.250, 1.000]"


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    rng, held = np.random.default_rng(0), 0
    for trial in range(200):
        _, low, high = bootstrap(rng.random(60) < 0.3, n=400, seed=trial)
        held += low <= 0.3 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_a_paired_difference_is_surer_than_two_intervals():
    rng = np.random.default_rng(0)
    hard = rng.random(100)
    pairs = np.stack([hard < 0.60, hard < 0.66], axis=1).astype(float)

    def gain(rows):
        return rows[:, 1].mean() - rows[:, 0].mean()

    paired = bootstrap(pairs, gain)
    a, b = (bootstrap(column) for column in pairs.T)
    assert a.high > b.low  # alone, the two overlap
    assert paired.low > 0
    assert paired == pytest.approx(bootstrap(pairs[:, 1] - pairs[:, 0]))
    assert bootstrap(pairs, gain, seed=1) != paired and bootstrap(pairs, gain) == paired
    with pytest.raises(ValueError, match="1 items"):
        bootstrap([0.5])
