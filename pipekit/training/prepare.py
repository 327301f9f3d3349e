"""The trial that a configuration names, and the preparation of its run. Needs neither processes nor DeepSpeed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pipekit.checkpoint.manifest import CONFIG_FILE
from pipekit.checkpoint.model_config import shapes_of_layers
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.config import Config
from pipekit.config.growth import sequence_length_at
from pipekit.costs.describe import check_shapes
from pipekit.costs.model import DTYPES, describe_model
from pipekit.costs.sequence_flops import SequenceFlops, fit_sequence_flops
from pipekit.errors import CheckpointError, ConfigError
from pipekit.inference.base_weights import BaseWeights, check_base, open_base
from pipekit.inference.hugging_face import HuggingFaceFolder
from pipekit.inference.peft_adapter import AdapterFolder
from pipekit.layers.lora import is_adapter
from pipekit.layers.specs import LayerSpec
from pipekit.models.custom import CustomModelConfig, load_object
from pipekit.models.family import TransformerFamily
from pipekit.plan.decide import Decision, decide_run
from pipekit.plan.plan import StartPoint
from pipekit.plan.resources import Resources
from pipekit.predictions.layer_costs import ModelCosts
from pipekit.progress import ProgressCallback
from pipekit.training.extras import check_extras
from pipekit.training.language_model import LanguageModelTrial
from pipekit.training.layers_trial import LayersTrial
from pipekit.training.optimizer import check_optimizer
from pipekit.training.rates import bind_schedule, checked_rate
from pipekit.training.trial import check_trial


def load_trial(config: Config) -> type[LayersTrial]:
    """Import the trial that the configuration names, or the shipped one.

    Raises:
        ConfigError: if it cannot be imported, or is no `LayersTrial`.
        PipekitError: if it has a method that nothing would call.
    """
    if config.run.trial is None:
        return LanguageModelTrial
    trial = load_object(config.run.trial, key="run.trial")
    if not (isinstance(trial, type) and issubclass(trial, LayersTrial)):
        raise ConfigError(f"run.trial={config.run.trial}: must be a subclass of pipekit.LayersTrial")
    check_trial(trial)
    return trial


def prepare_run(
    config: Config, resources: Resources, *, start: StartPoint | None, on_progress: ProgressCallback | None = None
) -> Decision:
    """Prepare the data of a run, and decide everything else.

    Raises:
        PipekitError: if something does not fit; it says what to type instead.
    """
    check_extras({"logging": config.logging, "callbacks": config.callbacks})
    trial = load_trial(config)
    adapts = config.lora.rank is not None
    source = initial_weights(config) if start is None or adapts else None
    if isinstance(source, HuggingFaceFolder):
        source.check()
    if issubclass(trial, LanguageModelTrial) and (source is not None or (start is not None and start.step == 0)):
        _check_own_tokenizer(config)
    if adapts and source is not None and start is not None:
        check_base(source, CheckpointReader(start.checkpoint))
    prepared = trial.prepare(config, on_progress)
    decision = decide_run(config, trial, resources, prepared=prepared, start=start, on_progress=on_progress)
    _check_layers(decision, trial)
    if isinstance(source, CheckpointReader):
        _check_base_shapes(source, decision.specs, key=f"lora.base={config.lora.base}")
    initial_adapters(decision.plan.config, decision.specs)
    if trial.build_optimizer is LayersTrial.build_optimizer:
        _check_optimizer(decision)
    if trial.learning_rate is LayersTrial.learning_rate:
        checked_rate(bind_schedule(decision.plan.config)[0](0), 0, decision.plan.config)
    return replace(decision, plan=replace(decision.plan, sequence_flops=_sequence_flops(decision, trial)))


def _sequence_flops(decision: Decision, trial: type[LayersTrial]) -> SequenceFlops | None:
    """Operations of a sequence; None where the trial or its layers do not tell, or layers are left out at random."""
    plan = decision.plan
    train, num_sequences = plan.config.train, plan.batch.micro_batch_size
    if train.layer_drop is not None:
        return None

    def costs_of(length: int) -> ModelCosts:
        if length == train.sequence_length:
            return decision.model.costs_of(num_sequences)
        shorter = plan.config.model_copy(update={"train": train.model_copy(update={"sequence_length": length})})
        example = partial(trial.example, shorter)
        model = describe_model(shorter, decision.specs, example, precision=plan.precision, device=plan.device)
        return model.costs_of(num_sequences)

    try:
        return fit_sequence_flops(costs_of, {sequence_length_at(train, 1), train.sequence_length}, num_sequences)
    except ConfigError:
        return None


def _check_layers(decision: Decision, trial: type[LayersTrial]) -> None:
    """Check that the layers of the user's own fit one another; those of a built-in model do."""
    config = decision.plan.config
    if trial is LanguageModelTrial and not isinstance(config.model, CustomModelConfig):
        return
    inherits = trial.example.__func__ is LanguageModelTrial.example.__func__  # type: ignore[attr-defined]
    if inherits and trial.build_train_dataset is not LanguageModelTrial.build_train_dataset:
        return  # its samples may be others than the example
    example = trial.example(config, decision.plan.batch.micro_batch_size)
    if example is not None:
        check_shapes(decision.specs, example.inputs, dtype=DTYPES[decision.plan.precision])


