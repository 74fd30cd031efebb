"""Sampling equals transformers' warpers, and generation its `generate`, row by row."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from support.generate import generate, next_token_probs, sample, stream
from support.gpt import GPTConfig, GPTModel
from support.tokenizer import BPETokenizer

V, CONTEXT = 61, 16
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]


def lively(seed=0, **options) -> GPTModel:
    """A model far from its first state, so that it does not say one thing over and over."""
    torch.manual_seed(seed)
    model = GPTModel(GPTConfig(V, CONTEXT, d_model=32, n_heads=4, n_layers=3, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


class Scripted(nn.Module):
    """A model that says what its script says: row b's t-th new token is script[b][t]."""

    def __init__(self, script: list[list[int]], prompt_length: int, vocab_size: int = V):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, context_length=1000)
        self.blocks, self.anything = [], nn.Parameter(torch.zeros(1))
        self.script, self.prompt_length, self.calls = torch.tensor(script), prompt_length, 0

    def forward(self, ids, mask=None, cache=None):
        self.calls += 1
        said = self.script[:, ids.shape[1] - self.prompt_length]  # (B,)
        return 9.0 * F.one_hot(said, self.config.vocab_size)[:, None].expand(*ids.shape, -1)


# ---- which token --------------------------------------------------------------------------------

LOGITS = 3 * torch.randn(50, V, generator=torch.Generator().manual_seed(0))
TIES = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0], [5.0, 5.0, 5.0, 5.0, 5.0, 5.0]])


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 2, 3, 20, 1000])
def test_probabilities_equal_transformers_warpers(temperature, top_k):
    transformers = pytest.importorskip("transformers")
    cases = [(TIES, None)]  # which of equal tokens top-p drops would depend on the sort
    cases += [(LOGITS, top_p) for top_p in (None, 1e-9, 0.3, 0.55, 0.9, 0.999, 1.0)]
    for logits, top_p in cases:
        warped = transformers.TemperatureLogitsWarper(temperature)(None, logits)
        if top_k is not None:
            warped = transformers.TopKLogitsWarper(top_k)(None, warped)
        if top_p is not None:
            warped = transformers.TopPLogitsWarper(top_p)(None, warped)
        want = warped.softmax(-1)
        got = next_token_probs(logits, temperature, top_k, top_p)
        assert torch.equal(got > 0, want > 0)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
        one = next_token_probs(logits[0], temperature, top_k, top_p)
        torch.testing.assert_close(one, got[0], rtol=1e-6, atol=1e-7)


def test_tokens_that_equal_the_kth_are_kept():
    assert [(next_token_probs(TIES[0], top_k=k) > 0).sum() for k in range(1, 7)] == [
        1,
        4,
        4,
        4,
        5,
        6,
    ]
    assert (next_token_probs(TIES[1], top_k=1) > 0).all()


def test_top_p_keeps_as_few_tokens_as_reach_p():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log()
    for top_p, kept in [(0.4, 1), (0.6, 2), (0.74, 2), (0.76, 3), (0.9, 4), (0.95, 5)]:
        assert (next_token_probs(logits, top_p=top_p) > 0).sum() == kept
    equal = next_token_probs(torch.zeros(8), top_p=0.5)  # exactly half of eight
    assert (equal > 0).sum() == 4 and equal.max() == 0.25


def test_top_p_counts_what_top_k_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()  # of two, the best alone has 0.57
    assert (next_token_probs(logits, top_k=2, top_p=0.55) > 0).tolist() == [True, False] + [
        False
    ] * 2
    assert (next_token_probs(logits, top_p=0.55) > 0).tolist() == [True, True, False, False]


def test_temperature_0_is_greedy_and_draws_nothing():
    before = torch.get_rng_state()
    assert torch.equal(sample(LOGITS, temperature=0), LOGITS.argmax(-1))
    assert torch.equal(next_token_probs(LOGITS, 0).argmax(-1), LOGITS.argmax(-1))
    assert torch.equal(torch.get_rng_state(), before)


def test_tokens_come_as_often_as_their_probabilities_say():
    logits, n = LOGITS[0], 20_000
    drawn = sample(logits.expand(n, V), 1.5, 20, 0.9, torch.Generator().manual_seed(0))
    probs = next_token_probs(logits, 1.5, 20, 0.9)
    counts = drawn.bincount(minlength=V)
    assert (counts[probs == 0] == 0).all()
    expected = n * probs[probs > 0]
    chi_square = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 2.5 * len(expected)


