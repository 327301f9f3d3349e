"""One rank of a run on this machine: `python -m pipekit.launch.rank PLAN [TASK]`.

`pipekit train` starts it with the plan of the run, or with the configuration of a trial of one's own; `pipekit verify`
with a plan and a task, which says what to record; `pipekit tune` with a plan, a number of steps to time, and the file
for the result.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pipekit.launch.environment import detect_ranks
from pipekit.launch.trial import TRIAL_TASK, run_trial_rank
from pipekit.launch.worker import end_finished, error_file_from, report_failure, started_s, tie_to_parent
from pipekit.tune import TIMING_TASK


def main(arguments: Sequence[str]) -> None:
    """Run the rank whose number is in the environment.

    The task, if any, is "trial", a `pipekit.verify.run.Task` as JSON, or "time" with the arguments above.
    """
    tie_to_parent(os.environ)
    # Until there is something to save, a signal that the launcher passes on ends this process at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with report_failure(error_file_from(os.environ)):
        ranks = detect_ranks(os.environ)
        assert ranks is not None, "pipekit.launch.rank is started by pipekit train, verify and tune"
        file, *task = arguments
        if task == [TRIAL_TASK]:
            from pipekit.config.trial_config import load_trial_config

            run_trial_rank(load_trial_config(file), ranks)
            return
        from pipekit.plan.run_folder import read_plan

        plan = read_plan(Path(file))
        if task[:1] == [TIMING_TASK]:
            from pipekit.training.timed_steps import run_timed_rank

            run_timed_rank(
                plan,
                Path(task[2]),
                num_steps=int(task[1]),
                rank=ranks.rank,
                local_rank=ranks.local_rank,
                loopback_port=ranks.loopback_port,
            )
        elif task:
            from pipekit.verify.run import Task, run_task

            run_task(
                Task(**json.loads(task[0])),
                plan,
                rank=ranks.rank,
                local_rank=ranks.local_rank,
                loopback_port=ranks.loopback_port,
            )
        else:
            from pipekit.training.run import run_planned_rank

            run_planned_rank(
                plan,
                rank=ranks.rank,
                local_rank=ranks.local_rank,
                loopback_port=ranks.loopback_port,
                started_s=started_s(os.environ),
            )


if __name__ == "__main__":
    with contextlib.suppress(SystemExit):  # of a success: a failure has ended the process
        main(sys.argv[1:])
    end_finished()
