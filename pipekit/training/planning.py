"""From a configuration to the plan of its trial, before any process starts and without deepspeed."""

from __future__ import annotations

from pipekit.config import Config
from pipekit.errors import ConfigError
from pipekit.models import load_object
from pipekit.models.custom import check_specs
from pipekit.plan import Plan, plan_run
from pipekit.training.language_model import LanguageModelTrial
from pipekit.training.trial import ProgressCallback, Trial


def load_trial(config: Config) -> type[Trial]:
    """Return the trial that the configuration names, or the shipped one.

    Raises:
        ConfigError: if it cannot be imported, or is no `Trial`.
    """
    if config.run.trial is None:
        return LanguageModelTrial
    trial = load_object(config.run.trial, key="run.trial")
    if not (isinstance(trial, type) and issubclass(trial, Trial)):
        raise ConfigError(f"run.trial={config.run.trial}: must be a subclass of pipekit.Trial")
    return trial


def plan_trial(
    config: Config,
    *,
    world_size: int | None,
    num_devices: int | None,
    on_progress: ProgressCallback | None = None,
) -> Plan:
    """Return the plan of a configuration's trial, after doing what the trial does once before training.

    Raises:
        PipekitError: if something does not fit.
    """
    trial = load_trial(config)
    config = trial.resolve(config, on_progress)
    specs = trial.build_layers(config)
    check_specs(specs, where=f"{trial.__name__}.build_layers")
    return plan_run(config, specs, world_size=world_size, num_devices=num_devices)


def resumable(config: Config) -> Config:
    """Return the configuration as its run folder stores it: trained again, it goes on from the newest checkpoint."""
    return config.updated({"checkpoint.resume": "auto"})
