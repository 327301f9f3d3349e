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
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapters of a LoRA run into the weights they are added to.")
    ] = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write the adapters of a LoRA run alone, in the format of peft.")
    ] = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder, and prove that its logits are the same."""
    from pipekit.errors import ConfigError
    from pipekit.tensors.host_memory import return_freed_memory

    return_freed_memory()
    chosen = [option for option, given in (("--raw", raw), ("--merge", merge), ("--adapter", adapter)) if given]
    if len(chosen) > 1:
        raise ConfigError(f"{' '.join(chosen)}: write different folders; give one of them")
    if adapter:
        from pipekit.inference.peft_adapter import export_adapter

        for option, given in (("--dtype", dtype != "float32"), ("--config", config is not None)):
            if given:
                raise ConfigError(f"--adapter {option}: adapters are written as they were trained; leave {option} out")
        written = export_adapter(source, out, overwrite=overwrite, trust_code=trust_code)
        typer.echo(f"exported the adapters of step {written.step} of {written.checkpoint} to {out}")
        typer.echo(f"{written.num_linears} linear layers, {written.num_parameters:,} parameters, every bit read back")
        return
    if raw:
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
        source,
        out,
        dtype=dtype,
        shard_size=shard_size,
        overwrite=overwrite,
        trust_code=trust_code,
        config=config,
        merge=merge,
    )
    typer.echo(f"exported step {check.step} of {check.checkpoint} to {out}")
    typer.echo(
        f"checked against {check.reference}: {check.num_logits:,} logits, "
        f"at most {check.max_logit_difference:.2g} apart (limit {check.tolerance:.2g})"
    )
