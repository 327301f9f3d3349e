"""Checkpoints on the disks of several hosts, each with a part and its neighbour's: any one may be lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from engine_jobs import Case, build_engine, micro_batches, reference_run, save_engine
from gloo_workers import GlooWorkers
from pipekit.checkpoint.manifest import find_latest, find_whole, list_checkpoints, load_manifest, read_manifest
from pipekit.checkpoint.overview import find_faults
from pipekit.checkpoint.reader import CheckpointReader, sound_files
from pipekit.distributed.host_folders import HostFolders
from pipekit.engine import gather, save
from pipekit.engine.gather import gather_named, gather_newest, gather_start
from pipekit.engine.load import load_checkpoint
from pipekit.errors import DamagedCheckpointError, PipekitError

pytestmark = pytest.mark.distributed

WRITER = Case(pp=3, steps=4)
# Other hosts, ranks and stages than those that wrote.
READER = Case(pp=2, steps=4)


def train(engine: Any, case: Case, steps: range) -> list[float]:
    return [float(engine.train_batch(micro_batches(step, case, engine.mpu.data_parallel_rank))) for step in steps]


def write_job(rank: int, folders: list[str]) -> None:
    folder = Path(folders[rank])
    engine = build_engine(WRITER)
    for step in (1, 2, 3):
        train(engine, WRITER, range(step - 1, step))
        save_engine(engine, folder, step, hosts=HostFolders.find(folder))


def read_job(rank: int, lists: list[list[str]]) -> list[Any]:
    """Go on from the folders of the hosts as each list has them; losses, or the error."""
    results: list[Any] = []
    engine = build_engine(READER)
    for folders in lists:
        folder = Path(folders[rank])
        hosts = HostFolders.find(folder)
        try:
            warning = gather_newest(folder, hosts)
            found = find_whole(folder)
            if found is None:
                results.append((None, warning))
                continue
            step = load_checkpoint(engine, CheckpointReader(found[0])).step
            results.append((train(engine, READER, range(step, READER.steps)), warning))
        except PipekitError as error:
            results.append((type(error), str(error)))
    return results


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of three hosts, each with the newest two checkpoints in its part."""
    root = tmp_path_factory.mktemp("written")
    folders = [root / f"host-{rank}" for rank in range(3)]
    GlooWorkers().run(3, write_job, [str(folder) for folder in folders])
    return folders


def test_each_file_is_on_two_hosts_and_all_hosts_publish_and_keep_the_same(written: list[Path]) -> None:
    for folder in written:
        assert [path.name for path in list_checkpoints(folder)] == ["step-00000002", "step-00000003"]
        assert find_latest(folder) == folder / "step-00000003"
        assert not list(folder.glob(".*"))
    newest = [folder / "step-00000003" for folder in written]
    manifest = read_manifest(newest[0])
    assert all((path / "manifest.json").read_bytes() == (newest[0] / "manifest.json").read_bytes() for path in newest)
    holders = {file: sum((path / file).exists() for path in newest) for file in manifest.file_bytes}
    assert {file: number for file, number in holders.items() if number != 2} == {"config.yaml": 3}
    for path in newest:
        held = [file for file in manifest.file_bytes if (path / file).exists()]
        assert sound_files(path, manifest, manifest.file_bytes) == set(held)
        with pytest.raises(DamagedCheckpointError, match=r"is not on this host .* pipekit checkpoints gather "):
            load_manifest(path)


