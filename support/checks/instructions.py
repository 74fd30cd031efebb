"""The exercises of chapter 7, instructions and preferences."""

import math
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from support.checks import Exercise


def _random(*shape, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# 7.1

START, STOP, USER, ASSISTANT = 100, 101, 7, 8  # ids: the two marks, and the names of two roles
TURN = [START, USER, 1, 2, STOP, START, ASSISTANT, 3, 4, STOP]
TWO_TURNS = [*TURN, START, USER, 5, STOP, START, ASSISTANT, 6, 1, 2, STOP]


def _learned(ids, learn_from=2, learn_stop=True, only_last=False, roles=(ASSISTANT,)):
    """Return what is learned: what follows the role in the turns of these roles."""
    learned, role, at = [], None, 0
    for i, token in enumerate(ids):
        if token == START:
            role, at = ids[i + 1] if i + 1 < len(ids) else None, i
        inside = role in roles and i - at >= learn_from
        learned.append(inside and (learn_stop or token != STOP))
        if token == STOP:
            role = None
    if only_last:
        last = max((i for i, token in enumerate(ids) if token == START), default=0)
        learned = [x and i > last for i, x in enumerate(learned)]
    return learned


def _learned_tokens(ids, start, stop, assistant):
    return _learned(ids)


def _never_stops(ids, start, stop, assistant):
    begins = [i for i, token in enumerate(ids) if token == assistant and ids[i - 1] == start]
    return [bool(begins) and i > begins[0] for i in range(len(ids))]


learned_tokens = Exercise(
    "7.1",
    _learned_tokens,
    [
        (TURN, START, STOP, ASSISTANT),
        (TWO_TURNS, START, STOP, ASSISTANT),
        ([*TURN, START, USER, ASSISTANT, 5, STOP], START, STOP, ASSISTANT),
        ([START, USER, 1, STOP, START, ASSISTANT, 2, 3], START, STOP, ASSISTANT),
        ([START, USER, 1, ASSISTANT, 2, STOP], START, STOP, ASSISTANT),
    ],
    [
        (
            lambda ids, start, stop, assistant: _learned(ids, learn_stop=False),
            "The mark that ends an answer is learned too, or the model never learns to stop.",
        ),
        (
            lambda ids, start, stop, assistant: _learned(ids, learn_from=1),
            "The name of the role stands in the prompt already: begin after it.",
        ),
        (
            lambda ids, start, stop, assistant: _learned(ids, learn_from=0),
            "The start mark and the role stand in the prompt already: begin after them.",
        ),
        (
            lambda ids, start, stop, assistant: _learned(ids, roles=(USER,)),
            "You mark what the user says: it is the assistant's answers that are learned.",
        ),
        (
            lambda ids, start, stop, assistant: _learned(ids, roles=(USER, ASSISTANT)),
            "You mark the turns of both: the model should learn to answer, not to ask.",
        ),
        (
            lambda ids, start, stop, assistant: _learned(ids, only_last=True),
            "You mark only the last turn; every answer of the conversation is learned.",
        ),
        (
            _never_stops,
            "After the mark that ends an answer the user speaks again: stop marking there.",
        ),
        (
            lambda ids, start, stop, assistant: [not x for x in _learned(ids)],
            "True and False have changed places: True is for what is learned.",
        ),
        (
            lambda ids, start, stop, assistant: [
                i if x else -100 for i, x in zip(ids, _learned(ids), strict=True)
            ],
            "These are targets; the exercise asks for True or False for each token.",
        ),
        (
            lambda ids, start, stop, assistant: [*_learned(ids)[1:], False],
            "This is moved by one, as targets are; here the list belongs to the ids themselves.",
        ),
    ],
)


# 7.2


def _share(chosen, rejected, tie=0.5):
    return ((chosen > rejected).double() + tie * (chosen == rejected).double()).mean()


def _pair_accuracy(chosen, rejected):
    return _share(chosen, rejected)


CHOSEN, REJECTED = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([1.0, 1.0, 3.0])

pair_accuracy = Exercise(
    "7.2",
    _pair_accuracy,
    [
        (CHOSEN, REJECTED),
        (torch.zeros(4), torch.zeros(4)),
        (_random(50), _random(50, seed=1)),
        (torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0])),
    ],
    [
        (
            lambda chosen, rejected: _share(chosen, rejected, 0.0),
            "A tie counts half: who does not know is right half of the time.",
        ),
        (
            lambda chosen, rejected: _share(chosen, rejected, 1.0),
            "With >= a model that gives every answer the same score would be right always: a tie "
            "counts half.",
        ),
        (
            lambda chosen, rejected: _share(rejected, chosen),
            "The two have changed places: it is right if the chosen one has the higher score.",
        ),
        (
            lambda chosen, rejected: _share(chosen, torch.zeros(1), 0.5),
            "A score alone means nothing: compare the two scores of a pair with each other.",
        ),
        (
            lambda chosen, rejected: torch.sigmoid(chosen - rejected).mean(),
            "This is the mean probability; the accuracy counts which score is higher.",
        ),
        (
            lambda chosen, rejected: float(chosen.mean() > rejected.mean()),
            "You compare the means; compare pair by pair, then average.",
        ),
        (
            lambda chosen, rejected: _share(chosen, rejected) * len(chosen),
            "This is a number of pairs; divide it by how many there are.",
        ),
    ],
)


