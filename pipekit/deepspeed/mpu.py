"""The model-parallel unit under the names that DeepSpeed uses for its `mpu` and its `grid`."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.pipe.topology import ProcessTopology

from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.layout import Axis

_NAMES_OF_AXES: dict[Axis, str] = {"pipe": "pipe", "data": "data", "tensor": "model"}

# "Model parallel" is all ranks that together hold one copy of the model, and "slice parallel" tensor parallel. Of the
# two names of a group DeepSpeed prefers Megatron's.
_NAMES_OF_GROUPS = {
    "pipe_parallel": "pipe",
    "pipeline_model_parallel": "pipe",
    "data_parallel": "data",
    "slice_parallel": "tensor",
    "tensor_model_parallel": "tensor",
    "model_parallel": "model",
}


class DeepSpeedMPU:
    """DeepSpeed's names for a unit: `get_data_parallel_rank()`, `get_model_parallel_group()`, `topology()` and so on.

    Args:
        mpu: the unit that answers.
    """

    def __init__(self, mpu: ModelParallelUnit) -> None:
        layout = mpu.layout
        self._mpu = mpu
        self._topo = ProcessTopology(
            axes=[_NAMES_OF_AXES[axis] for axis in layout.order], dims=[layout.degree(axis) for axis in layout.order]
        )
        self.global_rank = mpu.global_rank
        self.world_size = layout.world_size
        self.pipe_parallel_size = layout.pp
        self.data_parallel_size = layout.dp
        self.model_parallel_size = self.slice_parallel_size = layout.tp
        # DeepSpeed knows one stage a rank, and means the pipeline rank.
        self.stage_id = mpu.pipe_rank
        self.data_parallel_id = mpu.data_parallel_rank
        self.is_first_stage, self.is_last_stage = mpu.is_first_stage, mpu.is_last_stage
        self.pp_group = mpu.pipe.ranks
        for name, attribute in _NAMES_OF_GROUPS.items():
            group = getattr(mpu, attribute)
            self._answer(f"get_{name}_rank", mpu.data_parallel_rank if attribute == "data" else group.rank)
            self._answer(f"get_{name}_world_size", group.size)
            self._answer(f"get_{name}_src_rank", group.ranks[0])
            setattr(self, f"get_{name}_group", lambda group=group: group.process_group)
        self._answer("get_global_rank", mpu.global_rank)
        self._answer("get_stage_id", mpu.pipe_rank)
        self._answer("get_data_parallel_id", mpu.data_parallel_rank)
        self._answer("get_data_parallel_group_ranks", mpu.data.ranks)
        self._answer("get_pipeline_model_parallel_first_rank", mpu.pipe.ranks[0])
        self._answer("get_pipeline_model_parallel_last_rank", mpu.pipe.ranks[-1])

    def _answer(self, name: str, value: Any) -> None:
        setattr(self, name, lambda: value)

    def topology(self) -> ProcessTopology:
        """DeepSpeed's description of the layout."""
        return self._topo

    def stage_to_global(self, stage_id: int, *, data: int | None = None, model: int | None = None) -> int:
        """Global rank of a pipeline rank, in this rank's pipeline unless told otherwise."""
        place = self._mpu.coordinate
        return self._mpu.layout.rank(
            pipe=stage_id, data=place.data if data is None else data, tensor=place.tensor if model is None else model
        )

    @property
    def p2p_groups(self) -> list[list[int]]:
        """Each rank with the one behind it in its pipeline, the last one with the first."""
        pairs = {
            rank: [rank, following]
            for ranks in self._mpu.layout.groups("pipe")
            for rank, following in zip(ranks, [*ranks[1:], ranks[0]], strict=True)
        }
        return [pairs[rank] for rank in range(self.world_size)]
