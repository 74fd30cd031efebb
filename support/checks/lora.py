"""The exercises of appendix A, LoRA."""

import torch

from support.checks import Exercise


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# A.1


def _count(shapes, rank):
    return sum(rank * (n_in + n_out) for n_in, n_out in shapes)


count = Exercise(
    "A.1",
    _count,
    [
        ([(192, 768)], 8),
        ([(576, 576), (576, 192)], 4),
        ([(10, 3)], 1),
        ([(32, 48), (48, 32), (32, 32)], 2),
        ([], 8),
    ],
    [
        (
            lambda shapes, rank: sum(n_in * n_out for n_in, n_out in shapes),
            "These are the layers' own weights, which do not learn.",
        ),
        (
            lambda shapes, rank: sum(rank * n_in for n_in, _ in shapes),
            "You count A only; B has rank times the outputs.",
        ),
        (
            lambda shapes, rank: sum(rank * n_out for _, n_out in shapes),
            "You count B only; A has rank times the inputs.",
        ),
        (
            lambda shapes, rank: sum(rank * n_in * n_out for n_in, n_out in shapes),
            "A has in · rank numbers and B has rank · out: add them, do not multiply.",
        ),
        (
            lambda shapes, rank: sum(n_in + n_out for n_in, n_out in shapes),
            "Each of the two matrices is `rank` numbers wide.",
        ),
        (
            lambda shapes, rank: _count(shapes[:1], rank),
            "You count the first layer only.",
        ),
        (
            lambda shapes, rank: _count(shapes, rank) + sum(n_out for _, n_out in shapes),
            "There is nothing else that learns: LoRA's matrices have no bias.",
        ),
    ],
)


# A.2


def _bytes_needed(n_base, n_adapter, bits):
    return n_base * bits / 8 + n_adapter * 16


bytes_needed = Exercise(
    "A.2",
    _bytes_needed,
    [
        (1000, 10, 32),
        (1000, 10, 16),
        (134_515_008, 4_884_480, 32),
        (7_000_000_000, 20_000_000, 16),
        (7_000_000_000, 20_000_000, 4),
        (100, 0, 8),
    ],
    [
        (
            lambda n_base, n_adapter, bits: n_base * (bits / 8 + 12) + n_adapter * 16,
            "The base model is frozen: it has no gradients, and AdamW remembers nothing of it.",
        ),
        (
            lambda n_base, n_adapter, bits: n_base * bits / 8 + n_adapter * 12,
            "Four numbers for each that learns, of four bytes: itself, its gradient, AdamW's two.",
        ),
        (
            lambda n_base, n_adapter, bits: n_base * bits / 8 + n_adapter * 4,
            "An adapter that learns has gradients too, and AdamW remembers two numbers for each.",
        ),
        (
            lambda n_base, n_adapter, bits: n_base * bits / 8 + n_adapter * 8,
            "AdamW remembers two numbers for each that learns: the averages of its gradient and of "
            "the gradient's square.",
        ),
        (
            lambda n_base, n_adapter, bits: n_base * bits + n_adapter * 16,
            "A byte has eight bits.",
        ),
        (
            lambda n_base, n_adapter, bits: n_base * 4 + n_adapter * 16,
            "The base model's numbers have `bits` bits each, not always 32.",
        ),
        (
            lambda n_base, n_adapter, bits: n_base * bits / 8 + n_adapter * bits / 8 * 4,
            "What learns is kept in four bytes, whatever the base model's numbers have.",
        ),
    ],
)


# A.3


def _merged(W, A, B, alpha):
    return W + alpha / A.shape[1] * (A @ B).T


# All weights are square, so that an answer that forgets to turn A B around gets its hint.
merged = Exercise(
    "A.3",
    _merged,
    [
        (
            torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
            torch.tensor([[1.0], [0.0]]),
            torch.tensor([[10.0, 100.0]]),
            2.0,
        ),
        (_random(4, 4), _random(4, 2, seed=1), _random(2, 4, seed=2), 6.0),
        (_random(6, 6), _random(6, 3, seed=1), _random(3, 6, seed=2), 1.0),
    ],
    [
        (
            lambda W, A, B, alpha: W + alpha / A.shape[1] * (A @ B),
            "A B is (in, out), but the weight of a linear layer is stored as (out, in).",
        ),
        (
            lambda W, A, B, alpha: W + (A @ B).T,
            "You forget the factor alpha / rank.",
        ),
        (
            lambda W, A, B, alpha: W + alpha * (A @ B).T,
            "You forget to divide alpha by the rank, the columns of A.",
        ),
        (
            lambda W, A, B, alpha: W + alpha / A.shape[0] * (A @ B).T,
            "A has `rank` columns; its rows are the inputs.",
        ),
        (
            lambda W, A, B, alpha: W + A.shape[1] / alpha * (A @ B).T,
            "It is alpha / rank, not rank / alpha.",
        ),
        (
            lambda W, A, B, alpha: alpha / A.shape[1] * (A @ B).T,
            "This is the update alone; add it to W.",
        ),
    ],
)


