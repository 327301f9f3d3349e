"""Compilers for DeepSpeed's C++ operators and for `train.compile`."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipekit.doctor.rows import Row, Site
from pipekit.launch.compiler import missing_for_compile

_COMPILE_S = 30.0
_PROGRAM = """\
#include <Python.h>
#include <vector>
extern "C" double total(int n) {
    std::vector<double> all(n, 1.0);
    double sum = 0;
#pragma omp parallel for reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += all[i];
    return sum;
}
"""


@dataclass(frozen=True)
class CompilerFacts:
    """Facts about a C++ compiler.

    Attributes:
        command: command of the compiler.
        is_there: whether it is in PATH.
        error: its error, if it could not build a library with OpenMP and Python's headers.
        has_ninja: whether ninja is in PATH.
    """

    command: str
    is_there: bool
    error: str | None
    has_ninja: bool


def check_operators(site: Site) -> list[Row]:
    """Tools that build DeepSpeed's operators, such as the Adam of `parallel.offload`."""
    return judge_operators(measure_compiler(site.environ))


def check_torch_compile(site: Site) -> list[Row]:
    """Tools that `train.compile` needs."""
    return judge_torch_compile(missing_for_compile(site.environ, "cuda" if site.num_gpus else "cpu"))


def measure_compiler(environ: Mapping[str, str]) -> CompilerFacts:
    """Compile a small library."""
    command, path = environ.get("CXX") or "c++", environ.get("PATH")
    program = shutil.which(command, path=path)
    error = None
    if program is not None:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "try.cpp")
            source.write_text(_PROGRAM)
            arguments = ["-shared", "-fPIC", "-fopenmp", "-O1", f"-I{sysconfig.get_path('include')}"]
            error = _error_of([program, *arguments, str(source), "-o", f"{folder}/try.so"], environ)
    return CompilerFacts(command, program is not None, error, shutil.which("ninja", path=path) is not None)


def judge_operators(facts: CompilerFacts) -> list[Row]:
    """Rows of the C++ compiler and ninja. Both are optional, because torch's Adam can replace DeepSpeed's."""
    slower = "parallel.offload uses torch's Adam, which is slower."
    if not facts.is_there:
        advice = f"Install a compiler, such as the package g++ ({facts.command} is not in PATH). Without it, {slower}"
        compiler = Row("C++ compiler", "warning", "missing", advice)
    elif facts.error is not None:
        needed = "Install OpenMP for the compiler, and Python's headers (a package such as python3-dev)."
        advice = f"{needed} Without it, {slower}"
        compiler = Row("C++ compiler", "warning", f"{facts.command} cannot build a library: {facts.error}", advice)
    else:
        compiler = Row("C++ compiler", "ok", f"{facts.command} builds libraries with OpenMP and Python's headers")
    if facts.has_ninja:
        return [compiler, Row("ninja", "ok", "present")]
    advice = f"Type: pip install ninja, and add its folder to PATH. Without it, {slower}"
    return [compiler, Row("ninja", "warning", "is not in PATH; DeepSpeed needs it to build operators", advice)]


def judge_torch_compile(missing: str | None) -> list[Row]:
    """Row of the tools that `train.compile` needs."""
    if missing is None:
        return [Row("torch.compile", "ok", "has all tools that it needs")]
    return [Row("torch.compile", "warning", missing, "Install it before you set train.compile=true.")]


def _error_of(command: list[str], environ: Mapping[str, str]) -> str | None:
    try:
        done = subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=_COMPILE_S)
    except subprocess.TimeoutExpired:
        return f"compiling takes more than {_COMPILE_S:.0f} s"
    except OSError as error:
        return str(error.strerror)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    first = next((line for line in lines if "error" in line), lines[0] if lines else f"exit code {done.returncode}")
    return first.partition("error: ")[2] or first
