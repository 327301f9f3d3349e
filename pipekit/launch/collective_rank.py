"""One of the ranks that measure messages among them: `python -m pipekit.launch.collective_rank LIMIT_S`.

Rank 0 writes a line of stdout, which `read_speed` finds. Ranks compute on GPUs where they see any.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

from pipekit.launch.environment import detect_ranks
from pipekit.launch.worker import error_file_from, report_failure, tie_to_parent

COMMAND = "-m pipekit.launch.collective_rank"

_MARK = "collective speed: "


def read_speed(output: str) -> dict[str, Any] | None:
    """Result of `measure_collectives` in the file that rank 0 has written; None if it is not there."""
    for line in output.splitlines():
        if line.startswith(_MARK):
            record: dict[str, Any] = json.loads(line.removeprefix(_MARK))
            return record
    return None


def main(arguments: Sequence[str]) -> None:
    """Join the other ranks, and measure."""
    tie_to_parent(os.environ)
    limit_s = float(arguments[0])
    # Imports from a disk that does not answer would have no end.
    faulthandler.dump_traceback_later(2 * limit_s, exit=True)
    with report_failure(error_file_from(os.environ)):
        from pipekit.distributed.collective_speed import measure_collectives
        from pipekit.distributed.processes import join_processes, leave_processes

        ranks = detect_ranks(os.environ)
        assert ranks is not None, "pipekit.launch.collective_rank is started by pipekit doctor"
        place = join_processes(
            device="cpu" if os.environ.get("DS_ACCELERATOR") == "cpu" else "cuda",
            timeout_s=limit_s,
            local_rank=ranks.local_rank,
            loopback_port=ranks.loopback_port,
            restarts=ranks.restarts,
        )
        speed = measure_collectives(place, host=socket.gethostname())
        if ranks.rank == 0:
            sys.stdout.write(f"{_MARK}{json.dumps(speed)}\n")
            sys.stdout.flush()
        leave_processes()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(sys.argv[1:])
