"""Chapter 7 at length: SFT, reward models, best-of-n, PPO and DPO, with three seeds each.

Run `python tests/bench/alignment.py` (some hours), or name parts: sft, reward, best, ppo, dpo. What
is in the tables already is not made again. All that comes after SFT begins with its model of seed
0, `data/models/story-sft`. The tables, in `data/models`: `alignment.csv`, `reward.csv`,
`ppo_leash.csv` and `ppo_free.csv`; and what was written, `alignment.json`.
"""

import json
import math
import sys
import time
from itertools import islice

import numpy as np
import pandas as pd
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from support.align import preference_batch, preference_loss, with_reference
from support.data import DATA, write_atomic
from support.house import WORK, prepare
from support.instruct import Batches, follow, prompt_ids, respond, to_row, with_targets
from support.ppo import PPOConfig, ppo, token_logprobs
from support.pretrained import export, load
from support.reward import RewardModel, pair_batch, reward_loss
from support.shards import Shards, Windows
from support.tasks import judge, pairs, requests
from support.train import TrainConfig, evaluate, train

SEEDS = (0, 1, 2)
MODELS = DATA / "models"
RUNS = DATA / "cache" / "alignment"  # the weights of the runs
WRITTEN = MODELS / "alignment.json"
N_REQUESTS, N_PAIRS, N_ENDINGS, BEST_OF = 320, 400, 200, (2, 4, 8, 16)
KL_COEFS, KL_MAIN, BETAS = (0.0, 0.05, 0.2, 0.8), 0.2, (0.03, 0.1, 0.3, 1.0)
SFT = {"examples": 16_000, "config": {"batch_size": 16, "lr": 1e-3, "warmup": 50}}
REWARD = {"pairs": 3_000, "config": {"batch_size": 8, "lr": 3e-4, "warmup": 20}}
DPO = {"pairs": 800, "config": {"batch_size": 8, "lr": 1e-4, "warmup": 10}}
PPO = {"steps": 30, "batch_size": 32, "minibatch": 8, "lr": 1e-4}

TOKENIZER = prepare()
STOP_ID = TOKENIZER.special_tokens["<|im_end|>"]
CONTEXT = 384


# ---- what is measured ---------------------------------------------------------------------------


def story_loss(model) -> float:
    """Return the loss of a token in stories that no model has seen."""
    end_id = TOKENIZER.special_tokens["<|endoftext|>"]
    windows = Windows(Shards(WORK / "validation"), CONTEXT, 8, end_id=end_id)
    return evaluate(model, [windows(i) for i in range(10)])


def follows(model) -> float:
    """Return the share of all kinds of requests that a model follows, greedily."""
    asked = list(islice(requests(22, "test"), N_REQUESTS))
    return follow(model, TOKENIZER, asked, temperature=0)[0]["mean"]


def distinct(texts: list[str], n: int = 3) -> float:
    words = [text.split() for text in texts]
    runs = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(runs)) / len(runs)


ASKED = list(islice(requests(21, "test", ["continue"]), N_ENDINGS))


def write(policy, seed: int) -> list[tuple[str, bool]]:
    """Return an ending of each test story, sampled at temperature 1, and whether it ended."""
    draws, prompts = torch.Generator().manual_seed(100 + seed), [r.prompt for r in ASKED]
    return respond(policy, TOKENIZER, prompts, 120, generator=draws)


@torch.no_grad()
def of_endings(said, policy, reference, reward_model) -> tuple[dict, dict]:
    """Return what is true of endings, and the endings, for the two tables."""
    found = [
        judge(text, request.story.facts) if ended else "neither"
        for (text, ended), request in zip(said, ASKED, strict=True)
    ]
    texts, scores, gone = [text for text, _ in said], [], []
    rows = [to_row(TOKENIZER, r.prompt, t or ".") for r, t in zip(ASKED, texts, strict=True)]
    for i in range(0, len(rows), 20):
        ids, mask = pair_batch([(row, row) for row in rows[i : i + 20]])
        ids, mask = ids[:, 0], mask[:, 0]
        far = token_logprobs(policy, ids, mask) - token_logprobs(reference, ids, mask)
        gone += far.sum(dim=1).tolist()
        scores += reward_model.score(ids, mask).tolist()
    shares = {kind: found.count(kind) / len(found) for kind in ("happy", "sad", "neither")}
    measures = {
        "score": np.mean(scores),
        "kl": np.mean(gone),
        "length": np.mean([len(text.split()) for text in texts]),
        "distinct": distinct(texts),
    }
    return shares | measures, {"verdicts": found, "texts": texts[:12]}


