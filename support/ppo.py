"""PPO: a policy writes, a reward model judges, a reference holds back, a value model expects.

Shapes: B answers of T tokens, prompt included; `mask` (B, T) is True on the tokens of the answer.
What is known of each token after the first, such as its log-probability, has the shape (B, T - 1),
and so has the `mask` that goes with it. Ouyang et al., Training Language Models to Follow
Instructions with Human Feedback, 2022, section 3.5.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.generate import evaluating, generate
from support.instruct import Example, pad_examples
from support.reward import RewardModel, last
from support.widgets import progress


def token_logprobs(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Return log p of each token of the answers after those before it, (B, T - 1); 0 elsewhere."""
    asked = mask[:, 1:]
    vectors = model.hidden(ids[:, :-1])[asked]  # (N, C): only these go through the large head
    found = -F.cross_entropy(model.head(vectors), ids[:, 1:][asked], reduction="none")  # (N,)
    return torch.zeros(asked.shape, device=ids.device).masked_scatter(asked, found)


def penalized(scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, kl_coef: float):
    """Return each token's reward, (B, T - 1): a penalty, and at the last token the answer's score.

    The penalty is kl_coef · (log p - log p of the reference). Ouyang et al., 2022, equation 2.
    """
    rewards = -kl_coef * (logprobs - reference) * mask
    return rewards.scatter_add(1, last(mask)[:, None], scores[:, None])


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> Tensor:
    """Return each token's advantage, (B, T - 1): how much better than expected it turned out.

    From the end: A = δ + γλ A of the next token, with δ = reward + γ value of the next - value.
    Schulman et al., High-Dimensional Continuous Control Using GAE, 2016, equation 16.
    """
    values = values * mask
    advantages, following, next_value = [], 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        surprise = rewards[:, t] * mask[:, t] + gamma * next_value - values[:, t]
        following = (surprise + gamma * lam * following) * mask[:, t]
        next_value = values[:, t]
        advantages.append(following)
    return torch.stack(advantages[::-1], dim=1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of x where mask is True."""
    return (x * mask).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Return x with mean 0 and variance 1 over what mask marks, and 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = ((x - mean) ** 2 * mask).sum() / (mask.sum() - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def policy_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2
) -> Tensor:
    """Return the mean of -min(ratio · A, clipped ratio · A), ratio = p / p when it was written.

    Schulman et al., Proximal Policy Optimization Algorithms, 2017, equation 7.
    """
    ratio = (logprobs - old).exp()
    worse = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return masked_mean(worse, mask)


def value_loss(
    values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2
) -> Tensor:
    """Return half the mean squared error of the values, which count as at most `clip` from old."""
    clipped = old + (values - old).clamp(-clip, clip)
    worse = torch.max((values - returns) ** 2, (clipped - returns) ** 2)
    return masked_mean(worse, mask) / 2


def guess_loss(value_model, ids: Tensor, mask: Tensor, scores: Tensor) -> tuple[Tensor, int]:
    """Return the squared errors of guesses of scores, summed over tokens, and how many those are.

    A `loss` for `train`: what a value model can learn before there is a policy. scores: (B,).
    """
    asked = mask[:, 1:]
    errors = (value_model(ids)[:, :-1] - scores[:, None])[asked]
    return (errors**2).sum(), len(errors)


def adapted(kl_coef: float, kl: float, target: float, n: int, horizon: int) -> float:
    """Return the coefficient after n answers: larger if kl is above the target, else smaller.

    Ziegler et al., Fine-Tuning Language Models from Human Preferences, 2019, section 2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * n / horizon)


@dataclass
class PPOConfig:
    """How PPO learns.

    Args:
        steps: how often answers are written; batch_size of them each time.
        minibatch: answers for each change of the weights; all come `epochs` times.
        lr, value_lr: of the policy and of the value model, after a short rise; then they fall to 0.
        kl_coef: what a nat of distance from the reference costs; 0 switches the penalty off.
        target_kl: nats an answer; kl_coef adapts to reach it. None keeps kl_coef.
        horizon: answers until kl_coef has followed.
        clip, value_clip, gamma, lam: as in `policy_loss`, `value_loss` and `gae`.
        max_new_tokens: the longest answer.
        unfinished: what an answer that does not end loses.
        sft_coef: weight of -log p of a token of right answers; see `examples` of `ppo`.
        seed: of the sampling.
    """

    steps: int
    batch_size: int = 32
    minibatch: int = 8
    epochs: int = 2
    lr: float = 1e-4
    value_lr: float = 1e-3
    kl_coef: float = 0.1
    target_kl: float | None = None
    horizon: int = 1000
    clip: float = 0.2
    value_clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    max_new_tokens: int = 110
    unfinished: float = 1.0
    sft_coef: float = 0.0
    seed: int = 0


@dataclass
class Rollouts:
    """Answers that the policy wrote, and what was thought of them then."""

    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T)
    logprobs: Tensor  # (B, T - 1), as all below
    reference: Tensor
    values: Tensor
    scores: Tensor  # (B,)
    ended: Tensor  # (B,)


