"""The `deepspeed` section of a run: what DeepSpeed's own keys say goes to pipekit's, and the rest on to DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pipekit.config.deepspeed_growth import growth_faults, growth_settings
from pipekit.config.deepspeed_json import AUTO, check_deepspeed, read_deepspeed_json, without_auto
from pipekit.config.deepspeed_keys import TREATMENTS
from pipekit.config.schema import Config
from pipekit.optimizers.learning_rates import scheduler_section
from pipekit.optimizers.table import optimizer_section
from pipekit.settings.base import Fault, show

if TYPE_CHECKING:
    from pipekit.config.load import Draft

_Setting = tuple[str, Any, str]
"""A key of pipekit's, the value that it gets, and the key of DeepSpeed's that says so; its own value may be another."""


def take_over_deepspeed(draft: Draft) -> None:
    """Give pipekit's keys the values that the `deepspeed` section has for them, and leave what goes on to DeepSpeed.

    The section is a mapping, or the path of a JSON file. A value of `auto` stands for pipekit's own. Where both give a
    value, they must be equal. Every mistake becomes a fault of the draft.
    """
    given = draft.values.get("deepspeed")
    owner = "deepspeed."
    if isinstance(given, str):
        owner = ""
        draft.label_as("deepspeed", given)
        given = read_deepspeed_json(given)
    if not isinstance(given, Mapping):
        return
    draft.values["deepspeed"] = {}
    section, faults = one_bf16(given, owner)
    faults += check_deepspeed(section, "run", owner=owner)
    if faults:
        for fault in faults:
            draft.add(fault)
        return
    section = {key: {} if value is None else value for key, value in without_auto(section).items()}

    section = _with_rates(draft, section, given)

    def shown(key: str) -> str:
        return f"{owner}{key}={show(_value(section, key))}"

    for ours, value, key in [*_settings(section), *_optimizer(draft, section)]:
        _give(draft, ours, value, key, shown(key))
    for fault in [*_faults_of_sections(section, owner), *growth_faults(section, owner)]:
        draft.add(fault)
    _divide_batch(draft, section.get("gradient_accumulation_steps"), owner, shown("gradient_accumulation_steps"))
    draft.values["deepspeed"] = _without_ours(section)


def fill_auto(config: Mapping[str, Any], *, precision: Literal["fp32", "bf16"]) -> dict[str, Any]:
    """Return a configuration of DeepSpeed's with pipekit's defaults in the place of `auto`, for `initialize`.

    Batch sizes follow from each other. Where pipekit has no default, the key is left out, which gives DeepSpeed's.

    Args:
        config: the configuration.
        precision: of a model for which none is given.

    Example:
        >>> fill_auto({"gradient_clipping": "auto", "bf16": {"enabled": "auto"}}, precision="bf16")
        {'bf16': {'enabled': True}, 'gradient_clipping': 1.0}
    """
    filled = without_auto(config)
    is_fp16 = _value(config, "fp16.enabled") is True
    defaults: dict[str, Any] = {"bf16.enabled": precision == "bf16" and not is_fp16}
    for key, ours in _SAME.items():
        defaults[key] = _default(ours)
    for key in _OPTIMIZER_PARAMS:
        defaults[f"optimizer.params.{key}"] = _default(f"optimizer.{key}")
    defaults["scheduler.params.warmup_max_lr"] = _value(filled, "optimizer.params.lr") or _default("optimizer.lr")
    defaults["scheduler.params.warmup_num_steps"] = _default("scheduler.warmup_steps")
    if any(isinstance(filled.get(key), int) for key in ("train_batch_size", "train_micro_batch_size_per_gpu")):
        defaults.pop("train_batch_size"), defaults.pop("train_micro_batch_size_per_gpu")
    elif "gradient_accumulation_steps" in filled:
        defaults.pop("train_batch_size")
    for path, value in defaults.items():
        *sections, key = path.split(".")
        if _value(config, path) == AUTO and value is not None:
            below: Any = filled
            for section in sections:
                below = below[section]
            below[key] = list(value) if isinstance(value, tuple) else value
    return filled


def _default(ours: str) -> Any:
    """Return the default of one of pipekit's keys; None where it has none."""
    section, *below = ours.split(".")
    annotation: Any = Config.model_fields[section].annotation
    return annotation.model_fields[below[0]].default if len(below) == 1 else None


def one_bf16(given: Mapping[str, Any], owner: str) -> tuple[dict[str, Any], list[Fault]]:
    """Return the configuration with `bfloat16`, the old name, as `bf16`."""
    section = dict(given)
    if "bfloat16" not in section:
        return section, []
    if "bf16" in section:
        message = f"{owner}bfloat16: is the old name of {owner}bf16, which is there too; remove it"
        return section, [Fault(("deepspeed", "bfloat16"), message)]
    section["bf16"] = section.pop("bfloat16")
    return section, []


