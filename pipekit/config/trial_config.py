"""The configuration of a trial of one's own: its class, its hyperparameters, and how long it trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from pipekit.config.callbacks_config import CallbacksConfig
from pipekit.config.load import Draft, apply_override, read_config_text, read_draft
from pipekit.config.schema import Degree, Seed, Threads, TimeLimit
from pipekit.errors import ConfigError
from pipekit.settings.base import Fault, FolderText, PathText, Section, show
from pipekit.settings.duration import Duration
from pipekit.settings.faults import nested_keys, section_faults, unknown_key_fault
from pipekit.settings.yaml_source import read_yaml


class PeriodConfig(Section):
    """A period of training, in one of these units."""

    batches: PositiveInt | None = Field(default=None, examples=[100])
    """Global batches."""

    epochs: PositiveInt | None = Field(default=None, examples=[1])
    """Epochs, each once through the training data."""

    samples: PositiveInt | None = Field(default=None, examples=[10_000])
    """Samples, those of all replicas."""

    tokens: PositiveInt | None = Field(default=None, examples=[1_000_000])
    """Tokens, those of all replicas, of samples that have `per_sample` each."""

    per_sample: PositiveInt | None = Field(default=None, examples=[1024])
    """Tokens of a sample, beside `tokens`."""

    @model_validator(mode="after")
    def _has_one_unit(self) -> PeriodConfig:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None and name != "per_sample"]
        if len(given) != 1:
            raise ValueError(f"needs one unit, and has {len(given)}; for example {{batches: 100}}")
        if (self.tokens is None) != (self.per_sample is None):
            raise ValueError("tokens and per_sample go together; for example {tokens: 1000000, per_sample: 1024}")
        return self


class TrialRunConfig(Section):
    """Folder, device and processes of a trial."""

    dir: FolderText = Field(default="runs/trial", min_length=1, examples=["runs/my-trial"])
    """Folder of the run: checkpoints, logs and metrics. Relative to the working directory; `pipekit train` names it
    after the YAML file where it is not given."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; `auto` uses GPUs if there are any."""

    processes: Degree | Literal["auto"] = Field(default="auto", examples=[2])
    """Number of processes that `pipekit train` starts; `auto` is the number of GPUs, or 1 on a CPU."""

    threads_per_process: Threads | Literal["auto"] = Field(default="auto", examples=[4])
    """CPU threads of each process; `auto` divides the cores among them."""

    timeout_s: TimeLimit = Field(default=600.0, examples=[600])
    """Longest wait for another rank, in seconds."""

    restarts: NonNegativeInt = Field(default=0, examples=[3])
    """Largest number of restarts from the newest checkpoint, by `pipekit train`, after a rank was lost or hung. Two
    failures without a newer checkpoint in between end the run at once."""

    max_time: Duration | None = Field(default=None, examples=["11h30m"])
    """Time limit such as `11h30m`, counted from the start of the command. The run saves and stops before it is over,
    with exit code 75; null sets no limit."""


class FitConfig(Section):
    """Length and periods of a training: the arguments of `Trainer.fit` of these names."""

    max_length: PeriodConfig | None = Field(default=None, examples=[{"batches": 1000}])
    """Length of the training, that of earlier starts included."""

    reporting_period: PeriodConfig = PeriodConfig(batches=100)
    """Between reports of training metrics."""

    validation_period: PeriodConfig | None = Field(default=None, examples=[{"epochs": 1}])
    """Between validations; null validates only at the end."""

    checkpoint_period: PeriodConfig | None = Field(default=None, examples=[{"batches": 250}])
    """Between checkpoints beside those of the policy; null makes none."""

    checkpoint_interval: Duration | None = Field(default="15m", examples=["1h"])
    """Longest time without a checkpoint; null makes none by time."""

    checkpoint_on_error: Literal["stop", "warn"] = "stop"
    """Reaction where the disk does not take a checkpoint: `stop` ends the training, `warn` tells of it and tries
    again when the next is due. The last one is needed in any case."""

    checkpoint_policy: Literal["all", "best", "none"] = "best"
    """Checkpoints after validations: all, those better than all before, or none."""

    latest_checkpoint: PathText | None = Field(default=None, min_length=1, examples=["runs/my-trial", "never"])
    """The checkpoint to go on from: a path, or `never`; null takes the newest of the run folder."""

    best_metric: str | None = Field(default=None, min_length=1, examples=["loss"])
    """Metric of the validation by which checkpoints are compared; null takes the first."""

    best_is: Literal["lowest", "highest"] = "lowest"
    """The best value of `best_metric`."""

    step_zero_validation: bool = False
    """Validate before the first batch."""

    test_mode: bool = False
    """Go through everything with two batches, and keep nothing."""

    profiling_enabled: bool = False
    """Profile a few batches."""


