"""Data sources: the formats of text and token ids that `data.source` names, a file for each, told by their content.

A new format is a new file here, with a subclass of `TextFormat`, `RecordFormat` or `TokenFormat` (see `formats.py`)
whose instance it assigns to `FORMAT`.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipekit.data.sources.formats import SourceFormat


@cache
def find_formats() -> tuple[SourceFormat, ...]:
    """All formats; those that are told by less of their content come last."""
    modules = [import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    found = [module.FORMAT for module in modules if hasattr(module, "FORMAT")]
    return tuple(sorted(found, key=lambda format: format.vagueness))
