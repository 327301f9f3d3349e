"""A process of `pipekit generate --pp --tp`: `python -m pipekit.launch.generate_rank FILE`."""

from __future__ import annotations

import sys

from pipekit.errors import printable
from pipekit.launch.model_ranks import ModelPart, run_part


def generate(part: ModelPart) -> None:
    """Write the texts of the task's prompts to stdout."""
    from pipekit.inference.answer import EncodedPrompt, GenerationSettings, write_lines, write_text

    prompts = [EncodedPrompt(**prompt) for prompt in part.task["prompts"]]
    settings = GenerationSettings(**part.task["settings"])

    def write(text: str) -> None:
        if part.leads:
            part.terminal.write(printable(text) if part.terminal.isatty() else text)
            part.terminal.flush()

    if part.task["as_lines"]:
        write_lines(part.generator, prompts, settings, write)
        return
    (prompt,) = prompts
    write(prompt.shown)
    write_text(part.generator, prompt, settings, write)
    write("\n")


if __name__ == "__main__":
    run_part(sys.argv[1:], generate)