# 7.3


def _distance(logprobs, reference, mask):
    return ((logprobs - reference) * mask).sum(dim=1).mean()


MASK = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]

distance = Exercise(
    "7.3",
    _distance,
    [
        (
            torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -1.0, -1.0]]),
            torch.tensor([[-2.0, -2.5, -1.0], [-1.0, -0.5, -2.0]]),
            torch.tensor([[True, True, False], [True, True, True]]),
        ),
        (_random(3, 6), _random(3, 6, seed=1), MASK),
        (_random(3, 6, seed=2), _random(3, 6, seed=3), MASK.flip(1)),
    ],
    [
        (
            lambda logprobs, reference, mask: ((logprobs - reference) * mask).sum() / mask.sum(),
            "This is the mean over tokens; add up each answer's tokens, then average over answers.",
        ),
        (
            lambda logprobs, reference, mask: (logprobs - reference).sum(dim=1).mean(),
            "Padding and prompt do not count: use the mask.",
        ),
        (
            lambda logprobs, reference, mask: -_distance(logprobs, reference, mask),
            "The sign: log p of the policy minus log p of the reference, because the policy wrote.",
        ),
        (
            lambda logprobs, reference, mask: ((logprobs - reference) * mask).mean(),
            "You average over all places, even those that the mask leaves out.",
        ),
        (
            lambda logprobs, reference, mask: ((logprobs - reference) * mask).sum(),
            "This is the sum over all answers; divide by their number.",
        ),
        (
            lambda logprobs, reference, mask: (
                ((logprobs - reference) * mask).sum(dim=1) / mask.sum(dim=1)
            ).mean(),
            "You divide by each answer's length; the distance of an answer is a sum.",
        ),
        (
            lambda logprobs, reference, mask: (
                (((logprobs - reference).abs()) * mask).sum(dim=1).mean()
            ),
            "Without its sign: a token that became less likely counts negative.",
        ),
        (
            lambda logprobs, reference, mask: (
                (logprobs.exp() * (logprobs - reference) * mask).sum(dim=1).mean()
            ),
            "The answers were drawn from the policy, so the average over them has its "
            "probabilities in it already: do not multiply by p.",
        ),
        (
            lambda logprobs, reference, mask: ((logprobs - reference) * mask).sum(dim=1),
            "This is the distance of each answer; return their mean.",
        ),
    ],
)


# 7.4


def _leave_one_out(scores):
    n = scores.shape[1]
    return scores - (scores.sum(dim=1, keepdim=True) - scores) / (n - 1)


