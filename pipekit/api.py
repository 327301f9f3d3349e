"""The commands as functions: train, plan and verify a configuration, and load what was trained, from Python."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipekit.config.sources import Changes, ConfigSource, read_config, read_run_config, write_overrides
from pipekit.errors import ConfigError
from pipekit.settings.script_file import end_reading, name_class
from pipekit.signals import Interrupted

if TYPE_CHECKING:
    from pipekit.config import Config, ModelConfigSource
    from pipekit.config.trial_config import TrialConfig
    from pipekit.layers.sequential import SequentialModel
    from pipekit.plan.train_result import TrainResult
    from pipekit.training.layers_trial import LayersTrial
    from pipekit.training.trial import Trial


def train(
    config: ConfigSource,
    overrides: Changes = (),
    *,
    trial: type[LayersTrial] | type[Trial] | None = None,
    trust_code: bool = False,
) -> TrainResult:
    """Train a configuration on this machine, in processes of its own, and return losses, metrics and the checkpoint.

    This is `pipekit train`: the plan and the progress are shown on stdout, and a run that was stopped goes on from its
    newest checkpoint. No process is left when it returns or raises.

    The processes import the class of a trial by its module, or from the script that is running by its file. They run
    the script up to this call, and nothing behind it, so that it needs no `if __name__ == "__main__"`.

    Under torchrun, deepspeed, srun or mpirun, this process is one of the ranks: it ends with the training, and nothing
    that stands behind the call is run.

    Args:
        config: a YAML file's path, a nested dict with its keys, or a `Config`.
        overrides: changes of single keys, such as `["train.steps=20"]` or `{"train.steps": 20}`.
        trial: a trial, in place of one that the configuration names: `run.trial`, or `trial` of a `pipekit.Trial`.
        trust_code: whether code may run that a `config.yaml` in the folder of a run or a checkpoint names.

    Raises:
        PipekitError: if the configuration is wrong or a rank fails, with the message of the command.
        StoppedError: if the run was asked to stop, by a signal or `run.max_time`, and has saved a checkpoint.
        KeyboardInterrupt: if it was interrupted before there was anything to save.
    """
    end_reading()
    from pipekit.commands.train import run
    from pipekit.plan.train_result import TrainResult

    started_s = time.monotonic()

    def read() -> Config | TrialConfig:
        changes = [*write_overrides(overrides), *_name_trial(trial, run_alone=True)]
        return read_run_config(config, changes, trust_code=trust_code)

    try:
        done = run(read)
    except Interrupted as interrupt:
        raise _as_exception(interrupt) from None
    return TrainResult.read(done.run.dir, seconds=time.monotonic() - started_s)


def plan(
    config: ConfigSource,
    overrides: Changes = (),
    *,
    devices: int | None = None,
    device: str | None = None,
    device_files: Sequence[str | Path] = (),
    max_tp: int | None = None,
    measure: bool = False,
    trial: type[LayersTrial] | None = None,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Predict what a run will take before it starts: stages, memory, seconds, and the layouts compared.

    Args:
        config: a YAML file's path, a nested dict with its keys, or a `Config`.
        overrides: changes of single keys, such as `["train.steps=20"]` or `{"train.steps": 20}`.
        devices: compare every layout over so many; None keeps the configuration's.
        device: what each rank computes on, such as "h100"; None takes what is present.
        device_files: YAML files with devices of your own.
        max_tp: largest tensor-parallel degree to compare; None keeps one of the configuration above 1, and otherwise
            compares those of a node of GPUs.
        measure: whether to time the layers on this machine.
        trial: a trial, in place of `run.trial`.
        trust_code: see `train`.

    Returns:
        What `pipekit plan --json` prints, as plain data.

    Raises:
        PipekitError: if the configuration is wrong, or nothing fits.
    """
    from pipekit.commands.plan import PlanOptions, plan_report

    changes = [*write_overrides(overrides), *_name_trial(trial)]
    options = PlanOptions(devices, device, tuple(map(Path, device_files)), max_tp, measure)
    return plan_report(read_config(config, changes, trust_code=trust_code), options)


def verify(
    config: ConfigSource,
    overrides: Changes = (),
    *,
    steps: int = 3,
    devices: int | None = None,
    layouts: str | None = None,
    tolerance: float = 1e-4,
    keep: str | Path | None = None,
    trial: type[LayersTrial] | None = None,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Run a few steps of a model under every layout that fits and in one process, and compare them.

    Args:
        config: a YAML file's path, a nested dict with its keys, or a `Config`.
        overrides: changes of single keys, such as `["train.steps=20"]` or `{"train.steps": 20}`.
        steps: updates under each layout.
        devices: processes that may run at once; None takes the GPUs present, or four.
        layouts: layouts to run, such as "pp2,dp2xzero0"; None takes the configuration's own and small ones.
        tolerance: largest relative difference.
        keep: folder for what was recorded, and the logs; None keeps nothing.
        trial: a trial, in place of `run.trial`.
        trust_code: see `train`.

    Returns:
        What `pipekit verify --json` prints, as plain data: `agrees` is True where no layout differs.

    Raises:
        PipekitError: if the configuration is wrong, or nothing fits.
        KeyboardInterrupt: if it was interrupted.
    """
    end_reading()
    from pipekit.commands.verify_session import verify_config

    changes = [*write_overrides(overrides), *_name_trial(trial)]
    try:
        return verify_config(
            read_config(config, changes, trust_code=trust_code),
            num_steps=steps,
            num_devices=devices,
            layouts=layouts,
            tolerance=tolerance,
            keep=None if keep is None else Path(keep),
        )
    except Interrupted as interrupt:
        raise _as_exception(interrupt) from None


def load_model(
    source: str | Path | TrainResult, *, config: ModelConfigSource | None = None, trust_code: bool = False
) -> SequentialModel:
    """Load a trained model, whole and in evaluation mode, from a run, a checkpoint or an export, on the CPU.

    It is a torch module: of a language model it takes token ids `(B, S)`, int64, and returns logits `(B, S, V)`.
    Adapters are merged into the weights that they are added to.

    Args:
        source: what `train` returned, a run's folder, one of its checkpoints, or an exported folder.
        config: configuration of the model, of a checkpoint that does not tell it.
        trust_code: whether code that a checkpoint names as `model.builder` may run.

    Raises:
        PipekitError: if there is no model, a file cannot be read, or code is not trusted.
    """
    from pipekit.inference.load_model import open_model

    return open_model(
        Path(source if isinstance(source, (str, Path)) else source.run_dir), given=config, trust_code=trust_code
    ).build()


def _name_trial(trial: type | None, *, run_alone: bool = False) -> list[str]:
    """The class of a trial as changes of a configuration; `run_alone` takes a `pipekit.Trial` as well."""
    if trial is None:
        return []
    from pipekit.training.layers_trial import LayersTrial
    from pipekit.training.trial import Trial

    if isinstance(trial, type) and issubclass(trial, LayersTrial):
        return write_overrides({"run.trial": name_class(trial, argument="trial")})
    if run_alone and isinstance(trial, type) and issubclass(trial, Trial):
        return write_overrides({"trial": name_class(trial, argument="trial")})
    kinds = "pipekit.LayersTrial or pipekit.Trial" if run_alone else "pipekit.LayersTrial"
    raise ConfigError(f"trial={trial!r}: must be a subclass of {kinds}, the class itself")


def _as_exception(interrupt: Interrupted) -> BaseException:
    """Ctrl-C as Python raises it; another signal as it is."""
    return KeyboardInterrupt(str(interrupt)) if interrupt.signum == signal.SIGINT else interrupt
