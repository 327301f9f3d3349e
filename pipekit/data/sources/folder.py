"""Folders as sources: which of their files are data."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from pathlib import Path

from pipekit.data.sources.formats import CorpusFile, TextFormat, describe_file
from pipekit.data.sources.recognise import recognise, what_to_give
from pipekit.data.sources.text import FOLDER_SUFFIXES
from pipekit.data.sources.text import FORMAT as TEXT
from pipekit.errors import DataError

logger = logging.getLogger(__name__)

_TRAIN = {"train", "training"}
_HELD_OUT = {"test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}


def find_in_folder(folder: Path, source: str) -> list[CorpusFile]:
    """Return the data files under a folder, in sorted order, without hidden ones.

    Files of records or of token ids, of one format, go before text files, which only describe them there. Where every
    file is named for a split, as `train-00000.parquet` or `test/data.jsonl` are, those for training are read.

    Raises:
        DataError: if there is none, or records of several formats.
    """
    found = [(path, format) for path in walk(folder) if (format := recognise(path, is_named=False)) is not None]
    # Records in files or folders with an underscore in front are what programs note about the data.
    found = [(path, format) for path, format in found if format is TEXT or not _is_note(path.relative_to(folder))]
    if any(format is not TEXT for _, format in found):
        if texts := [path for path, format in found if format is TEXT]:
            logger.warning("%s: text files beside the data are left out: %s", folder, _list(folder, texts))
        found = [(path, format) for path, format in found if format is not TEXT]
    counts = Counter(format for _, format in found)
    if len(counts) > 1:
        kinds = " and ".join(f"{format.title} ({count})" for format, count in counts.items())
        raise DataError(
            f"data.source={source!r}: the folder holds {kinds}; name the files to read, as {source}/*.parquet"
        )
    if not found:
        raise DataError(
            f"data.source={source!r}: the folder holds no {', '.join(FOLDER_SUFFIXES)} file, and none of another "
            f"format that is read; give {what_to_give()}"
        )
    splits = {path: _split_of(path.relative_to(folder)) for path, _ in found}
    others = [path for path, split in splits.items() if split == "held out"]
    if others and len(others) < len(found) and None not in splits.values():
        logger.warning("%s: files that are not for training are left out: %s", folder, _list(folder, others))
        found = [(path, format) for path, format in found if splits[path] == "train"]
    return [describe_file(path, format, is_named=not isinstance(format, TextFormat)) for path, format in found]


def walk(root: Path, skipped_folders: frozenset[str] = frozenset()) -> list[Path]:
    """Return the files under a folder in sorted order, without hidden ones."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in skipped_folders]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    files = [path for path in found if path.is_file()]  # a broken link is no file
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _is_note(path: Path) -> bool:
    return any(part.startswith("_") for part in path.parts)


def _split_of(path: Path) -> str | None:
    for part in reversed(path.parts):
        words = set(re.split(r"[^a-z]+", part.lower()))
        if words & _TRAIN:
            return "train"
        if words & _HELD_OUT:
            return "held out"
    return None


def _list(folder: Path, paths: list[Path]) -> str:
    names = [path.relative_to(folder).as_posix() for path in paths]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
