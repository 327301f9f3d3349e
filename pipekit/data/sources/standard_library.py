"""The source code of the running Python's standard library, which every machine has, as a source of text."""

from __future__ import annotations

import platform
import sysconfig
from pathlib import Path

from pipekit.data.sources.folder import walk
from pipekit.data.sources.formats import CorpusFile, SourceFormat
from pipekit.data.sources.text import FORMAT as TEXT
from pipekit.errors import DataError

NAME = "python-stdlib"
# Tests, other people's packages, and tables written by programs, which are no prose.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)


class StandardLibrary(SourceFormat):
    """The `.py` files of the standard library, without its tests, under the name `python-stdlib`."""

    title = "the standard library's source code"
    example = NAME

    def find(self, source: str) -> list[CorpusFile] | None:
        if source != NAME:
            return None
        root = Path(sysconfig.get_path("stdlib"))
        prefix = f"{NAME} {platform.python_version()}"
        files = [
            CorpusFile(
                path=path,
                name=f"{prefix}/{path.relative_to(root).as_posix()}",
                num_bytes=path.stat().st_size,
                mtime_ns=None,  # version and sizes tell enough, and are the same on every machine
                is_named=False,
                format=TEXT,
            )
            for path in walk(root, skipped_folders=_SKIPPED_FOLDERS)
            if path.suffix == ".py"
        ]
        if not files:
            raise DataError(f"data.source='{NAME}': no .py files under {root}; give a text file or folder")
        return files


FORMAT = StandardLibrary()
