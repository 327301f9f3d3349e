"""Writing a checkpoint: each rank writes its share of the logical tensors, and all of it appears or nothing."""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pipekit.checkpoint.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    WEIGHTS,
    TensorEntry,
    TrainingState,
    checkpoint_name,
)
from pipekit.checkpoint.publish import begin_checkpoint, hidden_folder, keep_checkpoint, write_manifest
from pipekit.checkpoint.retention import Retention
from pipekit.checkpoint.writer import write_tensors
from pipekit.deepspeed.optimizer_view import ParameterStates
from pipekit.distributed.host_folders import LONGEST_WRITE, HostFolders, plan_copies, transfer_files
from pipekit.distributed.processes import gather_objects, raise_together, tell_object
from pipekit.engine.base_engine import BaseEngine
from pipekit.engine.tensor_group import join_shards, logical_shape
from pipekit.errors import NumbersError, PipekitError
from pipekit.files import replace_folder, wait_until_seen, write_atomically
from pipekit.layers.lora import is_adapter
from pipekit.storage import storing


class SnapshotMemory:
    """Host memory for copies of tensors, page-locked under CUDA, that the next snapshot uses again: fresh pages cost
    more than a copy."""

    def __init__(self) -> None:
        self._copies: dict[tuple[str, str], Tensor] = {}

    def copy(self, name: str, kind: str, tensor: Tensor) -> Tensor:
        """Copy of a tensor, contiguous, which the next call with this name and kind overwrites."""
        copy = self._copies.get((name, kind))
        if copy is None:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            self._copies[name, kind] = copy
        return copy.copy_(tensor.detach())


class PendingCheckpoint:
    """A checkpoint that is written, or is being written in the background; `path` appears once it is whole."""

    def __init__(self, path: Path, write: Callable[[], None], *, in_background: bool) -> None:
        self.path, self.in_background = path, in_background
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        began_s = time.monotonic()
        self.seconds = 0.0
        """Seconds that it took to write, once it is written."""
        if not in_background:
            write()
            self.seconds = time.monotonic() - began_s
            return

        def run() -> None:
            try:
                write()
                self.seconds = time.monotonic() - began_s
            except BaseException as error:  # raised again where it is waited for
                self._error = error

        # Where the process ends early, what is written so far is left behind, and the checkpoint before is the newest.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """True once `wait` would return at once."""
        return self._thread is None or not self._thread.is_alive()

    def settle(self, timeout_s: float) -> None:
        """Wait until it is written or has failed, or the time is up, whatever the other ranks do."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def wait(self) -> Path:
        """Wait until the checkpoint is on the disk, and return its path. Every rank calls this at the same point.

        Raises:
            StorageError: on every rank, if any rank could not write.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self.path


def save_checkpoint(
    engine: BaseEngine,
    folder: Path,
    *,
    training: TrainingState,
    config_yaml: str,
    extra_files: Mapping[str, Path] | None = None,
    retention: Retention | None = None,
    name: str | None = None,
    update_latest: bool = True,
    background: SnapshotMemory | None = None,
    hosts: HostFolders | None = None,
) -> PendingCheckpoint:
    """Write a checkpoint into `folder`. Every rank calls this together, once the one before has been waited for.

    The replicas of a stage share its tensors out among themselves, so that all ranks write at once, each from a copy of
    its share in the host's memory. The folder appears under its name when it is complete, and `latest` names it after
    that. Where each host has a folder of its own, it gets what its ranks write, a copy of what its neighbour's write,
    and all the rest; the checkpoint appears on all of them, or `latest` names it on none.

    Args:
        engine: the engine to save.
        folder: the run's `checkpoints` folder, which every rank sees, or every rank of a host.
        training: the state of the training. Where it has a `base`, of the parameters those of adapters are written.
        config_yaml: the resolved configuration.
        extra_files: files to copy in, by name.
        retention: the checkpoints of `folder` that are kept; by default all.
        name: name of the checkpoint; made from the step unless given.
        update_latest: whether `latest` names it from now on.
        background: memory for the copy, where this is to return once it is made, and to write it on a thread; the
            next save uses it again. By default all is written before this returns.
        hosts: the hosts, where each has a folder of its own.

    Raises:
        StorageError: on every rank, if any rank could not write; nothing is left behind. `wait` raises it where that
            happens in the background.
        NumbersError: on every rank, if a trained tensor is not finite; nothing is left behind.
    """
    final = folder / (name or checkpoint_name(training.step))
    temporary = hidden_folder(final)
    rank = dist.get_rank()
    hosts = HostFolders.shared() if hosts is None else hosts
    everybody = engine.mpu.build_group(
        [range(dist.get_world_size())], "gloo", purpose="checkpoints", timeout=LONGEST_WRITE
    )
    assert everybody is not None
    control = everybody.process_group
    kept = retention or Retention()

    def on_each_host(work: Callable[[], object]) -> None:
        hosts.on_each(work, final, control)

    on_each_host(lambda: begin_checkpoint(final))
    shares, entries = _gather_share(
        engine,
        writer=rank,
        memory=SnapshotMemory() if background is None else background,
        adapters_alone=bool(training.base),
    )
    layout = f"{engine.mpu.layout}, ZeRO {engine.config.get('zero_optimization', {}).get('stage', 0)}"

    def write() -> None:
        error: Exception | None = None
        file_bytes: dict[str, int] = {}
        checksums: dict[str, dict[str, str]] = {tensor_name: {} for tensor_name in entries}
        try:
            _check_finite(shares, entries)
            with storing(final):
                wait_until_seen({temporary: None})  # which rank 0 has made
                for file, tensors in shares.items():
                    for tensor_name, value in write_tensors(temporary / file, tensors).items():
                        checksums[tensor_name][file.rpartition("-")[0]] = value
                    file_bytes[file] = (temporary / file).stat().st_size
                    tensors.clear()
        except PipekitError as failure:
            error = failure
        checked = {key: replace(entry, checksums=checksums[key]) for key, entry in entries.items()}
        contents: dict[str, bytes] = {}
        try:
            raise_together(error, control)
            written = gather_objects((checked, file_bytes), control)
            sizes = {rank: theirs for rank, (_, theirs) in enumerate(written)}
            transfer_files(temporary, plan_copies(sizes, hosts), control)

            def describe() -> None:
                all_bytes = {file: size for theirs in sizes.values() for file, size in theirs.items()}
                if len(hosts.ranks) == 1:
                    wait_until_seen({temporary / file: size for file, size in all_bytes.items()})
                contents.update({file: source.read_bytes() for file, source in (extra_files or {}).items()})
                contents[CONFIG_FILE] = config_yaml.encode()
                tensors = {key: entry for some, _ in written for key, entry in some.items()}
                write_manifest(
                    final,
                    _with_states_of(training, tensors),
                    contents,
                    tensors=tensors,
                    tensor_bytes=all_bytes,
                    layout=layout,
                    hosts=hosts.names if len(hosts.names) > 1 else (),
                )
                contents[MANIFEST_FILE] = (temporary / MANIFEST_FILE).read_bytes()

            on_each_host(lambda: describe() if rank == 0 else None)
            if len(hosts.ranks) > 1:
                told = tell_object(contents if rank == 0 else None, control)

                def write_others() -> None:
                    for name, data in told.items() if rank else ():
                        write_atomically(temporary / name, data)

                on_each_host(write_others)
            # Not before all have it does any name it, or remove an older one.
            on_each_host(lambda: replace_folder(temporary, final))
            on_each_host(lambda: keep_checkpoint(final, retention=kept, update_latest=update_latest))
        except PipekitError:
            if hosts.leads:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    return PendingCheckpoint(final, write, in_background=background is not None)


