"""lm-eval's numbers are ours: its windows, its scores, its task, its own model on our weights."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from support.evaluate import (
    Question,
    accuracy_by_rule,
    bootstrap,
    choice_scores,
    windows,
)
from support.generate import generate
from support.harness import for_lm_eval, run
from support.pretrained import export, load
from support.storyworld import stories

ROOT = Path(__file__).resolve().parents[2]
TASK = ROOT / "data" / "tasks" / "everyday.yaml"


@pytest.fixture(scope="module")
def story():
    return load("story")


@pytest.fixture(scope="module")
def ours(story):
    return for_lm_eval(*story)


@pytest.fixture(scope="module")
def theirs(story, tmp_path_factory):
    """lm-eval's own model, with the weights as we export them."""
    folder = tmp_path_factory.mktemp("story")
    export(*story, folder)
    options = {"device": "cpu", "dtype": "float32", "batch_size": 8, "add_bos_token": False}
    return HFLM(pretrained=str(folder), **options)


@pytest.mark.parametrize("n", [2, 16, 17, 50])
@pytest.mark.parametrize("stride", [1, 5, 16])
def test_windows(n, stride):
    prefix, *ids = range(n)
    rolling = get_rolling_token_windows(ids, prefix, max_seq_len=16, context_len=17 - stride)
    assert [make_disjoint_window(pair) for pair in rolling] == windows([prefix, *ids], 16, stride)


def requests(kind, arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


STORY = next(stories(3, "test")).text
PAIRS = [
    ("Once upon a time, there was a", " brave fox."),
    ("Once upon a time, there was a ", "brave fox."),
    ("Once", " upon a time"),
    ("", "Once upon a time"),
    ("a \n", "b"),
    ("é😀", " naïve"),
    (STORY * 3, " The end."),
]


def test_loglikelihood(ours, theirs):
    both = [model.loglikelihood(requests("loglikelihood", PAIRS)) for model in (ours, theirs)]
    for (a, a_greedy), (b, b_greedy) in zip(*both, strict=True):
        assert a == pytest.approx(b, abs=1e-3) and a_greedy == b_greedy
    assert {greedy for _, greedy in both[0]} == {True, False}


def test_loglikelihood_rolling(ours, theirs):
    texts = [(STORY,), (STORY * 4,), ("Once",), ("naïve 😀",)]
    both = [
        m.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for m in (ours, theirs)
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-5)


def test_generate_until(ours, theirs):
    starts = [STORY[:40], STORY[:97], "Once upon a time", STORY * 3]
    how = {"max_gen_toks": 24, "do_sample": False}
    for until in (["."], ["\n\n", ","], []):
        calls = [(start, how | {"until": until}) for start in starts]
        both = [m.generate_until(requests("generate_until", calls)) for m in (ours, theirs)]
        assert both[0] == both[1] and any(both[0])


def test_generate_from_nothing_and_without_end(story, ours):
    (text,) = ours.generate_until(requests("generate_until", [("", {"max_gen_toks": 9999})]))
    model, tokenizer = story
    row = generate(model, [[ours.end_id]], 383, temperature=0, stop_id=ours.end_id)[0][1:]
    assert text == tokenizer.decode([i for i in row if i != ours.end_id]) and len(text) > 100


@pytest.fixture(scope="module")
def results(story, ours, theirs, tmp_path_factory):
    before = Path.cwd()
    os.chdir(ROOT)  # the task says where its data are from there
    try:
        cache = str(tmp_path_factory.mktemp("datasets"))
        return [run(model, TASK, cache_dir=cache) for model in (ours, theirs)]
    finally:
        os.chdir(before)


def test_the_task(story, results):
    lines = (ROOT / "data/tasks/everyday.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    questions = [
        Question(
            f"Question: {x['question']}\nAnswer:", tuple(f" {c}" for c in x["choices"]), x["answer"]
        )
        for x in items
    ]
    right = accuracy_by_rule(choice_scores(*story, questions, neutral="")).mean()
    harness = results[0]
    assert harness["acc"] == right["sum"] and harness["acc_mutual_info"] == right["calibrated"]
    assert (
        harness["acc_bytes"] == harness["acc_norm"] == right["per byte"]
    )  # letters are bytes here
    assert len(set(harness.values())) > 1


def test_their_model_gets_the_same_numbers(results):
    assert results[0] == results[1]


def test_a_wrong_score_would_be_seen(story, results, monkeypatch):
    """The planted fault: the context ends one token too early."""
    from support import harness

    right = harness.encode_pair

    def shorter(*args):
        context, continuation = right(*args)
        return context[:-1] or context, continuation

    monkeypatch.setattr(harness, "encode_pair", shorter)
    got = for_lm_eval(*story).loglikelihood(requests("loglikelihood", PAIRS[:2]))
    monkeypatch.undo()
    want = for_lm_eval(*story).loglikelihood(requests("loglikelihood", PAIRS[:2]))
    assert abs(got[0][0] - want[0][0]) > 0.01


def test_the_bootstrap_is_scipys():
    values = np.random.default_rng(1).exponential(size=80)
    for statistic in (np.mean, np.median):
        theirs = scipy.stats.bootstrap(
            (values,), statistic, n_resamples=20_000, method="percentile", rng=0
        ).confidence_interval
        ours = bootstrap(values, statistic, n=20_000)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)
        assert ours.value == statistic(values)
