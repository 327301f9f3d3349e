"""`pipekit export`: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipekit.commands.shared_options import ModelConfigFile, TrustCode


def command(
    source: Annotated[Path, typer.Argument(help="Folder of a run, or one of its checkpoints.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Number format of the exported tensors.")
    ] = "float32",
    shard_size: Annotated[str, typer.Option(help="Maximum size of a weights file, such as 500MB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    trust_code: TrustCode = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Write one file of tensors under their own names, and a loader for it.")
    ] = False,
    config: ModelConfigFile = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapters of a LoRA run into the model's weights.")
    ] = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write only the adapters of a LoRA run, in peft's format.")
    ] = False,
) -> None:
    """Export a checkpoint in Hugging Face's format.

    Loads the export with transformers, which must compute the same logits.
    """
    from pipekit.inference.export_forms import export
    from pipekit.inference.peft_adapter import AdapterExport
    from pipekit.inference.raw_export import RawExport
    from pipekit.tensors.host_memory import return_freed_memory

    return_freed_memory()
    done = export(
        source,
        out,
        dtype=dtype,
        shard_size=shard_size,
        overwrite=overwrite,
        trust_code=trust_code,
        raw=raw,
        config=config,
        merge=merge,
        adapter=adapter,
    )
    if isinstance(done, AdapterExport):
        typer.echo(f"exported the adapters of step {done.step} of {done.checkpoint} to {out}")
        typer.echo(f"{done.num_linears} linear layers, {done.num_parameters:,} parameters, every bit read back")
        return
    typer.echo(f"exported step {done.step} of {done.checkpoint} to {out}")
    if isinstance(done, RawExport):
        typer.echo(f"{done.num_tensors:,} tensors of {done.num_elements:,} elements, every bit read back")
        return
    typer.echo(
        f"checked against {done.reference}: {done.num_logits:,} logits, "
        f"at most {done.max_logit_difference:.2g} apart (limit {done.tolerance:.2g})"
    )
