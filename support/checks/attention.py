"""The exercises of chapter 3, attention."""

import math
import weakref

import torch
from torch import Tensor

from support.attention import attention_weights, causal_mask
from support.checks import Exercise


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# 3.1


def _attend(q, K, V, divide=math.sqrt):
    return (K @ q / divide(len(q))).softmax(dim=0) @ V


LOOKUPS = [
    (torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.eye(4)[:2] * 2, torch.tensor([[1.0], [0.0]])),
    (_random(8), _random(5, 8, seed=1), _random(5, 3, seed=2)),
    (_random(16, seed=3), _random(4, 16, seed=4), _random(4, 6, seed=5)),
]

attend = Exercise(
    "3.1",
    lambda q, K, V: _attend(q, K, V),
    LOOKUPS,
    [
        (
            lambda q, K, V: _attend(q, K, V, divide=lambda d: 1),
            "The scores are too large: one division is missing.",
        ),
        (
            lambda q, K, V: _attend(q, K, V, divide=lambda d: d),
            "You divide by d; it is the square root that keeps the variance at 1.",
        ),
        (
            lambda q, K, V: _attend(q, K, V, divide=lambda d: math.sqrt(len(K))),
            "The root is of the width of a key, not of the number of keys.",
        ),
        (
            lambda q, K, V: (K @ q / math.sqrt(V.shape[1])).softmax(dim=0) @ V,
            "The root is of the width of a key, not of the width of a value.",
        ),
        (
            lambda q, K, V: (K @ q / math.sqrt(len(q))).exp() @ V,
            "Your weights do not sum to 1: divide each by the sum of all.",
        ),
        (
            lambda q, K, V: _attend(q, K, V) / len(K),
            "The weights sum to 1 already: do not divide by the number of keys as well.",
        ),
        (
            lambda q, K, V: K @ q / math.sqrt(len(q)) @ V,
            "The scores are not weights yet: they may be negative and do not sum to 1.",
        ),
        (
            lambda q, K, V: (K @ q / math.sqrt(len(q))).softmax(dim=0),
            "These are the weights; what is asked for is the mean of the values.",
        ),
        (
            lambda q, K, V: V.mean(dim=0),
            "This is the plain mean: the scores have no effect.",
        ),
        (
            lambda q, K, V: V[(K @ q).argmax()],
            "You take the value of the best key alone; every value takes part, by its weight.",
        ),
    ],
)
attend.reference.__name__ = "attend"


# 3.2


def _distance(T):
    return torch.arange(T)[:, None] - torch.arange(T)


def _window_mask(T, window):
    return (_distance(T) >= 0) & (_distance(T) < window)


window_mask = Exercise(
    "3.2",
    _window_mask,
    [(4, 2), (4, 1), (6, 3), (3, 9), (1, 1)],
    [
        (
            lambda T, window: (_distance(T) >= 0) & (_distance(T) <= window),
            "One too many: with a window of 1 a token sees only itself.",
        ),
        (
            lambda T, window: _window_mask(T, window - 1),
            "One too few: the token itself is the first of the window.",
        ),
        (
            lambda T, window: _distance(T).abs() < window,
            "Your mask lets a token look ahead.",
        ),
        (
            lambda T, window: _distance(T) < window,
            "You limit how far back a token looks, but it looks ahead at everything.",
        ),
        (
            lambda T, window: torch.zeros(T, T).masked_fill(~_window_mask(T, window), -math.inf),
            "This is what is added to scores; what is asked for is the mask, True or False.",
        ),
        (
            lambda T, window: _window_mask(T, window).T,
            "Rows and columns are exchanged: a row is the token that looks.",
        ),
        (
            lambda T, window: ~_window_mask(T, window),
            "True means “may look” here; you mark what is forbidden.",
        ),
        (
            lambda T, window: _distance(T) >= 0,
            "This is the plain causal mask: the window does not limit anything.",
        ),
        (
            lambda T, window: (_distance(T) > 0) & (_distance(T) <= window),
            "A token may look at itself too, and the window counts it.",
        ),
    ],
)


