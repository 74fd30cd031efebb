"""Run notebooks top to bottom and save their outputs, the same bytes every time (`make notebooks`).

Usage: execute.py [NOTEBOOK ...]; without arguments, every chapter and every solution.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

from support.data import write_atomic

ROOT = Path(__file__).resolve().parents[2]
WIDGET = "application/vnd.jupyter.widget-view+json"


def books(root: Path = ROOT) -> list[Path]:
    """Return every notebook of the course, chapters first."""
    return sorted((root / "notebooks").glob("*.ipynb")) + sorted(
        (root / "notebooks" / "solutions").glob("*.ipynb")
    )


def normalize(book):
    """Take out of a notebook what differs from run to run and says nothing to a reader."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for cell in book.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags" and v}
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)  # points to a kernel that is gone
            output.pop("transient", None)
    book.nbformat, book.nbformat_minor = 4, 5
    return book


def text(book) -> str:
    return nbformat.writes(book) + "\n"


def execute(path: Path):
    """Return the notebook at `path`, run and normalized; nothing is written.

    What a cell tagged `timing` printed is kept, for no two runs take equally long; clear its output
    to measure anew.
    """
    book = nbformat.read(path, as_version=4)
    timed = {c.id: c.outputs for c in book.cells if "timing" in c.metadata.get("tags", [])}
    client = NotebookClient(
        book,
        timeout=600,
        kernel_name="python3",
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    for cell in book.cells:
        if timed.get(cell.id):
            cell.outputs = timed[cell.id]
    return normalize(book)


def main(paths: list[Path]) -> None:
    os.environ["COURSE_QUIET"] = "1"
    for path in (bar := tqdm(paths, desc="notebooks")):
        bar.set_postfix_str(path.name)
        start = time.perf_counter()
        result = text(execute(path))
        write_atomic(path, result.encode())
        tqdm.write(f"{time.perf_counter() - start:6.1f} s  {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main([Path(p).resolve() for p in sys.argv[1:]] or books())
