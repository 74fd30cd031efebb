"""Chapter 7 at length: reward models, best-of-n, PPO and DPO, at several settings and seeds.

Run `python tests/bench/alignment.py`, about four and a half hours on one core. What is in the
tables is not made again, and the weights of the runs lie in `data/cache/alignment`: delete both to
begin anew. To use two cores, run it with `ppo free` and, in another window, with `dpo`; at last
with neither.

All runs begin with the shipped `story-sft`, so the seeds differ in everything but that. The tables,
in `data/models`: `alignment.csv`, `reward.csv`, `agreement.csv`, `ppo_leash.csv` and
`ppo_free.csv`; and what was written, `alignment.json`.
"""

import copy
import json
import math
import sys
import time
from functools import cache
from itertools import islice

import numpy as np
import pandas as pd
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from support.align import preference_batch, preference_loss, with_reference
from support.data import DATA, write_atomic
from support.house_sft import examples
from support.instruct import (
    Batches,
    Example,
    follow,
    pad_examples,
    prompt_ids,
    respond,
    to_row,
    with_targets,
)
from support.ppo import PPOConfig, guess_loss, only_top, ppo, roll_out, token_logprobs, weigh
from support.pretrained import load
from support.reward import RewardModel, pair_batch, reward_loss
from support.storyworld import stories
from support.tasks import judge, pairs, requests
from support.train import TrainConfig, evaluate, train

SEEDS = (0, 1, 2)
RUNS_OF = {  # method, setting: its seeds. "free" is PPO without a penalty and without SFT's loss
    "ppo": {0.1: SEEDS, 0.5: SEEDS},
    "free": {0.0: (0,)},
    "dpo": {0.1: SEEDS, 0.3: SEEDS, 1.0: SEEDS},
}
KL_MAIN = 0.1
BEST_OF = (2, 4)
N_REQUESTS, N_ENDINGS, N_TEST_PAIRS = 200, 100, 150
REWARD = {"pairs": 1120, "lr": 1e-3, "warmup": 5}
TOLD = ("write", "ending")  # tasks of SFT's examples beside PPO; half of "continue" ends badly
DPO_TASKS = ("continue", "continue", "ending")
VALUE = {"pairs": 560, "lr": 1e-3, "warmup": 3}
DPO = {"pairs": 2160, "lr": 6e-4, "warmup": 5}
PPO = {"steps": 40, "batch_size": 48, "minibatch": 16, "lr": 1e-3, "value_lr": 3e-4, "lam": 0.85}
TOP = {"ppo": 3, "free": 3, "dpo": 5}  # blocks that learn
SFT_COEF = {"ppo": 1.0, "free": 0.0, "dpo": 10.0}

MODELS, RUNS = DATA / "models", DATA / "cache" / "alignment"
SFT, TOKENIZER = load("story-sft")
STOP_ID, CONTEXT = TOKENIZER.special_tokens["<|im_end|>"], SFT.config.context_length
ASKED = list(islice(requests(21, "test", ["continue"]), N_ENDINGS))


# ---- what is measured ---------------------------------------------------------------------------


@cache
def story_loss(model) -> float:
    """Return the loss of a token within stories that no model has seen."""
    told = (TOKENIZER.encode(story.text) for story in islice(stories(0, "validation"), 120))
    rows = sorted((Example(ids, [True] * len(ids)) for ids in told), key=lambda row: len(row.ids))
    return evaluate(model, [with_targets(rows[i : i + 8]) for i in range(0, len(rows), 8)])


@cache
def follows(model) -> dict:
    """Return the share of requests that a model follows, greedily: the mean, and of each task."""
    asked = list(islice(requests(22, "test"), N_REQUESTS))
    shares, _ = follow(model, TOKENIZER, asked, temperature=0)
    return {"follows": shares.pop("mean")} | shares.to_dict()


def distinct(texts: list[str], n: int = 3) -> float:
    """Return the share of runs of n words that occur for the first time."""
    words = [text.split() for text in texts]
    runs = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(runs)) / max(len(runs), 1)


def write(policy, seed: int, temperature: float = 0.5) -> list[tuple[str, bool]]:
    """Return an ending of each test story, and whether it ended."""
    draws, prompts = torch.Generator().manual_seed(100 + seed), [r.prompt for r in ASKED]
    return respond(policy, TOKENIZER, prompts, 120, 50, temperature=temperature, generator=draws)


def said_rows(said) -> list:
    """Return the test requests with what was said to them, as rows."""
    return [to_row(TOKENIZER, r.prompt, t or ".") for r, (t, _) in zip(ASKED, said, strict=True)]


