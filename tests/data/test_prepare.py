from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from fork_server import StartedCommand
from late_disk import LateDisk
from pipekit.config import DataConfig
from pipekit.data import build_once
from pipekit.data.megatron import IndexedTokensWriter, TokenSlice
from pipekit.data.prepare import prepare_data
from pipekit.data.prepared import PreparedData
from pipekit.data.tokenizer import load_tokenizer
from pipekit.errors import DataError, PipekitError


@pytest.fixture
def documents(tmp_path: Path) -> list[str]:
    """Forty texts in `tmp_path / "text"`, each of which tells which one it is."""
    folder = tmp_path / "text"
    folder.mkdir()
    texts = [f"document {index} " + f"says {index} again and again. " * 20 for index in range(40)]
    for index, text in enumerate(texts):
        (folder / f"{index:02}.txt").write_text(text)
    return texts


def make_config(tmp_path: Path, **values: Any) -> DataConfig:
    defaults = {"source": str(tmp_path / "text"), "vocab_size": 300, "cache_dir": str(tmp_path / "cache")}
    return DataConfig(**{**defaults, "validation_fraction": 0.1, **values})


def read_split(prepared: PreparedData, split: TokenSlice | None) -> list[str]:
    """Return the documents of a split, decoded; each ends with the end token and has no other."""
    assert split is not None
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    tokens, bounds = split.load_tokens(), split.load_bounds()
    assert np.flatnonzero(tokens == tokenizer.end_token_id).tolist() == (bounds[1:] - 1).tolist()
    assert split.num_documents == len(bounds) - 1
    return [tokenizer.decode(part.tolist()) for part in np.split(tokens, bounds[1:-1])]


def train_path(prepared: PreparedData) -> Path:
    return prepared.sources[0].train.path


def list_cache(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "data").iterdir())


def test_both_splits_together_hold_every_document_once(tmp_path: Path, documents: list[str]) -> None:
    prepared = prepare_data(make_config(tmp_path), sequence_length=16)
    train, held_out = (read_split(prepared, split) for split in prepared.sources[0].slices)
    assert sorted(train + held_out) == sorted(documents)
    assert len(held_out) == 4
    assert train == [text for text in documents if text in train], "out of order"
    assert prepared.vocab_size == load_tokenizer(prepared.tokenizer_path).vocab_size <= 300


def test_without_validation_all_text_is_for_training(tmp_path: Path, documents: list[str]) -> None:
    prepared = prepare_data(make_config(tmp_path, validation_fraction=0), sequence_length=16)
    (source,) = prepared.sources
    assert read_split(prepared, source.train) == documents
    assert source.validation is None


def test_one_long_file_is_divided_as_well(tmp_path: Path) -> None:
    lines = [f"{index} of many lines\n" for index in range(4000)]
    (tmp_path / "text").write_text("".join(lines))
    prepared = prepare_data(make_config(tmp_path), sequence_length=16)
    train, held_out = (read_split(prepared, split) for split in prepared.sources[0].slices)
    read = [part.splitlines(keepends=True) for part in train + held_out]
    assert sorted(line for part in read for line in part) == sorted(lines)
    # Text that does not follow in the file is never joined without an end token between.
    for part in read:
        first = int(part[0].split()[0])
        assert part == lines[first : first + len(part)]
    num_train, num_held_out = (split.num_tokens for split in prepared.sources[0].slices)
    share = num_held_out / (num_train + num_held_out)
    assert 0.05 < share < 0.15


def test_second_call_reads_the_cache(tmp_path: Path, documents: list[str]) -> None:
    first = prepare_data(make_config(tmp_path), sequence_length=16)
    modified = train_path(first).stat().st_mtime_ns
    messages: list[str] = []
    second = prepare_data(
        make_config(tmp_path), sequence_length=64, on_progress=lambda message, _: messages.append(message)
    )
    assert second == first
    assert messages == []
    assert train_path(first).stat().st_mtime_ns == modified


