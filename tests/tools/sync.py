"""Keep the definitions in the notebooks equal to those in `support` (`make sync` rewrites them).

A class, a function or an UPPER_CASE constant that a notebook defines under a name which `support`
has too must have the same syntax tree; comments, formatting and docstrings are free. Cells tagged
`draft` are exempt, and so are solutions, which define the reader's own functions.
"""

import ast
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]


def named(node: ast.stmt) -> str | None:
    """Return the name that a top-level statement defines, if it is one that is kept in sync."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id if node.targets[0].id.isupper() else None
    return None


def shape(node: ast.stmt) -> str:
    """Return the syntax tree of a definition as text, without docstrings."""
    node = ast.parse(ast.unparse(node)).body[0]
    for inner in ast.walk(node):
        if (
            isinstance(inner, ast.FunctionDef | ast.ClassDef)
            and ast.get_docstring(inner) is not None
        ):
            inner.body = inner.body[1:] or [ast.Pass()]
    return ast.dump(node)


def short(node: ast.stmt, source: str) -> str:
    """Return a definition's source as a notebook shows it: docstrings cut to their first line."""
    lines = source.splitlines()
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(d.lineno for d in decorators)])
    for inner in reversed(list(ast.walk(node))):
        if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner):
            doc = inner.body[0]
            if doc.end_lineno > doc.lineno:
                lines[doc.lineno - 1] = lines[doc.lineno - 1].rstrip() + '"""'
                lines[doc.lineno : doc.end_lineno] = [None] * (doc.end_lineno - doc.lineno)
    return "\n".join(x for x in lines[first - 1 : node.end_lineno] if x is not None)


def package(root: Path = ROOT) -> dict[str, tuple[ast.stmt, str]]:
    """Return every top-level definition in `support`: name -> (syntax tree, shown source)."""
    found = {}
    for path in sorted((root / "support").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if name := named(node):
                found[name] = (node, short(node, source))
    return found


def statements(cell) -> list[ast.stmt]:
    """Return the statements of a code cell; magics and shell lines count as blank."""
    lines = cell.source.splitlines()
    return ast.parse("\n".join("" if x.lstrip()[:1] in ("%", "!") else x for x in lines)).body


def taught(path: Path, names) -> list[tuple[int, ast.stmt]]:
    """Return (cell number, syntax tree) of the definitions in a notebook that `support` has too."""
    cells = nbformat.read(path, as_version=4).cells
    return [
        (i, node)
        for i, cell in enumerate(cells)
        if cell.cell_type == "code" and "draft" not in cell.metadata.get("tags", [])
        for node in statements(cell)
        if named(node) in names
    ]


def chapters(root: Path = ROOT) -> list[Path]:
    return sorted((root / "notebooks").glob("*.ipynb"))


def drifts(root: Path = ROOT) -> list[str]:
    """Return one sentence for each definition that differs, or that two chapters define."""
    ours, seen, problems = package(root), {}, []
    for path in chapters(root):
        for i, node in taught(path, ours):
            name = named(node)
            if shape(node) != shape(ours[name][0]):
                problems.append(f"{path.name}, cell {i}: {name} differs from support's.")
            if name in seen:
                problems.append(f"{path.name}, cell {i}: {name} is also built in {seen[name]}.")
            seen[name] = path.name
    return problems


def rewrite(path: Path, ours: dict) -> int:
    """Put support's source in place of each definition in the notebook that differs."""
    book, changed = nbformat.read(path, as_version=4), 0
    for i, node in reversed(taught(path, ours)):
        theirs, source = ours[named(node)]
        if shape(node) != shape(theirs):
            lines = book.cells[i].source.splitlines()
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            lines[first - 1 : node.end_lineno] = source.splitlines()
            book.cells[i].source = "\n".join(lines)
            changed += 1
    if changed:
        path.write_text(nbformat.writes(book) + "\n", encoding="utf-8")
    return changed


if __name__ == "__main__":
    for path in chapters():
        if changed := rewrite(path, package()):
            print(f"{path.name}: {changed} definitions rewritten; run `make notebooks` next.")
    sys.exit("\n".join(drifts()) or 0)
