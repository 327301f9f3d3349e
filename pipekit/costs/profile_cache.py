"""Cache of measured layers: one JSON file for each, named by the layer and the machine."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, fields
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from pipekit.costs.fingerprint import Plain
from pipekit.costs.trace import TracedLayer
from pipekit.errors import PipekitError
from pipekit.files import write_atomically
from pipekit.predictions.layer_costs import LayerCosts
from pipekit.tensors.meta import NestedMeta, TensorMeta
from pipekit.tensors.nested import unflatten

logger = logging.getLogger(__name__)


class ProfileCache:
    """A folder of measurements, made with the first of them, which any number of processes may read and write."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, identity: Plain) -> TracedLayer | None:
        """Read a measurement; None where there is none, or the file is broken."""
        path = self._path(identity)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            logger.warning("%s cannot be read, and the layer is measured anew: %s", path, error)
            return None
        try:
            return _parse(json.loads(text), identity)
        except (ValueError, LookupError, TypeError, AttributeError, StopIteration, PipekitError) as error:
            logger.warning("%s is broken, and the layer is measured anew: %s", path, error)
            return None

    def save(self, identity: Plain, measured: TracedLayer) -> None:
        """Write a measurement; where the folder cannot be written, the layer is measured again next time."""
        path = self._path(identity)
        content = {"identity": identity, "costs": asdict(measured.costs), "outputs": plain_meta(measured.outputs)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            logger.warning("what was measured cannot be kept in %s: %s", path.parent, error.strerror or error)

    def _path(self, identity: Plain) -> Path:
        text = json.dumps(identity, sort_keys=True)
        return self._folder / f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.json"


def plain_meta(meta: NestedMeta) -> Plain:
    """Shapes and types of nested tensors as JSON gives them back."""
    tensors = [
        [list(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.requires_grad] for tensor in meta.tensors
    ]
    return {"tensors": tensors, "structure": meta.structure}


def _parse(content: Plain, identity: Plain) -> TracedLayer:
    if content["identity"] != identity:
        raise ValueError("it is of another layer or machine")
    return TracedLayer(_parse_costs(content["costs"]), _parse_meta(content["outputs"]))


def _parse_costs(content: Plain) -> LayerCosts:
    costs = LayerCosts(**content)
    for field in fields(costs):
        value: Any = getattr(costs, field.name)
        # What was measured has seconds.
        kinds = ["float"] if field.name.endswith("_s") else str(field.type).split(" | ")
        if value is None and "None" in kinds:
            continue
        if type(value).__name__ not in kinds or not isfinite(value) or value < 0:
            raise ValueError(f"{field.name}={value!r}")
    return costs


def _parse_meta(content: Plain) -> NestedMeta:
    tensors = []
    for shape, dtype_name, requires_grad in content["tensors"]:
        dtype = getattr(torch, dtype_name)
        if not isinstance(dtype, torch.dtype) or type(requires_grad) is not bool:
            raise ValueError(f"a tensor of {dtype_name}")
        tensors.append(TensorMeta(tuple(map(int, shape)), dtype, requires_grad))
    meta = NestedMeta(tuple(tensors), content["structure"])
    # As many tensors must be there as the structure has places for.
    placed = NestedMeta.of(unflatten([torch.empty(0) for _ in tensors], meta.structure), "a stored layer")
    if placed.structure != meta.structure or len(placed.tensors) != len(tensors):
        raise ValueError(f"{len(tensors)} tensors in a structure of {meta.structure!r}")
    return meta
