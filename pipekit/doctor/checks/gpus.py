"""GPUs: whether torch finds all of the driver's, can compute on them, and their memory is free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipekit.doctor.rows import Row, Site

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
# More than the CUDA context of one more process of the user takes.
_USED_SHARE = 0.1


def check_gpus(site: Site) -> list[Row]:
    """GPUs that runs would see."""
    driver = ""
    with suppress(OSError, AttributeError):
        driver = re.search(r"Kernel Module\D*([0-9.]+)", _DRIVER_FILE.read_text())[1]  # type: ignore[index]
    return judge_gpus(site.num_gpus, site.environ.get("CUDA_VISIBLE_DEVICES"), driver, site.libraries)


def judge_gpus(num_gpus: int | None, visible: str | None, driver: str, libraries: Mapping[str, Any]) -> list[Row]:
    """Rows of the GPUs.

    Args:
        num_gpus: their number according to the driver, without hidden ones.
        visible: `CUDA_VISIBLE_DEVICES`; None if it is not set.
        driver: version of NVIDIA's driver; empty if unknown.
        libraries: output of `pipekit.deepspeed.library_facts`.
    """
    if not num_gpus:
        hidden = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible!r}"
        if driver:
            return [
                Row(
                    "GPUs",
                    "warning",
                    f"none is visible{hidden}, though NVIDIA's driver {driver} is loaded",
                    "Unset or correct CUDA_VISIBLE_DEVICES; start a container with --gpus all.",
                )
            ]
        return [Row("GPUs", "ok", f"none{hidden}; runs compute on the CPU")]
    if "gpus" not in libraries:
        return []  # torch cannot be imported, which has its own row
    gpus: Sequence[Mapping[str, Any]] = libraries["gpus"]
    with_driver = f", driver {driver}" if driver else ""
    if libraries.get("cuda") is None and libraries.get("hip") is None:
        advice = "Install a build of torch for these GPUs; pytorch.org has the command."
        return [Row("GPUs", "bad", f"{num_gpus}{with_driver}, but this build of torch is for CPUs", advice)]
    built = f"torch built for CUDA {libraries['cuda']}" if libraries.get("cuda") else f"ROCm {libraries['hip']}"
    if len(gpus) < num_gpus:
        return [
            Row(
                "GPUs",
                "bad",
                f"{num_gpus}{with_driver}, but torch sees only {len(gpus)} ({built})",
                "Check that nvidia-smi works, and that the driver is new enough for this CUDA version; dmesg shows "
                "whether a GPU has fallen off the bus.",
            )
        ]
    rows = [Row("GPUs", "ok", f"{len(gpus)}{with_driver}, {built}")]
    return rows + [_judge_gpu(index, gpu, libraries["architectures"]) for index, gpu in enumerate(gpus)]


def can_run(capability: Sequence[int], architectures: Sequence[str]) -> bool:
    """True if a build of torch for these architectures runs on a GPU with this compute capability.

    Source: CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".

    Example:
        >>> can_run((8, 6), ["sm_80", "sm_90"]), can_run((12, 0), ["sm_80", "sm_90"])
        (True, False)
        >>> can_run((12, 0), ["sm_90", "compute_90"])
        True
    """
    major, minor = capability
    for name in architectures:
        kind, _, digits = name.partition("_")
        number = re.match(r"[0-9]{2,3}", digits)
        if number is None:
            continue
        own_major, own_minor = divmod(int(number[0]), 10)
        if kind == "compute" and (own_major, own_minor) <= (major, minor):
            return True
        if kind == "sm" and own_major == major and own_minor <= minor:
            return True
    return False


def _judge_gpu(index: int, gpu: Mapping[str, Any], architectures: Sequence[str]) -> Row:
    name = f"GPU {index}"
    if gpu.get("error") is not None:
        advice = "End the other processes on it, which nvidia-smi lists, or exclude it with CUDA_VISIBLE_DEVICES."
        return Row(name, "bad", f"cannot compute: {gpu['error']}", advice)
    total, free = gpu["memory_bytes"], gpu["free_bytes"]
    text = f"{gpu['name']}, {total / 1e9:.0f} GB"
    cuda_architectures = [each for each in architectures if each.startswith(("sm_", "compute_"))]
    if cuda_architectures and not can_run(gpu["capability"], cuda_architectures):
        version = ".".join(map(str, gpu["capability"]))
        advice = "Install a build of torch for this GPU; pytorch.org has the command."
        return Row(name, "bad", f"{text}: torch is not built for its compute capability {version}", advice)
    if total - free > _USED_SHARE * total:
        advice = "End the processes that nvidia-smi lists, or choose other GPUs with CUDA_VISIBLE_DEVICES."
        return Row(name, "warning", f"{text}, of which {(total - free) / 1e9:.0f} GB are in use", advice)
    return Row(name, "ok", text, measured={"memory_bytes": total, "free_bytes": free})
