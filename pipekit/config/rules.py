"""Rules between keys. Each is a small function over the sections that it reads; `RULES` lists them all.

A rule runs as soon as its own sections are sound, so that one message can show every mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pipekit.config.data_rules import DATA_RULES
from pipekit.config.deepspeed_json import check_passed_on
from pipekit.config.growth_rules import GROWTH_RULES, warmup_fault
from pipekit.config.length_rules import LENGTH_RULES
from pipekit.config.optimizer_rules import OPTIMIZER_RULES
from pipekit.config.profile_config import PROFILE_RULES
from pipekit.errors import ConfigError
from pipekit.optimizers.table import OPTIMIZERS, optimizer_name
from pipekit.schedules.catalog import check_micro_batches, check_stages_per_rank, is_file, schedule_placement
from pipekit.settings.activations import KEY
from pipekit.settings.base import Fault, alternatives, rule_fault, show

if TYPE_CHECKING:
    from pipekit.config.callbacks_config import LayersCallbacksConfig
    from pipekit.config.lora_config import LoraConfig
    from pipekit.config.optimizer_config import OptimizerConfig
    from pipekit.config.schema import ParallelConfig, TrainConfig
    from pipekit.models.family import ModelFamily


MOST_PROCESSES = 100_000
_MOST_ACTIONS = 1_000_000


def check_rules(sections: Mapping[str, Any]) -> list[Fault]:
    """Return the faults of every rule whose sections are all present."""
    return [
        fault
        for names, rule in RULES
        if all(name in sections for name in names)
        for fault in rule(*(sections[name] for name in names))
    ]


def sequence_fits_positions(model: ModelFamily, train: TrainConfig) -> Iterator[Fault]:
    """A built-in model has a position for every token of a sequence."""
    max_positions = model.longest_sequence
    if max_positions is not None and train.sequence_length > max_positions:
        yield rule_fault(
            "train.sequence_length model.max_positions",
            f"train.sequence_length={train.sequence_length} is longer than model.max_positions={max_positions}; "
            f"try train.sequence_length={max_positions}, or model.max_positions={train.sequence_length}",
        )


def tensor_parallel_fits(model: ModelFamily, parallel: ParallelConfig, train: TrainConfig) -> Iterator[Fault]:
    """Tensor parallelism shards whole heads, and the sequence into equal shards."""
    tp, heads = parallel.tp, model.attention_heads
    if heads is not None and (fault := heads.fault(tp)):
        yield fault
    if parallel.sequence_parallel and train.sequence_length % tp:
        length = train.sequence_length
        yield rule_fault(
            "parallel.tp train.sequence_length",
            f"parallel.tp={tp} does not divide train.sequence_length={length}, and sequence parallelism cuts every "
            f"sequence into equal parts; try train.sequence_length={alternatives(near_multiples(length, tp))}, or "
            "parallel.sequence_parallel=false",
        )


def near_multiples(number: int, unit: int) -> list[int]:
    """Return the multiples of `unit` next to `number`, below and above it, that are not 0.

    Example:
        >>> near_multiples(5, 4), near_multiples(3, 4)
        ([4, 8], [4])
    """
    below = number // unit * unit
    return [below, below + unit] if below else [unit]


def zero_3_fits_the_head(model: ModelFamily, parallel: ParallelConfig, train: TrainConfig) -> Iterator[Fault]:
    """ZeRO-3 frees the weights of a layer when it has run, and a loss that computes scores itself needs them then."""
    if parallel.zero < 3 or not model.loss_computes_logits:
        return
    why = "whose loss needs the head's weights after ZeRO-3 has freed them"
    if parallel.tp > 1:
        yield rule_fault(
            "parallel.zero parallel.tp",
            f"parallel.zero=3 does not go with parallel.tp={parallel.tp} for a built-in model, {why}; "
            "try parallel.zero=2",
        )
    if isinstance(train.loss_chunk_tokens, int):
        yield rule_fault(
            "train.loss_chunk_tokens parallel.zero",
            f"train.loss_chunk_tokens={train.loss_chunk_tokens} does not go with parallel.zero=3, {why}; try "
            "train.loss_chunk_tokens=null, or parallel.zero=2",
        )


def compile_fits(model: ModelFamily, train: TrainConfig, parallel: ParallelConfig) -> Iterator[Fault]:
    """Compiled layers need their weights whole, which ZeRO-3 gathers in hooks, and no loops over blocks of tokens."""
    sparse = getattr(model, "sparse_attention", None)
    if train.compile and sparse is not None and sparse.mode != "sliding_window":
        yield rule_fault(
            "train.compile model.sparse_attention",
            f"train.compile=true does not go with model.sparse_attention.mode={sparse.mode}, whose loops over blocks "
            "would be compiled block by block; try train.compile=false, or mode: sliding_window",
        )
    if train.compile and parallel.zero == 3:
        yield rule_fault(
            "train.compile parallel.zero",
            "train.compile=true does not go with parallel.zero=3, which gathers the weights of a layer in hooks that "
            "cannot be compiled; try parallel.zero=2, or train.compile=false",
        )


def zero_fits(parallel: ParallelConfig) -> Iterator[Fault]:
    """ZeRO 2 and 3 take each micro-batch forward and back at once, without a pipeline."""
    zero = parallel.zero
    if zero < 2:
        return
    if parallel.pp > 1:
        yield rule_fault(
            "parallel.zero parallel.pp",
            f"parallel.zero={zero} does not go with parallel.pp={parallel.pp}: it shards gradients after every "
            "micro-batch, and a pipeline adds them up over all of them; try parallel.zero=1, or parallel.pp=1 with "
            f"parallel.zero={zero}",
        )
        return
    if parallel.schedule != "1f1b":
        yield rule_fault(
            "parallel.zero parallel.schedule",
            f"parallel.schedule={parallel.schedule} does not go with parallel.zero={zero}, which takes each "
            "micro-batch forward and back at once; try parallel.schedule=1f1b, or parallel.zero=1",
        )
    elif parallel.stages_per_rank is not None and parallel.stages_per_rank > 1:
        yield rule_fault(
            "parallel.zero parallel.stages_per_rank",
            f"parallel.stages_per_rank={parallel.stages_per_rank} does not go with parallel.zero={zero}, which runs "
            "the model as one stage; remove it, or set parallel.zero=1",
        )


def offload_fits(parallel: ParallelConfig) -> Iterator[Fault]:
    """Only tensors that ZeRO shards can be kept in host memory or in files."""
    offload, zero = parallel.offload, parallel.zero
    if offload == "nvme" and parallel.nvme_dir is None:
        yield rule_fault(
            "parallel.offload parallel.nvme_dir",
            "parallel.offload=nvme needs a folder for its files; set parallel.nvme_dir to one on a local disk",
        )
    elif offload != "nvme" and parallel.nvme_dir is not None:
        yield rule_fault(
            "parallel.nvme_dir parallel.offload",
            f"parallel.nvme_dir has no effect with parallel.offload={offload}; remove it, or set parallel.offload=nvme",
        )
    if offload == "none":
        return
    shown = f"parallel.offload={offload}"
    if parallel.auto:
        yield rule_fault(
            "parallel.offload parallel.auto",
            f"{shown} does not go with parallel.auto=true, whose choice keeps everything on the devices; "
            "remove one of them",
        )
    elif zero == 0:
        nearest = "parallel.zero=1" if offload != "parameters" else "parallel.offload=optimizer with parallel.zero=1"
        yield rule_fault(
            "parallel.offload parallel.zero",
            f"{shown} does not go with parallel.zero=0: what ZeRO manages can be moved to host memory or files, and 0 "
            f"manages nothing; try {nearest}",
        )
    elif offload == "parameters" and zero < 3:
        remedy = "parallel.offload=optimizer" + (", or parallel.zero=3" if parallel.pp == 1 else "")
        yield rule_fault(
            "parallel.offload parallel.zero",
            f"{shown} does not go with parallel.zero={zero}, which keeps every weight on its device; try {remedy}",
        )


def activation_partitioning_fits(train: TrainConfig, parallel: ParallelConfig) -> Iterator[Fault]:
    """Ranks that hold the same input can share it out, and those that hold a shard of it have done so."""
    setting = train.activation_checkpointing
    if setting is None or not setting.partition:
        return
    key, shown = f"{KEY}.partition", f"{KEY}.partition=true"
    if parallel.tp == 1:
        yield rule_fault(
            f"{key} parallel.tp",
            f"{shown} shares inputs out over tensor-parallel ranks, and parallel.tp=1; try parallel.tp=2, or remove it",
        )
    elif parallel.sequence_parallel:
        yield rule_fault(
            f"{key} parallel.sequence_parallel",
            f"{shown} has nothing to do under parallel.sequence_parallel=true, where each tensor-parallel rank has its "
            "shard of the inputs already; remove it, or set parallel.sequence_parallel=false",
        )


def nvme_fits_optimizer(optimizer: OptimizerConfig, parallel: ParallelConfig) -> Iterator[Fault]:
    """Files are updated chunk by chunk, for which an optimizer must treat every weight by itself."""
    kind = OPTIMIZERS.get(optimizer_name(optimizer.type) or "")
    if parallel.offload == "nvme" and kind is not None and kind.sums_over_tensors:
        yield rule_fault(
            "parallel.offload optimizer.type",
            f"parallel.offload=nvme does not go with optimizer.type={optimizer.type}, which updates whole tensors; try "
            "parallel.offload=optimizer, or optimizer.type=adamw",
        )


def deepspeed_fits_zero(deepspeed: Mapping[str, Any], parallel: ParallelConfig) -> Iterator[Fault]:
    """DeepSpeed's keys for offload and ZeRO-3 need the settings that they refine."""
    section = deepspeed.get("zero_optimization")
    if not isinstance(section, dict):
        return
    needs = {"offload_optimizer": ("optimizer", "parameters", "nvme"), "offload_param": ("parameters", "nvme")}
    for key, settings in needs.items():
        # A device is refused by itself.
        if key in section and parallel.offload not in settings and "device" not in (section[key] or {}):
            yield _idle_key(key, f"parallel.offload={parallel.offload}", f"parallel.offload={settings[0]}")
    for key in section:
        if key.startswith("stage3_") and parallel.zero < 3:
            yield _idle_key(key, f"parallel.zero={parallel.zero}", "parallel.zero=3")


