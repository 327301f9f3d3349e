"""Throughput monitor: samples and tokens per second, and model FLOPs utilization, as training metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipekit.config.callbacks_config import ThroughputConfig
from pipekit.costs.sequence_flops import device_peak_flops
from pipekit.costs.trace import count_flops
from pipekit.distributed.processes import gather_objects
from pipekit.hangs.activity import Activity
from pipekit.predictions.devices import MatmulFormat
from pipekit.schedules.operations import Operation
from pipekit.training.shipped.shipped_callback import ShippedCallback

if TYPE_CHECKING:
    from pipekit.training.context import TrialContext
    from pipekit.training.trial import Trial

# A backward makes two products for each one of the forward: for the gradient of its input, and of its weight.
_FORWARDS = 3


class Throughput(ShippedCallback):
    """Callback that reports `samples_per_s`, and if known `tokens_per_s` and `mfu`, starting with the second batch.

    The time of validations and checkpoints does not count. `mfu`, model FLOPs utilization, is the model's operations
    per second divided by the peak of all devices together. The operations of a batch are the matrix products,
    convolutions and attention in the forwards of the first batch, times three to include the backwards; recomputation
    does not count.

    Args:
        context: context of the trial.
        settings: facts about samples and devices.

    Source: Chowdhery et al. 2022, "PaLM", appendix B.
    """

    def __init__(self, context: TrialContext, settings: ThroughputConfig | None = None) -> None:
        super().__init__(context)
        self.settings = settings or ThroughputConfig()
        self._began_s = self._paused_s = self._pause_began_s = 0.0
        self._batch: int | None = None

    def check(self, trial: Trial, *, evaluates: bool) -> None:
        self._counter = _ForwardCounter([engine.mpu.activity for engine in self.context.models])
        train_batch = trial.train_batch

        def count(dataloader_iter: Iterator[Any] | None, epoch_idx: int, batch_idx: int) -> Any:
            if batch_idx == self.context.get_initial_batch():
                with self._counter:
                    return train_batch(dataloader_iter, epoch_idx, batch_idx)
            vars(trial).pop("train_batch", None)
            self._restart(batch_idx)
            return train_batch(dataloader_iter, epoch_idx, batch_idx)

        trial.train_batch = count  # type: ignore[method-assign]

    def on_validation_start(self) -> None:
        self._pause_began_s = time.perf_counter()

    def on_validation_end(self, metrics: dict[str, Any]) -> None:
        self._paused_s += time.perf_counter() - self._pause_began_s

    def on_checkpoint_save_start(self, checkpoint: dict[str, Any]) -> None:
        self._pause_began_s = time.perf_counter()

    def on_checkpoint_upload_end(self, uuid: str) -> None:
        self._paused_s += time.perf_counter() - self._pause_began_s

    def training_metrics(self) -> dict[str, float]:
        mine = self._counter.flops, time.perf_counter() - self._began_s - self._paused_s
        everyones = gather_objects(mine)
        last, batch = self._batch, self.context.num_trained_batches
        self._restart(batch)
        if last is None or batch == last:
            return {}
        batches_per_s = (batch - last) / max(seconds for _, seconds in everyones)
        samples_per_s = batches_per_s * self.context.get_global_batch_size()
        metrics = {"samples_per_s": samples_per_s}
        if self.settings.tokens_per_sample is not None:
            metrics["tokens_per_s"] = samples_per_s * self.settings.tokens_per_sample
        peak_flops = self.settings.peak_flops or self._published_peak_flops()
        # Tensor-parallel ranks each count the layers that they do not share, so that there is no sum.
        if peak_flops is not None and all(engine.mpu.layout.tp == 1 for engine in self.context.models):
            flops = _FORWARDS * sum(forward_flops for forward_flops, _ in everyones)
            metrics["mfu"] = flops * batches_per_s / (peak_flops * len(everyones))
        return metrics

    def _restart(self, batch: int) -> None:
        """Begin to measure after so many batches; before the second there is nothing to measure."""
        self._batch = batch
        self._began_s, self._paused_s = time.perf_counter(), 0.0

    def _published_peak_flops(self) -> float | None:
        dtype = next(iter(self.context.models[0].module.parameters())).dtype
        kinds: dict[torch.dtype, MatmulFormat] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
        kind: MatmulFormat = kinds.get(dtype) or ("tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32")
        return device_peak_flops(self.context.device, kind)


class _ForwardCounter(TorchDispatchMode):
    """Counts the operations of forwards inside: neither those of backwards nor of weight gradients left for later.

    Args:
        activities: of the engines, which tell what these are about.

    Attributes:
        flops: their number.
    """

    def __init__(self, activities: Sequence[Activity]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._activities = activities
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch imports its compiler, only to keep it away from here.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if torch._C._current_autograd_node() is None and not self._computes_weight_gradients():
            self.flops += count_flops(func, args, kwargs or {}, results)
        return results

    def _computes_weight_gradients(self) -> bool:
        operations = (activity.operation[0] for activity in self._activities)
        return any(isinstance(each, Operation) and each.action.kind == "W" for each in operations)
