"""A process group that treats tensors as NCCL does, over gloo: tests on it find what only a GPU would show.

Each group of a rank does its operations one after the other, in the order posted, on a thread of its own and a little
late. A send and its receive wait for each other. What an operation is to fill holds poison until the operation is
waited for, and what was posted must stay as it is, and what is sent must stay alive, until the operation has ended.
What breaks these rules is reported at the end of the job, or with the error that ends it.

One rule is stricter than NCCL's: two operations that are under way may not share memory that one of them fills.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property, partial, partialmethod
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten, tree_unflatten

_DELAY_S = (0.0003, 0.0015)
# So long may what nobody waits for take to leave at the end of a job.
_LEAVE_S = 60.0
_READY, _DATA = 1, 2

Run = Callable[["LateWork"], None]
"""Does an operation over gloo."""


class Faults(list[str]):
    """The rules that this process broke, in words."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[LateGroup] = []

    def check(self, error: BaseException | None = None) -> None:
        """Wait until all operations have ended, unless the job ended with an `error`.

        Raises:
            AssertionError: if a rule was broken.
        """
        deadline_s = time.monotonic() + _LEAVE_S
        # After an error, operations are left in the middle as a matter of course.
        for work in [work for group in self.groups for work in group.works] if error is None else []:
            if not work.ended.wait(max(0.0, deadline_s - time.monotonic())):
                self.append(f"{work} was left in the middle")
            elif work.outputs:
                self.append(f"{work} was never waited for")
        if self:
            raise AssertionError("\n".join(self)) from error


@contextmanager
def installed() -> Iterator[Faults]:
    """Let the process groups of this process, other than those that ask for gloo, behave like NCCL's.

    Raises:
        AssertionError: at the end of the block, if a rule was broken in it.
    """
    faults = Faults()
    name = "nccl_double"
    dist.Backend.register_backend(name, partial(LateGroup, faults), devices="cpu")
    init = dist.init_process_group
    with mock.patch.object(dist, "init_process_group", lambda backend, **options: init(name, **options)):
        try:
            yield faults
        except BaseException as error:
            faults.check(error)
            raise
        faults.check()


class _Sent:
    """A buffer on its way, held weakly, and the bytes that it had when it was posted."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._place = tensor.storage_offset(), tensor.size(), tensor.stride()
        self.copy = _copy(tensor)

    def fault(self) -> str | None:
        """Broken rule of the buffer, in words; None if there is none."""
        # None, or a storage that counts as a user from now on.
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            return "was let go before it had left"
        now = torch.empty(0, dtype=self.copy.dtype).set_(storage, *self._place)
        return None if _same(now, self.copy) else "was written to before it had left"


class LateWork:
    """An operation under way.

    Args:
        group: where it was posted.
        what: its name, for messages.
        outputs: what it fills, each with a copy that gloo fills.
    """

    def __init__(self, group: LateGroup, what: str, outputs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.group = group
        self.what = f"operation {len(group.works)} of the ranks {group.ranks}, {what},"
        self.rank = dist.get_rank()
        self.outputs = list(outputs)
        self.poisoned = [(output, _copy(output)) for output, _ in outputs]
        self.ended = threading.Event()
        self.error: Exception | None = None

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.what}"

    def is_completed(self) -> bool:
        """True if it has ended; its outputs are filled by `wait` alone."""
        return self.ended.is_set()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait until it has ended, and fill what it fills.

        Raises:
            RuntimeError: if it fails or lasts longer than the group's time limit.
        """
        if not self.ended.wait((timeout or self.group.timeout).total_seconds()):
            current = next(work for work in self.group.works if not work.ended.is_set())
            raise RuntimeError(f"{self} has not ended in time, behind {current.what}")
        if self.error is not None:
            raise RuntimeError(f"{self} failed: {self.error}") from self.error
        for output, before in self.poisoned:
            self.group.check(self, output, before)
        with torch.no_grad():
            for output, result in self.outputs:
                output.detach().copy_(result)
        self.outputs, self.poisoned = [], []
        return True


