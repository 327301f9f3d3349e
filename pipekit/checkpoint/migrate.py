"""Migration of DeepSpeed checkpoints to pipekit's format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pipekit.checkpoint.deepspeed_files import DeepSpeedCheckpoint, read_deepspeed
from pipekit.checkpoint.manifest import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    LATEST_FILE,
    MANIFEST_FILE,
    WEIGHTS,
    Manifest,
    TensorEntry,
    checkpoint_name,
    checksum,
)
from pipekit.checkpoint.model_config import files_beside, read_model_config, stored_sections
from pipekit.checkpoint.writer import write_tensors
from pipekit.config import Config, ModelConfigSource
from pipekit.errors import CheckpointError
from pipekit.files import building_folder, write_atomically
from pipekit.run_lock import hold_run
from pipekit.storage import storing


def migrate(
    source: Path, run: Path, *, renames: Mapping[str, str] | None = None, config: ModelConfigSource | None = None
) -> DeepSpeedCheckpoint:
    """Convert a DeepSpeed checkpoint to a pipekit checkpoint in a run's folder, and return its content.

    The layers of a pipeline are named `layers.<index>`, and tied layers by their key, as in `pipekit.PipelineModule`;
    tensors of other engines keep their names.

    Args:
        source: the folder that DeepSpeed saved to, or the folder of one tag.
        run: the folder of the run to write.
        renames: new names of layers or modules: `{"layers.0": "embed"}` renames `layers.0.weight` to `embed.weight`.
        config: configuration of the model under the new names, to store in the checkpoint; see `load_model_config`.

    Raises:
        ConfigError: if `config` describes another model.
        CheckpointError: if there is no such checkpoint, it is damaged, its tensors are sharded over tensor-parallel
            ranks, or `run` already has that checkpoint; nothing is left behind.
    """
    found = read_deepspeed(_find_tag(source))
    found.rename(_new_names(found, renames or {}))
    described = None
    if config is not None:
        shapes = {name: tuple(tensor.shape) for name, tensor in found.tensors.items()}
        described = read_model_config(config, shapes, of=source)
    final = run / CHECKPOINTS_FOLDER / checkpoint_name(found.training.step)
    with hold_run(run):
        if final.exists():
            raise CheckpointError(f"{final}: is there already; give another run folder")
        with building_folder(final) as temporary:
            _write(found, described, temporary, source)
        with storing(final):
            write_atomically(final.parent / LATEST_FILE, final.name + "\n")
    found.path = final
    return found


def _find_tag(source: Path) -> Path:
    latest = source / "latest"
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        if Path(tag).name != tag or not (source / tag).is_dir():
            raise CheckpointError(f"{latest}: names {tag!r}, which is no folder beside it; give the folder of a tag")
        return source / tag
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder; give the folder that engine.save_checkpoint was given")
    return source


def _new_names(found: DeepSpeedCheckpoint, renames: Mapping[str, str]) -> dict[str, str]:
    names = {name: name for name in found.tensors}
    for old, new in renames.items():
        matching = [name for name in names if name == old or name.startswith(f"{old}.")]
        if not matching:
            shown = ", ".join(list(names)[:3])
            raise CheckpointError(f"--rename {old}={new}: no tensor is called {old} or {old}.*; names are {shown}, ...")
        for name in matching:
            names[name] = new + name.removeprefix(old)
    return names


def _write(found: DeepSpeedCheckpoint, described: Config | None, folder: Path, source: Path) -> None:
    kinds = {WEIGHTS: found.tensors, **found.states}
    files = {kind: f"{kind}-0000.safetensors" for kind in kinds}
    checksums = {kind: write_tensors(folder / files[kind], tensors) for kind, tensors in kinds.items()}
    entries = {}
    for name, tensor in found.tensors.items():
        own = [kind for kind in kinds if name in kinds[kind]]
        entries[name] = TensorEntry(
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            {kind: files[kind] for kind in own},
            trainable=name in found.trainable,
            checksums={kind: checksums[kind][name] for kind in own},
        )
    config = json.dumps({"layers": [], **stored_sections(described)}, indent=2) + "\n"  # JSON is YAML too
    contents = {name: file.read_bytes() for name, file in files_beside(described).items()}
    contents[CONFIG_FILE] = config.encode()
    for name, content in contents.items():
        write_atomically(folder / name, content)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    manifest = Manifest(
        training=found.training,
        tensors=entries,
        file_bytes=sizes,
        written_by={"layout": f"migrated from DeepSpeed's {source.name}"},
        file_checksums={name: checksum(content) for name, content in contents.items()},
    )
    write_atomically(folder / MANIFEST_FILE, manifest.to_json())
