"""The user's own model."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from deepspeed.pipe import LayerSpec as DeepSpeedLayerSpec
from deepspeed.pipe import TiedLayerSpec as DeepSpeedTiedLayerSpec
from torch import nn

from pipekit.config import parse_config
from pipekit.errors import ConfigError
from pipekit.layers.specs import LayerSpec
from pipekit.models import build_layers
from pipekit.models.custom import call_with_config, check_specs, load_object

_numbers = count()

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a module into the working directory, and return its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    names: list[str] = []

    def write_module(text: str) -> str:
        names.append(f"users_model_{next(_numbers)}")
        (tmp_path / f"{names[-1]}.py").write_text(text)
        return names[-1]

    yield write_module
    for name in names:
        sys.modules.pop(name, None)


def build(builder: str, **args: object) -> list[LayerSpec]:
    return build_layers(parse_config({"model": {"builder": builder, "args": args}, "train": {"steps": 1}}))


def test_the_builder_gets_the_configuration(write: Write) -> None:
    module = write(
        "from torch import nn\n"
        "from pipekit import LayerSpec\n"
        "def layers(config):\n"
        "    return [LayerSpec(nn.Linear, config.model.args['width'], config.train.steps)]\n"
    )
    assert [repr(spec) for spec in build(f"{module}:layers", width=64)] == ["LayerSpec(Linear, 64, 1)"]


def test_a_module_beside_the_builders_is_found_even_inside_the_function(write: Write) -> None:
    helper = write("WIDTH = 8\n")
    module = write(
        "from torch import nn\n"
        "from pipekit import LayerSpec\n"
        "def layers(config):\n"
        f"    from {helper} import WIDTH\n"
        "    return (LayerSpec(nn.Linear, WIDTH, 2),)\n"
    )
    assert build(f"{module}:layers")[0].module_args == (8, 2)


def test_a_method_in_a_class_is_found(write: Write) -> None:
    module = write("class Outer:\n    value = 7\n")
    assert load_object(f"{module}:Outer.value", key="run.trial") == 7


def test_a_missing_module_is_named_with_the_directory(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        build("no_such_package.model:layers")
    assert str(caught.value) == (
        "model.builder=no_such_package.model:layers: no module named 'no_such_package' in the working "
        "directory "
        f"({tmp_path}) or the environment; start pipekit where the module lies, or install its package"
    )


def test_a_module_that_imports_a_missing_one_is_told_apart(write: Write) -> None:
    module = write("import no_such_dependency\n")
    with pytest.raises(ConfigError, match=f"importing {module} failed: No module named 'no_such_dependency'"):
        build(f"{module}:layers")


def test_a_fault_in_the_users_module_has_its_place(write: Write) -> None:
    module = write("1 / 0\n")
    with pytest.raises(ConfigError, match=rf"importing {module} failed in .*{module}\.py:1: ZeroDivisionError"):
        build(f"{module}:layers")


def test_a_fault_in_the_users_function_has_its_place(write: Write) -> None:
    module = write("def layers(config):\n    raise KeyError('mine')\n")
    with pytest.raises(ConfigError, match=rf"layers: it failed in .*{module}\.py:2: KeyError: 'mine'"):
        build(f"{module}:layers")


def test_a_fault_in_the_importing_of_a_module_has_the_place_of_the_users_line(write: Write) -> None:
    module = write("import importlib\ndef layers(config):\n    importlib.import_module('no_such_dependency')\n")
    with pytest.raises(ConfigError, match=rf"failed in .*{module}\.py:3: ModuleNotFoundError"):
        build(f"{module}:layers")


def test_a_function_that_is_called_with_what_it_cannot_take_has_no_place_in_pipekit() -> None:
    with pytest.raises(ConfigError, match=r"numpy:int64: it failed: TypeError"):
        call_with_config("numpy:int64", parse_config({"model": {"preset": "tiny"}, "train": {"steps": 1}}), key="k")


def test_the_standard_library_is_refused_unless_a_file_of_the_users_hides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("subprocess", "sys", "tabnanny", "xml.dom"):
        with pytest.raises(ConfigError, match=f"{module} is a module of Python's standard library"):
            load_object(f"{module}:run", key="model.builder")
    assert "tabnanny" not in sys.modules, "it is not imported"
    (tmp_path / "tabnanny.py").write_text("run = 3\n")
    importlib.invalidate_caches()
    monkeypatch.setitem(sys.modules, "tabnanny", None)
    monkeypatch.delitem(sys.modules, "tabnanny")
    assert load_object("tabnanny:run", key="model.builder") == 3


def test_a_missing_function_gets_a_suggestion(write: Write) -> None:
    module = write("def build_layers(config): return []\n")
    with pytest.raises(ConfigError, match=rf"{module}\.py has no 'biuld_layers'; did you mean 'build_layers'\?"):
        build(f"{module}:biuld_layers")


@pytest.mark.parametrize("path", ["module", "module:", ":name"])
def test_a_path_that_names_nothing_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"^run\.trial=.* must name a module and something in it"):
        load_object(path, key="run.trial")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("layers = 3", "is 3, and must be a function that takes the configuration"),
        (
            "def layers(): return []",
            r"is called with one argument, the configuration, and takes \(\); write def layers",
        ),
        ("def layers(config): return None", "it returned None, and must return a list of LayerSpec"),
        ("def layers(config): return []", "it returned an empty list, and must return"),
        ("def layers(config): yield 1", "it returned generator, and must return"),
        ("def layers(config): return [3]", "it returned 3 as layer 0; write LayerSpec"),
    ],
)
def test_what_is_no_model_is_refused(write: Write, body: str, message: str) -> None:
    module = write(body + "\n")
    with pytest.raises(ConfigError, match=rf"^model\.builder={module}:layers: {message}"):
        build(f"{module}:layers")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Linear, r"the class Linear as layer 1; write LayerSpec\(Linear, \.\.\.\) with its arguments"),
        (nn.Linear(2, 2), r"Linear as layer 1; it is built already: write LayerSpec\(Linear, \.\.\.\)"),
        (lambda x: x, "function as layer 1; put the function in the forward of an nn.Module"),
        (DeepSpeedLayerSpec(nn.Linear, 2, 2), "DeepSpeed's LayerSpec: write from pipekit import LayerSpec, which"),
        (DeepSpeedTiedLayerSpec("k", nn.Linear, 2, 2), "DeepSpeed's TiedLayerSpec: write from pipekit import Tied"),
        (None, "None as layer 1; write LayerSpec"),
    ],
)
def test_a_layer_that_is_no_spec_is_named_with_what_to_write(layer: object, message: str) -> None:
    specs = [LayerSpec(nn.Linear, 2, 2), layer]
    with pytest.raises(ConfigError, match=f"^mine returned .*{message}"):
        check_specs(specs, where="mine")  # type: ignore[arg-type]
