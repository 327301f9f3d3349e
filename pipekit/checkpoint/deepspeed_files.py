"""DeepSpeed checkpoints, read as logical tensors, optimizer states and training progress.

A pipeline stores the modules of its layers in `layer_*-model_states.pt`, and an engine stores its module in
`mp_rank_*_model_states.pt`. Under ZeRO the fp32 weights and the optimizer's states are flat in
`*zero_pp_rank_*_optim_states.pt`, a piece for each replica, in the order of `param_shapes`.

Source: `utils/zero_to_fp32.py`, `runtime/engine.py` and `runtime/pipe/module.py` of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipekit.checkpoint.manifest import TrainingState
from pipekit.errors import CheckpointError

_LAYER = re.compile(r"layer_(\d+)-(.*)model_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class _Values:
    """Stands in for the classes of DeepSpeed in its files: takes their values, and runs none of their code."""

    def __init__(self, *values: Any) -> None:
        self.values = values


_STAND_INS: list[Any] = [
    (_Values, f"deepspeed.{name}")
    for name in (
        "runtime.fp16.loss_scaler.LossScaler",
        "runtime.fp16.loss_scaler.DynamicLossScaler",
        "runtime.zero.config.ZeroStageEnum",
        "utils.tensor_fragment.fragment_address",
    )
]


@dataclass
class DeepSpeedCheckpoint:
    """Content of a DeepSpeed checkpoint.

    Attributes:
        tensors: the weights by logical name, in fp32.
        trainable: names of the tensors that the optimizer updates.
        states: optimizer states by kind, such as `exp_avg`, and logical name.
        training: training progress.
        notes: sentences about information that could not be found.
        path: path of pipekit's checkpoint, once it is written.
    """

    tensors: dict[str, Tensor]
    trainable: set[str]
    states: dict[str, dict[str, Tensor]]
    training: TrainingState
    notes: list[str] = field(default_factory=list)
    path: Path | None = None

    def rename(self, names: Mapping[str, str]) -> None:
        """Rename every tensor by `names`.

        Raises:
            CheckpointError: if two different tensors would get the same name.
        """
        tensors: dict[str, Tensor] = {}
        for old, tensor in self.tensors.items():
            if names[old] in tensors and not torch.equal(tensors[names[old]], tensor):
                raise CheckpointError(f"two different tensors would be called {names[old]}; give them other names")
            tensors[names[old]] = tensor
        self.tensors = tensors
        self.trainable = {names[name] for name in self.trainable}
        self.states = {
            kind: {names[name]: tensor for name, tensor in of_kind.items()} for kind, of_kind in self.states.items()
        }


def read_deepspeed(folder: Path) -> DeepSpeedCheckpoint:
    """Read the DeepSpeed checkpoint in the folder of one tag, without running code in its pickles.

    Tensors of a pipeline get the names that `pipekit.PipelineModule` would give them.

    Raises:
        CheckpointError: if it is not a DeepSpeed checkpoint, or if it is damaged, incomplete or sharded over
            tensor-parallel ranks.
    """
    files = _find_files(folder)
    try:
        return _read(files)
    except KeyError as error:
        raise CheckpointError(
            f"{folder}: has no {error} where DeepSpeed 0.19.8 writes it; save the checkpoint again with that version"
        ) from None


def _read(files: _Files) -> DeepSpeedCheckpoint:
    ranks = {mp_rank: [_load(path) for path in paths] for mp_rank, paths in files.models.items()}
    first = next(iter(ranks.values()))[0]
    is_pipeline = first.get("module") is None
    _check_unsharded(files, first)
    notes: list[str] = []
    tensors = _read_layers(files, notes) if is_pipeline else dict(first["module"])
    flat = _Flat({}, {}, 0, {})
    for mp_rank, replicas in ranks.items():
        if replicas[0].get("param_shapes"):
            loaded = [_load(path) for path in files.optimizers.get(mp_rank, ())]
            _add_rank(flat, _read_rank(files.folder, replicas[0], loaded), notes, mp_rank=mp_rank)
            tensors |= _read_frozen(replicas, loaded[0])
    states = _complete_states(flat, notes)
    merged = _merge(tensors, flat.weights, is_pipeline=is_pipeline)
    for alias in first.get("shared_params") or {}:
        if merged.pop(alias, None) is not None:
            notes.append(f"{alias} is another name of {first['shared_params'][alias]}, and left out")
    trainable = set(flat.weights) or {name for name, tensor in merged.items() if tensor.is_floating_point()}
    buffers = set(first.get("buffer_names") or ()) if not is_pipeline else set()
    found = DeepSpeedCheckpoint(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in merged.items()},
        trainable - buffers,
        states,
        TrainingState(
            step=int(first.get("global_steps") or 0),
            consumed_samples=int(first.get("global_samples") or 0),
            seed=0,
            lr=float(flat.optimizer.get("lr", 0.0)),
            optimizer={"type": flat.optimizer.get("type", "adam"), "step": flat.step, "states": sorted(states)},
            loss_scaler=flat.optimizer.get("loss_scaler", {}),
            client_state={"client_state": {}, "lr_scheduler": None},
        ),
        notes,
    )
    if is_pipeline:
        found.rename({name: _layer_name(name) for name in found.tensors})
    return found


@dataclass(frozen=True)
class _Files:
    """Files of a checkpoint of DeepSpeed's.

    Attributes:
        folder: where they lie.
        layers: of a pipeline, by the index of the layer, one for each tensor-parallel rank.
        models: by model rank, one for each replica that wrote one.
        optimizers: the flat pieces of ZeRO, in the same way.
    """

    folder: Path
    layers: dict[int, list[Path]]
    models: dict[int, list[Path]]
    optimizers: dict[int, list[Path]]


def _find_files(folder: Path) -> _Files:
    def by_rank(pattern: re.Pattern[str], *, group: int) -> dict[int, list[Path]]:
        """Files by the number in one group of the pattern, in the order of all numbers in their names."""
        matches = [match for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
        found: dict[int, list[Path]] = {}
        for match in sorted(matches, key=lambda match: [int(number) for number in re.findall(r"\d+", match[0])]):
            found.setdefault(int(match[group]), []).append(folder / match[0])
        return dict(sorted(found.items()))

    files = _Files(folder, by_rank(_LAYER, group=1), by_rank(_MODEL, group=2), by_rank(_OPTIMIZER, group=2))
    if not files.models:
        raise CheckpointError(
            f"{folder}: holds no mp_rank_*_model_states.pt, so it is no checkpoint of DeepSpeed; give the folder that "
            "engine.save_checkpoint was given"
        )
    return files


def _check_unsharded(files: _Files, first: Mapping[str, Any]) -> None:
    """Raise a CheckpointError where tensor-parallel ranks share the tensors out."""
    degrees = first.get("checkpoint_parallel_dimensions") or {}
    has_shards = any(len(paths) > 1 for paths in files.layers.values())
    if has_shards or degrees.get("tp_degree", 1) > 1 or (first.get("module") is not None and len(files.models) > 1):
        raise CheckpointError(
            f"{files.folder}: its tensors are sharded over tensor-parallel ranks, and the files do not tell how; join "
            "them first with DeepSpeed's ds_to_universal"
        )


def _read_layers(files: _Files, notes: list[str]) -> dict[str, Tensor]:
    """Tensors of a pipeline's layers, under the index of each layer."""
    if files.layers and list(files.layers) != list(range(max(files.layers) + 1)):
        notes.append("layers without a file have no tensors, or are functions of a tied layer")
    return {f"{idx}.{name}": tensor for idx, (path,) in files.layers.items() for name, tensor in _load(path).items()}