def record(method: str, setting: float, seed: int, make) -> None:
    """Add a run to the table, if it is not there; `make` returns its numbers and what it wrote."""
    path = MODELS / "alignment.csv"
    table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["method"])
    if (
        len(table)
        and ((table.method == method) & (table.setting == setting) & (table.seed == seed)).any()
    ):
        return
    numbers, written = make()
    row = {"method": method, "setting": setting, "seed": seed} | numbers
    print({k: v if isinstance(v, str) else round(float(v), 3) for k, v in row.items()}, flush=True)
    table = pd.concat([table, pd.DataFrame([row])]) if len(table) else pd.DataFrame([row])
    write_atomic(path, table.round(5).to_csv(index=False).encode())
    if written and seed == 0:
        remember("runs", {f"{method} {setting:g}": written})


def remember(name: str, new: dict) -> None:
    kept = json.loads(WRITTEN.read_text()) if WRITTEN.exists() else {}
    kept[name] = kept.get(name, {}) | new
    write_atomic(WRITTEN, json.dumps(kept, indent=1).encode())


def whole(policy, seed: int) -> tuple[dict, dict]:
    """Return all that is measured of a policy."""
    numbers, written = of_endings(write(policy, seed), policy, sft(), reward_model(seed))
    return numbers | {"follows": follows(policy), "story_loss": story_loss(policy)}, written


def of_sft(seed: int) -> tuple[dict, dict]:
    """Return what each SFT run can do, and what the endings of the first are like."""
    numbers, written = of_endings(write(sft(), seed), sft(), sft(), reward_model(seed))
    return numbers | {"follows": follows(sft(seed)), "story_loss": story_loss(sft(seed))}, written


# ---- the methods --------------------------------------------------------------------------------


def trained(name: str, make, model):
    """Return a model with the weights of a run, which is made if it is not there."""
    path = RUNS / f"{name}.pt"
    if not path.exists():
        started = time.perf_counter()
        made = make()
        RUNS.mkdir(parents=True, exist_ok=True)
        torch.save(made.state_dict(), path)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def rows_of(found, n: int):
    rows = [to_row(TOKENIZER, request.prompt, request.answer) for request in islice(found, n)]
    return [row for row in rows if len(row.ids) <= CONTEXT]


