"""Memory monitor: what the ranks' processes have on the host, and the peak on the device, among the metrics."""

from __future__ import annotations

import torch

from pipekit.distributed.processes import gather_objects
from pipekit.tensors.host_memory import resident_bytes
from pipekit.training.shipped.shipped_callback import ShippedCallback


class Memory(ShippedCallback):
    """Reports `host_memory_bytes`, resident in the memory of the host, and `device_peak_bytes`, the peak of tensors.

    Both are those of the rank that has the most; the peak is that since the last report, where there is a GPU.
    """

    def training_metrics(self) -> dict[str, float]:
        device = self.context.device
        mine = {"host_memory_bytes": float(resident_bytes())}
        if device.type == "cuda":
            mine["device_peak_bytes"] = float(torch.cuda.max_memory_allocated(device))
            torch.cuda.reset_peak_memory_stats(device)
        everyones = gather_objects(mine)
        return {name: max(each[name] for each in everyones) for name in mine}
