"""The notebooks as files: executed in order, normalized, and whole; and nbval seen to turn red."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent / "tools"))
import execute

BOOKS = execute.books()
IGNORED = "nbval-ignore-output"
every_book = pytest.mark.parametrize("path", BOOKS, ids=lambda p: str(p.relative_to(ROOT)))


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def faults(book) -> list[str]:
    """Return what is wrong with a notebook as it was committed."""
    found, cells = [], code_cells(book)
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("not executed from top to bottom")
    if "widgets" in book.metadata:
        found.append("widget state")
    for cell in cells:
        tags = cell.metadata.get("tags", [])
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in tags:
                found.append(f"an error: {output.evalue}")
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"stderr: {output.text}")
            shown = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            shown += "".join(output.get("traceback", []))
            if re.search(r"/(home|root|Users|tmp|work)/| at 0x[0-9a-f]{6}", shown):
                found.append(f"a path or an address: {shown}")
            if "image/png" in output.get("data", {}) and shown.startswith("<Figure"):
                found.append("a picture without its content in words")
    for cell in book.cells:
        if cell.cell_type == "markdown":
            found += [m[0] for m in re.finditer(r"!\[(.{0,14})\]\(", cell.source)]
    return found


@every_book
def test_is_executed_in_order_and_clean(path):
    assert faults(nbformat.read(path, as_version=4)) == []


@every_book
def test_is_normalized(path):
    book = nbformat.read(path, as_version=4)
    assert execute.text(execute.normalize(book)) == path.read_text(encoding="utf-8")


@every_book
def test_local_links_lead_somewhere(path):
    for cell in nbformat.read(path, as_version=4).cells:
        for target in re.findall(
            r"\]\(([^)#]+)\)", cell.source if cell.cell_type[0] == "m" else ""
        ):
            assert "://" in target or (path.parent / target).exists(), target


@every_book
def test_trained_numbers_are_asserted(path):
    """Where the text of a cell is not compared, an assert soon after says what matters."""
    cells = code_cells(nbformat.read(path, as_version=4))
    for i, cell in enumerate(cells):
        if IGNORED in cell.metadata.get("tags", []):
            assert any("assert " in later.source for later in cells[i : i + 4]), cell.source


@pytest.mark.parametrize(
    ("fault", "plant"),
    [
        ("not executed", lambda book: code_cells(book)[3].update(execution_count=None)),
        ("not executed", lambda book: code_cells(book)[3].update(execution_count=99)),
        ("widget state", lambda book: book.metadata.update(widgets={})),
        ("stderr", lambda book: code_cells(book)[1].outputs[0].update(name="stderr")),
        ("a path", lambda book: code_cells(book)[1].outputs[0].update(text="/home/me/x")),
    ],
)
def test_planted_faults_are_found(fault, plant):
    book = nbformat.read(BOOKS[0], as_version=4)
    plant(book)
    assert any(fault in found for found in faults(book))


def nbval(path: Path) -> str:
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-q", str(path)]
    quiet = os.environ | {"PYTEST_ADDOPTS": "-p no:cacheprovider -p no:xdist"}
    done = subprocess.run(command, capture_output=True, text=True, env=quiet, cwd=path.parent)
    return done.stdout.strip().splitlines()[-1]


def test_nbval_finds_a_planted_wrong_output_and_a_regeneration_changes_nothing(tmp_path):
    path = tmp_path / "small.ipynb"
    cells = ["x = sum(range(5))\nx", "print('a')\nprint('b')", "1 / 0"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    book.cells[2].metadata["tags"] = ["raises-exception"]
    nbformat.write(book, path)
    os.environ["COURSE_QUIET"] = "1"
    texts = [execute.text(execute.execute(path))]
    path.write_text(texts[0], encoding="utf-8")
    assert nbval(path).startswith("3 passed")
    texts.append(execute.text(execute.execute(path)))
    assert texts[0] == texts[1]
    path.write_text(texts[0].replace('"10"', '"11"'), encoding="utf-8")
    assert nbval(path).startswith("1 failed, 2 passed")


def test_a_regeneration_of_the_solutions_changes_nothing():
    path = ROOT / "notebooks" / "solutions" / "02_text_data.ipynb"
    assert execute.text(execute.execute(path)) == path.read_text(encoding="utf-8")
