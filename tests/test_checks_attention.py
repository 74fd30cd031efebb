"""What marks the exercises of chapter 3: typical wrong answers each get a message that helps."""

import nbformat
import pytest
import torch

from support.checks import Exercise, attention

EXERCISES = {
    exercise.name: exercise
    for exercise in vars(attention).values()
    if isinstance(exercise, Exercise)
}


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
    assert len(EXERCISES) == 6
    assert all(len(exercise.mistakes) >= 4 for exercise in EXERCISES.values())


def test_a_softmax_that_overflows_is_wrong():
    def without_the_greatest(q, pairs):
        weights = [((q @ k) / len(q) ** 0.5).exp() for k, _ in pairs]
        return sum(w * v for w, (_, v) in zip(weights, pairs, strict=True)) / sum(weights)

    assert "nan" in EXERCISES["3.6"].verdict(without_the_greatest)


def test_who_sees_whom_may_be_answered_with_gradients():
    def by_gradients(attend, x):
        jacobian = torch.autograd.functional.jacobian(attend, x)  # (T, C, T, C)
        return (jacobian != 0).any(dim=3).any(dim=1)

    assert EXERCISES["3.4"].verdict(by_gradients) == "✓ 3.4: correct."


def test_the_page_names_every_exercise():
    book = nbformat.read("notebooks/03_attention.ipynb", as_version=4)
    page = "\n".join(cell.source for cell in book.cells)
    assert all(f"### Exercise {name} ·" in page for name in EXERCISES)
