"""A reward model: which of two answers people would prefer, as a number for each answer.

Shapes: B answers of T tokens, prompt included; `mask` (B, T) is True on the tokens of the answer.
Stiennon et al., Learning to Summarize from Human Feedback, 2020, section 3.4; Ouyang et al.,
Training Language Models to Follow Instructions with Human Feedback, 2022, section 3.5.
"""

import copy
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from support.instruct import Row, pad


class RewardModel(nn.Module):
    """A language model with a head for one number in place of a head for the next token.

    The head begins with zeros, so that at first every answer is worth 0. The value model of PPO is
    of this kind too.
    """

    def __init__(self, language_model: nn.Module):
        super().__init__()
        self.body = copy.deepcopy(language_model)
        self.body.head = nn.Linear(language_model.config.d_model, 1)
        nn.init.zeros_(self.body.head.weight)
        nn.init.zeros_(self.body.head.bias)

    def forward(self, ids: Tensor) -> Tensor:
        """Return a number for each token, (B, T), that depends on it and on those before it."""
        return self.body(ids)[..., 0]

    def score(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return what each answer is worth, (B,): the number at its last token, not at padding."""
        return self(ids).gather(1, last(mask)[:, None])[:, 0]


def last(mask: Tensor) -> Tensor:
    """Return where each row's last True is, (B,). Raises ValueError for a row without one."""
    if not mask.any(dim=1).all():
        raise ValueError("A row has no token of an answer: its mask is all False.")
    return mask.shape[1] - 1 - mask.int().flip(1).argmax(dim=1)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return -log σ(chosen - rejected), (B,): the surprise that the chosen one was preferred.

    Bradley and Terry, Rank Analysis of Incomplete Block Designs, 1952; Ouyang et al., equation 1.
    """
    return -F.logsigmoid(chosen - rejected)


def reward_loss(model: RewardModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, int]:
    """Return the loss summed over pairs (B, 2, T), and their number: a `loss` for `train`."""
    scores = model.score(ids.flatten(0, 1), mask.flatten(0, 1)).view(-1, 2)
    return bradley_terry_loss(*scores.unbind(dim=1)).sum(), len(scores)


def pair_batch(pairs: Sequence[tuple[Row, Row]]) -> tuple[Tensor, Tensor]:
    """Return pairs (chosen, rejected) as ids and a mask, both (B, 2, T)."""
    ids, mask = pad([row for pair in pairs for row in pair])
    return ids.unflatten(0, (-1, 2)), mask.unflatten(0, (-1, 2))