def test_the_same_settings_elsewhere_give_the_same_tokens(tmp_path: Path, documents: list[str]) -> None:
    first = prepare_data(make_config(tmp_path), sequence_length=16)
    second = prepare_data(make_config(tmp_path, cache_dir=str(tmp_path / "other")), sequence_length=16)
    assert train_path(second) != train_path(first)
    assert train_path(second).read_bytes() == train_path(first).read_bytes()
    assert second.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "change", [{"vocab_size": 280}, {"validation_fraction": 0.2}, {"max_bytes": 9000}, {"source": ["text"]}]
)
def test_other_settings_give_other_tokens(
    tmp_path: Path, documents: list[str], change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = prepare_data(make_config(tmp_path), sequence_length=16)
    second = prepare_data(make_config(tmp_path, **change), sequence_length=16)
    if change == {"source": ["text"]}:  # another spelling of the same folder
        assert second == first
    else:
        assert second.fingerprint != first.fingerprint
        assert train_path(second) != train_path(first)


def test_changed_text_is_prepared_anew(tmp_path: Path, documents: list[str]) -> None:
    first = prepare_data(make_config(tmp_path), sequence_length=16)
    (tmp_path / "text" / "07.txt").write_text("something else")
    second = prepare_data(make_config(tmp_path), sequence_length=16)
    assert second.fingerprint != first.fingerprint
    assert "something else" in [text for split in second.sources[0].slices for text in read_split(second, split)]


def test_a_given_tokenizer_is_used_and_kept(tmp_path: Path, documents: list[str]) -> None:
    trained = prepare_data(make_config(tmp_path), sequence_length=16)
    path = tmp_path / "mine.json"
    path.write_bytes(trained.tokenizer_path.read_bytes())
    given = prepare_data(make_config(tmp_path, tokenizer=str(path)), sequence_length=16)
    assert given.tokenizer_path.read_bytes() == path.read_bytes()
    assert given.sources == trained.sources  # the same tokens by another way
    with pytest.raises(DataError, match=r"data\.tokenizer='none\.json': no such file"):
        prepare_data(make_config(tmp_path, tokenizer="none.json"), sequence_length=16)


def test_a_broken_tokenizer_is_named_by_its_own_path(tmp_path: Path, documents: list[str]) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{}")
    with pytest.raises(DataError) as caught:
        prepare_data(make_config(tmp_path, tokenizer=str(path)), sequence_length=16)
    assert str(path) in str(caught.value)
    assert all(path.suffix == ".lock" for path in (tmp_path / "cache").rglob("*") if path.is_file())


@pytest.mark.parametrize("broken", ["train.bin", "train.idx", "validation.bin", "tokenizer.json", "meta.json"])
@pytest.mark.parametrize("how", ["cut", "deleted"])
def test_a_broken_cache_is_made_again(
    tmp_path: Path, documents: list[str], broken: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = prepare_data(make_config(tmp_path), sequence_length=16)
    path = first.tokenizer_path if broken == "tokenizer.json" else train_path(first).with_name(broken)
    whole = path.read_bytes()
    if how == "cut":
        path.write_bytes(whole[:-3])
    else:
        path.unlink()
    assert prepare_data(make_config(tmp_path), sequence_length=16) == first
    assert path.read_bytes() == whole
    assert "is broken and is made again" in caplog.text


@pytest.mark.parametrize("name", ["train.bin", "validation.bin"])
def test_a_cache_that_was_written_over_is_made_again(
    tmp_path: Path, documents: list[str], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = prepare_data(make_config(tmp_path), sequence_length=16)
    path = train_path(first).with_name(name)
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1, whole[-1]]))
    assert prepare_data(make_config(tmp_path), sequence_length=16) == first
    assert path.read_bytes() == whole
    assert "is broken and is made again" in caplog.text


def test_data_that_another_machine_has_prepared_are_waited_for(tmp_path: Path, documents: list[str]) -> None:
    prepared = prepare_data(make_config(tmp_path), sequence_length=16)
    with LateDisk({"validation.bin": 40.0}) as disk:
        assert prepared.is_here()
        assert 40 <= disk.now_s < 42
    with LateDisk({"train.idx": 40.0}) as disk:
        assert not prepared.is_here(limit_s=20)
    (source,) = prepared.sources
    other = source.model_copy(update={"train": source.train.model_copy(update={"num_file_bytes": 1})})
    assert not prepared.model_copy(update={"sources": (other,)}).is_here(), "another file of that name is seen"


def test_progress_goes_up_to_one(tmp_path: Path) -> None:
    reports: list[tuple[str, float | None]] = []
    prepare_data(
        make_config(tmp_path, source="python-stdlib", max_bytes=3_000_000),
        sequence_length=64,
        on_progress=lambda message, fraction: reports.append((message, fraction)),
    )
    assert reports[0] == ("training the tokenizer", None)
    fractions = [fraction for message, fraction in reports if message == "encoding the text"]
    assert len(fractions) > 2
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert fractions == sorted(fractions, key=lambda fraction: fraction or 0.0)


