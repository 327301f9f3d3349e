"""Random damage to a checkpoint: it is refused, and the file named, or it changes nothing that is read."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from hand_made import random_model, small_tokenizer, write_manifest
from pipekit.checkpoint.manifest import TrainingState, find_whole, resolve_checkpoint
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.checkpoint.writer import write_tensors
from pipekit.errors import CheckpointError, DamagedCheckpointError

STATES = ("exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two writers, with optimizer states, a configuration and a tokenizer."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "step-00000005"
    folder.mkdir(parents=True)
    config, weights = random_model(num_layers=1)
    (folder / "config.yaml").write_text(config.to_yaml())
    small_tokenizer().save(str(folder / "tokenizer.json"))
    generator = torch.Generator().manual_seed(1)
    held: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
    for index, (name, tensor) in enumerate(weights.items()):
        others = {kind: torch.rand(tensor.shape, generator=generator) for kind in STATES}
        kinds = {"weights": tensor, **others}
        held[name] = {kind: (f"{kind}-{index % 2:04d}.safetensors", value) for kind, value in kinds.items()}
    for file in {file for kinds in held.values() for file, _ in kinds.values()}:
        tensors = {name: value for name, kinds in held.items() for own, value in kinds.values() if own == file}
        write_tensors(folder / file, tensors)
    optimizer = {"type": "adamw", "step": 5, "states": list(STATES)}
    state = TrainingState(step=5, consumed_samples=40, seed=1, lr=0.1, optimizer=optimizer, metrics={"loss": 2.5})
    write_manifest(folder, held, state)
    (folder.parent / "latest").write_text(folder.name + "\n")
    return folder


def read_all(folder: Path) -> dict[str, Any]:
    """Read all that a checkpoint holds, the way that runs and exports do."""
    reader = CheckpointReader(folder)
    contents: dict[str, Any] = {"training": reader.manifest.training}
    for name in ("config.yaml", "tokenizer.json"):
        file = reader.file(name)
        contents[name] = None if file is None else file.read_text()
    for name, entry in reader.manifest.tensors.items():
        for kind in entry.files:
            contents[f"{kind} of {name}"] = reader.tensor(name, kind)
    return contents


def read_or_message(folder: Path) -> dict[str, Any] | str:
    try:
        return read_all(folder)
    except CheckpointError as error:
        return str(error)


def is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


def any_file(folder: Path, draw: random.Random, pattern: str = "*") -> Path:
    return draw.choice(sorted(folder.glob(pattern)))


def flip(path: Path, draw: random.Random, begin: int = 0, end: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(begin, end or len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def data_begin(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a safetensors header in as many bytes as before."""
    data, begin = path.read_bytes(), data_begin(path)
    header = json.loads(data[8:begin])
    edit(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(begin - 8)
    path.write_bytes(data[:8] + text + data[begin:])


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and seal it anew, as someone would who knows the format."""
    path = folder / "manifest.json"
    stored = json.loads(path.read_text())
    edit(stored)
    del stored["checksum"]
    stored["checksum"] = xxhash.xxh3_128_hexdigest(json.dumps(stored, sort_keys=True).encode())
    path.write_text(json.dumps(stored))


def flip_data(folder: Path, draw: random.Random) -> None:
    path = any_file(folder, draw, "*.safetensors")
    flip(path, draw, data_begin(path))


def flip_header(folder: Path, draw: random.Random) -> None:
    path = any_file(folder, draw, "*.safetensors")
    flip(path, draw, 0, data_begin(path))


def flip_manifest(folder: Path, draw: random.Random) -> None:
    flip(folder / "manifest.json", draw)


def flip_text(folder: Path, draw: random.Random) -> None:
    flip(folder / draw.choice(["config.yaml", "tokenizer.json"]), draw)


def zero_block(folder: Path, draw: random.Random) -> None:
    path = any_file(folder, draw, "*.safetensors")
    data = bytearray(path.read_bytes())
    first = draw.randrange(data_begin(path), len(data))
    data[first : first + 512] = bytes(len(data[first : first + 512]))
    path.write_bytes(data)


def truncate(folder: Path, draw: random.Random) -> None:
    path = any_file(folder, draw)
    os.truncate(path, draw.randrange(path.stat().st_size))


def append(folder: Path, draw: random.Random) -> None:
    path = any_file(folder, draw)
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 100)))


def remove(folder: Path, draw: random.Random) -> None:
    any_file(folder, draw).unlink()


def empty(folder: Path, draw: random.Random) -> None:
    any_file(folder, draw).write_bytes(b"")


def swap_files(folder: Path, draw: random.Random) -> None:
    one, other = draw.sample(sorted(folder.glob("*.safetensors")), 2)
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])


def swap_names(folder: Path, draw: random.Random) -> None:
    def edit(header: dict[str, Any]) -> None:
        one, other = draw.sample(sorted(name for name in header if name != "__metadata__"), 2)
        header[one], header[other] = header[other], header[one]

    edit_header(any_file(folder, draw, "*.safetensors"), edit)


def change_dtype(folder: Path, draw: random.Random) -> None:
    def edit(header: dict[str, Any]) -> None:
        header[draw.choice(sorted(name for name in header if name != "__metadata__"))]["dtype"] = "I32"

    edit_header(any_file(folder, draw, "*.safetensors"), edit)


def transpose(folder: Path, draw: random.Random) -> None:
    def edit(header: dict[str, Any]) -> None:
        matrices = [name for name in header if len(set(header[name].get("shape", ()))) == 2]
        header[draw.choice(matrices)]["shape"].reverse()

    edit_header(any_file(folder, draw, "*.safetensors"), edit)


def link(folder: Path, draw: random.Random) -> None:
    path = any_file(folder, draw)
    outside = folder.parent.parent / "outside"
    shutil.copyfile(path, outside)
    path.unlink()
    path.symlink_to(draw.choice([outside, Path("../../outside")]))


def replace_by_no_file(folder: Path, draw: random.Random) -> None:
    path = any_file(folder, draw)
    path.unlink()
    draw.choice([lambda: path.mkdir(), lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")])()


def lead_outside(folder: Path, draw: random.Random) -> None:
    path = any_file(folder, draw, "*.safetensors")
    outside = folder.parent.parent / "outside.safetensors"
    shutil.copyfile(path, outside)
    name = draw.choice([str(outside), "../../outside.safetensors", "./../../outside.safetensors"])

    def edit(stored: dict[str, Any]) -> None:
        stored["file_bytes"][name] = stored["file_bytes"].pop(path.name)
        for entry in stored["tensors"].values():
            entry["files"] = {kind: name if file == path.name else file for kind, file in entry["files"].items()}

    edit_manifest(folder, edit)


def lead_text_outside(folder: Path, draw: random.Random) -> None:
    def edit(stored: dict[str, Any]) -> None:
        stored["file_bytes"]["/etc/hostname"] = os.stat("/etc/hostname").st_size

    edit_manifest(folder, edit)


def change_types(folder: Path, draw: random.Random) -> None:
    places = [
        ("training",),
        ("training", "step"),
        ("training", "seed"),
        ("training", "optimizer", "states"),
        ("training", "optimizer", "step"),
        ("training", "metrics"),
        ("tensors",),
        ("file_bytes",),
        ("file_bytes", "config.yaml"),
        ("file_checksums",),
    ]

    def edit(stored: dict[str, Any]) -> None:
        *above, last = draw.choice([*places, ("tensors", draw.choice(sorted(stored["tensors"])))])
        for key in above:
            stored = stored[key]
        stored[last] = draw.choice([None, [[1]], {"a": None}, "5", True, -1.5])

    edit_manifest(folder, edit)


def change_shape(folder: Path, draw: random.Random) -> None:
    def edit(stored: dict[str, Any]) -> None:
        entry = stored["tensors"][draw.choice(sorted(stored["tensors"]))]
        entry["shape"] = draw.choice([[*entry["shape"], 2], [-1], [2**70], [], [entry["shape"][0] + 1]])

    edit_manifest(folder, edit)


def drop_checksums(folder: Path, draw: random.Random) -> None:
    def edit(stored: dict[str, Any]) -> None:
        stored["tensors"][draw.choice(sorted(stored["tensors"]))]["checksums"] = {}

    edit_manifest(folder, edit)


def hostile_manifest(folder: Path, draw: random.Random) -> None:
    text = draw.choice(
        [
            "[" * 100_000,
            '{"format": "pipekit-checkpoint", "version": 2, "training": ' + '{"a":' * 50_000,
            "null",
            "[]",
            '"text"',
            "1" * 10_000,
            '{"format": "pipekit-checkpoint", "version": "2"}',
            '{"format": ["pipekit-checkpoint"], "version": 1e999}',
            "\ufeff{}",
            '{"format": "pipekit-checkpoint", "version": 2, "training": {}, "tensors": {}, "file_bytes": {}}',
        ]
    )
    (folder / "manifest.json").write_text(text)


# Blanks mean nothing, nor does the metadata of a safetensors file.
HARMLESS = (flip_header, flip_manifest)
REFUSED = (
    flip_data,
    flip_text,
    zero_block,
    truncate,
    append,
    remove,
    empty,
    swap_files,
    swap_names,
    change_dtype,
    transpose,
    link,
    replace_by_no_file,
    lead_outside,
    lead_text_outside,
    change_types,
    change_shape,
    drop_checksums,
    hostile_manifest,
)


@pytest.mark.parametrize(
    "seeds", [range(100), pytest.param(range(100, 500), marks=pytest.mark.slow)], ids=["100", "the rest of 500"]
)
def test_damage_is_refused_or_harmless(whole: Path, tmp_path: Path, seeds: range) -> None:
    expected = read_all(whole)
    kinds = (*REFUSED, *HARMLESS)
    for seed in seeds:
        damage = kinds[seed % len(kinds)]
        folder = tmp_path / f"{seed}" / "checkpoints" / whole.name
        shutil.copytree(whole, folder)
        damage(folder, random.Random(seed))
        where = f"{damage.__name__} {seed}"
        found = read_or_message(folder)
        if isinstance(found, str):
            assert str(folder) in found, where
            assert len(found) < 2000, where
        else:
            assert damage in HARMLESS, where
            assert is_same(found, expected), where
        shutil.rmtree(tmp_path / f"{seed}")


@pytest.mark.parametrize(
    "text", ["../outside", "/", "", ".", "..", "step-00000005/../../outside", "x" * 10_000, "\0", "no-such"]
)
def test_latest_leads_nowhere_else(whole: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(whole, tmp_path / "run/checkpoints" / whole.name)
    shutil.copytree(whole, tmp_path / "outside")
    shutil.copytree(whole, tmp_path / "run/outside")
    latest = tmp_path / "run/checkpoints/latest"
    latest.write_text(text)
    with pytest.raises(DamagedCheckpointError, match=r"latest names .* which is not there.*step-00000005"):
        resolve_checkpoint(tmp_path / "run")
    found = find_whole(latest.parent)
    assert found is not None
    assert found[0] == latest.parent / whole.name
    assert str(latest) in found[2]


@pytest.mark.parametrize("target", ["checkpoint", "latest"])
def test_links_of_folders_and_of_latest_are_not_followed(whole: Path, tmp_path: Path, target: str) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    if target == "checkpoint":
        (folder / whole.name).symlink_to(whole)
        (folder / "latest").write_text(whole.name)
    else:
        shutil.copytree(whole, folder / whole.name)
        (folder / "latest").symlink_to(whole.parent / "latest")
    with pytest.raises(DamagedCheckpointError, match=r"latest names .* not there"):
        resolve_checkpoint(folder)


def test_what_the_manifest_does_not_list_is_not_read(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / whole.name
    shutil.copytree(whole, folder)
    (folder / "added.json").write_text("{}")
    assert CheckpointReader(folder).file("added.json") is None
    assert is_same(read_all(folder), read_all(whole))


def test_a_bit_flip_in_a_weight_is_named(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / whole.name
    shutil.copytree(whole, folder)
    path = folder / "weights-0001.safetensors"
    begin = data_begin(path)
    header = json.loads(path.read_bytes()[8:begin])
    name = sorted(name for name in header if name != "__metadata__")[0]
    first, last = header[name]["data_offsets"]
    flip(path, random.Random(0), begin + first, begin + last)
    reader = CheckpointReader(folder)
    with pytest.raises(DamagedCheckpointError, match=rf"weights-0001\.safetensors: damaged \(weights of '{name}' has"):
        reader.tensor(name)
    others = [other for other in reader.manifest.tensors if other != name]
    assert all(reader.tensor(other) is not None for other in others)
