"""What marks the exercises of chapter 1: typical wrong answers each get a message that helps."""

import nbformat
import pytest

from support.checks import Exercise, understanding_llms

EXERCISES = {
    exercise.name: exercise
    for exercise in vars(understanding_llms).values()
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
    assert list(EXERCISES) == [f"1.{i}" for i in range(1, 7)]
    assert all(len(exercise.mistakes) >= 4 for exercise in EXERCISES.values())


def test_the_page_names_every_exercise():
    book = nbformat.read("notebooks/01_understanding_llms.ipynb", as_version=4)
    page = "\n".join(cell.source for cell in book.cells)
    assert all(f"### Exercise {name} ·" in page for name in EXERCISES)
