"""Byte-level BPE: trained on the corpus or given as a `tokenizer.json`, and its files for transformers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipekit.data.hub import SCHEME
from pipekit.data.tokenizer_conversion import (
    TEMPLATES_FOLDER,
    convert_folder,
    convert_sentencepiece,
    download_tokenizer,
    gather_chat_templates,
    is_convertible,
    is_sentencepiece,
)
from pipekit.errors import DataError
from pipekit.files import parse_json, read_regular

END_TOKEN = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # the 256 bytes and the end-of-text token
MAX_VOCAB_SIZE = 1 << 24
TOKENIZER_FILE = "tokenizer.json"
SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files beside a `tokenizer.json` that say how `transformers` uses it."""

# What the common families call the token that ends a document, where no tokenizer_config.json says it.
_KNOWN_END_TOKENS = (END_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
_MAX_SIDE_BYTES = 100_000_000
_PARALLELISM_VARIABLE = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True)
class TextTokenizer:
    """Text to token ids and back.

    A text that spells a special token is read as plain text, never as the token: no document can forge its end.
    """

    backend: Tokenizer
    end_token: str
    end_token_id: int

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id: the number of rows that an embedding needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without any special token."""
        with self._encoding():
            return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without any special token."""
        with self._encoding():
            # encode_batch_fast of tokenizers 0.23 takes a quarter longer.
            encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    @contextlib.contextmanager
    def _encoding(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"data.tokenizer: cannot encode the text: {error}; give a tokenizer that knows every text, such as one "
                "of bytes, or leave data.tokenizer out to train one"
            ) from error

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`."""
        return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> TextTokenizer:
    """Return a byte-level BPE tokenizer trained on `texts`; the same texts give the same tokenizer.

    Every text can be encoded and comes back unchanged, as the 256 bytes are in the vocabulary. A short corpus
    may have fewer than `vocab_size` different pieces; the vocabulary is then smaller.

    Raises:
        DataError: if `vocab_size` has no room for the bytes and the end-of-text token.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners, section 2.2.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"data.vocab_size={vocab_size} is too small: the 256 bytes and {END_TOKEN} need at least "
            f"{MIN_VOCAB_SIZE}; try 4096"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return _wrap(backend, END_TOKEN)


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """Return the tokenizer of a `tokenizer.json` file.

    Its end-of-text token is the `eos_token` of a `tokenizer_config.json` beside it, else a name in common use.

    Raises:
        DataError: if the file is missing or no tokenizer, or has no end-of-text token.
    """
    path = find_tokenizer_file(path)
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"data.tokenizer={str(path)!r}: not a tokenizer.json of the tokenizers library ({error}); "
            "give one, or leave data.tokenizer out to train one"
        ) from error
    named = _read_side_config(path).get("eos_token")
    if isinstance(named, dict):  # the long form of a token: {"content": "</s>", "lstrip": false, ...}
        named = named.get("content")
    candidates = [named] if isinstance(named, str) else list(_KNOWN_END_TOKENS)
    last, largest = max(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1], default=("", 0))
    if largest >= MAX_VOCAB_SIZE:
        raise DataError(
            f"data.tokenizer={str(path)!r}: the token {last!r} has the id {largest}, and an embedding needs a row for "
            f"each id up to the largest; ids are below {MAX_VOCAB_SIZE:,}, counted from 0"
        )
    for token in candidates:
        if backend.token_to_id(token) is not None:
            return _wrap(backend, token)
    raise DataError(
        f"data.tokenizer={str(path)!r}: no token that ends a document (looked for {', '.join(candidates)}); "
        'name the one it has in a tokenizer_config.json beside it: {"eos_token": "..."}'
    )


def find_tokenizer_file(path: str | Path) -> Path:
    """Return the `tokenizer.json` that `path` names, with the settings of `transformers` beside it.

    Args:
        path: that file, a folder of a tokenizer, a SentencePiece model, or a name on the hub, `hf://OWNER/NAME`. What
            is no `tokenizer.json` is converted once, in the cache. Of one with a folder of chat templates beside it, a
            copy in the cache has them all in its settings.

    Raises:
        DataError: if there is no such file, or it cannot be converted.
    """
    where = f"data.tokenizer={str(path)!r}"
    given = download_tokenizer(str(path)) if str(path).startswith(SCHEME) else Path(path).expanduser()
    file = given / TOKENIZER_FILE if given.is_dir() else given
    if given.is_dir() and not file.exists() and is_convertible(given):
        return gather_chat_templates(convert_folder(given, where), where) / TOKENIZER_FILE
    if file.is_file() and is_sentencepiece(file):
        return convert_sentencepiece(file, where) / TOKENIZER_FILE
    if not file.is_file():
        raise DataError(
            f"data.tokenizer={str(path)!r}: no such file (looked at {file.absolute()}); give a {TOKENIZER_FILE}, a "
            f"folder, a SentencePiece model or {SCHEME}OWNER/NAME, or leave data.tokenizer out to train one"
        )
    if (file.parent / TEMPLATES_FOLDER).is_dir() and file.name == TOKENIZER_FILE:
        return gather_chat_templates(file.parent, where) / TOKENIZER_FILE
    return file


def copy_tokenizer(path: str | Path, folder: Path) -> Path:
    """Copy a `tokenizer.json`, and the settings beside it, into `folder`; return the path of the copy."""
    path = find_tokenizer_file(path)
    for name, file in tokenizer_files(path).items():
        shutil.copyfile(file, folder / name)
    return folder / TOKENIZER_FILE


def tokenizer_files(path: Path) -> dict[str, Path]:
    """A `tokenizer.json`, and the files beside it that belong to it, by name."""
    beside = {name: path.parent / name for name in SIDE_FILES}
    return {TOKENIZER_FILE: path, **{name: file for name, file in beside.items() if file.is_file()}}


def write_hf_tokenizer(tokenizer_path: str | Path, folder: str | Path, max_length: int) -> None:
    """Write into `folder` the files that `transformers.AutoTokenizer.from_pretrained(folder)` reads.

    Settings beside the `tokenizer.json` are kept; `max_length` is the longest input of the model, in tokens.

    Raises:
        DataError: if the tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    token = tokenizer.end_token
    settings: dict[str, Any] = _read_side_config(find_tokenizer_file(tokenizer_path)) or {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), token),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    settings.pop("auto_map", None)  # names Python files that are not copied
    settings["model_max_length"] = max_length
    copy_tokenizer(tokenizer_path, folder)
    _write_json(folder / "tokenizer_config.json", settings)
    if not (folder / "special_tokens_map.json").is_file():
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        _write_json(folder / "special_tokens_map.json", {name: settings[name] for name in names if settings.get(name)})


