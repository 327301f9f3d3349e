"""The sections of a configuration, and `Config`, which holds them all."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    create_model,
    field_validator,
    model_validator,
)

from pipekit.config.callbacks_config import LayersCallbacksConfig, TrackioConfig, WandbConfig
from pipekit.config.data_config import DataConfig
from pipekit.config.growth import steps_of_tokens
from pipekit.config.growth_config import BatchWarmupConfig, CurriculumConfig, LayerDropConfig
from pipekit.config.growth_rules import growth_is_sound
from pipekit.config.length_rules import LENGTH_KEYS
from pipekit.config.lora_config import LoraConfig
from pipekit.config.optimizer_config import OptimizerConfig, SchedulerConfig
from pipekit.config.profile_config import ProfileConfig
from pipekit.config.rules import MOST_PROCESSES, check_rules
from pipekit.errors import ConfigError, LayoutError
from pipekit.layout import DEFAULT_ORDER, Order, show_order
from pipekit.models import family_of, find_families
from pipekit.models.custom import CustomModelConfig
from pipekit.models.family import LONGEST_SEQUENCE, ModelFamily
from pipekit.schedules.catalog import SCHEDULE_NAMES, default_stages_per_rank, is_file
from pipekit.settings.activations import ActivationCheckpointing
from pipekit.settings.base import FolderText, Section, at_least, at_most, check_path, config_error, switch
from pipekit.settings.duration import Duration
from pipekit.settings.yaml_source import write_yaml

Degree = Annotated[PositiveInt, at_most(MOST_PROCESSES, "no run has had more processes")]

TimeLimit = Annotated[
    PositiveFloat,
    at_least(0.1, "no process answers sooner"),
    at_most(2_592_000, "that is 30 days, and no wait for a process is worth more"),
]

Threads = Annotated[PositiveInt, at_most(1024, "no machine has more cores for one process")]

Seed = Annotated[NonNegativeInt, at_most(2**63 - 1, "random generators take 63 bits")]


class RunConfig(Section):
    """Folder, device and threads of a run."""

    dir: FolderText = Field(default="runs/run", min_length=1, examples=["runs/my-run"])
    """Folder of the run: checkpoints, logs and the resolved configuration. Relative to the working directory.
    `load_config` names it after the YAML file where it is not given: `runs/<name of the file>`."""

    timeout_s: TimeLimit = Field(default=600.0, examples=[600])
    """Longest wait for another rank, in seconds."""

    restarts: NonNegativeInt = Field(default=0, examples=[3])
    """Largest number of restarts from the newest checkpoint, by `pipekit train`, after a rank was lost or hung. Two
    failures without a newer checkpoint in between end the run at once."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; `auto` uses GPUs if there are any."""

    threads_per_process: Threads | Literal["auto"] = Field(default="auto", examples=[4])
    """CPU threads of each process; `auto` divides the cores among them."""

    max_time: Duration | None = Field(default=None, examples=["11h30m"])
    """Time limit such as `11h30m`, counted from the start of the command. The run saves and stops before it is over,
    with exit code 75; null sets no limit."""

    trial: str | None = Field(default=None, min_length=1, examples=["my_package.my_trial:MyTrial"])
    """`package.module:Class` of your own `pipekit.LayersTrial`; null trains a language model."""