def test_low_precision_logits_are_sampled_in_float32():
    probs = next_token_probs(LOGITS.bfloat16(), top_p=0.9)
    assert probs.dtype == torch.float32 and torch.allclose(probs.sum(-1), torch.ones(50))


# ---- one after the other ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_greedy_equals_transformers(gpt_pair, seed):
    theirs, ours = gpt_pair(seed)
    ids = torch.randint(V, (4, 5))
    all_real = torch.ones_like(ids)
    want = theirs.generate(ids, attention_mask=all_real, max_new_tokens=11, do_sample=False)
    got = generate(ours, ids, 11, temperature=0)
    assert want.shape == (4, 16) and len(want[:, 5:].unique()) > 3
    assert torch.equal(got, want)


@pytest.mark.parametrize("seed", range(3))
def test_unequal_prompts_and_stop_equal_transformers(gpt_pair, seed):
    theirs, ours = gpt_pair(seed)
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    free = generate(ours, PROMPTS, 9, temperature=0)
    stop_id = free[1][len(PROMPTS[1]) + 2]  # the second row's third new token
    want = theirs.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=stop_id,
        pad_token_id=V - 1,
    )
    got = generate(ours, PROMPTS, 9, temperature=0, stop_id=stop_id)
    for mine, other, prompt in zip(got, want[:, width:].tolist(), PROMPTS, strict=True):
        new = mine[len(prompt) :]
        assert mine[: len(prompt)] == prompt
        assert new == other[: len(new)] and set(other[len(new) :]) <= {V - 1}
        assert len(new) == 9 or new[-1] == stop_id
        assert stop_id not in new[:-1]


def by_hand(model, prompt, n):
    """Greedy generation at its plainest: one row, no cache, the last tokens that fit."""
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids[-CONTEXT:]]))[0, -1].argmax()))
    return ids


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_each_row_is_what_it_is_alone_even_past_the_context(use_cache, seed):
    model, n = lively(seed), 22
    prompts = [*PROMPTS, list(range(CONTEXT)), list(range(20, 20 + CONTEXT + 5))]
    want = [by_hand(model, prompt, n) for prompt in prompts]
    assert len({i for row in want for i in row[-n:]}) > 10
    for some in (prompts, prompts[:4]):  # with and without one that is too long from the start
        got = generate(model, some, n, temperature=0, use_cache=use_cache)
        assert got == want[: len(some)]
    for prompt, row in zip(prompts, want, strict=True):
        out = generate(model, torch.tensor([prompt]), n, 0, use_cache=use_cache)
        assert out.tolist() == [row]
        assert list(stream(model, prompt, n, temperature=0, use_cache=use_cache)) == row[-n:]


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("ids", [torch.tensor([[1, 2, 3], [4, 5, 6]]), PROMPTS])
def test_cache_on_equals_cache_off(ids, temperature):
    model = lively()
    on, off = (
        generate(model, ids, 20, temperature, 10, 0.9, None, torch.Generator().manual_seed(3), on)
        for on in (True, False)
    )
    assert torch.equal(on, off) if isinstance(ids, torch.Tensor) else on == off


def test_the_cache_is_used():
    model, lengths = lively(), []
    model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    generate(model, torch.tensor([[1, 2, 3]]), 20)
    assert lengths == [3] + [1] * 13 + [16] * 6  # up to the context, then whole windows
    lengths.clear()
    generate(model, torch.tensor([[1, 2, 3]]), 5, use_cache=False)
    assert lengths == [3, 4, 5, 6, 7]


def test_each_row_stops_on_its_own():
    script = [[5, 9, 5, 5, 5, 5], [5, 5, 5, 9, 5, 5], [9, 5, 5, 5, 5, 5]]
    ids = torch.tensor([[1, 9], [2, 9], [3, 9]])  # 9 in a prompt does not stop it
    model = Scripted(script, prompt_length=2)
    out = generate(model, ids, 6, temperature=0, stop_id=9)
    assert out[:, 2:].tolist() == [[5, 9, 9, 9], [5, 5, 5, 9], [9, 9, 9, 9]]
    assert model.calls == 4  # the batch ends when all rows have
    rows = generate(model, ids.tolist(), 6, temperature=0, stop_id=9)
    assert rows == [[1, 9, 5, 9], [2, 9, 5, 5, 5, 9], [3, 9, 9]]
    assert generate(model, ids.tolist(), 2, 0, stop_id=9) == [[1, 9, 5, 9], [2, 9, 5, 5], [3, 9, 9]]