def _give(draft: Draft, ours: str, value: Any, key: str, given: str) -> None:
    """Give one of pipekit's keys a value, unless it has one: then they must be equal; `given` is DeepSpeed's key."""
    path, theirs = tuple(ours.split(".")), ("deepspeed", *key.split("."))
    own = draft.get(path)
    if own is None and draft.get(path[:-1]) is False:
        own = False
    if own is None or own == AUTO:
        draft.set(path, value, draft.place_of(theirs))
    elif own != value and not (value is True and isinstance(own, Mapping)):
        label = draft.place_of(path).label
        where = f" ({label})" if label else ""
        draft.add(
            Fault(
                theirs,
                f"{given} asks for {ours}={show(value)}, and {ours}={show(own)} is given{where}; remove one of them, "
                "or make them agree",
            )
        )


_SAME = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_clipping": "train.gradient_clipping",
    "steps_per_print": "logging.interval",
    "pipeline.stages": "parallel.pp",
    "pipeline.partition": "parallel.partition",
    "zero_optimization.stage": "parallel.zero",
    "tensorboard.enabled": "logging.tensorboard",
    "wandb.project": "logging.wandb.project",
    "wandb.team": "logging.wandb.entity",
}
"""Keys whose value is that of one of pipekit's."""


CHECKPOINTING_KEYS = {"partition_activations": "partition", "cpu_checkpointing": "offload"}
"""Keys of DeepSpeed's `activation_checkpointing`, and those of pipekit's."""


def _settings(section: Mapping[str, Any]) -> Iterator[_Setting]:
    """Yield pipekit's settings that DeepSpeed's keys stand for."""
    wandb_is_on = bool(_value(section, "wandb.enabled"))
    if wandb_is_on and not {"project", "team"} & set(section["wandb"]):
        yield "logging.wandb", True, "wandb.enabled"
    for key, ours in _SAME.items():
        value = _value(section, key)
        is_idle = (key.startswith("wandb.") and not wandb_is_on) or (key, value) == ("pipeline.partition", "best")
        if value is not None and not is_idle:
            yield ours, value, key
    if _value(section, "tensor_parallel.autotp_size"):
        yield "parallel.tp", _value(section, "tensor_parallel.autotp_size"), "tensor_parallel.autotp_size"
    if (interval := _value(section, "pipeline.activation_checkpoint_interval")) is not None:
        yield "train.activation_checkpointing", interval > 0, "pipeline.activation_checkpoint_interval"
    for theirs, setting in CHECKPOINTING_KEYS.items():
        # False says what holds anyway.
        if _value(section, f"activation_checkpointing.{theirs}"):
            yield f"train.activation_checkpointing.{setting}", True, f"activation_checkpointing.{theirs}"
    if _value(section, "checkpoint.use_node_local_storage"):
        yield "checkpoint.storage", "local", "checkpoint.use_node_local_storage"
    yield from _precision(section)
    yield from _offload(section)
    yield from growth_settings(section)
    yield from _nvme_path(section)


def _precision(section: Mapping[str, Any]) -> Iterator[_Setting]:
    switches = {name: _value(section, f"{name}.enabled") for name in ("bf16", "fp16")}
    on = [name for name, is_on in switches.items() if is_on]
    for name in on:
        yield "train.precision", name, f"{name}.enabled"
    if not on and switches["bf16"] is False:
        # Without either, DeepSpeed computes in fp32.
        yield "train.precision", "fp32", "bf16.enabled"


def _offload(section: Mapping[str, Any]) -> Iterator[_Setting]:
    zero = "zero_optimization."
    found: dict[str, str] = {}
    for setting, old, key in (
        ("parameters", "cpu_offload_param", "offload_param.device"),
        ("optimizer", "cpu_offload", "offload_optimizer.device"),
    ):
        if _value(section, f"{zero}{key}") is not None:
            found[setting] = f"{zero}{key}"
        elif _value(section, f"{zero}{old}"):
            found[setting] = f"{zero}{old}"
    on = [setting for setting, key in found.items() if _value(section, key) not in ("none", False)]
    in_files = [key for key in found.values() if _value(section, key) == "nvme"]
    if in_files:
        yield "parallel.offload", "nvme", in_files[0]
    elif on:
        yield "parallel.offload", on[0], found[on[0]]
    elif found:
        yield "parallel.offload", "none", next(iter(found.values()))


def _nvme_path(section: Mapping[str, Any]) -> Iterator[_Setting]:
    for part in ("offload_optimizer", "offload_param"):
        key = f"zero_optimization.{part}.nvme_path"
        if (path := _value(section, key)) is not None:
            yield "parallel.nvme_dir", path, key