leave_one_out = Exercise(
    "7.4",
    _leave_one_out,
    [
        (torch.tensor([[1.0, 2.0, 6.0]]),),
        (torch.tensor([[3.0, 3.0], [0.0, 4.0], [10.0, 12.0]]),),
        (_random(5, 4) + 3,),
    ],
    [
        (
            lambda scores: scores - scores.mean(dim=1, keepdim=True),
            "The answer itself is in your mean: take the mean of the others only.",
        ),
        (
            lambda scores: scores - scores.mean(),
            "You average over all prompts; an answer is compared with the others to its own.",
        ),
        (
            lambda scores: scores - scores.mean(dim=0, keepdim=True),
            "You average over prompts: the answers to one prompt are in a row.",
        ),
        (
            lambda scores: (
                (scores - scores.mean(dim=1, keepdim=True)) / scores.std(dim=1, keepdim=True)
            ),
            "This is GRPO's advantage. Here: the score minus the mean of the others.",
        ),
        (
            lambda scores: scores - (scores.sum(dim=1, keepdim=True) - scores) / scores.shape[1],
            "Of n answers, n − 1 are others: divide their sum by that.",
        ),
        (
            lambda scores: (scores.sum(dim=1, keepdim=True) - scores) / (scores.shape[1] - 1),
            "This is the mean of the others; subtract it from the score.",
        ),
        (
            lambda scores: -_leave_one_out(scores),
            "The sign: an answer that is better than the others has a positive advantage.",
        ),
        (
            lambda scores: scores - scores.max(dim=1, keepdim=True).values,
            "You compare with the best; compare with the mean of the others.",
        ),
    ],
)


# 7.5


def _difference(logprobs, reference):
    margins = logprobs - reference
    return margins[:, 0] - margins[:, 1]


def _pair_weight(logprobs, reference, beta):
    return beta * torch.sigmoid(-beta * _difference(logprobs, reference))


WEIGHT_CASES = [
    (torch.tensor([[-10.0, -12.0]]), torch.tensor([[-11.0, -12.0]]), 1.0),
    (torch.tensor([[-10.0, -12.0], [-30.0, -20.0]]), torch.full((2, 2), -15.0), 0.1),
    (10 * _random(6, 2) - 50, 10 * _random(6, 2, seed=1) - 50, 0.2),
]

pair_weight = Exercise(
    "7.5",
    _pair_weight,
    WEIGHT_CASES,
    [
        (
            lambda logprobs, reference, beta: (
                beta * torch.sigmoid(beta * _difference(logprobs, reference))
            ),
            "The sign: a pair that the model has right already gets little weight.",
        ),
        (
            lambda logprobs, reference, beta: torch.sigmoid(
                -beta * _difference(logprobs, reference)
            ),
            "The β in front is missing: it comes from the inner derivative.",
        ),
        (
            lambda logprobs, reference, beta: (
                beta * torch.sigmoid(-_difference(logprobs, reference))
            ),
            "Inside the σ too the difference is multiplied by β.",
        ),
        (
            lambda logprobs, reference, beta: (
                beta * torch.sigmoid(-beta * (logprobs[:, 0] - logprobs[:, 1]))
            ),
            "The reference is missing: a margin is log p minus log p of the reference.",
        ),
        (
            lambda logprobs, reference, beta: (
                -F.logsigmoid(beta * _difference(logprobs, reference))
            ),
            "This is the loss; the weight is the size of its derivative.",
        ),
        (
            lambda logprobs, reference, beta: (
                beta * torch.sigmoid(-beta * (logprobs - reference))[:, 0]
            ),
            "The rejected answer is missing: subtract its margin.",
        ),
        (
            lambda logprobs, reference, beta: -_pair_weight(logprobs, reference, beta),
            "A weight is positive: the derivative with respect to the difference is minus this.",
        ),
    ],
)


# 7.6


def _smoothed(logprobs, reference, beta, noise):
    z = beta * _difference(logprobs, reference)
    return -(1 - noise) * F.logsigmoid(z) - noise * F.logsigmoid(-z)


