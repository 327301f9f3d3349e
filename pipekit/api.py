"""Commands as Python functions: train, plan and verify a configuration, and load a trained model."""

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
    """Train a configuration on this machine, in new processes, and return losses, metrics and the newest checkpoint.

    This is `pipekit train` as a function: it prints the plan and the progress, and resumes a stopped run from its
    newest checkpoint. No process is left when it returns or raises.

    The processes import a trial's class from its module, or from the file of the running script. They run the script
    only up to this call, so the script needs no `if __name__ == "__main__"`.

    Under torchrun, deepspeed, srun or mpirun, this process is one of the ranks: it exits when the training ends, and
    the code after the call does not run.

    Args:
        config: a YAML file's path, a nested dict with its keys, or a `Config`.
        overrides: changes of single keys, such as `["train.steps=20"]` or `{"train.steps": 20}`.
        trial: a trial class, in place of the one that the configuration names as `run.trial` (a `LayersTrial`) or as
            `trial` (a `Trial`).
        trust_code: whether to run code that a `config.yaml` in the folder of a run or a checkpoint names.

    Raises:
        PipekitError: if the configuration is wrong or a rank fails; the message is that of the command.
        StoppedError: if a signal or `run.max_time` stopped the run after it saved a checkpoint.
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
    """Predict the stages, memory and step time of a run, and compare layouts, before anything starts.

    Args:
        config: a YAML file's path, a nested dict with its keys, or a `Config`.
        overrides: changes of single keys, such as `["train.steps=20"]` or `{"train.steps": 20}`.
        devices: number of devices for which to compare all layouts; None predicts the configuration's layout, and
            compares layouts only for `parallel: auto`.
        device: type of device that each rank computes on, such as "h100"; None takes the devices of this machine.
        device_files: YAML files that describe further types of device.
        max_tp: largest tensor-parallel degree to compare; None keeps the configuration's degree if that is above 1, and
            otherwise compares the degrees that fit a node of GPUs.
        measure: whether to time the layers on this machine.
        trial: a trial class, in place of `run.trial`.
        trust_code: see `train`.

    Returns:
        The data that `pipekit plan --json` prints.

    Raises:
        PipekitError: if the configuration is wrong, or no layout fits.
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
    """Compare a few training steps of a model under every layout that fits with the same steps in one process.

    Args:
        config: a YAML file's path, a nested dict with its keys, or a `Config`.
        overrides: changes of single keys, such as `["train.steps=20"]` or `{"train.steps": 20}`.
        steps: number of updates under each layout.
        devices: largest number of processes at once; None takes the number of GPUs present, or on a CPU the number that
            the configuration's layout needs, at least four.
        layouts: layouts to run, such as "pp2,dp2xzero0"; None runs the configuration's layout and small ones.
        tolerance: largest relative difference that counts as equal.
        keep: folder for the recorded values and the logs; None keeps nothing.
        trial: a trial class, in place of `run.trial`.
        trust_code: see `train`.

    Returns:
        The data that `pipekit verify --json` prints; `agrees` is True if no layout differs.

    Raises:
        PipekitError: if the configuration is wrong, or no layout fits.
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
    """Load a whole trained model on the CPU, in evaluation mode, from a run, a checkpoint or an export.

    The model is a torch module: a language model takes token ids `(B, S)`, int64, and returns logits `(B, S, V)`.
    Adapters are merged into the weights that they adapt.

    Args:
        source: the result of `train`, a run's folder, one of its checkpoints, or an exported folder.
        config: configuration of the model, for a checkpoint that does not hold one.
        trust_code: whether to run code that a checkpoint names as `model.builder`.

    Raises:
        PipekitError: if there is no model, a file cannot be read, or the model needs code that is not trusted.
    """
    from pipekit.inference.load_model import open_model

    return open_model(
        Path(source if isinstance(source, (str, Path)) else source.run_dir), given=config, trust_code=trust_code
    ).build()


def _name_trial(trial: type | None, *, run_alone: bool = False) -> list[str]:
    """A trial class as changes to a configuration; with `run_alone` it may be a `pipekit.Trial` too."""
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
