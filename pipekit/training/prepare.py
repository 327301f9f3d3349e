"""The trial that a configuration names, and the preparation of its run. Needs neither processes nor DeepSpeed."""

from __future__ import annotations

from pathlib import Path

from pipekit.config import Config
from pipekit.errors import ConfigError
from pipekit.inference.hugging_face import HuggingFaceFolder
from pipekit.models.custom import load_object
from pipekit.models.family import TransformerFamily
from pipekit.plan.decide import Decision, decide_run
from pipekit.plan.plan import StartPoint
from pipekit.plan.resources import Resources
from pipekit.progress import ProgressCallback
from pipekit.training.language_model import LanguageModelTrial
from pipekit.training.layers_trial import LayersTrial
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
    trial = load_trial(config)
    source = initial_weights(config) if start is None else None
    if source is not None:
        source.check()
    if issubclass(trial, LanguageModelTrial) and (source is not None or (start is not None and start.step == 0)):
        _check_own_tokenizer(config)
    prepared = trial.prepare(config, on_progress)
    return decide_run(config, trial, resources, prepared=prepared, start=start, on_progress=on_progress)


def _check_own_tokenizer(config: Config) -> None:
    """Check that imported weights are not trained on tokens that mean something else."""
    if config.data.tokenizer is None:
        raise ConfigError(
            "data.tokenizer is not given, and no tokenizer.json came with the imported model, whose weights know the "
            "tokens of its own tokenizer alone; write one with transformers: AutoTokenizer.from_pretrained(MODEL)"
            ".save_pretrained(FOLDER), and set data.tokenizer=FOLDER"
        )


def initial_weights(config: Config) -> HuggingFaceFolder | None:
    """The folder whose weights a new run begins with; None where they are drawn. A CheckpointError if it has none."""
    model = config.model
    if not isinstance(model, TransformerFamily) or model.init_from is None:
        return None
    return HuggingFaceFolder(Path(model.init_from).expanduser(), model)
