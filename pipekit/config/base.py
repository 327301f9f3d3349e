"""What every section of the configuration has in common, and the shape of a fault."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from pipekit.errors import ConfigError


class Section(BaseModel):
    """A frozen group of settings: unknown keys are refused, and types are taken at their word.

    The docstring under each field is its help text: it becomes the description in the JSON schema.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


@dataclass(frozen=True)
class Fault:
    """One mistake in a configuration.

    Args:
        key: path of the key to change first, such as `("train", "steps")`.
        message: the key and its value, the rule, and what to type instead.
    """

    key: tuple[str, ...]
    message: str


def dotted_fault(key: str, message: str) -> Fault:
    """Return the fault of the key written with dots."""
    return Fault(key=tuple(key.split(".")), message=message)


def config_error(lines: Iterable[str]) -> ConfigError:
    """Return one error that shows every line; a single line stands alone."""
    lines = list(lines)
    if len(lines) == 1:
        return ConfigError(lines[0])
    return ConfigError("\n  ".join([f"{len(lines)} mistakes in the configuration:", *lines]))


def alternatives(words: Iterable[object], last: str = "or") -> str:
    """Return words as a list in prose.

    Example:
        >>> alternatives([1, 2, 4])
        '1, 2 or 4'
    """
    texts = [str(word) for word in words]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} {last} {texts[-1]}"
