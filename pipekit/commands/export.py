"""`pipekit export`: a checkpoint as a folder in Hugging Face's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipekit.commands.shared_options import ModelConfigFile, TrustCode


def command(
    source: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Number format of the exported tensors.")
    ] = "float32",
    shard_size: Annotated[str, typer.Option(help="Size of a file of weights at most, such as 500MB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    trust_code: TrustCode = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Write one file of tensors under their own names, and a loader beside it.")
    ] = False,
    config: ModelConfigFile = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder, and prove that its logits are the same."""
    from pipekit.tensors.host_memory import return_freed_memory

    return_freed_memory()
    if raw:
        from pipekit.errors import ConfigError
        from pipekit.inference.raw_export import export_raw

        if config is not None:
            raise ConfigError(
                "--raw --config: tensors under their own names need no description; leave one of them out"
            )
        done = export_raw(source, out, dtype=dtype, overwrite=overwrite)
        typer.echo(f"exported step {done.step} of {done.checkpoint} to {out}")
        typer.echo(f"{done.num_tensors:,} tensors of {done.num_elements:,} elements, every bit read back")
        return
    from pipekit.config.stored_code import check_stored_code
    from pipekit.inference.export import export_checkpoint

    if config is not None:
        check_stored_code(config, trust_code=trust_code)

    check = export_checkpoint(
        source, out, dtype=dtype, shard_size=shard_size, overwrite=overwrite, trust_code=trust_code, config=config
    )
    typer.echo(f"exported step {check.step} of {check.checkpoint} to {out}")
    typer.echo(
        f"checked against {check.reference}: {check.num_logits:,} logits, "
        f"at most {check.max_logit_difference:.2g} apart (limit {check.tolerance:.2g})"
    )
