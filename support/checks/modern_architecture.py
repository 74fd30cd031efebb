"""The exercises of appendix C, a modern architecture."""

import torch
import torch.nn.functional as F

from support.checks import Exercise


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# C.1


def _gated_width(d_model, multiple):
    return -(-8 * d_model // (3 * multiple)) * multiple


gated_width = Exercise(
    "C.1",
    _gated_width,
    [(576, 1), (4096, 256), (144, 64), (5120, 256), (128, 1), (64, 64), (97, 43)],
    [
        (
            lambda d_model, multiple: -(-(8 * d_model // 3) // multiple) * multiple,
            "Round once, at the end: rounding 8/3 of the width first can lose a whole step.",
        ),
        (
            lambda d_model, multiple: 8 * d_model // (3 * multiple) * multiple,
            "Round up, not down: the gated layers should have no fewer parameters.",
        ),
        (
            lambda d_model, multiple: -(-4 * d_model // multiple) * multiple,
            "With three matrices of 4 · d_model there is half as much again: take 2/3 of it.",
        ),
        (
            lambda d_model, multiple: round(8 * d_model / 3 / multiple) * multiple,
            "Round up, not to the nearest multiple.",
        ),
        (
            lambda d_model, multiple: -(-2 * d_model // (3 * multiple)) * multiple,
            "2/3 of 4 · d_model, and not of d_model.",
        ),
        (
            lambda d_model, multiple: 8 * d_model / 3,
            "The width must be a whole number, and a multiple of `multiple`.",
        ),
        (
            lambda d_model, multiple: -(-8 * d_model // 3),
            "The width must be a multiple of `multiple`.",
        ),
    ],
)


# C.2


def _turn(x, position, base):
    d = len(x)
    a, b = x.chunk(2)
    angle = position / base ** (torch.arange(0, d, 2) / d)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag])


def _turned_by(angles, split=lambda x: x.chunk(2), join=lambda a, b: torch.cat([a, b])):
    """Return a solution with other angles, or other pairs."""

    def turn(x, position, base):
        a, b = split(x)
        angle = angles(position, base, len(x))
        return join(
            a * angle.cos() - b * angle.sin(),
            b * angle.cos() + a * angle.sin(),
        )

    return turn


def _angles(position, base, d):
    return position / base ** (torch.arange(0, d, 2) / d)


turn = Exercise(
    "C.2",
    _turn,
    [
        (torch.tensor([1.0, 0.0]), 1, 10_000.0),
        (torch.tensor([1.0, 2.0, 3.0, 4.0]), 0, 100.0),
        (torch.tensor([1.0, 2.0, 3.0, 4.0]), 3, 100.0),
        (_randn(8), 50, 10_000.0),
        (_randn(16, seed=1), 7, 500.0),
    ],
    [
        (
            _turned_by(
                _angles, lambda x: (x[0::2], x[1::2]), lambda a, b: torch.stack([a, b], 1).flatten()
            ),
            "These pairs are neighbors, (0, 1), (2, 3) and so on, as in Meta's own code; here "
            "number i goes with number i + d/2.",
        ),
        (
            _turned_by(lambda position, base, d: -_angles(position, base, d)),
            "It turns the wrong way: multiply by e to the power of plus i times the angle.",
        ),
        (
            _turned_by(lambda position, base, d: position / base ** (torch.arange(d // 2) / d)),
            "The exponent of pair i is 2i/d, not i/d.",
        ),
        (
            _turned_by(lambda position, base, d: position * base ** (torch.arange(0, d, 2) / d)),
            "Later pairs turn more slowly: divide the position by the power of the base.",
        ),
        (
            _turned_by(lambda position, base, d: torch.full((d // 2,), float(position))),
            "Each pair has a speed of its own: only the first turns by the position itself.",
        ),
        (
            _turned_by(lambda position, base, d: torch.deg2rad(_angles(position, base, d))),
            "The angle is in radians, not in degrees.",
        ),
        (
            _turned_by(_angles, join=lambda a, b: torch.stack([a, b], 1).flatten()),
            "The pairs are right; but give back first all real parts, then all imaginary ones.",
        ),
    ],
)


# C.3


def _repeat_kv(k, n):
    return k.repeat_interleave(n, dim=1)


repeat_kv = Exercise(
    "C.3",
    _repeat_kv,
    [
        (torch.arange(2.0).view(1, 2, 1, 1), 3),
        (_randn(2, 3, 4, 5), 2),
        (_randn(1, 1, 2, 3), 4),
        (_randn(2, 2, 1, 1), 1),
    ],
    [
        (
            lambda k, n: k.repeat(1, n, 1, 1),
            "The whole row of heads is repeated here; but neighbors must belong together: the "
            "first n query heads all read head 0.",
        ),
        (
            lambda k, n: k.repeat_interleave(n, dim=2),
            "This repeats the tokens: the heads are dimension 1.",
        ),
        (
            lambda k, n: k.repeat_interleave(n, dim=0),
            "This repeats the rows of the batch: the heads are dimension 1.",
        ),
        (
            lambda k, n: k.repeat_interleave(n, dim=1) / n,
            "Each query head reads the whole key: nothing is shared out.",
        ),
        (
            lambda k, n: k[:, :, None].expand(-1, -1, n, -1, -1),
            "The copies stand in a dimension of their own: join it with the heads.",
        ),
        (
            lambda k, n: k.mean(dim=1, keepdim=True).expand(-1, k.shape[1] * n, -1, -1),
            "Each group has its own keys: do not mix them.",
        ),
    ],
)


# C.4


def _cache_bytes(n_layers, n_kv_heads, d_head, n_tokens, window, every):
    full = n_layers // every
    kept = full * n_tokens + (n_layers - full) * min(window, n_tokens)
    return 2 * n_kv_heads * d_head * 2 * kept


def _cache_by(kept, factor=4):
    """Return a solution with another number of kept tokens, or another factor."""

    def cache_bytes(n_layers, n_kv_heads, d_head, n_tokens, window, every):
        return factor * n_kv_heads * d_head * kept(n_layers, n_tokens, window, every)

    return cache_bytes


def _kept(n_layers, n_tokens, window, every):
    full = n_layers // every
    return full * n_tokens + (n_layers - full) * min(window, n_tokens)


cache_bytes = Exercise(
    "C.4",
    _cache_bytes,
    [
        (2, 1, 1, 10, 4, 2),
        (6, 2, 64, 1000, 100, 6),
        (8, 3, 16, 50, 4096, 4),
        (26, 4, 256, 32_768, 1024, 6),
        (4, 1, 8, 100, 10, 1),
        (5, 1, 8, 100, 10, 2),
    ],
    [
        (
            _cache_by(_kept, factor=2),
            "Keys and values, and two bytes for each number: that makes 4.",
        ),
        (
            _cache_by(lambda layers, tokens, window, every: layers * tokens),
            "Only every `every`-th layer keeps all tokens: the others keep a window.",
        ),
        (
            _cache_by(lambda layers, tokens, window, every: layers * min(window, tokens)),
            "Every `every`-th layer sees all tokens, and has to keep them.",
        ),
        (
            _cache_by(
                lambda layers, tokens, window, every: (
                    layers // every * tokens + (layers - layers // every) * window
                )
            ),
            "A text that is shorter than the window does not fill it.",
        ),
        (
            _cache_by(
                lambda layers, tokens, window, every: (
                    layers // every * min(window, tokens) + (layers - layers // every) * tokens
                )
            ),
            "The other way round: every `every`-th layer sees all, and the rest have the window.",
        ),
        (
            _cache_by(
                lambda layers, tokens, window, every: (
                    layers / every * tokens + layers * (1 - 1 / every) * min(window, tokens)
                )
            ),
            "Count whole layers: with 5 layers, every second one sees all, which makes 2.",
        ),
        (
            _cache_by(
                lambda layers, tokens, window, every: (
                    -(-layers // every) * tokens
                    + (layers - -(-layers // every)) * min(window, tokens)
                )
            ),
            "With 5 layers, of which every second one sees all, those are layers 2 and 4.",
        ),
    ],
)


# C.5


def _reach(allowed, n_layers):
    seen = torch.eye(len(allowed), dtype=torch.bool)
    for _ in range(n_layers):
        seen = (allowed.float() @ seen.float()) > 0
    return seen


def _window(T, window):
    i, j = torch.arange(T)[:, None], torch.arange(T)
    return (j <= i) & (j > i - window)


def _holes(T):
    i, j = torch.arange(T)[:, None], torch.arange(T)
    return (i == j) | (j == i - 3)


reach = Exercise(
    "C.5",
    _reach,
    [
        (_window(8, 3), 1),
        (_window(8, 3), 2),
        (_window(8, 2), 4),
        (_window(6, 1), 3),
        (_holes(9), 2),
        (_window(5, 5), 3),
        (torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 1]]).bool(), 2),
    ],
    [
        (
            lambda allowed, n_layers: allowed,
            "This is one layer. In the second, what a token sees has itself seen others.",
        ),
        (
            lambda allowed, n_layers: _reach(allowed, n_layers + 1),
            "One layer too many: after one layer it is the mask itself.",
        ),
        (
            lambda allowed, n_layers: torch.linalg.matrix_power(allowed.float(), n_layers),
            "These are numbers of paths: return whether there is any, True or False.",
        ),
        (
            lambda allowed, n_layers: torch.ones_like(allowed).tril(),
            "Not every earlier token can be reached in so few layers.",
        ),
        (
            lambda allowed, n_layers: _window(
                len(allowed), n_layers * (int(allowed.sum(dim=1).max()) - 1) + 1
            ),
            "This is right for a window; but the mask may be any, with holes for instance.",
        ),
        (
            lambda allowed, n_layers: _reach(allowed.T, n_layers),
            "Turned around: row i says which tokens token i knows about.",
        ),
    ],
)


# C.6


def _gates(logits, k):
    best, chosen = logits.topk(k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, chosen, best.softmax(dim=-1))


def _kept_probs(logits, k):
    probs = logits.softmax(dim=-1)
    return torch.where(logits >= logits.topk(k).values[..., -1:], probs, 0.0)


gates = Exercise(
    "C.6",
    _gates,
    [
        (torch.tensor([[2.0, 0.0, 1.0, -1.0]]), 2),
        (torch.tensor([[0.5, 3.0, 1.0], [2.0, -1.0, 1.5]]), 1),
        (_randn(6, 8) * 2, 3),
        (_randn(4, 5, seed=2), 5),
        (torch.tensor([[-3.0, -1.0, -2.0]]), 2),
    ],
    [
        (
            _kept_probs,
            "The weights of a token must add up to 1: take the softmax over the chosen ones only, "
            "or divide by their sum.",
        ),
        (
            lambda logits, k: logits.softmax(dim=-1),
            "All experts have a weight here: keep the k best, and 0 for the others.",
        ),
        (
            lambda logits, k: (logits >= logits.topk(k).values[..., -1:]).float() / k,
            "The chosen ones do not count the same: the router's logits say how much.",
        ),
        (
            lambda logits, k: torch.where(
                logits >= logits.topk(k).values[..., -1:], logits, 0.0
            ).softmax(dim=-1),
            "A logit of 0 is not a weight of 0: what is left out must be minus infinity.",
        ),
        (
            lambda logits, k: logits.topk(k).values.softmax(dim=-1),
            "Put the weights where their experts are: the shape is that of the logits.",
        ),
        (
            lambda logits, k: _gates(-logits, k),
            "These are the k worst experts.",
        ),
        (
            lambda logits, k: _gates(logits.T, min(k, len(logits))).T,
            "Each token chooses experts here, and not each expert tokens.",
        ),
    ],
)


# C.7


def _balance(logits):
    probs, E = logits.softmax(dim=-1), logits.shape[-1]
    f = F.one_hot(logits.argmax(dim=-1), E).float().mean(dim=0)
    return E * (f * probs.mean(dim=0)).sum()


def _parts(logits):
    probs, E = logits.softmax(dim=-1), logits.shape[-1]
    return F.one_hot(logits.argmax(dim=-1), E).float(), probs, E


balance = Exercise(
    "C.7",
    _balance,
    [
        (torch.tensor([[9.0, 0.0], [0.0, 9.0]]),),
        (torch.zeros(4, 4) + 8 * torch.eye(4),),
        (torch.tensor([[3.0, 0.0, 0.0]] * 5),),
        (_randn(20, 6) * 2,),
        (_randn(7, 3, seed=3),),
    ],
    [
        (
            lambda logits: _balance(logits) / logits.shape[-1],
            "Times the number of experts, so that perfect balance is 1 for any number.",
        ),
        (
            lambda logits: logits.shape[-1] * (_parts(logits)[1].mean(dim=0) ** 2).sum(),
            "f is how often an expert was *chosen*, not its mean probability.",
        ),
        (
            lambda logits: logits.shape[-1] * (_parts(logits)[0].mean(dim=0) ** 2).sum(),
            "p is the mean probability: without it nothing here has a gradient.",
        ),
        (
            lambda logits: (
                logits.shape[-1] * (_parts(logits)[0] * _parts(logits)[1]).mean(dim=0).sum()
            ),
            "First the mean over the tokens of each, and then the product.",
        ),
        (
            lambda logits: (
                logits.shape[-1] * (_parts(logits)[0].sum(dim=0) * _parts(logits)[1].sum(0)).sum()
            ),
            "f and p are shares: means over the tokens, not sums.",
        ),
        (
            lambda logits: (
                logits.shape[-1] * (_parts(logits)[0].mean(dim=0) * logits.mean(dim=0)).sum()
            ),
            "p is made of probabilities, after the softmax, not of logits.",
        ),
        (
            lambda logits: (
                logits.shape[-1]
                * (_parts(logits)[0].mean(dim=0) * logits.softmax(dim=0).mean(dim=0)).sum()
            ),
            "The softmax is over the experts, the last dimension.",
        ),
    ],
)
