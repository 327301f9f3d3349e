from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipekit.data.corpus import find_corpus, read_passages
from pipekit.errors import DataError

datasets = pytest.importorskip("datasets")
ROWS = {"train": ["one", "two", "three"], "test": ["four"]}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub with the repository `owner/name`, whose files lie in a folder here; returns the calls that reach it."""
    for split, texts in ROWS.items():
        table = datasets.Dataset.from_dict({"text": texts, "number": list(range(len(texts)))})
        table.to_parquet(tmp_path / f"repository/data/{split}-00000-of-00001.parquet")
    (tmp_path / "repository/README.md").write_text("# The dataset's card")
    calls: list[dict[str, Any]] = []
    load = datasets.load_dataset

    def load_dataset(name: str, config: str | None, **options: Any) -> Any:
        calls.append({"name": name, "config": config, **options})
        if name != "owner/name":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub.")
        options.pop("revision")
        return load(str(tmp_path / "repository"), config, cache_dir=str(tmp_path / "cache"), **options)

    def dataset_info(self: object, name: str, *, revision: str | None, files_metadata: bool) -> SimpleNamespace:
        files = [SimpleNamespace(rfilename="README.md", size=9), SimpleNamespace(rfilename="a.parquet", size=800)]
        return SimpleNamespace(sha=f"commit-of-{revision}", siblings=files)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    datasets.disable_progress_bars()
    return calls


def read_texts(source: str, **options: Any) -> list[str]:
    return [passage.text for passage in read_passages(find_corpus(source), **options)]


def test_a_dataset_is_downloaded_and_read_from_the_cache_of_datasets(hub: list[dict[str, Any]]) -> None:
    assert read_texts("hf://owner/name") == ROWS["train"]
    assert read_texts("hf://owner/name?split=test&revision=v2&config=default") == ROWS["test"]
    assert read_texts("hf://owner/name?split=train+test") == [*ROWS["train"], *ROWS["test"]]
    assert hub[1] == {"name": "owner/name", "config": "default", "split": "test", "revision": "v2"}


def test_what_it_is_does_not_depend_on_the_place_of_the_cache(hub: list[dict[str, Any]], tmp_path: Path) -> None:
    first = find_corpus("hf://owner/name").identity
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    assert find_corpus("hf://owner/name").identity == first
    assert find_corpus("hf://owner/name?split=test").identity != first
    assert str(tmp_path) not in str(first)


def test_a_streamed_dataset_is_that_of_the_commit_that_was_found_first(hub: list[dict[str, Any]]) -> None:
    corpus = find_corpus("hf://owner/name?stream=true&revision=main")
    assert hub == []
    assert corpus.num_bytes == 800
    assert [passage.text for passage in read_passages(corpus)] == ROWS["train"]
    assert hub[0]["revision"] == "commit-of-main"
    odd = find_corpus("hf://owner/name?stream=true&config=a?b")
    with pytest.raises(DataError, match="cannot be read from the Hugging Face hub or its cache here: BuilderConfig"):
        next(read_passages(odd))
    assert hub.pop(1)["config"] == "a?b"
    assert hub[0]["streaming"]
    assert read_texts("hf://owner/name?stream=true", max_bytes=4) == ["one", "t"]
    with pytest.raises(DataError, match=r"hf://owner/name: no key 'body' among 'text', 'number'; set data\.text_key"):
        read_texts("hf://owner/name?stream=true", text_key="body")


def test_a_folder_of_the_same_name_is_not_taken_for_it(
    hub: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="would read the folder owner/name here in its place; rename that"):
        find_corpus("hf://owner/name")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://owner/other", r"hf://owner/other'.*other' doesn't exist on the Hub; check the name"),
        ("hf://owner/name?split=dev", r"Unknown split \"dev\"\. Should be one of \['train', 'test'\]"),
        ("hf://owner/name?splt=test", r"unknown option 'splt'; did you mean 'split'\?"),
        ("hf://owner/name?split=train[:10]", r"must name whole splits"),
        ("hf://owner/name?stream=yes", r"stream=yes must be true or false"),
        ("hf://a/b/c", r"write hf://OWNER/NAME"),
    ],
)
def test_what_the_hub_does_not_have_is_refused(hub: list[dict[str, Any]], source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_corpus(source)
