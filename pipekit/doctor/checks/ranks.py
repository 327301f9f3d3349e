"""Messages between ranks on this machine, which start as in a run."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from pipekit.doctor.collective import LIMIT_S, judge_failure, judge_output
from pipekit.doctor.rows import Row, Site
from pipekit.errors import PipekitError
from pipekit.launch.collective_rank import COMMAND
from pipekit.launch.gpu_environment import gpu_environ
from pipekit.launch.local import run_local
from pipekit.launch.resources import num_usable_cpus, thread_environ

_MOST_RANKS = 8


def check_gloo(site: Site) -> list[Row]:
    """Messages between two to four ranks on the CPU."""
    return _measure("gloo", site, max(2, min(4, num_usable_cpus())), on_gpus=False)


def check_nccl(site: Site) -> list[Row]:
    """Messages between ranks on the GPUs."""
    return _measure("NCCL", site, min(site.num_gpus, _MOST_RANKS), on_gpus=True) if site.num_gpus else []


def _measure(title: str, site: Site, num_ranks: int, *, on_gpus: bool) -> list[Row]:
    if not site.uses_ranks or "error" in site.libraries or site.libraries.get("torch_error"):
        return []
    with tempfile.TemporaryDirectory() as folder:
        log_dir = Path(folder)
        on_cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        environ = thread_environ("auto", num_ranks, site.environ)
        environ |= gpu_environ(log_dir, site.environ) if on_gpus else on_cpu
        command = [sys.executable, *COMMAND.split(), str(LIMIT_S)]
        try:
            # The terminal shows only rows; the output of ranks goes to their logs.
            run_local(
                command,
                world_size=num_ranks,
                log_dir=log_dir,
                env=environ,
                stdout_rank=-1,
                timeout_s=2 * LIMIT_S,
                is_last=False,
            )
        except PipekitError as error:
            return [judge_failure(title, str(error), on_one_machine=True)]
        output = (log_dir / "rank-0.log").read_text(encoding="utf-8", errors="replace")
    return judge_output(title, output, on_one_machine=True)
