from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fork_server import StartedCommand
from pipekit.config import DataConfig
from pipekit.data import splits
from pipekit.data.prepare import prepare_data
from pipekit.data.splits import is_held_out


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.05, 1 / 3, 0.5, 0.9])
def test_held_out_share_is_near_the_fraction_everywhere(fraction: float) -> None:
    chosen = np.array([is_held_out(index, fraction) for index in range(3000)])
    assert chosen.mean() == pytest.approx(fraction, abs=0.01 + 0.1 * min(fraction, 1 - fraction))
    if 0 < fraction < 0.5:
        longest_gap = np.diff(np.flatnonzero(chosen)).max()
        assert longest_gap <= 2 / fraction + 1
        assert len(set(np.diff(np.flatnonzero(chosen)))) > 1, "a fixed period could follow one in the text"


def write_lines(path: Path) -> None:
    """Two hundred documents; the 60th is so long that a piece ends within it."""
    lines = [f"document {number} says {number * 7919} and nothing else" for number in range(200)]
    lines[60] = "\n".join(f"line {number} of a long document" for number in range(400))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


def read_files(cache: Path) -> dict[str, bytes]:
    """All files of a cache but the locks."""
    files = [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


# Small pieces, so that there are many; it is killed where it has written some, and prints what it read.
PROGRAM = """
import os, signal, sys
from pipekit.config import DataConfig
from pipekit.data import splits
from pipekit.data.prepare import prepare_data
cache_dir, die_at_piece = sys.argv[1], int(sys.argv[2])
splits._BATCH_BYTES, splits._PIECE_BYTES = 200, 2000
saves, write_atomically, encode_in_order = [], splits.write_atomically, splits.encode_in_order
def encode_and_count(batches, *arguments, **options):
    for batch, encoded in encode_in_order(batches, *arguments, **options):
        if len(saves) == die_at_piece:
            os.kill(os.getpid(), signal.SIGKILL)
        print("encoded", *(len(passage.text) for passage, _ in batch), flush=True)
        yield batch, encoded
def save(*arguments):
    write_atomically(*arguments)
    saves.append(arguments)
splits.write_atomically, splits.encode_in_order = save, encode_and_count
prepare_data(DataConfig(source="text.jsonl", vocab_size=300, cache_dir=cache_dir), sequence_length=16)
"""


def prepare(folder: Path, cache: str, die_at_piece: int = -1) -> tuple[int, list[str]]:
    (folder / "program.py").write_text(PROGRAM)
    output = folder / f"output-{cache}-{die_at_piece}"
    output.mkdir()
    command = [str(folder / "program.py"), cache, str(die_at_piece)]
    done = StartedCommand(command, cwd=folder, output=output).wait(100.0)
    return done.returncode, done.stdout.splitlines()


@pytest.mark.distributed
def test_after_a_kill_preparing_goes_on_from_the_last_whole_piece(tmp_path: Path) -> None:
    write_lines(tmp_path / "text.jsonl")
    _, all_batches = prepare(tmp_path, "whole")
    first = prepare(tmp_path, "killed", die_at_piece=2)
    second = prepare(tmp_path, "killed", die_at_piece=3)
    third = prepare(tmp_path, "killed")
    assert [code for code, _ in (first, second, third)] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert len(first[1]) > 10
    assert first[1] + second[1] + third[1] == all_batches, "each batch is encoded once"
    assert read_files(tmp_path / "killed") == read_files(tmp_path / "whole")


@pytest.mark.parametrize("name", [".train.tokens.tmp", ".validation.ends.tmp", "progress.json"])
def test_what_was_left_broken_is_not_gone_on_with(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(splits, "_BATCH_BYTES", 200)
    monkeypatch.setattr(splits, "_PIECE_BYTES", 2000)
    write_lines(tmp_path / "text.jsonl")

    def prepare_here(cache: str, stop_at: float = 2.0) -> None:
        def stop(message: str, fraction: float | None) -> None:
            if message == "encoding the text" and (fraction or 0.0) > stop_at:
                raise KeyboardInterrupt

        config = DataConfig(source="text.jsonl", vocab_size=300, cache_dir=cache)
        prepare_data(config, sequence_length=16, on_progress=stop)

    prepare_here("whole")
    with pytest.raises(KeyboardInterrupt):
        prepare_here("broken", stop_at=0.5)
    (left,) = (path for path in Path("broken", "data").iterdir() if "building" in path.name)
    data = (left / name).read_bytes()
    (left / name).write_bytes(data[:50] + bytes([data[50] ^ 64]) + data[51:] if "tokens" in name else data[:9])
    prepare_here("broken")
    assert "is broken and is prepared again" in caplog.text
    assert read_files(Path("broken")) == read_files(Path("whole"))


def test_the_number_of_cores_does_not_change_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(splits, "_MIN_PARALLEL_BYTES", 0)
    monkeypatch.setattr(splits, "_BATCH_BYTES", 2000)
    write_lines(tmp_path / "text.jsonl")
    for num_cores in (1, 2):
        config = DataConfig(source="text.jsonl", vocab_size=300, cache_dir=str(num_cores))
        prepare_data(config, sequence_length=16, num_cores=num_cores)
    assert read_files(Path("1")) == read_files(Path("2"))


@pytest.mark.parametrize("values", [{"source": "text.jsonl#10"}, {"source": "text.jsonl", "max_bytes": 1000}])
def test_limits_are_of_documents_and_bytes(tmp_path: Path, values: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "text.jsonl")
    config = DataConfig(vocab_size=300, cache_dir="cache", validation_fraction=0, **values)
    (source,) = prepare_data(config, sequence_length=16).sources
    meta = json.loads(source.train.path.with_name("meta.json").read_text())
    if "max_bytes" in values:
        assert meta["num_text_bytes"] == 1000
    else:
        assert meta["num_documents"] == source.train.num_documents == 10
