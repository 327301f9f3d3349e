"""Resources of a run: processes, processor cores, memory and GPUs, as the launcher finds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Resources:
    """Processes, cores, memory and GPUs that a run may use.

    Attributes:
        num_cpus: processor cores of this machine that the run may use.
        memory_bytes: memory of this machine.
        num_gpus: GPUs of this machine; None where there are none, or the run does without them.
        gpu_name: name of the first GPU; None where nobody has asked for it.
        gpu_memory_bytes: memory of the first GPU; None where nobody has asked for it.
        world_size: number of processes, where another launcher has started them.
        local_world_size: number of those on this machine, where that is known.
    """

    num_cpus: int = 1
    memory_bytes: int = 0
    num_gpus: int | None = None
    gpu_name: str | None = None
    gpu_memory_bytes: int | None = None
    world_size: int | None = None
    local_world_size: int | None = None

    @property
    def num_devices(self) -> int:
        """Processes to lay out: those that have been started, or one for each GPU, or else for each core."""
        return self.world_size or self.num_gpus or self.num_cpus


def threads_per_process(setting: Literal["auto"] | int, num_local_ranks: int, num_cpus: int) -> int:
    """Number of CPU threads of each process; "auto" divides the cores among the processes of this machine.

    Example:
        >>> threads_per_process("auto", 4, 10)
        2
        >>> threads_per_process("auto", 8, 2)
        1
        >>> threads_per_process(3, 8, 2)
        3
    """
    return max(1, num_cpus // num_local_ranks) if setting == "auto" else setting
