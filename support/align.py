"""Preferences without a reward model: DPO. And the names of the other way, in one place.

Shapes: B pairs of answers, the chosen one first, of T tokens, prompt included; `mask` (B, 2, T) is
True on the tokens of the answers. Rafailov et al., Direct Preference Optimization: Your Language
Model is Secretly a Reward Model, 2023.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.generate import evaluating
from support.instruct import Example
from support.ppo import PPOConfig, ppo, token_logprobs
from support.reward import RewardModel, pair_batch, reward_loss

__all__ = ["PPOConfig", "RewardModel", "pair_batch", "ppo", "reward_loss", "token_logprobs"]


def dpo_loss(logprobs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return -log σ(β (margin of the chosen - margin of the rejected)), (B,).

    Args:
        logprobs, reference: log p of whole answers, (B, 2), the chosen one first, by the model that
            learns and by the one that it began as. An answer's margin is their difference.
        beta: the smaller, the farther the model may go away from the reference.

    Rafailov et al., 2023, equation 7.
    """
    chosen, rejected = (logprobs - reference).unbind(dim=1)
    return -F.logsigmoid(beta * (chosen - rejected))


def ipo_loss(logprobs: Tensor, reference: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """Return (difference of the margins per token - 1 / 2β)², (B,): enough is enough.

    The arguments are those of `dpo_loss`, and the answers' lengths in tokens (B, 2). Azar et al., A
    General Theoretical Paradigm to Understand Learning from Human Preferences, 2023, equation 17.
    """
    chosen, rejected = ((logprobs - reference) / lengths).unbind(dim=1)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def pair_logprobs(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Return log p of the answers of pairs (B, 2, T), as (B, 2)."""
    return token_logprobs(model, ids.flatten(0, 1), mask.flatten(0, 1)).sum(dim=1).view(-1, 2)


def preference_loss(beta: float, sft_coef: float = 0.0) -> Callable:
    """Return DPO's loss for `train`, whose batches are ids, mask and the reference's log p.

    Args:
        beta: as in `dpo_loss`.
        sft_coef: weight of SFT's loss, the mean of -log p over the tokens of the chosen answers.
            It keeps them from becoming less likely. Pang et al., Iterative Reasoning Preference
            Optimization, 2024, equation 1.
    """

    def loss(model, ids, mask, reference):
        logprobs = pair_logprobs(model, ids, mask)
        losses = dpo_loss(logprobs, reference, beta)
        told = -logprobs[:, 0].sum() / mask[:, 0].sum()
        return losses.sum() + sft_coef * told * len(losses), len(losses)

    return loss


@torch.no_grad()
def with_reference(
    model: nn.Module, pairs: Sequence[tuple[Example, Example]], batch_size: int = 16
) -> list[tuple[tuple[Example, Example], list[float]]]:
    """Return each pair with log p of its answers by the reference, which never changes."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0].ids))
    done = [None] * len(pairs)
    with evaluating(model):
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            found = pair_logprobs(model, *pair_batch([pairs[i] for i in batch])).tolist()
            for i, logprobs in zip(batch, found, strict=True):
                done[i] = (pairs[i], logprobs)
    return done


def preference_batch(items: Sequence) -> tuple[Tensor, Tensor, Tensor]:
    """Return items of `with_reference` as ids (B, 2, T), mask (B, 2, T) and log p (B, 2)."""
    pairs, reference = zip(*items, strict=True)
    return *pair_batch(pairs), torch.tensor(reference)
