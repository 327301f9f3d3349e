"""Saving under one layout and going on under another."""

from __future__ import annotations

import json
import shutil
import threading
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from engine_jobs import (
    Case,
    build_engine,
    compiling_adam,
    micro_batches,
    reference_run,
    save_engine,
    show,
    train_job,
    training_state,
)
from gloo_workers import GlooWorkers
from late_disk import LateDisk
from pipekit.checkpoint.manifest import find_latest, list_checkpoints, load_manifest
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.engine.load import load_checkpoint
from pipekit.engine.open_checkpoint import open_checkpoint
from pipekit.errors import CheckpointError, DamagedCheckpointError, NumbersError, StorageError

pytestmark = pytest.mark.distributed


def run(gloo: GlooWorkers, case: Case, **options: Any) -> list[dict[str, Any]]:
    return gloo.run(case.world_size, train_job, case, options)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(pp=1, zero=0), marks=pytest.mark.slow),
        pytest.param(Case(pp=2, zero=1), marks=pytest.mark.slow),
        Case(pp=2, dp=2, zero=1),
        Case(pp=2, precision="bf16"),
        Case(precision="fp16"),
    ],
    ids=lambda case: f"pp{case.pp}dp{case.dp}zero{case.zero}{case.precision}",
)
def test_same_layout_goes_on_bit_for_bit(gloo: GlooWorkers, tmp_path: Path, case: Case) -> None:
    whole = run(gloo, case, save=str(tmp_path))
    resumed = run(gloo, case, load=str(tmp_path / "step-00000002"))
    for before, after in zip(whole, resumed, strict=True):
        assert after["losses"] == before["losses"][2:]
        assert after["norms"] == before["norms"][2:]
        for name, weights in before["weights"].items():
            assert torch.equal(weights, after["weights"][name]), name


@pytest.mark.parametrize(
    "distances",
    # In a ring every layout writes and reads. As a checkpoint knows no layout, the other pairs repeat that.
    [[1], pytest.param([2, 3], marks=pytest.mark.slow)],
    ids=["the next", "all others"],
)
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_any_layout_goes_on_from_any_other(gloo: GlooWorkers, tmp_path: Path, tied: bool, distances: list[int]) -> None:
    layouts = [
        Case(pp=1, zero=0, tied=tied),
        Case(pp=4, zero=1, tied=tied),
        Case(pp=2, dp=2, zero=1, tied=tied),
        Case(pp=1, dp=2, zero=1, tied=tied),
    ]
    expected = reference_run(layouts[0])
    for index, writer in enumerate(layouts):
        folder = tmp_path / f"pp{writer.pp}dp{writer.dp}"
        run(gloo, writer, save=str(folder))
        for distance in distances:
            reader = layouts[(index + distance) % len(layouts)]
            losses = run(gloo, reader, load=str(folder / "step-00000002"))[0]["losses"]
            assert losses == pytest.approx(expected["losses"][2:], rel=1e-4)


def test_fp32_at_another_pp_is_the_same_to_1e5(gloo: GlooWorkers, tmp_path: Path) -> None:
    whole = run(gloo, Case(pp=2), save=str(tmp_path))[0]
    resumed = run(gloo, Case(pp=1), load=str(tmp_path / "step-00000002"))[0]
    assert resumed["losses"] == pytest.approx(whole["losses"][2:], rel=1e-5)


def save_again(rank: int, case: Case, checkpoint: str, folder: str) -> None:
    from pipekit.engine.load import load_checkpoint

    engine = build_engine(case)
    load_checkpoint(engine, CheckpointReader(Path(checkpoint)))
    save_engine(engine, Path(folder), 2)


@pytest.mark.parametrize(
    "reader",
    [
        Case(dp=2, zero=3, steps=6),
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in (
                Case(pp=1, zero=0, steps=15),
                Case(pp=4, zero=1, steps=15),
                Case(pp=2, tp=1, dp=2, zero=1, steps=15),
                Case(dp=4, zero=2, steps=15),
            )
        ),
    ],
    ids=show,
)
def test_from_all_axes_to_any_others_losses_and_moments_are_the_same(
    gloo: GlooWorkers, tmp_path: Path, reader: Case
) -> None:
    writer = Case(pp=2, tp=2, dp=2, zero=1, steps=reader.steps)
    whole = run(gloo, writer, save=str(tmp_path))[0]
    checkpoint = tmp_path / "step-00000002"
    resumed = run(gloo, reader, load=str(checkpoint))[0]
    assert resumed["losses"] == pytest.approx(whole["losses"][2:], rel=1e-5)
    gloo.run(reader.world_size, save_again, reader, str(checkpoint), str(tmp_path / "again"))
    one, other = CheckpointReader(checkpoint), CheckpointReader(tmp_path / "again" / checkpoint.name)
    for name, entry in one.manifest.tensors.items():
        for kind in entry.files:
            assert torch.equal(one.tensor(name, kind), other.tensor(name, kind)), (name, kind)
        assert entry.files.keys() == {"weights", "exp_avg", "exp_avg_sq"}


