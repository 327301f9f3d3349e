"""The `data` section: the sources of text, their mixture, and how text becomes tokens."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipekit.settings.base import PathText, Section, at_most

_LIMITED = re.compile(r"(.+)#([0-9]+)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,50}")


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("must be at most 50 letters, digits, dots, dashes and underscores; for example web")
    return name


def _check_source(source: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(source, str):
        if (limited := _LIMITED.fullmatch(source)) and int(limited[2]) == 0:
            raise ValueError(f"must read at least one document; for example {limited[1]}#500")
    elif limited := next(filter(None, map(_LIMITED.fullmatch, source)), None):
        raise ValueError(
            f"a source in a list takes no limit, and {limited[0]} has one; give it an entry of its own in data.mixture"
        )
    return source


SourceText = Annotated[
    PathText | Annotated[tuple[PathText, ...], Field(strict=False, min_length=1)], AfterValidator(_check_source)
]
"""Path of a source of text, which may end in `#` and a number of documents; or a list of paths."""

SourceName = Annotated[str, AfterValidator(_check_name)]

Weight = Annotated[NonNegativeFloat, at_most(1e9, "only its ratio to the others counts")] | Literal["auto"]


class SourceEntry(Section):
    """One source of a mixture."""

    name: SourceName = Field(default=..., examples=["web"])
    """Name of the source in stages, metrics and messages."""

    source: SourceText = Field(default=..., examples=["data/web"])
    """The text, as for `data.source`; `data/web#500` reads its first 500 documents."""

    weight: Weight = Field(default="auto", examples=[0.7])
    """Share of the samples that come from this source, in proportion to the other weights. `auto` sources divide
    the rest, up to 1, by their sizes. 0 reads the source only in `data.stages`."""

    epochs: PositiveFloat | None = Field(default=None, examples=[4])
    """Maximum number of times to read the source; then the others share its place. null sets no limit."""

    limit: PositiveInt | None = Field(default=None, examples=[500])
    """Maximum number of documents to read; null reads all."""

    validation: PathText | None = Field(default=None, min_length=1, examples=["data/web-held-out.jsonl"])
    """Text to evaluate on; null holds out `data.validation_fraction` of the source."""

    text_key: str | None = Field(default=None, min_length=1, examples=["text"])
    """Field of a JSONL record that holds the text; null is `data.text_key`."""

    @property
    def sources(self) -> tuple[str, ...]:
        """`source` as a tuple, also where it is one string."""
        return (self.source,) if isinstance(self.source, str) else self.source


class MixtureStage(Section):
    """Weights of the sources of a mixture after a number of steps."""

    after_step: PositiveInt = Field(default=..., examples=[1000])
    """The last step before these weights."""

    weights: dict[str, Weight] = Field(default=..., min_length=1, examples=[{"web": 0.3, "code": 0.7}])
    """Weight of each source by its name; those left out are not read."""


class DataConfig(Section):
    """The text to train on, and how it becomes tokens."""

    source: SourceText = Field(default="python-stdlib", examples=["data/my-text.txt"])
    """Training text: a file of text, JSON lines, Parquet or Arrow, a folder, `hf://OWNER/NAME`, or a list of these; see
    [sources](data.md#sources). `data/web#500` reads the first 500 documents. `python-stdlib` is the source code of
    Python's standard library, which every machine has."""

    mixture: Annotated[tuple[SourceEntry, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None, examples=[[{"name": "web", "source": "data/web"}, {"name": "code", "source": "data/code"}]]
    )
    """Several sources with weights, in place of `source`; see [mixtures](mixtures.md)."""

    stages: Annotated[tuple[MixtureStage, ...], Field(strict=False)] = Field(
        default=(), examples=[[{"after_step": 1000, "weights": {"web": 0.3, "code": 0.7}}]]
    )
    """Changes of the weights of `mixture`'s sources, each after a given step."""

    tokenizer: PathText | None = Field(default=None, min_length=1, examples=["tokenizer.json"])
    """Path of a `tokenizer.json`, its folder or a SentencePiece model, or `hf://OWNER/NAME`; null trains a byte-pair
    tokenizer on the source."""

    vocab_size: Annotated[PositiveInt, at_most(10**6, "the largest in use have a quarter of that")] = Field(
        default=4096, examples=[4096]
    )
    """Vocabulary size of the tokenizer to train if `tokenizer` is null."""

    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.05, examples=[0.05])
    """Fraction of the text to hold out for evaluation."""

    validation: PathText | None = Field(default=None, min_length=1, examples=["data/held-out.txt"])
    """Text to evaluate on; null holds out `validation_fraction` of `source`."""

    text_key: str = Field(default="text", min_length=1, examples=["text"])
    """Field or column that holds the text, if documents are records."""

    format: Literal["auto", "text", "chat", "completion"] = "auto"
    """`chat` expects records with `messages`, and `completion` records with `prompt` and `completion`. Only what the
    assistant says, or the completion, counts in the loss. `auto` decides by the first record."""

    packing: Literal["concat", "best-fit", "none"] | None = Field(default=None, examples=["best-fit"])
    """`concat` joins all documents and cuts them into sequences, `best-fit` packs whole documents into sequences and
    pads these, `none` gives each document a sequence of its own. null is `concat` for text; for conversations it is
    `best-fit` with `document_mask`, and `none` without."""

    document_mask: bool = False
    """Keep attention, positions and loss within a document."""

    shuffle: bool = True
    """Draw a new order of the sequences in every epoch."""

    workers: Annotated[NonNegativeInt, at_most(1000, "no machine has so many cores")] = Field(default=0, examples=[2])
    """Processes with which each rank reads samples ahead; 0 reads them on a thread, one step ahead."""

    cache_dir: PathText | None = Field(default=None, min_length=1, examples=["~/.cache/pipekit"])
    """Folder of the prepared tokens; null takes `~/.cache/pipekit`."""

    max_bytes: PositiveInt | None = Field(default=None, examples=[10_000_000])
    """Largest number of bytes of text to read from each source; null reads all of it."""

    @property
    def entries(self) -> tuple[SourceEntry, ...]:
        """The sources, with `limit` and `text_key` filled in; a plain `source` is one entry named "text"."""
        given = self.mixture or (SourceEntry(name="text", source=self.source, validation=self.validation),)
        return tuple(_filled_in(entry, self.text_key) for entry in given)


def _filled_in(entry: SourceEntry, text_key: str) -> SourceEntry:
    changes: dict[str, object] = {"text_key": entry.text_key or text_key}
    if isinstance(entry.source, str) and (limited := _LIMITED.fullmatch(entry.source)):
        changes |= {"source": limited[1], "limit": int(limited[2])}
    return entry.model_copy(update=changes)
