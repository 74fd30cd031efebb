"""How fast our GPT trains and writes, beside transformers' GPT-2 of the same shape.

Run `python tests/bench/gpt.py`. The rivals take turns, so that a slow minute hits all of them.
"""

import math
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from support.generate import generate
from support.gpt import GPTConfig, GPTModel, count_parameters

CONFIG = GPTConfig(vocab_size=4096, context_length=512, d_model=256, n_heads=8, n_layers=6)
BATCH, TOKENS = 8, 128  # of a training step
PROMPT, NEW = 8, 400  # of a generation


def rival() -> GPT2LMHeadModel:
    """Return transformers' GPT-2 with the shape of CONFIG and no dropout."""
    settings = GPT2Config(
        vocab_size=CONFIG.vocab_size,
        n_positions=CONFIG.context_length,
        n_embd=CONFIG.d_model,
        n_layer=CONFIG.n_layers,
        n_head=CONFIG.n_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(settings)


def training_step(model, logits_of: Callable) -> Callable[[], None]:
    """Return a function that makes one step of training."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
    ids = torch.randint(CONFIG.vocab_size, (BATCH, TOKENS + 1))

    def step():
        logits = logits_of(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def flop_per_token(model: GPTModel) -> float:
    """Return the additions and multiplications of a training step, for each token.

    2 for each weight forward and 4 backward, embeddings looked up being free and the tied head not;
    attention adds 12 for each block, number of a vector and token looked at, half of them masked.
    """
    weights = count_parameters(model) - CONFIG.context_length * CONFIG.d_model
    return 6 * weights + 6 * CONFIG.n_layers * CONFIG.d_model * TOKENS


def peak(size: int = 1024, repeats: int = 20) -> float:
    """Return the best rate at which this machine multiplies float32 matrices, in FLOP/s."""
    a, b, best = torch.randn(size, size), torch.randn(size, size), math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def race(title: str, tokens: int, runners: dict[str, Callable], repeats: int) -> float:
    """Let the runners take turns; print each one's median tokens/s, and return the first's."""
    seconds = {name: [] for name in runners}
    for name in list(runners) * (repeats + 1):
        start = time.perf_counter()
        runners[name]()
        seconds[name].append(time.perf_counter() - start)
    speeds = {name: tokens / median(times[1:]) for name, times in seconds.items()}  # 1st: warm-up
    ours = next(iter(speeds.values()))
    print(title)
    for name, speed in speeds.items():
        print(f"  {name:<30}{speed:>10,.0f} tokens/s   ours / this: {ours / speed:5.2f}")
    return ours


def main() -> None:
    logging.set_verbosity_error()
    torch.manual_seed(0)
    ours, theirs = GPTModel(CONFIG), rival()
    assert count_parameters(ours) == sum(p.numel() for p in theirs.parameters())
    print(f"{count_parameters(ours):,} parameters, {torch.get_num_threads()} threads")
    runners = {
        "ours": training_step(ours, ours),
        "transformers": training_step(theirs, lambda ids: theirs(ids).logits),
    }
    speed = race(f"Training on {BATCH} x {TOKENS} tokens", BATCH * TOKENS, runners, repeats=10)
    used, possible = speed * flop_per_token(ours), peak()
    print(f"  {used / 1e9:.0f} of {possible / 1e9:.0f} GFLOP/s that a matrix product reaches here")

    ids = torch.randint(CONFIG.vocab_size, (1, PROMPT))
    runners = {
        "ours": lambda: generate(ours, ids, NEW, temperature=0),
        "ours without the cache": lambda: generate(ours, ids, NEW, 0, use_cache=False),
        "transformers": lambda: theirs.eval().generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
        ),
    }
    race(f"Generating {NEW} tokens after {PROMPT}", NEW, runners, repeats=3)


if __name__ == "__main__":
    main()
