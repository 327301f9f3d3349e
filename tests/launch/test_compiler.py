"""The environment of compiled layers: what is missing is said before anything starts."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from pipekit.config import Config, parse_config
from pipekit.errors import LaunchError
from pipekit.launch import compiler
from pipekit.launch.compiler import compiler_environ


def config(*, compile_layers: bool = True) -> Config:
    train = {"steps": 1, "compile": compile_layers}
    return parse_config({"model": {"preset": "tiny"}, "run": {"dir": "here"}, "train": train})


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A machine with g++, gcc, Python's headers and Triton."""
    for name in ("g++", "gcc", "clang++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(compiler, "find_spec", lambda name: object())
    return {"PATH": str(tmp_path), "OMP_NUM_THREADS": "3"}


def test_nothing_is_asked_for_where_nothing_is_compiled() -> None:
    assert compiler_environ(config(compile_layers=False), {"PATH": ""}, device="cpu") == {}


def test_compiled_code_is_kept_in_the_run_folder_unless_the_user_says_otherwise(tools: dict[str, str]) -> None:
    expected = {
        "TORCHINDUCTOR_CACHE_DIR": str(Path("here").absolute() / "compiled"),
        "TORCHINDUCTOR_COMPILE_THREADS": "3",
    }
    assert compiler_environ(config(), tools, device="cpu") == expected
    own = {"TORCHINDUCTOR_CACHE_DIR": "/elsewhere"}
    assert compiler_environ(config(), {**tools, **own}, device="cuda") == {"TORCHINDUCTOR_COMPILE_THREADS": "3"}


def test_a_missing_compiler_is_named(tools: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchError, match=r"train\.compile=true: torch compiles with my-c\+\+ .*CXX.*not in PATH"):
        compiler_environ(config(), {**tools, "CXX": "my-c++"}, device="cpu")
    with pytest.raises(LaunchError, match=r"gcc or clang .*CC.*not in PATH"):
        compiler_environ(config(), {**tools, "PATH": "/nowhere"}, device="cuda")
    (tmp_path / "Python.h").unlink()
    with pytest.raises(LaunchError, match=r"has no Python\.h"):
        compiler_environ(config(), tools, device="cpu")
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r"no package triton; install it, or set train\.compile=false"):
        compiler_environ(config(), tools, device="cuda")
