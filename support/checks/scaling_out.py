"""The exercises of appendix D, scaling out."""

import math

from support.checks import Exercise

# D.1


def _ring_bytes(n, n_bytes):
    return 2 * (n - 1) * n_bytes


ring_bytes = Exercise(
    "D.1",
    _ring_bytes,
    [(3, 12), (1, 12), (2, 10), (8, 64), (1024, 2048)],
    [
        (
            lambda n, n_bytes: 2 * (n - 1) / n * n_bytes,
            "This is what one process sends; there are n of them.",
        ),
        (
            lambda n, n_bytes: (n - 1) * n_bytes,
            "There are two rounds: one in which pieces are added, and one that hands the sums on.",
        ),
        (
            lambda n, n_bytes: 2 * n * n_bytes,
            "A piece that has met all n processes has been sent n − 1 times, in each round.",
        ),
        (
            lambda n, n_bytes: 2 * n * (n - 1) * n_bytes,
            "In each step a process sends a piece, an n-th of its vector, and not all of it.",
        ),
        (
            lambda n, n_bytes: n * (n - 1) * n_bytes,
            "This is everybody sending everything to everybody; a ring is much cheaper.",
        ),
        (
            lambda n, n_bytes: n_bytes // n,
            "This is the length of one piece: count the steps, and the processes.",
        ),
    ],
)


# D.2


def _mean_loss(means, counts):
    pairs = [(m, c) for m, c in zip(means, counts, strict=True) if c]
    return sum(m * c for m, c in pairs) / sum(c for _, c in pairs)


def _zeros(means):
    return [mean or 0.0 for mean in means]


mean_loss = Exercise(
    "D.2",
    _mean_loss,
    [
        ([2.0, 5.0], [30, 10]),
        ([3.0], [7]),
        ([1.0, 2.0, 6.0], [1, 1, 2]),
        ([2.0, None, 4.0], [3, 0, 1]),
        ([4.0, 4.0], [1, 999]),
    ],
    [
        (
            lambda means, counts: sum(_zeros(means)) / len(means),
            "Each process counts the same here, however many targets it had.",
        ),
        (
            lambda means, counts: sum(_zeros(means)) / len([c for c in counts if c]),
            "Leaving out who had none is right, but the others must be weighted by their counts.",
        ),
        (
            lambda means, counts: _mean_loss(means, counts) * sum(counts) / len(counts),
            "Divide by the number of targets, not by the number of processes.",
        ),
        (
            lambda means, counts: _mean_loss(means, counts) * sum(counts),
            "This is the sum over all targets: divide by their number.",
        ),
        (
            lambda means, counts: sum(_zeros(means)) / sum(counts),
            "A mean has to be multiplied by its count before it is added.",
        ),
        (
            lambda means, counts: (
                sum(m * max(c, 1) for m, c in zip(_zeros(means), counts, strict=True))
                / sum(max(c, 1) for c in counts)
            ),
            "A process without targets has the weight 0, and not 1.",
        ),
    ],
)


# D.3


