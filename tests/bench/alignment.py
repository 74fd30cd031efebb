"""Chapter 7 at length: SFT, reward models, PPO, DPO and best-of-n, with three seeds each.

Run `python tests/bench/alignment.py`, or name parts: sft, reward, ppo, dpo, best. A run that is in
the table already is not made again. Writes `data/models/story-sft` (the SFT model of seed 0),
`data/models/alignment.csv` (a row for each run) and `data/models/alignment.json` (what was written).
"""

import json
import random
import sys
import time
from collections import Counter
from itertools import islice

import pandas as pd
import torch

from support.align import preference_batch, preference_loss, with_reference
from support.data import DATA, write_atomic
from support.house import WORK, prepare
from support.instruct import Batches, follow, prompt_ids, respond, to_row, with_targets
from support.ppo import PPOConfig, ppo, token_logprobs
from support.pretrained import export, load
from support.reward import RewardModel, pair_batch, reward_loss
from support.shards import Shards, Windows
from support.tasks import judge, pairs, passes, requests
from support.train import TrainConfig, evaluate, train

SEEDS = (0, 1, 2)
RUNS = DATA / "cache" / "alignment"  # the weights of the runs
TABLE, WRITTEN = DATA / "models" / "alignment.csv", DATA / "models" / "alignment.json"
N_REQUESTS, N_PAIRS, N_ENDINGS, BEST_OF = 320, 400, 200, (2, 4, 8, 16)
KL_COEFS, BETAS = (0.0, 0.05, 0.2, 0.8), (0.03, 0.1, 0.3, 1.0)
SFT = {"examples": 16_000, "config": {"batch_size": 16, "lr": 1e-3, "warmup": 50}}
REWARD = {"pairs": 3_000, "config": {"batch_size": 8, "lr": 3e-4, "warmup": 20}}
DPO = {"pairs": 800, "config": {"batch_size": 8, "lr": 1e-4, "warmup": 10}}
PPO = {"steps": 30, "batch_size": 32, "minibatch": 8, "lr": 1e-4}

TOKENIZER = prepare()
STOP_ID = TOKENIZER.special_tokens["<|im_end|>"]
CONTEXT = 384


# ---- what is measured ---------------------------------------------------------------------------


def perplexity(model) -> float:
    """Return the loss of a token in stories that no model has seen."""
    windows = Windows(Shards(WORK / "validation"), CONTEXT, 8, end_id=end_of_text())
    return evaluate(model, [windows(i) for i in range(10)])


def end_of_text() -> int:
    return TOKENIZER.special_tokens["<|endoftext|>"]


def asked_endings():
    return list(islice(requests(21, "test", ["continue"]), N_ENDINGS))


def distinct(texts: list[str], n: int = 3) -> float:
    words = [text.split() for text in texts]
    runs = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(runs)) / len(runs)


@torch.no_grad()
def measure(policy, reference, reward_model, seed: int = 0) -> tuple[dict, dict]:
    """Return what a policy's endings are like, what else it can still do, and some of its endings.

    Endings are sampled at temperature 1, as they were in training; all else is greedy.
    """
    asked, draws = asked_endings(), torch.Generator().manual_seed(100 + seed)
    said = respond(policy, TOKENIZER, [r.prompt for r in asked], 130, generator=draws)
    found = judged(said, asked)
    rows = [
        to_row(TOKENIZER, r.prompt, text or ".") for r, (text, _) in zip(asked, said, strict=True)
    ]
    scores, gone = [], []
    for i in range(0, len(rows), 20):
        ids, mask = pair_batch([(row, row) for row in rows[i : i + 20]])
        ids, mask = ids[:, 0], mask[:, 0]
        far = token_logprobs(policy, ids, mask) - token_logprobs(reference, ids, mask)
        gone += far.sum(dim=1).tolist()
        scores += reward_model.score(ids, mask).tolist()
    follows = follow(
        policy, TOKENIZER, list(islice(requests(22, "test"), N_REQUESTS)), temperature=0
    )
    result = {kind: found.count(kind) / len(found) for kind in ("happy", "sad", "neither")}
    result |= {
        "score": sum(scores) / len(scores),
        "kl": sum(gone) / len(gone),
        "length": sum(len(text.split()) for text, _ in said) / len(said),
        "distinct": distinct([text for text, _ in said]),
        "follows": follows[0]["mean"],
        "story_loss": perplexity(policy),
    }
    return result, {"verdicts": found, "texts": [text for text, _ in said[:12]]}