@torch.no_grad()
def in_parts(measure, rows) -> np.ndarray:
    """Return what measure(ids, mask) says of each row, (n,)."""
    parts = [measure(*pad_examples(rows[i : i + 20])) for i in range(0, len(rows), 20)]
    return torch.cat(parts).numpy()


def scores_of(said, judge_model) -> np.ndarray:
    """Return the score of each ending, as PPO sees it, (n,)."""
    unfinished = np.array([not ended for _, ended in said])
    return in_parts(judge_model.score, said_rows(said)) - PPOConfig(1).unfinished * unfinished


def distance(said, policy) -> float:
    """Return log p by the policy less that by SFT, the mean over the policy's own endings."""

    def gone(ids, mask):
        return (token_logprobs(policy, ids, mask) - token_logprobs(SFT, ids, mask)).sum(dim=1)

    return in_parts(gone, said_rows(said)).mean()


def verdicts(said) -> list[str]:
    return [
        judge(text, request.story.facts) if ended else "neither"
        for (text, ended), request in zip(said, ASKED, strict=True)
    ]


def of_endings(said, judge_model) -> tuple[dict, dict]:
    """Return what is true of endings, and the endings, for the two tables."""
    found, texts = verdicts(said), [text for text, _ in said]
    shares = {kind: found.count(kind) / len(found) for kind in ("happy", "sad", "neither")}
    measures = {
        "score": scores_of(said, judge_model).mean(),
        "length": np.mean([len(text.split()) for text in texts]),
        "distinct": distinct(texts),
    }
    return shares | measures, {"verdicts": found, "texts": texts[:12]}


def whole(policy, seed: int) -> tuple[dict, dict]:
    """Return all that is measured of a policy; its distance from SFT is that at temperature 1."""
    numbers, written = of_endings(write(policy, seed), reward_model(seed))
    at_1 = write(policy, seed, temperature=1.0)
    more = {
        "kl": distance(at_1, policy),
        "happy_at_1": verdicts(at_1).count("happy") / len(at_1),
        "story_loss": story_loss(policy),
    }
    return numbers | more | follows(policy), written


# ---- what is kept -------------------------------------------------------------------------------


def record(method: str, setting: float, seed: int, make) -> None:
    """Add a run to the table, if it is not there; `make` returns its numbers and what it wrote."""
    key, started, done = {"method": method, "setting": setting, "seed": seed}, time.time(), table()
    if len(done) and (done[list(key)] == pd.Series(key)).all(axis=1).any():
        return
    numbers, written = make()
    row = key | {name: round(float(number), 5) for name, number in numbers.items()}
    print(f"{time.time() - started:.0f} s", row, flush=True)
    rows = pd.concat([table(), pd.DataFrame([row])])  # read again: others may have written
    rows = rows.sort_values(list(key), kind="stable")
    write_atomic(MODELS / "alignment.csv", rows.to_csv(index=False).encode())
    if written and seed == 0:
        remember(f"{method} {setting:g}", written)


def table() -> pd.DataFrame:
    path = MODELS / "alignment.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame()


def remember(name: str, what) -> None:
    path = MODELS / "alignment.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    write_atomic(path, (json.dumps(kept | {name: what}, indent=1) + "\n").encode())


def trained(name: str, model, teach):
    """Return the model after `teach(model)`, which is done once: the weights are kept."""
    path = RUNS / f"{name}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    started = time.perf_counter()
    teach(model)
    RUNS.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    print(f"{name}: trained in {time.perf_counter() - started:.0f} s", flush=True)
    return model.eval()


# ---- the methods --------------------------------------------------------------------------------


def to_rows(pair):
    return tuple(to_row(TOKENIZER, pair.prompt, text) for text in (pair.chosen, pair.rejected))


def pair_length(rows) -> int:
    return max(len(row.ids) for row in rows)


def some_pairs(n: int, seed: int, split: str = "train", **options):
    """Return n pairs that fit into the context."""
    fitting = (p for p in pairs(seed, split, **options) if pair_length(to_rows(p)) <= CONTEXT)
    return list(islice(fitting, n))


