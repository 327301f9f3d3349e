"""Reading a configuration: a YAML file, changes from the command line, or a dict.

All mistakes are found before any is reported. Each is shown with its file and line, or with its command-line argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipekit.config.deepspeed_json import read_deepspeed_json
from pipekit.config.deepspeed_section import take_over_deepspeed
from pipekit.config.length_rules import LENGTH_KEYS
from pipekit.config.rules import check_rules
from pipekit.config.schema import Config
from pipekit.errors import ConfigError, printable
from pipekit.files import read_regular
from pipekit.models import family_of, find_families, preset_families
from pipekit.models.custom import CustomModelConfig
from pipekit.models.family import ModelFamily
from pipekit.models.imported import read_hf_folder
from pipekit.settings.base import Fault, Section, alternatives, check_path, config_error, show
from pipekit.settings.faults import nested_keys, section_faults, unknown_key_fault
from pipekit.settings.suggest import closest, suggest_key
from pipekit.settings.yaml_source import read_yaml

KeyPath = tuple[str, ...]

ModelConfigSource = Config | ModelFamily | Mapping[str, Any] | str | Path
"""Description of an existing model; see `load_model_config`."""

_EXAMPLES = {"model": "{preset: tiny}", "train": "{steps: 300}", "deepspeed": "{wall_clock_breakdown: true}"}
_MAX_BYTES = 2_000_000  # every key written out takes some thousands
_BUILDER = "my_package.my_model:build_layers"


@dataclass(frozen=True)
class _Place:
    """Place where a value was given: file and line, or the command line."""

    label: str
    line: int = 0
    override: str | None = None


class Draft:
    """A configuration that is not checked yet: plain values, and the place of each key."""

    def __init__(self, label: str = "") -> None:
        self.label = label
        self.values: dict[str, Any] = {}
        self.places: dict[KeyPath, _Place] = {}
        self.faults: list[tuple[_Place, str]] = []
        self.unread_lines: set[int] = set()

    @property
    def is_full(self) -> bool:
        """True if there are more faults than can be shown; then no more remedies are searched for."""
        return len(self.faults) > 100

    def place_of(self, key: KeyPath) -> _Place:
        """Return the place of a key, or of the nearest key above it."""
        above = (key[:length] for length in range(len(key), 0, -1))
        return next((self.places[known] for known in above if known in self.places), _Place(self.label))

    def get(self, key: KeyPath) -> Any:
        """Return the value of a key, or None."""
        node: Any = self.values
        for part in key:
            if node is self.values:
                node = _written_out(part, node.get(part))
            else:
                node = node.get(part) if isinstance(node, dict) else None
        return node

    def label_as(self, section: str, label: str) -> None:
        """Show the faults of a section under the separate file that holds its values."""
        self.places[(section,)] = _Place(label)

    def add(self, fault: Fault) -> None:
        """Add a fault at the place of its key."""
        given = [key for key in (fault.key, *fault.partners) if key in self.places]
        place = self.place_of(given[0] if given else fault.key)
        if place.override is None and place.line in self.unread_lines:
            return  # The line has no value that could be read, and has a fault already.
        message = fault.message
        dotted = ".".join(fault.key)
        if place.override and place.override.startswith(f"{dotted}=") and message.startswith(f"{dotted}: "):
            message = place.override + message.removeprefix(dotted)
        self.faults.append((place, message))

    def set(self, key: KeyPath, value: Any, place: _Place) -> None:
        """Set the value of a key; a number in the key is a position in a list."""
        node: Any = self.values
        for depth, part in enumerate(key[:-1], start=1):
            at = _position(node, part)
            below = node[at] if isinstance(node, list) else node.get(part)
            if depth == 1:
                below = _written_out(part, below)
            if not isinstance(below, (dict, list)) or (
                isinstance(below, list) and _position(below, key[depth]) is None
            ):
                below = {}
                self.places[key[:depth]] = place
            node[at] = below = below.copy()
            node = below
        if key[0] == "train" and key[-1] in LENGTH_KEYS and len(key) == 2 and value is not None:
            # It takes the place of what the file, or the configuration before, says in another unit.
            for other in LENGTH_KEYS:
                if other != key[-1] and self.place_of(("train", other)).override is None:
                    node.pop(other, None)
        node[_position(node, key[-1])] = value
        self.places = {known: at for known, at in self.places.items() if known[: len(key)] != key}
        self.places[key] = place

    def error(self) -> ConfigError:
        """Return one error that shows all faults, in the order of the file."""
        ordered = sorted(self.faults, key=lambda fault: (fault[0].override is not None, fault[0].line))
        lines = (f"{place.label}: {message}" if place.label else message for place, message in ordered)
        return config_error(dict.fromkeys(lines))


def _position(node: dict[str, Any] | list[Any], part: str) -> Any:
    """`part` as an index of `node`; None where that is a list without such a position."""
    if isinstance(node, dict):
        return part
    return int(part) if part.isdecimal() and int(part) < len(node) else None


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Load a configuration from a YAML file.

    Paths in the file are relative to the working directory, not to the file. `run.dir` defaults to
    `runs/<name of the file>`.

    `overrides` are changes such as `"train.steps=20"`; their values are read as YAML and applied in order.

    Raises:
        ConfigError: if there are mistakes; it lists all of them, each with its place.
    """
    return _finish(read_draft(path, overrides), default_dir=f"runs/{Path(path).stem}")


