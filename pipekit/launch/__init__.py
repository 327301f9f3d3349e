"""Launching: starting the processes of a run on this machine, or joining those that another launcher has started.

The launching process imports neither torch nor deepspeed, so that it answers at once. Environment variables are read
here and by the commands; elsewhere only by two modules that defer to what the user has set.
"""

from __future__ import annotations

from pipekit.launch.environment import RankEnvironment, detect_ranks
from pipekit.launch.extensions import extensions_dir, guard_extension_builds
from pipekit.launch.local import run_local
from pipekit.launch.resources import num_accelerators, num_usable_cpus, thread_environ, threads_per_process
from pipekit.launch.worker import error_file_from, report_failure, tie_to_parent

__all__ = [
    "RankEnvironment",
    "detect_ranks",
    "error_file_from",
    "extensions_dir",
    "guard_extension_builds",
    "num_accelerators",
    "num_usable_cpus",
    "report_failure",
    "run_local",
    "thread_environ",
    "threads_per_process",
    "tie_to_parent",
]
