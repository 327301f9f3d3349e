"""Command line: the commands of `pipekit.commands`, and the exit codes of their errors."""

from __future__ import annotations

import pkgutil
import sys
from importlib import import_module
from typing import Annotated

import typer
from typer.completion import completion_init  # type: ignore[attr-defined]

from pipekit import commands

app = typer.Typer(
    name="pipekit",
    help="Build GPT-style models from lists of layer specs, and train them with pipeline, tensor and ZeRO data "
    "parallelism.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Order in the help text; the other commands follow by name.
_FIRST = (
    *("init", "data", "plan", "train", "verify", "import", "export", "generate", "eval", "checkpoints"),
    *("launch", "slurm", "doctor", "completion"),
)


def _add_commands() -> None:
    names = sorted(module.name for module in pkgutil.iter_modules(commands.__path__) if "_" not in module.name)
    for name in sorted(names, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST)):
        module = import_module(f"{commands.__name__}.{name}")
        app.command(name, context_settings=getattr(module, "CONTEXT_SETTINGS", None))(module.command)


_add_commands()
# The script that `pipekit completion` prints requests completions through an environment variable.
completion_init()


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
    # DeepSpeed's launcher adds this option; the environment has the same value.
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """Version of pipekit, which `--version` prints."""
    if show:
        from importlib.metadata import version as installed_version

        typer.echo(installed_version("pipekit"))
        raise typer.Exit


def main() -> None:
    """Run the command line. An error prints one message, and its class determines the exit code."""
    from pipekit.errors import PipekitError, StoppedError, printable
    from pipekit.launch.worker import note_start
    from pipekit.signals import Interrupted
    from pipekit.storage import find_storage_error

    note_start()
    try:
        app()
    except PipekitError as error:
        sys.stdout.flush()
        text = printable(str(error))
        sys.stderr.write(f"{text}\n" if isinstance(error, StoppedError) else f"error: {text}\n")
        sys.exit(error.exit_code)
    except Interrupted as interrupt:
        sys.stdout.flush()
        sys.stderr.write(f"{interrupt}\n")
        sys.exit(interrupt.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of the output has closed it.
        sys.stderr.close()
        sys.exit(141)
    except OSError as failure:
        of_disk = find_storage_error(failure, failure.filename)
        if of_disk is None:
            raise
        sys.stderr.write(f"error: {printable(str(of_disk))}\n")
        sys.exit(of_disk.exit_code)


if __name__ == "__main__":
    main()
