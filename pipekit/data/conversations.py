"""Conversations, and prompts with completions: token ids, and a mask of those that the model is to learn.

A conversation becomes text by the chat template of the tokenizer. The tokens of the assistant are those of the
template's `{% generation %}` blocks. Where it has none, they follow from what the template makes of the beginning of
the conversation: what an assistant's message adds to it, from the end of the prompt for that message to the token that
ends its turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pipekit.data.chat_template import ChatTemplate, Message
from pipekit.data.corpus import Corpus, read_records
from pipekit.data.sources.formats import Record, RecordFormat, json_type, whole_characters
from pipekit.data.tokenizer import load_tokenizer
from pipekit.errors import DataError
from pipekit.settings.base import alternatives, show

ConversationFormat = Literal["chat", "completion"]
"""Records with `messages`, or with `prompt` and `completion`."""

ROLES = ("system", "developer", "user", "assistant", "tool")

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


class EncodedConversation(NamedTuple):
    """Token ids `(N,)`, and for each whether it counts in the loss `(N,)`."""

    token_ids: npt.NDArray[np.int64]
    is_learned: npt.NDArray[np.bool_]


def find_conversation_format(record: Record, *, text_key: str) -> ConversationFormat | None:
    """Format of a record, told by its fields; None for one of text."""
    fields = record.fields
    if text_key in fields:
        return None
    if isinstance(fields.get("messages"), list):
        return "chat"
    return "completion" if {"prompt", "completion"} <= fields.keys() else None


def find_conversations(
    corpus: Corpus, format: Literal["auto", "text", "chat", "completion"], *, text_key: str
) -> ConversationFormat | None:
    """Format of the conversations that a corpus holds, as configured or told by its first record; None for text.

    Raises:
        DataError: if conversations are configured, and the corpus has no records.
    """
    if format == "text" or corpus.token_files:
        return None
    if format != "auto":
        return format
    if not all(isinstance(file.format, RecordFormat) for file in corpus.files):
        return None
    first = next(read_records(corpus), None)
    return None if first is None else find_conversation_format(first, text_key=text_key)


class ConversationEncoder:
    """Encodes the records of a file of one format.

    Args:
        tokenizer_path: a `tokenizer.json`, and beside it the settings with the chat template.
        format: what the records are.

    Raises:
        DataError: if the tokenizer is none, or has no chat template that can be read.
    """

    def __init__(self, tokenizer_path: Path, format: ConversationFormat) -> None:
        self._path = tokenizer_path
        self._template = ChatTemplate(tokenizer_path) if format == "chat" else None

    def encode(self, record: Record) -> EncodedConversation:
        """Encode a record.

        Raises:
            DataError: if it is none of the format, or the template refuses it; it names the place of the record.
        """
        template = self._template
        return self._encode_completion(record) if template is None else self._encode_chat(record, template)

    def _encode_completion(self, record: Record) -> EncodedConversation:
        tokenizer = self._tokenizer
        parts = [_text(record, key) for key in ("prompt", "completion")]
        if not parts[1]:
            raise DataError(f"{record.place}: the completion is empty, so that there is nothing to learn; delete it")
        prompt, completion = (tokenizer.encode(part) for part in parts)
        is_learned = [False] * len(prompt) + [True] * (len(completion) + 1)
        return EncodedConversation(
            np.array([*prompt, *completion, tokenizer.end_token_id], dtype=np.int64), np.array(is_learned)
        )

    def _encode_chat(self, record: Record, template: ChatTemplate) -> EncodedConversation:
        messages, tools = check_messages(record), record.fields.get("tools")
        if _GENERATION_BLOCK.search(template.source(tools)):
            encoded = template.apply(
                messages,
                place=record.place,
                tools=tools,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            token_ids, is_learned = encoded["input_ids"], encoded["assistant_masks"]
        else:
            text, spans = self._find_spans(template, messages, tools, record.place)
            encoded = template.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            token_ids = encoded["input_ids"]
            is_learned = [
                any(begin < span.stop and end > span.start for span in spans)
                for begin, end in encoded["offset_mapping"]
            ]
        found = EncodedConversation(np.array(token_ids, dtype=np.int64), np.array(is_learned, dtype=np.bool_))
        if not found.is_learned.any():
            raise DataError(
                f"{record.place}: the chat template gives no token of the assistant, so that nothing is learned; "
                "delete the line, or mend the template"
            )
        return found

    def _find_spans(
        self, template: ChatTemplate, messages: Sequence[Message], tools: Any, place: str
    ) -> tuple[str, list[slice]]:
        """Text of a conversation, and the characters of the assistant's turns in it."""
        render = partial(template.apply, place=place, tools=tools, tokenize=False)
        text = render(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if index == 0:
                raise DataError(
                    f"{place}: the assistant speaks first, and the chat template of {self._path.parent} does not mark "
                    "its tokens by {% generation %} and {% endgeneration %}; delete the line, or mark them"
                )
            prompt = render(messages[:index], add_generation_prompt=True)
            turn = render(messages[: index + 1])
            if not (turn.startswith(prompt) and text.startswith(turn)):
                raise DataError(
                    f"{place}: the chat template of {self._path.parent} writes message {index + 1} otherwise where "
                    "more follow, so that it cannot be told which tokens are the assistant's; mark them in the "
                    "template by {% generation %} and {% endgeneration %}"
                )
            spans.append(slice(len(prompt), self._end_of_turn(turn, len(prompt))))
        return text, spans

    def _end_of_turn(self, text: str, start: int) -> int:
        """End of a turn: behind its last special token, where nothing but white space follows."""
        ends = [match.end() for match in self._special_tokens.finditer(text, start)]
        return ends[-1] if ends and not text[ends[-1] :].strip() else len(text)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._path)

    @cached_property
    def _special_tokens(self) -> re.Pattern[str]:
        assert self._template is not None
        tokens = [token.content for token in self._template.tokenizer.added_tokens_decoder.values() if token.special]
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def check_messages(record: Record) -> list[dict[str, Any]]:
    """Return the messages of a conversation.

    Raises:
        DataError: if they are none: it names the place of the record, the message and what is expected.
    """
    messages = record.fields.get("messages")
    if not isinstance(messages, list):
        what = "no key 'messages'" if messages is None else f"'messages' is {json_type(messages)}"
        raise DataError(f"{record.place}: {what}; a line of chat is {_EXAMPLE}")
    if not messages:
        raise DataError(f"{record.place}: the conversation is empty; delete the line, or give messages")
    for number, message in enumerate(messages, start=1):
        where = f"{record.place}: message {number}"
        if not isinstance(message, dict) or "role" not in message:
            what = json_type(message) if not isinstance(message, dict) else "without a role"
            raise DataError(f"{where} is {what}; a line of chat is {_EXAMPLE}")
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            raise DataError(f"{where} has the role {show(role)!r}; it must be {alternatives(ROLES)}")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise DataError(f"{where} has as content {json_type(content)}; it must be a string")
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(
            f"{record.place}: no message is the assistant's, so that there is nothing to learn; delete the line"
        )
    return [
        {**message, "content": whole_characters(message["content"])} if message.get("content") else message
        for message in messages
    ]


def _text(record: Record, key: str) -> str:
    value = record.fields.get(key)
    if not isinstance(value, str):
        what = f"no key {key!r}" if value is None else f"{key!r} is {json_type(value)}"
        raise DataError(f'{record.place}: {what}; a line is {{"prompt": "...", "completion": "..."}}')
    return whole_characters(value)
