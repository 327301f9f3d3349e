"""Exporting a checkpoint as a Hugging Face folder, and proving that it says what the checkpoint says."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pipekit.checkpoint.manifest import resolve_checkpoint
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.config import ModelConfigSource
from pipekit.data.tokenizer import special_token_ids, write_hf_tokenizer
from pipekit.errors import CheckpointError, PipekitError
from pipekit.files import building_folder, check_free, write_atomically
from pipekit.inference.hugging_face import MODEL_FILE, has_vocabulary_rows, to_hf
from pipekit.inference.load_model import find_tokenizer, read_config, read_model
from pipekit.layers.sequential import SequentialModel
from pipekit.models.custom import CustomDoor, open_door
from pipekit.models.family import TransformerFamily

PROOF_FILE = "export_check.json"

ExportedModel = TransformerFamily | CustomDoor
"""Model of an export: its names in `transformers`, its `config.json`, and its sizes."""

ExportDtype = Literal["float32", "bfloat16", "float16"]

# Both sides compute in fp32 with the exported weights; what differs is the order of additions.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class ExportCheck:
    """Comparison of an export with its checkpoint, by the largest absolute difference of a logit.

    `reference` is what read the export, and `dtype` that of the exported tensors.
    """

    reference: str
    max_logit_difference: float
    tolerance: float
    num_logits: int
    checkpoint: str
    step: int
    dtype: ExportDtype


def export_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    dtype: ExportDtype = "float32",
    overwrite: bool = False,
    trust_code: bool = False,
    config: ModelConfigSource | None = None,
) -> ExportCheck:
    """Write a Hugging Face folder, read it back with `transformers`, and compare logits.

    The folder holds `model.safetensors`, `config.json`, `generation_config.json`, the tokenizer's files, and
    `export_check.json` with the result of the comparison. It appears when all of it is written and has passed.

    Args:
        source: a run's folder, or one of its checkpoints.
        out: the folder to write; `overwrite` replaces an earlier export in it.
        dtype: of the exported tensors.
        trust_code: whether code that a checkpoint names, as `model.builder`, may run.
        config: configuration of the model, where the checkpoint does not tell it; see `load_model_config`.

    Raises:
        CheckpointError: if there is no checkpoint, or its model is unknown or has no Hugging Face counterpart.
        ConfigError: if `config` describes another model.
        PipekitError: if `out` is there already, or the logits differ; nothing is left behind then.
    """
    checkpoint, out = resolve_checkpoint(Path(source)), Path(out)
    check_free(out, marker=PROOF_FILE, what="export", overwrite=overwrite)
    reader = CheckpointReader(checkpoint)
    described = read_config(reader, config)
    if reason := described.model.no_export_reason():
        raise CheckpointError(
            f"{checkpoint}: its model {reason}; --raw writes its tensors under their own names, with a loader beside "
            "them"
        )
    model = read_model(reader, described, trust_code=trust_code or config is not None)
    family = described.model if isinstance(described.model, TransformerFamily) else open_door(described)
    tokenizer_file = find_tokenizer(reader, described if config is not None else None)
    _check_names(family, model, checkpoint)
    try:
        with building_folder(out.resolve()) as temporary:
            _write_folder(temporary, model, family, tokenizer_file, dtype)
            step = reader.manifest.training.step
            check = _compare(temporary, model, family, checkpoint=str(checkpoint), step=step, dtype=dtype)
            write_atomically(temporary / PROOF_FILE, json.dumps(asdict(check), indent=1) + "\n")
    except (OSError, SafetensorError) as error:
        raise PipekitError(f"{out}: could not be written: {error}") from None
    return check


def _check_names(family: ExportedModel, model: SequentialModel, checkpoint: Path) -> None:
    named, held = {rename.ours for rename in family.hf_renames()}, model.logical_tensors().keys()
    for name in sorted(named ^ held):
        what = "has no name in transformers" if name in held else "is no tensor of the model"
        raise CheckpointError(f"{checkpoint}: {name} {what}; mend what model.hf_names returns")


def exported_vocab(config: ExportedModel) -> int:
    """Token ids of an exported model: all, without those that pad the vocabulary."""
    padded = config.export_vocab_size if isinstance(config, TransformerFamily) else None
    return padded or config.known_vocab_size


def _write_folder(
    folder: Path, model: SequentialModel, config: ExportedModel, tokenizer_file: Path | None, dtype: ExportDtype
) -> None:
    ours = model.logical_tensors()
    if exported_vocab(config) != config.known_vocab_size:
        ours |= {name: ours[name][: exported_vocab(config)] for name in ours if has_vocabulary_rows(name)}
    tensors = to_hf(config, ours)
    exported = {name: tensor.detach().to(getattr(torch, dtype)) for name, tensor in tensors}
    save_file(exported, folder / MODEL_FILE, metadata={"format": "pt"})
    special: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None}
    generation: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 50}
    if tokenizer_file is not None:
        special |= special_token_ids(tokenizer_file)
        write_hf_tokenizer(tokenizer_file, folder, max_length=config.max_positions)
        if (kept := folder / "generation_config.json").is_file():
            generation = _read_generation(kept)
    ends = generation.get("eos_token_id")
    # A model may end its answers with other tokens, too; they stay.
    if not (isinstance(ends, list) and special["eos_token_id"] in ends):
        generation["eos_token_id"] = special["eos_token_id"]
    contents = {
        "config.json": {**config.hf_config(end_token_id=special["eos_token_id"], dtype=dtype), **special},
        "generation_config.json": {**special, **generation},
    }
    if exported_vocab(config) != config.known_vocab_size:
        contents["config.json"]["vocab_size"] = exported_vocab(config)
    for name, content in contents.items():
        write_atomically(folder / name, json.dumps(content, indent=2) + "\n")


def _read_generation(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it holds no mapping")
    except ValueError as error:
        raise PipekitError(
            f"{file.name}, which came with the tokenizer, cannot be read: {error}; mend it beside the tokenizer"
        ) from None
    return settings


@torch.no_grad()
def _compare(
    folder: Path, model: SequentialModel, config: ExportedModel, *, checkpoint: str, step: int, dtype: ExportDtype
) -> ExportCheck:
    """Run one random prompt through the checkpoint's model, its weights rounded to `dtype`, and through the export."""
    for tensor in model.logical_tensors().values():
        tensor.copy_(tensor.to(getattr(torch, dtype)))
    shape = (2, min(config.max_positions, 128))
    prompt = torch.randint(exported_vocab(config), shape, generator=torch.Generator().manual_seed(0))  # (B, S)
    ours: Tensor = model(prompt)[..., : exported_vocab(config)]  # (B, S, V)
    logits, reference = _transformers_logits(folder, prompt, config.hf_class)
    difference = float((ours - logits).abs().max())
    tolerance = _TOLERANCE * max(1.0, float(ours.abs().max()))
    if not difference <= tolerance:
        raise PipekitError(
            f"the exported logits are {difference:.3g} from the checkpoint's, and rounding explains {tolerance:.2g} at "
            "most; the export was not written"
        )
    return ExportCheck(reference, difference, tolerance, ours.numel(), checkpoint, step, dtype)


def _transformers_logits(folder: Path, prompt: Tensor, hf_class: str) -> tuple[Tensor, str]:
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        reader = getattr(transformers, hf_class)
        theirs: Any = reader.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    theirs.eval()
    return theirs(prompt).logits.float(), f"transformers {transformers.__version__} {hf_class}"