class ParallelConfig(Section):
    """Layout of the ranks: `pp * dp * tp` is the number of processes."""

    auto: bool = False
    """Choose the best plan for the devices present: `parallel: auto` for short. It chooses `pp`, `dp`, `zero`,
    `schedule`, `stages_per_rank` and `partition`, `train.micro_batch_size` and `train.activation_checkpointing`."""

    pp: Degree = Field(default=1, examples=[2])
    """Pipeline-parallel degree: the number of ranks that a model is spread over."""

    tp: Degree = Field(default=1, examples=[2])
    """Tensor-parallel degree: the number of ranks that each layer is sharded over."""

    sequence_parallel: bool = True
    """For `tp` > 1: between layers that can work on shards, each tensor-parallel rank keeps only its shard of the
    sequence. This takes less memory and computes the same."""

    dp: Degree | Literal["auto"] = Field(default="auto", examples=[2])
    """Data-parallel degree; `auto` uses all processes of a launcher, or all GPUs, and is 1 on a CPU."""

    order: Annotated[Order, Field(strict=False)] = Field(default=DEFAULT_ORDER, examples=[["pipe", "data", "tensor"]])
    """The axes along which ranks are counted, outermost first. With `tensor` last, tensor-parallel peers have
    neighbouring ranks, and so share a node."""

    zero: Annotated[int, Field(ge=0, le=3)] = Field(default=1, examples=[1])
    """ZeRO stage. Data-parallel ranks shard nothing with 0, the optimizer states with 1, the gradients too with 2, the
    weights too with 3. 2 and 3 need `pp: 1` and `schedule: 1f1b`."""

    offload: Literal["none", "optimizer", "parameters", "nvme"] = Field(default="none", examples=["optimizer"])
    """Tensors to keep in host memory: `optimizer` keeps the fp32 masters and the optimizer states there, and updates
    them there (needs `zero` of 1 or more); `parameters` keeps the weights there as well (needs `zero: 3`). `nvme` keeps
    masters and states in files in `nvme_dir`, and under `zero: 3` the weights too."""

    nvme_dir: FolderText | None = Field(default=None, min_length=1, examples=["/local/nvme"])
    """For `offload: nvme`: an existing folder on a local disk of every machine. The run leaves no files in it, however
    it ends."""

    partition: str = Field(
        default="parameters",
        examples=["parameters", "uniform", "flops", "profile", "memory", "type:Attention", "manual"],
    )
    """Partition of the layers into stages: `parameters` balances their parameters, `uniform` their number, `flops`
    their counted operations, `profile` their measured seconds. `memory` balances seconds or operations within the
    memory of the devices, `type:<regex>` the number of layers whose class name matches. `manual` takes `boundaries`. Or
    name a partitioner that another package installs."""

    boundaries: Annotated[tuple[NonNegativeInt, ...], Field(strict=False)] | str | None = Field(
        default=None, examples=[[0, 6, 12], "Et*2|t*2L"]
    )
    """For `partition: manual`: a list in which stage i holds the layers from `boundaries[i]` up to, not including,
    `boundaries[i+1]`; it starts with 0, ends with the number of layers, and has one more entry than there are stages.
    Or a layout in letters: `E` is what is before the first block, `t` a block, `h` one layer of a block, `L` what is
    behind the last block, and `|` ends a stage; `*3` repeats what is before it, a letter or a group in parentheses."""

    memory_limit_gb: PositiveFloat | None = Field(default=None, examples=[80.0])
    """For `partition: memory` and `parallel: auto`: memory limit of a rank, in 10^9 bytes; null takes the memory of its
    GPU less a reserve, or on a CPU an equal share of the machine's."""

    schedule: str = Field(default="1f1b", examples=[*SCHEDULE_NAMES])
    """Pipeline schedule: `gpipe`, `1f1b`, `interleaved-1f1b`, `zb-h1`, `zb-v`, or a CSV file with a table of your own.
    `auto` times the first steps and plans the best schedule for these times."""

    stages_per_rank: Annotated[PositiveInt, at_most(1000, "more stages only add messages")] | None = Field(
        default=None, examples=[2]
    )
    """Stages on each pipeline rank; null takes the schedule's usual number: 2 under `interleaved-1f1b` and `zb-v`, 1
    under the others."""

    max_in_flight: PositiveInt | None = Field(default=None, examples=[8])
    """For `schedule: auto`: the number of micro-batches whose activations a rank may hold, each stage counted
    separately; null takes the number of stages, as 1F1B's first rank holds."""

    @field_validator("order")
    @classmethod
    def _each_axis_once(cls, order: Order) -> Order:
        if len(set(order)) < len(order):
            raise ValueError(f"must name each axis once, the outermost first; for example {show_order(DEFAULT_ORDER)}")
        return order

    @field_validator("schedule")
    @classmethod
    def _known_schedule(cls, schedule: str) -> str:
        if is_file(schedule):
            return check_path(schedule)
        if schedule not in SCHEDULE_NAMES:
            close = difflib.get_close_matches(schedule, SCHEDULE_NAMES, n=1) or ["1f1b"]
            rule = f"must be {', '.join(SCHEDULE_NAMES)}, or the path of a .csv file with a table"
            raise ValueError(f"{rule}; for example {close[0]}")
        return schedule

    @property
    def num_stages(self) -> int:
        """The number of stages that the model is partitioned into.

        Raises:
            ScheduleError: if the schedule is a file that holds none.
        """
        return self.pp * (self.stages_per_rank or default_stages_per_rank(self.schedule))

    @field_validator("partition")
    @classmethod
    def _known_partition(cls, partition: str) -> str:
        if partition.startswith("type:"):
            rule, example = "must have a regular expression after 'type:'", "; for example type:Attention"
            try:
                re.compile(partition.removeprefix("type:"))
            except re.error as error:
                raise ValueError(f"{rule} ({error}){example}") from None
            if partition == "type:":
                raise ValueError(rule + example)
        elif partition not in ("parameters", "uniform", "flops", "profile", "memory", "manual"):
            from pipekit.partitioners.installed import installed_partitioners  # loads numpy, and is seldom asked
            from pipekit.partitioners.methods import known_methods

            if partition not in installed_partitioners():
                raise ValueError(f"must be {known_methods()}; for example parameters")
        return partition

    @field_validator("boundaries")
    @classmethod
    def _readable_layout(cls, boundaries: tuple[int, ...] | str | None) -> tuple[int, ...] | str | None:
        if isinstance(boundaries, str):
            from pipekit.partitioners.stage_spec import read_stage_spec  # loads numpy, and is seldom asked

            try:
                read_stage_spec(boundaries)
            except LayoutError as error:
                raise ValueError(str(error).removeprefix(f"parallel.boundaries={boundaries} ")) from None
        return boundaries


