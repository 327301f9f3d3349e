"""Export of a checkpoint in any format: a Hugging Face folder, raw tensors under their own names, or adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipekit.config import ModelConfigSource
from pipekit.config.stored_code import check_stored_code
from pipekit.errors import ConfigError
from pipekit.inference.export import ExportCheck, export_checkpoint
from pipekit.inference.peft_adapter import AdapterExport, export_adapter
from pipekit.inference.raw_export import RawExport, export_raw
from pipekit.inference.safetensors_folder import ExportDtype

if TYPE_CHECKING:
    from pipekit.plan.train_result import TrainResult


def export(
    source: str | Path | TrainResult,
    out: str | Path,
    *,
    dtype: ExportDtype = "float32",
    shard_size: int | str = "5GB",
    overwrite: bool = False,
    trust_code: bool = False,
    raw: bool = False,
    config: ModelConfigSource | None = None,
    merge: bool = False,
    adapter: bool = False,
) -> ExportCheck | RawExport | AdapterExport:
    """Export a checkpoint as a Hugging Face folder, as raw tensors or as LoRA adapters, and check the export.

    Args:
        source: the result of `train`, a run's folder, or one of its checkpoints.
        out: the folder to write.
        dtype: number format of the exported tensors.
        shard_size: largest size of a file of weights.
        overwrite: whether to replace an earlier export.
        trust_code: whether to run code that a checkpoint names.
        raw: whether to write tensors under their own names, with a script that loads them.
        config: configuration of the model, for a checkpoint that does not hold one.
        merge: whether to merge the adapters of a LoRA run into the weights that they adapt.
        adapter: whether to write only the adapters of a LoRA run, in the format of `peft`.

    Returns:
        The comparison of the export with the checkpoint: an `ExportCheck`, a `RawExport` if `raw`, or an
        `AdapterExport` if `adapter`.

    Raises:
        PipekitError: if more than one of `raw`, `merge` and `adapter` is given, a file cannot be read or written, or
            the export differs from the checkpoint.
    """
    source = Path(source if isinstance(source, (str, Path)) else source.run_dir)
    chosen = [option for option, given in (("--raw", raw), ("--merge", merge), ("--adapter", adapter)) if given]
    if len(chosen) > 1:
        raise ConfigError(f"{' '.join(chosen)}: write different folders; give one of them")
    if adapter:
        for option, given in (("--dtype", dtype != "float32"), ("--config", config is not None)):
            if given:
                raise ConfigError(f"--adapter {option}: adapters are written as they were trained; leave {option} out")
        return export_adapter(source, out, overwrite=overwrite, trust_code=trust_code)
    if raw:
        if config is not None:
            raise ConfigError(
                "--raw --config: tensors under their own names need no description; leave one of them out"
            )
        return export_raw(source, out, dtype=dtype, overwrite=overwrite)
    if isinstance(config, (str, Path)):
        check_stored_code(config, trust_code=trust_code)
    return export_checkpoint(
        source,
        out,
        dtype=dtype,
        shard_size=shard_size,
        overwrite=overwrite,
        trust_code=trust_code,
        config=config,
        merge=merge,
    )
