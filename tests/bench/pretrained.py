"""How fast real weights load, and how fast their models write, beside transformers.

Run `python tests/bench/pretrained.py`. The rivals take turns, so that a slow minute hits all.
"""

import re
import subprocess
import sys
from statistics import median

import torch
from gpt import race
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from support import pretrained
from support.data import fetch
from support.generate import generate
from support.gpt import GPTConfig, GPTModel

NEW, REPEATS = 64, 3
PATH = fetch("smollm2-135m")
THEIRS = "AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)"
THEIRS += "; AutoTokenizer.from_pretrained(folder, gguf_file=file)"
LOADERS = {
    "ours": ("from support import pretrained", "pretrained.load('smollm2-135m')"),
    "transformers": ("import torch\nfrom transformers import *", THEIRS),
}
SCRIPT = """
import re, sys, time
folder, file = sys.argv[1:]
{imports}
def memory(kind):
    return int(re.search(kind + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1000
before, start = memory("VmRSS"), time.perf_counter()
{load}
print(time.perf_counter() - start, memory("VmHWM") - before)
"""


def load_in_its_own_process(name: str) -> tuple[float, float]:
    """Return the seconds that loading took, and the MB by which memory grew at its peak."""
    imports, load = LOADERS[name]
    script = SCRIPT.format(imports=imports, load=load)
    command = [sys.executable, "-c", script, str(PATH.parent), PATH.name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = map(float, re.findall(r"[\d.]+", done.stdout)[-2:])
    return seconds, peak


def compare_generation(title: str, ours, theirs) -> None:
    """Print the tokens/s of a greedy generation by both, with the cache and without."""
    ids = torch.randint(1000, 40_000, (1, 16))

    def theirs_with(use_cache):
        return theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            use_cache=use_cache,
        )

    for use_cache in (True, False):
        runners = {
            "ours": lambda: generate(ours, ids, NEW, 0, use_cache=use_cache),  # noqa: B023
            "transformers": lambda: theirs_with(use_cache),  # noqa: B023
        }
        race(f"{title}, {'with' if use_cache else 'without'} the cache", NEW, runners, REPEATS)


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"{torch.get_num_threads()} threads")
    runs = {name: [] for name in LOADERS}
    for name in list(LOADERS) * REPEATS:
        runs[name].append(load_in_its_own_process(name))
    print("Loading SmolLM2 (538 MB in float32) and its tokenizer")
    for name, results in runs.items():
        seconds, peak = (median(column) for column in zip(*results, strict=True))
        print(f"  {name:<30}{seconds:>8.1f} s   {peak:>6,.0f} MB at the peak")

    torch.manual_seed(0)
    ours, _ = pretrained.load("smollm2-135m")
    load = AutoModelForCausalLM.from_pretrained
    theirs = load(PATH.parent, gguf_file=PATH.name, dtype=torch.float32).eval()
    compare_generation(f"SmolLM2 writing {NEW} tokens", ours, theirs)
    ours = GPTModel(GPTConfig.gpt2()).eval()
    theirs = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None)).eval()
    compare_generation(f"A GPT-2 of 124M parameters writing {NEW} tokens", ours, theirs)


if __name__ == "__main__":
    main()
