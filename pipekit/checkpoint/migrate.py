"""Checkpoints that DeepSpeed wrote, read once and written as pipekit's.

A pipeline leaves the modules of its layers in `layer_*-model_states.pt`, an engine its module in
`mp_rank_*_model_states.pt`; under ZeRO the fp32 weights and the optimizer's states lie flat in
`*zero_pp_rank_*_optim_states.pt`, a piece for each replica, in the order of `param_shapes`.

Source: `utils/zero_to_fp32.py`, `runtime/engine.py` and `runtime/pipe/module.py` of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipekit.checkpoint.manifest import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    LATEST_FILE,
    MANIFEST_FILE,
    WEIGHTS,
    Manifest,
    TensorEntry,
    TrainingState,
    checkpoint_name,
    checksum,
)
from pipekit.checkpoint.model_config import files_beside, read_model_config, stored_sections
from pipekit.checkpoint.writer import write_tensors
from pipekit.config import Config, ModelConfigSource
from pipekit.errors import CheckpointError
from pipekit.files import building_folder, write_atomically

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
class Migration:
    """A checkpoint of DeepSpeed's, as it was understood.

    Attributes:
        tensors: the weights by logical name, in fp32.
        trainable: names of those that the optimizer updates.
        states: by kind, such as `exp_avg`, the optimizer's states by logical name.
        training: progress of the training.
        notes: what could not be told, in sentences.
        path: the checkpoint that was written.
    """

    tensors: dict[str, Tensor]
    trainable: set[str]
    states: dict[str, dict[str, Tensor]]
    training: TrainingState
    notes: list[str] = field(default_factory=list)
    path: Path | None = None


def migrate(
    source: Path, run: Path, *, renames: Mapping[str, str] | None = None, config: ModelConfigSource | None = None
) -> Migration:
    """Write a checkpoint of DeepSpeed's into a run's folder as pipekit's, and return what it holds.

    The layers of a pipeline are called `layers.<index>`, and tied ones by their key, as `pipekit.PipelineModule` names
    those of a script; tensors of other engines keep their names.

    Args:
        source: the folder that DeepSpeed saved into, or that of one tag.
        run: the folder of the run to write.
        renames: other names of layers or modules: `layers.0.weight` becomes `embed.weight` by `{"layers.0": "embed"}`.
        config: configuration of the model under the new names, which the checkpoint then tells; see
            `load_model_config`.

    Raises:
        ConfigError: if `config` describes another model.
        CheckpointError: if there is no such checkpoint, it is damaged, its tensors are sharded over tensor-parallel
            ranks, or `run` has that checkpoint already; nothing is left behind.
    """
    found = _rename(read_deepspeed(_find_tag(source)), renames or {})
    described = None
    if config is not None:
        shapes = {name: tuple(tensor.shape) for name, tensor in found.tensors.items()}
        described = read_model_config(config, shapes, of=source)
    final = run / CHECKPOINTS_FOLDER / checkpoint_name(found.training.step)
    if final.exists():
        raise CheckpointError(f"{final}: is there already; give another run folder")
    try:
        with building_folder(final) as temporary:
            _write(found, described, temporary, source)
        write_atomically(final.parent / LATEST_FILE, final.name + "\n")
    except OSError as error:
        raise CheckpointError(f"{final}: could not be written: {error}") from None
    found.path = final
    return found


def read_deepspeed(folder: Path) -> Migration:
    """Read one checkpoint of DeepSpeed's, with `weights_only=True`; see `migrate`."""
    names = sorted(path.name for path in folder.iterdir())
    layers = {int(match[1]): (match[2], name) for name in names if (match := _LAYER.fullmatch(name))}
    models = {(int(m[2]), int(m[1] or 0)): name for name in names if (m := _MODEL.fullmatch(name))}
    optimizers = {(int(m[2]), int(m[1])): name for name in names if (m := _OPTIMIZER.fullmatch(name))}
    if not models:
        raise CheckpointError(
            f"{folder}: holds no mp_rank_*_model_states.pt, so it is no checkpoint of DeepSpeed; give the folder that "
            "engine.save_checkpoint was given"
        )
    model_states = {key: _load(folder / name) for key, name in models.items()}
    first = next(iter(model_states.values()))
    is_pipeline = first.get("module") is None
    mp_ranks = sorted({mp_rank for mp_rank, _ in models})
    degrees = first.get("checkpoint_parallel_dimensions") or {}
    shards = len([name for name in names if _LAYER.fullmatch(name)]) > len(layers)
    if shards or degrees.get("tp_degree", 1) > 1 or (not is_pipeline and len(mp_ranks) > 1):
        raise CheckpointError(
            f"{folder}: its tensors are sharded over tensor-parallel ranks, and the files do not tell how; join them "
            "first with DeepSpeed's ds_to_universal"
        )
    notes: list[str] = []
    if is_pipeline:
        if layers and sorted(layers) != list(range(max(layers) + 1)):
            notes.append("layers without a file have no tensors, or are functions of a tied layer")
        modules = {idx: dict(_load(folder / name)) for idx, (_, name) in sorted(layers.items())}
        tensors = {f"{idx}.{name}": tensor for idx, module in modules.items() for name, tensor in module.items()}
    else:
        tensors = dict(first["module"])
    masters, states, step, optimizer = dict[str, Tensor](), dict[str, dict[str, Tensor]](), 0, dict[str, Any]()
    for mp_rank in mp_ranks:
        own = [state for (rank, _), state in sorted(model_states.items()) if rank == mp_rank]
        if not own[0].get("param_shapes"):
            continue
        files = [folder / name for (rank, _), name in sorted(optimizers.items()) if rank == mp_rank]
        loaded = [_load(file) for file in files]
        pieces = [each["optimizer_state_dict"] for each in loaded]
        _check_pieces(folder, pieces)
        flat = _read_flat(folder, own[0]["param_shapes"], pieces)
        for name, values in flat.weights.items():
            if name in masters and not torch.equal(masters[name], values):
                notes.append(f"stages had different values of the tied {name}; those of the first are taken")
            masters.setdefault(name, values)
        for kind, of_kind in flat.states.items():
            for name, values in of_kind.items():
                states.setdefault(kind, {}).setdefault(name, values)
        if not flat.states:
            notes.append(f"optimizer states of model rank {mp_rank} could not be told from its files")
        settings = (loaded[0].get("ds_config") or {}).get("optimizer") or {}
        kind_of_optimizer = str(settings.get("type", "adam")).lower()
        step, optimizer = max(step, flat.step), {"type": kind_of_optimizer, **flat.optimizer, **optimizer}
        if "fp32_flat_groups" in pieces[0]:
            for name, shape in (own[0].get("frozen_param_shapes") or {}).items():
                parts = torch.cat([state["frozen_param_fragments"][name].reshape(-1) for state in own])
                tensors[name] = parts[: math.prod(shape)].reshape(tuple(shape))
    if not masters:
        notes.append("without ZeRO, files do not tell whose the optimizer's states are: it begins anew")
    elif any(name not in of_kind for of_kind in states.values() for name in masters):
        notes.append("not every parameter has optimizer states: the optimizer begins anew")
    if not masters or any(name not in of_kind for of_kind in states.values() for name in masters):
        states = {}
    merged = _merge(tensors, masters, is_pipeline=is_pipeline)
    for alias in first.get("shared_params") or {}:
        if merged.pop(alias, None) is not None:
            notes.append(f"{alias} is another name of {first['shared_params'][alias]}, and left out")
    scaler = optimizer.pop("loss_scaler", {})
    trainable = set(masters) or {name for name, tensor in merged.items() if tensor.is_floating_point()}
    buffers = set(first.get("buffer_names") or ()) if not is_pipeline else set()
    found = Migration(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in merged.items()},
        trainable - buffers,
        states,
        TrainingState(
            step=int(first.get("global_steps") or 0),
            consumed_samples=int(first.get("global_samples") or 0),
            seed=0,
            lr=float(optimizer.get("lr", 0.0)),
            optimizer={"type": optimizer.get("type", "adam"), "step": step, "states": sorted(states)},
            loss_scaler=scaler,
            client_state={"client_state": {}, "lr_scheduler": None},
        ),
        notes,
    )
    return _name_layers(found) if is_pipeline else found


