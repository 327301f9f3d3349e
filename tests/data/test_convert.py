from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipekit.config import DataConfig
from pipekit.data.convert import check_out, convert_tokens
from pipekit.data.megatron import IndexedTokens
from pipekit.data.prepare import prepare_data
from pipekit.data.tokenizer import load_tokenizer
from pipekit.errors import DataError, StorageError

TEXTS = [f"document {number} says\n{number} and <|endoftext|> in words \u00e4\u20ac" for number in range(30)]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    cache = str(tmp_path / "cache")
    return DataConfig(source=str(tmp_path / "text.jsonl"), text_key="body", vocab_size=300, cache_dir=cache)


def convert(config: DataConfig, out: Path) -> dict[Path, int]:
    prepared = prepare_data(config, sequence_length=1)
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    return convert_tokens(prepared.sources, tokenizer, out, text_key="body", report=lambda message, fraction: None)


def test_text_comes_back_from_megatrons_format_as_it_was(config: DataConfig, tmp_path: Path) -> None:
    whole = config.model_copy(update={"validation_fraction": 0.0})
    assert convert(whole, tmp_path / "out" / "a.bin") == {tmp_path / "out" / "a.bin": 30}
    tokenizer = prepare_data(whole, sequence_length=1).tokenizer_path
    foreign = whole.model_copy(update={"source": str(tmp_path / "out" / "a.bin"), "tokenizer": str(tokenizer)})
    assert convert(foreign, tmp_path / "out" / "b.jsonl") == {tmp_path / "out" / "b.jsonl": 30}
    lines = (tmp_path / "out" / "b.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"body": text} for text in TEXTS]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.bin", "a.idx", "b.jsonl"]


def test_held_out_documents_have_files_of_their_own(config: DataConfig, tmp_path: Path) -> None:
    config = config.model_copy(update={"validation_fraction": 0.5})
    convert(config, tmp_path / "a.bin")
    slices = prepare_data(config, sequence_length=1).sources[0].slices
    for name, part in zip(("a.bin", "a-validation.bin"), slices, strict=True):
        expected = [document.tolist() for document in IndexedTokens(part.path).documents()]
        assert [document.tolist() for document in IndexedTokens(tmp_path / name).documents()] == expected
    convert(config, tmp_path / "a.jsonl")
    texts = [json.loads(line)["body"] for line in (tmp_path / "a-validation.jsonl").read_text().splitlines()]
    assert len(texts) == 15
    assert set(texts) < set(TEXTS)


def test_a_name_without_a_format_and_files_that_are_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.txt: the name decides the format; give one that ends in \.bin"):
        check_out(tmp_path / "a.txt", overwrite=False)
    (tmp_path / "a.idx").touch()
    with pytest.raises(DataError, match=r"a\.idx: is there already; give another name, or replace it with --overwrite"):
        check_out(tmp_path / "a.bin", overwrite=False)
    check_out(tmp_path / "a.bin", overwrite=True)
    for name in ("b.mask", "c-validation.idx", "d-validation.jsonl"):
        (tmp_path / name).touch()
        out = tmp_path / f"{name[0]}.{'jsonl' if 'jsonl' in name else 'bin'}"
        with pytest.raises(DataError, match=rf"{name}: is there already"):
            check_out(out, overwrite=False)


def test_a_folder_that_cannot_be_written_is_an_error_of_storage(config: DataConfig, tmp_path: Path) -> None:
    for suffix in ("bin", "jsonl"):
        with pytest.raises(StorageError, match=r"text\.jsonl"):
            convert(config, tmp_path / "text.jsonl" / f"a.{suffix}")
