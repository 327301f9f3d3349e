"""Tensors read from safetensors files piece by piece."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipekit.checkpoint import stored_tensors
from pipekit.checkpoint.stored_tensors import map_tensor, read_header, read_tensor
from pipekit.errors import DamagedCheckpointError


@pytest.mark.parametrize("piece", [1, 4, 7, 100])
def test_pieces_make_up_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    tensors = {
        "matrix": torch.randn(5, 3),
        "half": torch.randn(11).bfloat16(),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "t.safetensors")
    monkeypatch.setattr(stored_tensors, "_PIECE_ELEMENTS", piece)
    for name, stored in read_header(tmp_path / "t.safetensors").items():
        assert torch.equal(read_tensor(stored), tensors[name])
        assert torch.equal(map_tensor(stored), tensors[name])
        rounded = read_tensor(stored, rounded_to=torch.float16, dtype=torch.float32)
        assert torch.equal(rounded, tensors[name].half().float())
        assert rounded.dtype == torch.float32


def test_a_header_that_is_damaged_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{not it}")
    with pytest.raises(DamagedCheckpointError, match=r"t\.safetensors: damaged"):
        read_header(tmp_path / "t.safetensors")
