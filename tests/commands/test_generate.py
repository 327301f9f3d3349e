"""`pipekit generate` as its users type it, without processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hand_made import random_model, write_chat_tokenizer, write_checkpoint, write_hf_folder
from pipekit.cli import app
from pipekit.errors import ConfigError, LayoutError


def generate(*arguments: object, said: str | None = None) -> str:
    done = CliRunner().invoke(app, ["generate", *map(str, arguments), "--device", "cpu"], input=said)
    if done.exception is not None:
        raise done.exception
    return done.stdout


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a random model in it."""
    write_checkpoint(tmp_path / "run", *random_model())
    return tmp_path / "run"


LIKELIEST = ("--temperature", 0, "--max-new-tokens", 6)


def test_lines_of_a_file_are_answered_as_prompts_are(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("def f\nreturn\n")
    lines = generate(run, "--prompts", tmp_path / "prompts.txt", *LIKELIEST).splitlines()
    for line, prompt in zip(lines, ("def f", "return"), strict=True):
        result = json.loads(line)
        assert generate(run, "--prompt", prompt, *LIKELIEST) == f"{prompt}{result['text']}\n"


def test_without_a_prompt_a_document_begins(run: Path) -> None:
    assert generate(run, *LIKELIEST) == generate(run, "--prompt", "", *LIKELIEST)


def test_top_p_and_stop_strings_reach_the_model(run: Path) -> None:
    drawn = generate(run, "--prompt", "def", "--top-p", 1e-9, "--top-k", 0, "--max-new-tokens", 6)
    likeliest = generate(run, "--prompt", "def", *LIKELIEST)
    assert drawn == likeliest, "the likeliest alone is left"
    stop = likeliest[5]
    shorter = generate(run, "--prompt", "def", *LIKELIEST, "--stop", "zzz", "--stop", stop)
    assert shorter == likeliest[: likeliest.index(stop, 3)] + "\n"


def test_each_line_of_stdin_is_a_message_of_a_chat(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "hf", with_tokenizer=False, max_positions=90, vocab_size=302)
    write_chat_tokenizer(tmp_path / "hf")
    (tmp_path / "one.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    (line,) = generate(tmp_path / "hf", "--prompts", tmp_path / "one.jsonl", *LIKELIEST).splitlines()
    answers = generate(tmp_path / "hf", "--chat", *LIKELIEST, said="a\n\nb\n")
    assert answers.startswith(json.loads(line)["text"] + "\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--chat"], "--prompt and --chat: give one of them"),
        (["--system", "a"], "--system is the first message of a chat; add --chat"),
        (["--top-p", "0"], "top_p=0.0 must be above 0"),
        (["--stop", ""], "--stop '': an empty text is found everywhere"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_model_is_read(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate("no/such/run", *arguments)


def test_degrees_that_do_not_fit_the_model_are_refused_before_a_process_starts(run: Path) -> None:
    with pytest.raises(LayoutError, match=r"^--tp 3 does not divide .* try --tp 1 or 2$"):
        generate(run, "--tp", 3)
