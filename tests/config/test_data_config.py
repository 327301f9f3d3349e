"""The `data` section: a source, or a mixture of several, each with its limits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipekit.config import Config, SourceEntry, parse_config
from pipekit.config.data_config import DataConfig
from pipekit.errors import ConfigError
from pipekit.settings.base import show

WEB, CODE = {"name": "web", "source": "data/web"}, {"name": "code", "source": "data/code"}


def read(*overrides: str, **data: Any) -> Config:
    return parse_config({"model": {"preset": "tiny"}, "train": {"steps": 9}, "data": data}, overrides)


def test_a_plain_source_is_one_entry_with_the_settings_of_the_section() -> None:
    data = DataConfig(source="text.jsonl#500", text_key="body", validation="held-out.jsonl")
    (entry,) = data.entries
    assert entry == SourceEntry(
        name="text", source="text.jsonl", limit=500, text_key="body", validation="held-out.jsonl"
    )


def test_entries_of_a_mixture_take_the_field_of_the_section_and_their_limit() -> None:
    data = DataConfig.model_validate(
        {"mixture": [{**WEB, "source": "data/web#7", "text_key": "content"}, {**CODE, "limit": 8}], "text_key": "body"}
    )
    assert [(entry.source, entry.limit, entry.text_key) for entry in data.entries] == [
        ("data/web", 7, "content"),
        ("data/code", 8, "body"),
    ]


def test_every_key_of_an_entry_is_documented_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs/mixtures.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \| ", page, re.MULTILINE))
    assert {key: rows[key].strip("`") for key in SourceEntry.model_fields} == {
        key: "required" if field.is_required() else show(field.default)
        for key, field in SourceEntry.model_fields.items()
    }


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"mixture": [WEB, {**CODE, "wieght": 1}]},
            "data.mixture.1.wieght: unknown key; did you mean 'data.mixture.1.weight'?",
        ),
        (
            {"mixture": [{"name": "web"}]},
            "data.mixture.0.source: missing, and it has no default; for example source: data/web",
        ),
        (
            {"mixture": [{**WEB, "weight": -1}]},
            "data.mixture.0.weight=-1: must be a number at least 0, or auto; for example weight: 0.7",
        ),
        (
            {"mixture": [{**WEB, "name": "a/b"}]},
            "data.mixture.0.name=a/b: must be at most 50 letters, digits, dots, dashes and underscores; "
            "for example web",
        ),
        (
            {"mixture": ["data/web"]},
            "data.mixture.0=data/web: must be a mapping; for example mixture: "
            "[{name: web, source: data/web}, {name: code, source: data/code}]",
        ),
        ({"source": "data/web#0"}, "data.source=data/web#0: must read at least one document; for example data/web#500"),
        (
            {"source": ["data/web#5", "data/code"]},
            "data.source=[data/web#5, data/code]: a source in a list takes no limit, and data/web#5 has one; "
            "give it an entry of its own in data.mixture",
        ),
    ],
)
def test_a_wrong_entry_is_named_by_its_position(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(**data)
    assert str(error.value) == message