def test_generator_makes_it_repeatable():
    model, ids = lively(), torch.tensor([[1, 2, 3]] * 4)
    before = torch.get_rng_state()
    runs = [generate(model, ids, 20, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert len({tuple(row) for row in runs[0].tolist()}) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_modes_are_left_as_they_were():
    model, ids = lively(dropout=0.5), torch.tensor([[1, 2, 3]])
    model.train()
    model.blocks[0].eval()  # a frozen block, say
    modes = [module.training for module in model.modules()]
    assert torch.equal(generate(model, ids, 9, 0), generate(model, ids, 9, 0))  # without dropout
    assert [module.training for module in model.modules()] == modes
    for _ in stream(model, [1, 2, 3], 9):
        break
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError):
        generate(model, ids, 9, top_p=0)
    assert [module.training for module in model.modules()] == modes


def test_gradients_are_off_only_within():
    model, seen = lively(), []
    model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    for _ in stream(model, [1], 3):
        assert torch.is_grad_enabled()
    assert torch.is_grad_enabled() and seen == [False] * 3


def test_generated_ids_can_be_trained_on():
    model = lively()
    model(generate(model, torch.tensor([[1, 2, 3]]), 5)).sum().backward()


def test_results_keep_the_prompt_its_kind_and_its_length():
    model, ids = lively(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    out = generate(model, ids, 7)
    assert out.shape == (2, 10) and out.dtype == torch.long and torch.equal(out[:, :3], ids)
    assert generate(model, PROMPTS, 0) == PROMPTS and PROMPTS[1] == [8, 9]
    assert torch.equal(generate(model, ids, 0), ids)
    assert [len(row) for row in generate(model, PROMPTS, 3)] == [10, 5, 7, 4]
    assert out.min() >= 0 and out.max() < V


# ---- for display --------------------------------------------------------------------------------


def test_stream_gives_whole_characters():
    text = "naïve 😀👩‍👩‍👧 日本語"
    tokenizer = BPETokenizer.train("", 256)  # a token a byte: nearly all characters are split
    said = tokenizer.encode(text)
    pieces = list(stream(Scripted([said], 1, 256), [65], len(said), tokenizer, temperature=0))
    assert "".join(pieces) == text and pieces == list(text)


def test_stream_ends_with_what_is_there():
    tokenizer = BPETokenizer.train("", 257, ["<end>"])
    cut = [*b"ab", 0xF0, 0x9F]
    model = Scripted([[*cut, 256, 65]], 1, 257)
    pieces = list(stream(model, [65], 6, tokenizer, temperature=0, stop_id=256))
    assert pieces == ["a", "b", tokenizer.decode(cut[2:])]
    assert list(stream(model, [65], 6, temperature=0, stop_id=256)) == [*cut, 256]
    broken = [0xFF, 0x61, 0xFF, 0xFF, 0xC3, 0xA9]
    model = Scripted([broken], 1, 257)
    pieces = list(stream(model, [65], 6, tokenizer, temperature=0))
    assert "".join(pieces) == tokenizer.decode(broken)


# ---- what makes no sense ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": -0.1, "temperature": 0}, "top_p=-0.1"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"ids": []}, "empty"),
        ({"ids": [[1], []]}, "empty"),
        ({"ids": torch.empty(1, 0, dtype=torch.long)}, "empty"),
        ({"ids": torch.empty(0, 5, dtype=torch.long)}, "empty"),
        ({"ids": [[1, V]]}, f"id {V}.*0 to {V - 1}"),
        ({"ids": torch.tensor([[-3]])}, "id -3"),
        ({"ids": [1, 2]}, "row"),
        ({"ids": torch.tensor([1, 2])}, "row"),
    ],
)
def test_errors_name_the_value(change, message):
    with pytest.raises(ValueError, match=message):
        generate(**{"model": lively(), "ids": [[1]], "max_new_tokens": 3} | change)
