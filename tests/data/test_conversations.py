"""Conversations as token ids and a loss mask, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from chat_templates import TEMPLATES, random_conversations, without_blocks, write_chat_tokenizer
from pipekit.data.conversations import ConversationEncoder, find_conversation_format
from pipekit.data.sources.formats import Record
from pipekit.data.tokenizer import load_tokenizer
from pipekit.errors import DataError


def record_of(messages: Any, **more: Any) -> Record:
    return Record("chat.jsonl:7", {"messages": messages, **more})


@pytest.mark.parametrize("kind", TEMPLATES)
def test_200_conversations_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    marked = write_chat_tokenizer(tmp_path / "marked", TEMPLATES[kind])
    plain = write_chat_tokenizer(tmp_path / "plain", without_blocks(TEMPLATES[kind]))
    theirs = AutoTokenizer.from_pretrained(str(marked.parent))
    encoders = [ConversationEncoder(path, "chat") for path in (marked, plain)]
    for messages in random_conversations(200):
        expected = theirs.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert 0 < sum(expected["assistant_masks"]) < len(expected["input_ids"])
        for encoder in encoders:
            found = encoder.encode(record_of(messages))
            assert found.token_ids.tolist() == expected["input_ids"]
            assert found.is_learned.astype(int).tolist() == expected["assistant_masks"]


def test_of_a_prompt_and_its_completion_the_completion_and_its_end_are_learned(tmp_path: Path) -> None:
    path = write_chat_tokenizer(tmp_path, None)
    tokenizer = load_tokenizer(path)
    record = Record("a.jsonl:1", {"prompt": "the words</s>", "completion": " people"})
    token_ids, is_learned = ConversationEncoder(path, "completion").encode(record)
    prompt = tokenizer.encode("the words</s>")
    assert token_ids.tolist() == [*prompt, *tokenizer.encode(" people"), tokenizer.end_token_id]
    assert tokenizer.end_token_id not in prompt
    assert is_learned.tolist() == [index >= len(prompt) for index in range(len(token_ids))]


@pytest.mark.parametrize(
    ("fields", "format"),
    [
        ({"messages": []}, "chat"),
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"text": "a", "messages": []}, None),
        ({"messages": "text"}, None),
    ],
)
def test_formats_are_told_by_their_fields(fields: dict[str, Any], format: str | None) -> None:
    assert find_conversation_format(Record("a:1", fields), text_key="text") == format


ASKED = {"role": "user", "content": "the words"}
ANSWERED = {"role": "assistant", "content": "people"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, r"chat.jsonl:7: no key 'messages'; a line of chat is"),
        ("hello", r"chat.jsonl:7: 'messages' is a string"),
        ([], r"chat.jsonl:7: the conversation is empty"),
        (["hello"], r"chat.jsonl:7: message 1 is a string"),
        ([ASKED, {"content": "people"}], r"chat.jsonl:7: message 2 is without a role"),
        ([ASKED, {"role": "robot", "content": "people"}], r"message 2 has the role 'robot'; it must be system, "),
        ([ASKED, {"role": "assistant", "content": 3}], r"message 2 has as content a number; it must be a string"),
        ([ASKED], r"chat.jsonl:7: no message is the assistant's"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_line(tmp_path: Path, messages: Any, message: str) -> None:
    encoder = ConversationEncoder(write_chat_tokenizer(tmp_path, TEMPLATES["chatml"]), "chat")
    with pytest.raises(DataError, match=message):
        encoder.encode(record_of(messages))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            r"chat.jsonl:7: the chat template of .* refuses them: roles must alt",
        ),
        ("{% for message in messages %}", r"the chat template cannot be read: line 1: "),
        ("{% for m in messages %}{{ m.content }}{{ loop.last }}{% endfor %}", r"writes message 2 otherwise where more"),
        (
            "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}",
            r"no token of the ass",
        ),
        ("{{ messages[0]['content'] + 3 }}", r"chat.jsonl:7: the chat template of .* cannot write them"),
        ("{{ 1 // 0 }}", r"chat.jsonl:7: the chat template of .* cannot write them"),
        (None, r"its tokenizer has no chat template, .*chat_template.jinja"),
    ],
)
def test_templates_that_do_not_work_are_named(tmp_path: Path, template: str | None, message: str) -> None:
    path = write_chat_tokenizer(tmp_path, template)
    with pytest.raises(DataError, match=message):
        ConversationEncoder(path, "chat").encode(record_of([ASKED, ANSWERED, ASKED, ANSWERED]))


def test_of_several_templates_the_default_one_is_taken(tmp_path: Path) -> None:
    path = write_chat_tokenizer(tmp_path, TEMPLATES["chatml"])
    expected = ConversationEncoder(path, "chat").encode(record_of([ASKED, ANSWERED]))
    settings_file = tmp_path / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text())
    named = [{"name": name, "template": TEMPLATES["brackets"]} for name in ("rag", "tool_use")]
    settings_file.write_text(json.dumps({**settings, "chat_template": named}))
    with pytest.raises(DataError, match="no chat template named default among rag and tool_use, so messages cannot"):
        ConversationEncoder(path, "chat")
    named.append({"name": "default", "template": TEMPLATES["chatml"]})
    settings_file.write_text(json.dumps({**settings, "chat_template": named}))
    encoder = ConversationEncoder(path, "chat")
    assert encoder.encode(record_of([ASKED, ANSWERED])).token_ids.tolist() == expected.token_ids.tolist()
    with_tools = encoder.encode(record_of([ASKED, ANSWERED], tools=[{"type": "function"}]))
    assert with_tools.token_ids.tolist() != expected.token_ids.tolist(), "tool_use is for conversations with tools"


@pytest.mark.parametrize("template", [TEMPLATES["chatml"], without_blocks(TEMPLATES["chatml"])])
def test_halves_of_characters_are_replaced_as_in_text(tmp_path: Path, template: str) -> None:
    path = write_chat_tokenizer(tmp_path, template)
    half, whole = ([{**ASKED, "content": f"the {middle} words"}, ANSWERED] for middle in ("\ud83d", "\ufffd" * 3))
    encoder = ConversationEncoder(path, "chat")
    assert encoder.encode(record_of(half)).token_ids.tolist() == encoder.encode(record_of(whole)).token_ids.tolist()
    completion = ConversationEncoder(path, "completion")
    record = Record("a.jsonl:1", {"prompt": "a", "completion": "\ud83d"})
    assert completion.encode(record).is_learned.sum() > 1


def test_an_assistant_who_speaks_first_needs_marks(tmp_path: Path) -> None:
    marked = write_chat_tokenizer(tmp_path / "marked", TEMPLATES["chatml"])
    assert ConversationEncoder(marked, "chat").encode(record_of([ANSWERED])).is_learned.any()
    plain = write_chat_tokenizer(tmp_path / "plain", without_blocks(TEMPLATES["chatml"]))
    with pytest.raises(DataError, match=r"chat.jsonl:7: the assistant speaks first"):
        ConversationEncoder(plain, "chat").encode(record_of([ANSWERED]))
