"""Verdicts on compilers, and what a small program finds out about one."""

from __future__ import annotations

from pathlib import Path

from pipekit.doctor.checks.compilers import CompilerFacts, judge_operators, judge_torch_compile, measure_compiler


def test_a_compiler_that_is_missing_is_a_warning_which_says_what_is_lost() -> None:
    facts = measure_compiler({"PATH": "", "CXX": "no-such-compiler"})
    assert facts == CompilerFacts("no-such-compiler", is_there=False, error=None, has_ninja=False)
    compiler, ninja = judge_operators(facts)
    assert (compiler.verdict, compiler.found) == ("warning", "missing")
    assert "no-such-compiler is not in PATH" in compiler.advice
    assert "torch's Adam" in compiler.advice
    assert (ninja.check, ninja.verdict) == ("ninja", "warning")


def test_a_compiler_that_makes_no_library_is_a_warning_with_its_error(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\necho 'try.cpp:1:10: fatal error: Python.h: No such file or directory' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    facts = measure_compiler({"PATH": f"{tmp_path}:/bin"})
    assert facts.error == "Python.h: No such file or directory"
    assert judge_operators(facts)[0].verdict == "warning"


def test_a_compiler_that_works_is_well() -> None:
    rows = judge_operators(CompilerFacts("c++", is_there=True, error=None, has_ninja=True))
    assert [row.verdict for row in rows] == ["ok", "ok"]


def test_what_torch_compile_would_miss_is_a_warning() -> None:
    assert judge_torch_compile(None)[0].verdict == "ok"
    (row,) = judge_torch_compile("torch compiles with g++, which is not in PATH")
    assert row.verdict == "warning"
