"""Export of a checkpoint as a Hugging Face folder, and proof that it computes the same logits as the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError
from torch import Tensor

from pipekit.checkpoint.manifest import resolve_checkpoint
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.config import Config, ModelConfigSource
from pipekit.data.tokenizer import load_tokenizer, special_token_ids, write_hf_tokenizer
from pipekit.errors import CheckpointError, PipekitError
from pipekit.files import building_folder, check_free, write_atomically
from pipekit.inference.base_weights import MergedReader, with_base
from pipekit.inference.hugging_face import has_vocabulary_rows, theirs_of
from pipekit.inference.load_model import check_trusted, find_tokenizer, initial_seed, read_config
from pipekit.inference.model_card import CARD_FILE, model_card
from pipekit.inference.prove_export import ExportMismatchError, compare_logits, prove_tokenizer
from pipekit.inference.safetensors_folder import ExportDtype, exported_dtype, find_changed, write_shards
from pipekit.layers.sequential import SequentialModel, run_layers
from pipekit.layers.specs import LayerSpec
from pipekit.models import adapted_layers, build_layers
from pipekit.models.custom import open_door
from pipekit.models.family import TensorRename, TransformerFamily

PROOF_FILE = "export_check.json"

# A larger model, in fp32, is never whole in memory while it is compared.
_WHOLE_BYTES = 2**30


@dataclass(frozen=True)
class ExportCheck:
    """Comparison of an export with its checkpoint, by the largest absolute difference of a logit.

    Attributes:
        reference: the library that read the export.
        layer_by_layer: whether only one layer's weights were in memory at a time.
        max_logit_difference: largest absolute difference of a logit.
        tolerance: largest difference that the order of additions can explain.
        num_logits: number of logits that were compared.
        num_text_tokens: number of prompt tokens from real text; the others are random.
        num_parameters: number of parameters of the exported model.
        checkpoint: folder of the checkpoint.
        step: step of the checkpoint.
        dtype: number format of the exported tensors.
    """

    reference: str
    layer_by_layer: bool
    max_logit_difference: float
    tolerance: float
    num_logits: int
    num_text_tokens: int
    num_parameters: int
    checkpoint: str
    step: int
    dtype: ExportDtype


def export_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    dtype: ExportDtype = "float32",
    shard_size: int | str = "5GB",
    overwrite: bool = False,
    trust_code: bool = False,
    config: ModelConfigSource | None = None,
    merge: bool = False,
) -> ExportCheck:
    """Export a checkpoint as a Hugging Face folder, read it back with `transformers`, and compare logits.

    The folder holds the weights in `model.safetensors`, or in several such files with an index, `config.json`,
    `generation_config.json`, the tokenizer's files, a model card, and `export_check.json` with the result of the
    comparison. It appears only when it is complete and has passed. Memory use is bounded by the largest tensor.

    Args:
        source: a run's folder, or one of its checkpoints.
        out: the folder to write; `overwrite` replaces an earlier export in it.
        dtype: number format of the exported tensors, except integers.
        shard_size: largest size of a file of weights, in bytes or as text such as "500MB"; a tensor that is larger
            gets a file to itself.
        trust_code: whether to run code that a checkpoint names as `model.builder`.
        config: configuration of the model, for a checkpoint that does not hold one; see `load_model_config`.
        merge: whether to merge adapters into the weights that they adapt; required for a checkpoint of adapters.

    Raises:
        CheckpointError: if there is no checkpoint, or its model is unknown or has no Hugging Face counterpart.
        ConfigError: if `config` describes another model.
        PipekitError: if `out` already exists, or the logits differ; then nothing is left behind.
    """
    shard_bytes = _parse_size(shard_size)
    checkpoint, out = resolve_checkpoint(Path(source)), Path(out)
    check_free(out, marker=PROOF_FILE, what="export", overwrite=overwrite)
    reader = CheckpointReader(checkpoint)
    described = read_config(reader, config)
    if reason := described.model.no_export_reason():
        raise CheckpointError(
            f"{checkpoint}: its model {reason}; --raw writes its tensors under their own names, with a loader beside "
            "them"
        )
    check_trusted(reader, described, trust_code=trust_code or config is not None)
    if merge != bool(reader.manifest.training.base):
        raise CheckpointError(
            f"{checkpoint}: holds a whole model and no adapters; leave --merge out"
            if merge
            else f"{checkpoint}: holds adapters; --merge writes the model that they make, and --adapter the adapters"
        )
    reader = with_base(reader, described)
    export = _Export(reader, described, find_tokenizer(reader, described if config is not None else None), dtype)
    try:
        with building_folder(out.resolve()) as temporary:
            if (changed := find_changed(temporary, export.write_weights(temporary, shard_bytes))) is not None:
                raise ExportMismatchError(f"{changed} is not what was written; the disk may be at fault")
            export.write_settings(temporary)
            check = export.prove(temporary)
            write_atomically(temporary / CARD_FILE, export.card(out.resolve().name, check))
            write_atomically(temporary / PROOF_FILE, json.dumps(asdict(check), indent=1) + "\n")
    except ExportMismatchError as error:
        raise PipekitError(f"{out}: {error}; the export was not written") from None
    return check


def _parse_size(size: int | str) -> int:
    try:
        num_bytes = int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError:
        num_bytes = 0
    if num_bytes < 1:
        raise PipekitError(
            f"shard_size={size}: not a size of a file; give a number of bytes, or for example 500MB or 5GB"
        )
    return num_bytes


class _Export:
    """One export: an open checkpoint, its model, and the number format of the exported tensors."""

    def __init__(
        self, reader: CheckpointReader, config: Config, tokenizer_file: Path | None, dtype: ExportDtype
    ) -> None:
        self._reader, self._config, self._dtype = reader, config, dtype
        self._family = config.model if isinstance(config.model, TransformerFamily) else open_door(config)
        self._specs: Sequence[LayerSpec] = build_layers(config)
        self._tokenizer_file = tokenizer_file
        self._special: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None}
        if self._tokenizer_file is not None:
            self._special |= special_token_ids(self._tokenizer_file)
        self._check_names()

    def write_weights(self, folder: Path, shard_bytes: int) -> dict[str, str]:
        """Write the tensors under their names in `transformers`, and return their checksums."""
        planned: dict[str, Tensor] = {}
        origins: dict[str, TensorRename] = {}
        for rename in self._family.hf_renames():
            entry = self._reader.manifest.tensors[rename.ours]
            whole = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device="meta")
            for name, part in theirs_of(rename, self._exported_rows(rename.ours, whole)).items():
                planned[name], origins[name] = part.to(exported_dtype(part.dtype, self._dtype)), rename

        def read(name: str) -> Tensor:
            ours = self._exported_rows(origins[name].ours, self._reader.tensor(origins[name].ours))
            return theirs_of(origins[name], ours)[name].to(planned[name].dtype)

        return write_shards(folder, planned, read=read, shard_bytes=shard_bytes)

    def write_settings(self, folder: Path) -> None:
        """Write `config.json`, `generation_config.json` and the tokenizer's files."""
        generation: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 50}
        if self._tokenizer_file is not None:
            write_hf_tokenizer(self._tokenizer_file, folder, max_length=self._family.max_positions)
            if (kept := folder / "generation_config.json").is_file():
                generation = _read_generation(kept)
        end = self._special["eos_token_id"]
        ends = generation.get("eos_token_id")
        # A model may end its answers with other tokens, too; they stay.
        if not (isinstance(ends, list) and end in ends):
            generation["eos_token_id"] = end
        settings = {**self._family.hf_config(end_token_id=end, dtype=self._dtype), **self._special}
        if self._vocab_size != self._family.known_vocab_size:
            settings["vocab_size"] = self._vocab_size
        for name, content in {
            "config.json": settings,
            "generation_config.json": {**self._special, **generation},
        }.items():
            write_atomically(folder / name, json.dumps(content, indent=2) + "\n")

    def prove(self, folder: Path) -> ExportCheck:
        """Compare the folder with the checkpoint, on real text where it has a tokenizer, and on random token ids."""
        import transformers

        length = min(self._family.max_positions, 128)
        rows = [torch.randint(self._vocab_size, (1, length), generator=torch.Generator().manual_seed(0))]
        if self._tokenizer_file is not None:
            text = prove_tokenizer(folder, load_tokenizer(self._tokenizer_file), self._special)
            rows.append(torch.tensor(text).repeat(-(-length // len(text)))[None, :length])
        prompt = torch.cat(rows)  # (B, S)
        layer_by_layer = 4 * self._num_parameters > _WHOLE_BYTES
        difference, tolerance = compare_logits(
            folder,
            self._family.hf_class,
            self._run_layers,
            prompt,
            vocab_size=self._vocab_size,
            layer_by_layer=layer_by_layer,
        )
        return ExportCheck(
            reference=f"transformers {transformers.__version__} {self._family.hf_class}",
            layer_by_layer=layer_by_layer,
            max_logit_difference=difference,
            tolerance=tolerance,
            num_logits=prompt.numel() * self._vocab_size,
            num_text_tokens=length * (len(rows) - 1),
            num_parameters=self._num_parameters,
            checkpoint=str(self._reader.path),
            step=self._reader.manifest.training.step,
            dtype=self._dtype,
        )

    def card(self, folder: str, check: ExportCheck) -> str:
        """Model card of the export."""
        proof = (
            f"{check.reference} computes the logits of the checkpoint: over {check.num_logits:,} of them, the largest "
            f"difference is {check.max_logit_difference:.2g}, where rounding explains {check.tolerance:.2g}."
        )
        return model_card(
            folder,
            self._config,
            self._reader.manifest,
            hf_class=self._family.hf_class,
            num_parameters=check.num_parameters,
            has_text=self._tokenizer_file is not None,
            proof=proof,
        )

    @property
    def _vocab_size(self) -> int:
        """Token ids of the exported model: all, without those that pad the vocabulary."""
        padded = self._family.export_vocab_size if isinstance(self._family, TransformerFamily) else None
        return padded or self._family.known_vocab_size

    @property
    def _num_parameters(self) -> int:
        shapes = {name: torch.Size(entry.shape) for name, entry in self._reader.manifest.tensors.items()}
        return sum(
            self._exported_rows(name, torch.empty(shape, device="meta")).numel() for name, shape in shapes.items()
        )

    def _run_layers(self, prompt: Tensor) -> Iterator[tuple[str, Any]]:
        dtype, seed = getattr(torch, self._dtype), initial_seed(self._config)
        if isinstance(self._reader, MergedReader) and dtype == torch.float32:
            # The adapters by themselves, so that the merging is proved too; in 16 bits it rounds.
            specs = adapted_layers(self._config, self._specs)
            return run_layers(specs, prompt, read=self._reader.unmerged, seed=seed)
        return run_layers(self._specs, prompt, read=lambda name: self._reader.rounded(name, dtype), seed=seed)

    def _exported_rows(self, ours: str, tensor: Tensor) -> Tensor:
        cut = self._vocab_size != self._family.known_vocab_size and has_vocabulary_rows(ours)
        return tensor[: self._vocab_size] if cut else tensor

    def _check_names(self) -> None:
        """Check that the checkpoint holds the tensors of the model, and that each has a name in `transformers`."""
        held = self._reader.manifest.tensors
        shapes = {name: torch.empty(entry.shape, device="meta") for name, entry in held.items()}
        SequentialModel(self._specs, seed=None).check_logical_tensors(shapes, where=str(self._reader.path))
        named = {rename.ours for rename in self._family.hf_renames()}
        for name in sorted(named ^ held.keys()):
            what = "has no name in transformers" if name in held else "is no tensor of the model"
            raise CheckpointError(f"{self._reader.path}: {name} {what}; mend what model.hf_names returns")


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
