"""Generation over several processes on this machine: each is `python -m pipekit.launch.generate_rank FILE`."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipekit.errors import ConfigError, LaunchError, printable
from pipekit.launch.environment import detect_ranks
from pipekit.launch.failures import RankError
from pipekit.launch.local import process_environ, run_local
from pipekit.launch.network import gloo_environ
from pipekit.launch.resources import check_process_count, count_gpus
from pipekit.launch.worker import end_finished, error_file_from, report_failure, tie_to_parent

_LIMIT_S = 1800.0
"""No rank waits longer for another."""


@dataclass(frozen=True)
class GenerateTask:
    """Task of the ranks.

    Attributes:
        source: the run, checkpoint or export.
        config: file that describes the model; None where its files do.
        trust_code: whether code that a checkpoint names may run.
        pp: stages of the model.
        tp: tensor-parallel ranks of each.
        prompts: arguments of `EncodedPrompt`.
        settings: arguments of `GenerationSettings`.
        as_lines: whether a line of JSON is written for each prompt.
    """

    source: str
    config: str | None
    trust_code: bool
    pp: int
    tp: int
    prompts: Sequence[dict[str, Any]]
    settings: dict[str, Any]
    as_lines: bool


def generate_on_ranks(task: GenerateTask, *, device: Literal["auto", "cpu", "cuda"]) -> None:
    """Start a process for each part of the model, and return when they have written all texts to stdout.

    Raises:
        ConfigError: if there are fewer GPUs than processes.
        LaunchError: if another launcher has started this process, or the processes cannot be started.
        RankError: if one of them fails.
    """
    if (ranks := detect_ranks(os.environ)) is not None:
        raise LaunchError(
            f"pipekit generate starts the processes itself, and is already one that {ranks.launcher} has started; "
            "start it alone"
        )
    world_size = task.pp * task.tp
    check_process_count(world_size, f"--pp {task.pp} --tp {task.tp}")
    num_gpus = count_gpus(device, os.environ)
    if num_gpus is not None and world_size > num_gpus:
        raise ConfigError(
            f"--pp {task.pp} --tp {task.tp}: are {world_size} processes, each with a GPU, and there are {num_gpus}; "
            "ask for fewer, or add --device cpu"
        )
    folder = Path(tempfile.mkdtemp(prefix="pipekit-generate-"))
    file = folder / "task.json"
    try:
        file.write_text(json.dumps(asdict(task)), encoding="utf-8")
        run_local(
            [sys.executable, "-m", __name__, str(file)],
            world_size=world_size,
            log_dir=folder,
            env=process_environ(world_size, num_gpus, folder),
            timeout_s=math.inf,
        )
    except RankError as error:
        if error.failure.report is None or error.failure.report.kind != "user":
            raise  # its log is there to be read
        shutil.rmtree(folder)
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def main(arguments: Sequence[str]) -> None:
    """Do the task of a file as the rank whose number is in the environment."""
    tie_to_parent(os.environ)
    with report_failure(error_file_from(os.environ)):
        ranks = detect_ranks(os.environ)
        assert ranks is not None, "pipekit.launch.generate_rank is started by pipekit generate"
        os.environ.update(gloo_environ(ranks, os.environ))
        file = Path(arguments[0])
        task = GenerateTask(**json.loads(file.read_text(encoding="utf-8")))
        from pipekit.training.console import chatter_to

        with chatter_to(file.parent / f"libraries-{ranks.rank}.log") as terminal:
            from pipekit.distributed.mpu import ModelParallelUnit
            from pipekit.distributed.processes import join_processes, leave_processes
            from pipekit.engine.parallel_generator import open_on_ranks
            from pipekit.inference.answer import EncodedPrompt, GenerationSettings, write_lines, write_text
            from pipekit.inference.load_model import open_model
            from pipekit.layout import Layout

            place = join_processes(
                device="cpu" if os.environ.get("DS_ACCELERATOR") == "cpu" else "cuda",
                timeout_s=_LIMIT_S,
                local_rank=ranks.local_rank,
                loopback_port=ranks.loopback_port,
                restarts=ranks.restarts,
            )
            stored = open_model(
                Path(task.source), given=None if task.config is None else Path(task.config), trust_code=task.trust_code
            )
            generator = open_on_ranks(stored, ModelParallelUnit(Layout(pp=task.pp, tp=task.tp)), place)
            prompts = [EncodedPrompt(**prompt) for prompt in task.prompts]
            settings = GenerationSettings(**task.settings)

            def write(text: str) -> None:
                if ranks.rank == 0:
                    terminal.write(printable(text) if terminal.isatty() else text)
                    terminal.flush()

            if task.as_lines:
                write_lines(generator, prompts, settings, write)
            else:
                (prompt,) = prompts
                write(prompt.shown)
                write_text(generator, prompt, settings, write)
                write("\n")
            del generator
            leave_processes()


if __name__ == "__main__":
    with contextlib.suppress(SystemExit):  # of a success: a failure has ended the process
        main(sys.argv[1:])
    end_finished()
