"""Callbacks that ship with pipekit, as the `callbacks` section of a configuration switches them on."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from pipekit.settings.base import Section, switch


class EarlyStoppingConfig(Section):
    """End of a training that has stopped getting better."""

    metric: str | None = Field(default=None, min_length=1, examples=["loss"])
    """Metric of the validation; null takes the first."""

    best_is: Literal["lowest", "highest"] = "lowest"
    """The best value of the metric."""

    patience: PositiveInt = Field(default=3, examples=[3])
    """The training ends after so many validations in a row that were no better than the best before them."""

    min_delta: NonNegativeFloat = Field(default=0.0, examples=[0.001])
    """A value counts as better only if it is better by more than this."""


class LossCurveConfig(Section):
    """Picture of metrics over the batches."""

    file: str = Field(default="loss.svg", examples=["loss.svg"])
    """Name of the picture in the run folder, which ends in .svg or .png."""

    metrics: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None, examples=[["loss", "val_loss"]]
    )
    """Metrics of `metrics.jsonl` to draw; null takes those with "loss" in their names or, where there are none, all."""

    @field_validator("file")
    @classmethod
    def _is_picture(cls, file: str) -> str:
        if PurePath(file).suffix not in (".svg", ".png") or PurePath(file).name != file:
            raise ValueError("must be a name that ends in .svg or .png; for example loss.svg")
        return file


class ThroughputConfig(Section):
    """Speed of the training."""

    tokens_per_sample: PositiveInt | None = Field(default=None, examples=[128])
    """Tokens of a sample, for `tokens_per_s`; null leaves that out."""

    peak_flops: PositiveFloat | None = Field(default=None, examples=[312e12])
    """Floating-point operations per second that one device is capable of, for `mfu`; null takes the published figure
    of the GPU, and leaves `mfu` out where none is known."""


class TextSamplesConfig(Section):
    """Text that the model continues after each validation."""

    prompts: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        default=..., examples=[["Once upon a time"]]
    )
    """Texts to continue."""


class LmEvalConfig(Section):
    """Tasks of lm-eval during the training."""

    tasks: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False, min_length=1)] = Field(
        default=..., examples=[["arc_easy"]]
    )
    """Names of tasks, patterns such as `mmlu_*`, or paths of their YAML files."""

    include_path: str | None = Field(default=None, min_length=1, examples=["my_tasks"])
    """Folder of your own tasks, beside those of lm-eval."""

    num_fewshot: NonNegativeInt | None = Field(default=None, examples=[5])
    """Examples in front of each question; null as the task has it."""

    limit: PositiveInt | None = Field(default=None, examples=[100])
    """Questions of each task at most; null asks all."""

    every: PositiveInt | None = Field(default=None, examples=[1000])
    """Steps between evaluations by tasks, a multiple of `train.eval_interval`, beside the last one; null makes one at
    each validation."""


class WandbConfig(Section):
    """Logging to Weights & Biases."""

    project: str = Field(default="pipekit", min_length=1, examples=["pipekit"])
    """Project of the run."""

    entity: str | None = Field(default=None, examples=["my-team"])
    """Team or user; null takes the account's default."""

    name: str | None = Field(default=None, examples=["my-run"])
    """Name of the run; null takes the name of the run folder."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is online if an account is logged in, and offline otherwise."""


class TrackioConfig(Section):
    """Logging to trackio."""

    project: str = Field(default="pipekit", min_length=1, examples=["pipekit"])
    """Project of the run."""

    name: str | None = Field(default=None, examples=["my-run"])
    """Name of the run; null takes the name of the run folder."""

    space: str | None = Field(default=None, examples=["my-name/my-runs"])
    """Space of the Hugging Face Hub; null keeps the metrics on this machine."""


class LayersCallbacksConfig(Section):
    """Callbacks of a run of layers that ship with pipekit, beside those of `logging`; `key: true` switches one on."""

    early_stopping: Annotated[EarlyStoppingConfig | None, switch(EarlyStoppingConfig)] = Field(
        default=None, examples=[{"metric": "loss", "patience": 3}]
    )
    """End the training when a validation metric has stopped improving: true, or a mapping of settings."""

    loss_curve: Annotated[LossCurveConfig | None, switch(LossCurveConfig)] = Field(
        default=None, examples=[{"file": "loss.svg"}]
    )
    """Draw metrics over the batches into the run folder: true, or a mapping of settings."""

    lm_eval: LmEvalConfig | None = Field(default=None, examples=[{"tasks": ["arc_easy"], "every": 1000}])
    """Run lm-eval tasks on the language model at validations."""


class CallbacksConfig(LayersCallbacksConfig):
    """Callbacks that ship with pipekit; `key: true` switches one on.

    The class of the key `early_stopping` is `EarlyStopping` in `pipekit/training/shipped/early_stopping.py`; it is made
    with the trial's context and, where the key takes a mapping, with its settings.
    """

    progress: bool = True
    """Show reports, validations and checkpoints on the terminal."""

    learning_rate: bool = False
    """Report the learning rates of all engines."""

    memory: bool = False
    """Report the memory used on the host, and on devices that have their own: the maximum over ranks."""

    throughput: Annotated[ThroughputConfig | None, switch(ThroughputConfig)] = Field(
        default=None, examples=[{"tokens_per_sample": 128}]
    )
    """Report samples and tokens per second, and the share of the devices' peak: true, or a mapping of settings."""

    text_samples: TextSamplesConfig | None = Field(default=None, examples=[{"prompts": ["Once upon a time"]}])
    """Let the trial's `generate_text` continue prompts after each validation."""

    tensorboard: bool = False
    """Write all metrics as TensorBoard's event files into the run folder."""

    trackio: Annotated[TrackioConfig | None, switch(TrackioConfig)] = Field(default=None, examples=[True])
    """Log all metrics to trackio: true, or a mapping of settings."""

    report: bool = False
    """Keep `report.html` in the run folder up to date, the page that `pipekit report` writes."""

    wandb: Annotated[WandbConfig | None, switch(WandbConfig)] = Field(default=None, examples=[True])
    """Log all metrics to Weights & Biases: true, or a mapping of settings."""
