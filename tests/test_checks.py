"""What marks the exercises: typical wrong answers each get a message that helps."""

import re
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from support import checks
from support.checks import Exercise, check_same, same

MODULES = [import_module(f"support.checks.{m.name}") for m in iter_modules(checks.__path__)]
EXERCISES = {
    exercise.name: exercise
    for module in MODULES
    for exercise in vars(module).values()
    if isinstance(exercise, Exercise)
}
NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CHAPTERS = sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("name", EXERCISES)
def test_the_reference_passes_and_a_stub_is_not_an_error(name):
    exercise = EXERCISES[name]
    assert exercise.verdict(exercise.reference) == f"✓ {name}: correct."
    assert exercise.verdict(lambda *_: None).startswith(f"○ {name}: not attempted")


@pytest.mark.parametrize(
    ("name", "i"), [(n, i) for n, e in EXERCISES.items() for i in range(len(e.mistakes))]
)
def test_each_typical_mistake_gets_its_own_hint(name, i):
    wrong, hint = EXERCISES[name].mistakes[i]
    verdict = EXERCISES[name].verdict(wrong)
    assert verdict.startswith(f"✗ {name}: ")
    assert verdict.endswith(hint)


def test_every_exercise_knows_at_least_four_mistakes():
    assert all(len(exercise.mistakes) >= 4 for exercise in EXERCISES.values())


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_each_chapter_has_its_exercises_and_each_exercise_its_check(path):
    page = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    on_page = re.findall(r"^### Exercise (\w+\.\d+) ·", page, re.MULTILINE)
    chapter = path.stem.split("_")[0].lstrip("0")
    assert 4 <= len(on_page) <= 8
    assert sorted(on_page) == sorted(n for n in EXERCISES if n.split(".")[0] == chapter)


