"""Text for prompts: to a terminal as it comes, or a line of JSON for each of many."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from pipekit.data.chat_template import ChatTemplate, Message
from pipekit.data.tokenizer import load_tokenizer
from pipekit.errors import ConfigError
from pipekit.inference.generator import Generation, Generator, no_tokenizer
from pipekit.inference.load_model import StoredModel
from pipekit.inference.prompts import Prompt, encode_text
from pipekit.inference.sample_tokens import Sampling


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt in tokens.

    Attributes:
        token_ids: at least one.
        seed: of the draws.
        shown: text that is written before what the model makes of it.
        record: what the line of the result begins with.
        ends: tokens that end its text, besides those that end all.
    """

    token_ids: Sequence[int]
    seed: int
    shown: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)
    ends: Sequence[int] = ()


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of generated texts: see `Sampling` and `Generator.generate`."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    stop: Sequence[str] = ()
    batch_size: int = 16

    def __post_init__(self) -> None:
        _ = self.sampling
        if "" in self.stop:
            raise ConfigError("--stop '': an empty text is found everywhere; leave it out")

    @property
    def sampling(self) -> Sampling:
        """Sampling of the tokens; a ConfigError if a number is out of range."""
        return Sampling(self.temperature, self.top_k, self.top_p)


def encode_prompts(stored: StoredModel, prompts: Sequence[Prompt], *, seed: int) -> list[EncodedPrompt]:
    """Prompts in tokens. Each has the seed that its file gives, or `seed` plus its place, counted from 0.

    Raises:
        PipekitError: if the model has no tokenizer, or no chat template, which messages need.
    """
    if stored.tokenizer_file is None:
        raise no_tokenizer(stored.path)
    tokenizer = load_tokenizer(stored.tokenizer_file)
    template = ChatTemplate(stored.tokenizer_file) if any(prompt.messages for prompt in prompts) else None
    ends = [] if template is None else template.end_token_ids()
    encoded = []
    for place, prompt in enumerate(prompts):
        if prompt.text is None:
            assert template is not None
            token_ids, own_ends = template.encode(prompt.messages), ends
        else:
            token_ids, own_ends = encode_text(tokenizer, prompt.text), []
        _check_tokens(stored, token_ids)
        own_seed = seed + place if prompt.seed is None else prompt.seed
        encoded.append(EncodedPrompt(token_ids, own_seed, prompt.text or "", prompt.record, own_ends))
    return encoded


def _check_tokens(stored: StoredModel, token_ids: Sequence[int]) -> None:
    largest = max(token_ids, default=0)
    vocab_size, *_ = stored.shapes.get("embed.weight", (largest + 1,))
    if largest >= vocab_size:
        raise ConfigError(
            f"{stored.path}: its tokenizer makes token {largest} of a prompt, and the model knows {vocab_size} tokens; "
            "it is another model's tokenizer"
        )


def write_text(
    generator: Generator, prompt: EncodedPrompt, settings: GenerationSettings, write: Callable[[str], object]
) -> str:
    """Write what the model makes of a prompt as it comes, and return it."""
    text = ""
    for piece in generator.stream(
        [prompt.token_ids],
        max_new_tokens=settings.max_new_tokens,
        sampling=settings.sampling,
        stop=settings.stop,
        seeds=[prompt.seed],
        end_token_ids=[prompt.ends],
    ):
        text += piece.text
        write(piece.text)
    return text


def write_lines(
    generator: Generator,
    prompts: Sequence[EncodedPrompt],
    settings: GenerationSettings,
    write: Callable[[str], object],
) -> None:
    """Write a line of JSON for each prompt, in order: what its file has of it, and what the model has made of it."""
    for first in range(0, len(prompts), settings.batch_size):
        batch = prompts[first : first + settings.batch_size]
        results = generator.generate(
            [prompt.token_ids for prompt in batch],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            stop=settings.stop,
            seed=[prompt.seed for prompt in batch],
            batch_size=len(batch),
            end_token_ids=[prompt.ends for prompt in batch],
        )
        for prompt, result in zip(batch, results, strict=True):
            write(json.dumps({**prompt.record, **describe_result(prompt, result)}, ensure_ascii=False) + "\n")


def describe_result(prompt: EncodedPrompt, result: Generation) -> dict[str, Any]:
    """A result as a line of JSON: the text, why it has ended, its tokens, and the seed that repeats it."""
    return {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": len(prompt.token_ids),
        "new_tokens": len(result.token_ids),
        "seed": prompt.seed,
    }


def read_message(typed: TextIO, terminal: TextIO) -> str | None:
    """The line that the user types, or the next one of a file; None at its end, which Ctrl-D makes.

    Args:
        typed: what is read.
        terminal: where the user is told that it is his turn, if there is one.
    """
    is_asked = typed.isatty() and terminal.isatty()
    if is_asked:
        terminal.write("> ")
        terminal.flush()
    while line := typed.readline():
        if line.strip():
            return line.strip()
    if is_asked:
        terminal.write("\n")
    return None


def chat(
    generator: Generator,
    settings: GenerationSettings,
    *,
    system: str | None,
    seed: int,
    read: Callable[[], str | None],
    write: Callable[[str], object],
) -> None:
    """Answer messages one after the other, each after all that was said before.

    Args:
        generator: the model, whose tokenizer has a chat template.
        settings: of the answers.
        system: message with which the chat begins; None for none.
        seed: of the first answer; each further one has the next.
        read: returns a message; None ends the chat.
        write: is given the answer as it comes.

    Raises:
        PipekitError: if there is no tokenizer, or no chat template.
    """
    if generator.stored.tokenizer_file is None:
        raise no_tokenizer(generator.stored.path)
    template = ChatTemplate(generator.stored.tokenizer_file)
    ends = template.end_token_ids()
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    while (said := read()) is not None:
        messages.append({"role": "user", "content": said})
        token_ids = template.encode(messages)
        _check_tokens(generator.stored, token_ids)
        if len(token_ids) >= generator.longest_sequence:
            raise ConfigError(
                f"the chat is {len(token_ids)} tokens long, and the model sees {generator.longest_sequence} at most; "
                "begin a new one"
            )
        answer = write_text(generator, EncodedPrompt(token_ids, seed, ends=ends), settings, write)
        write("\n")
        messages.append({"role": "assistant", "content": answer})
        seed += 1
