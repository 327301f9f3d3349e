"""Chat templates, against `transformers`."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hand_made import write_chat_tokenizer
from pipekit.data.chat_template import ChatTemplate
from pipekit.errors import DataError

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def?"}]


def test_messages_become_the_tokens_of_transformers(tmp_path: Path) -> None:
    file = write_chat_tokenizer(tmp_path)
    template, theirs = ChatTemplate(file), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = theirs.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert template.encode(QUESTION) == theirs(text, add_special_tokens=False)["input_ids"]
    assert template.end_token_ids() == [theirs.convert_tokens_to_ids("<|im_end|>")]


def test_the_first_special_token_behind_an_answer_ends_it(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|><|endoftext|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    file = write_chat_tokenizer(tmp_path, template=template)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ChatTemplate(file).end_token_ids() == [theirs.convert_tokens_to_ids("<|im_end|>")]


def test_a_template_without_an_end_of_an_answer_has_no_end_tokens(tmp_path: Path) -> None:
    file = write_chat_tokenizer(tmp_path, template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert ChatTemplate(file).end_token_ids() == []


def test_without_a_template_and_with_messages_that_it_refuses_that_is_told(tmp_path: Path) -> None:
    file = write_chat_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"the messages: the chat template of .* refuses them: no tools here"):
        ChatTemplate(file).encode([{"role": "tool", "content": "3"}])
    with pytest.raises(DataError, match="its tokenizer has no chat template"):
        ChatTemplate(write_chat_tokenizer(tmp_path / "none", template=None))
