"""Chat templates: the text, and the tokens, that a tokenizer makes of the messages of a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipekit.data.tokenizer import load_tokenizer
from pipekit.errors import DataError
from pipekit.settings.base import alternatives

Message = Mapping[str, Any]
"""A message of a chat: its `role`, such as `system`, `user` or `assistant`, and its `content`."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer_file: the `tokenizer.json`; the template is in `tokenizer_config.json` or `chat_template.jinja` beside
            it.

    Attributes:
        tokenizer: the tokenizer of `transformers`.

    Raises:
        DataError: if the tokenizer cannot be read, or has no template.
    """

    def __init__(self, tokenizer_file: Path) -> None:
        from transformers import PreTrainedTokenizerFast  # which takes seconds to import

        load_tokenizer(tokenizer_file)  # says what is wrong with it
        self._folder = tokenizer_file.parent
        with _without_warnings():  # that a class of its own is not needed
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(self._folder, local_files_only=True)
        self.tokenizer.model_max_length = 10**30  # conversations are encoded whole, however long the model's inputs are
        template = self.tokenizer.chat_template
        if not (template.get("default") if isinstance(template, dict) else template):
            several = f" named default among {alternatives(sorted(template), last='and')}" if template else ""
            raise DataError(
                f"{self._folder}: its tokenizer has no chat template{several}, so messages cannot be turned into text; "
                "put the chat_template.jinja of the model beside tokenizer.json, or give text"
            )

    def source(self, tools: Any = None) -> str:
        """Text of the template; of several, that for messages without tools, or with these."""
        return str(self.tokenizer.get_chat_template(tools=tools))

    def apply(self, messages: Sequence[Message], *, place: str = "the messages", **options: Any) -> Any:
        """Return the result of `apply_chat_template` of `transformers` for messages, with these options.

        Raises:
            DataError: if the template is none, or cannot write these messages; `place` says whose they are.
        """
        import jinja2

        try:
            return self.tokenizer.apply_chat_template([dict(message) for message in messages], **options)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"{self._folder}: the chat template cannot be read: line {error.lineno}: {error.message}; correct it"
            ) from error
        except jinja2.TemplateError as error:
            raise DataError(
                f"{place}: the chat template of {self._folder} refuses them: {error}; correct them"
            ) from error
        except Exception as error:  # a template computes, and calls what it likes
            raise DataError(
                f"{place}: the chat template of {self._folder} cannot write them: {error}; correct one of them"
            ) from error

    def encode(self, messages: Sequence[Message], *, asks: bool = True) -> list[int]:
        """Token ids of a chat, up to where the model begins its answer, or without that.

        Raises:
            DataError: if the template refuses the messages.
        """
        found = self.apply(messages, add_generation_prompt=asks, tokenize=True, return_dict=False)
        return [int(token) for token in found]

    def end_token_ids(self) -> list[int]:
        """Ids of the special token with which the template ends an answer; none where there is no such token."""
        question = [{"role": "user", "content": "a"}]
        before = self.encode(question)
        whole = self.encode([*question, {"role": "assistant", "content": "b"}], asks=False)
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        behind = whole[len(before) :] if whole[: len(before)] == before else []
        return [next(token for token in behind if token in special)] if special & set(behind) else []


@contextmanager
def _without_warnings() -> Iterator[None]:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