def special_token_ids(tokenizer_path: str | Path) -> dict[str, int]:
    """Ids of the tokens that begin and end a document, and that pad one, by their keys in a `config.json`.

    Where the tokenizer has no `tokenizer_config.json`, the token that ends a document begins it, too.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    settings = _read_side_config(find_tokenizer_file(tokenizer_path)) or {"bos_token": tokenizer.end_token}
    found = {"eos_token_id": tokenizer.end_token_id}
    for kind in ("bos", "pad"):
        token = settings.get(f"{kind}_token")
        content = token.get("content") if isinstance(token, dict) else token
        token_id = tokenizer.backend.token_to_id(content) if isinstance(content, str) else None
        if token_id is not None:
            found[f"{kind}_token_id"] = token_id
    return found


def _wrap(backend: Tokenizer, end_token: str) -> TextTokenizer:
    end_token_id = backend.token_to_id(end_token)
    assert end_token_id is not None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return TextTokenizer(backend=backend, end_token=end_token, end_token_id=end_token_id)


def _read_side_config(tokenizer_path: Path) -> dict[str, Any]:
    path = tokenizer_path.parent / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        settings = parse_json(read_regular(path, max_bytes=_MAX_SIDE_BYTES))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); correct it, or delete it") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; correct it, or delete it") from error
    return settings if isinstance(settings, dict) else {}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def tokenizer_threads() -> Iterator[None]:
    """Let the tokenizers library use its threads, and keep a later fork of this process silent and safe.

    The library prints a warning at every fork that follows threaded work, unless `TOKENIZERS_PARALLELISM`
    shows that somebody has thought of it. A value that the user has set is kept; else it is left at "false",
    with which a forked child encodes on one thread and cannot deadlock.
    """
    if _PARALLELISM_VARIABLE in os.environ:
        yield
        return
    os.environ[_PARALLELISM_VARIABLE] = "true"
    try:
        yield
    finally:
        os.environ[_PARALLELISM_VARIABLE] = "false"


def child_environment(num_threads: int) -> dict[str, str]:
    """Return the environment of a process that imports what this one does, and encodes on so many threads."""
    return {
        **os.environ,
        "RAYON_NUM_THREADS": str(num_threads),
        _PARALLELISM_VARIABLE: str(num_threads > 1).lower(),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