class TrainConfig(Section):
    """Length of the training, batch sizes and precision."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": [key]} for key in LENGTH_KEYS]})

    steps: Annotated[PositiveInt, at_most(10**12, "at a step a millisecond they take 30 years")] = Field(
        default=None,  # type: ignore[assignment]  # until they are known; see has_steps
        examples=[300],
    )
    """Optimizer steps of the whole run. Give one of `steps`, `tokens` and `epochs`."""

    tokens: Annotated[PositiveInt, at_most(10**18, "no model has seen so many")] | None = Field(
        default=None, examples=[1_000_000_000]
    )
    """Tokens of the whole run, in place of `steps`; the last step may go beyond them."""

    epochs: Annotated[PositiveFloat, at_most(10**6, "nothing is left to learn")] | None = Field(
        default=None, examples=[3.0]
    )
    """Passes through the training samples, in place of `steps`; pipekit converts them into steps once the data are
    prepared."""

    global_batch_size: Annotated[
        PositiveInt, at_most(10**8, "batches of some millions of sequences are the largest in use")
    ] = Field(default=8, examples=[8])
    """Sequences per optimizer step, over all ranks: `micro_batch_size` x number of micro-batches x `dp`."""

    micro_batch_size: Annotated[PositiveInt, at_most(10**6, "no device holds so many sequences")] = Field(
        default=1, examples=[1]
    )
    """Sequences that one rank computes at a time."""

    sequence_length: Annotated[PositiveInt, at_most(10**8, LONGEST_SEQUENCE)] = Field(default=128, examples=[128])
    """Tokens per sequence."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the computation; `auto` is bf16 on GPUs and fp32 on CPUs."""

    seed: Seed = Field(default=1234, examples=[1234])
    """Seed of the initial weights, dropout and the order of the data."""

    gradient_clipping: Annotated[NonNegativeFloat, at_least(1e-12, "no weight would change", allows_zero=True)] = Field(
        default=1.0, examples=[1.0]
    )
    """Largest norm of the whole gradient; 0 switches clipping off."""

    activation_checkpointing: Annotated[ActivationCheckpointing | None, switch(ActivationCheckpointing)] = Field(
        default=None, examples=[True]
    )
    """Recompute activations in the backward pass instead of storing them: true does so in every layer, and a mapping of
    settings chooses."""

    compile: bool = False
    """Compile the layers whose class occurs more than once with `torch.compile`, each class once. The first step can
    take minutes longer. Needs a C++ compiler, on GPUs also Triton and a C compiler, and `parallel.zero` below 3."""

    tf32: bool = True
    """On GPUs, round the factors of fp32 matrix products to TF32, with 10 bits of mantissa. This is several times
    faster."""

    loss_chunk_tokens: PositiveInt | Literal["auto"] | None = Field(default="auto", examples=[1024])
    """Number of tokens for which the loss of a built-in model computes logits at a time, and again in the backward
    pass; `auto` takes all tokens at once if they need little memory, null always does."""

    eval_interval: PositiveInt | None = Field(default=None, examples=[100])
    """Steps between evaluations; null never evaluates."""

    eval_batches: Annotated[PositiveInt, at_most(10**9, "an evaluation would not end")] = Field(default=8, examples=[8])
    """Global batches per evaluation."""

    freeze: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)] = Field(
        default=(), examples=[["embed.*", "blocks.0.*"]]
    )
    """Parameters not to train: their names in checkpoints, where `*` stands for any text. They keep their weights, and
    have neither gradients nor optimizer states."""

    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(default=None, examples=[0.999])
    """Decay per step of an exponential moving average of the weights, which is saved with them; null keeps none."""

    eval_ema: bool = False
    """Evaluate the moving average in place of the weights."""

    on_spike: Literal["warn", "skip", "rollback"] = "warn"
    """Reaction to a loss far above the last ones: `warn` only reports it, `skip` leaves out its update, `rollback`
    returns to the last checkpoint and skips the data up to the spike."""

    spike_threshold: Annotated[float, Field(gt=0)] | None = Field(default=12.0, examples=[12.0])
    """Distance above the median of the last losses, in units of their spread, beyond which a loss is a spike; null
    looks for none."""

    spike_window: Annotated[int, Field(ge=5)] = Field(default=100, examples=[100])
    """Number of last losses to compare a loss with."""

    check_replicas: PositiveInt | None = Field(default=None, examples=[100])
    """Steps between checks that ranks hold the same tensor with the same bits; null never checks."""

    check_computation: PositiveInt | None = Field(default=None, examples=[1000])
    """Steps between checks that compute a step twice and compare the results bit for bit, to find a rank that computes
    wrongly; null never checks."""

    curriculum: CurriculumConfig | None = Field(
        default=None, examples=[{"min_difficulty": 64, "total_curriculum_step": 15_000}]
    )
    """Curriculum by sequence length: the lengths at the start of the training; null trains on whole sequences."""

    batch_warmup: BatchWarmupConfig | None = Field(
        default=None, examples=[{"start": 2, "increment": 2, "samples": 10_000}]
    )
    """Batch-size warm-up: the sizes at the start of the training; null uses `global_batch_size` in every step."""

    layer_drop: Annotated[LayerDropConfig | None, switch(LayerDropConfig)] = Field(
        default=None, examples=[{"theta": 0.5, "gamma": 0.001}]
    )
    """Progressive layer drop: true, or a mapping of settings; null trains every block in every step."""

    @property
    def has_steps(self) -> bool:
        """True if the number of steps is known: that of `epochs` is known once the data are prepared."""
        return vars(self)["steps"] is not None

    @model_validator(mode="before")
    @classmethod
    def _leave_unknown_steps_out(cls, values: Any) -> Any:
        """Leave out steps that are null, as a configuration in epochs writes them before its data are prepared."""
        if isinstance(values, dict) and "steps" in values and values["steps"] is None and values.get("epochs"):
            return {key: value for key, value in values.items() if key != "steps"}
        return values

    @model_validator(mode="after")
    def _turn_tokens_into_steps(self) -> TrainConfig:
        if self.tokens is not None and not self.has_steps and self.epochs is None and growth_is_sound(self):
            # From here on there is one number; the section is frozen for all others.
            self.__dict__.update(steps=steps_of_tokens(self.tokens, self), tokens=None)
        return self