def _idle_key(key: str, setting: str, needed: str) -> Fault:
    shown, (other, _) = f"deepspeed.zero_optimization.{key}", setting.split("=")
    return rule_fault(f"{shown} {other}", f"{shown}: has no effect with {setting}; remove it, or set {needed}")


def stages_have_layers(model: ModelFamily, parallel: ParallelConfig) -> Iterator[Fault]:
    """Every stage needs a layer of its own."""
    num_layers, num_stages = model.num_layer_specs, _num_stages(parallel)
    if num_layers is not None and num_stages is not None and num_stages > num_layers:
        per_rank = num_stages // parallel.pp
        product = f" x {per_rank} on each rank, {num_stages}" if per_rank > 1 else ""
        yield rule_fault(
            "parallel.pp model.num_layers",
            f"parallel.pp={parallel.pp}{product} stages are more than the model's {num_layers} layers "
            f"({model.layer_count}); try parallel.pp={num_layers // per_rank} or less",
        )


def processes_are_possible(parallel: ParallelConfig) -> Iterator[Fault]:
    """No run has had more processes."""
    number = parallel.pp * parallel.tp * (1 if parallel.dp == "auto" else parallel.dp)
    if number > MOST_PROCESSES:
        yield rule_fault(
            "parallel.dp parallel.pp parallel.tp",
            f"parallel.pp={parallel.pp} x parallel.tp={parallel.tp} x parallel.dp={parallel.dp} are {number:,} "
            f"processes, and no run has had more than {MOST_PROCESSES:,}; lower one of them",
        )


