"""The micro-batches of a step: read by the ranks that hold the first and the last stage, agreed on by all.

Tensor-parallel ranks read the same, and make sure of it before anything else. The ranks of the first and of the last
stage tell all others what they read: whether there was enough data, a checksum, and a number for the shapes of each
micro-batch. So every rank stops with the same error when the data end, different batches on the first and the last
stage are found, and shapes may change at any micro-batch. The messages travel behind the first forwards.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipekit.data.prefetch import Prefetcher
from pipekit.data.replica_loader import ReplicaLoader
from pipekit.distributed.mpu import ModelParallelUnit, RankGroup
from pipekit.distributed.processes import wait
from pipekit.errors import DataError
from pipekit.tensors.nested import flatten, map_tensors, unflatten

MicroBatch = tuple[Any, Any]
"""The inputs and the labels of one micro-batch: tensors, or tuples, lists and dicts of them."""

BatchFunction = Callable[[Any], MicroBatch]
"""Makes inputs and labels from what a data iterator yields."""

_OK, _NO_ITERATOR, _FAILED, _PEERS_DIFFER = 0, -1, -2, -3
# A checksum reads about this many elements of a tensor: more would take time, and find nothing more.
_SAMPLED_ELEMENTS = 1024


@dataclass
class StepData:
    """The micro-batches of one step.

    Attributes:
        micro_batches: inputs and labels, in order; empty on ranks that hold neither the first nor the last stage.
        shape_classes: for each micro-batch a number that stands for the shapes and dtypes of its inputs, the same on
            every rank of the pipeline.
        confirm: to be called before the step's first backward: waits for the report of the last stage, and raises a
            DataError if that stage could not read, or read something else than the first.
    """

    micro_batches: list[MicroBatch]
    shape_classes: list[int]
    confirm: Callable[[], None]


class MicroBatchReader:
    """Reads each step's micro-batches, and lets the ranks of a pipeline agree on them.

    Args:
        mpu: the process groups.
        group: a CPU group of the pipeline's ranks; None where there is one.
    """

    def __init__(self, mpu: ModelParallelUnit, group: RankGroup | None) -> None:
        self._mpu = mpu
        self._group = group
        self._peers = None
        if mpu.layout.tp > 1:
            self._peers = mpu.build_group(mpu.layout.groups("tensor"), "gloo", purpose="headers")
        self._classes: dict[Any, int] = {}
        self.batch_fn: BatchFunction | None = None

    def read(self, data: Iterator[Any] | None, num_micro_batches: int) -> StepData:
        """Return the next `num_micro_batches` micro-batches. All ranks of the pipeline call this together.

        Raises:
            DataError: on every rank, if the data end too soon, are missing, or differ between the first and the last
                stage, or among tensor-parallel ranks.
        """
        mpu = self._mpu
        first, last = mpu.placement[0], mpu.placement[-1]
        report = [_OK, 0, *[0] * num_micro_batches]
        # Messages that are awaited arrive sooner.
        sources = dict.fromkeys((first, last))
        reports = {source: self._listen(source, len(report)) for source in sources if source != mpu.pipe_rank}
        micro_batches: list[MicroBatch] = []
        failure = None
        if mpu.should_build_data_loader:
            try:
                report[0], micro_batches = self._read(data, num_micro_batches)
                report[1] = _checksum(micro_batches)
            except Exception as error:
                report[0], failure = _FAILED, error
            if self._peers is not None:
                report[0] = _agree(report[:2], self._peers)
        if mpu.is_first_stage and report[0] == _OK:
            report[2:] = [self._class_of(inputs) for inputs, _ in micro_batches]
        if mpu.pipe_rank in sources:
            reports[mpu.pipe_rank] = self._tell(report)
        if report[0] != _OK:
            # The others hear of it before this rank gives up.
            if mpu.pipe_rank in sources:
                reports[mpu.pipe_rank].receive()
            if failure is not None:
                raise failure
            _check(report, "first" if mpu.is_first_stage else "last", num_micro_batches)
        # All other stages need the report of the first stage at once; everything else can wait.
        heard = report if mpu.is_first_stage else reports[first].receive()
        _check(heard, "first", num_micro_batches)

        def confirm() -> None:
            told = reports[last].receive()
            reports[first].receive()
            _check(told, "last", num_micro_batches)
            if heard[1] and told[1] and heard[1] != told[1]:
                raise DataError(
                    "the first and the last stage read different batches, so that inputs would meet other labels: give "
                    "every rank of a pipeline an iterator in the same order (seed a shuffle by the data-parallel rank, "
                    "mpu.data_parallel_rank, never by the global rank)"
                )

        return StepData(micro_batches, heard[2:], confirm)

    def _listen(self, source: int, length: int) -> _Report:
        """Begin to receive the report of a pipeline rank."""
        report = torch.zeros(length, dtype=torch.int64)
        assert self._group is not None
        index = self._group.ranks.index(self._mpu.pipe.ranks[source])
        return _Report(report, [self._group.process_group.recv([report], index, self._tag(source))])

    def _tell(self, report: list[int]) -> _Report:
        """Begin to send this rank's report to all others of the pipeline."""
        told = torch.tensor(report, dtype=torch.int64)
        if self._group is None:
            return _Report(told, [])
        tag, process_group, own = self._tag(self._mpu.pipe_rank), self._group.process_group, self._group.rank
        peers = [index for index in range(self._group.size) if index != own]
        return _Report(told, [process_group.send([told], index, tag) for index in peers])

    def _tag(self, source: int) -> int:
        # Descriptions of activations have the tag 0; each of the two ranks that report has a tag of its own.
        return 1 if source == self._mpu.placement[0] else 2

    def _read(self, data: Iterator[Any] | None, num_micro_batches: int) -> tuple[int, list[MicroBatch]]:
        if data is None:
            return _NO_ITERATOR, []
        micro_batches: list[MicroBatch] = []
        for _ in range(num_micro_batches):
            try:
                batch = next(data)
            except StopIteration:
                return 1 + len(micro_batches), []
            micro_batches.append(self._split(batch))
        return _OK, micro_batches

    def _split(self, batch: Any) -> MicroBatch:
        if self.batch_fn is not None:
            batch = self.batch_fn(batch)
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return batch[0], batch[1]
        if isinstance(batch, dict) and set(batch) == {"inputs", "labels"}:
            return batch["inputs"], batch["labels"]
        what = f"a dict of {', '.join(map(str, batch))}" if isinstance(batch, dict) else type(batch).__name__
        raise DataError(
            f"a micro-batch must be a pair of inputs and labels, and the iterator gave {what}; tell how to make a pair "
            'of it, for example engine.set_batch_fn(lambda batch: (batch["input_ids"], batch["labels"]))'
        )

    def _class_of(self, inputs: Any) -> int:
        return self._classes.setdefault(_shapes(inputs), len(self._classes))


