from __future__ import annotations
import __future__

from pathlib import Path

from pipekit.data.corpus import find_corpus
from source_texts import read_texts


def test_stdlib_holds_modules_and_no_tests() -> None:
    names = [file.name.split("/", 1)[1] for file in find_corpus("python-stdlib").files]
    assert {"ast.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages"}


def test_stdlib_text_is_the_source_of_the_modules() -> None:
    texts = read_texts("python-stdlib", max_bytes=500_000)
    assert Path(__future__.__file__).read_text(encoding="utf-8") in texts
    assert sum(len(text.encode()) for text in texts) <= 500_000
