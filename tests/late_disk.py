"""A double of a shared folder that shows late what other machines have written, in which no real time passes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from pipekit import files


class LateDisk:
    """Takes the place of `files.look_anew` and of the clock in this process, until it is left as a context manager.

    Args:
        delays_s: seconds after which the files and folders with these names are seen.

    Attributes:
        now_s: time that has passed, all of it in waits.
    """

    def __init__(self, delays_s: dict[str, float]) -> None:
        self.now_s = 0.0
        self._originals = {name: getattr(files, name) for name in ("look_anew", "is_on_local_disk", "time")}
        original = files.look_anew

        def look(path: Path) -> int | None:
            return original(path) if self.now_s >= delays_s.get(path.name, 0.0) else None

        files.look_anew = look
        files.is_on_local_disk = lambda folder: False
        files.time = SimpleNamespace(monotonic=lambda: self.now_s, sleep=self._sleep)  # type: ignore[assignment]

    def __enter__(self) -> LateDisk:
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(files, name, original)

    def _sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds
