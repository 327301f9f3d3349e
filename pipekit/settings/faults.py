"""Messages from pydantic's errors, with the place, the value, the rule, and what to type instead."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pipekit.settings.base import Fault, Rule, Section, alternatives, show
from pipekit.settings.suggest import closest, suggest_key

_SWITCH_WORDS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def section_faults(
    name: str, section: type[Section], values: dict[str, Any], error: ValidationError, keys: dict[str, list[str]]
) -> list[Fault]:
    """Return one fault for each key of section `name` that pydantic refuses; `keys` are for suggestions."""
    faults: dict[tuple[str, ...], Fault] = {}
    missing: list[str] = []
    for detail in error.errors(include_url=False):
        if detail["type"] == "rule":
            ruled = (name, detail["ctx"]["key"])
            faults.setdefault(ruled, Fault(ruled, detail["ctx"]["text"]))
            continue
        path, field, value = _find(section, values, detail["loc"])
        key: tuple[str, ...] = (name, *path)
        if key in faults:
            continue
        if detail["type"] == "missing" and len(detail["loc"]) == len(path):
            if len(path) == 1:
                missing.append(path[-1])
            else:
                faults[key] = _missing_fault(key, field)
        elif detail["type"] == "extra_forbidden":
            faults[key] = unknown_key_fault(section, key, keys)
        else:
            faults[key] = Fault(key, _value_message(key, field, value, detail))
    if ("model", "preset") in faults:
        missing = []  # the preset would have supplied them
    # A list whose entries are wrong is too short, too.
    above = {key[:length] for key in faults for length in range(len(key))}
    return [*_missing_faults(name, section, missing), *(fault for key, fault in faults.items() if key not in above)]


def unknown_key_fault(section: type[Section], key: tuple[str, ...], keys: Mapping[str, Iterable[str]]) -> Fault:
    """Return the fault of a key that its section does not have."""
    remedy = section.unknown_key_remedy(key[-1]) or suggest_key(key[-1], key[:-1], keys)
    return Fault(key, f"{'.'.join(key)}: unknown key; {remedy}")


def rule_of(annotation: Any, constraints: Iterable[Any] = ()) -> str:
    """Return the values that a type with its constraints accepts, in words.

    Example:
        >>> from pydantic import PositiveInt
        >>> rule_of(PositiveInt | Literal["auto"])
        'a whole number greater than 0, or auto'
    """
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *more = get_args(annotation)
        if rules := [each.words for each in more if isinstance(each, Rule)]:
            return rules[0]
        return rule_of(base, [*constraints, *_flatten(more)])
    limits = _limits(constraints)
    if origin in (Union, types.UnionType):
        return ", or ".join(rule_of(part, constraints) for part in get_args(annotation))
    if origin is Literal:
        return alternatives(get_args(annotation))
    if origin is tuple:
        first, *rest = get_args(annotation)
        if rest == [Ellipsis]:
            return f"a list{limits} with every entry {rule_of(first)}"
        return f"a list of {len(rest) + 1}, each {rule_of(first)}"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a mapping"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    words |= {dict: "a mapping", list: "a list"}
    return words.get(annotation if origin is None else origin, "a value") + limits


def nested_section(annotation: Any) -> type[BaseModel] | None:
    """Return the section in a field's type, which may be a union or a list of sections; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(nested_section, get_args(annotation))), None)


def nested_keys(name: str, section: type[BaseModel]) -> dict[str, list[str]]:
    """Return the keys of a section and of those in it, by their dotted paths."""
    keys = {name: list(section.model_fields)}
    for key, field in section.model_fields.items():
        if nested := nested_section(field.annotation):
            keys[f"{name}.{key}"] = list(nested.model_fields)
    return keys


def _flatten(metadata: Iterable[Any]) -> list[Any]:
    return [item for entry in metadata for item in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]


def _limits(constraints: Iterable[Any]) -> str:
    words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    parts = [
        f"{phrase} {limit}"
        for constraint in constraints
        for name, phrase in words.items()
        if (limit := getattr(constraint, name, None)) is not None
    ]
    if any(getattr(constraint, "min_length", None) for constraint in constraints):
        parts.append("that is not empty")
    return f" {' and '.join(parts)}" if parts else ""


def _find(
    section: type[BaseModel], values: Any, location: tuple[int | str, ...]
) -> tuple[tuple[str, ...], FieldInfo | None, Any]:
    """Follow pydantic's location as far as it names keys and positions in a list of sections, not of other values."""
    path: tuple[str, ...] = ()
    field: FieldInfo | None = None
    current: type[BaseModel] | None = section
    for part in location:
        if current is None:
            break
        if isinstance(part, int):
            path, values = (*path, str(part)), values[part] if isinstance(values, (list, tuple)) else None
            continue
        path, field = (*path, part), current.model_fields.get(part)
        values = values.get(part) if isinstance(values, dict) else None
        current = nested_section(field.annotation) if field else None
    return path, field, values


def _missing_faults(name: str, section: type[Section], missing: list[str]) -> list[Fault]:
    if missing and (remedy := section.missing_remedy(missing)):
        missing_keys = alternatives((f"{name}.{key}" for key in missing), last="and")
        return [Fault((name,), f"{missing_keys} {'are' if len(missing) > 1 else 'is'} missing; {remedy}")]
    return [_missing_fault((name, key), section.model_fields[key]) for key in missing]


def _missing_fault(key: tuple[str, ...], field: FieldInfo | None) -> Fault:
    example = "" if field is None else _example(key[-1], field)
    return Fault(key, f"{'.'.join(key)}: missing, and it has no default{example}")


def _value_message(key: tuple[str, ...], field: FieldInfo | None, value: Any, detail: Any) -> str:
    head = f"{'.'.join(key)}={show(value)}"
    if detail["type"] == "value_error":
        return f"{head}: {detail['ctx']['error']}"
    if field is None:
        return f"{head}: {detail['msg']}"
    if key[-1].isdecimal():
        return f"{head}: must be a mapping; for example {key[-2]}: {show(field.examples[0] if field.examples else [])}"
    rule = rule_of(field.annotation, field.metadata)
    return f"{head}: must be {rule}{_hint(key[-1], field, value, rule)}"


def _hint(key: str, field: FieldInfo, value: Any, rule: str) -> str:
    if isinstance(value, str):
        if match := closest(value, map(str, _literals(field.annotation))):
            return f"; did you mean {match}?"
        if "true or false" in rule and value.lower() in _SWITCH_WORDS:
            return f"; did you mean {_SWITCH_WORDS[value.lower()]}?"
        if "number" in rule and _is_number(value):
            return f"; write it without quotes: {key}: {value}"
    elif rule.startswith("text") and isinstance(value, (bool, int, float)):
        return f'; write it in quotes: {key}: "{show(value)}"'
    if isinstance(value, float) and value.is_integer() and value > 0 and "whole number" in rule:
        return f"; write it as {key}: {int(value)}"
    return _example(key, field)


def _example(key: str, field: FieldInfo) -> str:
    if field.examples:
        return f"; for example {key}: {show(field.examples[0])}"
    if field.is_required() or field.default is None:
        return ""
    return f"; for example {key}: {show(field.default)}"


def _literals(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in _literals(part)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
