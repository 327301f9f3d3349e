"""`pipekit presets`: every named size of the built-in families."""

from __future__ import annotations

from typer.testing import CliRunner

from pipekit.cli import app
from pipekit.config import parse_config
from pipekit.models import preset_families


def test_every_preset_has_a_row_with_the_sizes_of_its_model() -> None:
    lines = CliRunner().invoke(app, ["presets"]).output.splitlines()
    assert all(len(line) <= 80 for line in lines)
    rows = {cells[0]: cells[1:] for line in lines[1:] if len(cells := line.split()) > 5}
    assert list(preset_families()) == [name for name in rows if name in preset_families()]
    model = parse_config({"model": {"preset": "llama-3.2-1b"}, "train": {"steps": 1}}).model
    sizes = (model.num_layers, model.hidden_size, model.num_heads, model.max_positions, model.vocab_size)  # type: ignore[attr-defined]
    assert rows["llama-3.2-1b"] == ["llama", *(f"{size:,}" for size in sizes)]
