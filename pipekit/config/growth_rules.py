"""Rules of `train.curriculum`, `train.batch_warmup` and `train.layer_drop`, and between them and other sections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from pipekit.config.growth import batch_sizes
from pipekit.errors import ConfigError
from pipekit.schedules.catalog import check_micro_batches, is_file
from pipekit.settings.base import Fault, alternatives, rule_fault, show

if TYPE_CHECKING:
    from pipekit.config.schema import ParallelConfig, TrainConfig

_CURRICULUM = "train.curriculum"
_WARMUP = "train.batch_warmup"
_GROWING = ("min_difficulty", "total_curriculum_step")
_KEYS = {
    "linear": (*_GROWING, "max_difficulty", "difficulty_step"),
    "root": (*_GROWING, "root_degree", "max_difficulty", "difficulty_step"),
    "discrete": ("difficulty", "max_step"),
}
_NEEDED = {"linear": _GROWING, "root": (*_GROWING, "root_degree"), "discrete": ("difficulty", "max_step")}


def curriculum_has_its_keys(train: TrainConfig) -> Iterator[Fault]:
    """A curriculum has the keys of its type, and its lengths grow up to that of a sequence at most."""
    curriculum, longest = train.curriculum, train.sequence_length
    if curriculum is None:
        return
    values = {key: value for key, value in curriculum if key != "type" and value is not None}
    missing = [key for key in _NEEDED[curriculum.type] if key not in values]
    for key in missing:
        example = show((type(curriculum).model_fields[key].examples or [None])[0])
        yield rule_fault(
            _CURRICULUM, f"{_CURRICULUM}.{key}: missing, and type={curriculum.type} needs it; for example {example}"
        )
    for key in values:
        if key not in _KEYS[curriculum.type]:
            yield rule_fault(
                f"{_CURRICULUM}.{key}",
                f"{_CURRICULUM}.{key}={show(values[key])} has no effect with type={curriculum.type}; remove it",
            )
    if missing:
        return
    if curriculum.type == "discrete":
        yield from _list_grows(train)
        return
    last, key = curriculum.max_difficulty or longest, f"{_CURRICULUM}.max_difficulty"
    if last > longest:
        yield rule_fault(
            f"{key} train.sequence_length",
            f"{key}={last} is more than train.sequence_length={longest}, to which sequences can grow; try {longest}",
        )
    elif values["min_difficulty"] > last:
        yield rule_fault(
            f"{_CURRICULUM}.min_difficulty",
            f"{_CURRICULUM}.min_difficulty={values['min_difficulty']} is more than the {last} tokens at the end; try "
            f"{max(1, last // 8)}",
        )


def _list_grows(train: TrainConfig) -> Iterator[Fault]:
    curriculum = train.curriculum
    assert curriculum is not None
    lengths, steps = curriculum.difficulty or (), curriculum.max_step or ()
    for name, numbers in {"difficulty": lengths, "max_step": steps}.items():
        if any(after <= before for before, after in pairwise(numbers)):
            yield rule_fault(
                f"{_CURRICULUM}.{name}", f"{_CURRICULUM}.{name}={show(list(numbers))} must grow from entry to entry"
            )
    if len(lengths) != len(steps) + 1:
        yield rule_fault(
            f"{_CURRICULUM}.max_step",
            f"{_CURRICULUM}.max_step has {len(steps)} entries for {len(lengths)} lengths, and needs one less than "
            "these: the last length has no end",
        )
    if lengths[-1] > train.sequence_length:
        yield rule_fault(
            f"{_CURRICULUM}.difficulty train.sequence_length",
            f"{_CURRICULUM}.difficulty ends with {lengths[-1]}, more than train.sequence_length="
            f"{train.sequence_length}, to which sequences can grow; try {train.sequence_length}",
        )


def curriculum_fits_tensor_parallelism(train: TrainConfig, parallel: ParallelConfig) -> Iterator[Fault]:
    """Sequence parallelism cuts sequences of every length into equal shards."""
    curriculum, tp = train.curriculum, parallel.tp
    if curriculum is None or tp == 1 or not parallel.sequence_parallel:
        return
    if curriculum.type == "discrete":
        lengths = {"difficulty": curriculum.difficulty or ()}
    else:
        lengths = {
            "difficulty_step": (curriculum.known_difficulty_step,),
            "max_difficulty": (curriculum.max_difficulty or tp,),
        }
    for name, values in lengths.items():
        if broken := next((value for value in values if value % tp), None):
            yield rule_fault(
                f"{_CURRICULUM}.{name} parallel.tp",
                f"parallel.tp={tp} does not divide {broken} of {_CURRICULUM}.{name}, and sequence parallelism cuts "
                f"every sequence into equal parts; try {-(-broken // tp) * tp}, or parallel.sequence_parallel=false",
            )


def warmup_ends_with_whole_batch(train: TrainConfig) -> Iterator[Fault]:
    """The batch grows to its size in whole increments."""
    warmup, size = train.batch_warmup, train.global_batch_size
    if warmup is None:
        return
    if warmup.start >= size:
        yield rule_fault(
            f"{_WARMUP}.start train.global_batch_size",
            f"{_WARMUP}.start={warmup.start} must be less than train.global_batch_size={size}, to which it grows; try "
            f"{max(1, size // 2)}, or leave {_WARMUP} out",
        )
    elif (size - warmup.start) % warmup.increment:
        missing = size - warmup.start
        divisors = [number for number in range(1, min(missing, 10_000) + 1) if missing % number == 0]
        near = max((number for number in divisors if number <= warmup.increment), default=1)
        yield rule_fault(
            f"{_WARMUP}.increment train.global_batch_size",
            f"{_WARMUP}.increment={warmup.increment} does not lead from start={warmup.start} to "
            f"train.global_batch_size={size}; try {near}",
        )


def warmup_fault(train: TrainConfig, dp: int) -> Fault | None:
    """Return the fault in the sizes of a batch that grows, for `dp` data-parallel ranks; None if there is none."""
    warmup, unit = train.batch_warmup, train.micro_batch_size * dp
    for key in ("start", "increment") if warmup is not None else ():
        value = getattr(warmup, key)
        if value % unit:
            near = [size for size in (value // unit * unit, (value // unit + 1) * unit) if size]
            product = f" x dp={dp}, which is {unit}" if dp > 1 else ""
            return rule_fault(
                f"{_WARMUP}.{key} train.micro_batch_size parallel.dp",
                f"{_WARMUP}.{key}={value} is not a multiple of train.micro_batch_size={train.micro_batch_size}"
                f"{product}; try {alternatives(near)}",
            )
    return None


def schedule_fits_warmup(train: TrainConfig, parallel: ParallelConfig) -> Iterator[Fault]:
    """A schedule can run the micro-batches of each size of the batch."""
    if train.batch_warmup is None:
        return
    if parallel.auto:
        yield rule_fault(
            f"{_WARMUP} parallel.auto",
            f"{_WARMUP} does not go with parallel.auto=true, which chooses for one number of micro-batches; give "
            "parallel.pp, parallel.dp and train.micro_batch_size",
        )
        return
    if is_file(parallel.schedule):
        yield rule_fault(
            f"{_WARMUP} parallel.schedule",
            f"{_WARMUP} changes the number of micro-batches, and the table of parallel.schedule={parallel.schedule} "
            "has one; name a schedule",
        )
        return
    unit = train.micro_batch_size * (1 if parallel.dp == "auto" else parallel.dp)
    if parallel.dp == "auto" or warmup_fault(train, parallel.dp):
        return
    for size in batch_sizes(train)[:-1]:
        try:
            check_micro_batches(parallel.schedule, pp=parallel.pp, num_micro_batches=size // unit)
        except ConfigError as error:
            yield rule_fault(
                f"{_WARMUP} parallel.schedule", f"{_WARMUP} has steps of {size} sequences on the way: {error}"
            )
            return


def growth_is_sound(train: TrainConfig) -> bool:
    """True if the sizes of every step follow from the section."""
    return not (any(curriculum_has_its_keys(train)) or any(warmup_ends_with_whole_batch(train)))


def layer_drop_fits_zero(train: TrainConfig, parallel: ParallelConfig) -> Iterator[Fault]:
    """ZeRO-2 and 3 talk in each layer, and replicas leave other layers out."""
    if train.layer_drop is not None and parallel.zero >= 2:
        yield rule_fault(
            "train.layer_drop parallel.zero",
            f"train.layer_drop does not go with parallel.zero={parallel.zero}, under which replicas communicate in "
            "each layer, and each leaves out others; try parallel.zero=1",
        )


def growth_fits_compilation(train: TrainConfig) -> Iterator[Fault]:
    """Layers are compiled for one length and one scale."""
    why = {"curriculum": "whose lengths", "layer_drop": "whose probabilities"}
    for key in why if train.compile else ():
        if getattr(train, key) is not None:
            yield rule_fault(
                f"train.{key} train.compile",
                f"train.{key} does not go with train.compile=true: layers would be compiled again for it, {why[key]} "
                "change; try train.compile=false",
            )


GROWTH_RULES: tuple[tuple[tuple[str, ...], Callable[..., Iterator[Fault]]], ...] = (
    (("train",), curriculum_has_its_keys),
    (("train", "parallel"), curriculum_fits_tensor_parallelism),
    (("train",), warmup_ends_with_whole_batch),
    (("train", "parallel"), schedule_fits_warmup),
    (("train", "parallel"), layer_drop_fits_zero),
    (("train",), growth_fits_compilation),
)