def test_a_checkpoint_knows_no_layout(gloo: GlooWorkers, tmp_path: Path) -> None:
    contents = []
    for case in (Case(pp=1, zero=0, steps=2), Case(pp=2, dp=2, steps=3)):
        folder = tmp_path / f"pp{case.pp}"
        run(gloo, case, save=str(folder))
        reader = CheckpointReader(folder / "step-00000002")
        contents.append(
            {name: (reader.tensor(name), reader.tensor(name, "exp_avg")) for name in reader.manifest.tensors}
        )
    one, other = contents
    assert one.keys() == other.keys()
    assert sum(name.startswith("embed") for name in one) == 1
    for name in one:
        for ours, theirs in zip(one[name], other[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_each_tensor_is_written_once_and_by_all_replicas(gloo: GlooWorkers, tmp_path: Path) -> None:
    run(gloo, Case(pp=2, dp=2, steps=2), save=str(tmp_path))
    checkpoint = tmp_path / "step-00000002"
    files = sorted(checkpoint.glob("weights-*.safetensors"))
    assert len(files) == 4
    keys = [list(safe_open(file, framework="pt").keys()) for file in files]
    assert all(keys)
    flat = list(chain.from_iterable(keys))
    assert len(flat) == len(set(flat)) == len(load_manifest(checkpoint).tensors)


def test_nothing_but_tensors_and_text_is_stored(gloo: GlooWorkers, tmp_path: Path) -> None:
    run(gloo, Case(pp=2, steps=2), save=str(tmp_path))
    checkpoint = tmp_path / "step-00000002"
    assert {path.suffix for path in checkpoint.iterdir()} == {".safetensors", ".json", ".yaml"}
    json.loads((checkpoint / "manifest.json").read_text())
    assert (tmp_path / "latest").read_text().strip() == checkpoint.name
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_only_the_newest_are_kept(gloo: GlooWorkers, tmp_path: Path) -> None:
    gloo.run(2, save_three_times, str(tmp_path))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert find_latest(tmp_path) == tmp_path / "step-00000003"


def save_three_times(rank: int, folder: str) -> None:
    case = Case(pp=2)
    engine = build_engine(case)
    for step in range(3):
        engine.train_batch(micro_batches(step, case, 0))
        save_engine(engine, Path(folder), step + 1)


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_damage_is_named_on_every_rank_before_anything_is_loaded(
    gloo: GlooWorkers, tmp_path: Path, stride: int
) -> None:
    gloo.run(2, save_three_times, str(tmp_path))
    whole = tmp_path / "step-00000003"
    reader = CheckpointReader(whole)
    tensors = [(name, kind) for name, entry in reader.manifest.tensors.items() for kind in entry.files][::stride]
    for index, tensor in enumerate(tensors):
        file, _, end = reader.place(*tensor)
        shutil.copytree(whole, tmp_path / f"damaged-{index}")
        data = bytearray((whole / file).read_bytes())
        data[end - 1] ^= 1
        (tmp_path / f"damaged-{index}" / file).write_bytes(data)
    damaged = [str(tmp_path / f"damaged-{index}") for index in range(len(tensors))]
    ranks = gloo.run(2, load_damaged, damaged)
    assert ranks[0] == ranks[1]
    for (name, kind), message in zip(tensors, ranks[0], strict=True):
        assert f"{reader.place(name, kind)[0]}: damaged ({kind} of {name!r} has" in message


def load_damaged(rank: int, checkpoints: list[str]) -> list[str]:
    from pipekit.engine.load import load_checkpoint

    engine = build_engine(Case(pp=1, dp=2))
    before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    messages = []
    for checkpoint in checkpoints:
        with pytest.raises(DamagedCheckpointError) as caught:
            load_checkpoint(engine, CheckpointReader(Path(checkpoint)))
        messages.append(str(caught.value))
    assert all(map(torch.equal, before, engine.module.parameters()))
    return messages


def test_what_is_written_in_the_background_is_the_state_at_its_beginning(gloo: GlooWorkers, tmp_path: Path) -> None:
    for steps in gloo.run(4, save_while_training, str(tmp_path)):
        assert steps == 3, "training went on meanwhile"
    one, other = (CheckpointReader(tmp_path / name) for name in ("at once", "background"))
    assert one.manifest.training == other.manifest.training
    assert one.manifest.tensors.keys() == other.manifest.tensors.keys()
    for name, entry in one.manifest.tensors.items():
        assert entry.files.keys() == other.manifest.tensors[name].files.keys()
        for kind in entry.files:
            assert torch.equal(one.tensor(name, kind), other.tensor(name, kind)), (name, kind)


def save_while_training(rank: int, folder: str) -> int:
    import pipekit.engine.save as save

    case = Case(pp=2, dp=2)
    engine = build_engine(case)
    memory = save.SnapshotMemory()
    state = {"training": training_state(engine, 2), "config_yaml": "model: {preset: tiny}\n", "background": memory}
    trained, original = threading.Event(), save.write_tensors

    def write_late(*args: Any) -> Any:
        assert trained.wait(60)
        return original(*args)

    engine.train_batch(micro_batches(0, case, engine.mpu.data_parallel_rank))
    # The memory of an earlier snapshot is used again.
    save.save_checkpoint(engine, Path(folder), name="before", **state).wait()
    engine.train_batch(micro_batches(1, case, engine.mpu.data_parallel_rank))
    state["training"] = training_state(engine, 2)
    save.save_checkpoint(engine, Path(folder), name="at once", **{**state, "background": None}).wait()
    save.write_tensors = write_late
    try:
        pending = save.save_checkpoint(engine, Path(folder), name="background", **state)
        for step in range(2, 5):
            engine.train_batch(micro_batches(step, case, engine.mpu.data_parallel_rank))
        assert not pending.is_done
        trained.set()
        pending.wait()
        assert pending.is_done
    finally:
        save.write_tensors = original
    return int(engine.global_steps) - 2


def test_a_write_that_fails_in_the_background_is_raised_on_every_rank_that_waits(
    gloo: GlooWorkers, tmp_path: Path
) -> None:
    messages = gloo.run(2, fail_in_background, str(tmp_path))
    assert all("step-00000002: cannot be written: the disk is full" in message for message in messages)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


def fail_in_background(rank: int, folder: str) -> str:
    import pipekit.engine.save as save

    return fail_to_write(rank, folder, background=save.SnapshotMemory())


def test_another_model_is_refused_on_every_rank(gloo: GlooWorkers, tmp_path: Path) -> None:
    run(gloo, Case(pp=1, steps=2, tied=True), save=str(tmp_path))
    messages = gloo.run(2, load_as_untied, str(tmp_path / "step-00000002"))
    assert messages[0] == messages[1]
    assert "head.weight is not in it" in messages[0]


def load_as_untied(rank: int, checkpoint: str) -> str:
    from pipekit.engine.load import load_checkpoint

    engine = build_engine(Case(pp=2, tied=False))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(engine, CheckpointReader(Path(checkpoint)))
    return str(caught.value)


def test_a_failed_write_leaves_the_older_checkpoint_and_nothing_else(gloo: GlooWorkers, tmp_path: Path) -> None:
    messages = gloo.run(2, fail_to_write, str(tmp_path))
    assert all("step-00000002: cannot be written: the disk is full" in message for message in messages)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    load_manifest(tmp_path / "step-00000001")


def fail_to_write(rank: int, folder: str, background: Any = None) -> str:
    import pipekit.engine.save as save

    engine = build_engine(Case(pp=2))
    engine.train_batch(micro_batches(0, Case(pp=2), 0))
    save_engine(engine, Path(folder), 1)
    original = save.write_tensors

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "no space left")

    if rank == 1:
        save.write_tensors = full_disk
    try:
        with pytest.raises(StorageError) as caught:
            save_engine(engine, Path(folder), 2, background)
    finally:
        save.write_tensors = original
    return str(caught.value)


def save_where_files_are_seen_late(rank: int, folder: str) -> tuple[list[float], str]:
    """Seconds that each rank waits for the other's files in a save and a load, and the error where it is in vain."""
    engine = build_engine(Case(pp=2))
    engine.train_batch(micro_batches(0, Case(pp=2), 0))
    mine = [".step-00000001.tmp", "config.yaml"] if rank == 1 else ["weights-0001.safetensors"]
    disk = LateDisk(dict.fromkeys(mine, 30.0))
    saved = save_engine(engine, Path(folder), 1)
    waited_s = [disk.now_s]
    disk.now_s = 0.0
    reader = open_checkpoint(Path(folder), lambda: saved)
    assert reader is not None
    load_checkpoint(engine, reader)
    waited_s.append(disk.now_s)
    LateDisk({".step-00000002.tmp": 1000.0} if rank == 1 else {})
    with pytest.raises(StorageError) as caught:
        save_engine(engine, Path(folder), 2)
    return waited_s, str(caught.value)


def test_ranks_of_other_machines_wait_until_they_see_each_others_files(gloo: GlooWorkers, tmp_path: Path) -> None:
    for rank, (waited_s, message) in enumerate(gloo.run(2, save_where_files_are_seen_late, str(tmp_path))):
        assert all(30 <= each < 32 for each in (waited_s if rank == 1 else waited_s[:1])), waited_s
        assert ".step-00000002.tmp: is not there on this machine, 90 s after another has written it" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_a_cut_file_is_named(gloo: GlooWorkers, tmp_path: Path) -> None:
    gloo.run(2, save_three_times, str(tmp_path))
    file = next((tmp_path / "step-00000003").glob("weights-0001*"))
    size = file.stat().st_size
    with file.open("rb+") as stream:
        stream.truncate(size // 2)
    with pytest.raises(CheckpointError, match=rf"{size // 2:,} bytes of {size:,}.*resume=.*step-00000002"):
        CheckpointReader(tmp_path / "step-00000003")
    shutil.rmtree(tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match=r"is damaged$"):
        CheckpointReader(tmp_path / "step-00000003")


def save_what_is_not_finite(rank: int, folder: str) -> str:
    engine = build_engine(Case(pp=2, zero=0))
    engine.train_batch(micro_batches(0, Case(pp=2, zero=0), 0))
    save_engine(engine, Path(folder), 1)
    if rank == 1:
        _, parameter, _ = next(each for each in engine.module.named_logical_parameters() if each[2])
        parameter.data.view(-1)[3] = float("inf")
    with pytest.raises(NumbersError) as caught:
        save_engine(engine, Path(folder), 2)
    return str(caught.value)


def test_weights_that_are_not_finite_are_never_published(gloo: GlooWorkers, tmp_path: Path) -> None:
    for message in gloo.run(2, save_what_is_not_finite, str(tmp_path)):
        assert message.startswith("the weights of blocks.1.mlp.")
        assert "the one before stays the newest" in message
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["latest", "step-00000001"]
    assert find_latest(tmp_path) == tmp_path / "step-00000001"


def go_back(rank: int, case: Case, folder: str) -> tuple[list[float], list[float]]:
    """Losses and norms after a checkpoint, and once more after the running engine has gone back to it."""
    engine = build_engine(case)

    def train(steps: range) -> list[float]:
        results = []
        for step in steps:
            results.append(float(engine.train_batch(micro_batches(step, case, engine.mpu.data_parallel_rank))))
            results.append(engine.grad_norm)
        return results

    train(range(2))
    saved = save_engine(engine, Path(folder), 2)
    first = train(range(2, 5))
    load_checkpoint(engine, CheckpointReader(saved))
    assert engine.global_steps == 2
    return first, train(range(2, 5))


@pytest.mark.parametrize(
    "case",
    [
        Case(pp=2, dropout=0.1, micro_batch_size=2),
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in [
                Case(pp=2, zero=0),
                Case(pp=2, precision="bf16"),
                Case(precision="fp16"),
                Case(dp=2, zero=2, precision="bf16"),
                Case(dp=2, zero=3),
                Case(dp=2, zero=2, offload="optimizer"),
                Case(tp=2),
            ]
        ),
    ],
    ids=show,
)
def test_a_running_engine_goes_back_to_its_checkpoint(gloo: GlooWorkers, tmp_path: Path, case: Case) -> None:
    for first, again in gloo.run(case.world_size, compiling_adam, go_back, case, str(tmp_path)):
        # DeepSpeed's Adam for CPUs multiplies powers of its betas up from step to step, and computes them after a load.
        assert again == pytest.approx(first, rel=0.0 if case.offload == "none" else 1e-5, abs=0.0)