# A.4


def _gradients(x, A, B, scale, g):
    return scale * x.T @ (g @ B.T), scale * (x @ A).T @ g


_X = (_random(5, 4), _random(4, 2, seed=1), _random(2, 3, seed=2), 2.0, _random(5, 3, seed=3))
gradients = Exercise(
    "A.4",
    _gradients,
    [
        (torch.eye(2), torch.ones(2, 1), torch.tensor([[3.0, 5.0]]), 0.5, torch.eye(2)),
        _X,
        (_X[0], _X[1], torch.zeros(2, 3), 2.0, _X[4]),
    ],
    [
        (
            lambda x, A, B, scale, g: (x.T @ (g @ B.T), (x @ A).T @ g),
            "The output is scale · x A B, so scale is a factor of both gradients.",
        ),
        (
            lambda x, A, B, scale, g: _gradients(x, A, B, scale, g)[::-1],
            "Return the gradient of A first.",
        ),
        (
            lambda x, A, B, scale, g: tuple(d / len(x) for d in _gradients(x, A, B, scale, g)),
            "Each row of x adds its share: a sum over the rows, not a mean. If there is a mean, it "
            "is in g already.",
        ),
        (
            lambda x, A, B, scale, g: (scale * x.T @ (g @ B.T), scale * (x @ A).T @ g * 0),
            "Only A's gradient is 0 where B is: B's has no B in it.",
        ),
        (
            lambda x, A, B, scale, g: tuple(d.T for d in _gradients(x, A, B, scale, g)),
            "A gradient has the shape of what it is the gradient of.",
        ),
    ],
)


# A.5


def _rank_for(update, share):
    energy = torch.linalg.svdvals(update).square().cumsum(dim=0)
    return int((energy < share * energy[-1]).sum()) + 1


def _by_counting(update, share):
    squares, total = torch.linalg.svdvals(update).square().tolist(), 0.0
    for rank, square in enumerate(squares, 1):
        total += square
        if total >= share * sum(squares):
            return rank
    return len(squares)


def _decaying(seed):
    U, _, Vh = torch.linalg.svd(_random(12, 9, seed=seed), full_matrices=False)
    return U @ torch.diag(0.75 ** torch.arange(9.0)) @ Vh


rank_for = Exercise(
    "A.5",
    _rank_for,
    [
        (torch.diag(torch.tensor([3.0, 2.0, 1.0])), 0.6),
        (torch.diag(torch.tensor([3.0, 2.0, 1.0])), 0.9),
        (torch.diag(torch.tensor([3.0, 2.0, 1.0])), 0.95),
        (_random(6, 1) @ _random(1, 8, seed=1), 0.99),
        (_decaying(2), 0.5),
        (_decaying(3), 0.9),
        (_decaying(3).T, 0.97),
    ],
    [
        (
            lambda update, share: (
                int(
                    (
                        (S := torch.linalg.svdvals(update)).cumsum(dim=0) < share * S.sum() - 1e-6
                    ).sum()
                )
                + 1
            ),
            "You add the singular values themselves; the energy is the sum of their squares.",
        ),
        (
            lambda update, share: _rank_for(update, share) - 1,
            "One too few: this is the number of the last singular value counted from 0, not how "
            "many there are.",
        ),
        (
            lambda update, share: _rank_for(update, share) + 1,
            "One too many: is the share not reached one earlier?",
        ),
        (
            lambda update, share: int(
                ((S := torch.linalg.svdvals(update)) > (1 - share) * S[0]).sum()
            ),
            "You compare each singular value with the largest; what counts is the sum of the "
            "squares so far, as a share of all.",
        ),
        (
            lambda update, share: int((torch.linalg.svdvals(update) > 1e-5).sum()),
            "This is the rank of the whole update; fewer may hold the share.",
        ),
        (
            lambda update, share: _rank_for(update, 1 - share),
            "This is where 1 − share is reached: the share is what is kept, not what is lost.",
        ),
    ],
    others=[_by_counting],
)


# A.6


def _truncated(update, rank):
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    return U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]


def _last(update, rank):
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    return U[:, -rank:] @ torch.diag(S[-rank:]) @ Vh[-rank:]


