"""The glossary names what is in the code, and docstrings begin with the thing that they describe."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")

ENTRIES = re.findall(r"^\| ([^|]+) \| ([^|]+) \| `([\w.]+)` in `(\w+)` \|$", GLOSSARY, flags=re.MULTILINE)
"""Each word of the glossary, with its meaning, the name in the code and the folder."""

_OPENS_WITH_A_QUESTION = re.compile(
    r"(?:(?:Return|Returns|Yield|Yields|Say|Says) )?(?:what|whether|which|how)\b", flags=re.IGNORECASE
)


@cache
def files_of(room: str) -> list[Path]:
    """Return the modules of a folder of the library, or a loose module."""
    top = room if room in ("models", "partitioners") else f"pipekit/{room}"
    return sorted((ROOT / top).rglob("*.py")) or [ROOT / f"{top}.py"]


@cache
def names_in(room: str) -> set[str]:
    """Names that a folder defines: `name` at the top of a module, and `Class.name`."""
    names: set[str] = set()
    for path in files_of(room):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names |= set(_defined(node))
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{name}" for below in node.body for name in _defined(below)}
    return names


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    yield from (target.id for target in targets if isinstance(target, ast.Name))


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of every docstring of a module, those under its names and fields included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        body: list[ast.stmt] = getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []
        before: list[ast.stmt | None] = [None, *body]
        for statement, earlier in zip(body, before, strict=False):
            documents = isinstance(earlier, ast.Assign | ast.AnnAssign) or (
                earlier is None and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            )
            if documents and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                text = statement.value.value
                if isinstance(text, str):
                    yield statement.lineno, text.strip()


def test_every_row_of_the_glossary_names_its_code() -> None:
    rows = [line for line in GLOSSARY.splitlines() if line.startswith("| ") and not line.startswith("| word")]
    assert len(rows) == len(ENTRIES) > 50
    words = [word for word, *_ in ENTRIES]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize(("name", "room"), [entry[2:] for entry in ENTRIES], ids=lambda text: str(text))
def test_every_name_of_the_glossary_exists(name: str, room: str) -> None:
    assert name in names_in(room), f"docs/glossary.md: there is no {name} in {room}"


def rooms() -> list[str]:
    return sorted({path.stem for path in (ROOT / "pipekit").iterdir() if path.suffix == ".py" or path.is_dir()})


@pytest.mark.parametrize("room", [*rooms(), "models", "partitioners"])
def test_docstrings_open_with_a_noun_to_search_for(room: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in files_of(room)
        if path.is_file()
        for line, text in docstrings(path)
        if _OPENS_WITH_A_QUESTION.match(text)
    ]
    assert not found, "\n".join(found)
