"""Learning-rate monitor: the learning rates of all engines, as training metrics."""

from __future__ import annotations

from pipekit.training.shipped.shipped_callback import ShippedCallback


class LearningRate(ShippedCallback):
    """Callback that reports `lr`, or `lr_model0`, `lr_model1_group2` and so on for several engines or parameter groups.

    It is the learning rate of the next update.
    """

    def training_metrics(self) -> dict[str, float]:
        groups = [engine.view.param_groups for engine in self.context.models]
        metrics = {}
        for index, own in enumerate(groups):
            for number, group in enumerate(own):
                model = f"_model{index}" if len(groups) > 1 else ""
                metrics[f"lr{model}{f'_group{number}' if len(own) > 1 else ''}"] = float(group["lr"])
        return metrics
