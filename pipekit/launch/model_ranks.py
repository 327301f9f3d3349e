"""A trained model over several processes on this machine, which a command starts for it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from pipekit.errors import ConfigError, LaunchError, PipekitError
from pipekit.launch.environment import detect_ranks
from pipekit.launch.failures import RankError
from pipekit.launch.local import process_environ, run_local
from pipekit.launch.network import gloo_environ
from pipekit.launch.resources import check_process_count, count_gpus
from pipekit.launch.worker import end_finished, error_file_from, report_failure, tie_to_parent

if TYPE_CHECKING:
    from pipekit.inference.generator import Generator
    from pipekit.inference.load_model import StoredModel

_LIMIT_S = 1800.0
"""No rank waits longer for another."""

_RESULT_FILE = "result.json"


@dataclass(frozen=True)
class SpreadModel:
    """A model, and the processes that it is to be spread over.

    Attributes:
        source: the run, checkpoint or export.
        config: file that describes the model; None where its files do.
        trust_code: whether code that a checkpoint names may run.
        pp: stages of the model.
        tp: tensor-parallel ranks of each.
    """

    source: str
    config: str | None
    trust_code: bool
    pp: int
    tp: int

    def check(self, stored: StoredModel) -> None:
        """Check that the layers of the open model can be shared out so.

        Raises:
            PipekitError: if not.
        """
        try:
            stored.cut(pp=self.pp, tp=self.tp)
        except PipekitError as error:
            # As its user types it here.
            raise type(error)(str(error).replace("parallel.pp=", "--pp ").replace("parallel.tp=", "--tp ")) from None


def run_on_ranks(
    module: str,
    command: str,
    model: SpreadModel,
    task: Mapping[str, Any],
    *,
    device: Literal["auto", "cpu", "cuda"],
    reads_stdin: bool = False,
) -> Any:
    """Start a process for each part of a model, wait for all of them, and return the result that rank 0 has written.

    Args:
        module: what each process runs; it opens its part by `model_part`.
        command: the command that starts them, for messages.
        model: the model.
        task: plain data for the processes.
        device: what to compute on.
        reads_stdin: whether rank 0 reads this process's stdin.

    Raises:
        ConfigError: if there are fewer GPUs than processes.
        LaunchError: if another launcher has started this process, or the processes cannot be started.
        RankError: if one of them fails.
    """
    if (ranks := detect_ranks(os.environ)) is not None:
        raise LaunchError(
            f"{command} starts the processes itself, and is already one that {ranks.launcher} has started; start it "
            "alone"
        )
    world_size = model.pp * model.tp
    check_process_count(world_size, f"--pp {model.pp} --tp {model.tp}")
    num_gpus = count_gpus(device, os.environ)
    if num_gpus is not None and world_size > num_gpus:
        raise ConfigError(
            f"--pp {model.pp} --tp {model.tp}: are {world_size} processes, each with a GPU, and there are {num_gpus}; "
            "ask for fewer, or add --device cpu"
        )
    folder = Path(tempfile.mkdtemp(prefix="pipekit-model-"))
    file, result = folder / "task.json", folder / _RESULT_FILE
    try:
        file.write_text(json.dumps({"model": asdict(model), "task": task}, default=str), encoding="utf-8")
        run_local(
            [sys.executable, "-m", module, str(file)],
            world_size=world_size,
            log_dir=folder,
            env=process_environ(world_size, num_gpus, folder),
            timeout_s=math.inf,
            stdin_rank=0 if reads_stdin else None,
        )
        found = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None
    except RankError as error:
        if error.failure.report is None or error.failure.report.kind != "user":
            raise  # its log is there to be read
        shutil.rmtree(folder)
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return found


@dataclass(frozen=True)
class ModelPart:
    """Part of a model that a process has, with its task.

    Attributes:
        generator: the model, whose methods all processes call together.
        leads: True on rank 0.
        task: see `run_on_ranks`.
        terminal: where the command's output goes.
    """

    generator: Generator
    leads: bool
    task: dict[str, Any]
    terminal: TextIO
    _folder: Path

    def write_result(self, result: Any) -> None:
        """Keep plain data for the process that has started this one."""
        (self._folder / _RESULT_FILE).write_text(json.dumps(result, default=str), encoding="utf-8")


def run_part(arguments: Sequence[str], do: Callable[[ModelPart], None]) -> None:
    """Do the task of a file as the rank whose number is in the environment, with its part of the model."""
    with contextlib.suppress(SystemExit), _model_part(Path(arguments[0])) as part:
        do(part)  # a failure ends the process
    end_finished()


@contextlib.contextmanager
def _model_part(file: Path) -> Iterator[ModelPart]:
    tie_to_parent(os.environ)
    with report_failure(error_file_from(os.environ)):
        ranks = detect_ranks(os.environ)
        assert ranks is not None, "this module is started by run_on_ranks"
        os.environ.update(gloo_environ(ranks, os.environ))
        given = json.loads(file.read_text(encoding="utf-8"))
        model = SpreadModel(**given["model"])
        from pipekit.training.console import chatter_to

        with chatter_to(file.parent / f"libraries-{ranks.rank}.log") as terminal:
            from pipekit.distributed.mpu import ModelParallelUnit
            from pipekit.distributed.processes import join_processes, leave_processes
            from pipekit.engine.parallel_generator import open_on_ranks
            from pipekit.inference.load_model import open_model
            from pipekit.layout import Layout

            place = join_processes(
                device="cpu" if os.environ.get("DS_ACCELERATOR") == "cpu" else "cuda",
                timeout_s=_LIMIT_S,
                local_rank=ranks.local_rank,
                loopback_port=ranks.loopback_port,
                restarts=ranks.restarts,
            )
            config = None if model.config is None else Path(model.config)
            stored = open_model(Path(model.source), given=config, trust_code=model.trust_code)
            generator = open_on_ranks(stored, ModelParallelUnit(Layout(pp=model.pp, tp=model.tp)), place)
            yield ModelPart(generator, ranks.rank == 0, given["task"], terminal, file.parent)
            del generator
            leave_processes()
