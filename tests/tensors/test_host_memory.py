"""Freed memory stays with the process, and what the environment asks for goes first."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from pipekit.tensors.host_memory import keep_freed_memory
import torch

def count_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [torch.ones(3_000_000) for _ in range(10)]
    del pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

was_set = keep_freed_memory()
for _ in range(4):
    count_faults()
print(was_set, count_faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")
@pytest.mark.parametrize("environment", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_memory_that_was_used_before_costs_no_page_faults(environment: dict[str, str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={"PATH": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    was_set, faults = ended.stdout.split()
    if environment:
        assert was_set == "False"
        assert int(faults) > 10_000
    elif was_set == "True":
        assert int(faults) < 1_000
