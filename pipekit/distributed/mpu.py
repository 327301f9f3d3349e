"""The model-parallel unit: the process groups of a layout, and this rank's place in each."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING

import torch.distributed as dist

from pipekit.errors import CommunicationError
from pipekit.layout import Axis, Layout

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.topology import ProcessTopology

_NAMES_OF_DEEPSPEED: dict[Axis, str] = {"pipe": "pipe", "data": "data", "tensor": "model"}


class RankGroup:
    """One process group that this rank belongs to.

    Args:
        ranks: the global ranks of the group, in group order.
        process_group: the group itself.
    """

    def __init__(self, ranks: Sequence[int], process_group: dist.ProcessGroup) -> None:
        self.ranks = list(ranks)
        self._process_group: dist.ProcessGroup | None = process_group

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The group itself.

        Raises:
            CommunicationError: if it has been freed.
        """
        if self._process_group is None:
            raise CommunicationError(
                f"the process group of the ranks {self.ranks} was freed by engine.destroy(); build a new module and a "
                "new engine"
            )
        return self._process_group

    def free(self) -> None:
        """End the group's threads and connections. Its ranks call this together, when nothing is under way in it."""
        if self._process_group is not None and dist.is_initialized():
            dist.destroy_process_group(self._process_group)
        self._process_group = None

    @property
    def size(self) -> int:
        """The number of ranks in the group."""
        return len(self.ranks)

    @property
    def rank(self) -> int:
        """This process's index in the group."""
        return self.ranks.index(dist.get_rank())


