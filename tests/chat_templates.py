"""Chat templates, a tokenizer for them, and conversations made at random: for tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from pipekit.data.tokenizer import train_tokenizer

SPECIAL = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|head|>", "<|eot|>")

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{% if message.role == 'assistant' %}"
        "<|im_start|>assistant\n{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
        "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "brackets": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
        "{% elif message.role == 'system' %}<<SYS>>{{ message.content }}<</SYS>>"
        "{% else %}{% generation %} {{ message.content | trim }}</s>{% endgeneration %}{% endif %}{% endfor %}"
    ),
    "headers": (
        "{{ bos_token }}{% for message in messages %}"
        "<|head|>{{ message.role }}<|head|>\n\n"
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content | trim + '<|eot|>' }}"
        "{% endgeneration %}{% else %}{{ message.content | trim + '<|eot|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|head|>\n\n{% endif %}"
    ),
    "no special token": (
        "{% for message in messages %}{% if message.role == 'assistant' %}"
        "### Answer:\n{% generation %}{{ message.content }}\n\n{% endgeneration %}"
        "{% else %}### {{ message.role }}:\n{{ message.content }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Answer:\n{% endif %}"
    ),
}


def without_blocks(template: str) -> str:
    """A template that does not mark what the assistant says."""
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def write_chat_tokenizer(folder: Path, template: str | None) -> Path:
    """Write a tokenizer with a chat template; return its `tokenizer.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = train_tokenizer(["Some text about the words of people, \n\n and their answers."], vocab_size=300).backend
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        **({} if template is None else {"chat_template": template}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder / "tokenizer.json"


def random_conversations(number: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Conversations of several turns, some with a system's message, in words, code, white space and other scripts."""
    draw = random.Random(seed)
    pieces = [
        "the words",
        " people ",
        "\n",
        "\n\n",
        "é",
        "日本語",
        "🙂",
        "def f(x):\n\treturn x",
        "  ",
        "<|im_end|>",
        "a.",
    ]

    def text() -> str:
        return "".join(draw.choice(pieces) for _ in range(draw.randint(1, 12))) + draw.choice(["!", " end", "."])

    conversations = []
    for _ in range(number):
        messages = [{"role": "system", "content": text()}] if draw.random() < 0.4 else []
        for _ in range(draw.randint(1, 4)):
            messages += [{"role": role, "content": text()} for role in ("user", "assistant")]
        conversations.append(messages)
    return conversations
