"""The exercises of chapter 5, pretraining."""

import math
from collections import Counter
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from support.checks import Exercise


def _random(*shape, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# 5.1


def _given(probs, targets):
    """Return the probabilities that the targets got, without those of -100."""
    asked = targets != -100
    return probs[asked].gather(1, targets[asked][:, None])[:, 0]


def _perplexity(probs, targets):
    return (-_given(probs, targets).log().mean()).exp()


ANSWERS = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.08, 0.02], [0.1, 0.6, 0.3]])

perplexity = Exercise(
    "5.1",
    _perplexity,
    [
        (ANSWERS[:2], torch.tensor([0, 2])),
        (ANSWERS, torch.tensor([1, -100, 0])),
        (ANSWERS, torch.tensor([-100, 1, -100])),
        (_random(100, 3).softmax(dim=-1), torch.arange(100) % 3),
    ],
    [
        (
            lambda probs, targets: -_given(probs, targets).log().mean(),
            "This is the mean loss; the perplexity is e to this power.",
        ),
        (
            lambda probs, targets: math.exp(-_given(probs, targets).double().log().sum()),
            "You add the losses up; the perplexity is e to the power of their mean.",
        ),
        (
            lambda probs, targets: 1 / _given(probs, targets).mean(),
            "You average the probabilities; average the losses, −ln p.",
        ),
        (
            lambda probs, targets: (1 / _given(probs, targets)).mean(),
            "You average 1/p, the perplexity of each token: average the losses, then take one exp.",
        ),
        (
            lambda probs, targets: _given(probs, targets).log().mean().exp(),
            "The sign is missing: the loss is −ln p, and a perplexity is never below 1.",
        ),
        (
            lambda probs, targets: F.cross_entropy(probs, targets).exp(),
            "F.cross_entropy takes logits, and does a softmax: these are probabilities already.",
        ),
        (
            lambda probs, targets: (
                -_given(probs, targets).log().sum() / max(len(targets), 1)
            ).exp(),
            "A target of -100 is not asked: divide by the number of the others.",
        ),
        (
            lambda probs, targets: _perplexity(probs, targets % probs.shape[1]),
            "A target of -100 is not asked: leave its position out.",
        ),
        (
            lambda probs, targets: _perplexity(probs, targets.clamp(min=0)),
            "A target of -100 does not mean token 0: leave its position out.",
        ),
        (
            lambda probs, targets: (-probs[targets != -100].max(dim=-1).values.log().mean()).exp(),
            "You take the likeliest token at each position; take the one that came, the target.",
        ),
        (
            lambda probs, targets: 2 ** -_given(probs, targets).log().mean(),
            "You mix two bases: with log use exp, with 2 ** use log2.",
        ),
        (
            lambda probs, targets: _perplexity(probs[:-1], targets[1:]),
            "Nothing is to be moved: `targets[i]` is the token that came where `probs[i]` guessed.",
        ),
        (
            lambda probs, targets: 1 / _given(probs, targets),
            "This is a perplexity for each token; there is one for all, e to their mean loss.",
        ),
        (
            lambda probs, targets: (
                (1 / _given(probs, targets).prod()) ** (1 / sum(targets != -100))
            ),
            "The product of many probabilities is too small for a number and becomes 0: add "
            "logarithms instead.",
        ),
    ],
)


# 5.2


def _vaswani_rate(step, d_model, warmup):
    return d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)