def reward_model(seed: int) -> RewardModel:
    def teach(model):
        rows = [to_rows(pair) for pair in some_pairs(REWARD["pairs"], seed, dreams=0.5)]
        config = TrainConfig(len(rows) // 8, 8, REWARD["lr"], warmup=REWARD["warmup"], seed=seed)
        train(model, Batches(rows, 8, pair_batch, pair_length, seed), config, loss=reward_loss)

    return trained(f"reward-{seed}", RewardModel(SFT), teach)


def value_model(seed: int) -> RewardModel:
    """Return the reward model after it has learned to guess, at every token, its own score."""

    def teach(model):
        rows = [row for pair in some_pairs(VALUE["pairs"], seed) for row in to_rows(pair)]
        items = list(zip(rows, in_parts(model.score, rows).tolist(), strict=True))
        batches = Batches(items, 16, scored_batch, lambda item: len(item[0].ids), seed)
        config = TrainConfig(len(batches), 16, VALUE["lr"], warmup=VALUE["warmup"], seed=seed)
        train(model, batches, config, loss=guess_loss)

    return trained(f"value-{seed}", reward_model(seed), teach)


def scored_batch(items):
    rows, scores = zip(*items, strict=True)
    return *pad_examples(rows), torch.tensor(scores)


def by_dpo(method: str, beta: float, seed: int):
    def teach(model):
        rows = [to_rows(pair) for pair in some_pairs(DPO["pairs"], seed, tasks=DPO_TASKS)]
        items = with_reference(SFT, rows)
        batches = Batches(items, 16, preference_batch, lambda item: pair_length(item[0]), seed)
        config = TrainConfig(len(batches), 16, DPO["lr"], warmup=DPO["warmup"], seed=seed)
        train(model, batches, config, loss=preference_loss(beta, SFT_COEF[method]))

    return trained(f"{method}-{beta}-{seed}", only_top(copy.deepcopy(SFT), TOP[method]), teach)


def by_ppo(method: str, kl_coef: float, seed: int):
    def teach(policy):
        judge_model, values = reward_model(seed), value_model(seed)
        config = PPOConfig(kl_coef=kl_coef, sft_coef=SFT_COEF[method], seed=seed, **PPO)
        found = islice(requests(seed, "train", ["continue"]), config.steps * config.batch_size)
        prompts = [prompt_ids(TOKENIZER, request.prompt) for request in found]
        batches = Batches(prompts, config.batch_size, list, len, seed)
        told = None
        if config.sft_coef:
            rows = examples(TOKENIZER, 8 * 6 * config.steps, CONTEXT, 9 + seed, tasks=TOLD)
            told = Batches(rows, 8, pad_examples, seed=seed)
        log = ppo(policy, SFT, judge_model, values, batches, STOP_ID, config, told)
        RUNS.mkdir(parents=True, exist_ok=True)
        log.round(4).to_csv(RUNS / f"{method}-{kl_coef}-{seed}.csv", index=False)

    return trained(f"{method}-{kl_coef}-{seed}", only_top(copy.deepcopy(SFT), TOP[method]), teach)


# ---- the reward model against a bag of words ----------------------------------------------------


def accuracy(margins) -> float:
    """Return the share of pairs whose chosen answer has the higher score; a tie counts half."""
    margins = np.asarray(margins)
    return float(((margins > 0) + 0.5 * (margins == 0)).mean())


def bag_margins(train_pairs, tests: dict) -> dict[str, np.ndarray]:
    """Return the margins of logistic regression on word counts, by name of the test."""
    counter = CountVectorizer().fit([text for p in train_pairs for text in (p.chosen, p.rejected)])

    def differences(some):
        chosen, rejected = ([getattr(p, side) for p in some] for side in ("chosen", "rejected"))
        return (counter.transform(chosen) - counter.transform(rejected)).toarray()

    x = differences(train_pairs)
    bag = LogisticRegression(fit_intercept=False, C=0.1, max_iter=1000)
    bag.fit(np.concatenate([x, -x]), [1] * len(x) + [0] * len(x))
    return {name: bag.decision_function(differences(some)).round(6) for name, some in tests.items()}


def margins_of(model: RewardModel, some) -> np.ndarray:
    sides = zip(*map(to_rows, some), strict=True)
    chosen, rejected = (in_parts(model.score, side) for side in sides)
    return chosen - rejected


def compare_rewards() -> None:
    """Write `reward.csv`: accuracy on test stories' pairs, with their labels and with true ones."""
    tests = {
        name: some_pairs(N_TEST_PAIRS, 30 + i, "test", dreams=i)
        for i, name in enumerate(("plain", "dreams"))
    }
    truth = {name: np.array([1 - 2 * p.mistaken for p in some]) for name, some in tests.items()}
    rows = []
    for seed in SEEDS:
        margins = {name: margins_of(reward_model(seed), some) for name, some in tests.items()}
        found = bag_margins(some_pairs(REWARD["pairs"], seed, dreams=0.5), tests)
        margins |= {f"bag_{name}": margin for name, margin in found.items()}
        row = {"seed": seed}
        for name, margin in margins.items():
            row[name] = accuracy(margin)
            row[f"{name}_true"] = accuracy(margin * truth[name.removeprefix("bag_")])
        rows.append(row)
        print(row, flush=True)
        if seed == 0:
            remember("margins", margins["plain"].round(4).tolist())
    write_atomic(MODELS / "reward.csv", pd.DataFrame(rows).round(4).to_csv(index=False).encode())


def compare_gradients(batches: int = 5, n: int = 64) -> None:
    """Write `agreement.csv`: the mean cosine between PPO's gradients of different answers, by part.

    1 would be all signal, 0 all noise.
    """
    config, draws = PPOConfig(**PPO), torch.Generator().manual_seed(0)
    asked, found = requests(0, "train", ["continue"]), []
    for _ in range(batches):
        prompts = [prompt_ids(TOKENIZER, request.prompt) for request in islice(asked, n)]
        others = SFT, reward_model(0), value_model(0)
        rolled = roll_out(SFT, *others, prompts, STOP_ID, config, draws)
        advantages, _ = weigh(rolled, 0.0, config)
        policy = copy.deepcopy(SFT)
        for rows in torch.arange(n).split(16):
            ids, mask = rolled.ids[rows], rolled.mask[rows]
            logprobs = token_logprobs(policy, ids, mask)
            (logprobs * advantages[rows]).sum().backward()
        found.append({name: weight.grad.flatten() for name, weight in policy.named_parameters()})
    parts = {"all": ""} | {f"block {i + 1}": f"blocks.{i}." for i in range(len(SFT.blocks))}
    rows = []
    for part, beginning in (parts | {"the last norm": "ln."}).items():
        names = [name for name in found[0] if name.startswith(beginning)]
        gradients = [torch.cat([one[name] for name in names]) for one in found]
        directions = torch.stack([g / g.norm() for g in gradients])
        cosines = (directions @ directions.T)[torch.triu_indices(batches, batches, 1).unbind()]
        rows.append({"part": part, "weights": len(gradients[0]), "cosine": cosines.mean().item()})
        print(rows[-1], flush=True)
    write_atomic(MODELS / "agreement.csv", pd.DataFrame(rows).round(4).to_csv(index=False).encode())


# ---- all of it ----------------------------------------------------------------------------------


def compare_best_of_n() -> None:
    """Let three judges choose among the same endings, of which SFT wrote four a story."""
    said = [write(SFT, 1000 + i) for i in range(max(BEST_OF))]
    kept = follows(SFT) | {"story_loss": story_loss(SFT)}  # the model stays as it is
    for seed in SEEDS:
        scores = np.array([scores_of(some, reward_model(seed)) for some in said])  # (n, prompts)
        for n in BEST_OF:
            best = [said[i][j] for j, i in enumerate(scores[:n].argmax(axis=0))]
            # The distance of the best of n has this bound: Stiennon et al., 2020, appendix G.3.
            more = kept | {"kl": math.log(n) - (n - 1) / n}
            numbers, written = of_endings(best, reward_model(seed))
            record("best", n, seed, lambda found=(numbers | more, written): found)


def main(methods=()) -> None:
    makers = {"ppo": by_ppo, "free": by_ppo, "dpo": by_dpo}
    for method in methods or RUNS_OF:
        for setting, seeds in RUNS_OF[method].items():
            for seed in seeds:
                run, make = (method, setting, seed), makers[method]
                record(*run, lambda run=run, make=make: whole(make(*run), run[2]))
    if methods:
        return
    base, _ = load("story")
    record("base", 0, 0, lambda: ({"story_loss": story_loss(base)}, {}))
    for seed in SEEDS:
        record("sft", 0, seed, lambda seed=seed: whole(SFT, seed))
    if not (MODELS / "reward.csv").exists():
        compare_rewards()
    for name, run in {"leash": f"ppo-{KL_MAIN}-0", "free": "free-0.0-0"}.items():
        write_atomic(MODELS / f"ppo_{name}.csv", (RUNS / f"{run}.csv").read_bytes())
    if "best" not in set(table().method):
        compare_best_of_n()
    if not (MODELS / "agreement.csv").exists():
        compare_gradients()


if __name__ == "__main__":
    main(sys.argv[1:])
