"""The validation of a trial: every sample once, over all replicas, with the same number of calls on each rank."""

from __future__ import annotations

from typing import Any

import torch

from pipekit.distributed.processes import raise_together, run_together
from pipekit.rng import fold_seed
from pipekit.training.context import TrialContext
from pipekit.training.trial import Trial, evaluates_whole
from pipekit.training.trial_callbacks import Callbacks
from pipekit.training.trial_data import TrialData
from pipekit.training.trial_metrics import TrialMetrics, kept


class EvaluationStopped(Exception):
    """Raised on all ranks between two batches of a validation, if the training must stop."""


def evaluate(trial: Trial, data: TrialData, callbacks: Callbacks, *, most_batches: int | None) -> dict[str, Any]:
    """Return the validation metrics of a trial, the same on every rank. All ranks call this together.

    Args:
        trial: the trial.
        data: loaders of the trial.
        callbacks: callbacks to call before and after.
        most_batches: largest number of batches; None evaluates all.

    Raises:
        PipekitError: on every rank, if the trial returns something that is not a metric.
        EvaluationStopped: on every rank, after a request to stop.
    """
    context: TrialContext = trial.context
    callbacks.call("on_validation_start")
    plain = [] if context.use_pipeline_parallel else context.models
    # Training metrics that have not been reported yet stay in the reducers meanwhile.
    with kept(context.reducers):
        for engine in plain:
            engine.module.eval()
        try:
            callbacks.call("on_validation_epoch_start")
            context.activity.begin(f"evaluation after step {callbacks.batch}", "preparing the evaluation")
            metrics, outputs = _evaluate(trial, data, most_batches)
            callbacks.call("on_validation_epoch_end", outputs)
            metrics |= callbacks.validation_metrics()
        finally:
            for engine in plain:
                engine.module.train()
    callbacks.call("on_validation_end", metrics)
    return metrics


@torch.no_grad()
def _evaluate(trial: Trial, data: TrialData, most_batches: int | None) -> tuple[dict[str, Any], list[dict[str, float]]]:
    context: TrialContext = trial.context
    if evaluates_whole(trial):
        found = TrialMetrics(
            context, "evaluate_full_dataset", run_together(trial.evaluation_reducer), for_training=False
        )
        found.reset()
        _seed(context, 0)
        context.activity.note("calling evaluate_full_dataset")
        found.update(trial.evaluate_full_dataset(data.whole_validation()), 1)
    else:
        found = TrialMetrics(context, "evaluate_batch", run_together(trial.evaluation_reducer), for_training=False)
        found.reset()
        _evaluate_batches(trial, data, found, most_batches)
    raise_together(found.fault)
    return found.report()


def _evaluate_batches(trial: Trial, data: TrialData, found: TrialMetrics, most_batches: int | None) -> None:
    context: TrialContext = trial.context
    number = data.num_evaluations if most_batches is None else min(most_batches, data.num_evaluations)
    feed = data.validation_feed()
    for batch in range(number):
        if batch and context.should_stop():
            raise EvaluationStopped
        _seed(context, batch)
        if feed is not None and batch >= data.own_evaluations:
            # Other replicas have one more batch, and all must call alike; what comes of this one does not count.
            with kept(context.reducers):
                trial.evaluate_batch(feed.again(), batch)
            continue
        if feed is not None:
            feed.num_samples = 0
        context.activity.note("calling evaluate_batch")
        metrics = trial.evaluate_batch(feed, batch)
        found.update(metrics, 0 if feed is None else feed.num_samples)


def _seed(context: TrialContext, batch: int) -> None:
    replica = context.role.data_parallel_rank
    context.seed_generators(fold_seed(context.config.seed, "evaluate", batch, replica))
