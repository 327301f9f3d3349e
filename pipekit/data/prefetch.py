"""Prefetching: a thread collates the micro-batches of the next step while the current step runs."""

from __future__ import annotations

from concurrent.futures import Future
from threading import Event, Thread
from typing import Any

import torch

from pipekit.data.batch_loader import BatchLoader
from pipekit.data.mixture import MixtureOrder
from pipekit.data.order import SampleOrder
from pipekit.data.replica_loader import ReplicaLoader
from pipekit.data.workers import Workers
from pipekit.tensors.transfer import pack

# A dataset that does not answer must not keep a run from ending.
_PATIENCE_S = 5.0


class Prefetcher:
    """Collates one step ahead on a thread of its own.

    It has no state that a checkpoint would have to hold: whatever has been collated ahead, a step gets the
    micro-batches of the position that it names.

    Args:
        loader: gives the micro-batches of a step. Its dataset is used by one thread at a time.
        pin_memory: whether to put the inputs of a step, and its labels, into one piece of pinned memory each, from
            which a GPU copies them without the host waiting.
        workers: processes that read for the loader; None has the thread read. They are ended with the prefetcher.
    """

    def __init__(
        self, loader: BatchLoader | ReplicaLoader, *, pin_memory: bool = False, workers: Workers | None = None
    ) -> None:
        self.loader = loader
        self._workers = workers
        self._pin_memory = pin_memory
        self._ahead: _Collation | None = None

    def step_batches(self, consumed_samples: int, *, then: int | None = None) -> list[Any]:
        """Return this rank's micro-batches of the step that starts after `consumed_samples` samples.

        Args:
            consumed_samples: the step's position.
            then: position of the step to collate next, while this one runs; None to collate nothing.

        Raises:
            DataError: if a sample is not a pair. What the dataset raises arises here, too, with its traceback.
        """
        if self._ahead is not None and self._ahead.position != consumed_samples:
            self._drop()
        ahead, self._ahead = self._ahead or self._collate(consumed_samples), None
        batches = ahead.batches.result()
        if then is not None:
            self._ahead = self._collate(then)
        return batches

    def set_order(self, order: SampleOrder | MixtureOrder) -> None:
        """Take another order of the samples from the next step on."""
        self._drop()
        assert isinstance(self.loader, BatchLoader)
        self.loader.order = order

    def close(self) -> None:
        """Drop what is collated ahead, and wait for the thread to end, but not for a dataset that does not answer."""
        if self._workers is not None:
            self._workers.close()
        self._drop()

    def _collate(self, position: int) -> _Collation:
        return _Collation(self._workers or self.loader, position, pin_memory=self._pin_memory)

    def _drop(self) -> None:
        if self._ahead is not None:
            self._ahead.drop()
            self._ahead = None


class _Collation:
    """The micro-batches of one step, on their way from the dataset."""

    def __init__(self, loader: BatchLoader | ReplicaLoader | Workers, position: int, *, pin_memory: bool) -> None:
        self.position = position
        self.batches: Future[list[Any]] = Future()
        self._loader = loader
        self._pin_memory = pin_memory
        self._is_dropped = Event()
        self._thread = Thread(target=self._run, name="pipekit-prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # Of this thread alone: the cores are for the step that runs.
        torch.set_num_threads(1)
        try:
            batches = []
            for batch in self._loader.iterate_step(self.position):
                batches.append(batch)
                if self._is_dropped.is_set():
                    return
            self.batches.set_result(self._pin(batches) if self._pin_memory else batches)
        except BaseException as error:
            self.batches.set_exception(error)

    @staticmethod
    def _pin(batches: list[Any]) -> list[Any]:
        if not all(isinstance(batch, tuple) and len(batch) == 2 for batch in batches):
            return list(pack(batches, pin_memory=True))
        # The first stage needs only the inputs, the last only the labels.
        return list(zip(*(pack(list(part), pin_memory=True) for part in zip(*batches, strict=True)), strict=True))

    def drop(self) -> None:
        self._is_dropped.set()
        self._thread.join(_PATIENCE_S)
