"""Measurement of layers in a process of its own, whose end gives a GPU's context and memory back.

`python -m pipekit.costs.child` is that process: it reads a task from stdin and writes messages to stdout, as pickles.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from pipekit.costs.profiling import profile_layers
from pipekit.errors import ConfigError, PipekitError
from pipekit.layers.specs import LayerSpec
from pipekit.predictions.layer_costs import ModelCosts
from pipekit.progress import ProgressCallback

logger = logging.getLogger(__name__)


def profile_in_child(
    specs: Sequence[LayerSpec], example_inputs: Any, *, on_progress: ProgressCallback | None = None, **options: Any
) -> ModelCosts:
    """Costs of each layer, measured by `profile_layers` in a child process; see there for the arguments.

    A model that cannot be sent to another process, one of functions without a name for instance, is measured here.

    Raises:
        ConfigError: if a layer does not fit its inputs, or fails.
    """
    try:
        task = pickle.dumps((list(specs), example_inputs, options))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        logger.info("layers are measured in this process, since they cannot be sent to another: %s", error)
        return profile_layers(specs, example_inputs, on_progress=on_progress, **options)
    command = [sys.executable, "-m", "pipekit.costs.child"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            pickle.dump((sys.path, task), child.stdin)
            child.stdin.close()
            while True:
                kind, content = pickle.load(child.stdout)
                if kind == "costs":
                    costs: ModelCosts = content
                    return costs
                if kind == "error":
                    raise content
                if kind == "unreadable":
                    logger.info("layers are measured in this process, since another cannot load them: %s", content)
                    break
                if on_progress is not None:
                    on_progress(*content)
        except (EOFError, BrokenPipeError):
            raise ConfigError(
                f"the process that measures layers ended with exit code {child.wait()}, and its last words are above; "
                "mend the layer that was measured, or choose a parallel.partition that runs nothing"
            ) from None
        finally:
            child.kill()
    return profile_layers(specs, example_inputs, on_progress=on_progress, **options)


def main() -> None:
    """Measure the layers that stdin tells of."""
    messages = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a layer prints is no message

    def say(kind: str, content: Any) -> None:
        messages.write(pickle.dumps((kind, content)))

    sys.path[:], task = pickle.load(sys.stdin.buffer)
    try:
        specs, example_inputs, options = pickle.loads(task)
    except Exception as error:
        say("unreadable", f"{type(error).__name__}: {error}")
        return
    try:
        say("costs", profile_layers(specs, example_inputs, on_progress=lambda *done: say("progress", done), **options))
    except PipekitError as error:
        say("error", error)


if __name__ == "__main__":
    main()