def test_other_wrong_answers_get_a_sentence_too():
    check = EXERCISES["2.6"]
    assert "give the check your function itself" in check.verdict(7)
    assert "of type str, but should be of type int" in check.verdict(lambda n, t, s: "three")
    assert "ZeroDivisionError" in check.verdict(lambda n, t, s: 1 // 0)
    assert "gives 40" in check.verdict(lambda n, t, s: 40)
    assert "prints its answer; return it" in check.verdict(lambda n, t, s: print(4))
    assert "your line" in check.verdict(lambda n, t, s: 1 // 0)
    almost = lambda n, t, s: max(0, (n - t) // s + 1) if n != 4 else 7  # noqa: E731
    assert "Perhaps: You forget that the target" in check.verdict(almost)


def test_numpy_results_and_other_right_solutions_count():
    count, stream = EXERCISES["2.6"], EXERCISES["2.3"]
    assert count.verdict(lambda *case: np.int64(count.reference(*case))).startswith("✓")
    assert stream.others and all(stream.verdict(other).startswith("✓") for other in stream.others)


def test_a_message_is_short_and_shows_no_address():
    for exercise in EXERCISES.values():
        verdict = exercise.verdict(lambda *case: "wrong")
        assert " at 0x" not in verdict and all(len(line) < 400 for line in verdict.splitlines())


def test_an_answer_that_changes_its_input_is_told_so():
    def spoils(words):
        answer = EXERCISES["2.2"].reference(words)
        words.clear()
        return answer

    assert "changes its own input" in EXERCISES["2.2"].verdict(spoils)


def test_an_answer_that_changes_the_model_is_told_so_and_spoils_no_later_answer():
    def shortens(model, ids):
        del model.blocks[1:]
        return model(ids).argmax(dim=-1)

    assert "changes its own input" in EXERCISES["4.6"].verdict(shortens)
    assert EXERCISES["4.6"].verdict(EXERCISES["4.6"].reference).startswith("✓")


def test_right_answers_of_another_style_count():
    def by_gradients(attend, x):
        jacobian = torch.autograd.functional.jacobian(attend, x)  # (T, C, T, C)
        return (jacobian != 0).any(dim=3).any(dim=1)

    assert EXERCISES["3.4"].verdict(by_gradients) == "✓ 3.4: correct."


def test_what_the_libraries_compute_is_right():
    def clipped(gradients, max_norm):
        parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
        for parameter, g in zip(parameters, gradients, strict=True):
            parameter.grad = g.clone()
        nn.utils.clip_grad_norm_(parameters, max_norm)
        return [parameter.grad for parameter in parameters]

    def penalized(logits, used, penalty):
        processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
        return processor(torch.tensor([used]), logits[None].clone())[0]

    def stepped(w, g, m, v, t, lr, betas, eps, weight_decay):
        w = nn.Parameter(w.clone())
        w.grad = g
        optimizer = torch.optim.AdamW([w], lr, betas, eps, weight_decay)
        averages = {"exp_avg": m.clone(), "exp_avg_sq": v.clone()}
        optimizer.state[w] = {"step": torch.tensor(t - 1.0)} | averages
        optimizer.step()
        return w, averages["exp_avg"], averages["exp_avg_sq"]

    def perplexity(probs, targets):
        return F.cross_entropy(probs.log(), targets).exp()

    libraries = {"5.1": perplexity, "5.3": clipped, "5.5": penalized, "5.6": stepped}
    for name, library in libraries.items():
        assert EXERCISES[name].verdict(library) == f"✓ {name}: correct."


def test_a_softmax_that_overflows_is_wrong():
    def without_the_greatest(q, pairs):
        weighted, total = 0.0, 0.0
        for k, v in pairs:
            weight = ((q @ k) / len(q) ** 0.5).exp()
            weighted, total = weighted + weight * v, total + weight
        return weighted / total

    assert "nan" in EXERCISES["3.6"].verdict(without_the_greatest)


def test_a_stream_that_is_stored_or_read_twice_is_told_so():
    def stored(q, pairs):
        keys, values = zip(*pairs, strict=True)
        return ((torch.stack(keys) @ q) / len(q) ** 0.5).softmax(dim=0) @ torch.stack(values)

    def read_twice(q, pairs):
        best = max((q @ k).item() for k, _ in pairs)
        return sum(v * ((q @ k) - best).exp() for k, v in pairs)

    assert "you keep 6 of 6 keys" in EXERCISES["3.6"].verdict(stored)
    assert "pass by only once" in EXERCISES["3.6"].verdict(read_twice)


def test_a_mask_of_ones_and_zeros_is_told_to_be_one_of_booleans():
    check = EXERCISES["3.2"]
    verdict = check.verdict(lambda T, window: check.reference(T, window).int())
    assert "should be of True and False" in verdict


def test_no_check_draws_from_the_readers_random_numbers():
    before = torch.get_rng_state()
    for exercise in EXERCISES.values():
        exercise.verdict(lambda *case: "wrong")
    assert torch.equal(torch.get_rng_state(), before)


def test_same():
    assert same(1, 1.0) and same([1, (2, 3)], [1, (2, 3)]) and same(torch.ones(2), torch.ones(2))
    assert same(Fraction(1, 3), 1 / 3)
    assert not same(torch.tensor([True]), torch.ones(1))
    assert not same(True, 1) and not same([1], [1, 2]) and not same(None, 0)
    assert not same(torch.ones(2), torch.ones(3)) and not same(torch.ones(2), torch.ones(2) + 1e-3)


class Doubler(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.layer = nn.Linear(n, n)

    def forward(self, x):
        return 2 * self.layer(x)


class Tripler(Doubler):
    def forward(self, x):
        return 3 * self.layer(x)


class Renamed(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.linear = nn.Linear(n, n)


class Detached(Doubler):
    def forward(self, x):
        return 2 * (self.layer(x) + (self.layer.weight - self.layer.weight.detach()).sum())


def test_check_same_shows_agreement_and_stops_at_a_difference(capsys):
    x = torch.randn(2, 3)
    check_same(Doubler, Doubler, 3, inputs=[(x,)])
    assert "same 2 parameters, same outputs, same gradients" in capsys.readouterr().out
    for wrong, why in ((Tripler, "outputs"), (Renamed, "parameters"), (Detached, "gradients")):
        with pytest.raises(AssertionError, match=why):
            check_same(wrong, Doubler, 3, inputs=[(x,)])
    check_same(len, len, inputs=[("abc",)])
    with pytest.raises(AssertionError, match="differ on"):
        check_same(len, sum, inputs=[([1, 2],)])
