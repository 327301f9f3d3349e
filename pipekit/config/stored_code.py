"""Code that a stored configuration names, such as `model.builder`: it is imported only where the user says so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipekit.config.load import read_draft
from pipekit.errors import ConfigError
from pipekit.optimizers.learning_rates import schedule_name
from pipekit.optimizers.table import optimizer_name
from pipekit.settings.base import show

_BESIDE = ("manifest.json", "plan.json", "checkpoints", "metrics.jsonl")


def check_stored_code(path: str | Path, overrides: Iterable[str] = (), *, trust_code: bool) -> None:
    """Check that a configuration names no code that came with a run or a checkpoint, unless that is trusted.

    A file that the user has written is the user's own. One that lies in the folder of a run or a checkpoint was written
    by a run, perhaps of somebody else, as were the weights beside it.

    Args:
        path: the YAML file.
        overrides: the changes on the command line; code that they name is the user's own.
        trust_code: whether the code may run.

    Raises:
        ConfigError: if it names code, or cannot be read.
    """
    if trust_code or not is_stored(Path(path)):
        return
    draft = read_draft(path, overrides)
    for key, value in _named_code(draft.values):
        place = draft.place_of(key)
        if place.override is None:
            raise ConfigError(
                f"{place.label}: {'.'.join(key)}={show(value)} is code that a stored configuration names, which is not "
                "run unasked; add --trust-code if you know where the folder comes from"
            )


def is_stored(path: Path) -> bool:
    """True if a file is the configuration in the folder of a run or a checkpoint."""
    return path.name == "config.yaml" and any((path.parent / name).exists() for name in _BESIDE)


def _named_code(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    model, run = values.get("model"), values.get("run")
    if isinstance(model, str):
        yield ("model",), model
    named: dict[tuple[str, ...], Any] = {("trial",): values.get("trial")}
    if isinstance(run, dict):
        named["run", "trial"] = run.get("trial")
    if isinstance(model, dict):
        named |= {("model", key): model.get(key) for key in ("builder", "hf_names", "hf_config")}
    for section, find in {"optimizer": optimizer_name, "scheduler": schedule_name}.items():
        settings = values.get(section)
        kind = settings.get("type") if isinstance(settings, dict) else None
        named[section, "type"] = kind if isinstance(kind, str) and find(kind) is None else None
    yield from ((key, value) for key, value in named.items() if value is not None)
