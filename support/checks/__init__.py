"""What marks the exercises, and what shows that a chapter's class is the package's.

Each chapter's exercises are in a module of this package, each called with the reader's answer.
"""

import contextlib
import copy
import inspect
import io
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import nn


@dataclass
class Exercise:
    """One exercise: what is right on which inputs, and which wrong answers are common.

    Args:
        name: as on the page, such as "2.3".
        reference: a right solution; its name, without the underscore, is the exercise's function.
        cases: the argument tuples on which an answer is compared with the reference.
        mistakes: pairs (a typical wrong solution, what to say to its author).
        others: other right solutions, which differ from the reference somewhere; an answer that
            agrees with one of them on every case is right too.
    """

    name: str
    reference: Callable
    cases: Sequence[tuple]
    mistakes: Sequence[tuple[Callable, str]] = ()
    others: Sequence[Callable] = ()

    def __call__(self, answer: Callable) -> None:
        print(self.verdict(answer))

    def verdict(self, answer: Callable) -> str:
        """Return the verdict on the reader's function, in one line or a few."""
        if not callable(answer):
            return f"✗ {self.name}: give the check your function itself, without calling it."
        results, printed = [], io.StringIO()
        for case in self.cases:
            given = _copies(case)
            try:
                with contextlib.redirect_stdout(printed):
                    result = answer(*given)
                    result = list(result) if inspect.isgenerator(result) else result
            except Exception as error:
                return f"✗ {self.name}: {self._call(case)} stops with {_where(error, answer)}"
            if not same(given, case):
                return f"✗ {self.name}: your function changes its own input; work on a copy."
            results.append(result)
        if all(result is None for result in results):
            if printed.getvalue():
                return f"✗ {self.name}: your function prints its answer; return it instead."
            return f"○ {self.name}: not attempted yet (your function returns None)."
        for solution in (self.reference, *self.others):
            if all(map(same, results, self._run(solution))):
                return f"✓ {self.name}: correct."
        right = self._run(self.reference)
        first = next(i for i, result in enumerate(results) if not same(result, right[i]))
        lines = [f"✗ {self.name}: {self._call(self.cases[first])} gives {_short(results[first])}"]
        lines += [f"  but should give {_short(right[first])}."]
        if hint := self._hint(results, right, first) or _other_kind(results[first], right[first]):
            lines += [f"  {hint}"]
        return "\n".join(lines)

    def _run(self, solution: Callable) -> list:
        return [solution(*_copies(case)) for case in self.cases]

    def _hint(self, results: list, right: list, first: int) -> str | None:
        """Return the hint of the mistake that the results show, everywhere or where they fail."""
        perhaps = None
        for mistake, hint in self.mistakes:
            try:
                wrong = self._run(mistake)
            except Exception:  # the typical wrong solution may stop where the reader's does not
                continue
            if all(map(_alike, results, wrong)):
                return hint
            if _alike(results[first], wrong[first]):
                perhaps = perhaps or f"Perhaps: {hint}"
        return perhaps

    def _call(self, case: tuple) -> str:
        return f"{self.reference.__name__.lstrip('_')}({', '.join(map(_short, case))})"


def _short(value) -> str:
    """Return a value as a message shows it, in little room."""
    if isinstance(value, torch.Tensor):
        if value.numel() > 24:
            return f"a tensor {tuple(value.shape)}"
        exact = value.detach()
        return str(
            (exact.double().round(decimals=3) if exact.is_floating_point() else exact).tolist()
        )
    if hasattr(value, "__dict__"):
        kind = "tokenizer" if hasattr(value, "encode") else type(value).__name__
        return getattr(value, "__name__", kind).strip("_")
    text = repr(value)
    return text if len(text) <= 150 else text[:147] + "..."


def _other_kind(got, want) -> str | None:
    """Say that the type or the shape is wrong, where that is the matter."""
    if isinstance(got, torch.Tensor) and isinstance(want, torch.Tensor):
        if got.shape != want.shape:
            return f"The shape is {tuple(got.shape)}, but should be {tuple(want.shape)}."
        if want.dtype == torch.bool != got.dtype:
            return f"The tensor is of type {got.dtype}, but should be of True and False."
        if got.isnan().any():
            return "NaN comes of 0 / 0, of ∞ − ∞ or of 0 · ∞, and of a softmax of nothing but −∞."
    numbers = isinstance(got, int | float) and isinstance(want, int | float)
    if type(got) is type(want) or numbers:
        return None
    return (
        f"The result is of type {type(got).__name__}, but should be of type {type(want).__name__}."
    )


def same(a, b) -> bool:
    """Return whether two results agree: numbers and tensors to 1e-5, everything else exactly.

    True and False agree with themselves only, not with 1 and 0.
    """
    a, b = (x.tolist() if type(x).__module__ == "numpy" else x for x in (a, b))
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        try:
            a, b = torch.as_tensor(a), torch.as_tensor(b)
        except (TypeError, ValueError, RuntimeError):
            return False
        if a.shape != b.shape or (a.dtype == torch.bool) != (b.dtype == torch.bool):
            return False
        return torch.allclose(a.double(), b.double(), atol=1e-5)
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, Real) and isinstance(b, Real):
        return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-9)
    if isinstance(a, nn.Module) and isinstance(b, nn.Module):
        return type(a) is type(b) and same(dict(a.state_dict()), dict(b.state_dict()))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or (type(a) is type(b) and a == b)


def _alike(a, b) -> bool:
    """Return whether two wrong results agree; here NaN is like NaN."""

    def comparable(x):
        if isinstance(x, torch.Tensor):
            return x.nan_to_num(-1e9)
        return -1e9 if isinstance(x, float) and math.isnan(x) else x

    return same(comparable(a), comparable(b))


def _copies(case: tuple) -> tuple:
    """Return fresh arguments; a tokenizer is handed on as it is."""
    values = (list, dict, set, tuple, torch.Tensor, nn.Module)
    fresh = [isinstance(x, values) or hasattr(x, "__deepcopy__") for x in case]
    return tuple(copy.deepcopy(x) if new else x for x, new in zip(case, fresh, strict=True))


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
        count = f"{len(inputs)} input{'s' * (len(inputs) != 1)}"
        print(f"{name}: the chapter's and the package's agree on {count}.")
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


def _where(error: Exception, answer: Callable) -> str:
    """Return the error and the last line of the reader's own code on the way to it."""
    own = getattr(getattr(answer, "__code__", None), "co_filename", None)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == own and f.line]
    place = f" (your line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