smoothed_loss = Exercise(
    "7.6",
    _smoothed,
    [
        (*WEIGHT_CASES[0], 0.1),
        (*WEIGHT_CASES[1], 0.25),
        (*WEIGHT_CASES[2], 0.0),
        (*WEIGHT_CASES[2], 0.1),
        (torch.tensor([[-10.0, -400.0]]), torch.tensor([[-200.0, -200.0]]), 1.0, 0.1),
    ],
    [
        (
            lambda logprobs, reference, beta, noise: _smoothed(logprobs, reference, beta, 0.0),
            "This is DPO's own loss: with probability `noise` the label is wrong.",
        ),
        (
            lambda logprobs, reference, beta, noise: _smoothed(
                logprobs, reference, beta, 1 - noise
            ),
            "The two shares have changed places: 1 − noise of the labels are right.",
        ),
        (
            lambda logprobs, reference, beta, noise: (
                -F.logsigmoid((1 - 2 * noise) * beta * _difference(logprobs, reference))
            ),
            "Average the two losses, not what is inside them.",
        ),
        (
            lambda logprobs, reference, beta, noise: (
                -(1 - noise) * F.logsigmoid(beta * _difference(logprobs, reference))
            ),
            "The second part is missing: the loss if the label is wrong, noise times.",
        ),
        (
            lambda logprobs, reference, beta, noise: (
                -(1 - noise) * F.logsigmoid(beta * _difference(logprobs, reference))
                + noise * F.logsigmoid(-beta * _difference(logprobs, reference))
            ),
            "Both parts are losses, and both are added.",
        ),
        (
            lambda logprobs, reference, beta, noise: -_smoothed(logprobs, reference, beta, noise),
            "The sign: a loss is −log of a probability, and never negative.",
        ),
        (
            lambda logprobs, reference, beta, noise: (
                _smoothed(logprobs, reference, beta, noise) / (1 - 2 * noise)
            ),
            "Do not divide by 1 − 2·noise here: that is the 'robust' loss of Chowdhury et al.",
        ),
        (
            lambda logprobs, reference, beta, noise: (
                -(1 - noise) * (z := beta * _difference(logprobs, reference)).sigmoid().log()
                - noise * (1 - z.sigmoid()).log()
            ),
            "1 − σ(z) becomes 0 for a large z, and its logarithm −∞: use F.logsigmoid(-z).",
        ),
    ],
)


# 7.7


def _best_of(scores, n):
    ordered, N = sorted(scores), len(scores)
    return sum(s * math.comb(i, n - 1) for i, s in enumerate(ordered)) / math.comb(N, n)


def _mean(values):
    values = list(values)
    return sum(values) / len(values)


best_of = Exercise(
    "7.7",
    _best_of,
    [
        ([1.0, 2.0, 6.0], 2),
        ([5.0, 5.0, 1.0, 0.0], 3),
        ([3.0, -1.0, 4.0, 1.0, -5.0, 9.0], 1),
        ([3.0, -1.0, 4.0, 1.0, -5.0, 9.0], 4),
        ([2.0, 7.0], 2),
    ],
    [
        (
            lambda scores, n: max(scores[:n]),
            "This is one drawing of n; average over all ways to draw n of the scores.",
        ),
        (
            lambda scores, n: max(scores),
            "This is the best of all N; of n drawn ones the best is usually worse.",
        ),
        (
            lambda scores, n: _mean(scores),
            "This is the mean of the scores, the best of 1.",
        ),
        (
            lambda scores, n: _mean(sorted(scores)[-n:]),
            "This is the mean of the n best; n are drawn by chance, and the best of them counts.",
        ),
        (
            lambda scores, n: _mean(
                max(scores[i : i + n]) for i in range(0, len(scores) - n + 1, n)
            ),
            "You cut the list into groups of n; there are more ways to draw n of N.",
        ),
        (
            lambda scores, n: _mean(max(scores[i : i + n]) for i in range(len(scores) - n + 1)),
            "Only neighbors are drawn together; any n of the N can be.",
        ),
        (
            lambda scores, n: (
                sum(s * ((i + 1) ** n - i**n) for i, s in enumerate(sorted(scores)))
                / len(scores) ** n
            ),
            "You put a score back after drawing it; each can be drawn only once.",
        ),
        (
            lambda scores, n: _mean(min(c) for c in combinations(scores, n)),
            "You keep the worst of each drawing; keep the best.",
        ),
    ],
)
