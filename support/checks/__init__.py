"""What marks the exercises, and what shows that a chapter's class is the package's.

Each chapter's exercises are in a module of this package, each called with the reader's answer.
"""

import copy
import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class Exercise:
    """One exercise: what is right on which inputs, and which wrong answers are common.

    Args:
        name: as on the page, such as "2.3".
        reference: a right solution.
        cases: the argument tuples on which an answer is compared with the reference.
        mistakes: (a typical wrong solution, what to say to its author) pairs. An answer that agrees
            with the wrong solution on every case where the two differ gets that hint.
        show: how an argument or a result is written in a message.
    """

    name: str
    reference: Callable
    cases: Sequence[tuple]
    mistakes: Sequence[tuple[Callable, str]] = field(default=())
    show: Callable = repr

    def __call__(self, answer: Callable) -> None:
        print(self.verdict(answer))

    def verdict(self, answer: Callable) -> str:
        """Return the one-line (or few-line) verdict on the reader's function."""
        if not callable(answer):
            return f"✗ {self.name}: give the check your function itself, without calling it."
        results = []
        for case in self.cases:
            given = _copies(case)
            try:
                result = answer(*given)
                result = list(result) if inspect.isgenerator(result) else result
            except Exception as error:
                return f"✗ {self.name}: {self._call(case)} stopped with {_where(error)}"
            if result is None and not results:
                return f"○ {self.name}: not attempted yet (your function returns None)."
            if not same(given, case):
                return f"✗ {self.name}: your function changes its own input; work on a copy."
            results.append(result)
        right = [self.reference(*_copies(case)) for case in self.cases]
        wrong = [i for i, r in enumerate(right) if not same(results[i], r)]
        if not wrong:
            return f"✓ {self.name}: correct."
        case, got, want = self.cases[wrong[0]], results[wrong[0]], right[wrong[0]]
        lines = [f"✗ {self.name}: {self._call(case)} gives {self._short(got)}"]
        lines += [f"  but should give {self._short(want)}."]
        if hint := self._hint(results, right):
            lines += [f"  {hint}"]
        elif type(got) is not type(want):
            lines += [f"  The result is a {type(got).__name__}, not a {type(want).__name__}."]
        return "\n".join(lines)

    def _hint(self, results: list, right: list) -> str | None:
        for mistake, hint in self.mistakes:
            try:
                wrong = [mistake(*_copies(case)) for case in self.cases]
            except Exception:  # the typical wrong solution may stop where the reader's does not
                continue
            if all(map(same, results, wrong)) and not all(map(same, wrong, right)):
                return hint
        return None

    def _call(self, case: tuple) -> str:
        return f"{self.reference.__name__}({', '.join(map(self._short, case))})"

    def _short(self, value) -> str:
        text = self.show(value)
        return text if len(text) <= 150 else text[:147] + "..."


def same(a, b) -> bool:
    """Return whether two results agree: numbers and tensors to 1e-5, everything else exactly."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        try:
            a, b = torch.as_tensor(a), torch.as_tensor(b)
        except (TypeError, ValueError, RuntimeError):
            return False
        return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=1e-5)
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-9)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or (type(a) is type(b) and a == b)


def _copies(case: tuple) -> tuple:
    """Return fresh arguments; a tokenizer or a model is handed on as it is."""
    values = (list, dict, set, tuple, torch.Tensor)
    return tuple(copy.deepcopy(x) if isinstance(x, values) else x for x in case)


def check_same(mine, theirs, *args, inputs: Sequence[tuple] = (), **options) -> None:
    """Show that the chapter's definition and the package's do the same; stop with a reason if not.

    For an `nn.Module`: built from `args` and `options`, the two have the same parameter names, and
    with the same weights the same outputs and the same gradients on each of `inputs`. For any other
    function or class: called with each of `inputs`, the two return the same.
    """
    name = theirs.__name__
    if not (isinstance(theirs, type) and issubclass(theirs, nn.Module)):
        for case in inputs:
            if not same(mine(*_copies(case)), theirs(*_copies(case))):
                raise AssertionError(f"{name}: the two differ on {case!r:.200}.")
        print(f"{name}: the chapter's and the package's agree on {len(inputs)} inputs.")
        return
    mine, theirs = mine(*args, **options).eval(), theirs(*args, **options).eval()
    if list(mine.state_dict()) != list(theirs.state_dict()):
        raise AssertionError(
            f"{name}: parameters {list(mine.state_dict())} are not {list(theirs.state_dict())}."
        )
    theirs.load_state_dict(mine.state_dict())
    for case in inputs:
        outputs = [model(*case) for model in (mine, theirs)]
        if not same(*outputs):
            raise AssertionError(f"{name}: the outputs differ.")
        for output in outputs:
            output.double().pow(2).sum().backward()
    for (key, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        if a.grad is None or not same(a.grad, b.grad):
            raise AssertionError(f"{name}: the gradients of {key} differ.")
    print(f"{name}: same {len(mine.state_dict())} parameters, same outputs, same gradients.")


def _where(error: Exception) -> str:
    """Return the error and the last line of the reader's code that it came from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f" (line {frame.lineno}: {frame.line})" if frame.line else ""
    return f"{type(error).__name__}: {error}{place}"