class TrialConfig(Section):
    """Configuration of a trial of one's own."""

    trial: str | None = Field(default=None, min_length=1, examples=["my_package.my_trial:MyTrial"])
    """`package.module:Class` of the `pipekit.Trial`."""

    hyperparameters: dict[str, Any] = Field(default={}, examples=[{"lr": 0.001}])
    """Anything that the trial wants to read, as `context.get_hparam(name)`."""

    data: dict[str, Any] = Field(default={}, examples=[{"path": "data/images"}])
    """Anything that the trial wants to know of its data, as `context.get_data_config()`."""

    seed: Seed = Field(default=1, examples=[1])
    """Seed of everything random: of the trial's constructor, of loaders that have none, and of each batch."""

    run: TrialRunConfig = TrialRunConfig()
    """Folder, device and processes of the trial."""

    fit: FitConfig = FitConfig()
    """Length of the training, and its periods."""

    callbacks: CallbacksConfig = CallbacksConfig()
    """Callbacks that ship with pipekit."""


_SECTIONS: dict[str, type[Section]] = {"run": TrialRunConfig, "fit": FitConfig, "callbacks": CallbacksConfig}


def names_trial(path: str | Path) -> bool:
    """True if a YAML file is the configuration of a trial: it has the key `trial`."""
    try:
        text = read_config_text(Path(path))
    except ConfigError:
        return False  # whoever reads it as one of layers says why
    value = read_yaml(text).value if "trial" in text else None
    return isinstance(value, dict) and "trial" in value


def load_trial_config(path: str | Path, overrides: Iterable[str] = ()) -> TrialConfig:
    """Return the configuration of a trial from a YAML file, changed by texts such as "hyperparameters.lr=0.1".

    Raises:
        ConfigError: with every mistake, each where it was made.
    """
    draft = read_draft(path, overrides)
    if isinstance(draft.values.get("run", {}), dict):
        draft.values["run"] = {"dir": f"runs/{Path(path).stem}", **(draft.values.get("run") or {})}
    return _finish(draft)


def parse_trial_config(values: Mapping[str, Any], overrides: Iterable[str] = ()) -> TrialConfig:
    """Return the configuration of a nested dict with the keys of the YAML file, changed as in `load_trial_config`.

    Raises:
        ConfigError: with every mistake.

    Example:
        >>> parse_trial_config({"hyperparameters": {"lr": 0.1}, "run": {"device": "cpu"}}).run.device
        'cpu'
    """
    draft = Draft()
    draft.values = dict(values)
    for override in overrides:
        apply_override(draft, override)
    return _finish(draft)


def _finish(draft: Draft) -> TrialConfig:
    keys = {"": list(TrialConfig.model_fields)}
    for name, section in _SECTIONS.items():
        keys |= nested_keys(name, section)
    known: dict[str, Any] = {}
    for key, value in draft.values.items():
        if key not in TrialConfig.model_fields:
            draft.add(unknown_key_fault(TrialConfig, (str(key),), keys))
        elif key not in _SECTIONS:
            known[key] = value
        elif value is not None and not isinstance(value, Mapping):
            example = keys[key][0]
            draft.add(
                Fault((key,), f"{key}={show(value)}: must be a mapping of keys; for example {key}: {{{example}: ...}}")
            )
        else:
            try:
                known[key] = _SECTIONS[key].model_validate(dict(value or {}))
            except ValidationError as error:
                for fault in section_faults(key, _SECTIONS[key], dict(value or {}), error, keys):
                    draft.add(fault)
    config = None
    try:
        config = TrialConfig.model_validate(known)
    except ValidationError as error:
        for fault in section_faults("", TrialConfig, known, error, keys):
            draft.add(Fault(fault.key[1:], fault.message.removeprefix(".")))
    if draft.faults or config is None:
        raise draft.error()
    return config
