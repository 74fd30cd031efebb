"""Our models in lm-eval, the harness with which most published numbers are made.

`python -m support.harness MODEL TASK.yaml` runs a task; it needs `pip install lm_eval`.
Gao et al., The Language Model Evaluation Harness, https://github.com/EleutherAI/lm-evaluation-harness
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from support.data import DataError
from support.evaluate import continuation_log_probs, encode_pair, text_log_probs
from support.generate import stream
from support.pretrained import load
from support.tokenizer import BPETokenizer
from support.tokenizer_files import end_of_text


class Harness:
    """The three questions that lm-eval asks of a model; a request has its arguments in `.args`."""

    def __init__(self, model: nn.Module, tokenizer: BPETokenizer, batch_size: int = 8):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.end_id = tokenizer.special_tokens[end_of_text(tokenizer)]

    def loglikelihood(self, requests: Sequence) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) the log-probability, and if it is greedy's."""
        pairs = [encode_pair(self.tokenizer, *request.args) for request in requests]
        scored = continuation_log_probs(self.model, pairs, self.batch_size)
        return [(log_probs.sum().item(), likeliest) for log_probs, likeliest in scored]

    def loglikelihood_rolling(self, requests: Sequence) -> list[float]:
        """Return for each text its log-probability, in windows that do not overlap."""
        texts = [self.tokenizer.encode(request.args[0]) for request in requests]
        stride = self.model.config.context_length
        return [text_log_probs(self.model, [self.end_id, *t], stride).sum().item() for t in texts]

    def generate_until(self, requests: Sequence) -> list[str]:
        """Return for each (context, options) what greedy generation writes, up to a stop text."""
        return [self._write(*request.args) for request in requests]

    def _write(self, context: str, options: dict) -> str:
        stops, most = options.get("until", []), self.model.config.context_length
        stops = [stops] if isinstance(stops, str) else stops
        n = min(options.get("max_gen_toks", 256), most - 1)
        ids = self.tokenizer.encode(context)[n - most :] or [self.end_id]
        text = ""
        for piece in stream(self.model, ids, n, self.tokenizer, self.end_id, temperature=0):
            text += piece
            if any(stop in text for stop in stops):
                break
        return text[: min((text.find(stop) for stop in stops if stop in text), default=None)]


def for_lm_eval(model: nn.Module, tokenizer: BPETokenizer):
    """Return a model that `lm_eval.simple_evaluate` takes."""
    from lm_eval.api.model import LM  # here, because only the tests install it

    class Adapter(Harness, LM):
        def __init__(self):
            LM.__init__(self)
            Harness.__init__(self, model, tokenizer)

    return Adapter()


def run(model, task: str | Path, **dataset_options) -> dict[str, float]:
    """Return the results of a task in a YAML file, its data as seen from the current folder."""
    import yaml
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    config = yaml.safe_load(Path(task).read_text(encoding="utf-8"))
    config["dataset_kwargs"] |= dataset_options
    ours_only = TaskManager(include_defaults=False)  # reading all of lm-eval's takes a minute
    done = simple_evaluate(model, tasks=[config], bootstrap_iters=0, task_manager=ours_only)
    results = done["results"][config["task"]].items()
    return {name.removesuffix(",none"): x for name, x in results if isinstance(x, float)}


def main() -> None:
    """Run one task of lm-eval with one of our models."""
    parser = argparse.ArgumentParser(prog="python -m support.harness", description=main.__doc__)
    parser.add_argument("model", help='"story", "smollm2-135m", or a folder')
    parser.add_argument("task", type=Path, help="a task of lm-eval in a YAML file")
    options = parser.parse_args()
    try:
        results = run(for_lm_eval(*load(options.model)), options.task)
    except (DataError, OSError, ModuleNotFoundError) as error:
        sys.exit(str(error))
    for name, value in results.items():
        print(f"{name:<20}{value:.3f}")


if __name__ == "__main__":
    main()