def _find_tag(source: Path) -> Path:
    latest = source / "latest"
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        if Path(tag).name != tag or not (source / tag).is_dir():
            raise CheckpointError(f"{latest}: names {tag!r}, which is no folder beside it; give the folder of a tag")
        return source / tag
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder; give the folder that engine.save_checkpoint was given")
    return source


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
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


def _name_layers(found: Migration) -> Migration:
    def logical(name: str) -> str:
        return name.removeprefix("tied_modules.") if name.startswith("tied_modules.") else f"layers.{name}"

    return _renamed(found, {name: logical(name) for name in found.tensors})


def _rename(found: Migration, renames: Mapping[str, str]) -> Migration:
    names = {name: name for name in found.tensors}
    for old, new in renames.items():
        matching = [name for name in names if name == old or name.startswith(f"{old}.")]
        if not matching:
            shown = ", ".join(list(names)[:3])
            raise CheckpointError(f"--rename {old}={new}: no tensor is called {old} or {old}.*; names are {shown}, ...")
        for name in matching:
            names[name] = new + name.removeprefix(old)
    return _renamed(found, names)


def _renamed(found: Migration, names: Mapping[str, str]) -> Migration:
    tensors: dict[str, Tensor] = {}
    for old, tensor in found.tensors.items():
        if names[old] in tensors and not torch.equal(tensors[names[old]], tensor):
            raise CheckpointError(f"two different tensors would be called {names[old]}; give them other names")
        tensors[names[old]] = tensor
    found.tensors = tensors
    found.trainable = {names[name] for name in found.trainable}
    found.states = {
        kind: {names[name]: tensor for name, tensor in of_kind.items()} for kind, of_kind in found.states.items()
    }
    return found


def _write(found: Migration, described: Config | None, folder: Path, source: Path) -> None:
    kinds = {WEIGHTS: found.tensors, **found.states}
    files = {kind: f"{kind}-0000.safetensors" for kind in kinds}
    checksums = {kind: write_tensors(folder / files[kind], tensors) for kind, tensors in kinds.items()}
    entries = {}
    for name, tensor in found.tensors.items():
        own = [kind for kind in kinds if name in kinds[kind]]
        entries[name] = TensorEntry(
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            {kind: files[kind] for kind in own},
            trainable=name in found.trainable,
            checksums={kind: checksums[kind][name] for kind in own},
        )
    config = json.dumps({"layers": [], **stored_sections(described)}, indent=2) + "\n"  # JSON is YAML too
    contents = {name: file.read_bytes() for name, file in files_beside(described).items()}
    contents[CONFIG_FILE] = config.encode()
    for name, content in contents.items():
        write_atomically(folder / name, content)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    manifest = Manifest(
        training=found.training,
        tensors=entries,
        file_bytes=sizes,
        written_by={"layout": f"migrated from DeepSpeed's {source.name}"},
        file_checksums={name: checksum(content) for name, content in contents.items()},
    )
    write_atomically(folder / MANIFEST_FILE, manifest.to_json())