def _check_optimizer(decision: Decision) -> None:
    plan = decision.plan
    names = [name for layer in decision.model.shapes_of(1) for name in layer]
    is_sharded = plan.config.parallel.zero > 0 or plan.layout.tp > 1 or plan.precision != "fp32"
    check_optimizer(plan.config.optimizer, names, is_sharded=is_sharded)


def _check_own_tokenizer(config: Config) -> None:
    """Check that imported weights are not trained on tokens that mean something else."""
    if config.data.tokenizer is None and config.lora.base is not None:
        raise ConfigError(
            f"data.tokenizer is not given, and the weights of lora.base={config.lora.base} know the tokens of their "
            f"own tokenizer alone; a checkpoint holds it: data.tokenizer=CHECKPOINT/tokenizer.json"
        )
    if config.data.tokenizer is None:
        raise ConfigError(
            "data.tokenizer is not given, and no tokenizer.json came with the imported model, whose weights know the "
            "tokens of its own tokenizer alone; write one with transformers: AutoTokenizer.from_pretrained(MODEL)"
            ".save_pretrained(FOLDER), and set data.tokenizer=FOLDER"
        )


def initial_weights(config: Config) -> BaseWeights | None:
    """The weights that a new run begins with, or adds adapters to; None where they are drawn.

    Raises:
        ConfigError: if nothing names the weights that adapters are added to.
        CheckpointError: if they cannot be read.
    """
    model = config.model
    if config.lora.rank is not None:
        return open_base(config)
    if not isinstance(model, TransformerFamily) or model.init_from is None:
        return None
    return HuggingFaceFolder(Path(model.init_from).expanduser(), model)


def initial_adapters(config: Config, specs: Sequence[LayerSpec]) -> AdapterFolder | None:
    """The folder whose adapters a new run begins with; None where they are drawn.

    Raises:
        CheckpointError: if they cannot be read, or are others than the configuration describes.
    """
    if config.lora.init_from is None:
        return None
    return AdapterFolder(Path(config.lora.init_from).expanduser(), config, specs)


def _check_base_shapes(base: CheckpointReader, specs: Sequence[LayerSpec], *, key: str) -> None:
    """Check that a checkpoint holds the model that adapters are added to; a CheckpointError if not."""
    described = {name: shape for name, shape in shapes_of_layers(specs).items() if not is_adapter(name)}
    for name in [*described, *base.shapes]:
        ours, theirs = described.get(name), base.shapes.get(name)
        if ours != theirs:
            raise CheckpointError(
                f"{key}: {name} is {theirs or 'not in it'}, and {ours or 'not'} in the model; write the model section "
                f"of {base.path / CONFIG_FILE}"
            )