def test_too_little_text_is_refused_with_numbers(tmp_path: Path, documents: list[str]) -> None:
    config = make_config(tmp_path, validation_fraction=0.05)
    prepared = prepare_data(config, sequence_length=16)
    num_train, num_held_out = (split.num_tokens for split in prepared.sources[0].slices)
    # Each remedy that a message names works, to the last token.
    with pytest.raises(
        DataError, match=rf"holds out {num_held_out} of .*sequence_length to {num_held_out - 1} or less"
    ):
        prepare_data(config, sequence_length=num_held_out)
    prepare_data(config, sequence_length=num_held_out - 1)
    with pytest.raises(DataError, match=rf"gives {num_train} training tokens, .*to {num_train - 1} or less, or give"):
        prepare_data(config, sequence_length=num_train)
    with pytest.raises(DataError, match=r"raise data\.max_bytes=100"):
        prepare_data(make_config(tmp_path, max_bytes=100), sequence_length=10_000)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("token_id", [-1, 300])
def test_token_ids_of_another_tokenizer_are_refused(
    tmp_path: Path, documents: list[str], in_place: bool, token_id: int
) -> None:
    tokenizer = prepare_data(make_config(tmp_path), sequence_length=16).tokenizer_path
    names = ["a.bin"] if in_place else ["a.bin", "b.bin"]
    for name in names:
        with IndexedTokensWriter(tmp_path / name, vocab_size=70_000) as writer:  # in 4 bytes each
            for _ in range(4):
                writer.write(np.arange(100))
                writer.end_document()
    tokens = np.memmap(tmp_path / names[-1], "<i4", "r+")
    tokens[3] = token_id
    tokens.flush()
    config = make_config(tmp_path, source=[str(tmp_path / name) for name in names], tokenizer=str(tokenizer))
    with pytest.raises(DataError, match=f"holds the token id {token_id}, and those of data.tokenizer are 0 to 299"):
        prepare_data(config, sequence_length=16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"validation": "none"}, r"^data\.validation='none': no such file"),
        ({"mixture": [{"name": "code", "source": "none"}]}, r"^data\.mixture: code: source='none': no such file"),
        (
            {"mixture": [{"name": "code", "source": "text", "validation": "none"}]},
            r"^data\.mixture: code: validation='none': no such file",
        ),
    ],
)
def test_a_text_that_is_not_there_is_named_by_its_own_key(
    tmp_path: Path, documents: list[str], values: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        prepare_data(make_config(tmp_path, **{"source": "text", **values}), sequence_length=16)


def test_a_source_of_a_mixture_that_is_too_short_is_named(tmp_path: Path, documents: list[str]) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    mixture = [{"name": name, "source": str(tmp_path / path)} for name, path in (("a", "text"), ("b", "short.txt"))]
    config = DataConfig.model_validate({"mixture": mixture, "vocab_size": 300, "cache_dir": str(tmp_path / "cache")})
    message = r"data\.mixture: b: source=.*short\.txt gives \d+ training tokens, and one sample"
    with pytest.raises(DataError, match=message):
        prepare_data(config.model_copy(update={"validation_fraction": 0.0}), sequence_length=64)


def test_empty_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("")
    with pytest.raises(DataError, match="holds no text"):
        prepare_data(make_config(tmp_path), sequence_length=16)


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, documents: list[str]) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(PipekitError, match=r"data\.cache_dir: .*: cannot be written: a part of this path is a file"):
        prepare_data(make_config(tmp_path), sequence_length=16)


# The program of another process: it prints what it does, and can be told to die while it builds.
PROGRAM = """
import os, signal, sys
from pipekit.config import DataConfig
from pipekit.data.prepare import prepare_data
source, cache_dir, die_at = sys.argv[1:]
def report(message, fraction):
    print(message, flush=True)
    if message == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
config = DataConfig(source=source, cache_dir=cache_dir, vocab_size=300, validation_fraction=0.1)
print(prepare_data(config, sequence_length=16, timeout_s=120, on_progress=report).fingerprint)
"""


def start_process(tmp_path: Path, name: str, die_at: str = "") -> StartedCommand:
    output = tmp_path / name
    output.mkdir()
    program = output / "program.py"  # of its own, since a process that has started reads it any time
    program.write_text(PROGRAM)
    command = [str(program), str(tmp_path / "text"), str(tmp_path / "cache"), die_at]
    return StartedCommand(command, cwd=tmp_path, output=output)


