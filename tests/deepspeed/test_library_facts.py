"""Facts that torch and DeepSpeed tell about themselves."""

from __future__ import annotations

import json

import pytest
import torch

from pipekit.deepspeed import library_facts


def test_the_facts_of_this_machine_can_be_json() -> None:
    facts = library_facts.library_facts()
    assert facts["torch_error"] is None
    assert facts["deepspeed_error"] is None
    assert "gloo" in facts["backends"]
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert json.loads(json.dumps(facts)) == facts


def test_what_cannot_be_imported_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("libcudart.so.12: cannot open shared object file\nand more")

    monkeypatch.setattr(library_facts, "_torch_facts", fail)
    error = "ImportError: libcudart.so.12: cannot open shared object file"
    assert library_facts.library_facts() == {"torch_error": error}
