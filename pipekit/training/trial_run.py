"""A trial as its configuration names it, trained as the configuration says."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from pipekit.config.trial_config import PeriodConfig, TrialConfig
from pipekit.errors import ConfigError
from pipekit.models.custom import load_object
from pipekit.training.periods import Batch, Epoch, Period, Samples, Tokens
from pipekit.training.trial import Trial, check_trial

if TYPE_CHECKING:
    from pipekit.training.context import TrialContext
    from pipekit.training.trial_loop import TrialResult


def load_trial_class(config: TrialConfig) -> type[Trial]:
    """Import the trial that a configuration names, and check it.

    Raises:
        ConfigError: if it cannot be imported, is no `Trial`, or the training has no length.
        PipekitError: if the class breaks a rule.
    """
    if config.trial is None:
        raise ConfigError("trial: missing; for example trial: my_package.my_trial:MyTrial")
    trial = load_object(config.trial, key="trial")
    if not (isinstance(trial, type) and issubclass(trial, Trial)):
        raise ConfigError(f"trial={config.trial}: must be a subclass of pipekit.Trial")
    check_trial(trial)
    if config.fit.max_length is None and not config.fit.test_mode:
        raise ConfigError("fit.max_length: missing; for example fit: {max_length: {epochs: 3}}")
    return trial


def fit_as_configured(context: TrialContext) -> TrialResult:
    """Build the trial of a context's configuration, and train it; the first rank shows the end on the terminal."""
    from pipekit.training.trainer import Trainer

    config = context.config
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    trial = load_trial_class(config)(context)
    fit = config.fit
    arguments: dict[str, Any] = {name: getattr(fit, name) for name in type(fit).model_fields}
    for name, value in arguments.items():
        if isinstance(value, PeriodConfig):
            arguments[name] = _period(value)
    result = Trainer(trial, context).fit(**arguments)
    if context.distributed.rank == 0:
        context.terminal.write(f"{result.batch} batches in {result.time_s:.1f} s; checkpoint {result.checkpoint}\n")
    return result


def _period(config: PeriodConfig) -> Period:
    if config.tokens is not None and config.per_sample is not None:
        return Tokens(config.tokens, per_sample=config.per_sample)
    kinds: dict[str, type[Period]] = {"batches": Batch, "epochs": Epoch, "samples": Samples}
    (unit,) = (name for name in kinds if getattr(config, name) is not None)
    return kinds[unit](getattr(config, unit))
