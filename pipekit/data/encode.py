"""Parallel tokenization: batches of text or conversations are encoded by processes on all cores, in their order."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from pipekit.data.conversations import ConversationFormat
from pipekit.data.encoder import Encoded, Part, build_encoder
from pipekit.data.tokenizer import child_environment, tokenizer_threads
from pipekit.errors import DataError

T = TypeVar("T")

# Each has about 60 MB; more cores are used by threads of the tokenizers library.
_MAX_PROCESSES = 8
# Between the last output of a process and its end.
_END_S = 5.0


def encode_in_order(
    batches: Iterable[T],
    tokenizer_path: Path,
    *,
    parts_of: Callable[[T], Sequence[Part]],
    conversations: ConversationFormat | None = None,
    num_cores: int,
    timeout_s: float,
) -> Iterator[tuple[T, Encoded]]:
    """Yield each batch with its token ids, in order, while the next ones are read and encoded.

    Args:
        batches: are read a few ahead.
        tokenizer_path: a `tokenizer.json`.
        parts_of: the texts of a batch, or its records of conversations.
        conversations: format of the records; None for texts.
        num_cores: to encode on; 1 encodes in this process.
        timeout_s: the longest wait for the tokens of a batch.

    Raises:
        DataError: if the tokenizer does not know a text, a record is none of the format, or a process that encodes ends
            or takes too long.
    """
    if num_cores == 1:
        encode_here = build_encoder(tokenizer_path, conversations)
        with tokenizer_threads():
            for batch in batches:
                yield batch, encode_here(parts_of(batch))
        return
    num_processes = min(num_cores, _MAX_PROCESSES)
    arguments = [str(tokenizer_path), *([] if conversations is None else [conversations])]
    with _start_processes(arguments, num_processes, -(-num_cores // _MAX_PROCESSES)) as encode:
        pending: deque[tuple[T, Future[Encoded]]] = deque()
        for batch in batches:
            pending.append((batch, encode(parts_of(batch))))
            if len(pending) > 2 * num_processes:
                yield _take(pending, timeout_s)
        while pending:
            yield _take(pending, timeout_s)


def _take(pending: deque[tuple[T, Future[Encoded]]], timeout_s: float) -> tuple[T, Encoded]:
    batch, future = pending.popleft()
    try:
        return batch, future.result(timeout_s)
    except LateError as error:
        raise DataError(
            f"waited {timeout_s:g} s for a process that encodes text; raise run.timeout_s, or see what keeps the "
            "machine busy"
        ) from error


@contextmanager
def _start_processes(
    arguments: Sequence[str], num_processes: int, num_threads: int
) -> Iterator[Callable[[Sequence[Part]], Future[Encoded]]]:
    command = [sys.executable, "-m", "pipekit.data.encode_process", *arguments]
    processes: list[subprocess.Popen[bytes]] = []
    idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()

    def encode(parts: Sequence[Part]) -> Encoded:
        process = idle.get()
        try:
            return _ask(process, parts)
        finally:
            idle.put(process)

    pool = ThreadPoolExecutor(num_processes, "encode")
    try:
        for _ in range(num_processes):
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=child_environment(num_threads),
                start_new_session=True,  # an interrupt from the terminal is this process's to handle
            )
            processes.append(process)
            idle.put(process)
        yield lambda parts: pool.submit(encode, parts)
    finally:
        for process in processes:
            process.kill()
        pool.shutdown(cancel_futures=True)
        for process in processes:
            with suppress(BrokenPipeError), process:
                pass


def _ask(process: subprocess.Popen[bytes], parts: Sequence[Part]) -> Encoded:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        pickle.dump(parts, process.stdin, pickle.HIGHEST_PROTOCOL)
        process.stdin.flush()
        answer: Encoded | DataError = pickle.load(process.stdout)
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        with suppress(subprocess.TimeoutExpired):  # it is ended with the others then
            process.wait(_END_S)
        raise DataError(
            f"a process that encodes text has ended (exit code {process.returncode}); its message stands above, if it "
            "had one, or the machine has no memory left"
        ) from error
    if isinstance(answer, DataError):
        raise answer
    return answer
