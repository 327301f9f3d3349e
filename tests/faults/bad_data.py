"""Bad data: text, records, conversations, mixtures, token files, tokenizers."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.cases import CONFIG, GOOD_LINES, Case, fifo, link
from hand_made import small_tokenizer


def jsonl(*lines: bytes) -> bytes:
    return b'{"text": "one good line of text"}\n' + b"\n".join(lines) + b"\n"


# Files of text, and what the message must say.
DATA: dict[str, tuple[str, bytes, str]] = {
    "empty text": ("a.txt", b"", "a.txt"),
    "spaces alone": ("a.txt", b"   \n \n", "training tokens"),
    "short text": ("a.txt", b"word\n", "training tokens"),
    "byte order mark alone": ("a.txt", b"\xef\xbb\xbf", "holds no text"),
    "latin-1": ("a.txt", GOOD_LINES.encode() + b"a caf\xe9\n" + GOOD_LINES.encode(), "line 2001, column 6"),
    "utf-16": ("a.txt", "text\n".encode("utf-16"), "iconv -f utf-16"),
    "cut utf-8": ("a.txt", GOOD_LINES.encode() + "é".encode()[:1], "line 2001, column 1"),
    "overlong utf-8": ("a.txt", b"\xc0\xaf" * 100, "line 1, column 1"),
    "surrogates in utf-8": ("a.txt", b"ab\xed\xa0\x80" * 100, "line 1, column 3"),
    "random bytes": ("a.txt", bytes(i * i % 251 for i in range(5000)), "neither UTF-8 text nor"),
    "empty jsonl": ("a.jsonl", b"", "a.jsonl"),
    "blank jsonl": ("a.jsonl", b"\n\n\n", "holds no text"),
    "jsonl of lists": ("a.jsonl", jsonl(b"[1]"), "a.jsonl:2"),
    "jsonl of numbers": ("a.jsonl", jsonl(b"1"), "a.jsonl:2"),
    "jsonl without the key": ("a.jsonl", jsonl(b'{"content": "a"}'), "data.text_key"),
    "jsonl of another type": ("a.jsonl", jsonl(b'{"text": 3}'), "not a string"),
    "jsonl of null": ("a.jsonl", jsonl(b'{"text": null}'), "not a string"),
    "jsonl that is cut": ("a.jsonl", jsonl(b'{"text": "a'), "a.jsonl:2"),
    "jsonl of latin-1": ("a.jsonl", jsonl(b'{"text": "caf\xe9"}'), "a.jsonl:2"),
    "jsonl with control characters": ("a.jsonl", jsonl(b'{"text": "\x1b[31m"}'), "a.jsonl:2"),
    "jsonl with keys of control characters": ("a.jsonl", jsonl(b'{"\\u001b[31m": "a"}'), "a.jsonl:2"),
    "jsonl of deep lists": ("a.jsonl", jsonl(b"[" * 100_000 + b"]" * 100_000), "a.jsonl:2"),
    "jsonl of deep mappings": ("a.jsonl", jsonl(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "a.jsonl:2"),
    "jsonl of deep values": ("a.jsonl", jsonl(b'{"text": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"), "a.jsonl:2"),
    "jsonl of long numbers": ("a.jsonl", jsonl(b'{"text": ' + b"9" * 9000 + b"}"), "a.jsonl:2"),
    "jsonl of nan": ("a.jsonl", jsonl(b'{"text": NaN}'), "a.jsonl:2"),
    "jsonl with a long key": ("a.jsonl", jsonl(b'{"' + b"k" * 100_000 + b'": "a"}'), "a.jsonl:2"),
    "jsonl with many keys": (
        "a.jsonl",
        jsonl(json.dumps({f"k{i}": i for i in range(20_000)}).encode()),
        "a.jsonl:2",
    ),
}

# Paths of text that are no files, what is made there, and what the message must say.
DATA_PLACES: dict[str, tuple[str, Callable[[Path], Any] | None, str]] = {
    "a pipe": ("a.txt", fifo("a.txt"), "a.txt"),
    "a link to a device": ("a.txt", link("a.txt", "/dev/zero"), "a.txt"),
    "a link to itself": ("a.txt", link("a.txt", "a.txt"), "a.txt"),
    "a link to nothing": ("a.txt", link("a.txt", "nothing"), "a.txt"),
    "a file without a size": ("/proc/cpuinfo", None, "/proc/cpuinfo"),
    "an empty folder": ("empty", lambda folder: (folder / "empty").mkdir(), "holds no"),
    "a folder of pictures": ("llama", None, "holds no .txt"),
    "a file that may not be read": ("/proc/self/mem", None, "/proc/self/mem"),
}


def tokenizer(**changes: Any) -> str:
    """A sound `tokenizer.json` with some keys changed; the keys of a nested one are joined by `__`."""
    stored = json.loads(small_tokenizer().to_str())
    for name, value in changes.items():
        *above, last = name.split("__")
        node = stored
        for key in above:
            node = node[key]
        node[last] = value
    return json.dumps(stored)


def word_level(vocab: dict[str, int], unknown: str) -> str:
    return tokenizer(model={"type": "WordLevel", "vocab": vocab, "unk_token": unknown})


ADDED = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
TOKENIZERS: dict[str, tuple[Callable[[], str | bytes], str]] = {
    "empty": (lambda: "", "tokenizer"),
    "a list": (lambda: "[]", "tokenizer"),
    "a number": (lambda: "3", "tokenizer"),
    "cut": (lambda: tokenizer()[:500], "tokenizer"),
    "latin-1": (lambda: b'{"a": "\xe9"}', "tokenizer"),
    "deep": (lambda: "[" * 100_000, "tokenizer"),
    "no model": (lambda: tokenizer(model=None), "tokenizer"),
    "unknown model": (lambda: tokenizer(model={"type": "None"}), "tokenizer"),
    "no end token": (lambda: tokenizer(added_tokens=[], model__vocab={"a": 0}, model__merges=[]), "ends a document"),
    "words without the unknown token": (lambda: word_level({"a": 0, "<|endoftext|>": 1}, "[UNK]"), "[UNK]"),
    "an id of four billion": (
        lambda: word_level({"<|endoftext|>": 0, "line": 4_000_000_000, "u": 1}, "u"),
        "4000000000",
    ),
    "an id of two billion": (
        lambda: word_level({"<|endoftext|>": 0, "line": 2_000_000_000, "u": 1}, "u"),
        "2000000000",
    ),
    "a negative id": (lambda: word_level({"<|endoftext|>": 0, "line": -1}, "line"), "tokenizer"),
    "merges of nothing": (lambda: tokenizer(model__merges=["x y"]), "tokenizer"),
    "control characters": (lambda: tokenizer(version="\x1b[31m"), "tokenizer"),
}


# Files of other formats, and what the message must say.
PACKED: dict[str, tuple[str, bytes, str]] = {
    "cut gzip": ("a.txt.gz", gzip.compress(GOOD_LINES.encode())[:500], "gzip file is broken or was cut short"),
    "cut Parquet": ("a.parquet", b"PAR1" + bytes(200), "Parquet file is broken or was cut short"),
    "cut Arrow": ("a.arrow", b"ARROW1\0\0" + bytes(200), "Arrow file is broken or was cut short"),
    "a zip archive": ("a.zip", b"PK\x03\x04" + bytes(200), "unpack it"),
}


def megatron(*token_ids: int, num_bytes: int | None = None) -> dict[str, bytes]:
    """Token files of one document in Megatron's format, 4 bytes a token, of which the first is cut to some bytes."""
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 1, 2)
    index = header + struct.pack("<iqqq", len(token_ids), 0, 0, 1)
    return {"a.bin": struct.pack(f"<{len(token_ids)}i", *token_ids)[:num_bytes], "a.idx": index}