@torch.no_grad()
def roll_out(policy, reference, reward_model, value_model, prompts, stop_id, config, generator):
    """Let the policy answer prompts (lists of ids), and ask the other three models about it."""
    rows = generate(policy, prompts, config.max_new_tokens, stop_id=stop_id, generator=generator)
    parts = [
        Example(row, [i >= len(prompt) for i in range(len(row))])
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    ids, mask = (x.to(next(policy.parameters()).device) for x in pad_examples(parts))
    ended = torch.tensor([row[-1] == stop_id for row in rows], device=ids.device)
    return Rollouts(
        ids,
        mask,
        token_logprobs(policy, ids, mask),
        token_logprobs(reference, ids, mask),
        value_model(ids)[:, :-1],  # before a token is written, its value is expected
        reward_model.score(ids, mask) - config.unfinished * ~ended,
        ended,
    )


def weigh(rolled: Rollouts, kl_coef: float, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """Return each token's whitened advantage, and what the value model should have said of it."""
    answer = rolled.mask[:, 1:]
    rewards = penalized(rolled.scores, rolled.logprobs, rolled.reference, answer, kl_coef)
    advantages = gae(rewards, rolled.values, answer, config.gamma, config.lam)
    return whiten(advantages, answer), advantages + rolled.values


def ppo_step(policy, value_model, optimizer, rolled: Rollouts, weighed, rows, shown, config):
    """Let policy and value model learn from some rows; return the ratios of their tokens, (N,)."""
    ids, mask, old = rolled.ids[rows], rolled.mask[rows], rolled.logprobs[rows]
    advantages, returns = (tensor[rows] for tensor in weighed)
    answer = mask[:, 1:]
    logprobs, values = token_logprobs(policy, ids, mask), value_model(ids)[:, :-1]
    loss = policy_loss(logprobs, old, advantages, answer, config.clip)
    loss = loss + value_loss(values, rolled.values[rows], returns, answer, config.value_clip)
    if shown:
        told = masked_mean(token_logprobs(policy, *shown), shown[1][:, 1:])
        loss = loss - config.sft_coef * told
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:  # the two models share no weights
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    return (logprobs - old).detach().exp()[answer]


def ppo(
    policy: nn.Module,
    reference: nn.Module,
    reward_model: RewardModel,
    value_model: RewardModel,
    prompts: Callable[[int], list[list[int]]],
    stop_id: int,
    config: PPOConfig,
    examples: Callable[[int], tuple[Tensor, Tensor]] | None = None,
    on_step: Callable[[dict], None] | None = None,
) -> pd.DataFrame:
    """Let `policy` learn, where it is, to write what `reward_model` likes; return the log.

    Args:
        reference: what the policy must not go too far away from; usually what it began as.
        value_model: learns what to expect; usually begins as a copy of the reward model.
        prompts: step, from 0 → batch_size prompts.
        stop_id: ends an answer.
        examples: change of the weights, from 0 → ids and mask of right answers. With
            config.sft_coef they keep the policy from forgetting how to write (PPO-ptx: Ouyang et
            al., 2022, equation 2).
        on_step: gets each row of the log.
    """
    rates = (policy, config.lr), (value_model, config.value_lr)
    groups = [{"params": learned(model), "lr": lr} for model, lr in rates]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    rise = config.steps // 10
    paced = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (rise + 1), 1) * (1 - step / config.steps)
    )
    draws, changes = torch.Generator().manual_seed(config.seed), count()
    models, kl_coef, log = (policy, reference, reward_model, value_model), config.kl_coef, []
    with evaluating(policy), evaluating(value_model):  # dropout would change the ratios
        for step in progress(range(config.steps), "PPO"):
            rolled = roll_out(*models, prompts(step), stop_id, config, draws)
            weighed, ratios = weigh(rolled, kl_coef, config), []
            for _ in range(config.epochs):
                for rows in torch.randperm(len(rolled.ids), generator=draws).split(
                    config.minibatch
                ):
                    shown = examples(next(changes)) if examples else None
                    state = policy, value_model, optimizer, rolled, weighed
                    ratios.append(ppo_step(*state, rows, shown, config))
            paced.step()
            log.append({"step": step + 1, "kl_coef": kl_coef} | summary(rolled, ratios, config))
            if on_step:
                on_step(log[-1])
            if config.target_kl:
                n = len(rolled.ids)
                kl_coef = adapted(kl_coef, log[-1]["kl"], config.target_kl, n, config.horizon)
    return pd.DataFrame(log)


def only_top(model: nn.Module, blocks: int) -> nn.Module:
    """Let only the last blocks of a model and its last norm learn; return the model.

    Few answers say little about the lower blocks: their gradients are mostly noise.
    """
    model.requires_grad_(False)
    for part in (*model.blocks[len(model.blocks) - blocks :], model.ln):
        part.requires_grad_(True)
    return model


def learned(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def summary(rolled: Rollouts, ratios: list[Tensor], config: PPOConfig) -> dict[str, float]:
    """Return what the log says of a step: means over answers, the entropy over tokens."""
    answer = rolled.mask[:, 1:]
    gone = (rolled.logprobs - rolled.reference) * answer
    found = {
        "score": rolled.scores.mean(),
        "kl": gone.sum(dim=1).mean(),  # nats an answer
        "entropy": -masked_mean(rolled.logprobs, answer),  # nats a token
        "length": answer.sum(dim=1).float().mean(),  # tokens
        "ended": rolled.ended.float().mean(),
        "clipped": ((torch.cat(ratios) - 1).abs() > config.clip).float().mean(),
        "first_ratio_error": (ratios[0] - 1).abs().max(),
    }
    return {name: value.item() for name, value in found.items()}