def judged(said, asked) -> list[str]:
    return [
        judge(text, request.story.facts) if ended else "neither"
        for (text, ended), request in zip(said, asked, strict=True)
    ]


# ---- the methods --------------------------------------------------------------------------------


def trained(name: str, make, model=None):
    """Return a model with the weights of a run, which is made if it is not there."""
    path = RUNS / f"{name}.pt"
    if not path.exists():
        started = time.perf_counter()
        model = make()
        RUNS.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        return model.eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def rows_of(found, n: int):
    rows = [to_row(TOKENIZER, request.prompt, request.answer) for request in islice(found, n)]
    return [row for row in rows if len(row.ids) <= CONTEXT]


def sft(seed: int):
    def make():
        model, _ = load("story")
        rows = rows_of(requests(seed), SFT["examples"])
        config = TrainConfig(steps=len(rows) // 16, seed=seed, **SFT["config"])
        val = rows_of(requests(7, "validation"), 128)
        evaluations = [with_targets(val[i : i + 16]) for i in range(0, 128, 16)]
        log = train(model, Batches(rows, 16, seed=seed), config, evaluations=evaluations)
        print(log.dropna(subset="val_loss").tail(1)[["step", "loss", "val_loss"]])
        return model

    return trained(f"sft-{seed}", make, load("story")[0])


def to_rows(pair):
    rows = tuple(to_row(TOKENIZER, pair.prompt, text) for text in (pair.chosen, pair.rejected))
    return rows if max(len(row.ids) for row in rows) <= CONTEXT else None


def pair_length(pair) -> int:
    return max(len(row.ids) for row in pair)


def some_pairs(n: int, seed: int, split: str = "train", **options):
    fitting = (rows for pair in pairs(seed, split, **options) if (rows := to_rows(pair)))
    return list(islice(fitting, n))


def reward_model(seed: int) -> RewardModel:
    def make():
        model = RewardModel(sft(seed))
        data = some_pairs(REWARD["pairs"], seed, dreams=0.5)
        batches = Batches(data, 8, pair_batch, pair_length, seed)
        config = TrainConfig(steps=len(data) // 8, seed=seed, **REWARD["config"])
        train(model, batches, config, loss=reward_loss)
        return model

    return trained(f"reward-{seed}", make, RewardModel(load("story")[0]))


def by_dpo(seed: int, beta: float):
    def make():
        model = sft(seed)
        items = with_reference(model, some_pairs(DPO["pairs"], seed))
        batches = Batches(items, 8, preference_batch, lambda item: pair_length(item[0]), seed)
        config = TrainConfig(steps=len(items) // 8, seed=seed, **DPO["config"])
        train(model, batches, config, loss=preference_loss(beta))
        return model

    return trained(f"dpo-{beta}-{seed}", make, load("story")[0])


def by_ppo(seed: int, kl_coef: float):
    def make():
        policy, judge_model, values = sft(seed), reward_model(seed), reward_model(seed)
        asked = islice(requests(seed, "train", ["continue"]), PPO["steps"] * PPO["batch_size"])
        prompts = [prompt_ids(TOKENIZER, request.prompt) for request in asked]
        config = PPOConfig(kl_coef=kl_coef, seed=seed, **PPO)
        batches = Batches(prompts, config.batch_size, list, len, seed)
        log = ppo(policy, sft(seed), judge_model, values, batches, STOP_ID, config, print)
        log.to_csv(RUNS / f"ppo-{kl_coef}-{seed}.csv", index=False)
        return policy

    return trained(f"ppo-{kl_coef}-{seed}", make, load("story")[0])