def _read_rank(folder: Path, model: Mapping[str, Any], loaded: Sequence[Mapping[str, Any]]) -> _Flat:
    """Weights and states of a model rank, from the files of its replicas."""
    pieces = [each["optimizer_state_dict"] for each in loaded]
    _check_pieces(folder, pieces)
    flat = _read_flat(folder, model["param_shapes"], pieces)
    settings = (loaded[0].get("ds_config") or {}).get("optimizer") or {}
    flat.optimizer["type"] = str(settings.get("type", "adam")).lower()
    return flat


def _add_rank(flat: _Flat, part: _Flat, notes: list[str], *, mp_rank: int) -> None:
    """Add what a model rank holds to what those before it hold, which goes before where both have it."""
    for name, values in part.weights.items():
        if name in flat.weights and not torch.equal(flat.weights[name], values):
            notes.append(f"stages had different values of the tied {name}; those of the first are taken")
        flat.weights.setdefault(name, values)
    for kind, of_kind in part.states.items():
        flat.states[kind] = {**of_kind, **flat.states.get(kind, {})}
    if not part.states:
        notes.append(f"optimizer states of model rank {mp_rank} could not be told from its files")
    flat.step = max(flat.step, part.step)
    flat.optimizer = {**part.optimizer, **flat.optimizer}


def _read_frozen(replicas: Sequence[Mapping[str, Any]], optimizer: Mapping[str, Any]) -> dict[str, Tensor]:
    """Whole frozen parameters, of which under ZeRO-3 each replica holds a part, and no optimizer a master."""
    if "fp32_flat_groups" not in optimizer["optimizer_state_dict"]:
        return {}
    whole: dict[str, Tensor] = {}
    for name, shape in (replicas[0].get("frozen_param_shapes") or {}).items():
        parts = torch.cat([state["frozen_param_fragments"][name].reshape(-1) for state in replicas])
        whole[name] = parts[: math.prod(shape)].reshape(tuple(shape))
    return whole


def _complete_states(flat: _Flat, notes: list[str]) -> dict[str, dict[str, Tensor]]:
    """Optimizer states, or none where some are missing."""
    if not flat.weights:
        notes.append("without ZeRO, files do not tell whose the optimizer's states are: it begins anew")
        return {}
    if any(name not in of_kind for of_kind in flat.states.values() for name in flat.weights):
        notes.append("not every parameter has optimizer states: the optimizer begins anew")
        return {}
    return flat.states