class _CheckpointFields(Section):
    """Saving of checkpoints, and the one to resume from."""

    interval: PositiveInt | Duration | None = Field(default="15m", examples=[100])
    """Steps, such as 100, or time, such as `15m`, between checkpoints; null saves only at the end."""

    resume: FolderText = Field(
        default="auto", min_length=1, examples=["auto", "never", "runs/my-run/checkpoints/step-100"]
    )
    """`auto` resumes from the newest checkpoint of the run folder, `never` starts over, and anything else is the path
    of a checkpoint folder."""

    keep: PositiveInt | None = Field(default=2, examples=[2])
    """Number of the newest checkpoints to keep; null keeps all."""

    keep_every: PositiveInt | None = Field(default=None, examples=[1000])
    """Also keep the checkpoints of steps that are a multiple of this number."""

    keep_best: str | None = Field(default=None, min_length=1, examples=["val_loss"])
    """Metric of `metrics.jsonl`: also keep the checkpoint with its best value. Checkpoints of steps that do not measure
    it do not count."""

    best_is: Literal["lowest", "highest"] = "lowest"
    """The best value of `keep_best`."""

    on_error: Literal["stop", "warn"] = "stop"
    """Reaction if a checkpoint cannot be written: `stop` ends the run, `warn` reports it and tries again when the next
    one is due. If the last one fails, the run ends in any case."""

    storage: Literal["shared", "local"] = "shared"
    """`shared`: all hosts see the same run folder. `local`: each host has its own, with a second copy of its
    neighbour's checkpoint files."""

    @property
    def is_async(self) -> bool:
        """The key `async`, which is a keyword of Python."""
        return bool(dict(self)["async"])


if TYPE_CHECKING:
    CheckpointConfig = _CheckpointFields
else:
    CheckpointConfig = create_model(
        "CheckpointConfig",
        __base__=_CheckpointFields,
        __module__=__name__,
        __doc__=_CheckpointFields.__doc__,
        **{
            "async": (
                bool,
                Field(
                    default=False,
                    description="Write checkpoints while training goes on, from a copy in the host's memory, at most "
                    "one at a time.",
                ),
            )
        },
    )