def _shard_rows(rows, n):
    full = -(-rows // n)
    return [min(full, max(0, rows - p * full)) for p in range(n)]


shard_rows = Exercise(
    "D.3",
    _shard_rows,
    [(8, 2), (5, 2), (5, 4), (2, 4), (31, 8), (1, 1), (9, 8)],
    [
        (
            lambda rows, n: [rows // n + (p < rows % n) for p in range(n)],
            "This is as even as possible, but not what `chunk` does: each piece is a full one, "
            "rounded up, until nothing is left.",
        ),
        (
            lambda rows, n: [rows // n] * n,
            "Rounded down, some rows belong to nobody.",
        ),
        (
            lambda rows, n: [-(-rows // n)] * n,
            "This is with padding: the last pieces hold fewer rows of the parameter.",
        ),
        (
            lambda rows, n: [size for size in _shard_rows(rows, n) if size],
            "A process that holds nothing is there all the same: its number is 0.",
        ),
        (
            lambda rows, n: [rows // n] * (n - 1) + [rows - rows // n * (n - 1)],
            "The pieces are rounded up, not down, so that the last is the short one.",
        ),
        (
            lambda rows, n: [min(-(-rows // n), rows - p * -(-rows // n)) for p in range(n)],
            "Where nothing is left, a process holds 0 rows, and not less.",
        ),
        (
            lambda rows, n: [rows / n] * n,
            "A row cannot be cut: the sizes are whole numbers.",
        ),
    ],
)


# D.4

EVERYWHERE = {0: 16, 1: 4, 2: 2, 3: 0}  # bytes for a parameter that every GPU has


def _gpus_needed(n_parameters, memory, activations, stage):
    here = EVERYWHERE[stage] * n_parameters
    shared, left = 16 * n_parameters - here, memory - activations - here
    if not shared:
        return 1 if left >= 0 else math.inf
    return math.ceil(shared / left) if left > 0 else math.inf


def _with(everywhere, shared):
    """Return a solution with other bytes for a parameter, at each stage."""

    def gpus_needed(n_parameters, memory, activations, stage):
        here, rest = everywhere[stage] * n_parameters, shared[stage] * n_parameters
        left = memory - activations - here
        if not rest:
            return 1 if left >= 0 else math.inf
        return math.ceil(rest / left) if left > 0 else math.inf

    return gpus_needed


def _negative(n_parameters, memory, activations, stage):
    here = EVERYWHERE[stage] * n_parameters
    left = memory - activations - here
    return math.ceil((16 * n_parameters - here) / left) if left else 1


gpus_needed = Exercise(
    "D.4",
    _gpus_needed,
    [
        (16, 100, 20, 3),
        (16, 100, 20, 1),
        (16, 100, 20, 2),
        (1, 16, 0, 0),
        (16, 100, 20, 0),
        (10, 60, 20, 1),
        (10, 30, 40, 3),
        (7e9, 80e9, 20e9, 3),
        (7e9, 80e9, 20e9, 2),
        (16, 276, 20, 0),
    ],
    [
        (
            lambda n_parameters, memory, activations, stage: _gpus_needed(
                n_parameters, memory, 0, stage
            ),
            "Each GPU needs room for its activations, too.",
        ),
        (
            lambda n_parameters, memory, activations, stage: _gpus_needed(
                n_parameters, memory, activations, 3
            ),
            "Below stage 3 a part of the state is on every GPU, however many there are.",
        ),
        (
            _negative,
            "Look at what is left before you divide: it may be 0 or less, and at stage 0 nothing "
            "is shared.",
        ),
        (
            lambda n_parameters, memory, activations, stage: (
                x
                if (x := _gpus_needed(n_parameters, memory, activations, stage)) in (1, math.inf)
                else x - 1
            ),
            "Round up: with one GPU less it does not fit.",
        ),
        (
            _with({0: 16, 1: 8, 2: 4, 3: 0}, {0: 0, 1: 8, 2: 12, 3: 16}),
            "In mixed precision weights and gradients take 2 bytes each, and the optimizer 12.",
        ),
        (
            _with({0: 16, 1: 4, 2: 2, 3: 0}, {0: 0, 1: 16, 2: 16, 3: 16}),
            "What every GPU has is not shared out as well: 4 and 12, 2 and 14.",
        ),
        (
            lambda n_parameters, memory, activations, stage: math.ceil(
                (16 * n_parameters + activations) / memory
            ),
            "The activations are each GPU's own: take them off the memory.",
        ),
    ],
)


# D.5


def _best_model(n_gpus, peak, days, mfu):
    budget = n_gpus * peak * days * 86_400 * mfu
    n = math.sqrt(budget / 120)
    return n, 20 * n


def _from_budget(size, tokens=lambda n: 20 * n, day=86_400):
    """Return a solution with another size for a budget, other tokens, or another day."""

    def best_model(n_gpus, peak, days, mfu):
        n = size(n_gpus * peak * days * day * mfu)
        return n, tokens(n)

    return best_model


best_model = Exercise(
    "D.5",
    _best_model,
    [(1, 120, 1, 1 / 86_400), (8, 989e12, 30, 0.4), (2048, 312e12, 21, 0.476), (1, 1e12, 0.5, 1)],
    [
        (
            _from_budget(lambda c: math.sqrt(c / 20)),
            "The budget is 6 · N · 20 N: do not forget the 6.",
        ),
        (
            _from_budget(lambda c: math.sqrt(c / 6)),
            "The budget is 6 · N · 20 N: with as many tokens as parameters it would be 6 N².",
        ),
        (
            _from_budget(lambda c: c / 120),
            "The tokens grow with N as well, so the budget is 120 N²: take the root.",
        ),
        (
            _from_budget(lambda c: math.sqrt(c / 120), lambda n: n),
            "The second number is the tokens: 20 for each parameter.",
        ),
        (
            _from_budget(lambda c: math.sqrt(c / 120), day=3600),
            "A day has 24 hours: 86,400 seconds.",
        ),
        (
            _from_budget(lambda c: math.sqrt(c / 120), day=1),
            "The peak is for a second, and the time in days: a day has 86,400 seconds.",
        ),
        (
            lambda n_gpus, peak, days, mfu: _best_model(n_gpus, peak, days, 1),
            "Only the share `mfu` of the peak is reached.",
        ),
        (
            lambda n_gpus, peak, days, mfu: _best_model(1, peak, days, mfu),
            "All `n_gpus` GPUs work at the same time.",
        ),
        (
            lambda *case: _best_model(*case)[::-1],
            "The other way round: first the parameters, then the tokens.",
        ),
    ],
)


# D.6


def _idle_share(stages, micro, backward):
    return (stages - 1) / (micro + stages - 1)


def _by_counting(stages, micro, backward):
    took = (stages + micro - 1) * (1 + backward)
    return 1 - micro * (1 + backward) / took


idle_share = Exercise(
    "D.6",
    _idle_share,
    [(2, 2, 2), (1, 5, 2), (4, 1, 1), (4, 12, 2), (8, 32, 3), (3, 3, 1.5)],
    [
        (
            lambda stages, micro, backward: (stages - 1) / micro,
            "This is the idle time as a share of the work; asked is its share of all the time.",
        ),
        (
            lambda stages, micro, backward: micro / (micro + stages - 1),
            "This is the share in which they work: take it from 1.",
        ),
        (
            lambda stages, micro, backward: 1 - 1 / stages,
            "So it would be with a single micro batch: with several, the parts work side by side.",
        ),
        (
            lambda stages, micro, backward: stages / (micro + stages),
            "One too many: the last part begins after stages − 1 units.",
        ),
        (
            lambda stages, micro, backward: (
                (stages - 1) * (1 + backward) / (micro + (stages - 1) * (1 + backward))
            ),
            "Each micro batch is 1 + backward units of work on each part.",
        ),
        (
            lambda stages, micro, backward: (
                2 * (stages - 1) / (micro * (1 + backward) + 2 * (stages - 1))
            ),
            "The backward passes fill and empty the pipeline in steps of `backward` units.",
        ),
        (
            lambda stages, micro, backward: 0.0,
            "In the beginning the last part has nothing to do yet.",
        ),
    ],
    others=[_by_counting],
)