def table_can_be_planned(train: TrainConfig, parallel: ParallelConfig) -> Iterator[Fault]:
    """The table of a schedule has an action for each stage and micro-batch."""
    dp = 1 if parallel.dp == "auto" else parallel.dp
    stages = _num_stages(parallel) or parallel.pp
    num_micro_batches = train.global_batch_size // (train.micro_batch_size * dp)
    if stages * num_micro_batches > _MOST_ACTIONS:
        yield rule_fault(
            "train.global_batch_size train.micro_batch_size parallel.dp",
            f"train.global_batch_size={train.global_batch_size} with train.micro_batch_size={train.micro_batch_size} "
            f"makes {num_micro_batches:,} micro-batches of a step, each of which passes {stages} stages, and more than "
            f"{_MOST_ACTIONS:,} such actions are not planned; raise train.micro_batch_size, or lower "
            "train.global_batch_size",
        )


def schedule_fits(parallel: ParallelConfig, train: TrainConfig) -> Iterator[Fault]:
    """A schedule can run the stages on each rank, and the micro-batches of a step."""
    try:
        check_stages_per_rank(parallel.schedule, parallel.stages_per_rank)
    except ConfigError as error:
        yield rule_fault("parallel.stages_per_rank parallel.schedule", str(error))
        return
    if parallel.max_in_flight is not None and parallel.schedule != "auto":
        yield rule_fault(
            "parallel.max_in_flight parallel.schedule",
            f"parallel.max_in_flight={parallel.max_in_flight} is only for parallel.schedule=auto, and it is "
            f"{parallel.schedule}, whose memory follows from its table; remove it, or set parallel.schedule=auto",
        )
    own_table = is_file(parallel.schedule)
    if parallel.stages_per_rank is not None and own_table:
        yield rule_fault(
            "parallel.stages_per_rank parallel.schedule",
            f"parallel.stages_per_rank={parallel.stages_per_rank}: the table of parallel.schedule={parallel.schedule} "
            "says which stages each rank has; remove it",
        )
        return
    dp = 1 if parallel.dp == "auto" else parallel.dp
    if batch_fault(train, dp) or (parallel.dp == "auto" and not own_table):
        return
    try:
        if own_table:
            schedule_placement(parallel.schedule, pp=parallel.pp)
        else:
            num_micro_batches = train.global_batch_size // (train.micro_batch_size * dp)
            check_micro_batches(parallel.schedule, pp=parallel.pp, num_micro_batches=num_micro_batches)
    except ConfigError as error:
        yield rule_fault("parallel.schedule parallel.pp train.global_batch_size", str(error))


