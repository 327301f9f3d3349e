"""GPUs: whether torch finds those of the driver, can compute on them, and their memory is free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipekit.doctor.rows import Row, Site

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
# More than a context of another process of one's own takes.
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
        num_gpus: their number according to the driver, less those that are hidden.
        visible: `CUDA_VISIBLE_DEVICES`; None where it is not set.
        driver: version of NVIDIA's driver; empty where it is not known.
        libraries: what `pipekit.deepspeed.library_facts` has told.
    """
    if not num_gpus:
        hidden = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible!r}"
        if driver:
            return [
                Row(
                    "GPUs",
                    "warning",
                    f"none is visible{hidden}, though NVIDIA's driver {driver} is loaded",
                    "Unset or correct CUDA_VISIBLE_DEVICES; in a container, start it with --gpus all.",
                )
            ]
        return [Row("GPUs", "ok", f"none{hidden}; runs compute on the CPU")]
    if "gpus" not in libraries:
        return []  # torch cannot be imported, which has a row of its own
    gpus: Sequence[Mapping[str, Any]] = libraries["gpus"]
    with_driver = f", driver {driver}" if driver else ""
    if libraries.get("cuda") is None and libraries.get("hip") is None:
        advice = "Install a build of torch for them; pytorch.org has the command."
        return [Row("GPUs", "bad", f"{num_gpus}{with_driver}, but torch is a build for CPUs", advice)]
    built = f"torch built for CUDA {libraries['cuda']}" if libraries.get("cuda") else f"ROCm {libraries['hip']}"
    if len(gpus) < num_gpus:
        return [
            Row(
                "GPUs",
                "bad",
                f"{num_gpus}{with_driver}, of which torch sees {len(gpus)} ({built})",
                "See that nvidia-smi works, and that the driver is new enough for that CUDA; dmesg may name a GPU "
                "that has fallen off the bus.",
            )
        ]
    rows = [Row("GPUs", "ok", f"{len(gpus)}{with_driver}, {built}")]
    return rows + [_judge_gpu(index, gpu, libraries["architectures"]) for index, gpu in enumerate(gpus)]


def can_run(capability: Sequence[int], architectures: Sequence[str]) -> bool:
    """True if a build of torch for these architectures runs on a GPU of this capability.

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
        advice = "End other processes on it, which nvidia-smi shows; or leave it out with CUDA_VISIBLE_DEVICES."
        return Row(name, "bad", f"cannot compute: {gpu['error']}", advice)
    total, free = gpu["memory_bytes"], gpu["free_bytes"]
    text = f"{gpu['name']}, {total / 1e9:.0f} GB"
    cuda_architectures = [each for each in architectures if each.startswith(("sm_", "compute_"))]
    if cuda_architectures and not can_run(gpu["capability"], cuda_architectures):
        version = ".".join(map(str, gpu["capability"]))
        advice = "Install a build of torch for it; pytorch.org has the command."
        return Row(name, "bad", f"{text}: torch is not built for its compute capability {version}", advice)
    if total - free > _USED_SHARE * total:
        advice = "nvidia-smi shows by whom; end them, or choose other GPUs with CUDA_VISIBLE_DEVICES."
        return Row(name, "warning", f"{text}, of which {(total - free) / 1e9:.0f} GB are in use", advice)
    return Row(name, "ok", text, measured={"memory_bytes": total, "free_bytes": free})