# 3.3


def _split_heads(x, n_heads):
    B, T, C = x.shape
    return x.view(B, T, n_heads, C // n_heads).transpose(1, 2)


split_heads = Exercise(
    "3.3",
    _split_heads,
    [
        (torch.arange(8.0).view(1, 2, 4), 2),
        (_random(2, 3, 6), 3),
        (_random(2, 4, 8, seed=1), 2),
        (_random(3, 5, 4, seed=2), 1),
    ],
    [
        (
            lambda x, n: x.reshape(len(x), n, x.shape[1], -1),
            "The shape is right but the numbers are not: this cuts across tokens. "
            "First split the last dimension, then exchange two dimensions.",
        ),
        (
            lambda x, n: x.view(len(x), x.shape[1], n, -1),
            "The heads still stand behind the tokens: exchange these two dimensions.",
        ),
        (
            lambda x, n: x.view(len(x), x.shape[1], -1, n).permute(0, 3, 1, 2),
            "Your heads take every n-th number; a head takes neighboring numbers.",
        ),
        (
            lambda x, n: x.view(len(x), x.shape[1], n, -1).permute(2, 0, 1, 3),
            "The batch comes first, then the heads.",
        ),
        (
            lambda x, n: x.view(len(x), x.shape[1], n, -1).permute(0, 2, 3, 1),
            "The last two dimensions are the wrong way round: tokens, then numbers.",
        ),
        (
            lambda x, n: x.transpose(1, 2).reshape(len(x), n, x.shape[1], -1),
            "You exchange before you split; then a head no longer gets whole tokens.",
        ),
    ],
)


# 3.4


def _causal_mean(x):
    return x.cumsum(0) / torch.arange(1, len(x) + 1)[:, None]


def _mean_of_all(x):
    return x.mean(0).expand_as(x)


def _previous(x):
    return torch.cat([torch.zeros_like(x[:1]), x[:-1]])


def _next(x):
    return torch.cat([x[1:], torch.zeros_like(x[:1])])


def _soft(x):
    """A causal function whose output always sums to 1 in every row."""
    return x.cumsum(0).softmax(dim=-1)


def _one_feature(x):
    """Reads the first number of a token only."""
    return x[:, :1].cumsum(0).expand_as(x)


def _difference(x):
    """Reads the difference between a token's first two numbers only."""
    return (x[:, :1] - x[:, 1:2]).cumsum(0).expand_as(x)


def _writes_one(x):
    """Changes the first number of a token only; the others are its own."""
    return torch.cat([x[:, :1].cumsum(0), x[:, 1:]], dim=1)


def _itself_but_for_rounding(x):
    """Gives back its input, but the rounding depends on every token."""
    return x + x.sum() / 8 - x.sum() / 8


def _attention(x):
    return attention_weights(x, x, causal_mask(len(x), len(x))) @ x


def _who_sees_whom(
    attend, x, features=slice(None), look=lambda out: out, any_=torch.any, least=1e-5, step=1.0
):
    sees = torch.zeros(len(x), len(x), dtype=torch.bool)
    before = look(attend(x))
    for j in range(len(x)):
        changed = x.clone()
        changed[j, features] += 1.0 + step * torch.arange(x.shape[1], dtype=x.dtype)[features]
        sees[:, j] = any_((look(attend(changed)) - before).abs() > least, dim=-1)
    return sees


def _without_a_fresh_copy(attend, x):
    sees, changed, before = torch.zeros(len(x), len(x), dtype=torch.bool), x.clone(), attend(x)
    for j in range(len(x)):
        changed[j] += 1.0 + torch.arange(x.shape[1])
        sees[:, j] = ((attend(changed) - before).abs() > 1e-5).any(dim=-1)
    return sees


def _by_nan(attend, x):
    sees = torch.zeros(len(x), len(x), dtype=torch.bool)
    for j in range(len(x)):
        changed = x.clone()
        changed[j] = math.nan
        sees[:, j] = attend(changed).isnan().any(dim=-1)
    return sees


def _whether_all_change(attend, x):
    sees = torch.zeros(len(x), len(x), dtype=torch.bool)
    for j in range(len(x)):
        changed = x.clone()
        changed[j] += 1.0 + torch.arange(x.shape[1])
        sees[:, j] = ((attend(changed) - attend(x)).abs() > 1e-5).any()
    return sees


FUNCTIONS = [_causal_mean, _mean_of_all, _previous, _next, _soft, _one_feature]
FUNCTIONS += [_difference, _writes_one, _itself_but_for_rounding, _attention]

who_sees_whom = Exercise(
    "3.4",
    lambda attend, x: _who_sees_whom(attend, x),
    [(function, _random(2 + i % 3, 3, seed=i)) for i, function in enumerate(FUNCTIONS)],
    [
        (
            lambda attend, x: _who_sees_whom(attend, x).T,
            "Rows and columns are exchanged: row i is the output, column j the input.",
        ),
        (
            lambda attend, x: _who_sees_whom(attend, x, look=lambda out: out.sum(-1, keepdim=True)),
            "A sum over an output's numbers can stay the same while they change. "
            "Compare every number.",
        ),
        (
            lambda attend, x: _who_sees_whom(attend, x, features=slice(-1, None)),
            "You change one number of a token only; what reads another one escapes you.",
        ),
        (
            lambda attend, x: _who_sees_whom(attend, x, step=0.0),
            "You change all numbers by the same amount; what reads their differences escapes you.",
        ),
        (
            lambda attend, x: _who_sees_whom(attend, x, any_=torch.all),
            "An output has changed if any of its numbers has, not only if all have.",
        ),
        (
            lambda attend, x: _who_sees_whom(attend, x, least=0.0),
            "You count rounding errors: call a difference below 0.00001 no change.",
        ),
        (
            _without_a_fresh_copy,
            "Your changes add up: begin each round with a fresh copy of x.",
        ),
        (
            _by_nan,
            "A weight of 0 times nan is nan too: change the token to ordinary numbers.",
        ),
        (
            _whether_all_change,
            "You mark a whole column when any output changes; ask each output by itself.",
        ),
        (
            lambda attend, x: ~_who_sees_whom(attend, x),
            "True means that the output depends on the input; yours says the opposite.",
        ),
        (
            lambda attend, x: torch.ones(len(x), len(x), dtype=torch.bool).tril(),
            "You say what ought to be; test what this function does.",
        ),
    ],
)
who_sees_whom.reference.__name__ = "who_sees_whom"


# 3.5


def _attention_cost(T, C, n_heads):
    return 4 * T * C * C + 2 * T * T * C


attention_cost = Exercise(
    "3.5",
    _attention_cost,
    [(1, 4, 2), (10, 8, 1), (10, 8, 4), (1024, 768, 12), (100, 64, 8)],
    [
        (
            lambda T, C, h: 3 * T * C * C + 2 * T * T * C,
            "One of the four projections is missing: W_o.",
        ),
        (
            lambda T, C, h: 4 * T * C * C + T * T * C,
            "T² comes twice: for the scores, and for the mean of the values.",
        ),
        (
            lambda T, C, h: 4 * T * C * C + 2 * T * T * C * h,
            "A head is only C / h wide, so more heads do not cost more.",
        ),
        (
            lambda T, C, h: 4 * T * C * C + 2 * T * T * C // h,
            "That is one head's share of T²; there are h heads.",
        ),
        (
            lambda T, C, h: 2 * (4 * T * C * C + 2 * T * T * C),
            "That is twice as much: count the multiplications, not the additions too.",
        ),
        (
            lambda T, C, h: 4 * C * C + 2 * T * T * C,
            "The projections are done for each of the T tokens.",
        ),
        (
            lambda T, C, h: 4 * T * C * C + T * (T + 1) * C,
            "You leave out the future; here its scores are computed too, and then masked.",
        ),
        (
            lambda T, C, h: 4 * T * C * C + 2 * T * T,
            "A score is a dot product: d multiplications in each of h heads, not one.",
        ),
        (
            lambda T, C, h: 4 * T * (C // h) ** 2 + 2 * T * T * C,
            "A projection makes all heads at once: from C numbers to C numbers.",
        ),
        (
            lambda T, C, h: 2 * T * T * C,
            "The projections are missing: each token goes through four matrices.",
        ),
    ],
)


# 3.6


class Stream:
    """Pairs (key, value) that pass by once, and that notices who keeps the keys."""

    def __init__(self, pairs: list):
        self.pairs, self.read = pairs, False

    def __deepcopy__(self, memo) -> "Stream":
        return Stream(self.pairs)

    def __eq__(self, other) -> bool:
        return self.pairs is other.pairs

    def __iter__(self):
        if self.read:
            raise RuntimeError("the pairs pass by only once; do all you need in one loop.")
        self.read, handed_out = True, []
        for k, v in self.pairs:
            pair = k.clone(), v.clone()
            handed_out.append(weakref.ref(pair[0]))
            yield pair
            del pair
        kept = sum(key() is not None for key in handed_out)
        if kept > 3:
            raise RuntimeError(
                f"you keep {kept} of {len(handed_out)} keys; use each pair and let it go."
            )


def _stream(q, pairs, rescale_sum=True, rescale_total=True, scale=True):
    best, weight_sum, total = -math.inf, 0.0, 0.0
    for k, v in pairs:
        score = (q @ k).item() / (math.sqrt(len(q)) if scale else 1)
        new_best = max(best, score)
        shrink, weight = math.exp(best - new_best), math.exp(score - new_best)
        weight_sum = weight_sum * (shrink if rescale_sum else 1) + weight
        total = total * (shrink if rescale_total else 1) + weight * v
        best = new_best
    return total / weight_sum


def _not_divided(q, pairs):
    weight = []
    value = _stream(q, ((k, v) for k, v in pairs if not weight.append((q @ k) / math.sqrt(len(q)))))
    return value * (torch.stack(weight) - max(weight)).exp().sum()


def _plain_mean(q, pairs):
    total, n = 0.0, 0
    for _, v in pairs:
        total, n = total + v, n + 1
    return total / n


def _pairs(keys, seed):
    return Stream(list(zip(keys, _random(len(keys), 3, seed=seed), strict=True)))


# Exact in float32, so that an answer in another precision agrees: all scores are near -2,000, and a
# greatest score that starts at 0 leads to 0 / 0.
FAR_BELOW_ZERO = torch.arange(20.0).view(5, 4) % 7 / 128 - 16

streaming_attention = Exercise(
    "3.6",
    lambda q, pairs: _stream(q, pairs),
    [
        (_random(4), _pairs(_random(1, 4, seed=1), seed=11)),
        (_random(4), _pairs(_random(6, 4, seed=2, scale=2.0), seed=12)),
        (_random(4, scale=3.0), _pairs(_random(9, 4, seed=3, scale=3.0), seed=13)),
        (_random(4, scale=50.0), _pairs(_random(9, 4, seed=4, scale=50.0), seed=14)),
        (torch.full((4,), 64.0), _pairs(FAR_BELOW_ZERO, seed=15)),
    ],
    [
        (
            lambda q, pairs: _stream(q, pairs, rescale_sum=False, rescale_total=False),
            "When a greater score comes, what you have summed so far must shrink to the new scale.",
        ),
        (
            lambda q, pairs: _stream(q, pairs, rescale_sum=False),
            "You shrink the sum of the values, but not the sum of the weights.",
        ),
        (
            lambda q, pairs: _stream(q, pairs, rescale_total=False),
            "You shrink the sum of the weights, but not the sum of the values.",
        ),
        (
            lambda q, pairs: _stream(q, pairs, scale=False),
            "The scores are not divided by √d.",
        ),
        (
            _not_divided,
            "At the end, divide the weighted sum by the sum of the weights.",
        ),
        (
            _plain_mean,
            "This is the plain mean: the scores have no effect.",
        ),
    ],
)
streaming_attention.reference.__name__ = "streaming_attention"
