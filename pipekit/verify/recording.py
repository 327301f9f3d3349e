"""Recordings of training steps on disk: the tensors that each rank saw, written and read one at a time."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipekit.layout import Coordinate
from pipekit.tensor_parallel.shards import Shard
from pipekit.verify.measurement import MeasurementKind

_INDEX, _SUMMARY = "index.jsonl", "summary.json"


@dataclass(frozen=True, order=True)
class TensorKey:
    """Identity of one logical tensor of a run, the same under every layout.

    Attributes:
        kind: what it is.
        step: in which step; of weights, after how many updates.
        layer_idx: the layer that it belongs to.
        name: of a parameter its logical name, of a layer's output its place in the output.
        micro_batch: index of the micro-batch in the global batch; -1 for what belongs to the whole step.
    """

    kind: MeasurementKind
    step: int
    layer_idx: int
    name: str
    micro_batch: int = -1


@dataclass(frozen=True)
class _Entry:
    """One tensor that one rank has written."""

    path: Path
    coordinate: Coordinate
    rank: int
    shard: Shard | None

    def load(self) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor("tensor")
            return tensor


@dataclass(frozen=True)
class TensorCopy:
    """Copy of a logical tensor: that of one rank, or the shards of some tensor-parallel ranks together."""

    _entries: tuple[_Entry, ...]

    @property
    def coordinate(self) -> Coordinate:
        """The place of the first of these ranks."""
        return self._entries[0].coordinate

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that hold it."""
        return tuple(entry.rank for entry in self._entries)

    def load(self) -> Tensor:
        """Read it, and join its shards."""
        shards = [entry.load() for entry in self._entries]
        shard = self._entries[0].shard
        return shards[0] if shard is None else shard.join(shards)


class Recorder:
    """Writes the tensors that one rank sees into a folder, each as soon as it is there: none stays in memory."""

    def __init__(self, folder: Path, *, rank: int, coordinate: Coordinate) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._num_tensors = 0
        self._summary: dict[str, Any] = {"rank": rank, **asdict(coordinate)}
        self._index = (folder / _INDEX).open("w", encoding="utf-8")

    def write(self, key: TensorKey, tensor: Tensor, *, shard: Shard | None = None) -> None:
        """Write a tensor, or the `shard` of one."""
        name = f"{self._num_tensors:06d}.safetensors"
        self._num_tensors += 1
        # A view would be written with all that it is a view of.
        save_file({"tensor": tensor.detach().cpu().clone().contiguous()}, self._folder / name)
        line = {"key": asdict(key), "file": name, "shard": None if shard is None else asdict(shard)}
        self._index.write(json.dumps(line) + "\n")

    def finish(self, **summary: Any) -> None:
        """Write the rank's summary as JSON, beside the tensors."""
        self._index.close()
        (self._folder / _SUMMARY).write_text(json.dumps({**self._summary, **summary}), encoding="utf-8")


class Recording:
    """The tensors and the summaries that all ranks of a run have written.

    Args:
        folder: holds a folder for each rank.

    Attributes:
        summaries: for each rank its place in the layout and what `Recorder.finish` was given, such as its losses.
    """

    def __init__(self, folder: Path) -> None:
        self._entries: dict[TensorKey, list[_Entry]] = defaultdict(list)
        self.summaries: list[dict[str, Any]] = []
        for rank_folder in sorted(path for path in folder.iterdir() if (path / _SUMMARY).is_file()):
            summary = json.loads((rank_folder / _SUMMARY).read_text(encoding="utf-8"))
            self.summaries.append(summary)
            coordinate = Coordinate(summary["pipe"], summary["data"], summary["tensor"])
            for line in (rank_folder / _INDEX).read_text(encoding="utf-8").splitlines():
                written = json.loads(line)
                shard = written["shard"] and Shard(**{**written["shard"], "blocks": tuple(written["shard"]["blocks"])})
                entry = _Entry(rank_folder / written["file"], coordinate, summary["rank"], shard)
                self._entries[TensorKey(**written["key"])].append(entry)

    def keys(self, kind: MeasurementKind | None = None) -> list[TensorKey]:
        """Return the tensors of one kind, or all."""
        return sorted(key for key in self._entries if kind is None or key.kind == kind)

    def copies(self, key: TensorKey) -> list[TensorCopy]:
        """Return each copy of a logical tensor; none where nobody has it."""
        return list(_copies(self._entries.get(key, [])))

    def load(self, key: TensorKey) -> Tensor:
        """Return the first copy of a logical tensor."""
        return self.copies(key)[0].load()


def _copies(entries: Sequence[_Entry]) -> Iterator[TensorCopy]:
    sharded: dict[tuple[int, int], list[_Entry]] = defaultdict(list)
    for entry in sorted(entries, key=lambda entry: entry.rank):
        if entry.shard is None:
            yield TensorCopy((entry,))
        else:
            sharded[entry.coordinate.pipe, entry.coordinate.data].append(entry)
    for shards in sharded.values():
        yield TensorCopy(tuple(sorted(shards, key=lambda entry: entry.coordinate.tensor)))


def flat_norm(tensor: Tensor) -> float:
    """Return the 2-norm of all elements, in double precision.

    Example:
        >>> flat_norm(torch.tensor([[3.0, 4.0]]))
        5.0
    """
    return float(torch.linalg.vector_norm(tensor.to(torch.float64)))