def _num_stages(parallel: ParallelConfig) -> int | None:
    try:
        return parallel.num_stages
    except ConfigError:  # Another rule says what is wrong with the file.
        return None


def auto_chooses_alone(parallel: ParallelConfig) -> Iterator[Fault]:
    """Settings that `parallel: auto` chooses are not given beside it."""
    chosen = "pp tp dp order zero partition boundaries schedule stages_per_rank max_in_flight"
    for key in chosen.split() if parallel.auto else ():
        value = getattr(parallel, key)
        if value != type(parallel).model_fields[key].default:
            rule = "does not go with parallel.auto=true, which chooses it; remove one of them"
            yield rule_fault(f"parallel.{key} parallel.auto", f"parallel.{key}={show(value)} {rule}")


def boundaries_cover_the_model(model: ModelFamily, parallel: ParallelConfig) -> Iterator[Fault]:
    """Manual boundaries are given exactly when they are used, and give every stage a layer."""
    num_layers, num_stages = model.num_layer_specs, _num_stages(parallel)
    boundaries = parallel.boundaries
    if num_stages is None:
        return
    remedy = ""
    if num_layers is not None and num_stages <= num_layers:
        even = [stage * num_layers // num_stages for stage in range(num_stages + 1)]
        remedy = f"; for example parallel.boundaries={even}"
    if boundaries is None:
        if parallel.partition == "manual":
            rule = "parallel.partition=manual needs parallel.boundaries, where the stages begin and end"
            remedy = remedy or "; for example parallel.boundaries=[0, 6, 12] for parallel.pp=2 and 12 layers"
            yield rule_fault("parallel.partition", rule + remedy)
        return
    shown = boundaries if isinstance(boundaries, str) else list(boundaries)
    if parallel.partition != "manual":
        yield rule_fault(
            "parallel.boundaries",
            f"parallel.boundaries={shown} is only for parallel.partition=manual, and it is {parallel.partition}; "
            "remove it, or set parallel.partition=manual",
        )
        return
    broken = None
    stages = f"parallel.pp={parallel.pp}"
    if num_stages != parallel.pp:
        stages = f"the {num_stages} stages of parallel.schedule={parallel.schedule} on {stages} ranks"
    if isinstance(shown, str):
        from pipekit.partitioners.stage_spec import read_stage_spec  # loads numpy, and is seldom asked

        num_given = len(read_stage_spec(shown))
        if num_given != num_stages:
            broken = f"must have {num_stages} stages, one for each of {stages}, and has {num_given}"
    elif len(shown) != num_stages + 1:
        broken = f"must have {num_stages + 1} entries, one more than {stages}, and has {len(shown)}"
    elif shown[0] != 0:
        broken = f"must start with 0, and starts with {shown[0]}"
    elif any(end <= start for start, end in pairwise(shown)):
        broken = "must grow from entry to entry, since every stage needs a layer"
    elif num_layers is not None and shown[-1] != num_layers:
        broken = f"must end with {num_layers}, the number of layers, and ends with {shown[-1]}"
    if broken:
        yield rule_fault("parallel.boundaries", f"parallel.boundaries={shown} {broken}{remedy}")


def batch_divides(train: TrainConfig, parallel: ParallelConfig) -> Iterator[Fault]:
    """A global batch is a whole number of micro-batches on every data-parallel rank."""
    if fault := batch_fault(train, 1 if parallel.dp == "auto" else parallel.dp):
        yield fault


def batch_fault(train: TrainConfig, dp: int) -> Fault | None:
    """Return the fault in the batch sizes for `dp` data-parallel ranks; None if there is none."""
    unit = train.micro_batch_size * dp
    if train.global_batch_size % unit == 0:
        return warmup_fault(train, dp)
    sizes = near_multiples(train.global_batch_size, unit)
    product = f" x dp={dp}, which is {unit}" if dp > 1 else ""
    remedy = f"try train.global_batch_size={alternatives(sizes)}"
    if train.global_batch_size % dp == 0:
        per_rank = train.global_batch_size // dp
        micro = max(size for size in range(1, min(per_rank, train.micro_batch_size) + 1) if per_rank % size == 0)
        remedy += f", or train.micro_batch_size={micro}"
    return rule_fault(
        "train.global_batch_size train.micro_batch_size parallel.dp",
        f"train.global_batch_size={train.global_batch_size} is not a multiple of "
        f"train.micro_batch_size={train.micro_batch_size}{product}; {remedy}",
    )


def lora_has_a_rank(lora: LoraConfig) -> Iterator[Fault]:
    """Settings of adapters mean nothing where there are none."""
    given = [(key, value) for key, value in lora if value != type(lora).model_fields[key].default]
    if lora.rank is None and given:
        (key, value), *_ = given
        shown = f"lora.{key}={show(value)}: has no effect with lora.rank=null"
        yield rule_fault(f"lora.{key} lora.rank", f"{shown}; remove it, or set lora.rank=16")


def lora_has_one_base(lora: LoraConfig, model: ModelFamily) -> Iterator[Fault]:
    """The weights that adapters are added to come from one place."""
    source = getattr(model, "init_from", None)
    if lora.base is not None and source is not None:
        yield rule_fault(
            "lora.base model.init_from",
            f"lora.base={lora.base} and model.init_from={source} both give the weights that stay as they are; "
            "leave one of them out",
        )


def tasks_have_evaluations(train: TrainConfig, callbacks: LayersCallbacksConfig) -> Iterator[Fault]:
    """Tasks of lm-eval are run at evaluations."""
    tasks = callbacks.lm_eval
    if tasks is None:
        return
    if train.eval_interval is None:
        yield rule_fault(
            "callbacks.lm_eval train.eval_interval",
            "callbacks.lm_eval runs tasks at evaluations, and train.eval_interval=null makes none; try "
            f"train.eval_interval={tasks.every or 100}",
        )
    elif tasks.every is not None and tasks.every % train.eval_interval:
        above = -(-tasks.every // train.eval_interval) * train.eval_interval
        yield rule_fault(
            "callbacks.lm_eval.every train.eval_interval",
            f"callbacks.lm_eval.every={tasks.every} is no multiple of train.eval_interval={train.eval_interval}, and "
            f"tasks are run at evaluations; try callbacks.lm_eval.every={above}",
        )


def early_stopping_has_evaluations(train: TrainConfig, callbacks: LayersCallbacksConfig) -> Iterator[Fault]:
    """Early stopping looks at held-out metrics."""
    if callbacks.early_stopping is not None and train.eval_interval is None:
        yield rule_fault(
            "callbacks.early_stopping train.eval_interval",
            "callbacks.early_stopping needs evaluations, and train.eval_interval=null makes none; try "
            "train.eval_interval=100",
        )


RULES: tuple[tuple[tuple[str, ...], Callable[..., Iterator[Fault]]], ...] = (
    (("model", "train"), sequence_fits_positions),
    (("model", "parallel", "train"), tensor_parallel_fits),
    (("model", "parallel", "train"), zero_3_fits_the_head),
    (("model", "train", "parallel"), compile_fits),
    (("parallel",), zero_fits),
    (("parallel",), offload_fits),
    (("train", "parallel"), activation_partitioning_fits),
    (("optimizer", "parallel"), nvme_fits_optimizer),
    (("deepspeed", "parallel"), deepspeed_fits_zero),
    (("parallel",), auto_chooses_alone),
    (("model", "parallel"), stages_have_layers),
    (("model", "parallel"), boundaries_cover_the_model),
    (("parallel", "train"), schedule_fits),
    (("train", "parallel"), batch_divides),
    (("train", "callbacks"), early_stopping_has_evaluations),
    (("lora",), lora_has_a_rank),
    (("lora", "model"), lora_has_one_base),
    (("train", "callbacks"), tasks_have_evaluations),
    *OPTIMIZER_RULES,
    *GROWTH_RULES,
    *LENGTH_RULES,
    *DATA_RULES,
    *PROFILE_RULES,
    (("deepspeed",), check_passed_on),
    (("parallel",), processes_are_possible),
    (("train", "parallel"), table_can_be_planned),
)
"""Every rule, with the sections that it reads."""
