"""Facts about a host that must be the same on all hosts of a run: versions, code and configuration."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pipekit.errors import LaunchError

if TYPE_CHECKING:
    from pipekit.config import Config
    from pipekit.config.trial_config import TrialConfig

CLOCK_LIMIT_S = 5.0
"""Clocks that are further apart cause a warning."""

_PACKAGES = ("pipekit", "torch", "deepspeed")
_OUR_CODE = ("pipekit", "pipekit.models", "pipekit.partitioners")


def host_facts(command: str, arguments: Sequence[str]) -> dict[str, str]:
    """Facts about this host, by what they are about: what the other hosts of the run must have, too.

    Args:
        command: "train", the path of a script, or a module of pipekit's as `-m MODULE`.
        arguments: of the command: a configuration and overrides, or those of the script.

    Raises:
        PipekitError: if the configuration or the script cannot be read here.
    """
    facts = {"the version of Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            facts[f"the version of {package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[f"the version of {package}"] = "(not installed)"
    facts["the code of pipekit"] = _hash_files(file for name in _OUR_CODE for file in _files_of(name))
    if command.startswith("-m "):
        return facts
    if command != "train":
        script = Path(command)
        if not script.is_file():
            raise LaunchError(f"{script}: no such file; give the path of a Python script")
        return facts | {f"the script {command}": _hash_files([script])}
    config = load_any_config(arguments)
    facts |= configuration_facts(config)
    for name in _own_modules(config):
        # A package is sent about as a whole; the other modules that a single file imports are not known.
        files = list(_files_of(name.partition(".")[0]))
        facts[f"the code of {name}"] = _hash_files(files) if files else "(no such module)"
    return facts


def load_any_config(arguments: Sequence[str]) -> Config | TrialConfig:
    """The configuration that `pipekit train` would take from these arguments: of a run, or of a trial.

    Raises:
        PipekitError: if it is wrong.
    """
    from pipekit.config import load_config
    from pipekit.config.trial_config import load_trial_config, names_trial

    if not arguments:
        raise LaunchError("train: give the YAML file of the run, as in train config.yaml train.steps=20")
    path, *overrides = arguments
    return load_trial_config(path, overrides) if names_trial(path) else load_config(path, overrides)


def configuration_facts(config: Config | TrialConfig) -> dict[str, str]:
    """The fact of a configuration, whatever file and overrides it comes from."""
    return {"the configuration": hashlib.blake2b(config.model_dump_json().encode(), digest_size=16).hexdigest()}


def check_same(facts: Mapping[str, Mapping[str, str]]) -> None:
    """Check that all hosts have the same facts; `facts` are those of each host by its name.

    Raises:
        LaunchError: if a host differs from most others; it names the host and what differs.
    """
    for topic in dict.fromkeys(topic for of_host in facts.values() for topic in of_host):
        values = {host: of_host[topic] for host, of_host in facts.items() if topic in of_host}
        usual = Counter(values.values()).most_common(1)[0][0]
        other = next(host for host, value in values.items() if value == usual)
        odd = [host for host, value in values.items() if value != usual]
        if not odd:
            continue
        is_version = topic.startswith("the version")
        shown = f" ({values[odd[0]]} and {usual})" if is_version or "(" in values[odd[0]] + usual else ""
        more = f", and so {'does' if len(odd) == 2 else 'do'} {' and '.join(odd[1:])}" if len(odd) > 1 else ""
        remedy = "install the same on all hosts" if is_version else "copy it to all hosts, or share the folder"
        raise LaunchError(f"{odd[0]}: {topic} differs from that of {other}{shown}{more}; {remedy}")


def _own_modules(config: Config | TrialConfig) -> list[str]:
    """Modules of the user's own that a configuration names."""
    if hasattr(config, "trial"):
        named = [config.trial]
    else:
        named = [config.run.trial, *(getattr(config.model, key, None) for key in ("builder", "hf_names", "hf_config"))]
    modules = [name.partition(":")[0] for name in named if isinstance(name, str)]
    return [name for name in dict.fromkeys(modules) if name.partition(".")[0] != "pipekit"]


def _files_of(name: str) -> Iterator[Path]:
    """The files of a module or a package, without importing it."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return
    if spec is None:
        return
    if spec.submodule_search_locations is None:
        if spec.origin is not None and Path(spec.origin).is_file() and spec.name not in sys.stdlib_module_names:
            yield Path(spec.origin)
        return
    for folder in spec.submodule_search_locations:
        yield from sorted(Path(folder).rglob("*.py"))


def _hash_files(files: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(file.name.encode() + b"\0" + hashlib.blake2b(file.read_bytes()).digest())
    return digest.hexdigest()