class LateGroup(dist.ProcessGroup):
    """A process group whose operations end late, in the order posted.

    Args:
        faults: where broken rules are reported.
        store: through which the ranks find each other.
        rank: of this process in the group.
        size: the number of ranks.
        timeout: no operation lasts longer.
    """

    def __init__(self, faults: Faults, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.timeout = timeout
        self.works: list[LateWork] = []
        self._faults = faults
        self._gloo = dist.ProcessGroup(store, rank, size)
        self._gloo._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        backend = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
        self._gloo._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        self._tasks: queue.SimpleQueue[tuple[LateWork, Run] | None] = queue.SimpleQueue()
        # The same delays in every run, others on each rank and in each group.
        self._random = random.Random(1000 * rank + len(faults.groups))
        faults.groups.append(self)
        threading.Thread(target=self._serve, daemon=True).start()

    @cached_property
    def ranks(self) -> list[int]:
        """The global ranks of the group."""
        return dist.get_process_group_ranks(self)

    def _serve(self) -> None:
        broken: Exception | None = None
        while (task := self._tasks.get()) is not None:
            work, run = task
            time.sleep(self._random.uniform(*_DELAY_S))
            try:
                if broken is not None:
                    raise RuntimeError(f"an operation before it failed: {broken}")
                run(work)
            except Exception as error:
                work.error = broken = error
            work.ended.set()

    def _post(self, what: str, run: Run, outputs: Sequence[tuple[Tensor, Tensor]] = (),
              inputs: Sequence[Tensor] = ()) -> LateWork:  # fmt: skip
        for output, _ in outputs:
            poison(output)
        posted = [(tensor, _copy(tensor)) for tensor in inputs]

        def check_and_run(work: LateWork) -> None:
            for tensor, before in posted:
                self.check(work, tensor, before)
            run(work)

        work = LateWork(self, what, outputs)
        self.works.append(work)
        self._tasks.put((work, check_and_run))
        return work

    def check(self, work: LateWork, tensor: Tensor, before: Tensor) -> None:
        """Report a tensor that is not as it was."""
        if not _same(tensor, before):
            self._report(work, f"had its {_shape(tensor)} written to before it had ended")

    def _report(self, work: LateWork, fault: str | None) -> None:
        if fault is not None:
            self._faults.append(f"{work} {fault}")

    def send(self, tensors: list[Tensor], target: int, tag: int) -> LateWork:
        (tensor,) = tensors
        # What is posted does not hold the tensor: only its sender keeps it alive.
        sent = _Sent(tensor.detach())

        def run(work: LateWork) -> None:
            wanted = torch.zeros(1, dtype=torch.int64)
            self._gloo.recv([wanted], target, _READY).wait()
            data = sent.copy
            if wanted.item() != data.nbytes:
                self._report(work, f"has {data.nbytes} bytes, and its receive {wanted.item()}")
                # So that the job comes to its end, and to the report.
                data = torch.zeros(int(wanted.item()), dtype=torch.uint8)
            self._report(work, sent.fault())
            self._gloo.send([data], target, _DATA).wait()

        return self._post(f"the send of {_shape(tensor)} to rank {self.ranks[target]}", run)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> LateWork:
        (tensor,) = tensors
        arrived = _copy(tensor)

        def run(work: LateWork) -> None:
            self._gloo.send([torch.tensor([arrived.nbytes])], source, _READY).wait()
            self._gloo.recv([arrived], source, _DATA).wait()

        what = f"the receive of {_shape(tensor)} from rank {self.ranks[source]}"
        return self._post(what, run, [(tensor, arrived)])

    def _collective(self, name: str, *arguments: Any, **options: Any) -> LateWork:
        leaves, tree = tree_flatten((arguments, options))
        copies = [_copy(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        pairs = [(leaf, copy) for leaf, copy in zip(leaves, copies, strict=True) if isinstance(leaf, Tensor)]
        # The first argument is filled, but at a broadcast's source, and on all ranks but one that a sum is for.
        is_root = getattr(arguments[-1], "rootRank", None) == self.rank() if arguments else False
        is_filled = {"broadcast": not is_root, "reduce": is_root}.get(name, bool(arguments))
        num_outputs = sum(isinstance(leaf, Tensor) for leaf in tree_flatten(arguments[0])[0]) if is_filled else 0

        def run(work: LateWork) -> None:
            positional, named = tree_unflatten(copies, tree)
            getattr(self._gloo, name)(*positional, **named).wait()

        what = f"{name} of {', '.join(_shape(tensor) for tensor, _ in pairs) or 'nothing'}"
        return self._post(what, run, pairs[:num_outputs], [tensor for tensor, _ in pairs[num_outputs:]])

    def shutdown(self) -> None:
        """End the thread, after what was posted."""
        self._tasks.put(None)


_COLLECTIVES = (
    "allreduce reduce broadcast allgather all_gather_single reduce_scatter reduce_scatter_single gather scatter "
    "alltoall all_to_all_single barrier"
)
for _name in _COLLECTIVES.split():
    setattr(LateGroup, _name, partialmethod(LateGroup._collective, _name))


def poison(tensor: Tensor) -> None:
    """Fill a tensor with NaN, or with integers that nobody expects."""
    with torch.no_grad():
        value = float("nan") if tensor.is_floating_point() or tensor.is_complex() else 0x5B
        tensor.detach().fill_(value)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _same(tensor: Tensor, other: Tensor) -> bool:
    """Compare bytes: NaN equals itself."""
    ours, theirs = (_copy(each).reshape(-1).view(torch.uint8) for each in (tensor, other))
    return torch.equal(ours, theirs)


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