def _load(path: Path) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        unknown = re.search(r"GLOBAL (\S+)", str(error))
        what = f"an object of {unknown[1]}, whose code could do anything" if unknown else "what is no tensor"
        raise CheckpointError(
            f"{path}: holds {what}, and is not read; if your script saved it as client_state, save the checkpoint "
            "again without it"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: cut short or damaged ({first_line})") from None
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{path}: holds {type(loaded).__name__}, and DeepSpeed writes a dict; is it another file?"
        )
    return loaded


def _check_pieces(folder: Path, pieces: Sequence[Mapping[str, Any]]) -> None:
    count = pieces[0]["partition_count"] if pieces else 0
    count = max(count) if isinstance(count, (list, tuple)) else count
    if not pieces or count != len(pieces):
        raise CheckpointError(
            f"{folder}: holds {len(pieces)} *_optim_states.pt of a model rank, and {count or 'some'} were written; "
            "copy the files of every machine into one folder"
        )


@dataclass
class _Flat:
    """Weights and states of a model rank, out of the flat pieces of its replicas."""

    weights: dict[str, Tensor]
    states: dict[str, dict[str, Tensor]]
    step: int
    optimizer: dict[str, Any]


def _read_flat(
    folder: Path, param_shapes: Sequence[Mapping[str, Sequence[int]]], pieces: Sequence[Mapping[str, Any]]
) -> _Flat:
    is_sharded = "fp32_flat_groups" in pieces[0]  # under ZeRO-3, each parameter for itself
    flats = [piece["fp32_flat_groups" if is_sharded else "single_partition_of_fp32_groups"] for piece in pieces]
    stored: list[Any] = [
        piece.get("optimizer_state_dict" if is_sharded else "base_optimizer_state") for piece in pieces
    ]
    paddings = pieces[0].get("param_alignment_paddings")
    if is_sharded:
        param_shapes = [{name: shape for shapes in param_shapes for name, shape in shapes.items()}]
        flats = [[torch.cat(list(groups))] for groups in flats]
        paddings = None

    def cut(groups: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for index, shapes in enumerate(param_shapes):
            parts = [each[index] for each in groups]
            whole, start = (parts[0] if is_sharded else torch.cat(parts)), 0
            for place, (name, shape) in enumerate(shapes.items()):
                size = math.prod(shape)
                own = -(-size // len(parts)) if is_sharded else size
                if start + own > len(whole):
                    raise CheckpointError(f"{folder}: its flat fp32 weights end within {name}; the files do not fit")
                values = torch.cat([part[start : start + own] for part in parts]) if is_sharded else whole[start:][:own]
                found[name] = values[:size].reshape(tuple(shape)).float()
                start += own + (paddings[index][place] if paddings else 0)
            if len(whole) - start >= max(2 * len(parts) * (len(shapes) if is_sharded else 1), 2):
                raise CheckpointError(
                    f"{folder}: its flat fp32 weights are longer than its parameters; the files differ"
                )
        return found

    weights = cut(flats)
    states: dict[str, dict[str, Tensor]] = {}
    step, optimizer = 0, dict[str, Any]()
    if all(isinstance(each, Mapping) and each.get("state") for each in stored):
        optimizer = {"lr": stored[0]["param_groups"][0].get("lr", 0.0)}
        groups = [[each["state"][key] for key in sorted(each["state"])] for each in stored]
        for kind, value in groups[0][0].items():
            if kind == "step":
                step = int(value)
            elif isinstance(value, Tensor) and all(kind in group for each in groups for group in each):
                of_kind = [[group[kind] for group in each] for each in groups]
                of_kind = [[torch.cat(each)] for each in of_kind] if is_sharded else of_kind
                # What is as long as the weights, but for the last replica's padding, lies as they do.
                if [[len(flat) for flat in each] for each in of_kind[:-1]] == [
                    [*map(len, each)] for each in flats[:-1]
                ]:
                    states[kind] = cut(of_kind)
    scaler = vars(pieces[0].get("loss_scaler") or object) if pieces[0].get("dynamic_loss_scale") else {}
    optimizer["loss_scaler"] = {name: float(scaler[name]) for name in _SCALER if name in scaler}
    return _Flat(weights, states, step, optimizer)


def _merge(tensors: Mapping[str, Tensor], masters: Mapping[str, Tensor], *, is_pipeline: bool) -> dict[str, Tensor]:
    """Weights, those of the optimizer in place of their 16-bit copies; copies of tied modules are left out."""
    merged = {**tensors, **masters}
    if is_pipeline:
        tied = [(name.split(".", 2)[2], values) for name, values in masters.items() if name.startswith("tied_modules.")]
        for name, tensor in tensors.items():
            bare = name.partition(".")[2]
            same = [values for own, values in tied if own == bare and values.shape == tensor.shape]
            if name not in masters and any(torch.equal(values.to(tensor.dtype), tensor) for values in same):
                del merged[name]
    return merged


def _layer_name(name: str) -> str:
    """Logical name of a pipeline's tensor."""
    return name.removeprefix("tied_modules.") if name.startswith("tied_modules.") else f"layers.{name}"
