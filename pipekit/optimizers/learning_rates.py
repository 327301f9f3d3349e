"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no scheduler state.

`SCHEDULES` has an entry for each. The first argument of its function is the number of updates that have been made; the
function returns the learning rate of the next one. Its keyword arguments are the keys of the `scheduler` section, of
which it takes what it names, and `peak`, which is `optimizer.lr`; all others are keys of `scheduler.args`. Their types
are what a configuration is checked against.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from pipekit.settings.suggest import closest

Ratio = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]
WarmUp = Literal["log", "linear"]

SECTION_KEYS = ("warmup_steps", "decay_steps", "min_lr_ratio")
"""Keys of the `scheduler` section that a schedule may take."""


def constant(step: int, *, peak: float, warmup_steps: int, decay_steps: int = 0, min_lr_ratio: float = 0.0) -> float:
    """Rate that stays at its peak after the warm-up; decay settings have no effect."""
    return _warm_up(step, peak, warmup_steps) or peak


def linear(step: int, *, peak: float, warmup_steps: int, decay_steps: int, min_lr_ratio: float) -> float:
    """Rate that falls linearly after the warm-up."""
    return polynomial(
        step, peak=peak, warmup_steps=warmup_steps, decay_steps=decay_steps, min_lr_ratio=min_lr_ratio, power=1.0
    )


def polynomial(
    step: int, *, peak: float, warmup_steps: int, decay_steps: int, min_lr_ratio: float, power: PositiveFloat = 2.0
) -> float:
    """Rate that falls with a power of the remaining steps after the warm-up."""
    remaining = 1.0 - _progress(step, warmup_steps, decay_steps)
    return _warm_up(step, peak, warmup_steps) or _between(peak, min_lr_ratio, remaining**power)


def cosine(step: int, *, peak: float, warmup_steps: int, decay_steps: int, min_lr_ratio: float) -> float:
    """Rate that falls along half a cosine after the warm-up.

    It rises linearly over `warmup_steps`, so that the first update already moves the weights, then falls from `peak` to
    `min_lr_ratio * peak` at `decay_steps`, and stays there.

    Source: Loshchilov and Hutter, SGDR, section 3.

    Example:
        >>> settings = {"peak": 1.0, "warmup_steps": 2, "decay_steps": 10, "min_lr_ratio": 0.1}
        >>> [round(cosine(step, **settings), 3) for step in (0, 1, 2, 6, 10, 99)]
        [0.5, 1.0, 1.0, 0.55, 0.1, 0.1]
    """
    remaining = 0.5 * (1.0 + math.cos(math.pi * _progress(step, warmup_steps, decay_steps)))
    return _warm_up(step, peak, warmup_steps) or _between(peak, min_lr_ratio, remaining)


def inverse_sqrt(step: int, *, peak: float, warmup_steps: int, timescale_steps: PositiveInt | None = None) -> float:
    """Rate that falls with the inverse square root of the step after the warm-up, without an end.

    `timescale_steps` after the warm-up has begun to count, the rate has fallen to `1 / sqrt(2)`; by default these are
    the warm-up's, or 10,000 where there is none.

    Source: Vaswani et al., Attention Is All You Need, section 5.3.
    """
    timescale = timescale_steps or warmup_steps or 10_000
    return _warm_up(step, peak, warmup_steps) or peak * (1.0 + (step - warmup_steps) / timescale) ** -0.5


