"""A report on terminals of any width."""

from __future__ import annotations

import io
from typing import Any

import pytest
import yaml
from rich.console import Console

from pipekit.commands.plan_tables import counts_text, show_report
from pipekit.config import parse_config
from pipekit.partitioners import ComparedPartition
from pipekit.predictions.report import report
from pipekit.predictions.search import SearchSpace, search_layouts
from predictions.planned import device, layer, model, plan, predict

LAYERS = [layer(10**9, parameters=10**9)] * 16
FAST = {"bandwidth": 1e11, "latency_s": 1e-6}
BIG = device(
    memory_bytes=10**12,
    peak_flops=dict.fromkeys(("fp32", "tf32", "bf16", "fp16"), 1e10),
    memory_bandwidth=1e12,
    intra_node=FAST,
    inter_node=FAST,
)


def shown(found: dict[str, Any], width: int) -> str:
    text = io.StringIO()
    show_report(found, Console(file=text, width=width, highlight=False))
    return text.getvalue()


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    given = plan(pp=4, schedule="zb-v", stages_per_rank=2, num_micro_batches=8)
    planned = model(LAYERS)
    result = search_layouts(planned, SearchSpace(8, 16), BIG)
    partitions = [ComparedPartition("parameters", list(range(0, 200, 2)), 1.25)]
    return report(predict(planned, given, BIG), BIG, planned.layer_names, result, partitions)


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_off_at_any_width(compared: dict[str, Any], width: int) -> None:
    text = shown(compared, width)
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    for part in (
        "16,000,000,000 parameters",
        "pp=4 x dp=1 x tp=1, ZeRO 0, zb-v x 2, 8 micro-batches of 1",
        "2 + 2 each",
    ):
        assert part in text
    assert "4 x plain with 1.0 TB" in text
    assert "1.250" in text
    assert "0 2 4 6 8 10 12 14 16 18 20 22 ..." in text
    assert "layouts were simulated and fit" in text
    written = yaml.safe_load(text.partition("the fastest in YAML:\n")[2])
    given = {"model": {"preset": "tiny"}, "train": {"steps": 1, "global_batch_size": 16, **written["train"]}}
    assert parse_config({**given, "parallel": written["parallel"]}).parallel.pp == 4


def test_equal_ranks_share_a_row() -> None:
    first = layer(10**9, parameters=2 * 10**9)
    planned = model([first, *LAYERS[1:]])
    prediction = predict(planned, plan(pp=8, schedule="gpipe", num_micro_batches=8), BIG)
    text = shown(report(prediction, BIG, planned.layer_names), 120)
    ranks = text.partition("used")[2].strip().splitlines()
    assert [line.split()[:3] for line in ranks] == [["0", "0-1", "3.0"], ["1-7", "2", "each"]]


def test_what_does_not_fit_says_so() -> None:
    small = device(memory_bytes=10**9)
    found = report(predict(model(LAYERS), plan(), small), small, model(LAYERS).layer_names)
    text = shown(found, 120)
    assert "on the fullest rank, which does not fit" in text
    assert "%" in text
    assert "layouts" not in text


def test_rejected_layouts_are_counted_by_reason(compared: dict[str, Any]) -> None:
    layout = compared["layout"]
    rejected = [
        {"layout": layout, "reason": "needs 9.00 GB of 8.00 GB", "lacking_bytes": 1e9},
        {"layout": layout, "reason": "needs at least 90.00 GB of 8.00 GB", "lacking_bytes": 82e9},
        {"layout": layout, "reason": "has 16 stages, more than the 8 layers"},
    ]
    lines = counts_text({**compared, "num_fitting": 3, "num_open": 1200, "rejected": rejected}).splitlines()
    assert lines[0] == "3 layouts were simulated and fit"
    assert lines[1].startswith("1,200 more are estimated to be slower")
    assert lines[2].startswith("2 do not fit in memory, such as pp=4")
    assert lines[2].endswith("needs 9.00 GB of 8.00 GB")
    assert lines[3].startswith("1 cannot be built")
