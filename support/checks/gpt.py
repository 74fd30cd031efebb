"""The exercises of chapter 4, a GPT."""

import torch
import torch.nn.functional as F
from torch import Tensor

from support.checks import Exercise
from support.gpt import GPTConfig, GPTModel


def _random(*shape, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _model() -> GPTModel:
    """Return a small model whose blocks matter, without a trace in the reader's random numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPTModel(GPTConfig(23, 8, d_model=16, n_heads=2, n_layers=3)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


# 4.1


def _rms_norm(x, eps=1e-5):
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()


rms_norm = Exercise(
    "4.1",
    _rms_norm,
    [
        (torch.tensor([[3.0, -4.0, 0.0, 0.0]]),),
        (torch.tensor([[[3.0, 3.0, 6.0], [1.0, 2.0, 2.0]], [[0.0, 0.0, 3.0], [4.0, 4.0, 2.0]]]),),
        (torch.tensor([[0.003, -0.004, 0.0, 0.0]]),),
        (torch.zeros(2, 3),),
    ],
    [
        (
            lambda x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-5),
            "Is your epsilon inside the square root? It is added to the mean of the squares.",
        ),
        (
            lambda x: F.layer_norm(x, x.shape[-1:]),
            "You subtract the mean, as LayerNorm does; here it is not subtracted.",
        ),
        (
            lambda x: x / (x.pow(2).sum(-1, keepdim=True) + 1e-5).sqrt(),
            "You divide by the length of the vector: take the mean of the squares, not their sum.",
        ),
        (
            lambda x: x / (x.pow(2).mean() + 1e-5).sqrt(),
            "You take one mean over everything; each vector has its own (dim=-1, keepdim=True).",
        ),
        (
            lambda x: x / (x.pow(2).mean(0, keepdim=True) + 1e-5).sqrt(),
            "You normalize over the first dimension; a token's numbers are in the last.",
        ),
        (
            lambda x: x / (x.pow(2).mean(x.dim() - 2, keepdim=True) + 1e-5).sqrt(),
            "You take the mean over the tokens; a token's own numbers are in the last dimension.",
        ),
        (
            lambda x: x / x.pow(2).mean(-1, keepdim=True).sqrt(),
            "The 0.00001 is missing: without it, a vector of zeros gives NaN.",
        ),
        (
            lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6),
            "Is your epsilon another number? Here it is 0.00001 (1e-5).",
        ),
        (
            lambda x: x * ((x.shape[-1] - 1) / (x.pow(2).sum(-1, keepdim=True) + 1e-9)).sqrt(),
            "You divide the sum of the squares by C - 1; the mean divides by C.",
        ),
        (
            lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-5),
            "The square root is missing.",
        ),
    ],
)


# 4.2


def _cache_bytes(n_layers, d_model, n_tokens, bytes_each=4):
    return 2 * n_layers * d_model * n_tokens * bytes_each


cache_bytes = Exercise(
    "4.2",
    _cache_bytes,
    [(3, 8, 5, 4), (48, 1600, 1024, 2), (2, 16, 1, 4), (1, 8, 0, 4)],
    [
        (
            lambda n, d, t, b: n * d * t * b,
            "Half of it is missing: a key and a value are kept for each token.",
        ),
        (
            lambda n, d, t, b: 2 * d * t * b,
            "Every block has a cache of its own.",
        ),
        (
            lambda n, d, t, b: 2 * n * d * b,
            "That is one token: the cache keeps all n_tokens of them.",
        ),
        (
            lambda n, d, t, b: 2 * n * d * t * 4,
            "You take 4 bytes for each number; it is bytes_each.",
        ),
        (
            lambda n, d, t, b: n * (3 * d + d) * t * b,
            "You count all of attention's four matrices; only keys and values are kept.",
        ),
        (
            lambda n, d, t, b: 3 * n * d * t * b,
            "Queries need not be kept: only the newest token asks.",
        ),
        (
            lambda n, d, t, b: 2 * n * d * t,
            "You count numbers; each takes bytes_each bytes.",
        ),
        (
            lambda n, d, t, b: 2 * n * d * t * t * b,
            "The cache grows with the tokens, not with their square: no scores are kept.",
        ),
    ],
)


# 4.3


def _layers_that_fit(memory, d_model, vocab_size, context_length):
    return max(0, _divide(memory, d_model, vocab_size, context_length))


def _divide(memory, d_model, vocab_size, context_length, each=16, bias=True, tie=True, embedded=0):
    """Divide what is left of the memory after a model of `embedded` blocks, if it has any bias."""
    shape = {"n_heads": 1, "qkv_bias": bias, "tie_weights": tie}
    outside, inside = (
        each * GPTConfig(vocab_size, context_length, d_model, n_layers=n, **shape).n_parameters()
        for n in (embedded, embedded + 1)
    )
    return (memory - outside) // (inside - outside)


def _no_embeddings(memory, d_model, vocab_size, context_length):
    return memory // (16 * (12 * d_model**2 + 13 * d_model))


layers_that_fit = Exercise(
    "4.3",
    _layers_that_fit,
    [
        (10**9, 256, 8_192, 512),
        (8 * 10**9, 768, 50_257, 1024),
        (24 * 10**9, 1600, 50_257, 1024),
        (10**8, 768, 50_257, 1024),
        (16 * GPTConfig(1000, 64, 128, 1, 7).n_parameters(), 128, 1000, 64),
        (16 * GPTConfig(1000, 64, 128, 1, 7).n_parameters() - 1, 128, 1000, 64),
    ],
    [
        (
            lambda *case: max(0, _divide(*case, each=4)),
            "You count the weights alone. Training also keeps the gradients and Adam's two "
            "averages.",
        ),
        (_no_embeddings, "The embeddings and the last LayerNorm need room before any block does."),
        (
            lambda m, C, V, T: max(0, (m - 16 * (V + T) * C) // (16 * (12 * C * C + 13 * C))),
            "The last LayerNorm lies outside of the blocks too: 2C parameters.",
        ),
        (
            lambda *case: max(0, _divide(*case, tie=False)),
            "You count the head as well, but its weight is the token embedding (tied).",
        ),
        (
            lambda *case: max(0, _divide(*case, bias=False)),
            "The biases of queries, keys and values count too (qkv_bias=True).",
        ),
        (_divide, "If not even the embeddings fit, the answer is 0 and not below."),
        (
            lambda *case: max(0, _divide(*case) + 1),
            "One block too many: the last one does not fit as a whole.",
        ),
        (
            lambda m, *shape: max(0, _divide(m - 1, *shape)),
            "One block too few where the memory is used to the last byte: that fits.",
        ),
        (
            lambda *case: max(0, _divide(*case, embedded=1)),
            "You take away a model that has one block already; what lies outside has none.",
        ),
    ],
)


# 4.4


def _parallel_block(x, norm, attention, ff):
    normed = norm(x)
    return x + attention(normed) + ff(normed)


def _norm(x):
    return F.layer_norm(x, x.shape[-1:])


def _attention(x):
    return x.cumsum(dim=-2) / torch.arange(1, x.shape[-2] + 1)[:, None]


def _ff(x):
    return F.gelu(2 * x.flip(-1)) - 0.5


def _sequential(x, norm, attention, ff):
    x = x + attention(norm(x))
    return x + ff(norm(x))


parallel_block = Exercise(
    "4.4",
    _parallel_block,
    [
        (_random(1, 2, 3), _norm, _attention, _ff),
        (_random(2, 4, 6, seed=1), _norm, _attention, _ff),
    ],
    [
        (
            _sequential,
            "That is GPT-2's block, one after the other: here both read the same normalized x.",
        ),
        (
            lambda x, norm, attention, ff: attention(norm(x)) + ff(norm(x)),
            "The shortcut is missing: x itself must be added too.",
        ),
        (
            lambda x, norm, attention, ff: 2 * x + attention(norm(x)) + ff(norm(x)),
            "You add x twice; there is one shortcut around both.",
        ),
        (
            lambda x, norm, attention, ff: x + attention(x) + ff(x),
            "Attention and the feed-forward layers must read norm(x).",
        ),
        (
            lambda x, norm, attention, ff: x + ff(attention(norm(x))),
            "Side by side: the feed-forward layers do not read what attention returns.",
        ),
        (
            lambda x, norm, attention, ff: x + attention(norm(x)) + ff(x),
            "The feed-forward layers must read norm(x) too.",
        ),
        (
            lambda x, norm, attention, ff: x + attention(x) + ff(norm(x)),
            "Attention must read norm(x) too.",
        ),
        (
            lambda x, norm, attention, ff: norm(x + attention(x) + ff(x)),
            "That is post-norm: here the norm stands in front of the two parts, not on the stream.",
        ),
        (
            lambda x, norm, attention, ff: norm(x) + attention(norm(x)) + ff(norm(x)),
            "The shortcut carries x as it is: normalize only what the two parts read.",
        ),
    ],
)


# 4.5


def _keep(logits, kept):
    return logits.masked_fill(~kept, -torch.inf).softmax(dim=-1)


def _min_p(logits, share):
    probs = logits.softmax(dim=-1)
    return _keep(logits, probs >= share * probs.max(dim=-1, keepdim=True).values)


def _absolute(logits, share):
    return _keep(logits, logits.softmax(dim=-1) >= share)


def _not_renormalized(logits, share):
    probs = logits.softmax(dim=-1)
    return probs.masked_fill(probs < share * probs.max(dim=-1, keepdim=True).values, 0)


def _on_logits(logits, share):
    return _keep(logits, logits >= share * logits.max(dim=-1, keepdim=True).values)


def _one_max(logits, share):
    probs = logits.softmax(dim=-1)
    return _keep(logits, probs >= share * probs.max())


def _zeroed_logits(logits, share):
    probs = logits.softmax(dim=-1)
    low = probs < share * probs.max(dim=-1, keepdim=True).values
    return logits.masked_fill(low, 0).softmax(dim=-1)


def _softmax_of_probs(logits, share):
    probs = logits.softmax(dim=-1)
    return _keep(probs, probs >= share * probs.max(dim=-1, keepdim=True).values)


def _above(logits, share):
    probs = logits.softmax(dim=-1)
    return _keep(logits, probs > share * probs.max(dim=-1, keepdim=True).values)


def _bare_exp(logits, share):
    likely = logits.exp()
    kept = likely * (likely >= share * likely.max(dim=-1, keepdim=True).values)
    return kept / kept.sum(dim=-1, keepdim=True)


min_p = Exercise(
    "4.5",
    _min_p,
    [
        (torch.tensor([[3.0, 2.0, 1.0, 0.0]]), 0.2),
        (torch.tensor([[4.0, 1.5, 2.2, -2.0, 0.0, 3.0], [1.0, 1.0, 0.1, 0.0, 0.0, 0.0]]), 0.2),
        (torch.tensor([[4.0, 3.5, 1.6, -2.0, 2.5], [0.3, 0.2, 0.1, 0.0, -0.1]]), 0.15),
        (torch.tensor([[2.0, 2.0, 1.0]]), 1.0),
        (torch.tensor([[120.0, 119.5, 100.0]]), 0.3),
    ],
    [
        (_absolute, "The limit is a share of the best token's probability, not a fixed one."),
        (_not_renormalized, "What is left does not add up to 1: divide by its sum."),
        (_on_logits, "You compare logits; compare probabilities, after the softmax."),
        (
            _one_max,
            "Each row has a best token of its own: take the maximum over the last dimension.",
        ),
        (_zeroed_logits, "A logit of 0 is not impossible, its e⁰ is 1. Use -torch.inf."),
        (_softmax_of_probs, "The second softmax takes the logits once more, not probabilities."),
        (_above, "A token with exactly `share` times the best probability stays: >=, not >."),
        (_bare_exp, "e to the 120 is too large for a float; softmax knows how to avoid that."),
        (
            lambda logits, share: logits.softmax(dim=-1),
            "Nothing is cut: compare each probability with `share` times the best one.",
        ),
    ],
)


# 4.6


def _guesses(model, ids, norm=True, embed=None, last=None, first=False):
    x = (embed or model.embed)(ids)
    rows = [x] if first else []
    for block in model.blocks:
        x = block(x)
        rows.append(x)
    rows = [model.head(model.ln(row) if norm else row).argmax(dim=-1)[0] for row in rows]
    return torch.stack(rows[:last])


def _logit_lens(model, ids):
    return _guesses(model, ids)


def _normalized_on(model, ids):
    x, rows = model.embed(ids), []
    for block in model.blocks:
        x = model.ln(block(x))
        rows.append(model.head(x).argmax(dim=-1)[0])
    return torch.stack(rows)


def _separately(model, ids):
    x = model.embed(ids)
    return torch.stack([model.head(model.ln(block(x))).argmax(-1)[0] for block in model.blocks])


MODEL = _model()
logit_lens = Exercise(
    "4.6",
    _logit_lens,
    [(MODEL, torch.tensor([[3, 1, 4, 1, 5, 9]])), (MODEL, torch.tensor([[2, 7, 1, 8, 2, 8, 1]]))],
    [
        (
            lambda model, ids: _guesses(model, ids, norm=False),
            "The head is used to normalized vectors: put x through model.ln first.",
        ),
        (
            lambda model, ids: _guesses(model, ids, first=True),
            "One row too many: begin after the first block, not before it.",
        ),
        (
            lambda model, ids: _guesses(model, ids, last=-1),
            "One row is missing: the last block counts too.",
        ),
        (
            lambda model, ids: _guesses(model, ids, last=-1, first=True),
            "Row i is the stream after block i; yours is the stream that enters it.",
        ),
        (
            _normalized_on,
            "You hand on the normalized stream; the next block reads x as it was.",
        ),
        (
            lambda model, ids: model(ids).argmax(dim=-1).expand(len(model.blocks), -1),
            "Every row is what the whole model says; stop after each block and ask the head.",
        ),
        (
            lambda model, ids: _guesses(model, ids, embed=model.tok_emb),
            "The positions are missing: model.embed adds them to the token vectors.",
        ),
        (
            _separately,
            "Each of your blocks starts from the embeddings; a block reads what the last one left.",
        ),
    ],
)
