"""Memory monitor: host memory of the ranks' processes and peak device memory, as training metrics."""

from __future__ import annotations

import torch

from pipekit.distributed.processes import gather_objects
from pipekit.tensors.host_memory import resident_bytes
from pipekit.training.shipped.shipped_callback import ShippedCallback


class Memory(ShippedCallback):
    """Callback that reports `host_memory_bytes`, resident host memory, and `device_peak_bytes`, the peak of tensors.

    Both are the largest of any rank. The peak is that since the last report, and is reported only with a GPU.
    """

    def training_metrics(self) -> dict[str, float]:
        device = self.context.device
        mine = {"host_memory_bytes": float(resident_bytes())}
        if device.type == "cuda":
            mine["device_peak_bytes"] = float(torch.cuda.max_memory_allocated(device))
            torch.cuda.reset_peak_memory_stats(device)
        everyones = gather_objects(mine)
        return {name: max(each[name] for each in everyones) for name in mine}
