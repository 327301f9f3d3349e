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
    """The process groups of a layout, and the place of this rank in each.

    It answers what a training loop asks, such as `data_parallel_rank`, `should_report_metrics` and
    `should_build_data_loader`.

    A subclass may answer otherwise, such as with metrics on another rank; the answers of all ranks are compared before
    anything is trained (`pipekit.distributed.mpu_check`).

    Args:
        layout: the layout of the world; its world size is that of the default process group.
        placement: the pipeline rank of each stage; one stage a rank unless given.
        timeout_s: no wait in one of its groups lasts longer; that of the default process group unless given.

    Attributes:
        activity: current phase and operation of this rank, for the report of a hang.
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
        """Build a process group for each rank list, and return the one that this rank is in, if any.

        Every rank of the world calls this with the same lists. The same ranks with the same backend and purpose share a
        group: under gloo every group costs threads that wake a hundred times a second.

        Args:
            rank_lists: global ranks of each group; no rank is in two.
            backend: of the groups; that of the world unless given.
            purpose: of messages that must not mix with others between the same ranks.
            timeout: the longest wait in the groups; that of the unit unless given.
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
        """True on the rank that writes metrics and the console: rank 0, and no other."""
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