class LoggingConfig(Section):
    """Logging: the console, the run's page, TensorBoard, trackio, Weights & Biases."""

    retired_keys: ClassVar = {"profile": False}

    interval: PositiveInt = Field(default=10, examples=[10])
    """Steps between plain console lines."""

    wandb: Annotated[WandbConfig | None, switch(WandbConfig)] = Field(default=None, examples=[True])
    """Log to Weights & Biases: true, false, or a mapping of settings."""

    tensorboard: bool = False
    """Write TensorBoard event files into the run folder."""

    trackio: Annotated[TrackioConfig | None, switch(TrackioConfig)] = Field(default=None, examples=[True])
    """Log to trackio: true, false, or a mapping of settings."""

    report: bool = True
    """Keep `report.html` in the run folder up to date, the page that `pipekit report` writes."""


if TYPE_CHECKING:
    ModelSection = ModelFamily
else:
    _FAMILIES = (*find_families().values(), CustomModelConfig)
    ModelSection = Annotated[
        reduce(or_, (Annotated[family, Tag(family.__name__)] for family in _FAMILIES)),
        Discriminator(lambda values: getattr(family_of(values), "__name__", None)),
    ]


class Config(Section):
    """Configuration of a run. Read one with `load_config`, or build one from a dict with `parse_config`."""

    run: RunConfig = RunConfig()
    """Folder, device and threads of a run."""

    model: ModelSection = Field(default=..., examples=[{"preset": "tiny"}])
    """Model to train: a preset, sizes, or `package.module:function` of your own list of layer specs."""

    parallel: ParallelConfig = ParallelConfig()
    """Layout of the ranks."""

    train: TrainConfig = Field(default=..., examples=[{"steps": 300}])
    """Length of the training, batch sizes and precision."""

    lora: LoraConfig = LoraConfig()
    """LoRA: low-rank adapters of linear layers, trained in place of the model's own parameters."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer: the algorithm that turns gradients into updates, and its settings."""

    scheduler: SchedulerConfig = SchedulerConfig()
    """Schedule of the learning rate over the steps."""

    data: DataConfig = DataConfig()
    """The text to train on, and how it becomes tokens."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving of checkpoints, and the one to resume from."""

    logging: LoggingConfig = LoggingConfig()
    """Logging: the console, the run's page, TensorBoard, trackio, Weights & Biases."""

    profile: ProfileConfig = ProfileConfig()
    """Profile: a window of steps whose time, operations and memory are measured, by rank."""

    callbacks: LayersCallbacksConfig = LayersCallbacksConfig()
    """Callbacks: early stopping, and a picture of the losses."""

    deepspeed: dict[str, Any] = Field(default={}, examples=[{"wall_clock_breakdown": True}])
    """DeepSpeed's own configuration, as a mapping or the path of a JSON file. A value for which pipekit has a key sets
    that key, `auto` leaves the value to pipekit, and all other values are passed on."""

    @property
    def decay_steps(self) -> int:
        """Step at which the learning rate stops decaying, by default `train.steps`."""
        tokens = self.scheduler.decay_tokens
        return self.scheduler.decay_steps or steps_of_tokens(tokens, self.train) or self.train.steps

    @property
    def warmup_steps(self) -> int:
        """Number of steps over which the learning rate rises, also if the setting is in tokens."""
        return steps_of_tokens(self.scheduler.warmup_tokens, self.train) or self.scheduler.warmup_steps

    def updated(self, changes: Mapping[str, Any]) -> Config:
        """Return a copy with some keys changed, such as `{"train.steps": 5}`; the whole copy is checked again.

        Sizes from a preset change with the preset, and a default feed-forward width changes with `hidden_size`.

        Raises:
            ConfigError: if there are mistakes; it lists all of them.
        """
        from pipekit.config.load import update_config  # loading is built on this module

        return update_config(self, changes)

    def to_yaml(self) -> str:
        """Return the resolved configuration as YAML, which loads to an equal configuration.

        Raises:
            ConfigError: if `model.args` or `deepspeed` has a value that YAML cannot hold.
        """
        try:
            return write_yaml(self.model_dump())
        except yaml.YAMLError as error:
            raise ConfigError(
                f"model.args or deepspeed holds a value that YAML cannot write ({error.args[-1]!r}); "
                "use numbers, text, lists and dicts"
            ) from None

    @model_validator(mode="after")
    def _check_rules(self) -> Config:
        faults = check_rules({name: getattr(self, name) for name in type(self).model_fields})
        if faults:
            raise config_error(fault.message for fault in faults)
        return self
