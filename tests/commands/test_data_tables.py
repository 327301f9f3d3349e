from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from pipekit.commands.data_tables import show_inspection

FOUND: dict[str, Any] = {
    "sources": [
        {
            "name": "text",
            "train": {
                "num_documents": 1_234_567,
                "num_tokens": 9_876_543_210,
                "path": "/" + "folder/" * 15,
            },
            "validation": {"num_documents": 3, "num_tokens": 40, "path": "validation.bin"},
            "lengths": {
                "shortest": 1,
                "median": 3.0,
                "mean": 4.0,
                "percentile_90": 6.0,
                "longest": 1_234_567,
                "histogram": [{"low": 1, "high": 1, "num_documents": 10}, {"low": 2, "high": 3, "num_documents": 20}],
            },
            "duplicates": {
                "num_documents": 5,
                "num_tokens": 1_234_567,
                "most_repeated": 4,
                "most_repeated_document": 7,
                "num_held_out_in_training": 2,
            },
            "samples": [{"document": 9, "num_tokens": 100, "num_shown": 64, "text": "words [bold] " * 20}],
        }
    ],
    "run": {"num_tokens": 640, "text": "10 steps of 4 sequences of 16 tokens", "epochs": {"text": 1.23}},
}


def test_epochs_of_a_mixture_are_told_by_source() -> None:
    stream = io.StringIO()
    run = {**FOUND["run"], "epochs": {"web": 0.25, "code": 3.5}}
    show_inspection({"sources": [], "run": run}, Console(file=stream, width=120))
    assert "sequences of 16 tokens), 0.25 epochs of web, 3.5 epochs of code." in stream.getvalue()


def test_everything_is_told_within_80_columns() -> None:
    stream = io.StringIO()
    show_inspection(FOUND, Console(file=stream, width=80))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "training 1,234,567 documents, 9,876,543,210 tokens" in text
    assert "held out 3 documents, 40 tokens validation.bin" in text
    assert "lengths 1 to 1,234,567 tokens; median 3, mean 4, 90 % at most 6" in text
    assert "5 training documents repeat an earlier one, with 1.2 M tokens; document 7 occurs 4 times" in text
    assert "2 held-out documents are also in the training data" in text
    assert "document 9, 100 tokens words [bold] words" in text, "markup is text"
    assert "... and 36 more tokens" in text
    assert "The run reads 640 tokens (10 steps of 4 sequences of 16 tokens), 1.23 epochs of the training text." in text
    one, more = (line for line in lines if "\u2588" in line)
    assert (one.split()[0], one.split()[-1]) == ("1", "10")
    assert (more.split()[:3], more.split()[-1]) == (["2", "to", "3"], "20")
    assert more.count("\u2588") == 2 * one.count("\u2588") == 32
