"""Room for checkpoints: whether the disk of a run folder holds those that the run will write."""

from __future__ import annotations

from pathlib import Path

from pipekit.checkpoint.manifest import list_checkpoints
from pipekit.costs.model import find_optimizer_states
from pipekit.errors import StorageError
from pipekit.number_text import bytes_text
from pipekit.plan.plan import Plan
from pipekit.plan.run_folder import RunFolder
from pipekit.storage import free_bytes, storing

_FP32_BYTES = 4


def checkpoint_bytes(plan: Plan) -> int:
    """Bytes of the tensors of a run's checkpoint: fp32 weights and optimizer states, each once."""
    states = find_optimizer_states(plan.config).per_parameter
    return _FP32_BYTES * plan.num_parameters * (1 + states)


def check_room(plan: Plan) -> str | None:
    """Check that there is room for the checkpoints of a run; return a warning where not all that are kept will fit.

    Raises:
        StorageError: if there is not even room for one.
    """
    folder = RunFolder(plan.config.run.dir)
    keep = plan.config.checkpoint.keep
    where = f"run.dir={plan.config.run.dir}"
    with storing(where, doing="read"):
        free = free_bytes(Path(folder.path))
        held = len(list_checkpoints(folder.checkpoints))
    one = checkpoint_bytes(plan)
    if one > free:
        raise StorageError(
            f"{where}: has no room for a checkpoint, which takes {bytes_text(one)}, and {bytes_text(free)} are free; "
            "make room there, or use another folder"
        )
    # An older one goes when the new one is whole.
    needed = (keep or 1) + 1 - held
    if needed * one <= free:
        return None
    return (
        f"{where}: has room for {free // one} of the {needed} checkpoints of {bytes_text(one)} that "
        f"checkpoint.keep={'null' if keep is None else keep} asks for, one that is being written included "
        f"({bytes_text(free)} free); make room there, or set checkpoint.keep lower"
    )
