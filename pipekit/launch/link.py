"""The link between the launcher and the agent of a host: messages over the standard streams of one ssh connection."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import IO, Any

Message = dict[str, Any]

BEAT_S = 1.0
"""Seconds between the messages by which each end shows that it is there."""

_MARK = b"pipekit:"
_MOST_BYTES = 16 << 20


class Link:
    """One end of a link. What a login shell prints on the way is passed on as a message `noise`.

    Args:
        reader: the stream that the other end writes to.
        writer: the stream that the other end reads from.
    """

    def __init__(self, reader: IO[bytes], writer: IO[bytes]) -> None:
        self._reader, self._writer = reader, writer
        self._lock = threading.Lock()

    def send(self, **message: Any) -> bool:
        """Send a message of values that JSON can hold; False if the other end is gone."""
        try:
            with self._lock:
                self._writer.write(_MARK + json.dumps(message).encode() + b"\n")
                self._writer.flush()
        except (OSError, ValueError):
            return False
        return True

    def messages(self) -> Iterator[Message]:
        """Yield the messages of the other end, until it is gone."""
        while True:
            try:
                line = self._reader.readline(_MOST_BYTES)
            except (OSError, ValueError):
                return
            if not line:
                return
            mark, found, text = line.partition(_MARK)
            message: Any = None
            if found:
                try:
                    message = json.loads(text)
                except ValueError:
                    mark = line
            if mark:
                yield {"noise": mark.decode(errors="replace")}
            if isinstance(message, dict):
                yield message
