"""Truth of the documentation: commands, configurations, links, tables and examples."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import io
import os
import pkgutil
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import typer
import yaml

import pipekit
from fork_server import run_pipekit, run_script
from gloo_workers import GlooWorkers
from hand_made import examples_at_work
from pipekit.cli import app
from pipekit.config import config_json_schema, load_config, parse_config
from pipekit.config.callbacks_config import CallbacksConfig
from pipekit.config.trial_config import parse_trial_config
from pipekit.models import find_families, preset_families
from pipekit.models.family import TransformerFamily
from pipekit.settings.faults import nested_section
from test_layering import ROOMS

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

README_LINES = [
    "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/pipekit train examples/gpt_stdlib.yaml",
    'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/pytest',
]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """Return the fenced blocks of all pages in some languages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            if match[1] in languages:
                line = text[: match.start()].count("\n") + 1
                found.append(Block(str(page.relative_to(ROOT)), line, match[1], match[2]))
    return found


def shell_lines() -> Iterator[tuple[str, str]]:
    """Yield `(place, line)` for each command in the pages: in blocks, after a `$` in transcripts, and in backticks."""
    for block in blocks("sh", "console"):
        for line in block.text.splitlines():
            if block.language == "sh" or line.startswith("$ "):
                yield str(block), line.removeprefix("$ ")
    for page in PAGES:
        for line in re.findall(r"`(pipekit [^`\n]+)`", page.read_text(encoding="utf-8")):
            yield page.name, line


def pipekit_commands() -> Iterator[tuple[str, list[str]]]:
    """Yield `(place, arguments)` for each use of the `pipekit` command in the pages."""
    for place, line in shell_lines():
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            for index, word in enumerate(words):
                if Path(word).name == "pipekit":
                    yield place, words[index + 1 :]
                    break


def test_there_is_something_to_check() -> None:
    assert len(EXAMPLES) >= 2
    assert len(PAGES) >= 10
    assert len(list(pipekit_commands())) >= 15
    assert {arguments[0] for _, arguments in pipekit_commands()} >= {"train", "export", "generate", "schema"}
    assert len(blocks("yaml")) >= 8
    assert len(blocks("python")) >= 6


