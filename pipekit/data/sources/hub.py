"""Datasets of the Hugging Face hub by name, `hf://OWNER/NAME`: downloaded once into its cache, or streamed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from pipekit.data.hub import SCHEME, HubName, asking_hub, parse_hub_name
from pipekit.data.sources.arrow import FORMAT as ARROW
from pipekit.data.sources.formats import CorpusFile, Record, RecordFormat, check_columns, need
from pipekit.errors import DataError

_OPTIONS = ("config", "split", "revision", "stream")
_SPLIT = re.compile(r"[\w.]+(\+[\w.]+)*")
_NO_DATA_SUFFIXES = (".md", ".gitattributes", ".py")


class HubDataset(RecordFormat):
    """A dataset that the library `datasets` loads. Its files in the cache are Arrow files; a streamed one has none.

    Options: `config`, `split` (by default `train`), `revision` and `stream=true`.
    """

    title = "a dataset of the Hugging Face hub"
    example = f"{SCHEME}OWNER/NAME"

    def find(self, source: str) -> list[CorpusFile] | None:
        if not source.startswith(SCHEME):
            return None
        name = parse_hub_name(source, key="data.source", known=_OPTIONS)
        where, options = f"data.source={source!r}", name.options
        if options.get("stream", "false") not in ("true", "false"):
            raise DataError(f"{where}: stream={options['stream']} must be true or false")
        if not _SPLIT.fullmatch(options.get("split", "train")):
            raise DataError(f"{where}: split={options['split']} must name whole splits, such as train or train+test")
        if Path(name.repository).exists():
            raise DataError(
                f"{where}: the library datasets would read the folder {name.repository} here in its place; rename "
                "that, or give its path without hf://"
            )
        datasets = need("datasets", where)
        if options.get("stream") == "true":
            return [self._describe_stream(source, name)]
        with asking_hub(where):
            dataset = datasets.load_dataset(
                name.repository,
                options.get("config"),
                split=options.get("split", "train"),
                revision=options.get("revision"),
            )
            files = [Path(entry["filename"]) for entry in dataset.cache_files]
        # The same on every machine, whenever it was downloaded.
        prefix = f"{SCHEME}{name.repository}@{dataset._fingerprint}"
        return [CorpusFile(path, f"{prefix}/{path.name}", path.stat().st_size, None, True, ARROW) for path in files]

    def _describe_stream(self, source: str, name: HubName) -> CorpusFile:
        hub = need("huggingface_hub", source)
        with asking_hub(f"data.source={source!r}"):
            found = hub.HfApi().dataset_info(
                name.repository, revision=name.options.get("revision"), files_metadata=True
            )
        sizes = [file.size or 0 for file in found.siblings or () if not file.rfilename.endswith(_NO_DATA_SUFFIXES)]
        parts = [name.repository, name.options.get("config", ""), name.options.get("split", "train"), str(found.sha)]
        return CorpusFile(Path(source), json.dumps(parts), max(1, sum(sizes)), None, True, self)

    def read_records(self, file: CorpusFile, keys: tuple[str, ...] | None) -> Iterator[Record]:
        repository, config, split, revision = json.loads(file.name)
        source, number = f"{SCHEME}{repository}", 0
        with asking_hub(f"data.source={source!r}"):
            rows = need("datasets", source).load_dataset(
                repository, config or None, split=split, revision=revision, streaming=True
            )
            if keys and rows.column_names:
                check_columns(rows.column_names, keys, source)
                rows = rows.select_columns(list(keys))
            for number, row in enumerate(rows, start=1):
                yield Record(f"{source}: row {number}", row)


FORMAT = HubDataset()
