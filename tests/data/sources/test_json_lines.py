from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipekit.errors import DataError
from source_texts import read_texts


def test_jsonl_reads_the_chosen_key(tmp_path: Path) -> None:
    rows = [{"text": "no", "body": "first\r\nline"}, {"body": ""}, {"body": "half \ud83d pair"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    first, second = read_texts(str(path), text_key="body")
    assert first == "first\r\nline"
    assert second.startswith("half ")
    assert second.endswith(" pair")
    second.encode()


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": "broken', "not a JSON object"),
        (b'["text"]', "the line is a list"),
        (b'{"body": "x", "id": 3}', "no key 'text' among 'body', 'id'; set data.text_key"),
        (b'{"text": 3}', "key 'text' holds a number"),
        (b'{"text": null}', "key 'text' holds null"),
        (b'{"text": "\xff"}', "not a JSON object"),
    ],
)
def test_bad_jsonl_line_is_named_by_file_and_line(tmp_path: Path, line: bytes, what: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_texts(str(path))
    assert f"{path}:3: " in str(caught.value)
    assert what in str(caught.value)