def parse_config(values: Config | Mapping[str, Any], overrides: Iterable[str] = ()) -> Config:
    """Parse a configuration from a nested dict with the keys of a YAML file; `overrides` are as in `load_config`.

    Raises:
        ConfigError: if there are mistakes; it lists all of them.

    Example:
        >>> parse_config({"model": {"preset": "tiny"}, "train": {"steps": 300}}).model.hidden_size
        128
    """
    draft = Draft()
    if isinstance(values, Config):
        values = {**values.model_dump(), "model": values.model.given()}
    draft.values = {
        name: section.model_dump() if isinstance(section, Section) else section for name, section in values.items()
    }
    for override in overrides:
        apply_override(draft, override)
    return _finish(draft, default_dir=None)


def load_model_config(source: ModelConfigSource) -> Config:
    """Load a configuration whose `model` section describes an existing model.

    No other section is needed, except `train.sequence_length` for a model of your own; for a family, the default is the
    model's longest sequence.

    Args:
        source: the path of a YAML file, its content as a nested dict, the settings of a family such as
            `GPT2Config(preset="gpt2")`, or a whole configuration.

    Raises:
        ConfigError: if there are mistakes; it lists all of them, each with its place.

    Example:
        >>> load_model_config({"model": {"preset": "tiny"}}).train.sequence_length
        256
    """
    if isinstance(source, Config):
        return source
    draft = Draft("" if isinstance(source, (ModelFamily, Mapping)) else str(source))
    if isinstance(source, ModelFamily):
        draft.values = {"model": source.model_dump()}
    elif isinstance(source, Mapping):
        draft.values = {
            key: value.model_dump() if isinstance(value, Section) else value for key, value in source.items()
        }
    else:
        read_file(draft, Path(source))
    train = draft.values.get("train") or {}
    is_length_known = not isinstance(train, dict) or "sequence_length" in train
    if isinstance(train, dict):
        draft.values["train"] = {"steps": 1, "sequence_length": 1, **train}
    config = _finish(draft, default_dir=None)
    if is_length_known:
        return config
    if config.model.longest_sequence is None:
        where = f"{draft.label}: " if draft.label else ""
        raise ConfigError(
            f"{where}train.sequence_length: missing, and {config.model.description} does not tell how long a sequence "
            "may be; for example train: {sequence_length: 1024}"
        )
    return update_config(config, {"train.sequence_length": config.model.longest_sequence})


def load_stored_config(path: Path) -> Config | None:
    """Return the configuration that a checkpoint holds, or None if none describes its model.

    A user's training loop stores there its `layers` or its `module`, its DeepSpeed settings, and the sections that
    describe its model, if it was given any.

    Raises:
        ConfigError: if it cannot be read.
    """
    draft = Draft(str(path))
    read_file(draft, path)
    if not {"layers", "module"}.isdisjoint(draft.values):
        if "model" not in draft.values:
            return None
        others = ("layers", "module", "deepspeed")
        draft.values = {key: value for key, value in draft.values.items() if key not in others}
    return _finish(draft, default_dir=f"runs/{path.stem}")


