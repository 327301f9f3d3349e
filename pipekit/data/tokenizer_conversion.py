"""Tokenizers of other forms as a `tokenizer.json`: SentencePiece models, folders of transformers, names on the hub.

A converted one lies in the cache, in a folder named by what it was made of, with the settings that `transformers`
reads: special tokens and the chat template.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from pipekit.data.hub import asking_hub, parse_hub_name
from pipekit.errors import DataError
from pipekit.files import parse_json, replace_folder
from pipekit.storage import storing

CACHE_FOLDER = "~/.cache/pipekit/tokenizers"
SENTENCEPIECE_SUFFIX = ".model"
TEMPLATES_FOLDER = "additional_chat_templates"
"""Folder of the chat templates beside the default one."""

SENTENCEPIECE_TRANSFORMERS = (5, 24)
"""The first version of `transformers` that gives the token ids of SentencePiece."""

_FILES = ("*.json", "*.jinja", f"{TEMPLATES_FOLDER}/*.jinja", "*.model", "merges.txt", "vocab.txt")
"""Files of a repository that a tokenizer is made of, with the model's `config.json`, which tells its class."""

_INDEX_FILES = "*.index.json"
_CONTROL = 3
_HIDDEN_TYPES = (2, _CONTROL, 5, 6)  # unknown, control, unused, byte
_MAX_MODEL_BYTES = 1_000_000_000


def is_convertible(folder: Path) -> bool:
    """True if a folder holds a tokenizer of another form than a `tokenizer.json`."""
    names = ("tokenizer_config.json", "vocab.json", "vocab.txt")
    return any((folder / name).is_file() for name in names) or any(folder.glob(f"*{SENTENCEPIECE_SUFFIX}"))


def is_sentencepiece(path: Path) -> bool:
    """True if a file is a SentencePiece model by its name, or by its first byte, with which no JSON begins."""
    if path.suffix == SENTENCEPIECE_SUFFIX:
        return True
    with path.open("rb") as stream:
        return stream.read(1) == b"\x0a" and b"\0" in stream.read(4096)


@cache
def download_tokenizer(name: str) -> Path:
    """Return the folder of a tokenizer `hf://OWNER/NAME` in the cache of the Hugging Face hub; its weights stay there.

    A process asks the hub once, and goes on with what it found then.

    Raises:
        DataError: if there is no such repository, or it can be reached neither on the hub nor in the cache.
    """
    from huggingface_hub import snapshot_download

    parsed = parse_hub_name(name, key="data.tokenizer", known=("revision",))
    with asking_hub(f"data.tokenizer={name!r}"):
        folder = snapshot_download(
            parsed.repository,
            revision=parsed.options.get("revision"),
            allow_patterns=list(_FILES),
            ignore_patterns=[_INDEX_FILES],
        )
    return Path(folder)


def convert_folder(folder: Path, where: str) -> Path:
    """Return a folder with the `tokenizer.json` of a folder that `transformers` reads, which has none.

    Raises:
        DataError: if `transformers` finds no tokenizer there, or one that is not of the tokenizers library.
    """
    files = _find_files(folder)
    models = [path for path in files if path.suffix == SENTENCEPIECE_SUFFIX]
    if len(models) == 1 and not (folder / "tokenizer_config.json").is_file():
        return convert_sentencepiece(models[0], where)

    def load() -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # it raises errors of many kinds
            reason = " ".join(str(error).split())
            raise DataError(
                f"{where}: no tokenizer.json in {folder}, and transformers reads no tokenizer there ({reason[:300]}); "
                "give the path of a tokenizer.json, or leave data.tokenizer out to train one"
            ) from error

    return _convert(files, load, where)


def gather_chat_templates(folder: Path, where: str) -> Path:
    """Return a flat folder of a tokenizer, with all its chat templates in `tokenizer_config.json`.

    It is the folder itself, unless there is a folder of templates in it, as `transformers` writes one.

    Raises:
        DataError: if its settings cannot be read.
    """
    templates = {path.stem: path for path in sorted(folder.glob(f"{TEMPLATES_FOLDER}/*.jinja"))}
    if not templates:
        return folder
    templates = {"default": folder / "chat_template.jinja", **templates}
    files = [path for path in _find_files(folder) if path.parent == folder and path.suffix == ".json"]

    def fill(copy: Path) -> None:
        for path in files:
            shutil.copyfile(path, copy / path.name)
        config = copy / "tokenizer_config.json"
        try:
            settings = parse_json(config.read_text(encoding="utf-8")) if config.is_file() else {}
            settings["chat_template"] = [
                {"name": name, "template": path.read_text(encoding="utf-8")}
                for name, path in templates.items()
                if path.is_file()
            ]
        except (ValueError, TypeError) as error:
            raise DataError(f"{where}: the settings or templates in {folder} cannot be read ({error})") from error
        config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    return _fill_once(_cache_folder([*files, *filter(Path.is_file, templates.values())], where), fill)


def _find_files(folder: Path) -> list[Path]:
    """Files that a tokenizer is made of."""
    return sorted({path for pattern in _FILES for path in folder.glob(pattern)} - set(folder.glob(_INDEX_FILES)))