vaswani_rate = Exercise(
    "5.2",
    _vaswani_rate,
    [(1, 64, 4), (3, 64, 4), (4, 64, 4), (5, 64, 4), (16, 64, 4), (100, 64, 25), (7, 256, 10)]
    + [(1, 64, 1)],
    [
        (
            lambda step, d_model, warmup: d_model**-0.5 * max(step**-0.5, step * warmup**-1.5),
            "You take the larger of the two; the rate follows the lower line.",
        ),
        (
            lambda step, d_model, warmup: d_model**-0.5 * (step**-0.5 + step * warmup**-1.5),
            "You add the two terms; the rate is the smaller of them.",
        ),
        (
            lambda step, d_model, warmup: (
                d_model**-0.5 * (step * warmup**-1.5 if step <= warmup + 1 else step**-0.5)
            ),
            "You turn one step too late: the highest rate is that of step `warmup`.",
        ),
        (
            lambda step, d_model, warmup: _vaswani_rate(step + 1, d_model, warmup),
            "Steps count from 1 here: use the step as it is.",
        ),
        (
            lambda step, d_model, warmup: _vaswani_rate(step, 1, warmup),
            "The width is missing: everything is divided by the root of d_model.",
        ),
        (
            lambda step, d_model, warmup: d_model * _vaswani_rate(step, d_model, warmup),
            "You multiply by the root of d_model; a wider model takes shorter steps.",
        ),
        (
            lambda step, d_model, warmup: _vaswani_rate(step, d_model**2, warmup),
            "You divide by d_model; it is its root.",
        ),
        (
            lambda step, d_model, warmup: d_model**-0.5 * step**-0.5,
            "The warm-up is missing: until step `warmup` the rate rises.",
        ),
        (
            lambda step, d_model, warmup: d_model**-0.5 * step * warmup**-1.5,
            "It rises for ever; from step `warmup` on it falls.",
        ),
        (
            lambda step, d_model, warmup: _vaswani_rate(min(step, warmup), d_model, warmup),
            "After the warm-up you keep the rate; it falls with the root of the step.",
        ),
        (
            lambda step, d_model, warmup: d_model**-0.5 * min(step**-0.5, step / warmup),
            "The two lines must meet at step `warmup`: the rising one is step / warmup**1.5.",
        ),
        (
            lambda step, d_model, warmup: (
                d_model**-0.5 * min(warmup**0.5 / step, step * warmup**-1.5)
            ),
            "It falls too fast: with the root of the step, not with the step.",
        ),
        (
            lambda step, d_model, warmup: (
                d_model**-0.5 * (step * warmup**-1.5 if step <= warmup else (step - warmup) ** -0.5)
            ),
            "In the fall too the step counts from the start of training, not from the peak.",
        ),
    ],
)


# 5.3


def _length(gradients):
    return sum(g.pow(2).sum() for g in gradients).sqrt()


def _scaled(gradients, max_norm, length):
    return [g * min(1.0, max_norm / length) for g in gradients]


def _clip_gradients(gradients, max_norm):
    return _scaled(gradients, max_norm, _length(gradients) + 1e-6)


GRADIENTS = [_random(3), 3 * _random(2, seed=1), _random(1, 2, seed=2)]

clip_gradients = Exercise(
    "5.3",
    _clip_gradients,
    [
        ([torch.tensor([3.0, 0.0]), torch.tensor([[-4.0]])], 1.0),
        ([torch.tensor([0.3, 0.1]), torch.tensor([[-0.2]])], 1.0),
        (GRADIENTS, 2.5),
        (GRADIENTS, math.inf),
        ([torch.zeros(2), torch.zeros(1, 1)], 0.5),
    ],
    [
        (
            lambda gradients, max_norm: [_clip_gradients([g], max_norm)[0] for g in gradients],
            "You clip each tensor by itself; the length is that of all of them together.",
        ),
        (
            lambda gradients, max_norm: [g.clamp(-max_norm, max_norm) for g in gradients],
            "You cut each number off, which changes the direction: multiply all by one factor.",
        ),
        (
            lambda gradients, max_norm: [g * max_norm / _length(gradients) for g in gradients],
            "Gradients that are short enough stay as they are: the factor is never above 1.",
        ),
        (
            lambda gradients, max_norm: _scaled(
                gradients, max_norm, sum(g.norm() for g in gradients)
            ),
            "You add lengths; add the squares of all the numbers, then take one root.",
        ),
        (
            lambda gradients, max_norm: _scaled(gradients, max_norm, _length(gradients) ** 2),
            "The root is missing: the length is the root of the sum of the squares.",
        ),
        (
            lambda gradients, max_norm: (
                _scaled(gradients, 1.0, _length(gradients))
                if _length(gradients) > max_norm
                else gradients
            ),
            "You cut to length 1, whatever the limit: the factor is max_norm / length.",
        ),
        (
            lambda gradients, max_norm: _scaled(
                gradients, max_norm, max(g.abs().max() for g in gradients)
            ),
            "You take the largest number for the length: take the root of the sum of squares.",
        ),
        (
            lambda gradients, max_norm: _scaled(
                gradients, max_norm, sum(g.abs().sum() for g in gradients)
            ),
            "You add the numbers without their signs: square them, add, take the root.",
        ),
        (
            lambda gradients, max_norm: _scaled(
                gradients, max_norm, max(g.norm() for g in gradients)
            ),
            "You take the longest tensor; the length is that of all of them together.",
        ),
        (
            lambda gradients, max_norm: _scaled(
                gradients,
                max_norm,
                torch.cat([g.flatten() for g in gradients]).pow(2).mean().sqrt(),
            ),
            "You average the squares; the length is the root of their sum.",
        ),
        (
            lambda gradients, max_norm: torch.cat(
                [g.flatten() for g in _clip_gradients(gradients, max_norm)]
            ),
            "Return a list with a tensor for each gradient, of the same shape.",
        ),
    ],
)


