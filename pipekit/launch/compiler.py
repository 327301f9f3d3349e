"""Environment of `train.compile`: a compiler, and a folder for compiled code."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pipekit.errors import LaunchError

if TYPE_CHECKING:
    from pipekit.config import Config


def compiler_environ(config: Config, environ: Mapping[str, str], *, device: str) -> dict[str, str]:
    """Environment variables with which torch compiles the layers of a run; none without `train.compile`.

    Compiled code is kept in the run folder, and a process compiles with its number of threads, where the user has not
    set it otherwise.

    Raises:
        LaunchError: if something is missing that torch compiles with; it says what.
    """
    if not config.train.compile:
        return {}
    missing = missing_for_compile(environ, device)
    if missing:
        raise LaunchError(f"train.compile=true: {missing}; install it, or set train.compile=false")
    defaults = {
        "TORCHINDUCTOR_CACHE_DIR": str(Path(config.run.dir).absolute() / "compiled"),
        "TORCHINDUCTOR_COMPILE_THREADS": environ.get("OMP_NUM_THREADS", "1"),
    }
    return {name: value for name, value in defaults.items() if name not in environ}


def missing_for_compile(environ: Mapping[str, str], device: str) -> str | None:
    """Name of what torch would miss when it compiles; None if nothing.

    Source: torch/_inductor/cpp_builder.py (`get_cpp_compiler`); triton/runtime/build.py.
    """
    if device == "cuda" and find_spec("triton") is None:
        return "torch compiles for GPUs with Triton, and this Python has no package triton"
    if device == "cuda":
        names, variable = ["gcc", "clang"], "CC"
    else:
        names, variable = ["clang++" if sys.platform == "darwin" else "g++"], "CXX"
    names = [environ[variable]] if environ.get(variable) else names
    if not any(shutil.which(name, path=environ.get("PATH")) for name in names):
        return f"torch compiles with {' or '.join(names)} (the variable {variable} names another), which is not in PATH"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        return (
            f"torch compiles with the headers of Python, and {headers} has no Python.h (a package such as python3-dev)"
        )
    return None
