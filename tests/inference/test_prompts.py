"""Prompts from files, and their tokens, against `transformers`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hand_made import small_tokenizer
from pipekit.data.tokenizer import load_tokenizer
from pipekit.errors import DataError
from pipekit.inference.prompts import Prompt, encode_text, end_token_ids, read_prompts

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def?"}]


def prompts(folder: Path, text: str) -> list[Prompt]:
    (folder / "prompts").write_text(text, encoding="utf-8")
    return read_prompts(folder / "prompts")


def test_each_line_of_text_is_a_prompt_and_blank_ones_are_none(tmp_path: Path) -> None:
    found = prompts(tmp_path, "def f\n\n  two words \n[1]\n")
    assert [prompt.text for prompt in found] == ["def f", "  two words ", "[1]"]
    assert found[0].record == {"prompt": "def f"}


def test_lines_of_json_are_told_by_the_first(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "id": 7}, {"messages": QUESTION, "seed": 3}]
    found = prompts(tmp_path, "\n".join(map(json.dumps, lines)))
    assert [(prompt.text, prompt.seed, list(prompt.messages)) for prompt in found] == [
        ("a", None, []),
        (None, 3, QUESTION),
    ]
    assert [prompt.record for prompt in found] == lines
    separators = "\u2028\u0085"  # lines end with these for Python, and not for JSON
    text = json.dumps({"prompt": f"a{separators}b"}, ensure_ascii=False)
    assert [prompt.text for prompt in prompts(tmp_path, f"{text}\r\n{text}\r\n")] == [f"a{separators}b"] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt; write one on each line"),
        ('{"prompt": "a"}\nplain', ":2: is no JSON object, as the first line is"),
        ('{"text": "a"}', ":1: has neither prompt nor messages; give one of them"),
        ('{"prompt": "a", "messages": []}', ":1: has both prompt and messages"),
        ('{"prompt": 3}', ":1: prompt is int, and must be text"),
        ('{"prompt": "a", "seed": -1}', ":1: seed is -1, and must be an integer from 0 on"),
        ('{"prompt": "a", "from": "\\ud800"}', ":1: holds half of a surrogate pair, which is no character"),
        ('{"prompt": "a"}\n' + "[" * 100_000, ":2: is no JSON object"),
        ('{"messages": []}', ":1: messages must be a list with one message at least"),
        ('{"messages": [{"role": "user"}]}', ":1: message 1 needs a role, such as system"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prompts(tmp_path, text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none: No such file or directory; give a file with a prompt on each line"):
        read_prompts(tmp_path / "none")
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match=r"latin: is not UTF-8 text \(byte 3\)"):
        read_prompts(tmp_path / "latin")


def test_a_prompt_begins_with_the_tokens_that_transformers_puts_there(tmp_path: Path) -> None:
    plain = small_tokenizer()
    with_bos = Tokenizer.from_str(plain.to_str())
    with_bos.add_special_tokens(["<s>"])
    pair = [("<s>", with_bos.token_to_id("<s>")), ("<|endoftext|>", 0)]
    with_bos.post_processor = TemplateProcessing(single="<s> $A <|endoftext|>", special_tokens=pair)
    for name, backend in {"plain": plain, "bos": with_bos}.items():
        (tmp_path / name).mkdir()
        backend.save(str(tmp_path / name / "tokenizer.json"))
        ours = load_tokenizer(tmp_path / name)
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / name / "tokenizer.json"))("def f")["input_ids"]
        assert encode_text(ours, "def f") == [token for token in theirs if token != 0]
    assert encode_text(load_tokenizer(tmp_path / "plain"), "") == [0], "the token that ends a document begins one"
    assert encode_text(ours, "") == [with_bos.token_to_id("<s>")]


@pytest.mark.parametrize(("stored", "expected"), [(None, [0]), (5, [0, 5]), ([0, 7], [0, 7])])
def test_a_text_ends_at_the_tokens_that_the_files_name(
    tmp_path: Path, stored: int | list[int] | None, expected: list[int]
) -> None:
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stored}))
    assert end_token_ids(tmp_path / "tokenizer.json") == expected
