"""Rules between the keys of the sections `optimizer` and `scheduler`, and between them and others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pipekit.config.growth import steps_of_tokens
from pipekit.config.growth_rules import growth_is_sound
from pipekit.optimizers.learning_rates import SCHEDULES, argument_faults, takes
from pipekit.optimizers.table import OPTIMIZERS, SECTION_KEYS
from pipekit.settings.base import Fault, alternatives, rule_fault, show

if TYPE_CHECKING:
    from pipekit.config.optimizer_config import OptimizerConfig, OptimizerGroup, SchedulerConfig
    from pipekit.config.schema import TrainConfig


def warmup_ends_before_decay(scheduler: SchedulerConfig, train: TrainConfig) -> Iterator[Fault]:
    """The warm-up is the first part of the decay steps. A run may well be shorter than both: a first try often is."""
    decay_steps = scheduler.decay_steps
    if decay_steps is not None and scheduler.warmup_steps > decay_steps:
        yield rule_fault(
            "scheduler.warmup_steps",
            f"scheduler.warmup_steps={scheduler.warmup_steps} is more than scheduler.decay_steps={decay_steps}; "
            f"try scheduler.warmup_steps={decay_steps // 10}",
        )
    for name, is_given in {"warmup": scheduler.warmup_steps > 0, "decay": decay_steps is not None}.items():
        tokens = getattr(scheduler, f"{name}_tokens")
        if is_given and tokens is not None:
            steps = getattr(scheduler, f"{name}_steps")
            yield rule_fault(
                f"scheduler.{name}_tokens scheduler.{name}_steps",
                f"scheduler.{name}_tokens={tokens} and scheduler.{name}_steps={steps} both give one length; leave one "
                "of them out",
            )
    if not growth_is_sound(train):
        return
    warm_up, decay = (steps_of_tokens(tokens, train) for tokens in (scheduler.warmup_tokens, scheduler.decay_tokens))
    warm_up, decay = warm_up or scheduler.warmup_steps, decay or decay_steps
    if decay is not None and warm_up > decay and (scheduler.warmup_tokens or scheduler.decay_tokens):
        key = "warmup_tokens" if scheduler.warmup_tokens else "warmup_steps"
        yield rule_fault(
            f"scheduler.{key} scheduler.decay_tokens",
            f"scheduler.{key}={getattr(scheduler, key)} takes {warm_up:,} steps, more than the {decay:,} of the decay; "
            f"try scheduler.warmup_steps={decay // 10}",
        )


def schedule_takes_its_settings(scheduler: SchedulerConfig) -> Iterator[Fault]:
    """A schedule gets the settings that it has, of their types."""
    schedule = SCHEDULES.get(scheduler.type)
    if schedule is None:
        return
    for name, message in argument_faults(schedule, scheduler.args):
        yield rule_fault("scheduler.args scheduler.type", f"scheduler.args: {scheduler.type}: {name} {message}")
    for key in ("warmup_steps", "decay_steps", "min_lr_ratio"):
        for given in (key, key.replace("_steps", "_tokens")):
            value, default = getattr(scheduler, given), type(scheduler).model_fields[given].default
            if not takes(schedule, key) and value != default:
                yield rule_fault(
                    f"scheduler.{given} scheduler.type",
                    f"scheduler.{given}={value} has no effect with scheduler.type={scheduler.type}; remove it",
                )


def optimizer_takes_its_settings(optimizer: OptimizerConfig) -> Iterator[Fault]:
    """An optimizer gets the settings that it has, and is one that can be used."""
    kind = OPTIMIZERS.get(optimizer.type)
    if kind is None:
        return
    if kind.refusal:
        yield rule_fault("optimizer.type", f"optimizer.type={optimizer.type}: {kind.refusal}")
        return
    sections: dict[str, OptimizerConfig | OptimizerGroup] = {"": optimizer}
    sections |= {f"groups.{index}": group for index, group in enumerate(optimizer.groups)}
    for place, section in sections.items():
        for key in SECTION_KEYS:
            value = getattr(section, key)
            if value and key not in kind.settings:
                path = ".".join(filter(None, ("optimizer", place, key)))
                if key == "momentum" and "betas" in kind.settings:
                    second = (section.betas or optimizer.betas or (0.9, 0.95))[1]
                    remedy = f"try {path.removesuffix(key)}betas=[{value}, {second}]"
                else:
                    remedy = f"it takes {alternatives(kind.settings, last='and') if kind.settings else 'lr alone'}"
                yield rule_fault(
                    f"{path} optimizer.type",
                    f"{path}={show(value)} is no setting of optimizer.type={optimizer.type}; {remedy}",
                )
        algorithm = getattr(section, "algorithm", None)
        if algorithm is not None and optimizer.type != "muon":
            yield rule_fault(
                f"optimizer.{place}.algorithm optimizer.type",
                f"optimizer.{place}.algorithm={algorithm} is for optimizer.type=muon, and it is "
                f"{optimizer.type}; remove it",
            )
    for key in ("lr", *SECTION_KEYS):
        if key in optimizer.args:
            yield rule_fault(
                "optimizer.args", f"optimizer.args: {key} has a key of its own; write it as optimizer.{key}"
            )


OPTIMIZER_RULES: tuple[tuple[tuple[str, ...], Callable[..., Iterator[Fault]]], ...] = (
    (("scheduler", "train"), warmup_ends_before_decay),
    (("scheduler",), schedule_takes_its_settings),
    (("optimizer",), optimizer_takes_its_settings),
)