def _without_values(update, rank):
    U, _, Vh = torch.linalg.svd(update, full_matrices=False)
    return U[:, :rank] @ Vh[:rank]


def _rebuilt(before, after, rank):
    return before + _truncated(after - before, rank)


_BEFORE = _random(7, 5, seed=4)
rebuilt = Exercise(
    "A.6",
    _rebuilt,
    [
        (torch.eye(2), torch.tensor([[4.0, 0.0], [0.0, 2.0]]), 1),
        (_BEFORE, _BEFORE + 0.1 * _random(7, 5, seed=5), 2),
        (_BEFORE.T, _BEFORE.T + 0.1 * _random(5, 7, seed=6), 3),
        (_BEFORE, _BEFORE + _random(7, 1, seed=7) @ _random(1, 5, seed=8), 1),
    ],
    [
        (
            lambda before, after, rank: _truncated(after, rank),
            "You cut the weight itself down, and it has no low rank: cut the difference.",
        ),
        (
            lambda before, after, rank: _truncated(after - before, rank),
            "This is the update; add the weight that it belongs to.",
        ),
        (
            lambda before, after, rank: before + _last(after - before, rank),
            "You keep the smallest singular values; svd gives the largest first.",
        ),
        (
            lambda before, after, rank: before + _without_values(after - before, rank),
            "The singular values are missing between U and Vh.",
        ),
        (
            lambda before, after, rank: after,
            "Nothing is cut here: keep `rank` singular values of the difference.",
        ),
        (
            lambda before, after, rank: after + _truncated(after - before, rank),
            "The update is added to the weight before, not after.",
        ),
        (
            lambda before, after, rank: before + _truncated(before - after, rank),
            "The update is after − before.",
        ),
    ],
)


# A.7


def _mixed(x, W, adapters, which):
    y = x @ W.T
    for row, name in enumerate(which):
        if name is not None:
            A, B, scale = adapters[name]
            y[row] = y[row] + scale * x[row] @ A @ B
    return y


def _grouped(x, W, adapters, which):
    y = x @ W.T
    for name, (A, B, scale) in adapters.items():
        rows = [i for i, wanted in enumerate(which) if wanted == name]
        y[rows] = y[rows] + scale * x[rows] @ A @ B
    return y


def _all_the_same(x, W, adapters, which):
    name = next((name for name in which if name is not None), None)
    return _mixed(x, W, adapters, [name] * len(x))


def _adapter(rank, scale, seed):
    return _random(4, rank, seed=seed), _random(rank, 3, seed=seed + 1), scale


_PEOPLE = {"ann": _adapter(2, 2.0, 10), "bob": _adapter(1, 0.5, 20), "cy": _adapter(3, 1.0, 30)}
_BATCH = (_random(4, 5, 4, seed=9), _random(3, 4, seed=8))
mixed = Exercise(
    "A.7",
    _mixed,
    [
        (
            torch.tensor([[[1.0, 2.0]], [[1.0, 2.0]], [[3.0, 0.0]]]),
            torch.eye(2),
            {
                "ann": (torch.ones(2, 1), torch.tensor([[10.0, 0.0]]), 2.0),
                "bob": (torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 100.0]]), 1.0),
            },
            ["ann", None, "bob"],
        ),
        (*_BATCH, _PEOPLE, ["ann", "bob", None, "ann"]),
        (*_BATCH, _PEOPLE, ["cy", "cy", "bob", "ann"]),
        (*_BATCH, _PEOPLE, [None] * 4),
        (_BATCH[0][:2], _BATCH[1], _PEOPLE, [None, "bob"]),
    ],
    [
        (
            _all_the_same,
            "You use one adapter for the whole batch: each row has its own.",
        ),
        (
            lambda x, W, adapters, which: x @ W.T,
            "This is the base alone: the adapters are missing.",
        ),
        (
            lambda x, W, adapters, which: _mixed(x, torch.zeros_like(W), adapters, which),
            "This is what the adapters add; the base's own output, x Wᵀ, is missing.",
        ),
        (
            lambda x, W, adapters, which: _mixed(
                x, W, {name: (A, B, 1.0) for name, (A, B, _) in adapters.items()}, which
            ),
            "You forget each adapter's scale.",
        ),
        (
            lambda x, W, adapters, which: (
                x @ W.T + sum(scale * x @ A @ B for A, B, scale in adapters.values())
            ),
            "You add all adapters to every row: each row has one, or none.",
        ),
        (
            lambda x, W, adapters, which: _mixed(
                x, W, adapters, [name or next(iter(adapters)) for name in which]
            ),
            "A row with None belongs to the base alone.",
        ),
    ],
    others=[_grouped],
)