# 5.4


def _runs(ids, n):
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def _all_runs(texts, n):
    return [run for ids in texts for run in _runs(ids, n)]


def _share(some, of):
    return some / of if of else 0.0


def _different(runs):
    return _share(len(set(runs)), len(runs))


def _distinct_n(texts, n):
    return _different(_all_runs(texts, n))


def _once(texts, n):
    counts = Counter(_all_runs(texts, n))
    return _share(sum(count == 1 for count in counts.values()), counts.total())


distinct_n = Exercise(
    "5.4",
    _distinct_n,
    [
        ([[1, 2, 3, 1, 2], [1, 2, 4]], 2),
        ([[7, 7, 7, 7], [7, 8]], 1),
        ([[5], [1, 2, 1, 2, 1], [2, 1]], 2),
        ([[3, 1, 4, 1, 5], [9, 2, 3, 1, 4, 1], [2, 3, 1]], 3),
        ([[1, 2], [1, 2]], 3),
        ([[1, 12, 31, 12], [11, 2], [11, 2]], 2),
    ],
    [
        (
            lambda texts, n: _different(_runs(list(chain(*texts)), n)),
            "A run must not reach from one text into the next: cut each text by itself.",
        ),
        (
            lambda texts, n: sum(_different(_runs(ids, n)) for ids in texts) / len(texts),
            "You average over texts: count over all of them, then divide once.",
        ),
        (
            lambda texts, n: _share(
                sum(len(set(_runs(ids, n))) for ids in texts), len(_all_runs(texts, n))
            ),
            "A run that two texts share counts once: use one set for all texts.",
        ),
        (
            lambda texts, n: len(set(_all_runs(texts, n))) / sum(map(len, texts)),
            "You divide by the number of tokens; a text of L tokens has L − n + 1 runs.",
        ),
        (
            lambda texts, n: _different([run for ids in texts for run in _runs(ids, n)[:-1]]),
            "The last run of each text is missing: it begins at len(ids) − n.",
        ),
        (
            lambda texts, n: _different(
                [tuple(t[i : i + n]) for t in texts for i in range(len(t))]
            ),
            "Near the end of a text your slices are shorter than n: stop at len(ids) − n.",
        ),
        (
            lambda texts, n: _different([run for ids in texts for run in _runs(ids, n)[::n]]),
            "Runs overlap: one begins at every token.",
        ),
        (
            lambda texts, n: _different([tuple(sorted(run)) for run in _all_runs(texts, n)]),
            "Order matters: (1, 2) and (2, 1) are different runs.",
        ),
        (
            lambda texts, n: len(set(_all_runs(texts, n))),
            "This is how many different runs there are: divide by how many there are in all.",
        ),
        (
            _once,
            "You count the runs that come exactly once; each different run counts, once.",
        ),
        (
            lambda texts, n: 1 - _distinct_n(texts, n) if _all_runs(texts, n) else 0.0,
            "This is the share of repetitions: take it from 1.",
        ),
        (
            lambda texts, n: _distinct_n([list(text) for text in set(map(tuple, texts))], n),
            "Two texts that are equal are two texts: their runs count in the number of all runs.",
        ),
        (
            lambda texts, n: _different(["".join(map(str, run)) for run in _all_runs(texts, n)]),
            "As text without a space (1, 12) and (11, 2) are both 112: put tuples into the set.",
        ),
        (
            lambda texts, n: _distinct_n(texts, n) if _all_runs(texts, n) else 1.0,
            "Without a single run the answer is 0.",
        ),
    ],
)


# 5.5


def _penalize(logits, used, penalty):
    harsher = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(_among(used, logits), harsher, logits)


def _among(used, logits):
    """Return for each logit whether its token has been used."""
    return torch.isin(torch.arange(len(logits)), torch.tensor(used))