def update_config(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return `config.updated(changes)`; see there."""
    draft = Draft()
    draft.values = {**config.model_dump(), "model": config.model.given()}
    for key, value in changes.items():
        draft.set(tuple(key.split(".")), value, _Place(""))
    return _finish(draft, default_dir=None)


def section_keys() -> dict[str, list[str]]:
    """Return the keys of every section, by the section's dotted path; the empty path holds the sections."""
    models: list[type[Section]] = [*find_families().values(), CustomModelConfig]
    keys = {"": list(Config.model_fields)}
    for name, field in Config.model_fields.items():
        if name != "deepspeed":
            section: Any = field.annotation
            keys |= nested_keys(name, section) if name != "model" else {}
    return keys | {"model": list(dict.fromkeys(key for section in models for key in section.model_fields))}


def read_draft(path: str | Path, overrides: Iterable[str]) -> Draft:
    """Return the unchecked values of a YAML file, changed by overrides."""
    draft = Draft(str(path))
    read_file(draft, Path(path))
    for override in overrides:
        apply_override(draft, override)
    return draft


def read_file(draft: Draft, path: Path) -> None:
    """Read the values of a YAML file into a draft. Raises a ConfigError if the file does not hold a mapping."""
    source = read_yaml(read_config_text(path))
    for line, message in source.faults:
        label = f"{path}:{line}" if line else str(path)
        draft.faults.append((_Place(label, line or 0), message))
    if draft.faults and source.value is None:
        raise draft.error()
    if not isinstance(source.value, dict):
        fault = "is empty" if source.value is None else f"must be a mapping of sections, not {show(source.value)}"
        raise ConfigError(f"{path}: {fault}; it needs at least\n  model: {{preset: tiny}}\n  train: {{steps: 300}}")
    draft.unread_lines = {line for line, _ in source.faults if line}
    draft.values = source.value
    draft.places = {key: _Place(f"{path}:{line}", line) for key, line in source.lines.items()}
    if controls := list(_find_controls(source.value)):
        for control in controls:
            draft.add(control)
        raise draft.error()


def _find_controls(value: Any, key: KeyPath = ()) -> Iterator[Fault]:
    """Faults of texts with control characters, which a terminal would not show as they are."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _find_controls(name, (*key, name))
            yield from _find_controls(item, (*key, name))
    elif isinstance(value, list):
        for item in value:
            yield from _find_controls(item, key)
    elif isinstance(value, str) and printable(value) != value:
        dotted = ".".join(key)
        yield Fault(key, f"{dotted}: holds a control character, in {show(value)}; retype it")


def read_config_text(path: Path) -> str:
    """Return the text of a YAML file. Raises a ConfigError if it is missing or too large for a configuration."""
    try:
        return read_regular(path, max_bytes=_MAX_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_nearby(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, not a YAML file{_nearby(path / 'config.yaml')}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; a configuration is a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; a configuration is a YAML file") from None


def _nearby(path: Path) -> str:
    """Return a suggestion of YAML files close by, for a path that does not exist."""
    folder = path.parent
    if not folder.is_dir():
        return f"; the folder {folder} does not exist either"
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml"))
    match = closest(path.name, names)
    if match:
        return f"; did you mean '{folder / match}'?"
    if names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        return f"; the YAML files of {folder} are {shown}"
    return f"; {folder} holds no YAML files"


def apply_override(draft: Draft, override: str) -> None:
    """Change one value of a draft by a text such as "train.steps=20"."""
    place = _Place("command line", override=override)
    dotted, equals, text = override.partition("=")
    key = tuple(dotted.strip().split("."))
    if not equals or not all(key):
        draft.faults.append((place, f"{override}: must be section.key=value; for example train.steps=300"))
        return
    source = read_yaml(text)
    if source.faults:
        (_, why), *_ = source.faults
        if why.startswith("not valid YAML"):
            why = f"the value is not valid YAML; try {dotted}='\"...\"', with quotes"
        draft.faults.append((place, f"{override}: {why}"))
        return
    if controls := list(_find_controls(source.value, key)):
        draft.faults += [(place, fault.message) for fault in controls]
        return
    draft.set(key, source.value, place)


def _finish(draft: Draft, *, default_dir: str | None) -> Config:
    if "trial" in draft.values:
        raise ConfigError(
            f"{draft.label or 'the configuration'}: trial={show(draft.values['trial'])}: only pipekit train takes the "
            "configuration of a Trial; of its checkpoints, pipekit export CHECKPOINT/model0 OUT --raw exports an engine"
        )
    keys = section_keys()
    take_over_deepspeed(draft)
    knows_model = _take_over_source(draft)
    sections: dict[str, Any] = {}
    for name in draft.values:
        if name not in Config.model_fields:
            remedy = "" if draft.is_full else f"; {suggest_key(str(name), (), keys)}"
            draft.add(Fault((str(name),), f"{name}: unknown section{remedy}"))
    for name in Config.model_fields:
        section = _check_section(draft, name, keys, default_dir) if name != "model" or knows_model else None
        if section is not None:
            sections[name] = section
    for fault in check_rules(sections):
        draft.add(fault)
    if draft.faults:
        raise draft.error()
    # Every section and every rule has been checked, so that they are not checked again.
    return Config.model_construct(**sections)


def _take_over_source(draft: Draft) -> bool:
    """Take the settings of `family: auto` from the folder that `model.init_from` names, and the tokenizer from it.

    Returns:
        False, after noting why, where the folder does not tell the model, which then cannot be checked.
    """
    model, data = draft.values.get("model"), draft.values.get("data") or {}
    if not isinstance(model, dict) or not isinstance(data, dict):
        return True
    source, is_auto = model.get("init_from"), model.get("family") == "auto"
    if not isinstance(source, str):
        if is_auto:
            message = "model.family=auto: needs the folder of a Hugging Face model, in which it is read"
            draft.add(Fault(("model", "family"), f"{message}; for example model.init_from=downloads/gpt2"))
        return not is_auto
    try:
        folder = Path(check_path(source)).expanduser()
    except ValueError as error:
        draft.add(Fault(("model", "init_from"), f"model.init_from={show(source)}: {error}"))
        return False
    if is_auto:
        try:
            stored = read_hf_folder(folder).model_dump(exclude={"preset"})
        except ConfigError as error:
            draft.add(Fault(("model", "init_from"), f"model.init_from: {error}"))
            return False
        given = {key: value for key, value in model.items() if key != "family"}
        padded = type(given.get("vocab_size")) is int and given["vocab_size"] > stored.get("vocab_size", 0)
        own = {"export_vocab_size": stored.get("vocab_size")} if padded else {}
        draft.values["model"] = {**stored, **own, **given}
    forms = ("tokenizer.json", "tokenizer.model")
    if data.get("tokenizer") is None and any((folder / form).is_file() for form in forms):
        draft.values["data"] = {**data, "tokenizer": str(folder)}
    return True


def _written_out(name: str, values: Any) -> Any:
    """Return a section whose short form, a word in place of the mapping, is replaced by the mapping."""
    if name == "model" and isinstance(values, str):
        return {"builder": values}
    if name == "deepspeed" and isinstance(values, str):
        return read_deepspeed_json(values)
    return {"auto": True} if name == "parallel" and values == "auto" else values


def _check_section(draft: Draft, name: str, keys: dict[str, list[str]], default_dir: str | None) -> Any:
    """Return the checked section, or None after noting what is wrong with it."""
    values = draft.values.get(name)
    if name == "model" and (fault := _model_shape_fault(values)):
        draft.add(fault)
        return None
    values = {} if values is None else _written_out(name, values)
    if not isinstance(values, dict):
        example = _EXAMPLES.get(name) or f"{{{keys[name][0]}: ...}}"
        rule = f"must be a mapping of keys; for example {name}: {example}"
        draft.add(Fault((name,), f"{name}={show(values)}: {rule}"))
        return None
    if name == "deepspeed":
        return values
    section: Any = family_of(values) if name == "model" else Config.model_fields[name].annotation
    keys = {**keys, name: list(section.model_fields)}
    if name == "run" and values.get("dir") is None:
        values = {key: value for key, value in values.items() if key != "dir"}
        values |= {} if default_dir is None else {"dir": default_dir}
    if name == "model" and (fault := _idle_preset(draft, values)):
        draft.add(fault)
    # Unknown keys are set aside, so that what is left can still be checked for everything else.
    for key in values:
        is_retired = key in section.retired_keys and values[key] == section.retired_keys[key]
        if key not in section.model_fields and not is_retired:
            path = (name, str(key))
            draft.add(Fault(path, f"{name}.{key}") if draft.is_full else unknown_key_fault(section, path, keys))
    values = {key: value for key, value in values.items() if key in section.model_fields}
    try:
        return section.model_validate(values)
    except ValidationError as error:
        for fault in section_faults(name, section, values, error, keys):
            draft.add(fault)
        return None


def _model_shape_fault(values: object) -> Fault | None:
    """Fault of a model section that no class reads; None where one does."""
    key = ("model",)
    if values is None:
        return Fault(key, f"model: missing; for example model: {_EXAMPLES['model']}, or model: {_BUILDER}")
    if isinstance(values, str) and ":" not in values:
        preset = closest(values, preset_families()) or "tiny"
        rule = "must be a mapping, or package.module:function"
        return Fault(key, f"model={show(values)}: {rule}; for a preset write model: {{preset: {preset}}}")
    family, families = values.get("family") if isinstance(values, dict) else None, find_families()
    if family is not None and family not in families:
        near = closest(str(family), families)
        hint = f"; did you mean {near}?" if near else ""
        return Fault((*key, "family"), f"model.family={show(family)}: must be {alternatives(families)}{hint}")
    return None


def _idle_preset(draft: Draft, values: dict[str, Any]) -> Fault | None:
    """Return a fault where a preset from the command line changes nothing, since every size is given."""
    key = ("model", "preset")
    if draft.place_of(key).override is None:
        return None
    family = preset_families().get(str(values.get("preset")))
    sizes = list(family.presets[values["preset"]]) if family else []
    if not sizes or not all(size in values and draft.place_of(("model", size)).override is None for size in sizes):
        return None
    given = alternatives((f"model.{size}" for size in sizes), last="and")
    why = f"changes nothing, since {draft.label or 'the configuration'} gives {given}"
    remedy = "remove them there, or change them one by one"
    return Fault(key, f"model.preset={show(values['preset'])}: {why}; {remedy}")
