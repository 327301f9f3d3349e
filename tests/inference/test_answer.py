"""Lines of results for many prompts, and chats, against what the model makes of each alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hand_made import write_chat_tokenizer, write_hf_folder
from pipekit.data.chat_template import ChatTemplate, Message
from pipekit.errors import ConfigError, DataError, PipekitError
from pipekit.inference.answer import GenerationSettings, chat, encode_prompts, write_lines
from pipekit.inference.generator import Generator
from pipekit.inference.prompts import Prompt

SETTINGS = GenerationSettings(max_new_tokens=9, temperature=1.0, top_k=None, top_p=0.9, batch_size=2)
PROMPTS = [
    Prompt("def f", record={"prompt": "def f", "id": 7}),
    Prompt("return argument + ", seed=5, record={"prompt": "return argument + "}),
    Prompt(messages=[{"role": "user", "content": "a"}], record={"messages": "kept"}),
]


@pytest.fixture
def model(tmp_path: Path) -> Generator:
    """A random model with a chat template."""
    write_hf_folder(tmp_path / "hf", with_tokenizer=False, max_positions=90, vocab_size=302)
    write_chat_tokenizer(tmp_path / "hf")
    return Generator.open(tmp_path / "hf", device="cpu")


def test_each_line_is_what_its_prompt_gives_alone(model: Generator) -> None:
    prompts = encode_prompts(model.stored, PROMPTS, seed=11)
    lines: list[str] = []
    write_lines(model, prompts, SETTINGS, lines.append)
    results = [json.loads(line) for line in lines]
    assert [result["seed"] for result in results] == [11, 5, 13], "the file's, or the next one"
    assert [next(iter(result)) for result in results] == ["prompt", "prompt", "messages"]
    assert results[0]["id"] == 7
    for prompt, result in zip(prompts, results, strict=True):
        (alone,) = model.generate(
            [prompt.token_ids],
            max_new_tokens=9,
            temperature=1.0,
            top_p=0.9,
            seed=prompt.seed,
            end_token_ids=[prompt.ends],
        )
        assert (result["text"], result["finish_reason"]) == (alone.text, alone.finish_reason)
        assert (result["prompt_tokens"], result["new_tokens"]) == (len(prompt.token_ids), len(alone.token_ids))


def test_a_text_ends_at_its_stop_string_and_its_own_end_tokens(model: Generator) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    (free,) = model.generate([[70, 71]], max_new_tokens=30)
    place = next(place for place in range(4, 30) if free.token_ids[place] not in free.token_ids[:place])
    end = free.token_ids[place]
    for batch_size in (1, 2):
        ended, other = model.generate(
            [[70, 71], [70, 71]], max_new_tokens=30, end_token_ids=[[end], []], batch_size=batch_size
        )
        assert (ended.token_ids, ended.finish_reason) == (free.token_ids[:place], "end")
        assert other == free
    stop = free.text[5:8]
    (stopped,) = model.generate([[70, 71]], max_new_tokens=30, stop=[stop])
    assert (stopped.text, stopped.finish_reason) == (free.text[: free.text.find(stop)], "stop")
    assert len(stopped.token_ids) < 30


def test_each_prompt_has_its_seed_in_batches_of_any_size(model: Generator) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 1.0}
    alone = [model.generate([[70, 71]], seed=seed, **options)[0] for seed in (3, 4, 5)]
    assert alone[0] != alone[1] != alone[2] != alone[0]
    for batch_size in (1, 2):
        assert model.generate([[70, 71]] * 3, seed=[3, 4, 5], batch_size=batch_size, **options) == alone


def talk(model: Generator, said: list[str], *, system: str | None = None) -> list[str]:
    """Answers to messages."""
    waiting, written = list(said), [""]

    def write(text: str) -> None:
        written.append("") if text == "\n" else written.append(written.pop() + text)

    chat(
        model, SETTINGS, system=system, seed=3, read=lambda: waiting.pop(0) if waiting else None, write=write
    )  # fmt: skip
    return written[:-1]


def test_a_chat_answers_after_all_that_was_said(model: Generator) -> None:
    assert model.stored.tokenizer_file is not None
    template = ChatTemplate(model.stored.tokenizer_file)
    answers = talk(model, ["def", "and?"], system="Brief.")
    messages: list[Message] = [{"role": "system", "content": "Brief."}]
    for number, said in enumerate(["def", "and?"]):
        messages.append({"role": "user", "content": said})
        (alone,) = model.generate(
            [template.encode(messages)],
            max_new_tokens=9,
            temperature=1.0,
            top_p=0.9,
            seed=3 + number,
            end_token_ids=[template.end_token_ids()],
        )
        assert answers[number] == alone.text
        messages.append({"role": "assistant", "content": alone.text})


def test_a_chat_that_is_longer_than_the_model_sees_is_told(model: Generator) -> None:
    with pytest.raises(ConfigError, match="and the model sees 90 at most; begin a new one"):
        talk(model, ["x" * 100])


def test_messages_without_a_tokenizer_or_a_template_are_refused(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "bare", with_tokenizer=False)
    bare = Generator.open(tmp_path / "bare", device="cpu")
    for read in (lambda: talk(bare, ["a"]), lambda: encode_prompts(bare.stored, PROMPTS, seed=0)):
        with pytest.raises(PipekitError, match=r"bare: holds no tokenizer\.json"):
            read()
    write_hf_folder(tmp_path / "plain")
    plain = Generator.open(tmp_path / "plain", device="cpu")
    for read in (lambda: talk(plain, ["a"]), lambda: encode_prompts(plain.stored, PROMPTS, seed=0)):
        with pytest.raises(DataError, match="plain: its tokenizer has no chat template"):
            read()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "hf", with_tokenizer=False, max_positions=90, vocab_size=280)
    write_chat_tokenizer(tmp_path / "hf")
    small = Generator.open(tmp_path / "hf", device="cpu")
    for read in (lambda: talk(small, ["a"]), lambda: encode_prompts(small.stored, PROMPTS, seed=0)):
        with pytest.raises(ConfigError, match="and the model knows 280 tokens; it is another model's tokenizer"):
            read()


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match="an empty text is found everywhere"):
        GenerationSettings(max_new_tokens=1, temperature=0.0, top_k=None, top_p=None, stop=[""])