def find_lock(tmp_path: Path) -> Path:
    """Return the lock of `make_config(tmp_path)`, by making and deleting what it guards."""
    folder = train_path(prepare_data(make_config(tmp_path), sequence_length=16)).parent
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    return folder.with_name(f"{folder.name}.lock")


@pytest.mark.distributed
def test_processes_that_start_together_build_once(tmp_path: Path, documents: list[str]) -> None:
    with FileLock(find_lock(tmp_path)):  # held until all three wait for it
        processes = [start_process(tmp_path, name) for name in "abc"]
        while not all(process.stdout for process in processes):
            assert not any(process.has_ended for process in processes)
            time.sleep(0.01)
    ended = [process.wait(120.0) for process in processes]
    assert [each.returncode for each in ended] == [0, 0, 0]
    outputs = [each.stdout.splitlines() for each in ended]
    assert all(output[0].startswith("waiting for another process to prepare the data (") for output in outputs)
    assert sum("encoding the text" in output for output in outputs) == 1
    assert len({output[-1] for output in outputs}) == 1
    assert not [name for name in list_cache(tmp_path) if "building" in name]


@pytest.mark.distributed
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_builder_that_was_killed_leaves_nothing_behind(tmp_path: Path, documents: list[str]) -> None:
    killed = start_process(tmp_path, "killed", die_at="encoding the text").wait(120.0)
    assert killed.returncode == -signal.SIGKILL
    assert [name for name in list_cache(tmp_path) if "building" in name], "it was killed too late"
    prepared = prepare_data(make_config(tmp_path), sequence_length=16, timeout_s=60)
    key = train_path(prepared).parent.name
    assert list_cache(tmp_path) == [key, f"{key}.lock"]


def test_a_builder_on_another_machine_that_knows_no_lock_is_left_alone(
    tmp_path: Path, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both build, as on a shared file system that does not honour locks; the first to end is the one that is used."""
    monkeypatch.setattr(build_once, "is_on_local_disk", lambda folder: False)
    lock = find_lock(tmp_path)
    others, abandoned = (lock.with_name(f"{lock.stem}.building-{name}") for name in ("other", "abandoned"))
    for folder in (others, abandoned):
        folder.mkdir()
        (folder / "train.bin").touch()
    for path in (abandoned / "train.bin", abandoned):
        os.utime(path, (0, 0))
    identity: list[int] = []

    def other_ends_first(message: str, fraction: float | None) -> None:
        if message == "encoding the text" and not identity:
            identity.append(0)
            lock.rename(lock.with_name("held by one machine alone"))
            first = prepare_data(make_config(tmp_path), sequence_length=16)
            identity[0] = train_path(first).stat().st_ino

    found = prepare_data(make_config(tmp_path), sequence_length=16, on_progress=other_ends_first)
    assert train_path(found).stat().st_ino == identity[0]
    assert others.is_dir()
    assert not abandoned.exists()


def test_a_wait_that_lasts_too_long_ends_in_one_error(tmp_path: Path, documents: list[str]) -> None:
    lock_path = find_lock(tmp_path)
    with FileLock(lock_path), pytest.raises(DataError) as caught:
        prepare_data(make_config(tmp_path), sequence_length=16, timeout_s=0.2)
    assert str(lock_path) in str(caught.value)
    assert "waited 0.2 s for another process to prepare the data" in str(caught.value)


def test_an_error_while_building_leaves_nothing_behind(tmp_path: Path, documents: list[str]) -> None:
    def interrupt(message: str, fraction: float | None) -> None:
        if message == "encoding the text":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_data(make_config(tmp_path), sequence_length=16, on_progress=interrupt)
    assert [name for name in list_cache(tmp_path) if not name.endswith(".lock")] == []
    prepare_data(make_config(tmp_path), sequence_length=16, timeout_s=60)


def test_meta_says_what_the_folder_holds(tmp_path: Path, documents: list[str]) -> None:
    prepared = prepare_data(make_config(tmp_path), sequence_length=16)
    meta = json.loads((train_path(prepared).parent / "meta.json").read_text())
    assert meta["num_documents"] == 40
    assert meta["num_text_bytes"] == sum(map(len, documents))
    assert meta["source"] == f"data.source={tmp_path / 'text'}"