class TrainingData:
    """An endless iterable of micro-batches of a dataset, each step's from the position that training has reached.

    Args:
        loader: gives the micro-batches.
        position: returns the number of micro-batches that this replica has been trained on.
        num_micro_batches: returns the number of micro-batches of a step.
        pin_memory: whether to put them into pinned memory.
    """

    def __init__(
        self,
        loader: ReplicaLoader,
        position: Callable[[], int],
        num_micro_batches: Callable[[], int],
        *,
        pin_memory: bool = False,
    ) -> None:
        self.loader = loader
        self._prefetcher = Prefetcher(loader, pin_memory=pin_memory)
        self._position = position
        self._num_micro_batches = num_micro_batches

    def __len__(self) -> int:
        """Number of micro-batches of an epoch on one replica."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        while True:
            if self.loader.num_micro_batches != self._num_micro_batches():
                # The batch size has changed; what was read ahead is for the old one.
                self._prefetcher.close()
                self.loader.num_micro_batches = self._num_micro_batches()
            position = self._position()
            yield from self._prefetcher.step_batches(position, then=position + self.loader.num_micro_batches)


def join_batches(outputs: list[Any]) -> Any:
    """Join the outputs of micro-batches along their first dimension; None if there are none."""
    if not outputs:
        return None
    flat = [flatten(output, "the last layer's output") for output in outputs]
    _, structure = flat[0]
    parts = zip(*(tensors for tensors, _ in flat), strict=True)
    return unflatten(
        [torch.cat([tensor[None] if tensor.ndim == 0 else tensor for tensor in part]) for part in parts], structure
    )


@dataclass
class _Report:
    """Report of a rank on the batches that it has read, and the messages that carry it."""

    report: Tensor
    works: list[dist.Work]

    def receive(self) -> list[int]:
        """Return the report of the source."""
        # A message of gloo can be waited for only once.
        while self.works:
            wait(self.works.pop(), "the other stages to begin the step")
        return self.report.tolist()


def _agree(report: list[int], peers: RankGroup) -> int:
    """Status of the first tensor-parallel rank that could not read its data; else `_OK`, or `_PEERS_DIFFER`."""
    own = torch.tensor(report, dtype=torch.int64)
    reports = [torch.empty_like(own) for _ in range(peers.size)]
    work = dist.all_gather(reports, own, group=peers.process_group, async_op=True)
    assert work is not None
    wait(work, "its tensor-parallel peers to read the step's data")
    statuses = [int(status) for status, _ in reports]
    if any(statuses):
        return next(status for status in statuses if status != _OK)
    return _OK if len({int(checksum) for _, checksum in reports}) == 1 else _PEERS_DIFFER


def _check(report: list[int], stage: str, num_micro_batches: int) -> None:
    status = report[0]
    if status == _OK:
        return
    if status == _PEERS_DIFFER:
        raise DataError(
            f"tensor-parallel ranks of the {stage} stage read different batches, and they compute one batch together: "
            "give all of them an iterator in the same order (seed a shuffle by the data-parallel rank, "
            "mpu.data_parallel_rank, never by the global rank)"
        )
    if status == _NO_ITERATOR:
        raise DataError(f"the {stage} stage reads batches, and was given no data iterator")
    if status == _FAILED:
        raise DataError(f"the {stage} stage could not read its data; see that rank's error")
    raise DataError(
        f"the data of the {stage} stage ended at micro-batch {status - 1} of {num_micro_batches}; a step reads "
        f"{num_micro_batches} micro-batches from its iterator: wrap a finite loader so that it repeats"
    )


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(_shapes(part) for part in value)
    if isinstance(value, dict):
        return tuple((key, _shapes(part)) for key, part in value.items())
    return type(value).__name__


def _checksum(micro_batches: list[MicroBatch]) -> int:
    """Checksum of inputs and labels; 0 where a rank has only one of them, or they are on a GPU."""
    samples: dict[torch.dtype, list[Tensor]] = {}
    for micro_batch in micro_batches:
        for part in micro_batch:
            tensors: list[Tensor] = []
            map_tensors(tensors.append, part)
            if not tensors or any(tensor.is_cuda for tensor in tensors):
                return 0
            for tensor in tensors:
                flat = tensor.detach().flatten()
                if flat.numel() > _SAMPLED_ELEMENTS:
                    flat = flat[:: flat.numel() // _SAMPLED_ELEMENTS]
                samples.setdefault(flat.dtype, []).append(flat)
    total = 1
    for flats in samples.values():
        total = zlib.crc32(torch.cat(flats).view(torch.uint8).numpy().data, total)
    return total if micro_batches else 0