LITDATA = {"chunks": [{"filename": "c.bin", "dim": 4}], "config": {"data_format": ["no_header_tensor:16"]}}
TOKEN_FILES: dict[str, tuple[str, dict[str, bytes], str]] = {
    "ids of another tokenizer": ("a.bin", megatron(*range(90), 60_000), "holds the token id 60000"),
    "ids below zero": ("a.bin", megatron(*range(90), -1), "holds the token id -1"),
    "cut Megatron": ("a.bin", megatron(*range(90), num_bytes=100), "does not describe a.bin"),
    "an index alone": ("a.idx", {"a.idx": megatron(1)["a.idx"]}, "there is no a.bin beside"),
    "cut nanotron": ("a.ds", {"a.ds": bytes(99), "a.ds.index": struct.pack("<q", 50)}, "one of the two was cut"),
    "an empty chunk": ("lit", {"lit/c.bin": b"", "lit/index.json": json.dumps(LITDATA).encode()}, "c.bin: is broken"),
}

# Mixtures of sources, with their stages, and what the message must say.
MIXTURES: dict[str, tuple[dict[str, Any], str]] = {
    "a source that is not there": ({"mixture": [{"name": "web", "source": "no.txt"}]}, "web: source='no.txt'"),
    "no weight": ({"mixture": [{"name": "web", "source": "text.txt", "weight": 0}]}, "data.mixture"),
    "a name twice": ({"mixture": [{"name": "web", "source": "text.txt"}] * 2}, "rename one of them"),
    "a stage of another source": (
        {
            "mixture": [{"name": "web", "source": "text.txt"}],
            "stages": [{"after_step": 1, "weights": {"wbe": 1}}],
        },
        "wbe",
    ),
}

