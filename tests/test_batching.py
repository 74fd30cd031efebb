"""A row in a batch is what it is alone, whoever comes and goes beside it."""

import random
import threading
import time

import pytest
import torch

from support import batching
from support.batching import Batch, Engine, Row
from support.generate import generate
from support.gpt import GPTConfig, GPTModel
from support.llama import LlamaConfig, LlamaModel

V, CONTEXT = 17, 48


def lively(kind="gpt"):
    """A random model far from its first state, where all logits are nearly equal."""
    torch.manual_seed(0)
    model = {
        "gpt": lambda: GPTModel(GPTConfig(V, CONTEXT, d_model=32, n_heads=4, n_layers=3)),
        "llama": lambda: LlamaModel(LlamaConfig(V, CONTEXT, 48, 6, 2, 3, 80, 700.0)),
    }[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def requests(n, stop_ids=()):
    """Return n rows of all kinds, and for each how `generate` is asked for the same."""
    rng, rows, calls = random.Random(0), [], []
    for seed in range(n):
        prompt = rng.choices(range(V), k=rng.randint(1, CONTEXT - 12))
        new = rng.randint(1, min(30, CONTEXT - len(prompt)))
        how = [{"temperature": 0}, {"temperature": 1.3, "top_p": 0.9}, {"top_k": 5}][seed % 3]
        rows.append(Row(prompt, new, stop_ids, seed, **how))
        calls.append(([prompt], new, how))
    return rows, calls


def alone(model, call, seed, stop_id=None):
    prompts, new, how = call
    draws = torch.Generator().manual_seed(seed)
    return generate(model, prompts, new, stop_id=stop_id, generator=draws, **how)[0]


def all_alike(model, max_batch=5, n=40, stop_id=7):
    rows, calls = requests(n, {stop_id})
    engine = Engine(model, max_batch)
    for row in rows:
        engine.submit(row)
    engine.close()
    wanted = [alone(model, call, seed, stop_id) for seed, call in enumerate(calls)]
    assert {row.finish for row in rows} == {"stop", "length"}
    return [row.ids == want for row, want in zip(rows, wanted, strict=True)]


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_each_row_is_what_it_is_alone(kind):
    assert all(all_alike(lively(kind)))


def test_a_row_that_gets_its_neighbors_memory_would_be_seen(monkeypatch):
    right = batching.memory
    monkeypatch.setattr(batching, "memory", lambda caches, i, n: right(caches, max(i - 1, 0), n))
    assert not all(all_alike(lively()))


def test_a_row_that_looks_at_padding_would_be_seen():
    model = lively()
    right = model.hidden
    model.hidden = lambda ids, mask=None, cache=None: right(ids, None, cache)
    assert not all(all_alike(model))


def test_a_generator_that_rows_share_would_be_seen(monkeypatch):
    model, shared = lively(), torch.Generator()
    draw = Row.draw

    def shares(self, logits):
        self.generator = shared
        return draw(self, logits)

    monkeypatch.setattr(Row, "draw", shares)
    assert not all(all_alike(model))


def test_new_rows_join_and_done_ones_leave_at_once():
    batch = Batch(lively())
    for n in (1, 4, 2):
        batch.join(Row([1, 2, 3], n, temperature=0))
    sizes = []
    while batch.rows:
        sizes.append(len(batch.rows))
        batch.step()
        if len(sizes) == 1:
            batch.join(Row([5] * 9, 2, temperature=0))
    assert sizes == [3, 3, 2, 1]
    assert batch.mask.shape[1] <= 3 + 4  # what only the long prompt needed is gone


def test_the_cache_is_as_long_as_the_longest_row_needs():
    batch = Batch(lively())
    batch.join(Row([1] * 30, 2, temperature=0))
    batch.join(Row([1] * 3, 5, temperature=0))
    assert batch.caches[0].size == 32 and batch.caches[0].length == 30
    batch.step()
    batch.step()
    assert batch.caches[0].size == 8 and batch.caches[0].length <= 6


class Waiting(Row):
    """A row that waits at each token until it may go on."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.go_on, self.told = threading.Semaphore(0), []

    def add(self, token):
        assert self.go_on.acquire(timeout=10)
        super().add(token)

    def fail(self, error):
        super().fail(error)
        self.told.append(error)


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_cancelled_row_leaves_and_frees_its_place():
    engine = Engine(lively(), max_batch=1)
    first, second = Waiting([1], 40), Waiting([2], 1)
    third = Row([3], 5)
    for row in (first, second, third):
        engine.submit(row)
    wait_for(lambda: engine.batch.rows == [first])
    second.cancelled = first.cancelled = True
    first.go_on.release()
    engine.close()
    assert first.finish == "cancelled" and len(first.ids) == 2
    assert second.finish == "cancelled" and len(second.ids) == 1  # it never ran
    assert third.finish == "length"


def test_time_runs_out():
    engine = Engine(lively(), max_batch=1)
    first = Waiting([1], 40, deadline=time.monotonic() + 0.05)
    second = Waiting([2], 1, deadline=time.monotonic() + 0.05)
    engine.submit(first)
    engine.submit(second)
    time.sleep(0.1)
    first.go_on.release()
    engine.close()
    assert first.finish == "length" and len(first.ids) == 2
    assert isinstance(second.told[0], TimeoutError) and len(second.ids) == 1


def test_an_error_in_the_model_ends_its_batch_and_not_the_engine():
    model = lively()
    right = model.hidden

    def fragile(ids, mask=None, cache=None):
        if 16 in ids[:, :-1]:
            raise FloatingPointError("a prompt with 16 in it is too much")
        return right(ids, mask, cache)

    model.hidden = fragile
    engine = Engine(model, max_batch=3)
    bad, good = Waiting([16, 1], 5), Row([1, 2], 5, temperature=0)
    engine.submit(bad)
    wait_for(lambda: bad.finish)
    engine.submit(good)
    engine.close()
    assert isinstance(bad.told[0], FloatingPointError)
    assert good.ids == generate(model, [[1, 2]], 5, temperature=0)[0]


def test_a_closed_engine_says_so_and_an_idle_one_ends():
    engine = Engine(lively(), max_batch=2)
    engine.close()
    assert not engine.thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(Row([1], 1))


def test_without_a_seed_two_rows_differ_and_nobody_elses_random_numbers_are_used():
    model, before = lively(), torch.get_rng_state()
    engine = Engine(model, max_batch=2)
    rows = [Row([1], 30, temperature=2.0) for _ in range(2)]
    for row in rows:
        engine.submit(row)
    engine.close()
    assert rows[0].ids != rows[1].ids
    assert torch.equal(torch.get_rng_state(), before)