def wsd(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    decay_steps: int,
    min_lr_ratio: float,
    cooldown_steps: PositiveInt | None = None,
    cooldown: Literal["linear", "cosine", "1-sqrt"] = "linear",
) -> float:
    """Rate of warm-up, stable phase and cool-down (WSD): it stays at its peak, and falls only in the last steps.

    The cool-down takes `cooldown_steps`, a tenth of `decay_steps` by default, and ends at `decay_steps`.

    Source: Hu et al., MiniCPM, section 4; the shape `1-sqrt`: Hägele et al., Scaling Laws and Compute-Optimal Training
    Beyond Fixed Training Durations, section 3.
    """
    length = cooldown_steps or max(1, decay_steps // 10)
    progress = min(1.0, max(0.0, (step - (decay_steps - length)) / length))
    shapes = {"linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    remaining = shapes.get(cooldown, 1.0 - math.sqrt(progress))
    return _warm_up(step, peak, warmup_steps) or _between(peak, min_lr_ratio, remaining)


def exponential(step: int, *, peak: float, min_lr: PositiveFloat, rise_steps: PositiveInt) -> float:
    """Rate that rises exponentially from `min_lr` to its peak, for a range test over orders of magnitude."""
    return float(min_lr * (peak / min_lr) ** (min(step, rise_steps) / rise_steps))


def lr_range_test(
    step: int,
    *,
    peak: float,
    lr_range_test_min_lr: PositiveFloat | None = None,
    lr_range_test_step_size: PositiveInt = 2000,
    lr_range_test_step_rate: Rate = 1.0,
    lr_range_test_staircase: bool = False,
) -> float:
    """Rate that rises linearly, or in stairs, without an end: DeepSpeed's `LRRangeTest`.

    It begins at `lr_range_test_min_lr`, by default `optimizer.lr`.

    Source: `runtime/lr_schedules.py` of DeepSpeed 0.19.8; Smith, A disciplined approach to neural network
    hyper-parameters: Part 1.
    """
    interval = step / lr_range_test_step_size
    start = peak if lr_range_test_min_lr is None else lr_range_test_min_lr
    return start * (1.0 + lr_range_test_step_rate * (math.floor(interval) if lr_range_test_staircase else interval))


def one_cycle(
    step: int,
    *,
    peak: float,
    cycle_min_lr: Rate,
    cycle_max_lr: PositiveFloat | None = None,
    decay_lr_rate: Rate = 0.0,
    cycle_first_step_size: PositiveInt = 2000,
    cycle_second_step_size: PositiveInt | None = None,
    cycle_first_stair_count: Annotated[int, Field(ge=0)] = 0,
    cycle_second_stair_count: Annotated[int, Field(ge=0)] | None = None,
    decay_step_size: Annotated[int, Field(ge=0)] = 0,
    cycle_momentum: bool = True,
    cycle_min_mom: Ratio = 0.8,
    cycle_max_mom: Ratio = 0.9,
    decay_mom_rate: Rate = 0.0,
) -> float:
    """Rate of DeepSpeed's `OneCycle`: it rises linearly, falls again, and then decays without an end.

    `cycle_max_lr` is `optimizer.lr` by default. `one_cycle_momentum` is the momentum at the same time.

    Source: `runtime/lr_schedules.py` of DeepSpeed 0.19.8; Smith, A disciplined approach to neural network
    hyper-parameters: Part 1.
    """
    total = cycle_first_step_size + (cycle_second_step_size or cycle_first_step_size)
    if step <= total:
        highest = peak if cycle_max_lr is None else cycle_max_lr
        rise = _cycle_position(
            step,
            first=cycle_first_step_size,
            total=total,
            stairs=(cycle_first_stair_count, cycle_second_stair_count),
        )
        return cycle_min_lr + (highest - cycle_min_lr) * rise
    return cycle_min_lr / (1.0 + decay_lr_rate * (step - total) / decay_step_size if decay_step_size else 1.0)


def one_cycle_momentum(
    step: int,
    *,
    cycle_first_step_size: int = 2000,
    cycle_second_step_size: int | None = None,
    cycle_first_stair_count: int = 0,
    cycle_second_stair_count: int | None = None,
    decay_step_size: int = 0,
    cycle_momentum: bool = True,
    cycle_min_mom: float = 0.8,
    cycle_max_mom: float = 0.9,
    decay_mom_rate: float = 0.0,
) -> float | None:
    """Momentum of DeepSpeed's `OneCycle`, which falls while the rate rises; None leaves the optimizer's own."""
    total = cycle_first_step_size + (cycle_second_step_size or cycle_first_step_size)
    if not cycle_momentum:
        return None
    if step <= total:
        rise = _cycle_position(
            step,
            first=cycle_first_step_size,
            total=total,
            stairs=(cycle_first_stair_count, cycle_second_stair_count),
        )
        return cycle_max_mom - (cycle_max_mom - cycle_min_mom) * rise
    return cycle_max_mom * (1.0 + decay_mom_rate * (step - total) / decay_step_size if decay_step_size else 1.0)


def warmup_lr(
    step: int,
    *,
    peak: float,
    warmup_min_lr: Rate = 0.0,
    warmup_max_lr: PositiveFloat | None = None,
    warmup_num_steps: PositiveInt = 1000,
    warmup_type: WarmUp = "log",
) -> float:
    """Rate that rises to `warmup_max_lr`, by default `optimizer.lr`, and stays there: DeepSpeed's `WarmupLR`.

    Source: `runtime/lr_schedules.py` of DeepSpeed 0.19.8, as for the two below.
    """
    highest = peak if warmup_max_lr is None else warmup_max_lr
    rise = _deepspeed_warm_up(step - 1, warmup_num_steps, warmup_type)
    return warmup_min_lr + (highest - warmup_min_lr) * (1.0 if rise is None else rise)


def warmup_decay_lr(
    step: int,
    *,
    peak: float,
    decay_steps: int,
    total_num_steps: PositiveInt | None = None,
    warmup_min_lr: Rate = 0.0,
    warmup_max_lr: PositiveFloat | None = None,
    warmup_num_steps: PositiveInt = 1000,
    warmup_type: WarmUp = "log",
) -> float:
    """Rate of `warmup_lr` that then falls linearly, to `warmup_min_lr` at `total_num_steps`.

    `total_num_steps` is `scheduler.decay_steps` by default.
    """
    highest = peak if warmup_max_lr is None else warmup_max_lr
    total, warm_up = total_num_steps or decay_steps, max(2, warmup_num_steps)
    rise = _deepspeed_warm_up(step - 1, warmup_num_steps, warmup_type)
    if rise is None:
        rise = max(0.0, (total - (step - 1)) / max(1.0, total - warm_up))
    return warmup_min_lr + (highest - warmup_min_lr) * rise


def warmup_cosine_lr(
    step: int,
    *,
    peak: float,
    decay_steps: int,
    total_num_steps: PositiveInt | None = None,
    warmup_min_ratio: Ratio = 0.0,
    warmup_num_steps: PositiveInt = 1000,
    cos_min_ratio: Ratio = 0.0001,
    warmup_type: WarmUp = "log",
) -> float:
    """Rate of DeepSpeed's `WarmupCosineLR`, in fractions of `optimizer.lr`; it is 0 for the first update."""
    total, warm_up = total_num_steps or decay_steps, max(2, warmup_num_steps)
    if step == 0:
        return 0.0
    rise = _deepspeed_warm_up(step - 1, warmup_num_steps, warmup_type)
    if rise is not None:
        return peak * (warmup_min_ratio + (1.0 - warmup_min_ratio) * rise)
    progress = min(1.0, (step - warm_up) / max(1, total - warm_up))
    return peak * (cos_min_ratio + (1.0 - cos_min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Schedule:
    """A schedule: the function of its rate and, where it has one, that of its momentum.

    Attributes:
        rate: called with the updates that have been made, and with settings; returns the rate of the next update.
        momentum: called alike, with those of the settings that it names; returns the momentum, or None.
    """

    rate: Callable[..., float]
    momentum: Callable[..., float | None] | None = None

    @property
    def summary(self) -> str:
        """First line of its docstring."""
        return (inspect.getdoc(self.rate) or "").partition("\n")[0]

    def bind(
        self, *, peak: float, section: Mapping[str, Any], args: Mapping[str, Any]
    ) -> tuple[Callable[[int], float], Callable[[int], float | None]]:
        """Return the rate and the momentum as functions of the step alone.

        Args:
            peak: `optimizer.lr`.
            section: values of `SECTION_KEYS`, of which the functions get those that they name.
            args: further settings.
        """
        given = {"peak": peak, **section, **args}
        momentum: Callable[..., float | None] = self.momentum or _no_momentum
        return partial(self.rate, **_taken(self.rate, given)), partial(momentum, **_taken(momentum, given))


SCHEDULES: dict[str, Schedule] = {
    "cosine": Schedule(cosine),
    "linear": Schedule(linear),
    "constant": Schedule(constant),
    "polynomial": Schedule(polynomial),
    "inverse_sqrt": Schedule(inverse_sqrt),
    "wsd": Schedule(wsd),
    "exponential": Schedule(exponential),
    "lr_range_test": Schedule(lr_range_test),
    "one_cycle": Schedule(one_cycle, one_cycle_momentum),
    "warmup_lr": Schedule(warmup_lr),
    "warmup_decay_lr": Schedule(warmup_decay_lr),
    "warmup_cosine_lr": Schedule(warmup_cosine_lr),
}
"""Every schedule by its name in a configuration."""


def schedule_name(text: str) -> str | None:
    """Name of a schedule that is written as here, or as DeepSpeed writes it; None if there is none.

    Example:
        >>> schedule_name("WarmupDecayLR"), schedule_name("cosine"), schedule_name("sawtooth")
        ('warmup_decay_lr', 'cosine', None)
    """
    return next((name for name in SCHEDULES if _plain(name) == _plain(text)), None)


def scheduler_section(deepspeed_section: Mapping[str, Any]) -> dict[str, Any]:
    """Scheduler section that makes the rates of the `scheduler` section of DeepSpeed's JSON, whose type is known.

    Example:
        >>> scheduler_section({"type": "WarmupLR", "params": {"warmup_num_steps": 10}})
        {'type': 'warmup_lr', 'args': {'warmup_num_steps': 10}}
    """
    name = schedule_name(deepspeed_section["type"]) or deepspeed_section["type"]
    params = dict(deepspeed_section.get("params") or {})
    defaults: dict[str, dict[str, Any]] = {
        "lr_range_test": {"lr_range_test_min_lr": 1e-3},
        "warmup_decay_lr": {"warmup_max_lr": 1e-3},
    }
    return {"type": name, "args": {**defaults.get(name, {}), **params}}


def argument_faults(schedule: Schedule, args: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the name of each argument that a schedule does not take as it is, and what is wrong with it."""
    signature = inspect.signature(schedule.rate).parameters
    known = [name for name in signature if name not in ("step", "peak", *SECTION_KEYS)]
    hints = get_type_hints(schedule.rate, include_extras=True)
    for name, value in args.items():
        if name in ("peak", *SECTION_KEYS):
            key = "optimizer.lr" if name == "peak" else f"scheduler.{name}"
            yield name, f"is no argument; use {key}"
        elif name not in known:
            match = closest(name, known)
            remedy = f"did you mean {match}?" if match else f"it takes {', '.join(known) or 'none'}"
            yield name, f"is no argument of this schedule; {remedy}"
        else:
            try:
                TypeAdapter(hints[name]).validate_python(value, strict=True)
            except ValidationError as error:
                message = error.errors()[0]["msg"]
                yield name, f"{message[0].lower()}{message[1:]}, and is {value!r}"
    for name in known:
        if signature[name].default is inspect.Parameter.empty and name not in args:
            yield name, "is missing; this schedule has no default for it"


def takes(schedule: Schedule, key: str) -> bool:
    """True if a key of the `scheduler` section has a meaning for a schedule.

    Example:
        >>> takes(SCHEDULES["cosine"], "decay_steps"), takes(SCHEDULES["lr_range_test"], "decay_steps")
        (True, False)
    """
    return key in inspect.signature(schedule.rate).parameters


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def _no_momentum(step: int) -> None:
    """The optimizer's momentum stays as it is."""


def _taken(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return {key: value for key, value in given.items() if takes_all or key in parameters}


def _warm_up(step: int, peak: float, warmup_steps: int) -> float | None:
    """Rate while it rises to its peak; None afterwards."""
    return peak * (step + 1) / warmup_steps if step < warmup_steps else None


def _progress(step: int, warmup_steps: int, decay_steps: int) -> float:
    """Fraction of the decay that is done."""
    return min(1.0, max(0, step - warmup_steps) / max(1, decay_steps - warmup_steps))


def _between(peak: float, min_lr_ratio: float, remaining: float) -> float:
    return peak * (min_lr_ratio + (1.0 - min_lr_ratio) * remaining)


def _cycle_position(step: int, *, first: int, total: int, stairs: tuple[int, int | None]) -> float:
    """Height in a cycle between 0 and 1; the step after its last begins another, as in DeepSpeed."""
    step %= total
    rises = step <= first
    position = step / first if rises else (total - step) / (total - first)
    count = stairs[0] if rises or stairs[1] is None else stairs[1]
    if not count:
        return position
    return math.floor(step * count / first if rises else (total - step) * count / (total - first)) / count


def _deepspeed_warm_up(last: int, num_steps: int, kind: WarmUp) -> float | None:
    """Height of DeepSpeed's warm-up between 0 and 1, `last` steps after the first; None once it is over."""
    num_steps = max(2, num_steps)
    if last >= num_steps:
        return None
    if last < 0:
        return 0.0
    return math.log(last + 1) / math.log(num_steps) if kind == "log" else last / num_steps
