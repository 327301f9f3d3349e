"""Examination of this machine by all checks."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from types import ModuleType

from pipekit.doctor import checks
from pipekit.doctor.rows import Row, Site

# Order of the families; others follow by name.
_FIRST = ("software", "gpus", "compilers", "machine", "limits", "network", "clock", "storage")


def find_families() -> list[str]:
    """Names of the families of checks, in display order."""
    names = sorted(module.name for module in pkgutil.iter_modules(checks.__path__))
    return sorted(names, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))


def examine(site: Site) -> Iterator[Row]:
    """Yield the findings of every check on this machine as they are made."""
    for family in find_families():
        module = import_module(f"{checks.__name__}.{family}")
        for check in _checks_of(module):
            for row in _rows_of(check, site):
                yield replace(row, family=family)


def _checks_of(module: ModuleType) -> list[Callable[[Site], Sequence[Row]]]:
    own = [value for name, value in vars(module).items() if name.startswith("check_")]
    return [check for check in own if check.__module__ == module.__name__]


def _rows_of(check: Callable[[Site], Sequence[Row]], site: Site) -> Sequence[Row]:
    try:
        return check(site)
    except Exception as error:  # A check can fail on an unusual machine; the others continue.
        name = check.__name__.removeprefix("check_").replace("_", " ")
        return [Row(name, "warning", f"could not be checked: {type(error).__name__}: {error}")]
