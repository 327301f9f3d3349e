"""Base class of configuration sections, and faults: mistakes in a configuration."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from pipekit.errors import ConfigError, printable

_MAX_SHOWN = 80
_MAX_LINES = 10
_MAX_LINE = 400
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 3500  # NAME_MAX and PATH_MAX of Linux, with room for files below a folder


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys and converts no types.

    The docstring under each field is its help text: it becomes the description in the JSON schema.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    retired_keys: ClassVar[Mapping[str, object]] = {}
    """Keys that the section once had, each with the only value that is still accepted because it changes nothing; they
    keep files of earlier runs readable."""

    @classmethod
    def missing_remedy(cls, keys: Sequence[str]) -> str | None:
        """Text to type if required keys are missing; None shows an example of each."""
        return None

    @classmethod
    def unknown_key_remedy(cls, key: str) -> str | None:
        """Text to type instead of a key that the section does not have; None suggests similar keys."""
        return None


@dataclass(frozen=True)
class Rule:
    """Rule of an annotated type, in words for messages."""

    words: str


def switch(section: type[Section]) -> BeforeValidator:
    """Validator of a key that takes a section's settings, `true` for the defaults, or `false` for None."""

    def read(value: Any) -> Any:
        if not isinstance(value, (bool, dict, section, type(None))):
            raise ValueError(f"must be true, false, or a mapping of {', '.join(section.model_fields)}")
        return {} if value is True else None if value is False else value

    return BeforeValidator(read, json_schema_input_type=bool | section | None)


def at_most(limit: float, why: str) -> AfterValidator:
    """Validator that refuses numbers above `limit`, which must be mistakes; `why` ends the message."""

    def check(value: Any) -> Any:
        if value > limit:
            raise ValueError(f"must be at most {limit:,}: {why}")
        return value

    return AfterValidator(check)


def at_least(limit: float, why: str, *, allows_zero: bool = False) -> AfterValidator:
    """Validator that refuses numbers below `limit`, which must be mistakes; 0 may have a special meaning."""

    def check(value: Any) -> Any:
        if value < limit and not (allows_zero and value == 0):
            raise ValueError(f"must be at least {limit:,}: {why}")
        return value

    return AfterValidator(check)


def check_path(text: str) -> str:
    """Return a path unchanged. Raises a ValueError if no file can have it, or if its `~` names an unknown user."""
    if printable(text) != text or "\t" in text or "\n" in text:
        raise ValueError("holds a control character, which no path should; retype it")
    data = text.encode()
    if len(data) > _MAX_PATH_BYTES or any(len(name) > _MAX_NAME_BYTES for name in data.split(b"/")):
        raise ValueError(f"is too long: a path has at most {_MAX_PATH_BYTES:,} bytes, and each name in it 255")
    try:
        Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"there is no user {text.partition('/')[0]}, whose home folder it names") from None
    return text


PathText = Annotated[str, AfterValidator(check_path)]
"""Path of a file or folder, which need not exist; `~` is a home folder."""

FolderText = Annotated[PathText, AfterValidator(os.path.expanduser)]
"""A path whose `~` is replaced by the home folder."""


@dataclass(frozen=True)
class Fault:
    """One mistake in a configuration.

    `message` has the key and its value, the rule, and what to type instead.
    """

    key: tuple[str, ...]
    message: str
    partners: tuple[tuple[str, ...], ...] = ()


def rule_fault(keys: str, message: str) -> Fault:
    """Return the fault of keys that contradict each other; they are dotted and separated by spaces.

    The fault is shown at the first of the keys that was given.
    """
    key, *partners = (tuple(key.split(".")) for key in keys.split())
    return Fault(key=key, message=message, partners=tuple(partners))


def config_error(lines: Iterable[str]) -> ConfigError:
    """Return one error that shows all lines, or only the first ten of many."""
    lines = list(lines)
    heading = [] if len(lines) == 1 else [f"{len(lines):,} mistakes in the configuration:"]
    more = [f"and {len(lines) - _MAX_LINES:,} more"] if len(lines) > _MAX_LINES else []
    return ConfigError("\n  ".join([*heading, *map(_shorten, lines[:_MAX_LINES]), *more]))


def _shorten(line: str) -> str:
    line = printable(line)
    if len(line) <= _MAX_LINE:
        return line
    return f"{line[: _MAX_LINE // 2]} ... {line[-_MAX_LINE // 2 :]}"


def alternatives(words: Iterable[object], last: str = "or") -> str:
    """Return words as a list in prose.

    Example:
        >>> alternatives([1, 2, 4])
        '1, 2 or 4'
    """
    texts = [str(word) for word in words]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} {last} {texts[-1]}"


def show(value: object) -> str:
    """Return a value as one would type it on one line.

    Example:
        >>> show("ten"), show(True), show([1, 2]), show("two words")
        ('ten', 'true', '[1, 2]', "'two words'")
    """
    text = _typed(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def _typed(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        value = value[:_MAX_SHOWN]
        return value if value and value.isprintable() and " " not in value else repr(value)
    if isinstance(value, dict):
        shown = (f"{key}: {_typed(item)}" for key, item in islice(value.items(), _MAX_SHOWN))
        return f"{{{', '.join(shown)}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_typed, value[:_MAX_SHOWN]))}]"
    return str(value)
