"""The model-parallel unit under DeepSpeed's names and every order of the axes, against DeepSpeed's own grid."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest

from gloo_workers import GlooWorkers
from pipekit.layout import Axis, Layout, Order

pytestmark = pytest.mark.distributed

AXES: tuple[Axis, ...] = ("pipe", "data", "tensor")
ORDERS: list[Order] = [(one, two, three) for one, two, three in permutations(AXES)]
LAYOUTS = [
    *[Layout(*degrees, order=order) for degrees in ((2, 2, 1), (2, 1, 2), (1, 2, 2)) for order in ORDERS],
    *[Layout(*degrees) for degrees in ((4, 1, 1), (1, 4, 1), (1, 1, 4))],
    *[Layout(2, 2, 2, order=order) for order in ORDERS],
]
SOME_LAYOUTS = [LAYOUTS[0], LAYOUTS[7], LAYOUTS[-2], LAYOUTS[-1]]


def plain(value: Any) -> Any:
    """Return a group's ranks in place of the group."""
    import torch.distributed as dist

    return sorted(dist.get_process_group_ranks(value)) if isinstance(value, dist.ProcessGroup) else value


def answers(rank: int, layout: Layout) -> tuple[dict[str, Any], dict[str, Any]]:
    """Answers of our adapter and of DeepSpeed's grid of the same topology, by name."""
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid

    from pipekit.deepspeed.mpu import DeepSpeedMPU
    from pipekit.deepspeed.patches import use_joined_processes
    from pipekit.distributed.mpu import ModelParallelUnit

    use_joined_processes()
    ours = DeepSpeedMPU(ModelParallelUnit(layout))
    theirs = PipelineParallelGrid(topology=ours.topology())
    getters = [name for name in dir(theirs) if name.startswith("get_")]
    attributes = ["global_rank", "world_size", "stage_id", "data_parallel_id", "pp_group", "p2p_groups"]
    attributes += ["is_first_stage", "is_last_stage"]
    attributes += [f"{axis}_parallel_size" for axis in ("pipe", "data", "model", "slice")]
    said: list[dict[str, Any]] = []
    for mpu in (ours, theirs):
        found = {name: plain(getattr(mpu, name)()) for name in getters}
        found |= {name: plain(getattr(mpu, name)) for name in attributes}
        found["topology"] = (list(mpu.topology().get_axis_names()), mpu.topology().get_coord(rank)._asdict())
        found["_topo"] = mpu._topo is mpu.topology()
        for stage in range(layout.pp):
            found[f"stage {stage}"] = mpu.stage_to_global(stage_id=stage)
            for replica in range(layout.dp):
                named = {"data": replica, "model": layout.tp - 1}
                found[f"stage {stage} of replica {replica}"] = mpu.stage_to_global(stage_id=stage, **named)
        said.append({name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})
    return said[0], said[1]


@pytest.mark.parametrize(
    "layout",
    [pytest.param(each, marks=() if each in SOME_LAYOUTS else pytest.mark.slow) for each in LAYOUTS],
    ids=str,
)
def test_it_answers_as_deepspeeds_grid_does(gloo: GlooWorkers, layout: Layout) -> None:
    for ours, theirs in gloo.run(layout.world_size, answers, layout):
        assert len(theirs) > 30
        assert ours == theirs


def megatron_answers(rank: int, layout: Layout) -> tuple[dict[str, Any], dict[str, Any]]:
    """Other names that DeepSpeed asks of an `mpu`, with the answers that follow from the layout."""
    from deepspeed.utils.bwc import (
        bwc_pipeline_parallel_group,
        bwc_pipeline_parallel_world_size,
        bwc_tensor_model_parallel_group,
        bwc_tensor_model_parallel_rank,
        bwc_tensor_model_parallel_world_size,
    )

    from pipekit.deepspeed.mpu import DeepSpeedMPU
    from pipekit.distributed.mpu import ModelParallelUnit

    mpu: Any = DeepSpeedMPU(ModelParallelUnit(layout))
    place = layout.coordinate(rank)

    def along(*axes: Axis) -> list[int]:
        return next(ranks for ranks in layout.groups(*axes) if rank in ranks)

    at = {"pipe": place.pipe, "data": place.data, "tensor": place.tensor}
    pairs = {
        "tensor rank": (bwc_tensor_model_parallel_rank(mpu), place.tensor),
        "tensor size": (bwc_tensor_model_parallel_world_size(mpu), layout.tp),
        "tensor group": (plain(bwc_tensor_model_parallel_group(mpu)), along("tensor")),
        "pipe size": (bwc_pipeline_parallel_world_size(mpu), layout.pp),
        "pipe group": (plain(bwc_pipeline_parallel_group(mpu)), along("pipe")),
        "pipe rank": (mpu.get_pipeline_model_parallel_rank(), place.pipe),
        "tensor source": (mpu.get_tensor_model_parallel_src_rank(), layout.rank(**{**at, "tensor": 0})),
        "slice source": (mpu.get_slice_parallel_src_rank(), layout.rank(**{**at, "tensor": 0})),
        "data source": (mpu.get_data_parallel_src_rank(), layout.rank(**{**at, "data": 0})),
        "pipe source": (mpu.get_pipe_parallel_src_rank(), layout.rank(**{**at, "pipe": 0})),
        "first": (mpu.get_pipeline_model_parallel_first_rank(), layout.rank(**{**at, "pipe": 0})),
        "last": (mpu.get_pipeline_model_parallel_last_rank(), layout.rank(**{**at, "pipe": layout.pp - 1})),
        "model source": (mpu.get_model_parallel_src_rank(), layout.rank(data=place.data)),
    }
    return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}


@pytest.mark.parametrize(
    "order", [ORDERS[0], *(pytest.param(each, marks=pytest.mark.slow) for each in ORDERS[1:])], ids="-".join
)
def test_it_answers_to_megatrons_names_too(gloo: GlooWorkers, order: Order) -> None:
    for said, expected in gloo.run(8, megatron_answers, Layout(2, 2, 2, order=order)):
        assert said == expected
