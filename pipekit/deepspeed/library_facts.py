"""Facts that torch and DeepSpeed tell about themselves and the GPUs: `python -m pipekit.deepspeed.library_facts`.

The last line of the output is a JSON object. It is a process of its own, because a broken library may crash it.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any


def library_facts() -> dict[str, Any]:
    """Versions, backends and GPUs; `torch_error`, `deepspeed_error` and the `error` of a GPU say what does not work."""
    warnings.simplefilter("ignore")
    facts: dict[str, Any] = {}
    facts["torch_error"] = _error_of(lambda: facts.update(_torch_facts()))
    if facts["torch_error"] is None:
        facts["deepspeed_error"] = _error_of(lambda: importlib.import_module("deepspeed"))
    return facts


def _torch_facts() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    facts: dict[str, Any] = {
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "backends": [
            name for name in ("gloo", "nccl") if dist.is_available() and getattr(dist, f"is_{name}_available")()
        ],
        "architectures": torch.cuda.get_arch_list() if torch.cuda.is_available() else [],
        "gpus": [],
    }
    if "nccl" in facts["backends"]:
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    for index in range(torch.cuda.device_count()):
        gpu: dict[str, Any] = {}
        gpu["error"] = _error_of(lambda gpu=gpu, index=index: gpu.update(_gpu_facts(index)))  # type: ignore[misc]
        facts["gpus"].append(gpu)
    return facts


def _gpu_facts(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    if torch.ones(1000, device=f"cuda:{index}").sum().item() != 1000.0:
        raise RuntimeError("computes a wrong sum")
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "memory_bytes": total,
        "free_bytes": free,
    }


def _error_of(call: Callable[[], object]) -> str | None:
    try:
        call()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return None


if __name__ == "__main__":
    sys.stdout.write(f"\n{json.dumps(library_facts())}\n")
