"""Freed memory stays with the process or goes back to the system, and what the environment asks for goes first."""

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


RETURNING = """
import re
from pathlib import Path
from pipekit.tensors.host_memory import return_freed_memory
import torch

def held_mib():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

was_set = return_freed_memory()
before = held_mib()
del [torch.ones(8_000_000) for _ in range(2)][:]
kept = [(torch.ones(6_000_000), torch.ones(1000))[1] for _ in range(30)]
print(was_set, held_mib() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")
def test_freed_memory_goes_back_where_one_tensor_comes_after_another() -> None:
    command = [sys.executable, "-c", RETURNING]
    ended = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True, timeout=120, check=True)
    was_set, held = ended.stdout.split()
    assert was_set == "False" or int(held) < 40
