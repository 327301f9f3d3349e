"""The package as it is installed: its names, its files, its metadata."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pipekit

ROOT = Path(__file__).resolve().parents[1]


def pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def listed(key: str) -> list[str]:
    """Return the strings of a list in pyproject.toml."""
    match = re.search(rf"^{key} = (\[.*?^\])", pyproject(), flags=re.MULTILINE | re.DOTALL)
    assert match is not None, key
    values: list[str] = ast.literal_eval(match[1])
    return values


def test_every_subpackage_is_listed() -> None:
    packages = set()
    for folder in ("pipekit", "models", "partitioners", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            packages.add(".".join(path.parent.relative_to(ROOT).parts))
    inside = {name if name.startswith("pipekit") else f"pipekit.{name}" for name in packages}
    assert sorted(listed("packages")) == sorted(inside)


def test_every_package_has_its_init_file() -> None:
    for package in listed("packages"):
        below = package.removeprefix("pipekit.").replace(".", "/")
        folder = ROOT if below.startswith(("models", "partitioners", "examples")) else ROOT / "pipekit"
        assert (folder / below / "__init__.py").is_file() or package == "pipekit", package


def test_every_public_name_is_there_and_documented() -> None:
    assert set(pipekit.__all__) == set(pipekit._HOMES)
    assert pipekit.__all__ == sorted(pipekit.__all__)
    for name in pipekit.__all__:
        value = getattr(pipekit, name)
        assert value.__name__.removeprefix("pipekit.") == name
        assert inspect.getdoc(value)
        assert name in dir(pipekit)
    assert not hasattr(pipekit, "no_such_name")


def test_the_names_for_type_checkers_are_the_same() -> None:
    tree = ast.parse((ROOT / "pipekit/__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    homes = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert homes == pipekit._HOMES


def test_the_version_is_one() -> None:
    version = re.search(r'^version = "(.+)"$', pyproject(), flags=re.MULTILINE)
    assert version is not None
    assert pipekit.__version__ == metadata.version("pipekit") == version[1]
    done = subprocess.run(
        [sys.executable, "-m", "pipekit", "--version"], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == version[1]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    known = rf"^## \[{re.escape(version[1])}\]|^These changes will be in {re.escape(version[1])}\."
    assert re.search(known, changelog, flags=re.MULTILINE)


def test_the_command_is_installed() -> None:
    (command,) = metadata.entry_points(group="console_scripts", name="pipekit")
    assert command.value == "pipekit.cli:main"


def test_types_and_licence_are_shipped() -> None:
    assert (Path(inspect.getfile(pipekit)).parent / "py.typed").is_file()
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert metadata.metadata("pipekit")["License-Expression"] == "Apache-2.0"


def test_every_dependency_is_used_and_every_import_is_a_dependency() -> None:
    names = {re.match(r"[\w-]+", entry)[0] for entry in listed("dependencies")}  # type: ignore[index]
    imported = set()
    for folder in ("pipekit", "models", "partitioners"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add((node.module or "").partition(".")[0])
    distributions = {"yaml": "pyyaml", "pydantic_core": "pydantic", "huggingface_hub": "huggingface-hub"}
    # Of the optional ones, TensorBoard is imported through torch.
    optional = {"matplotlib", "lm_eval", "trackio"}
    assert optional <= imported
    third_party = imported - set(sys.stdlib_module_names) - {"pipekit"} - optional
    assert {distributions.get(name, name) for name in third_party} == names
