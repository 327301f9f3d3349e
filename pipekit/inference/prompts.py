"""Prompts, from a file of text lines or JSONL: texts, and messages of chats."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipekit.data.chat_template import Message
from pipekit.data.tokenizer import TextTokenizer, load_tokenizer
from pipekit.errors import DataError
from pipekit.files import parse_json, read_regular
from pipekit.storage import storing

_MAX_BYTES = 10**9


@dataclass(frozen=True)
class Prompt:
    """A prompt, as text or as the messages of a chat.

    Attributes:
        text: to go on from; None where there are messages.
        messages: of a chat, which the model answers.
        seed: of the draws; None where the file does not say it.
        record: what the file has of it, for the line of the result.
    """

    text: str | None = None
    messages: Sequence[Message] = ()
    seed: int | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


def read_prompts(file: Path) -> list[Prompt]:
    """Prompts of a file: JSON objects, or text, one on each line; blank lines are left out.

    It is JSONL where the first line is a JSON object. Each has a `prompt` or the `messages` of a chat, and perhaps a
    `seed`; other keys are kept for the result.

    Raises:
        DataError: if the file cannot be read, or a line is none of these; it names the line.
    """
    try:
        data = read_regular(file, max_bytes=_MAX_BYTES)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; give a file with a prompt on each line") from None
    try:
        # Not splitlines, which also splits at characters that JSON has inside of strings.
        lines = [line.removesuffix("\r") for line in data.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text (byte {error.start}); convert it with iconv") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(
            f"{file}: holds no prompt; write one on each line, as text or as JSON with a prompt or messages"
        )
    if not isinstance(_parse(numbered[0][1]), dict):
        return [Prompt(line, record={"prompt": line}) for _, line in numbered]
    return [_read_object(_parse(line), where=f"{file}:{number}") for number, line in numbered]


def _parse(line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError:
        return None


def _read_object(value: Any, *, where: str) -> Prompt:
    if not isinstance(value, dict):
        raise DataError(f"{where}: is no JSON object, as the first line is; write " + '{"prompt": "..."}')
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: holds half of a surrogate pair, which is no character; leave it out") from None
    text, messages, seed = value.get("prompt"), value.get("messages"), value.get("seed")
    if (text is None) == (messages is None):
        found = "neither prompt nor messages" if text is None else "both prompt and messages"
        raise DataError(f"{where}: has {found}; give one of them")
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise DataError(f"{where}: seed is {seed!r}, and must be an integer from 0 on")
    if messages is not None:
        check_messages(messages, where=where)
        return Prompt(messages=messages, seed=seed, record=value)
    if not isinstance(text, str):
        raise DataError(f"{where}: prompt is {type(text).__name__}, and must be text")
    return Prompt(text, seed=seed, record=value)


def check_messages(messages: Any, *, where: str) -> None:
    """Raise a DataError if something is no list of messages with one at least."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages must be a list with one message at least")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(
                f"{where}: message {number} needs a role, such as system, user or assistant, and a content, both text"
            )


def encode_text(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Token ids of a text to go on from, as `transformers` makes them; those of an empty one begin a document.

    A tokenizer may put a token of its own before every text.
    """
    token_ids = list(tokenizer.backend.encode(text, add_special_tokens=True).ids)
    if token_ids and token_ids[-1] == tokenizer.end_token_id:
        token_ids.pop()  # a tokenizer that ends every text ends none that is to go on
    return token_ids or [tokenizer.end_token_id]


def end_token_ids(tokenizer_file: Path) -> list[int]:
    """Ids of the tokens that end a text: that of the tokenizer, and those that `generation_config.json` names."""
    found = {load_tokenizer(tokenizer_file).end_token_id}
    file = tokenizer_file.parent / "generation_config.json"
    if file.is_file():
        with storing(file, doing="read"):
            stored = _parse(file.read_text(encoding="utf-8", errors="replace"))
        named = stored.get("eos_token_id") if isinstance(stored, dict) else None
        found |= {token for token in (named if isinstance(named, list) else [named]) if type(token) is int}
    return sorted(found)