_OPTIMIZER_PARAMS = ("lr", "betas", "eps", "weight_decay", "momentum")


def _optimizer(draft: Draft, section: Mapping[str, Any]) -> Iterator[_Setting]:
    """Yield settings of the optimizer and of the schedule of its learning rate."""
    for owner, translate in (("optimizer", optimizer_section), ("scheduler", scheduler_section)):
        given = section.get(owner) or {}
        params = given.get("params") or {}
        if not isinstance(given.get("type"), str):
            continue
        for key, value in translate(given).items():
            if key == "type":
                yield f"{owner}.type", value, f"{owner}.type"
            elif key in params:
                yield f"{owner}.{key}", value, f"{owner}.params.{key}"
            elif key == "args" or draft.get((owner, key)) is None:
                # What DeepSpeed takes where nothing is said gives way to what our own section says.
                yield f"{owner}.{key}", value, f"{owner}.params"


_AUTO_OF_SCHEDULES = {
    "total_num_steps": "train.steps",
    "warmup_num_steps": "scheduler.warmup_steps",
    "warmup_max_lr": "optimizer.lr",
}


def _with_rates(draft: Draft, section: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section with numbers of pipekit's where the schedule's arguments were given as `auto`."""
    params = _value(given, "scheduler.params")
    if not isinstance(params, Mapping):
        return dict(section)
    filled: dict[str, Any] = {}
    for key, ours in _AUTO_OF_SCHEDULES.items():
        if params.get(key) == AUTO:
            own = draft.get(tuple(ours.split(".")))
            if own is None and ours == "optimizer.lr":
                own = _value(section, "optimizer.params.lr")
            value = _default(ours) if own is None else own
            filled |= {} if value is None else {key: value}
    scheduler = dict(section.get("scheduler") or {})
    return {**section, "scheduler": {**scheduler, "params": {**(scheduler.get("params") or {}), **filled}}}


def _faults_of_sections(section: Mapping[str, Any], owner: str) -> Iterator[Fault]:
    for name in ("optimizer", "scheduler"):
        given = section.get(name) or {}
        for key in given:
            if key not in ("type", "params"):
                message = f"{owner}{name}.{key}: unknown key; there are type and params"
                yield Fault(("deepspeed", name, key), message)
        if given and not isinstance(given.get("type"), str):
            yield Fault(("deepspeed", name), f"{owner}{name}: has no type, such as {_EXAMPLES[name]}; name it")


_EXAMPLES = {"optimizer": "AdamW", "scheduler": "WarmupLR"}


def _value(section: Any, path: str) -> Any:
    """Return the value at a dotted path; None where there is none."""
    for key in path.split("."):
        if not isinstance(section, Mapping):
            return None
        section = section.get(key)
    return section


def _divide_batch(draft: Draft, num_micro_batches: Any, owner: str, shown: str) -> None:
    """Let the batch sizes, and if need be the data-parallel degree, follow from the number of micro-batches."""
    if num_micro_batches is None:
        return
    key = "gradient_accumulation_steps"
    batch, micro, dp = (
        draft.get(("train", "global_batch_size")),
        draft.get(("train", "micro_batch_size")) or 1,
        draft.get(("parallel", "dp")),
    )
    place = ("deepspeed", key)
    if not all(isinstance(number, int) for number in (batch or 1, micro)):
        return
    if isinstance(dp, int):
        _give(draft, "train.global_batch_size", micro * int(num_micro_batches) * dp, key, shown)
    elif batch is None:
        message = (
            f"{shown}: the global batch follows from it and parallel.dp, and neither is known; give "
            f"{owner}train_batch_size, train.global_batch_size, or parallel.dp"
        )
        draft.add(Fault(place, message))
    elif batch % (micro * num_micro_batches):
        message = (
            f"{shown} micro-batches of {micro} do not divide train.global_batch_size={batch}; try "
            f"train.global_batch_size={micro * num_micro_batches}"
        )
        draft.add(Fault(place, message))
    else:
        _give(draft, "parallel.dp", batch // (micro * num_micro_batches), key, shown)


def _without_ours(section: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The rest, which goes on to DeepSpeed: keys that pipekit has no key for, and that are not off."""
    left: dict[str, Any] = {}
    for key, value in section.items():
        path = f"{above}{key}"
        if path in TREATMENTS:
            if not TREATMENTS[path].ours and not TREATMENTS[path].callers:
                left[key] = value
        elif not (isinstance(value, Mapping) and value.get("device") == "none") and (
            below := _without_ours(value, f"{path}.")
        ):
            left[key] = below
    return left