def sft(seed: int = 0):
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
        model = RewardModel(sft())
        data = some_pairs(REWARD["pairs"], seed, dreams=0.5)
        batches = Batches(data, 8, pair_batch, pair_length, seed)
        config = TrainConfig(steps=len(data) // 8, seed=seed, **REWARD["config"])
        train(model, batches, config, loss=reward_loss)
        return model

    return trained(f"reward-{seed}", make, RewardModel(load("story")[0]))


def by_dpo(seed: int, beta: float):
    def make():
        model = sft()
        items = with_reference(model, some_pairs(DPO["pairs"], seed))
        batches = Batches(items, 8, preference_batch, lambda item: pair_length(item[0]), seed)
        config = TrainConfig(steps=len(items) // 8, seed=seed, **DPO["config"])
        train(model, batches, config, loss=preference_loss(beta))
        return model

    return trained(f"dpo-{beta}-{seed}", make, load("story")[0])


def by_ppo(seed: int, kl_coef: float):
    def make():
        policy, judge_model, values = sft(), reward_model(seed), reward_model(seed)
        values.body.requires_grad_(False)  # of the value model only the head learns
        values.body.head.requires_grad_(True)
        asked = islice(requests(seed, "train", ["continue"]), PPO["steps"] * PPO["batch_size"])
        prompts = [prompt_ids(TOKENIZER, request.prompt) for request in asked]
        config = PPOConfig(kl_coef=kl_coef, seed=seed, **PPO)
        batches = Batches(prompts, config.batch_size, list, len, seed)
        log = ppo(policy, sft(), judge_model, values, batches, STOP_ID, config, print)
        log.to_csv(RUNS / f"ppo-{kl_coef}-{seed}.csv", index=False)
        return policy

    return trained(f"ppo-{kl_coef}-{seed}", make, load("story")[0])


def bag_of_words(train_pairs, tests: dict) -> dict[str, float]:
    """Return the accuracy of logistic regression on word counts, by name of the test."""
    texts = [text for pair in train_pairs for text in (pair.chosen, pair.rejected)]
    counter = CountVectorizer().fit(texts)

    def differences(some):
        chosen, rejected = ([getattr(p, side) for p in some] for side in ("chosen", "rejected"))
        return counter.transform(chosen) - counter.transform(rejected)

    x = differences(train_pairs).toarray()
    bag = LogisticRegression(fit_intercept=False, C=0.1, max_iter=1000)
    bag.fit(np.concatenate([x, -x]), [1] * len(x) + [0] * len(x))
    margins = {name: bag.decision_function(differences(some)) for name, some in tests.items()}
    return {f"bag_{name}": accuracy(found.round(6)) for name, found in margins.items()}


def accuracy(margins) -> float:
    return float((np.asarray(margins) > 0).mean() + 0.5 * (np.asarray(margins) == 0).mean())


@torch.no_grad()
def margins_of(model: RewardModel, some) -> list[float]:
    found = []
    for i in range(0, len(some), 10):
        ids, mask = (x.flatten(0, 1) for x in pair_batch([to_rows(p) for p in some[i : i + 10]]))
        found += (model.score(ids, mask).view(-1, 2) @ torch.tensor([1.0, -1.0])).tolist()
    return found


# ---- the parts ----------------------------------------------------------------------------------


def part_sft() -> None:
    base, _ = load("story")
    record("base", 0, 0, lambda: ({"follows": follows(base), "story_loss": story_loss(base)}, {}))
    for seed in SEEDS:
        sft(seed)
    export(sft(0).half(), TOKENIZER, MODELS / "story-sft")


def part_reward() -> None:
    tests = {
        name: [p for p in islice(pairs(30 + i, "test", dreams=i), 2 * N_PAIRS) if to_rows(p)][
            :N_PAIRS
        ]
        for i, name in enumerate(("plain", "dreams"))
    }
    table = []
    for seed in SEEDS:
        margins = {name: margins_of(reward_model(seed), some) for name, some in tests.items()}
        clean = np.array(margins["plain"]) * [-1 if p.mistaken else 1 for p in tests["plain"]]
        row = {"seed": seed} | {name: accuracy(found) for name, found in margins.items()}
        row |= {"plain_clean": accuracy(clean)}
        learned = islice(pairs(seed, dreams=0.5), REWARD["pairs"])
        table.append(row | bag_of_words(list(learned), tests))
        print(table[-1], flush=True)
        if seed == 0:
            remember("calibration", {"margins": [round(m, 4) for m in margins["plain"]]})
    write_atomic(MODELS / "reward.csv", pd.DataFrame(table).round(4).to_csv(index=False).encode())


def part_best() -> None:
    for seed in SEEDS:
        record("sft", 0, seed, lambda seed=seed: of_sft(seed))
        done = pd.read_csv(MODELS / "alignment.csv")
        if len(done[(done.method == "best") & (done.seed == seed)]) == len(BEST_OF):
            continue
        model, judge_model = sft(), reward_model(seed)
        said = [write(model, 1000 * seed + i) for i in range(max(BEST_OF))]
        scores = np.array([scores_of(judge_model, some) for some in said])  # (n, prompts)
        plain = done[(done.method == "sft") & (done.seed == 0)].iloc[0]
        for n in BEST_OF:
            best = [said[i][j] for j, i in enumerate(scores[:n].argmax(axis=0))]

            def numbers(best=best, n=n, model=model, judge_model=judge_model, plain=plain):
                found, written = of_endings(best, model, model, judge_model)
                kept = {"follows": plain.follows, "story_loss": plain.story_loss}
                # The distance of the best of n has this bound: Stiennon et al., 2020, appendix G.3.
                return found | kept | {"kl": math.log(n) - (n - 1) / n}, written

            record("best", n, seed, numbers)


@torch.no_grad()
def scores_of(judge_model: RewardModel, said) -> list[float]:
    rows = [to_row(TOKENIZER, r.prompt, t or ".") for r, (t, _) in zip(ASKED, said, strict=True)]
    found = []
    for i in range(0, len(rows), 20):
        ids, mask = pair_batch([(row, row) for row in rows[i : i + 20]])
        found += judge_model.score(ids[:, 0], mask[:, 0]).tolist()
    return [s - (0.0 if ended else 1.0) for s, (_, ended) in zip(found, said, strict=True)]


def part_ppo() -> None:
    for seed in SEEDS:
        for kl_coef in KL_COEFS:
            record("ppo", kl_coef, seed, lambda s=seed, k=kl_coef: whole(by_ppo(s, k), s))
    for name, kl_coef in (("leash", KL_MAIN), ("free", 0.0)):
        log = pd.read_csv(RUNS / f"ppo-{kl_coef}-0.csv")
        write_atomic(MODELS / f"ppo_{name}.csv", log.round(4).to_csv(index=False).encode())


def part_dpo() -> None:
    for seed in SEEDS:
        for beta in BETAS:
            record("dpo", beta, seed, lambda s=seed, b=beta: whole(by_dpo(s, b), s))


PARTS = {
    "sft": part_sft,
    "reward": part_reward,
    "best": part_best,
    "ppo": part_ppo,
    "dpo": part_dpo,
}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
