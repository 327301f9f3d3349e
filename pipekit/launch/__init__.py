"""Launching: starting the processes of a run on this machine, or joining those that another launcher has started.

The launching process imports neither torch nor deepspeed, so that it answers at once. Environment variables are read
here and by the commands; elsewhere only by two modules that defer to what the user has set.
"""

from __future__ import annotations

from pipekit.launch.environment import RankEnvironment, detect_ranks
from pipekit.launch.extensions import extensions_dir, guard_extension_builds
from pipekit.launch.local import run_local
from pipekit.launch.resources import find_resources, thread_environ
from pipekit.launch.worker import error_file_from, report_failure, tie_to_parent

__all__ = [
    "RankEnvironment",
    "detect_ranks",
    "error_file_from",
    "extensions_dir",
    "find_resources",
    "guard_extension_builds",
    "report_failure",
    "run_local",
    "thread_environ",
    "tie_to_parent",
]
