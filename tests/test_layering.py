"""Imports go downward only, and each dependency stays where it belongs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ROOMS: dict[int, str] = {
    # 0: pure.
    0: "errors number_text storage line_files files run_lock progress rng signals layout settings schedules hangs "
    "partitioners predictions",
    # 1: torch, no processes.
    1: "tensors tensor_parallel layers models optimizers config data costs checkpoint plan pages tune inference",
    # 2: processes.
    2: "distributed deepspeed engine step_profile evaluation training verify",
    # 3: face.
    3: "launch doctor commands api compat cli __main__",
}
"""The folders and loose modules of the library by floor; `pipekit` itself stands on the highest."""

FLOORS = {f"pipekit.{room}": floor for floor, rooms in ROOMS.items() for room in rooms.split()} | {"pipekit": 3}

# What a floor may import beside the standard library, pipekit, and what the floors below it may.
LIBRARIES: dict[int, set[str]] = {
    0: {"numpy", "pydantic", "pydantic_core", "yaml"},
    1: {"torch", "einops", "safetensors", "tokenizers", "transformers", "filelock", "xxhash", "jinja2"},
    2: {"deepspeed", "rich", "wandb"},
    3: {"typer"},
}

# Drawing pictures is pure, and loads its library only when it draws; the hub's library comes with transformers.
MAY_ALSO_IMPORT = {
    "pipekit.data.conversations": {"jinja2"},
    "pipekit.data.tokenizer_conversion": {"huggingface_hub"},
    "pipekit.schedules.draw": {"matplotlib"},
    "pipekit.training.shipped.loss_curve": {"matplotlib"},
    "pipekit.training.shipped.trackio": {"trackio"},
    "pipekit.tune.lr_range": {"matplotlib"},
    # An extra, which nothing else needs.
    "pipekit.evaluation.harness": {"lm_eval"},
}

# The tokenizers library is told in no other way that a later fork is safe; and the user's settings of the C library go
# before ours.
MAY_READ_ENVIRONMENT = {"pipekit.data.tokenizer", "pipekit.tensors.host_memory"}


@dataclass(frozen=True)
class Import:
    """One import statement, of `name`, in a module."""

    module: str
    name: str
    line: int
    only_for_types: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.name}"


@cache
def modules() -> dict[str, Path]:
    """Return the files of the library by import name."""
    folders = {"pipekit": "pipekit", "models": "pipekit.models", "partitioners": "pipekit.partitioners"}
    found = {}
    for folder, prefix in folders.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([prefix, *parts])
            found[name.removesuffix(".__init__")] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def room_of(module: str) -> str:
    """Return the folder or the loose module that a module is in."""
    return ".".join(module.split(".")[:2])


def floor_of(module: str) -> int:
    """Return the floor of the room that a module is in."""
    assert room_of(module) in FLOORS, f"{module} stands on no floor: add its folder to ROOMS in {Path(__file__).name}"
    return FLOORS[room_of(module)]


def imports(module: str) -> Iterator[Import]:
    """Yield what a module imports, at its top and inside functions; a name taken from a package is its submodule."""
    for_types = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for_types |= {id(below) for statement in node.body for below in ast.walk(statement)}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            assert node.module is not None
            joined = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules() or name == "torch.distributed" else node.module for name in joined]
        else:
            continue
        for name in names:
            yield Import(module, name, node.lineno, id(node) in for_types)


def all_imports() -> list[Import]:
    return [found for module in modules() for found in imports(module)]


def test_the_floors_are_about_modules_that_exist() -> None:
    assert len(modules()) > 50
    assert set(FLOORS) == {room_of(module) for module in modules()}
    assert len(all_imports()) > 300


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_from_its_own_floor_and_those_below(module: str) -> None:
    floor = floor_of(module)
    for found in imports(module):
        if found.only_for_types:
            continue
        root = found.name.partition(".")[0]
        if root == "pipekit":
            assert found.name in modules(), f"{found}, which is not there"
            assert floor_of(found.name) <= floor, f"{found}: floor {floor} imports floor {floor_of(found.name)}"
        elif root not in sys.stdlib_module_names:
            allowed = set().union(*(LIBRARIES[level] for level in range(floor + 1)), MAY_ALSO_IMPORT.get(module, set()))
            assert root in allowed, f"{found}: not allowed on floor {floor}"


def test_no_circle_of_imports_between_folders() -> None:
    """Folders can be put in a row in which each imports from those before it alone, lazily or not."""
    edges = {
        (room_of(found.module), room_of(found.name)): str(found)
        for found in all_imports()
        if found.name in modules() and not found.only_for_types and room_of(found.module) != room_of(found.name)
    }
    while True:
        importing, imported = ({edge[end] for edge in edges} for end in (0, 1))
        in_circles = {edge: text for edge, text in edges.items() if edge[0] in imported and edge[1] in importing}
        if in_circles == edges:
            break
        edges = in_circles
    assert not edges, "\n".join(edges.values())


def test_deepspeed_is_imported_by_its_adapter_and_the_engine_alone() -> None:
    users = {found.module for found in all_imports() if found.name.partition(".")[0] == "deepspeed"}
    assert users
    rooms = ("pipekit.deepspeed.", "pipekit.engine.", "pipekit.distributed.")
    assert {user for user in users if not user.startswith(rooms)} == set()


def _is_torch_distributed(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "distributed" and ast.unparse(node) == "torch.distributed"


def test_torch_distributed_is_used_on_floor_2_alone() -> None:
    users = {found.module for found in all_imports() if found.name.startswith("torch.distributed")}
    for module in modules():
        users |= {module for node in ast.walk(tree(module)) if _is_torch_distributed(node)}
    assert users
    assert {user for user in users if floor_of(user) != 2} == set()


def test_models_and_partitioners_are_imported_under_pipekit() -> None:
    bare = [str(found) for found in all_imports() if found.name.partition(".")[0] in ("models", "partitioners")]
    for path in sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "examples").rglob("*.py")):
        found = re.findall(r"^ *(?:from|import) ((?:models|partitioners)\b.*)", path.read_text(encoding="utf-8"), re.M)
        bare += [f"{path.name}: {name}" for name in found]
    assert bare == []


def test_the_environment_is_read_by_the_launcher_alone() -> None:
    readers = set()
    for module in modules():
        for node in ast.walk(tree(module)):
            by_attribute = isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "os.environ",
                "os.getenv",
                "os.putenv",
                "os.unsetenv",
            )
            by_name = isinstance(node, ast.ImportFrom) and node.module == "os"
            if by_attribute or by_name:
                readers.add(module)
    readers = {reader for reader in readers if room_of(reader) not in ("pipekit.launch", "pipekit.commands")}
    assert readers == MAY_READ_ENVIRONMENT


def test_the_library_does_not_print() -> None:
    prints = [
        f"{module}:{node.lineno}"
        for module in modules()
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert prints == []


def imported_by(code: str) -> set[str]:
    """Return the top-level modules that a fresh process has imported after running `code`."""
    report = "import sys; sys.stdout.write(' '.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return set(done.stdout.split())


HEAVY = {"torch", "deepspeed", "transformers", "numpy"}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import pipekit", HEAVY | {"pydantic", "yaml", "typer", "rich"}),
        ("import pipekit.cli", HEAVY | {"pydantic", "yaml"}),
        ("import pipekit; pipekit.load_config('examples/gpt_stdlib.yaml')", HEAVY),
        ("import pipekit; pipekit.Layout(pp=2).groups('pipe')", HEAVY | {"pydantic"}),
        ("import pipekit.commands.train", HEAVY | {"pydantic", "yaml"}),
        ("import pipekit.schedules, pipekit.plan.run_folder", {"torch", "deepspeed"}),
        ("import pipekit.optimizers.learning_rates, pipekit.optimizers.table", HEAVY),
        ("import pipekit.partitioners, pipekit.checkpoint.manifest, pipekit.data.order", {"torch", "deepspeed"}),
        (
            "import pipekit.plan.decide, pipekit.inference.generator, pipekit.training.prepare",
            {"deepspeed"},
        ),
        ("import pipekit.models; pipekit.models.find_families()", {"torch", "deepspeed"}),
        ("import pipekit, pipekit.data; pipekit.overwrite_deepspeed_config", {"torch", "deepspeed"}),
    ],
)
def test_heavy_libraries_are_not_imported_before_they_are_needed(code: str, absent: set[str]) -> None:
    assert imported_by(code) & absent == set()
