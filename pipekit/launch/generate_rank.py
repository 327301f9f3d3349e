"""A process of `pipekit generate --pp --tp`: `python -m pipekit.launch.generate_rank FILE`."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

from pipekit.errors import printable
from pipekit.launch.model_ranks import ModelPart, run_part

_WORD_S = 60.0
"""Time between signs of rank 0 to the others, which would give it up otherwise."""


def generate(part: ModelPart) -> None:
    """Write the texts of the task's prompts to stdout, or answer messages; rank 0 writes, and reads them from stdin."""
    from pipekit.inference.answer import EncodedPrompt, GenerationSettings, chat, write_lines, write_text

    prompts = [EncodedPrompt(**prompt) for prompt in part.task["prompts"]]
    settings = GenerationSettings(**part.task["settings"])

    def write(text: str) -> None:
        if part.leads:
            part.terminal.write(printable(text) if part.terminal.isatty() else text)
            part.terminal.flush()

    if part.task["chat"] is not None:
        chat(part.generator, settings, read=partial(_read_together, part), write=write, **part.task["chat"])
        return
    if part.task["as_lines"]:
        write_lines(part.generator, prompts, settings, write)
        return
    (prompt,) = prompts
    write(prompt.shown)
    write_text(part.generator, prompt, settings, write)
    write("\n")


def _read_together(part: ModelPart) -> str | None:
    """The next message that rank 0 reads, on all ranks. They hear from it while the user thinks, however long."""
    from pipekit.distributed.processes import tell_object
    from pipekit.inference.answer import read_message

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_message, sys.stdin, part.terminal) if part.leads else None
        is_read: bool | None = False
        while not is_read:
            if reading is not None:
                wait([reading], timeout=_WORD_S)
            is_read = tell_object(None if reading is None else reading.done())
        return tell_object(None if reading is None else reading.result())


if __name__ == "__main__":
    run_part(sys.argv[1:], generate)
