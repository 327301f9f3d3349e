"""Trials with user-defined engines, training steps and data; pipekit does everything else."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipekit.data.data_loader import data_length
from pipekit.errors import PipekitError
from pipekit.training.layers_trial import LayersTrial
from pipekit.training.reducers import Reducer
from pipekit.training.trial_callbacks import TrialCallback

if TYPE_CHECKING:
    # Planning a run of layers looks at trials too, and needs no engine.
    from pipekit.training.context import TrialContext

# Own methods of a trial may have any name that is not as good as one of these.
_ALIKE = 0.9


class Trial:
    """Base class of a user-defined trial: its engines, training step, evaluation and data.

    A subclass builds its engines in `__init__` with `pipekit.initialize`, and passes each to
    `context.wrap_model_engine`. A `Trainer` calls the other methods on every rank.

    Args:
        context: this rank's view of the trial, which a subclass keeps as `self.context`.
    """

    context: TrialContext

    def __init__(self, context: TrialContext) -> None:
        self.context = context

    def train_batch(self, dataloader_iter: Iterator[Any] | None, epoch_idx: int, batch_idx: int) -> Any:
        """Train on the next batch or micro-batch of the iterator, and return metrics.

        With plain modules it is called once per micro-batch: it takes one from the iterator, and calls the engine's
        forward, `backward` and `step`. With a pipeline it is called once per batch, and passes the iterator to the
        engine's `train_batch`. It is also called once per batch if the trial accumulates gradients by hand.

        The global generators of torch, numpy and `random` are seeded by the batch, the micro-batch and the replica, so
        a resumed run draws the same random numbers as an uninterrupted one.

        Args:
            dataloader_iter: yields this replica's micro-batches without end; None on ranks that read no data.
            epoch_idx: epoch in which the batch begins, counted from 0.
            batch_idx: number of batches trained before, over all epochs.

        Returns:
            The loss, or a dict of metrics with the same names in every batch; each is a number or a tensor of one
            element. Only ranks that report use them.
        """
        raise NotImplementedError

    def evaluate_batch(self, dataloader_iter: Iterator[Any] | None, batch_idx: int) -> dict[str, Any]:
        """Return the metrics of one batch of the validation data, as `train_batch` does, but without gradients.

        With plain modules it takes one micro-batch from the iterator. With a pipeline it passes the iterator to the
        engine's `eval_batch`, which takes as many micro-batches as a training batch has. Override either this or
        `evaluate_full_dataset`.
        """
        raise NotImplementedError

    def evaluate_full_dataset(self, data_loader: Any) -> dict[str, Any]:
        """Return the metrics of the whole validation data, without gradients.

        Each rank has a loader of the whole data, and computes the same. The metrics are averaged over the ranks that
        report.
        """
        raise NotImplementedError

    def evaluation_reducer(self) -> Reducer | dict[str, Reducer]:
        """Return the reducer of the metrics of `evaluate_batch` over batches and ranks, or a dict of one per metric.

        In a mean, each batch is weighted by its number of samples.
        """
        return Reducer.AVG

    def build_training_data_loader(self) -> Any:
        """Build the data loader for training: a `pipekit.data.DataLoader` of the whole dataset.

        It yields micro-batches, and is called on ranks that read batches. The trainer shards, repeats and resumes it.
        """
        raise NotImplementedError

    def build_validation_data_loader(self) -> Any:
        """Build the data loader for validation, of the same type; called on ranks that read batches."""
        raise NotImplementedError

    def build_callbacks(self) -> dict[str, TrialCallback]:
        """Build the trial's callbacks: a dict by name, the same on all ranks."""
        return {}

    def generate_text(self, prompt: str) -> str:
        """Generate text with a language model, for `callbacks.text_samples`; return the prompt and its continuation.

        All ranks call it together, in evaluation mode and without gradients.
        """
        raise NotImplementedError

    def get_batch_length(self, batch: Any) -> int:
        """Return the number of samples in a batch from a loader: the first dimension of its first tensor."""
        return data_length(batch)

    def save(self, context: TrialContext, path: Path) -> None:
        """Save the trained state to a folder; every rank calls this. By default it saves every wrapped engine.

        Args:
            context: the context of the trial.
            path: an empty folder, which becomes the checkpoint.
        """
        for index, engine in enumerate(context.models):
            engine.save_checkpoint(path, tag=f"model{index}", save_latest=False)

    def load(self, context: TrialContext, path: Path) -> None:
        """Load the state that `save` wrote; every rank calls this."""
        for index, engine in enumerate(context.models):
            found, _ = engine.load_checkpoint(path, tag=f"model{index}")
            if found is None:
                raise PipekitError(
                    f"{path}: holds {index} of the trial's {len(context.models)} engines; go on with the trial that "
                    "wrote it"
                )