def convert_sentencepiece(path: Path, where: str) -> Path:
    """Return a folder with a `tokenizer.json` that gives the token ids of a SentencePiece model.

    Raises:
        DataError: if the file is no such model, or a library is missing or too old.
    """

    def load() -> Any:
        needed = ".".join(map(str, SENTENCEPIECE_TRANSFORMERS))
        if tuple(map(int, version("transformers").split(".")[:2])) < SENTENCEPIECE_TRANSFORMERS:
            raise DataError(
                f"{where}: to read a SentencePiece model needs transformers {needed} or newer, and "
                f"{version('transformers')} is installed, which gives other token ids; "
                'pip install "pipekit[data]", or give a tokenizer.json'
            )
        try:
            from transformers import PreTrainedTokenizerFast
            from transformers.convert_slow_tokenizer import SentencePieceExtractor, SpmConverter

            extractor = SentencePieceExtractor(str(path))
        except ImportError as error:
            raise DataError(
                f'{where}: to read a SentencePiece model needs sentencepiece and protobuf; pip install "pipekit[data]"'
            ) from error
        except Exception as error:  # that of protobuf is known to it alone
            raise DataError(f"{where}: not a SentencePiece model ({error}); give one, or a tokenizer.json") from error
        proto = extractor.proto
        if not proto.pieces:
            raise DataError(f"{where}: not a SentencePiece model: it has no pieces; give one, or a tokenizer.json")
        vocab = extractor.extract(None)["vocab"]
        is_unigram = isinstance(vocab, list)
        hidden = {piece.piece for piece in proto.pieces if piece.type in _HIDDEN_TYPES}
        backend = SpmConverter.build_tokenizer_from_spm_proto(
            proto, _hide_pieces(vocab, hidden) if is_unigram else vocab
        )
        if is_unigram:
            _split_pieces(backend, hidden, vocab)
        controls = [piece.piece for piece in proto.pieces if piece.type == _CONTROL]
        backend.add_special_tokens(controls)
        trainer = proto.trainer_spec
        special = {
            f"{kind}_token": getattr(trainer, f"{kind}_piece")
            for kind in ("bos", "eos", "unk", "pad")
            if getattr(trainer, f"{kind}_id") >= 0
        }
        return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)

    return _convert([path], load, where)


def _hide_pieces(vocab: list[tuple[str, float]], hidden: set[str]) -> list[tuple[str, float]]:
    """Scores of a unigram model with which no hidden piece is taken where other pieces can spell it, too.

    SentencePiece never takes a control piece for the text that spells it; the tokenizers library does.
    """
    worst = min(score for piece, score in vocab if piece not in hidden)
    return [(piece, worst * (len(piece) + 1) - 100 if piece in hidden else score) for piece, score in vocab]


def _split_pieces(backend: Tokenizer, hidden: set[str], vocab: list[tuple[str, float]]) -> None:
    """Split hidden pieces in which some characters are unknown, beside one of these, where no other piece reaches."""
    known = {piece for piece, _ in vocab}
    halves = []
    for piece in sorted(hidden):
        are_known = [character in known for character in piece]
        if not all(are_known) and len(piece) > 1:
            place = next((place for place in range(1, len(piece)) if are_known[place] != are_known[place - 1]), 1)
            halves.append((piece[:place], piece[place:]))
    if halves:
        pattern = "|".join(f"{re.escape(first)}(?={re.escape(rest)})" for first, rest in halves)
        split = pre_tokenizers.Split(Regex(pattern), behavior="merged_with_previous")
        given = [] if backend.pre_tokenizer is None else [backend.pre_tokenizer]
        backend.pre_tokenizer = pre_tokenizers.Sequence([*given, split])


def _convert(files: Iterable[Path], load: Callable[[], Any], where: str) -> Path:
    final = _cache_folder(files, where)
    if (final / "tokenizer.json").is_file():
        return final
    tokenizer = load()
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{where}: transformers reads it as {type(tokenizer).__name__}, which is not of the tokenizers library and "
            "has no tokenizer.json; give another tokenizer"
        )

    def fill(folder: Path) -> None:
        tokenizer.save_pretrained(str(folder))
        for path in files:
            if path.name == "generation_config.json":
                shutil.copyfile(path, folder / path.name)

    return _fill_once(final, fill)


def _cache_folder(files: Iterable[Path], where: str) -> Path:
    """Folder of the cache for what is made of files."""
    digest = hashlib.blake2b(f"1 {version('transformers')}".encode(), digest_size=12)
    for path in files:
        if path.stat().st_size > _MAX_MODEL_BYTES:
            raise DataError(f"{where}: {path} is longer than any tokenizer; give the file of one")
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return Path(CACHE_FOLDER).expanduser() / digest.hexdigest()


def _fill_once(final: Path, fill: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, which is filled under another name where it is not there."""
    if (final / "tokenizer.json").is_file():
        return final
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
    try:
        with storing(final):
            temporary.mkdir(parents=True)
            fill(temporary)
            replace_folder(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final
