"""Inputs of a partitioner: the layers of a model, their costs, and the memory of a rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipekit.errors import LayoutError
from pipekit.partitioners.memory_limit import MemoryLimit


@dataclass(frozen=True)
class PartitionInputs:
    """Layers, costs and memory for a partitioner; inputs that take time to compute are functions.

    Attributes:
        type_names: class name of each layer.
        count_parameters: returns the trainable parameters of each layer.
        count_flops: returns the floating-point operations of each layer, forward and backward, for one micro-batch.
        measure_seconds: returns the seconds that each layer takes for one micro-batch, forward and backward.
        stage_extras: returns the cost of each stage besides its layers in the unit of a method (`uniform`,
            `parameters`, `flops` or `profile`), or None for no cost.
        memory_limit: returns the memory of the layers, and the limit of a rank.
        layer_names: logical name of each layer.
        placement: the pipeline rank of each stage; None means one stage per rank.
    """

    type_names: Sequence[str]
    count_parameters: Callable[[], Sequence[int]]
    count_flops: Callable[[], Sequence[float]] | None = None
    measure_seconds: Callable[[], Sequence[float]] | None = None
    stage_extras: Callable[[str], Sequence[float] | None] | None = None
    memory_limit: Callable[[], MemoryLimit] | None = None
    layer_names: Sequence[str] | None = None
    placement: Sequence[int] | None = None

    def costs(self, method: str) -> Sequence[float]:
        """Cost of each layer by `uniform`, `parameters`, `flops` or `profile`.

        Raises:
            LayoutError: if this cost is not known.
        """
        if method == "uniform":
            return [1] * len(self.type_names)
        if method == "parameters":
            return self.count_parameters()
        tell = {"flops": self.count_flops, "profile": self.measure_seconds}[method]
        if tell is None:
            missing = {"flops": "counted operations", "profile": "measured seconds"}[method]
            raise LayoutError(
                f"parallel.partition={method} needs the layers' {missing}, and there are none here; "
                "try parallel.partition=parameters"
            )
        return tell()

    def extras(self, method: str) -> Sequence[float] | None:
        """Cost of each stage besides its layers; None for no cost."""
        return None if self.stage_extras is None else self.stage_extras(method)

    @property
    def best_costs(self) -> str:
        """Method whose costs are closest to time: seconds, operations, or parameters."""
        if self.measure_seconds is not None:
            return "profile"
        return "parameters" if self.count_flops is None else "flops"

    def ranks_of(self, num_stages: int) -> tuple[int, ...]:
        """Pipeline rank of each stage.

        Raises:
            LayoutError: if `placement` is for another number of stages.
        """
        if self.placement is None:
            return tuple(range(num_stages))
        if len(self.placement) != num_stages:
            raise LayoutError(
                f"the placement {tuple(self.placement)} is for {len(self.placement)} stages, not {num_stages}"
            )
        return tuple(self.placement)