_REQUIRED = ("train_batch", "build_training_data_loader")
_PURPOSES = {
    "Trial": "which makes its engines and its steps of training itself",
    "LayersTrial": "the short way for lists of layers",
}


def check_trial(kind: type) -> None:
    """Check that a trial's class has the methods that a trainer needs, and no public method that nothing would call.

    Raises:
        PipekitError: if it is not a trial, or if a method is missing, takes other arguments, or would never be called.

    Example:
        >>> class Mine(Trial):
        ...     def train_batch(self, dataloader_iter): ...
        >>> check_trial(Mine)
        Traceback (most recent call last):
        ...
        pipekit.errors.PipekitError: Mine.train_batch takes (dataloader_iter), and is called as train_batch(\
dataloader_iter, epoch_idx, batch_idx)
    """
    if not issubclass(kind, (Trial, LayersTrial)):
        raise PipekitError(f"{kind.__name__} is no trial; make it a subclass of pipekit.Trial")
    base, other = (Trial, LayersTrial) if issubclass(kind, Trial) else (LayersTrial, Trial)
    name, own = kind.__name__, _own_methods(kind, base)
    for method in (each for each in own if not each.startswith("_")):
        if hasattr(base, method):
            _check_arguments(kind, base, method)
        elif hasattr(other, method) and not (base is Trial and "train_batch" in own):
            raise PipekitError(
                f"{name}.{method}: nothing calls it on a pipekit.{base.__name__}; write class "
                f"{name}(pipekit.{other.__name__}), {_PURPOSES[other.__name__]}"
            )
        elif alike := difflib.get_close_matches(method, vars(base), n=1, cutoff=_ALIKE):
            raise PipekitError(f"{name}.{method}: nothing calls it; did you mean {alike[0]}?")
    if base is LayersTrial:
        return
    for method in _REQUIRED:
        if method not in own:
            raise PipekitError(f"{name} has no {method}, which is called on every rank; write one")
    evaluations = [method for method in ("evaluate_batch", "evaluate_full_dataset") if method in own]
    if len(evaluations) > 1:
        raise PipekitError(f"{name} has evaluate_batch and evaluate_full_dataset; leave one of them out")
    if evaluations and "build_validation_data_loader" not in own:
        raise PipekitError(f"{name} has {evaluations[0]} and no build_validation_data_loader; write one")
    if not evaluations and "build_validation_data_loader" in own:
        raise PipekitError(f"{name} has build_validation_data_loader and no evaluate_batch; write one")
    if "evaluation_reducer" in own and "evaluate_batch" not in own:
        raise PipekitError(f"{name}.evaluation_reducer: nothing calls it without evaluate_batch; leave it out")


def has_evaluation(trial: Trial) -> bool:
    """True if a trial evaluates."""
    return "build_validation_data_loader" in _own_methods(type(trial), Trial)


def evaluates_whole(trial: Trial) -> bool:
    """True if a trial evaluates the whole validation data in one call."""
    return "evaluate_full_dataset" in _own_methods(type(trial), Trial)


def makes_text(trial: Trial) -> bool:
    """True if a trial continues texts."""
    return "generate_text" in _own_methods(type(trial), Trial)


def metrics_of(returned: Any) -> Any:
    """Metrics that `train_batch` returned; a number or a tensor is the loss.

    Example:
        >>> metrics_of(0.5), metrics_of({"accuracy": 1.0})
        ({'loss': 0.5}, {'accuracy': 1.0})
    """
    return {"loss": returned} if isinstance(returned, (Tensor, float, int)) else returned


def _own_methods(kind: type, base: type) -> list[str]:
    """Names of methods that a class and its bases below `base` define."""
    below = kind.__mro__[: kind.__mro__.index(base)]
    return list(dict.fromkeys(name for each in below for name, value in vars(each).items() if _is_method(value)))


def _is_method(value: Any) -> bool:
    return inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod))


def _check_arguments(kind: type, base: type, method: str) -> None:
    """Check that a method takes the base class's arguments; skip anything that is not a plain function."""
    function, original = inspect.getattr_static(kind, method), inspect.getattr_static(base, method)
    if not (inspect.isfunction(function) and inspect.isfunction(original)):
        return
    names = list(inspect.signature(original).parameters)[1:]
    own = inspect.signature(function)
    try:
        own.bind(None, *names)
    except TypeError:
        taken = [str(each) for each in own.parameters.values()][1:]
        raise PipekitError(
            f"{kind.__name__}.{method} takes ({', '.join(taken)}), and is called as {method}({', '.join(names)})"
        ) from None
