from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipekit.data import encode
from pipekit.data.encode import encode_in_order
from pipekit.data.encoder import Part
from pipekit.data.tokenizer import load_tokenizer, train_tokenizer
from pipekit.errors import DataError

TEXTS = [f"text {number} " * (number % 7 + 1) for number in range(40)]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS, vocab_size=300).backend.save(str(path))
    return path


def batches() -> Iterator[list[Part]]:
    for first in range(0, len(TEXTS), 3):
        yield [(text, index % 2 == 0) for index, text in enumerate(TEXTS[first : first + 3], first)]


def encode_all(tokenizer_path: Path, num_cores: int) -> list[tuple[list[Part], list[int], list[int]]]:
    encoded = encode_in_order(
        batches(), tokenizer_path, parts_of=lambda batch: batch, num_cores=num_cores, timeout_s=100
    )
    return [(batch, token_ids.tolist(), lengths) for batch, (token_ids, lengths, _) in encoded]


def test_tokens_of_two_processes_are_those_of_one_text_after_the_other(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    expected = []
    for batch in batches():
        ids = [tokenizer.encode(text) + [tokenizer.end_token_id] * ends for text, ends in batch]
        expected.append((batch, [token for each in ids for token in each], [len(each) for each in ids]))
    assert encode_all(tokenizer_path, num_cores=1) == expected
    assert encode_all(tokenizer_path, num_cores=2) == expected


def test_a_process_that_is_killed_is_told_of(tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    start = encode.subprocess.Popen

    def start_and_note(*arguments: object, **options: object) -> object:
        process = start(*arguments, **options)  # type: ignore[call-overload]
        started.append(process.pid)
        return process

    monkeypatch.setattr(encode.subprocess, "Popen", start_and_note)

    def kill_all() -> Iterator[list[Part]]:
        yield from batches()
        for pid in started:
            os.kill(pid, signal.SIGKILL)
        while True:
            yield [("more", True)]

    with pytest.raises(DataError, match="a process that encodes text has ended"):
        for _ in encode_in_order(kill_all(), tokenizer_path, parts_of=lambda batch: batch, num_cores=2, timeout_s=100):
            pass
    assert len(started) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)


def test_a_process_that_does_not_answer_is_not_waited_for_without_end(
    tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_ask", lambda process, parts: time.sleep(3))
    began_s = time.monotonic()
    with pytest.raises(DataError, match=r"waited 0\.1 s for a process that encodes text"):
        list(encode_in_order(batches(), tokenizer_path, parts_of=list, num_cores=2, timeout_s=0.1))
    assert time.monotonic() - began_s < 30


def test_cores_beyond_the_processes_are_threads_of_these(monkeypatch: pytest.MonkeyPatch, tokenizer_path: Path) -> None:
    started: list[tuple[int, int]] = []

    @contextmanager
    def start(_: object, num_processes: int, num_threads: int) -> Iterator[None]:
        started.append((num_processes, num_threads))
        yield

    monkeypatch.setattr(encode, "_start_processes", start)
    for num_cores in (2, 8, 9, 64):
        assert not list(encode_in_order([], tokenizer_path, parts_of=list, num_cores=num_cores, timeout_s=1))
    assert started == [(2, 1), (8, 1), (8, 2), (8, 8)]
