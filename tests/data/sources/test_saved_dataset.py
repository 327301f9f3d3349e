from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipekit.data.corpus import find_corpus
from pipekit.errors import DataError
from source_texts import read_texts

datasets = pytest.importorskip("datasets")
TEXTS = [f"text {i}" for i in range(30)]


@pytest.fixture(autouse=True)
def _without_bars() -> None:
    datasets.disable_progress_bars()


def test_a_saved_dataset_gives_what_datasets_loads(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).shuffle(seed=1).save_to_disk(tmp_path / "saved", num_shards=3)
    loaded = datasets.load_from_disk(tmp_path / "saved")
    loaded.map(lambda row: {"text": row["text"].upper()})  # leaves a file of its own in the folder
    assert len(list((tmp_path / "saved").glob("cache-*.arrow"))) > 0
    assert read_texts(tmp_path / "saved") == loaded["text"][:]


def test_of_several_splits_train_is_read(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("test", "train")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert read_texts(tmp_path / "saved") == ["train"]
    assert read_texts(tmp_path / "saved/test") == ["test"]
    datasets.DatasetDict({"dev": splits["test"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(DataError, match=r"has no split 'train', but dev; give the folder of one, such as .*other/dev"):
        find_corpus(str(tmp_path / "other"))


def test_one_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path)
    (tmp_path / "data-00000-of-00001.arrow").rename(tmp_path / "moved.arrow")
    with pytest.raises(DataError, match=r"data-00000-of-00001\.arrow: a file of the saved dataset is missing"):
        find_corpus(str(tmp_path))
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [1]}))
    with pytest.raises(DataError, match=r"state\.json: does not list the files of a saved dataset"):
        find_corpus(str(tmp_path))
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json: cannot be read"):
        find_corpus(str(tmp_path))