def _each_time(logits, used, penalty):
    for i in used:
        logits = _penalize(logits, [i], penalty)
    return logits


penalize = Exercise(
    "5.5",
    _penalize,
    [
        (torch.tensor([2.0, -1.0, 3.0, -2.0]), [0, 1, 0], 2.0),
        (_random(12) * 3, [3, 1, 4, 1, 5, 9, 2, 6, 5], 1.3),
        (_random(6, seed=1), [0, 5, 2, 2, 2], 1.5),
        (torch.tensor([0.0, 1.5, -0.5]), [0, 2, 1], 1.2),
    ],
    [
        (
            lambda logits, used, penalty: torch.where(
                _among(used, logits), logits / penalty, logits
            ),
            "Dividing a negative logit brings it nearer to 0 and makes the token likelier: "
            "multiply it.",
        ),
        (
            lambda logits, used, penalty: torch.where(
                _among(used, logits), logits * penalty, logits
            ),
            "Multiplying a positive logit makes the token likelier: divide it.",
        ),
        (
            lambda logits, used, penalty: _penalize(logits, used, 1 / penalty),
            "The wrong way round, this is a reward: divide the positive, multiply the negative.",
        ),
        (
            _each_time,
            "A token that was used several times is penalized once.",
        ),
        (
            lambda logits, used, penalty: _penalize(logits, range(len(logits)), penalty),
            "You penalize every token: only those in `used`.",
        ),
        (
            lambda logits, used, penalty: torch.where(
                _among(used, logits), logits, _penalize(logits, range(len(logits)), penalty)
            ),
            "You penalize the tokens that were not used.",
        ),
        (
            lambda logits, used, penalty: torch.where(
                _among(used, logits), logits - penalty, logits
            ),
            "You subtract; this penalty is a factor.",
        ),
        (
            lambda logits, used, penalty: logits / penalty,
            "Every logit divided by one number is a temperature: change only those in `used`.",
        ),
        (
            lambda logits, used, penalty: logits.masked_fill(_among(used, logits), -torch.inf),
            "You forbid the token; the penalty makes it less likely.",
        ),
        (
            lambda logits, used, penalty: _penalize(logits.log_softmax(dim=-1), used, penalty),
            "The logits are penalized as they are: no logarithm of a softmax before it.",
        ),
        (
            lambda logits, used, penalty: _penalize(logits, used, penalty).softmax(dim=-1),
            "Return the logits: no softmax yet.",
        ),
        (
            lambda logits, used, penalty: _penalize(logits, used, penalty)[sorted(set(used))],
            "Return all logits, also those that stay as they are.",
        ),
    ],
)


# 5.6


def _adamw(correct=(1, 1), late=0, root=True, inside=False, square=True, sign=1, swap=False):
    """Return the function that makes an AdamW step, or a wrong one."""

    def step(w, g, m, v, t, lr, betas, eps, weight_decay):
        first, second = betas[::-1] if swap else betas
        m = first * m + (1 - first) * g
        v = second * v + (1 - second) * (g**2 if square else g.abs())
        m_hat = m / (1 - first ** (t + late)) if correct[0] else m
        v_hat = v / (1 - second ** (t + late)) if correct[1] else v
        size = (v_hat + eps).sqrt() if inside else (v_hat.sqrt() if root else v_hat) + eps
        return w - lr * weight_decay * w - sign * lr * m_hat / size, m, v

    return step


def _adamw_step(w, g, m, v, t, lr, betas, eps, weight_decay):
    return _adamw()(w, g, m, v, t, lr, betas, eps, weight_decay)


def _l2(w, g, *rest):
    return _adamw_step(w, g + rest[-1] * w, *rest[:-1], 0.0)


def _without_lr(*case):
    return _adamw_step(*case[:-1], case[-1] / case[5])


def _without_decay(*case):
    return _adamw_step(*case[:-1], 0.0)


def _decay_last(*case):
    w, m, v = _without_decay(*case)
    return w * (1 - case[5] * case[-1]), m, v


def _turned(w, g, m, v, t, lr, betas, eps, weight_decay):
    m, v = (1 - betas[0]) * m + betas[0] * g, (1 - betas[1]) * v + betas[1] * g**2
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    return w - lr * (m_hat / (v_hat.sqrt() + eps) + weight_decay * w), m, v


