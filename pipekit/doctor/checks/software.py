"""Python, pipekit, torch, DeepSpeed, and communication backends."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Mapping
from typing import Any

from pipekit.doctor.rows import Row, Site

_NAMES = ("torch", "deepspeed")


def check_versions(site: Site) -> list[Row]:
    """Versions of Python, pipekit, torch and DeepSpeed."""
    versions: dict[str, str | None] = {}
    for name in ("pipekit", *_NAMES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    try:
        required = importlib.metadata.requires("pipekit") or []
    except importlib.metadata.PackageNotFoundError:
        required = []
    return judge_versions(platform.python_version(), versions, required, site.libraries)


def check_backends(site: Site) -> list[Row]:
    """Backends for communication between ranks."""
    return judge_backends(site.libraries, site.num_gpus)


def judge_versions(
    python: str, versions: Mapping[str, str | None], required: list[str], libraries: Mapping[str, Any]
) -> list[Row]:
    """Rows of versions.

    Args:
        python: version of Python.
        versions: versions of packages by name; None if a package is not installed.
        required: requirements of pipekit, such as "torch<2.14,>=2.6".
        libraries: output of `pipekit.deepspeed.library_facts`.
    """
    rows = [
        Row("Python", "ok", python)
        if _parts(python) >= (3, 10)
        else Row("Python", "bad", f"{python} is too old", "Install Python 3.10 or later.")
    ]
    if versions.get("pipekit") is None:
        rows.append(Row("pipekit", "warning", "runs from its source without being installed", "Type: pip install -e ."))
    else:
        rows.append(Row("pipekit", "ok", f"{versions['pipekit']}"))
    for name in _NAMES:
        version = versions.get(name)
        wanted = next((text for text in required if re.match(rf"{name}\b", text)), name)
        error = libraries.get(f"{name}_error")
        if version is None:
            rows.append(Row(name, "bad", "is not installed", f"Type: pip install '{wanted}'"))
        elif "error" in libraries:
            rows.append(
                Row(name, "bad", f"{version}; {libraries['error']}", f"Type: pip install --force-reinstall {name}")
            )
        elif error is not None:
            advice = (
                f"Type: python -c 'import {name}' to see the whole error. Reinstall it with pip install '{wanted}'."
            )
            rows.append(Row(name, "bad", f"{version} cannot be imported: {error}", advice))
        elif not _satisfies(version, wanted):
            advice = f"Type: pip install '{wanted}'"
            rows.append(Row(name, "warning", f"pipekit is not tested with version {version}", advice))
        else:
            rows.append(Row(name, "ok", version))
    return rows


def judge_backends(libraries: Mapping[str, Any], num_gpus: int | None) -> list[Row]:
    """Rows of gloo, and of NCCL if there are GPUs."""
    if "backends" not in libraries:
        return []
    rows = []
    for name, is_needed in (("gloo", True), ("nccl", bool(num_gpus))):
        title = {"gloo": "gloo", "nccl": "NCCL"}[name]
        if name in libraries["backends"]:
            rows.append(Row(title, "ok", str(libraries.get(name, "present"))))
        elif is_needed:
            rows.append(
                Row(title, "bad", f"this build of torch has no {title}", "Install a build of torch from pytorch.org.")
            )
    return rows


def _satisfies(version: str, requirement: str) -> bool:
    own = _parts(version)
    for operator, text in re.findall(r"(>=|<)\s*([0-9.]+)", requirement):
        bound = _parts(text)
        if (operator == ">=" and own < bound) or (operator == "<" and own >= bound):
            return False
    return True


def _parts(version: str) -> tuple[int, ...]:
    match = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