def test_any_host_may_be_lost_or_damaged_and_another_layout_goes_on(
    gloo: GlooWorkers, written: list[Path], tmp_path: Path
) -> None:
    def copy(name: str, *hosts: int | None) -> list[str]:
        folders = []
        for host in hosts:
            folder = tmp_path / name / f"{len(folders)}"
            if host is None:
                folder.mkdir(parents=True)
            else:
                shutil.copytree(written[host], folder)
            folders.append(str(folder))
        return folders

    cases = {
        "the first is lost": copy("first", 1, 2),
        "the second is lost": copy("second", 2, 0),
        "the last is lost, and latest not everywhere the newest": copy("last", 0, 1),
        "one folder is empty": copy("empty", None, 0),
        "bits have changed": copy("bits", 1, 2),
        "too much is lost": copy("lost", 0, 2),
        "nothing is left": copy("nothing", 0, 2),
        "no checkpoint": copy("none", None, None),
    }
    newest = [folder / "step-00000003" for folder in written]
    weights = [{path.name for path in checkpoint.glob("weights*")} for checkpoint in newest]
    (tmp_path / "last/1/latest").write_text("step-00000002\n")
    shutil.copytree(newest[1], tmp_path / "empty/1/step-00000003", dirs_exist_ok=True)
    (on_both,), (on_one,) = weights[1] & weights[2], weights[0] - weights[2]
    flip_last_bit(tmp_path / "bits/0/step-00000003" / on_both)
    (tmp_path / "bits/1/step-00000003/manifest.json").write_text("{")
    flip_last_bit(tmp_path / "lost/0/step-00000003" / on_one)
    for path in (tmp_path / "nothing").glob("*/step-*/weights*"):
        path.unlink()
    results = dict(zip(cases, zip(*gloo.run(2, read_job, list(cases.values())), strict=True), strict=True))
    assert results.pop("no checkpoint") == ((None, ""), (None, ""))
    for found, said in results.pop("nothing is left"):
        assert found is DamagedCheckpointError
        assert "step-00000003: weights-0000.safetensors and 2 more are missing or damaged on all hosts" in said
    losses = reference_run(WRITER)["losses"]
    for case, told in results.items():
        step = 2 if case == "too much is lost" else 3
        for folder, (found, said) in zip(map(Path, cases[case]), told, strict=True):
            assert found == pytest.approx(losses[step:], rel=1e-4), case
            whole = folder / f"step-0000000{step}"
            assert find_latest(folder) == whole, case
            assert find_faults(whole) == [], case
            expected = f"{folder}/step-00000003: {on_one} is missing or damaged on all hosts ("
            assert said.startswith(expected) if step == 2 else said == "", case
            assert step == 3 or said.endswith(f"; going on from {whole} instead")


def fail_job(rank: int, folders: list[str]) -> list[str]:
    """Save twice; of the second, host 1 cannot publish its part."""
    folder = Path(folders[rank])
    hosts = HostFolders.find(folder)
    engine = build_engine(READER)
    save_engine(engine, folder, 1, hosts=hosts)
    said = []

    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    replace_folder = save.replace_folder
    if rank == 1:
        save.replace_folder = refuse  # type: ignore[attr-defined]
    try:
        save_engine(engine, folder, 2, hosts=hosts)
    except PipekitError as error:
        said.append(str(error))
    save.replace_folder = replace_folder  # type: ignore[attr-defined]
    said.append(gather_newest(folder, hosts))
    gather_named(folder / "step-00000001", hosts, verify=False)
    if rank == 1:
        shutil.rmtree(folder)
    said.append(gather_start(str(Path(folders[0]) if rank == 0 else folder), folder, hosts))
    return said


def test_a_checkpoint_counts_when_all_hosts_have_it(gloo: GlooWorkers, tmp_path: Path) -> None:
    folders = [tmp_path / f"host-{rank}/checkpoints" for rank in range(2)]
    results = gloo.run(2, fail_job, [str(folder) for folder in folders])
    for failed, newest, start in results:
        assert "host-1/checkpoints/step-00000002: cannot be written: the disk is full" in failed
        assert (newest, start) == ("", "")
    for folder in folders:
        assert (folder / "latest").read_text() == "step-00000001\n"
        assert find_faults(folder / "step-00000001") == []
    assert not list(folders[1].glob(".*"))


def interrupted_job(rank: int, folders: list[str]) -> str:
    folder = Path(folders[rank])
    hosts = HostFolders.find(folder)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    transfer_files = gather.transfer_files
    gather.transfer_files = interrupt  # type: ignore[attr-defined]
    try:
        gather_newest(folder, hosts)
    except KeyboardInterrupt:
        gather.transfer_files = transfer_files  # type: ignore[attr-defined]
        return gather_newest(folder, hosts)
    return "was not interrupted"


def test_gathering_that_was_interrupted_loses_nothing(gloo: GlooWorkers, written: list[Path], tmp_path: Path) -> None:
    folders = [str(shutil.copytree(folder, tmp_path / folder.name)) for folder in written]
    assert gloo.run(3, interrupted_job, folders) == ["", "", ""]
    for folder in folders:
        assert find_faults(Path(folder) / "step-00000003") == []