def _first_step(w, g, m, v, t, *rest):
    return _adamw_step(w, g, m, v, 1, *rest)


def _early_eps(w, g, m, v, t, lr, betas, eps, weight_decay):
    return _adamw_step(w, g, m, v, t, lr, betas, eps / (1 - betas[1] ** t) ** 0.5, weight_decay)


def _without_eps(*case):
    return _adamw_step(*case[:7], 0.0, case[-1])


def _hats(*case):
    w, m, v = _adamw_step(*case)
    return w, *(a / (1 - beta ** case[4]) for a, beta in zip((m, v), case[6], strict=True))


def _old_averages(w, g, m, v, *rest):
    return _adamw_step(w, g, m, v, *rest)[0], m, v


def _weight_only(*case):
    return _adamw_step(*case)[0]


ZERO = torch.zeros(2)
adamw_step = Exercise(
    "5.6",
    _adamw_step,
    [
        (torch.tensor([2.0, -1.0]), torch.tensor([3.0, 0.5]), ZERO, ZERO, 1)
        + (0.1, (0.9, 0.99), 1e-8, 0.5),
        (_random(2), _random(2, seed=1), _random(2, seed=2), _random(2, seed=3) ** 2, 4)
        + (0.3, (0.8, 0.95), 1e-8, 0.2),
        (torch.tensor([1.0, -2.0]), torch.tensor([0.2, -0.1]), ZERO, ZERO + 0.1, 2)
        + (0.5, (0.7, 0.9), 0.1, 0.1),
        (torch.tensor([1.0, -2.0]), ZERO, ZERO, ZERO, 1) + (0.1, (0.9, 0.99), 1e-8, 0.5),
    ],
    [
        (
            _adamw(correct=(0, 0)),
            "The correction is missing: divide m by 1 − β₁ᵗ, and v by 1 − β₂ᵗ, in the step.",
        ),
        (_adamw(correct=(1, 0)), "v begins at 0 as well: divide it by 1 − β₂ᵗ in the step."),
        (_adamw(correct=(0, 1)), "m begins at 0 as well: divide it by 1 − β₁ᵗ in the step."),
        (_adamw(late=1), "t counts from 1: use it as it is, not t + 1."),
        (_first_step, "Divide by 1 − βᵗ, with t as a power: the correction fades out."),
        (_early_eps, "ε is added to √v̂, the root of the v that is corrected already."),
        (_without_eps, "ε is missing: without it a weight whose gradients are all 0 becomes NaN."),
        (
            _l2,
            "You add the decay to the gradient, as Adam did before the W: let it shrink w itself, "
            "apart from m and v.",
        ),
        (_without_lr, "The decay too is multiplied by the learning rate."),
        (_without_decay, "The decay is missing: w also shrinks by lr · weight_decay · w."),
        (
            _decay_last,
            "The decay is taken from the weight before the step, not from the one after it.",
        ),
        (_adamw(root=False), "The root is missing: divide by √v̂."),
        (_adamw(inside=True), "Is your epsilon outside of the root? It is √v̂ + ε."),
        (_adamw(square=False), "v is the average of the squares of the gradients."),
        (_adamw(sign=-1), "You go uphill: the step is subtracted."),
        (_adamw(swap=True), "The betas are (β₁, β₂): the first is of m, the second of v."),
        (_turned, "The betas are the shares of the past; the new gradient gets 1 − β."),
        (
            _hats,
            "Return m and v as they are, not divided: the next step goes on from them.",
        ),
        (_old_averages, "Return the new m and v; you return those that you were given."),
        (_weight_only, "Return the three of them: the new w, m and v."),
        (
            lambda *case: (_adamw_step(*case)[0] - case[0], *_adamw_step(*case)[1:]),
            "This is how far w moves; return the new w.",
        ),
        (
            lambda *case: _adamw_step(*case[:-1], -case[-1]),
            "The decay makes w larger: it is subtracted, like the step.",
        ),
        (
            lambda *case: tuple(_adamw_step(*case)[i] for i in (0, 2, 1)),
            "m and v have changed places: return w, m, v.",
        ),
        (
            lambda *case: _adamw_step(*case)[1:] + _adamw_step(*case)[:1],
            "Return them in this order: w, m, v.",
        ),
    ],
    others=[lambda *case: torch.stack(_adamw_step(*case))],
)
