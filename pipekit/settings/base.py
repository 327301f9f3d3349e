"""Base class of the configuration's sections, and faults: the mistakes in a configuration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from pipekit.errors import ConfigError

_MAX_SHOWN = 80


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys and converts no types.

    The docstring under each field is its help text: it becomes the description in the JSON schema.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @classmethod
    def missing_remedy(cls, keys: Sequence[str]) -> str | None:
        """Text to type instead where required keys are missing; None gives an example of each."""
        return None

    @classmethod
    def unknown_key_remedy(cls, key: str) -> str | None:
        """Text to type instead of a key that the section does not have; None suggests similar ones."""
        return None


def switch(section: type[Section]) -> BeforeValidator:
    """Validator of a key that takes the settings of a section, `true` for its defaults, or `false` for None."""

    def read(value: Any) -> Any:
        if not isinstance(value, (bool, dict, section, type(None))):
            raise ValueError(f"must be true, false, or a mapping of {', '.join(section.model_fields)}")
        return {} if value is True else None if value is False else value

    return BeforeValidator(read, json_schema_input_type=bool | section | None)


@dataclass(frozen=True)
class Fault:
    """One mistake in a configuration.

    `message` has the key and its value, the rule, and what to type instead.
    """

    key: tuple[str, ...]
    message: str
    partners: tuple[tuple[str, ...], ...] = ()


def rule_fault(keys: str, message: str) -> Fault:
    """Return the fault of keys that contradict each other, written with dots and separated by spaces.

    The first comes first; where only another was given, the fault is shown at that one.
    """
    key, *partners = (tuple(key.split(".")) for key in keys.split())
    return Fault(key=key, message=message, partners=tuple(partners))


def config_error(lines: Iterable[str]) -> ConfigError:
    """Return one error that shows every line; a single line stands alone."""
    lines = list(lines)
    heading = [] if len(lines) == 1 else [f"{len(lines)} mistakes in the configuration:"]
    return ConfigError("\n  ".join([*heading, *lines]))


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
        return value if value and not any(character.isspace() for character in value) else repr(value)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_typed(item)}' for key, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_typed, value))}]"
    return str(value)