class ModelParallelUnit:
    """Who talks to whom, made from a layout.

    It answers what a training loop asks (`data_parallel_rank`, `should_report_metrics`, `should_build_data_loader`)
    and, under the names that DeepSpeed uses for its `mpu` and `grid`, what DeepSpeed asks. There, "model parallel"
    means all ranks that together hold one copy of the model (pipeline x tensor), and "slice parallel" means tensor
    parallel.

    A subclass may answer otherwise, such as with metrics on another rank; the answers of all ranks are compared before
    anything is trained (`pipekit.distributed.unit_check`).

    Args:
        layout: the layout of the world; its world size is that of the default process group.
        placement: the pipeline rank of each stage; one stage a rank unless given.
        timeout_s: no wait in one of its groups lasts longer.
    """

    def __init__(self, layout: Layout, *, placement: Sequence[int] | None = None, timeout_s: float = 600.0) -> None:
        self.layout = layout
        self.placement = tuple(range(layout.pp)) if placement is None else tuple(placement)
        self._timeout = timedelta(seconds=timeout_s)
        self.global_rank = dist.get_rank()
        self.coordinate = layout.coordinate(self.global_rank)
        self._groups: dict[tuple[tuple[int, ...], str | None, str], RankGroup | None] = {}
        self._num_engines = 0
        self.pipe = self._build("pipe")
        self.data = self._build("data")
        self.tensor = self._build("tensor")
        self.model = self._build("pipe", "tensor")

        # What DeepSpeed reads from its own grid as attributes.
        self.world_size = layout.world_size
        self.pipe_parallel_size = layout.pp
        self.data_parallel_size = layout.dp
        self.model_parallel_size = layout.tp
        self.slice_parallel_size = layout.tp
        self.stage_id = self.coordinate.pipe
        self.data_parallel_id = self.coordinate.data
        self.pp_group = self.pipe.ranks

    def _build(self, *axes: Axis) -> RankGroup:
        group = self.build_group(self.layout.groups(*axes))
        assert group is not None, f"rank {self.global_rank} is in no group along {axes}"
        return group

    def build_group(
        self, rank_lists: Sequence[Sequence[int]], backend: str | None = None, *, purpose: str = ""
    ) -> RankGroup | None:
        """Build a process group for each rank list, and return the one that this rank is in, if any.

        Every rank of the world calls this with the same lists. The same ranks with the same backend and purpose share a
        group: under gloo every group costs threads that wake a hundred times a second.

        Args:
            rank_lists: global ranks of each group; no rank is in two.
            backend: of the groups; that of the world unless given.
            purpose: of messages that must not mix with others between the same ranks.
        """
        own: RankGroup | None = None
        for ranks in map(tuple, rank_lists):
            key = (ranks, backend, purpose)
            if key not in self._groups:
                group = dist.new_group(ranks=list(ranks), backend=backend, timeout=self._timeout)
                self._groups[key] = RankGroup(ranks, group) if self.global_rank in ranks else None
            own = self._groups[key] or own
        return own

    def register_engine(self) -> None:
        """Count an engine that uses the groups; `release_engine` is its end."""
        self._num_engines += 1

    def release_engine(self) -> None:
        """Free the groups where no other engine uses them. All ranks of the world call this together."""
        self._num_engines -= 1
        if self._num_engines > 0:
            return
        # No rank ends a group in which another still waits.
        dist.barrier()
        for group in self._groups.values():
            if group is not None:
                group.free()

    # What a training loop asks.

    @property
    def pipe_rank(self) -> int:
        """The pipeline rank of this process."""
        return self.coordinate.pipe

    @property
    def num_stages(self) -> int:
        """The number of stages that the model is cut into."""
        return len(self.placement)

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages that this process holds."""
        return tuple(stage for stage, pipe_rank in enumerate(self.placement) if pipe_rank == self.coordinate.pipe)

    @property
    def data_parallel_rank(self) -> int:
        """Which replica of the model this process belongs to."""
        return self.coordinate.data

    @property
    def data_parallel_world_size(self) -> int:
        """The number of replicas."""
        return self.layout.dp

    @property
    def is_first_stage(self) -> bool:
        """Whether this process holds the first stage, which reads the inputs."""
        return self.placement[0] == self.coordinate.pipe

    @property
    def is_last_stage(self) -> bool:
        """Whether this process holds the last stage, which reads the labels and has the loss."""
        return self.placement[-1] == self.coordinate.pipe

    @property
    def should_build_data_loader(self) -> bool:
        """Whether this process reads batches: the first stage needs the inputs, the last the labels."""
        return self.is_first_stage or self.is_last_stage

    @property
    def should_report_metrics(self) -> bool:
        """Whether this process writes metrics and talks to the console: rank 0, and no other."""
        return self.global_rank == 0

    def stage_rank(self, stage: int) -> int:
        """Return the global rank that holds `stage` in this process's pipeline."""
        pipe_rank = self.placement[stage]
        return self.layout.rank(pipe=pipe_rank, data=self.coordinate.data, tensor=self.coordinate.tensor)

    # What DeepSpeed asks, under its names.

    def get_global_rank(self) -> int:
        return self.global_rank

    def get_stage_id(self) -> int:
        return self.coordinate.pipe

    def get_data_parallel_id(self) -> int:
        return self.coordinate.data

    def stage_to_global(self, stage_id: int, *, data: int | None = None, model: int | None = None) -> int:
        # DeepSpeed knows one stage a rank, and means the pipeline rank; its axis `model` is tensor.
        return self.layout.rank(
            pipe=stage_id,
            data=self.coordinate.data if data is None else data,
            tensor=self.coordinate.tensor if model is None else model,
        )

    @cached_property
    def _topo(self) -> ProcessTopology:
        from deepspeed.runtime.pipe.topology import ProcessTopology  # planning loads this module, and does without

        order = self.layout.order
        return ProcessTopology(
            axes=[_NAMES_OF_DEEPSPEED[axis] for axis in order], dims=[self.layout.degree(axis) for axis in order]
        )

    def topology(self) -> ProcessTopology:
        return self._topo

    @property
    def p2p_groups(self) -> list[list[int]]:
        # Each rank with the one behind it in its pipeline, the last one with the first.
        pairs = {
            rank: [rank, following]
            for ranks in self.layout.groups("pipe")
            for rank, following in zip(ranks, [*ranks[1:], ranks[0]], strict=True)
        }
        return [pairs[rank] for rank in range(self.layout.world_size)]

    def get_pipe_parallel_rank(self) -> int:
        return self.coordinate.pipe

    def get_pipe_parallel_world_size(self) -> int:
        return self.layout.pp

    def get_pipe_parallel_group(self) -> dist.ProcessGroup:
        return self.pipe.process_group

    def get_pipe_parallel_src_rank(self) -> int:
        return self.pipe.ranks[0]

    get_pipeline_model_parallel_rank = get_pipe_parallel_rank
    get_pipeline_model_parallel_world_size = get_pipe_parallel_world_size
    get_pipeline_model_parallel_group = get_pipe_parallel_group
    get_pipeline_model_parallel_first_rank = get_pipe_parallel_src_rank

    def get_pipeline_model_parallel_last_rank(self) -> int:
        return self.pipe.ranks[-1]

    def get_data_parallel_rank(self) -> int:
        return self.coordinate.data

    def get_data_parallel_world_size(self) -> int:
        return self.layout.dp

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data.process_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self.data.ranks

    def get_data_parallel_src_rank(self) -> int:
        return self.data.ranks[0]

    def get_model_parallel_rank(self) -> int:
        return self.model.rank

    def get_model_parallel_world_size(self) -> int:
        return self.model.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.model.process_group

    def get_model_parallel_src_rank(self) -> int:
        return self.model.ranks[0]

    def get_slice_parallel_rank(self) -> int:
        return self.coordinate.tensor

    def get_slice_parallel_world_size(self) -> int:
        return self.layout.tp

    def get_slice_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor.process_group

    def get_slice_parallel_src_rank(self) -> int:
        return self.tensor.ranks[0]

    get_tensor_model_parallel_rank = get_slice_parallel_rank
    get_tensor_model_parallel_world_size = get_slice_parallel_world_size
    get_tensor_model_parallel_group = get_slice_parallel_group
    get_tensor_model_parallel_src_rank = get_slice_parallel_src_rank