def _gather_share(
    engine: BaseEngine, *, writer: int, memory: SnapshotMemory, adapters_alone: bool
) -> tuple[dict[str, dict[str, Tensor]], dict[str, TensorEntry]]:
    """Return the tensors that this rank writes, by file, and their entries.

    Gathers from the stage's other replicas, and joins the parts of its tensor-parallel ranks.
    """
    mpu, view = engine.mpu, engine.view
    view.state_names()  # which checks them
    states = view.states_by_parameter()
    shares: dict[str, dict[str, Tensor]] = {}
    entries: dict[str, TensorEntry] = {}
    tensor_group = engine.logical.tensor_group
    load = [0] * (mpu.layout.dp * mpu.layout.tp)
    place = mpu.data_parallel_rank * mpu.layout.tp + mpu.coordinate.tensor

    def put(
        name: str, kind: str, tensor: Tensor, *, trainable: bool, numbers: Mapping[str, float] | None = None
    ) -> None:
        file = f"{kind}-{writer:04d}.safetensors"
        if kind == WEIGHTS:
            dtype = str(tensor.dtype).removeprefix("torch.")
            entries[name] = TensorEntry(tuple(tensor.shape), dtype, {}, trainable, numbers=numbers or {})
        else:
            tensor = tensor.float()
        entries[name] = replace(entries[name], files={**entries[name].files, kind: file})
        shares.setdefault(file, {})[name] = memory.copy(name, kind, tensor)

    for name, parameter, owned in engine.logical.named_logical_parameters():
        if adapters_alone and not is_adapter(name):
            continue
        # The owner among the stage's ranks is the one with the least to write so far: the same on all of them.
        owner = load.index(min(load))
        mine = owned and owner == place
        if owned:
            load[owner] += math.prod(logical_shape(parameter))
        trainable = view.updates(parameter)
        own = states.get(parameter, ParameterStates()) if trainable else ParameterStates()
        for kind in (WEIGHTS, *own.names):
            if kind == WEIGHTS:
                part = view.full_master(parameter) if trainable else view.full_frozen(parameter)
            else:
                part = view.full_state(parameter, kind)
            tensor = join_shards(part, parameter, tensor_group)
            if kind == WEIGHTS and tensor.is_floating_point():
                tensor = tensor.float()  # frozen ones too, as the masters of the others are
            if mine:
                put(name, kind, tensor, trainable=trainable, numbers=own.numbers)
    for name, buffer, owned in engine.logical.named_logical_buffers():
        if owned and place == 0:
            put(name, WEIGHTS, buffer, trainable=False)
    return shares, entries


def _with_states_of(training: TrainingState, tensors: Mapping[str, TensorEntry]) -> TrainingState:
    """State of the training with the names of all optimizer states: stages may differ in theirs."""
    if "states" not in training.optimizer:
        return training
    names = sorted({kind for entry in tensors.values() for kind in entry.files} - {WEIGHTS})
    return replace(training, optimizer={**training.optimizer, "states": names})


def _check_finite(shares: Mapping[str, Mapping[str, Tensor]], entries: Mapping[str, TensorEntry]) -> None:
    """Check that what is trained, and the states of its optimizer, are finite.

    Raises:
        NumbersError: if not, with the first tensor that is not.
    """
    for file, tensors in shares.items():
        for name, tensor in tensors.items():
            # The sum of finite numbers may be too large; only then each is looked at.
            if entries[name].trainable and not tensor.sum().isfinite() and not tensor.isfinite().all():
                what = "the weights" if file.startswith(WEIGHTS) else f"the optimizer's {file.rpartition('-')[0]}"
                raise NumbersError(
                    f"{what} of {name} are not finite, and no checkpoint is made of them: the one before stays the "
                    "newest; go on from it, with another optimizer.lr or other data"
                )
