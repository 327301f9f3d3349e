"""Folders that `datasets` has saved (`save_to_disk`), of one dataset or of several splits: they hold Arrow files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipekit.data.sources.arrow import FORMAT as ARROW
from pipekit.data.sources.formats import CorpusFile, SourceFormat, describe_file
from pipekit.errors import DataError
from pipekit.files import parse_json, read_regular

_SPLITS_FILE, _STATE_FILE = "dataset_dict.json", "state.json"
_MAX_BYTES = 100_000_000


class SavedDataset(SourceFormat):
    """A folder with the files that it says are its data. Of several splits, `train` is read."""

    title = "a folder saved by datasets"

    def find(self, source: str) -> list[CorpusFile] | None:
        folder = Path(source).expanduser()
        if (folder / _SPLITS_FILE).is_file():
            splits = _read(folder / _SPLITS_FILE).get("splits")
            names = [str(name) for name in splits] if isinstance(splits, list) else []
            if "train" not in names:
                raise DataError(
                    f"data.source={source!r}: the saved dataset has no split 'train', but {', '.join(names) or 'none'};"
                    f" give the folder of one, such as {folder / names[0] if names else folder / 'train'}"
                )
            folder = folder / "train"
        elif not (folder / _STATE_FILE).is_file():
            return None
        state = _read(folder / _STATE_FILE)
        stored = state.get("_data_files")
        try:
            names = [entry["filename"] for entry in stored or ()]
            files = [folder / Path(name).name for name in names]
        except (TypeError, KeyError):
            raise DataError(
                f"{folder / _STATE_FILE}: does not list the files of a saved dataset; save it again with datasets"
            ) from None
        for file in files:
            if not file.is_file():
                raise DataError(f"{file}: a file of the saved dataset is missing; save it again with datasets")
        return [describe_file(file, ARROW, is_named=True) for file in files]


FORMAT = SavedDataset()


def _read(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_regular(path, max_bytes=_MAX_BYTES))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; save the dataset again with datasets") from error
    return value if isinstance(value, dict) else {}