@pytest.fixture(scope="module")
def at_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's working directory."""
    return examples_at_work(tmp_path_factory.mktemp("work"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path, at_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(at_work)
    config = load_config(path)
    assert config.run.dir == f"runs/{path.stem}"
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize(("place", "arguments"), list(pipekit_commands()), ids=str)
def test_every_command_parses(place: str, arguments: list[str], at_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if arguments[0] in ("--help", "--version"):
        return
    command = COMMANDS[arguments[0]]
    if len(arguments) == 1:  # the command is only spoken of
        return
    context = command.make_context(arguments[0], arguments[1:])
    if arguments[0] != "train":
        return
    monkeypatch.chdir(at_work)
    path = context.params["config"]
    if path == Path("runs/gpt_stdlib/config.yaml"):
        path = Path("examples/gpt_stdlib.yaml")
    if path.parts[0] == "examples":
        load_config(path, context.params["overrides"] or ())


def test_every_command_of_the_command_line_is_documented() -> None:
    assert {arguments[0] for _, arguments in pipekit_commands()} >= set(COMMANDS)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_every_yaml_block_loads(block: Block) -> None:
    sections = yaml.safe_load(block.text)
    if "exported/" in sections.get("model", {}).get("init_from", ""):
        return  # a model that the page makes before; tests/test_tutorials.py trains it
    if "trial" in sections:
        parse_trial_config(sections)
        return
    parse_config({"model": {"preset": "tiny"}, **sections, "train": {"steps": 300, **sections.get("train", {})}})


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_every_python_block_runs(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "examples")
    exec(compile(block.text, str(block), "exec"), {"__name__": "docs"})
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pipekit":
            getattr(pipekit, node.attr)


@pytest.mark.distributed
def test_the_trial_of_the_docs_trains(tmp_path: Path) -> None:
    page = "docs/custom-models.md"
    (trial,) = (block.text for block in blocks("python") if block.page == page and "WaveTrial" in block.text)
    (config,) = (block.text for block in blocks("yaml") if block.page == page and "WaveTrial" in block.text)
    (tmp_path / "my_trial.py").write_text(trial)
    (tmp_path / "c.yaml").write_text(config)
    done = run_pipekit(["train", "c.yaml", "train.steps=60"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = [yaml.safe_load(line) for line in (tmp_path / "runs/c/metrics.jsonl").read_text().splitlines()]
    assert records[-1]["val_loss"] < 0.2 * records[0]["val_loss"]
    assert records[-1]["val_mean_error"] > 0


@pytest.mark.distributed
def test_the_waves_of_the_docs_train_from_yaml_and_as_a_script(tmp_path: Path) -> None:
    page = "docs/trials.md"
    (trial,) = (block.text for block in blocks("python") if block.page == page and "WavesTrial" in block.text)
    config, *_ = (block.text for block in blocks("yaml") if block.page == page and "WavesTrial" in block.text)
    (tmp_path / "waves.py").write_text(trial)
    (tmp_path / "c.yaml").write_text(config)
    done = run_pipekit(["train", "c.yaml", "run.device=cpu"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_script(tmp_path / "waves.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for run, last in (("c", 100), ("waves", 200)):
        records = [yaml.safe_load(line) for line in (tmp_path / f"runs/{run}/metrics.jsonl").read_text().splitlines()]
        assert [each["step"] for each in records if "loss" in each] == list(range(25, last + 1, 25))
        losses = [each["val_loss"] for each in records if "val_loss" in each]
        assert len(losses) == 4
        assert losses[-1] < 0.9 * losses[0]


def run_plain_module(rank: int, folder: str) -> None:
    (script,) = (block for block in blocks("python") if "runs/plain" in block.text)
    os.chdir(folder)
    for _ in range(2):
        exec(compile(script.text, str(script), "exec"), {"__name__": "__main__"})


@pytest.mark.distributed
def test_the_plain_module_of_the_docs_trains_and_goes_on(gloo: GlooWorkers, tmp_path: Path) -> None:
    from pipekit.checkpoint.reader import CheckpointReader

    gloo.run(2, run_plain_module, str(tmp_path))
    for step, epoch in ((50, 0), (100, 1)):
        training = CheckpointReader(tmp_path / f"runs/plain/step-{step:08d}").manifest.training
        assert training.step == step
        assert training.client_state["client_state"] == {"epoch": epoch}


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def test_every_page_of_the_docs_is_reached_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme


def test_the_readme_and_ci_run_the_same_lines() -> None:
    readme = [line for block in blocks("sh") if block.page == "README.md" for line in block.text.splitlines()]
    assert [line for line in readme if "venv" in line] == README_LINES
    ci = [line.strip() for line in (ROOT / ".ci/run").read_text().splitlines()]
    assert [line for line in ci if line.startswith("python3 -m venv")] == README_LINES
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_the_readme_shows_the_plan_of_the_example() -> None:
    from rich.console import Console

    from pipekit.plan.decide import decide_run
    from pipekit.plan.resources import Resources
    from pipekit.training.console import show_plan
    from pipekit.training.language_model import LanguageModelTrial

    config = load_config(ROOT / "examples/gpt_stdlib.yaml", ["run.device=cpu"])
    config = config.updated({"model.vocab_size": config.data.vocab_size})
    plan = decide_run(config, LanguageModelTrial, Resources()).plan
    shown = io.StringIO()
    show_plan(plan, Console(file=shown, width=120, highlight=False))
    lines = [line.rstrip() for line in shown.getvalue().splitlines()]
    transcript = next(block.text for block in blocks("text") if "starting 2 processes" in block.text)
    assert "\n".join(lines).strip() in transcript


def page_tables(page: str) -> dict[str, dict[str, list[str]]]:
    """Return the rows of a page's tables by section heading and by first cell, without backticks."""
    tables: dict[str, dict[str, list[str]]] = {}
    heading = ""
    for line in (ROOT / page).read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").strip("`")
        elif line.startswith("| ") and not line.startswith("|---"):
            first, *rest = [cell.strip() for cell in line.strip("|").split(" | ")]
            tables.setdefault(heading, {})[first.strip("` ")] = [cell.strip("` ") for cell in rest]
    return tables


def setting_tables() -> dict[str, dict[str, list[str]]]:
    return {**page_tables("docs/models.md"), **page_tables("docs/configuration.md")}


PRESET_COLUMNS = ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_positions")


def documented_sections() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each section of the JSON schema that has keys of its own, with its properties."""
    schema = config_json_schema()
    for name, section in schema["properties"].items():
        for definition in re.findall(r"#/\$defs/(\w+)", str(section)):
            keys = schema["$defs"][definition]["properties"]
            if definition == "AutoFamily":  # has the keys of all families
                continue
            if "family" not in keys:
                yield name, keys
                continue
            shared = TransformerFamily.model_fields.keys()
            yield name, {key: facts for key, facts in keys.items() if key in shared and key != "family"}
            yield keys["family"]["default"], {key: facts for key, facts in keys.items() if key not in shared}
    for tracker in ("WandbConfig", "TrackioConfig"):
        yield "logging", schema["$defs"][tracker]["properties"]


@pytest.mark.parametrize(
    ("section", "keys"), list(documented_sections()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_key_is_documented_with_its_default(section: str, keys: dict[str, Any]) -> None:
    rows = setting_tables()[section]
    for key, facts in keys.items():
        assert key in rows, f"docs/configuration.md: section {section} has no row for {key}"
        documented = rows[key][0]
        if "default" not in facts:
            assert documented.startswith(("required", "of the preset", "4 x")), key
        elif (section, key) not in {("run", "dir"), ("model", "vocab_size")}:
            # YAML reads 1e-08 as text; the configuration takes it for a number.
            expected = facts["default"]
            read = float(documented) if isinstance(expected, float) else yaml.safe_load(documented)
            assert read == (list(expected) if isinstance(expected, tuple) else expected), f"{section}.{key}"


def test_the_table_of_shipped_callbacks_is_whole() -> None:
    rows = page_tables("docs/trials.md")["Shipped callbacks"]
    assert rows.keys() - {"key"} == CallbacksConfig.model_fields.keys()
    for key, setting in CallbacksConfig.model_fields.items():
        section = nested_section(setting.annotation)
        documented = re.findall(r"`(\w+)`", f"`{rows[key][-1]}`".replace("``", "`"))
        assert set(documented) == (set() if section is None else section.model_fields.keys())


def test_no_key_is_documented_that_is_not_there() -> None:
    tables = setting_tables()
    known: dict[str, set[str]] = {}
    for section, keys in documented_sections():
        known.setdefault(section, set()).update(keys)
    for section, keys in known.items():
        rows = set(tables[section]) - {"key", "family"}
        assert rows == keys, section


def test_the_table_of_presets_is_whole() -> None:
    tables = setting_tables()
    for name, family in preset_families().items():
        sizes = dict(family.presets[name])
        *row, other = tables["Presets"][name]
        assert row == [str(sizes.pop(key)) for key in PRESET_COLUMNS]
        assert (yaml.safe_load(other.strip("`")) or {}) == yaml.safe_load(yaml.safe_dump(sizes))


def test_the_page_of_families_has_a_row_for_each() -> None:
    tables = page_tables("docs/models.md")
    assert tables["Model families"].keys() - {"family"} == find_families().keys()
    proved = tables["What is proved"]
    families = [key for key in proved if key in find_families()]
    assert families == [key for key in tables["Model families"] if key != "family"], "in the same order"
    columns = [key for key in proved if key not in {*families, "family", "column"}]
    assert columns == proved["family"][:-1]


def test_tests_that_pages_name_are_there() -> None:
    named = [name for page in PAGES for name in re.findall(r"`(tests/[\w/.:]+)`", page.read_text(encoding="utf-8"))]
    assert len(named) > 6
    for name in named:
        path, _, function = name.partition("::")
        assert (ROOT / path).exists(), name
        assert not function or f"\ndef {function}(" in (ROOT / path).read_text(encoding="utf-8"), name


def importable_modules() -> list[str]:
    """Return the names of all modules; `models` and `partitioners` lie in folders of their own."""
    packages = [importlib.import_module(f"pipekit{below}") for below in ("", ".models", ".partitioners")]
    found = [
        info.name for package in packages for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    return sorted({*(package.__name__ for package in packages), *found})


@pytest.mark.parametrize("name", importable_modules())
def test_docstring_examples(name: str) -> None:
    if name.endswith((".__main__", ".launch.rank")):
        return
    if name == "pipekit.evaluation.harness":
        pytest.importorskip("lm_eval")
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def undocumented(module: ModuleType) -> list[str]:
    """Public names of a module without a docstring; methods may have that of the class they override."""
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    named = {name: value for name, value in own.items() if getattr(value, "__name__", None) == name and name[0] != "_"}
    missing = [name for name, value in named.items() if not value.__doc__]
    for name, cls in named.items():
        for member, value in vars(cls).items() if inspect.isclass(cls) else ():
            if member[0] != "_" and isinstance(value, _MEMBERS):
                above = [vars(base)[member] for base in cls.__mro__ if member in vars(base)]
                missing += [] if any(each.__doc__ for each in above) else [f"{name}.{member}"]
    return missing if module.__doc__ else ["the module", *missing]


_MEMBERS = (FunctionType, property, cached_property, classmethod, staticmethod)


@pytest.mark.parametrize("name", importable_modules())
def test_everything_public_has_a_docstring(name: str) -> None:
    if not name.endswith((".__main__", ".launch.rank", "evaluation.harness")):  # as above
        assert undocumented(importlib.import_module(name)) == []


def test_what_has_no_docstring_is_found() -> None:
    module = ModuleType("made")
    code = "class Base:\n    'B.'\n    def told(self): 'T.'\n    def untold(self): pass\n"
    exec(f"{code}class Child(Base):\n    def told(self): pass\ndef function(): pass\n_private = 1\n", vars(module))
    for value in (module.Base, module.Child, module.function):
        value.__module__ = "made"
    assert undocumented(module) == ["the module", "Child", "function", "Base.untold"]


def test_docstring_examples_are_found() -> None:
    assert len(importable_modules()) > 60
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = ("pipekit.layout", "pipekit.partitioners.minmax", "pipekit.models.gpt2", "pipekit.layers.specs")
    for name in names:
        module = importlib.import_module(name)
        assert any(test.examples for test in finder.find(module)), name


def test_the_architecture_lists_the_folders_of_every_floor() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for floor, rooms in ROOMS.items():
        (held,) = re.findall(rf"^\| {floor} [^|]+\|[^|]+\|([^|]+)\|$", text, flags=re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", held)) == set(rooms.split()) - {"__main__"}


def test_messages_of_troubleshooting_are_those_of_the_code() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "pipekit").rglob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))  # a text that goes over lines
    shown = [block for block in blocks("text") if block.page == "docs/troubleshooting.md"]
    assert len(shown) > 12
    for block in shown:
        if "CUDA out of memory" in block.text:
            continue  # torch's
        words = block.text.split()
        phrases = [" ".join(words[start : start + 3]) for start in range(1, len(words) - 2)]
        phrases = [phrase for phrase in phrases if not re.search(r"[\d/=;,:?()]|SIG", phrase)]
        unknown = [phrase for phrase in phrases if phrase not in code]
        assert len(phrases) > 2, block
        assert len(unknown) <= 0.5 * len(phrases), f"{block}: {unknown}"


def test_every_benchmark_has_its_place_among_the_results() -> None:
    results = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for script in (ROOT / "benchmarks").glob("*.py"):
        assert f"`python benchmarks/{script.name}" in results or f"benchmarks/{script.name} " in results, script.name
