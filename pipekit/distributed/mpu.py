"""The model-parallel unit: the process groups of a layout, and this rank's place in each."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from pipekit.errors import CommunicationError
from pipekit.hangs.activity import Activity
from pipekit.layout import Axis, Layout

# Limit for backends that do not expose theirs.
_DEFAULT_TIMEOUT = timedelta(minutes=10)


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
        """End the group's threads and connections. Its ranks call this together, when no operation is running in it."""
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
    """Process groups of a layout, with this rank's place in each.

    It has the properties that a training loop needs, such as `data_parallel_rank`, `should_report_metrics` and
    `should_build_data_loader`. A subclass may override them, for example to report metrics on another rank; the values
    on all ranks are compared before training starts (`pipekit.distributed.mpu_check`).

    Args:
        layout: layout of all ranks; its world size must be that of the default process group.
        placement: the pipeline rank of each stage; by default one stage per rank.
        timeout_s: longest wait in any of the groups; by default that of the default process group.

    Attributes:
        activity: current phase and operation of this rank, for reports of hangs.
    """

    def __init__(
        self, layout: Layout, *, placement: Sequence[int] | None = None, timeout_s: float | None = None
    ) -> None:
        self.layout = layout
        self.placement = tuple(range(layout.pp)) if placement is None else tuple(placement)
        self._timeout = _world_timeout() if timeout_s is None else timedelta(seconds=timeout_s)
        self.activity = Activity()
        self.global_rank = dist.get_rank()
        self.coordinate = layout.coordinate(self.global_rank)
        self._groups: dict[tuple[tuple[int, ...], str | None, str], RankGroup | None] = {}
        self._num_engines = 0
        self.pipe = self._build("pipe")
        self.data = self._build("data")
        self.tensor = self._build("tensor")
        self.model = self._build("pipe", "tensor")

    def _build(self, *axes: Axis) -> RankGroup:
        group = self.build_group(self.layout.groups(*axes))
        assert group is not None, f"rank {self.global_rank} is in no group along {axes}"
        return group

    def build_group(
        self,
        rank_lists: Sequence[Sequence[int]],
        backend: str | None = None,
        *,
        purpose: str = "",
        timeout: timedelta | None = None,
    ) -> RankGroup | None:
        """Build a process group for each rank list, and return the one that contains this rank, if any.

        All ranks of the world call this with the same lists. Calls with the same ranks, backend and purpose share a
        group, because under gloo every group costs threads that wake a hundred times a second.

        Args:
            rank_lists: global ranks of each group; no rank may be in two groups.
            backend: backend of the groups; by default that of the world.
            purpose: keeps messages apart from others between the same ranks.
            timeout: longest wait in the groups; by default that of the unit.
        """
        keys = [(tuple(ranks), backend, purpose) for ranks in rank_lists]
        new = [list(key[0]) for key in keys if key not in self._groups]
        if new and backend is None and _splits_world():
            # One call for all of them, since each is work for the whole world.
            split = dist.split_group(split_ranks=new, timeout=timeout or self._timeout)
            self._groups.update({key: self._member(key[0], split) for key in keys if key not in self._groups})
        for key in keys:
            if key not in self._groups:
                group = dist.new_group(ranks=list(key[0]), backend=backend, timeout=timeout or self._timeout)
                self._groups[key] = self._member(key[0], group)
        return next((group for key in keys if (group := self._groups[key]) is not None), None)

    def _member(self, ranks: Sequence[int], group: dist.ProcessGroup | None) -> RankGroup | None:
        if self.global_rank not in ranks:
            return None
        assert group is not None
        return RankGroup(ranks, group)

    def register_engine(self) -> None:
        """Count an engine as a user of the groups, until `release_engine`."""
        self._num_engines += 1

    def release_engine(self) -> None:
        """Free the groups if no other engine uses them. All ranks of the world call this together."""
        self._num_engines -= 1
        if self._num_engines > 0:
            return
        # No rank ends a group in which another still waits.
        dist.barrier()
        for group in self._groups.values():
            if group is not None:
                group.free()

    @property
    def pipe_rank(self) -> int:
        """The pipeline rank of this process."""
        return self.coordinate.pipe

    @property
    def num_stages(self) -> int:
        """Number of stages of the model."""
        return len(self.placement)

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages that this process holds."""
        return tuple(stage for stage, pipe_rank in enumerate(self.placement) if pipe_rank == self.coordinate.pipe)

    @property
    def data_parallel_rank(self) -> int:
        """Index of the replica of the model that this process belongs to."""
        return self.coordinate.data

    @property
    def data_parallel_world_size(self) -> int:
        """The number of replicas."""
        return self.layout.dp

    @property
    def is_first_stage(self) -> bool:
        """True on the ranks of the first stage, which reads the inputs."""
        return self.placement[0] == self.coordinate.pipe

    @property
    def is_last_stage(self) -> bool:
        """True on the ranks of the last stage, which reads the labels and computes the loss."""
        return self.placement[-1] == self.coordinate.pipe

    @property
    def should_build_data_loader(self) -> bool:
        """True on the ranks that read batches: the first stage needs the inputs, the last the labels."""
        return self.is_first_stage or self.is_last_stage

    @property
    def should_report_metrics(self) -> bool:
        """True on the only rank that writes metrics and console output: rank 0."""
        return self.global_rank == 0

    def stage_rank(self, stage: int) -> int:
        """Return the global rank that holds `stage` in this process's pipeline."""
        pipe_rank = self.placement[stage]
        return self.layout.rank(pipe=pipe_rank, data=self.coordinate.data, tensor=self.coordinate.tensor)


def _world_timeout() -> timedelta:
    """Longest wait in the default process group."""
    world = dist.group.WORLD
    assert world is not None
    device = torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")
    options = None
    with suppress(RuntimeError):  # a group that is no backend of torch's own
        options = getattr(world._get_backend(device), "options", None)
    timeout: timedelta = getattr(options, "_timeout", _DEFAULT_TIMEOUT)
    return timeout


def _splits_world() -> bool:
    """True where groups are made by splitting the world's communicator: over NCCL with a bound device."""
    world = dist.group.WORLD
    return world is not None and world.bound_device_id is not None and dist.get_backend() == "nccl"
