"""A chapter's definitions are the package's: the gate, and the gate seen to close."""

import shutil
import sys
from importlib import import_module
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import sync


def test_every_chapter_defines_what_the_package_defines():
    assert sync.drifts() == []


def test_every_public_class_is_built_in_some_chapter():
    taught = ("tokenizer", "embeddings", "attention", "gpt", "llama", "window", "experts")
    public = {
        name
        for module in taught
        for name, kind in vars(import_module(f"support.{module}")).items()
        if isinstance(kind, type) and kind.__module__ == f"support.{module}"
    } - {"Remember"}  # a dictionary that the page only describes
    public |= {"TokenWindows", "generate", "next_ids", "learn_merges"}
    built = {
        sync.named(node)
        for path in sync.chapters()
        for _, node in sync.taught(path, sync.package())
    }
    assert public <= built, public - built


@pytest.fixture
def course(tmp_path):
    """A small course: a package of one class and a notebook that builds it."""
    (tmp_path / "support").mkdir()
    (tmp_path / "notebooks").mkdir()
    source = 'class Adder:\n    """Adds.\n\n    Slowly.\n    """\n\n    n = 1\n'
    (tmp_path / "support" / "adder.py").write_text(source)

    def write(cell, name="01.ipynb", tags=()):
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
        book.cells[0].metadata["tags"] = list(tags)
        nbformat.write(book, tmp_path / "notebooks" / name)
        return tmp_path

    return write


def test_comments_formatting_and_docstrings_are_free(course):
    assert sync.drifts(course("%matplotlib inline\nclass Adder:\n    n = (1)  # one\n")) == []


def test_a_planted_drift_is_found_and_rewritten(course):
    root = course("before = 0\nclass Adder:\n    n = 2\nafter = 1")
    assert sync.drifts(root) == ["01.ipynb, cell 0: Adder differs from support's."]
    assert sync.rewrite(root / "notebooks" / "01.ipynb", sync.package(root)) == 1
    cell = nbformat.read(root / "notebooks" / "01.ipynb", as_version=4).cells[0].source
    assert cell == 'before = 0\nclass Adder:\n    """Adds."""\n\n    n = 1\nafter = 1'
    assert sync.drifts(root) == []


def test_a_draft_is_exempt(course):
    assert sync.drifts(course("class Adder:\n    n = 2\n", tags=["draft"])) == []


def test_a_name_built_twice_is_found(course):
    root = course("class Adder:\n    n = 1\n")
    shutil.copy(root / "notebooks" / "01.ipynb", root / "notebooks" / "02.ipynb")
    assert sync.drifts(root) == ["02.ipynb, cell 0: Adder is also built in 01.ipynb."]