# Second lines of files of conversations, chat templates, and what the message must say.
ASKED, ANSWERED = {"role": "user", "content": "line"}, {"role": "assistant", "content": "of"}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
CONVERSATIONS: dict[str, tuple[Any, str | None, str]] = {
    "a question alone": ({"messages": [ASKED]}, TEMPLATE, "chat.jsonl:2: no message is the assistant's"),
    "no template": ({"messages": [ASKED, ANSWERED]}, None, "no chat template"),
    "a template that is cut": ({"messages": [ASKED, ANSWERED]}, TEMPLATE[:20], "cannot be read"),
}


def _conversations() -> Iterator[Case]:
    first = json.dumps({"messages": [ASKED, ANSWERED]})
    command = ("train", "c.yaml", "data.source=chat.jsonl")
    yield Case("conversations: no tokenizer", command, "set data.tokenizer", {"chat.jsonl": first})
    for name, (line, template, says) in CONVERSATIONS.items():
        files = {
            "chat.jsonl": f"{first}\n{json.dumps(line)}\n",
            "t/tokenizer.json": tokenizer(),
            "t/tokenizer_config.json": json.dumps({"eos_token": "<|endoftext|>", "chat_template": template}),
        }
        yield Case(f"conversations: {name}", (*command, "data.tokenizer=t"), says, files)


def cases() -> Iterator[Case]:
    """All bad data."""
    yield from _conversations()
    for name, (changes, says) in MIXTURES.items():
        data = {key: value for key, value in CONFIG["data"].items() if key != "source"}
        text = json.dumps({**CONFIG, "data": {**data, **changes}})
        yield Case(f"mixture: {name}", ("train", "m.yaml"), says, {"m.yaml": text})
    for name, (source, files, says) in TOKEN_FILES.items():
        command = ("train", "c.yaml", f"data.source={source}", "data.tokenizer=tokenizer.json")
        yield Case(f"token files: {name}", command, says, files)
    for name, (file, bytes_, says) in (DATA | PACKED).items():
        yield Case(f"data: {name}", ("train", "c.yaml", f"data.source={file}"), says, {file: bytes_})
    for name, (place, change, says) in DATA_PLACES.items():
        yield Case(f"data: {name}", ("train", "c.yaml", f"data.source={place}"), says, change=change)
    for name, (make, says) in TOKENIZERS.items():
        files = {"t/tokenizer.json": make()}
        yield Case(f"tokenizer: {name}", ("train", "c.yaml", "data.tokenizer=t/tokenizer.json"), says, files)
