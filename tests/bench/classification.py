"""Spam or ham, on all messages: ten training sets, each tested on everything that it does not hold.

Run `python tests/bench/classification.py`. It takes about half an hour on one core, a third of it
for reading 4,534 messages with 135 million parameters, twice: with SmolLM2's weights and with
random ones. Writes `data/models/spam.csv` and, if it is not there, `data/models/spam_curve.csv`;
the page shows them. Seconds are those of one core, others' work not counted.
"""

import copy
import time
from collections import defaultdict

import numpy as np
import pandas as pd
import torch

from support.baselines import choose, opponents
from support.classify import Batches, GPTForClassification, class_loss, encode, freeze, predict
from support.data import DATA
from support.features import bottom, cached_states, top
from support.messages import clean, group, load_messages, near_duplicates, split
from support.metrics import accuracy, auroc, average_precision, paired_difference
from support.pretrained import load
from support.train import TrainConfig, train

MAX_TOKENS, SETS, DRAWS = 48, 10, 3
FEW = 3  # sets for the four blocks, which take longest
HOW = {  # how many blocks learn, the learning rate, the epochs, whose answer counts
    "head, first token": (0, 1e-2, 8, "first"),
    "head, last token": (0, 1e-2, 8, "last"),
    "head, mean": (0, 1e-2, 8, "mean"),
    "last block, mean": (1, 1e-4, 2, "mean"),
    "last four, mean": (4, 1e-4, 2, "mean"),
}
SIZES = (50, 100, 200, 400, 800, 1600, 3200)


def messages() -> pd.DataFrame:
    """Return every different message, its group of near-duplicates, and its label as a number."""
    table = load_messages()
    table["text"] = table.text.map(clean)
    table = table.drop_duplicates("text", ignore_index=True)
    table["group"] = group(len(table), near_duplicates(table.text))
    return table.assign(y=(table.label == "spam").astype(int))


def read(model: GPTForClassification, rows) -> dict[int, list]:
    """Return the hidden states with four, one and no blocks still to come."""
    n, states = len(model.backbone.blocks), {}
    states[4] = cached_states(bottom(model, n - 4), rows)
    upper = top(model, n - 4)
    states[1] = cached_states(bottom(upper, 3), states[4])
    states[0] = cached_states(bottom(top(upper, 3), 1), states[1])
    return states


def learn(model, states, y, chosen, how, seed, head=None):
    """Return a top that learned from the chosen messages; its head begins as `head`, if given."""
    learning, lr, epochs, pooling = how
    torch.manual_seed(seed)
    part = copy.deepcopy(top(model, len(model.backbone.blocks) - learning))
    part.backbone.head.reset_parameters()
    if head is not None:
        part.backbone.head.load_state_dict(head.state_dict())
    part.pooling = pooling
    freeze(part, learning)
    batches = Batches([states[learning][i] for i in chosen], y[chosen], 16, seed)
    steps = epochs * len(batches)
    config = TrainConfig(
        steps, 16, lr, micro_batch=4 if learning else None, weight_decay=0.01, warmup=5, seed=seed
    )
    train(part, batches, config, loss=class_loss)
    return part


def ten_sets(table, models) -> pd.DataFrame:
    """Return a row for each classifier: its metrics, and its lead in accuracy with an interval."""
    y, text = table.y.to_numpy(), table.text.to_numpy()
    parts = split(table.group, table.label, {str(i): len(table) // SETS for i in range(SETS)})
    parts = [np.array(part) for part in parts.values()]
    runs = defaultdict(list)
    hits, tested = defaultdict(lambda: np.zeros(len(y))), defaultdict(lambda: np.zeros(len(y)))

    def note(name, rows, probs, seconds):
        metrics = accuracy(y[rows], probs > 0.5), auroc(y[rows], probs)
        runs[name].append([*metrics, average_precision(y[rows], probs), seconds])
        hits[name][rows] += (probs > 0.5) == y[rows]
        tested[name][rows] += 1
        print(f"{name:<28}" + "".join(f"{x:9.4f}" for x in runs[name][-1]), flush=True)

    for i, chosen in enumerate(parts):
        asked = parts[(i + 1) % SETS]  # the validation messages of this set
        rest = np.setdiff1d(np.arange(len(y)), np.concatenate([chosen, asked]))
        note("always ham", rest, np.zeros(len(rest)), 0.0)
        for name, variants in opponents().items():
            start = time.process_time()
            best = choose(variants, text[chosen], y[chosen], text[asked], y[asked])
            seconds = time.process_time() - start
            note(name, rest, best.predict_proba(text[rest])[:, 1], seconds)
        for kind, (model, states) in models.items():
            head = None
            for name, how in HOW.items():
                if kind == "random weights" and name != "head, mean" or how[0] == 4 and i >= FEW:
                    continue
                start = time.process_time()
                part = learn(model, states, y, chosen, how, i, head if how[0] else None)
                seconds = time.process_time() - start
                probs = predict(part, [states[how[0]][row] for row in rest])[:, 1].numpy()
                note(f"{kind}: {name}", rest, probs, seconds)
                head = head if how[0] else part.backbone.head
    rows, ours = {}, {name: found / tested[name] for name, found in hits.items()}
    for name, metrics in runs.items():
        means, spread = np.mean(metrics, axis=0), np.std(metrics, axis=0)
        rows[name] = dict(zip(["accuracy", "AUROC", "average precision"], means, strict=False))
        rows[name] |= {"spread of accuracy": spread[0], "seconds": means[3]}
        for other in opponents():
            lead = paired_difference(
                lambda _, share: share.mean(), y, ours[name], ours[other], table.group
            )
            rows[name][f"lead over {other}"] = str(lead)
    return pd.DataFrame(rows).T


def curve(table, model, states) -> pd.DataFrame:
    """Return accuracy and AUROC by the number of training messages, for each of several draws."""
    y, text, rows = table.y.to_numpy(), table.text.to_numpy(), []
    for draw in range(DRAWS):
        wanted = {"train": SIZES[-1], "validation": 200, "test": 1000}
        parts = split(table.group, table.label, wanted, seed=draw)
        asked, test = parts["validation"], parts["test"]
        shuffled = np.random.default_rng(draw).permutation(parts["train"])
        for size in SIZES:
            chosen = shuffled[:size]
            part = learn(model, states, y, chosen, HOW["head, mean"], draw)
            probs = {
                "SmolLM2: head, mean": predict(part, [states[0][i] for i in test])[:, 1].numpy()
            }
            for name, variants in opponents().items():
                best = choose(variants, text[chosen], y[chosen], text[asked], y[asked])
                probs[name] = best.predict_proba(text[test])[:, 1]
            for name, p in probs.items():
                found = {"accuracy": accuracy(y[test], p > 0.5), "AUROC": auroc(y[test], p)}
                rows.append({"classifier": name, "messages": size, "draw": draw} | found)
                print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    table = messages()
    language_model, tokenizer = load("smollm2-135m")
    rows = encode(table.text, tokenizer, MAX_TOKENS)
    torch.manual_seed(0)
    pretrained = GPTForClassification.from_pretrained(language_model, 2)
    random = GPTForClassification(language_model.config, 2)
    models = {
        name: (model, read(model, rows))
        for name, model in (("SmolLM2", pretrained), ("random weights", random))
    }
    if not (path := DATA / "models" / "spam_curve.csv").exists():
        curve(table, *models["SmolLM2"]).to_csv(path, index=False, float_format="%.4f")
    result = ten_sets(table, models)
    result.to_csv(DATA / "models" / "spam.csv", float_format="%.4f")
    print(result.to_string())


if __name__ == "__main__":
    main()
