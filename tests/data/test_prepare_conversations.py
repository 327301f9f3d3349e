"""Conversations in the cache: token files with a loss mask beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chat_templates import TEMPLATES, random_conversations, write_chat_tokenizer
from pipekit.config import DataConfig
from pipekit.data.conversations import ConversationEncoder
from pipekit.data.prepare import prepare_data
from pipekit.data.samples.loss_mask import load_loss_mask
from pipekit.data.sources.formats import Record
from pipekit.errors import DataError

CONVERSATIONS = random_conversations(40)


def make_config(tmp_path: Path, lines: list[Any], **values: Any) -> DataConfig:
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = write_chat_tokenizer(tmp_path / "tokenizer", TEMPLATES["headers"])
    defaults = {"source": str(source), "tokenizer": str(tokenizer), "cache_dir": str(tmp_path / "cache")}
    return DataConfig(**{**defaults, "validation_fraction": 0.1, **values})


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_every_conversation_is_prepared_once_with_its_mask(tmp_path: Path, kind: str) -> None:
    lines: list[dict[str, Any]] = [{"messages": messages} for messages in CONVERSATIONS]
    if kind == "completion":
        lines = [
            {"prompt": messages[0]["content"], "completion": messages[-1]["content"]} for messages in CONVERSATIONS
        ]
    config = make_config(tmp_path, lines)
    (source,) = prepare_data(config, sequence_length=10_000).sources
    assert source.has_loss_mask
    assert source.validation is not None
    assert (source.train.num_documents, source.validation.num_documents) == (36, 4)
    found = set()
    for token_slice in source.slices:
        tokens, mask, bounds = token_slice.load_tokens(), load_loss_mask(token_slice), token_slice.load_bounds()
        assert len(mask) == len(tokens)
        pairs = zip(np.split(tokens, bounds[1:-1]), np.split(mask, bounds[1:-1]), strict=True)
        found |= {(tuple(ids.tolist()), tuple(mask.tolist())) for ids, mask in pairs}
    encoder = ConversationEncoder(tmp_path / "tokenizer" / "tokenizer.json", kind)  # type: ignore[arg-type]
    encoded = [encoder.encode(Record("", line)) for line in lines]
    assert found == {(tuple(ids.tolist()), tuple(mask.astype(int).tolist())) for ids, mask in encoded}
    assert prepare_data(config, sequence_length=10_000).sources == (source,)


def test_another_mask_is_other_data(tmp_path: Path) -> None:
    lines = [{"messages": messages} for messages in CONVERSATIONS]
    config = make_config(tmp_path, lines)
    first = prepare_data(config, sequence_length=16).fingerprint
    template = TEMPLATES["headers"].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    template = template.replace("{% for message", "{% generation %}{% for message").replace(
        "{% endfor %}", "{% endfor %}{% endgeneration %}"
    )
    write_chat_tokenizer(tmp_path / "tokenizer", template)
    assert prepare_data(config, sequence_length=16).fingerprint != first


@pytest.mark.parametrize(
    ("lines", "values", "message"),
    [
        ([{"messages": CONVERSATIONS[0]}, {"messages": []}], {}, r"chat.jsonl:2: the conversation is empty"),
        ([{"messages": CONVERSATIONS[0]}, {"text": "a"}], {}, r"chat.jsonl:2: no key 'messages'; a line of chat is"),
        (
            [{"messages": CONVERSATIONS[0]}],
            {"tokenizer": None},
            r"holds records of chat; set data.tokenizer to the tokenizer of",
        ),
        ([], {"format": "chat"}, r"holds no conversation; give files that are not empty"),
        ([{"prompt": "a"}], {"format": "completion"}, r"chat.jsonl:1: no key 'completion'; a line is {\"prompt\""),
        ([{"prompt": "a", "completion": ""}], {}, r"chat.jsonl:1: the completion is empty"),
    ],
)
def test_bad_records_are_named_by_their_line_and_nothing_is_left(
    tmp_path: Path, lines: list[Any], values: dict[str, Any], message: str
) -> None:
    config = make_config(tmp_path, lines, **values)
    with pytest.raises(DataError, match=message):
        prepare_data(config, sequence_length=16)
    assert [path.name for path in (tmp_path / "cache").glob("data/*") if path.is_dir()] == []
