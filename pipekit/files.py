"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a file under a temporary name, and rename it once it is on the disk.

    Whoever reads meanwhile sees the old file or the new one; several processes may write the same one.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(temporary: Path, final: Path) -> None:
    """Give a folder that is complete its final name, in place of an earlier folder of that name."""
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
