"""What marks the exercises of chapter 4: typical wrong answers each get a message that helps."""

import nbformat
import pytest
import torch

from support.checks import Exercise, gpt

EXERCISES = {
    exercise.name: exercise for exercise in vars(gpt).values() if isinstance(exercise, Exercise)
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
    assert " at 0x" not in verdict


def test_every_exercise_knows_at_least_four_mistakes():
    assert len(EXERCISES) == 6
    assert all(len(exercise.mistakes) >= 4 for exercise in EXERCISES.values())


def test_the_model_of_the_checks_leaves_the_random_numbers_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    gpt._model()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_page_names_every_exercise():
    book = nbformat.read("notebooks/04_gpt.ipynb", as_version=4)
    page = "\n".join(cell.source for cell in book.cells)
    assert all(f"### Exercise {name} ·" in page for name in EXERCISES)
