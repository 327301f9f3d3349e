"""Reading YAML with the line of every key, and writing YAML.

Numbers and switches follow YAML 1.2: `3e-4` is a number, `on` and `no` are words, and a date stays text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from pipekit.errors import printable

_MAX_DEPTH = 100
_MAX_NODES = 100_000
_MAX_DIGITS = 100

Path = tuple[str, ...]

_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_RESOLVERS: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("null", re.compile(r"~|null|Null|NULL|"), "~nN\0"),
    ("int", re.compile(r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+"), "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("merge", re.compile(r"<<"), "<"),
)

_COLLECTION_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq")}
_SCALAR_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "bool", "null", "int", "float", "merge")}


class _TooMuchError(yaml.MarkedYAMLError):
    """A text with more values, or deeper ones, than a configuration has."""

    def __init__(self, problem: str, mark: yaml.Mark) -> None:
        super().__init__(None, None, problem, mark)


class YamlLoader(yaml.SafeLoader):
    """A safe loader that reads plain words as in YAML 1.2, and refuses texts that are absurdly nested or long."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own name

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.num_nodes = 0
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose one node, and count it."""
        mark: yaml.Mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        self.count_node(mark, "the text has")
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _TooMuchError(f"values nested more than {_MAX_DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def count_node(self, mark: yaml.Mark, what: str) -> None:
        """Count a value. Raises a YAML error if there are absurdly many; `what` begins the message."""
        self.num_nodes += 1
        if self.num_nodes > _MAX_NODES:
            raise _TooMuchError(f"{what} more than {_MAX_NODES:,} values", mark)


class YamlDumper(yaml.SafeDumper):
    """A safe writer that quotes every text that a YAML 1.1 or 1.2 reader would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write repeated values out, without anchors."""
        return True


for _tag, _pattern, _first in _RESOLVERS:
    _whole = re.compile(f"(?:{_pattern.pattern})$")
    _characters = ["" if character == "\0" else character for character in _first]
    YamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, _characters)
    YamlDumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, _characters)


def _construct_int(loader: YamlLoader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "").lower()
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} characters, and none here has more than {_MAX_DIGITS}")
    try:
        return int(text, 0) if "x" in text or "o" in text else int(text)
    except ValueError:
        raise ValueError("is no whole number") from None


def _construct_float(loader: YamlLoader, node: yaml.ScalarNode) -> float:
    text = node.value.replace("_", "").lower()
    try:
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        raise ValueError("is no number") from None


def _construct_bool(loader: YamlLoader, node: yaml.ScalarNode) -> bool:
    if node.value.lower() not in ("true", "false"):
        raise ValueError("is neither true nor false")
    return bool(node.value.lower() == "true")


def _represent_sequence(dumper: YamlDumper, value: list[Any] | tuple[Any, ...]) -> yaml.Node:
    flow = all(not isinstance(item, (dict, list, tuple)) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=flow)


YamlLoader.add_constructor("tag:yaml.org,2002:bool", _construct_bool)
YamlLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
YamlLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)
YamlDumper.add_representer(list, _represent_sequence)
YamlDumper.add_representer(tuple, _represent_sequence)


@dataclass
class YamlSource:
    """Value of a YAML text, with the line of every key."""

    value: Any = None
    """The plain value: dicts with string keys, lists, numbers, text, None."""

    lines: dict[Path, int] = field(default_factory=dict)
    """The line, counted from 1, of every key of a mapping."""

    faults: list[tuple[int | None, str]] = field(default_factory=list)
    """Mistakes in the text, each with its line where that is known."""


def read_yaml(text: str) -> YamlSource:
    """Parse a YAML text into its value and the line of every key.

    Example:
        >>> source = read_yaml("train:\\n  steps: 300\\n")
        >>> source.value, source.lines["train", "steps"]
        ({'train': {'steps': 300}}, 2)
    """
    source = YamlSource()
    try:
        loader = YamlLoader(text)
        node = loader.get_single_node()
        if node is not None:
            # Aliases stand for values that are counted wherever they are written out.
            loader.num_nodes = 0
            source.value = _construct(loader, node, (), source, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        source.faults.append((mark.line + 1 if mark else None, _syntax_message(error)))
    except yaml.YAMLError as error:  # a control character; the reader gives its position, not its line
        position = getattr(error, "position", None)
        line = text.count("\n", 0, position) + 1 if isinstance(position, int) else None
        source.faults.append((line, "not valid YAML: a control character; retype the line"))
    return source


def write_yaml(value: Any) -> str:
    """Return a value as YAML that `read_yaml` reads back to the same value.

    Raises:
        yaml.YAMLError: if a part of it is neither a dict, a list, a number, text, nor None.
    """
    text: str = yaml.dump(value, Dumper=YamlDumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def _construct(
    loader: YamlLoader, node: yaml.Node, path: Path, source: YamlSource, above: tuple[yaml.Node, ...]
) -> Any:
    loader.count_node(node.start_mark, "with its aliases written out, the text has")
    if node in above:
        source.faults.append((node.start_mark.line + 1, "an alias that contains itself; write the value out"))
        return None
    above = (*above, node)
    if node.tag not in (_SCALAR_TAGS if isinstance(node, yaml.ScalarNode) else _COLLECTION_TAGS):
        source.faults.append((node.start_mark.line + 1, f"the tag {node.tag} is not read here; remove it"))
        return None
    if isinstance(node, yaml.MappingNode):
        return _construct_mapping(loader, node, path, source, above)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*path, str(index)), source, above) for index, item in enumerate(node.value)]
    try:
        return loader.construct_object(node)
    except ValueError as error:
        shown = node.value if len(node.value) <= _MAX_DIGITS else f"{node.value[:20]}..."
        source.faults.append((node.start_mark.line + 1, f"{printable(shown)!r}: {error}"))
        return None


def _construct_mapping(
    loader: YamlLoader, node: yaml.MappingNode, path: Path, source: YamlSource, above: tuple[yaml.Node, ...]
) -> dict[str, Any]:
    own: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            source.faults.append((line, "a list or mapping stands where a key should; write key: value"))
            continue
        if key_node.tag == "tag:yaml.org,2002:merge":
            parts = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            for part in parts:
                extra = _construct(loader, part, path, source, above)
                merged = {**extra, **merged} if isinstance(extra, dict) else merged
            continue
        key = key_node.value
        here = (*path, key)
        if key in own:
            rule = f"given twice, first in line {source.lines[here]}; remove one of them"
            source.faults.append((line, f"{'.'.join(here)}: {rule}"))
            continue
        own[key] = _construct(loader, value_node, here, source, above)
        source.lines[here] = line
    return {**merged, **own}


def _syntax_message(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "cannot be read"
    if isinstance(error, _TooMuchError):
        return f"{problem}, which no configuration needs"
    if "'\\t'" in problem:
        return "not valid YAML: a tab; indent with spaces"
    if "mapping values are not allowed" in problem:
        return "not valid YAML: a second ':' in the line, or a wrong indentation; write one 'key: value' a line"
    if "but found another document" in problem:
        return "not valid YAML here: a second document begins; keep one document a file"
    context = f" ({error.context})" if error.context and error.problem else ""
    return f"not valid YAML: {problem}{context}"
