"""Adapters in the format of `peft`: a folder of `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor

from pipekit.checkpoint.manifest import checksum, resolve_checkpoint
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.checkpoint.stored_tensors import read_header, read_tensor
from pipekit.checkpoint.writer import tensor_bytes, write_tensors
from pipekit.config import Config
from pipekit.errors import CheckpointError, PipekitError
from pipekit.files import building_folder, check_free, parse_json, read_regular, write_atomically
from pipekit.inference.base_weights import MergedReader, with_base
from pipekit.inference.hugging_face import HuggingFaceFolder
from pipekit.inference.load_model import check_trusted, read_config
from pipekit.layers.lora import LoraTarget, find_targets
from pipekit.layers.specs import LayerSpec, layer_names
from pipekit.models import build_layers, names_in_transformers
from pipekit.models.family import TensorRename

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_MAX_BYTES = 10_000_000

# Settings of `peft` that change what an adapter computes, with the values that it can have here.
_FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "lora_bias": (False, None),
    "target_parameters": (None, []),
}


@dataclass(frozen=True)
class PeftTensor:
    """A parameter of an adapter under its name in `peft`.

    Attributes:
        ours: logical name.
        theirs: their name.
        pattern: of `einops.rearrange`, from our order of elements to theirs; None where they are the same.
        sizes: lengths of the axes that the pattern takes apart.
        fan_in_fan_out: whether their linear layer has the inputs first.
    """

    ours: str
    theirs: str
    pattern: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    fan_in_fan_out: bool = False

    def to_theirs(self, tensor: Tensor) -> Tensor:
        """The tensor in their order of elements."""
        return tensor if self.pattern is None else rearrange(tensor, self.pattern, **self.sizes).contiguous()

    def to_ours(self, tensor: Tensor) -> Tensor:
        """A tensor of theirs in our order of elements."""
        if self.pattern is None:
            return tensor
        left, right = self.pattern.split(" -> ")
        return rearrange(tensor, f"{right} -> {left}", **self.sizes).contiguous()


def peft_tensors(targets: Sequence[LoraTarget], renames: Sequence[TensorRename]) -> list[PeftTensor]:
    """Both names of every parameter of the adapters of some linear layers.

    Raises:
        CheckpointError: if `transformers` has no such linear layer, or one whose order of elements is no adapter's.
    """
    known = {rename.ours: rename for rename in renames}
    tensors = []
    for target in targets:
        rename = known.get(f"{target.module}.weight")
        if target.theirs is None or rename is None:
            raise CheckpointError(f"{target.module}: is no linear layer of transformers, for which peft has adapters")
        pattern, is_transposed = rename.pattern, False
        if pattern is not None:
            left, right = (side.split() for side in pattern.split(" -> "))
            is_transposed = right == [left[-1], *left[:-1]]
            if not is_transposed and right[-1] != left[-1]:
                raise CheckpointError(
                    f"{target.module}: its inputs are in another order in transformers ({pattern!r}), and an adapter "
                    "of peft has rows of outputs alone"
                )
        name = f"{_PREFIX}{target.theirs}"
        tensors += [
            PeftTensor(f"{target.adapter}.a", f"{name}.lora_A.weight", fan_in_fan_out=is_transposed),
            PeftTensor(
                f"{target.adapter}.b",
                f"{name}.lora_B.weight",
                None if is_transposed else pattern,
                {} if is_transposed else rename.sizes,
                is_transposed,
            ),
        ]
    return tensors


class AdapterFolder:
    """An adapter in the format of `peft`, read as the adapters of a model here.

    Args:
        path: the folder.
        config: a configuration whose `lora` section describes it.
        specs: the model, with the adapters that are to be read.

    Raises:
        CheckpointError: if a file cannot be read, or it is another adapter than the configuration describes.
    """

    def __init__(self, path: Path, config: Config, specs: Sequence[LayerSpec]) -> None:
        self.path = path
        settings = self._read_settings()
        lora = config.lora
        where = f"lora.init_from={path}"
        for key, values in _FIXED.items():
            if settings.get(key, values[0]) not in values:
                raise CheckpointError(f"{where}: {key}={settings[key]!r}; only {values[0]!r} is known")
        alpha = lora.rank if lora.alpha is None else lora.alpha
        ours = {"r": ("rank", lora.rank), "lora_alpha": ("alpha", alpha), "use_rslora": ("rslora", lora.rslora)}
        for theirs, (key, value) in ours.items():
            if (stored := settings.get(theirs, False)) != value:
                raise CheckpointError(f"{where}: its {theirs} is {stored}; set lora.{key}={json.dumps(stored)}")
        adapted = {f"{module}.{part}" for module, part in _adapted_parts(specs)}
        renames = names_in_transformers(config)
        every = [target for layer in find_targets(build_layers(config), renames) for target in layer]
        targets = [target for target in every if f"{target.module}.{target.part}" in adapted]
        self._tensors = {tensor.ours: tensor for tensor in peft_tensors(targets, renames)}
        self._stored = read_header(path / WEIGHTS_FILE)
        wanted = {tensor.theirs for tensor in self._tensors.values()}
        for name in sorted(wanted ^ self._stored.keys()):
            module = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")[0]
            held = "holds no adapter of" if name in wanted else "holds an adapter of"
            rule = "which lora.targets names" if name in wanted else "which lora.targets does not name"
            raise CheckpointError(f"{where}: {held} {module}, {rule}; give the targets of the adapter")

    def tensor(self, name: str) -> Tensor:
        """A parameter of an adapter by its logical name."""
        tensor = self._tensors[name]
        return tensor.to_ours(read_tensor(self._stored[tensor.theirs]))

    def _read_settings(self) -> dict[str, Any]:
        file = self.path / CONFIG_FILE
        try:
            settings = parse_json(read_regular(file, max_bytes=_MAX_BYTES))
        except (OSError, ValueError) as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
            raise CheckpointError(f"{file}: {reason}; lora.init_from takes a folder that peft has written") from None
        if not isinstance(settings, dict):
            raise CheckpointError(f"{file}: holds no mapping")
        return settings


def _adapted_parts(specs: Sequence[LayerSpec]) -> list[tuple[str, str]]:
    return [
        (f"{name}.{adapter.module}" if adapter.module else name, part)
        for name, spec in zip(layer_names(specs), specs, strict=True)
        for adapter in spec.adapters
        for part in adapter.adapted
    ]


@dataclass(frozen=True)
class AdapterExport:
    """An exported adapter: the checkpoint, its step, and the number of linear layers and parameters."""

    checkpoint: str
    step: int
    num_linears: int
    num_parameters: int


def export_adapter(
    source: str | Path, out: str | Path, *, overwrite: bool = False, trust_code: bool = False
) -> AdapterExport:
    """Write the adapters of a checkpoint in the format of `peft`, read them back, and compare every bit.

    Args:
        source: a run's folder, or one of its checkpoints.
        out: the folder to write; `overwrite` replaces an earlier adapter in it.
        trust_code: whether code that a checkpoint names, as `model.builder`, may run.

    Raises:
        CheckpointError: if there is no checkpoint of adapters, or `transformers` has no such linear layers.
        PipekitError: if `out` is there already, or the file does not hold what was written; nothing is left behind.
    """
    reader, out = CheckpointReader(resolve_checkpoint(Path(source))), Path(out)
    check_free(out, marker=CONFIG_FILE, what="adapter", overwrite=overwrite)
    if not reader.manifest.training.base:
        raise CheckpointError(f"{reader.path}: holds a whole model and no adapters; leave --adapter out")
    config = read_config(reader)
    check_trusted(reader, config, trust_code=trust_code)
    merged = with_base(reader, config)
    assert isinstance(merged, MergedReader)
    renames = names_in_transformers(config)
    tensors = peft_tensors(merged.targets, renames)
    planned = {each.theirs: each.to_theirs(reader.tensor(each.ours)) for each in tensors}
    every = [target for layer in find_targets(build_layers(config), renames) for target in layer]
    lora = config.lora
    alpha = lora.rank if lora.alpha is None else lora.alpha
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(merged.base.path) if isinstance(merged.base, HuggingFaceFolder) else None,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha is not None and alpha == int(alpha) else alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": short_names(merged.targets, every),
        "fan_in_fan_out": any(each.fan_in_fan_out for each in tensors),
        "bias": "none",
        "inference_mode": True,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    with building_folder(out.resolve()) as temporary:
        checksums = write_tensors(temporary / WEIGHTS_FILE, planned)
        stored = read_header(temporary / WEIGHTS_FILE)
        for name, expected in checksums.items():
            if name not in stored or checksum(tensor_bytes(read_tensor(stored[name]))) != expected:
                raise PipekitError(f"{out}: {name} is not what was written; the disk may be at fault")
        write_atomically(temporary / CONFIG_FILE, json.dumps(settings, indent=2) + "\n")
    return AdapterExport(
        str(reader.path),
        reader.manifest.training.step,
        len(merged.targets),
        sum(tensor.numel() for tensor in planned.values()),
    )


def short_names(targets: Sequence[LoraTarget], every: Sequence[LoraTarget]) -> list[str]:
    """Names by which `peft` finds linear layers: their ends where all that end so are meant, or else whole names.

    Example:
        >>> q, k = (LoraTarget("m", part, 0, 1, f"layers.0.attn.{part}") for part in ("q_proj", "k_proj"))
        >>> other = LoraTarget("m", "k_proj", 0, 1, "layers.1.attn.k_proj")
        >>> short_names([q, k], [q, k, other])
        ['q_proj', 'layers.0.attn.k_proj']
    """
    meant = {target.theirs for target in targets}
    names = []
    for target in targets:
        assert target.theirs is not None
        end = target.theirs.rpartition(".")[2]
        alike = {other.theirs for other in every if other.theirs and other.theirs.rpartition(".")[2] == end}
        names.append(end if alike <= meant else target.theirs)
    return list(dict.fromkeys(names))
