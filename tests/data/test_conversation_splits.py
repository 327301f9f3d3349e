"""Conversations in the cache: token files with a loss mask beside them, written on all cores, resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chat_templates import TEMPLATES, random_conversations, write_chat_tokenizer
from pipekit.config import DataConfig
from pipekit.data import splits
from pipekit.data.conversations import ConversationEncoder
from pipekit.data.prepare import prepare_data
from pipekit.data.samples.loss_mask import load_loss_mask
from pipekit.data.sources.formats import Record
from pipekit.errors import DataError

CONVERSATIONS = random_conversations(40)


def read_files(cache: Path) -> dict[str, bytes]:
    """All files of a cache but the locks."""
    files = [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


def write_completions(folder: Path) -> None:
    """Two hundred prompts with completions, in `chat.jsonl`, and a tokenizer."""
    write_chat_tokenizer(folder / "tokenizer", None)
    lines = [{"prompt": f"What is {number} squared?", "completion": str(number * number)} for number in range(200)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def prepare_here(cache: str, stop_at: float = 2.0) -> None:
    """Prepare `chat.jsonl` in this process, and stop after a part of it."""

    def stop(message: str, fraction: float | None) -> None:
        if message == "encoding the conversations" and (fraction or 0.0) > stop_at:
            raise KeyboardInterrupt

    config = DataConfig(source="chat.jsonl", tokenizer="tokenizer", cache_dir=cache)
    prepare_data(config, sequence_length=16, on_progress=stop)


@pytest.fixture
def small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder of one's own, with conversations, and save often."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(splits, "_BATCH_BYTES", 200)
    monkeypatch.setattr(splits, "_PIECE_BYTES", 2000)
    write_completions(tmp_path)


@pytest.mark.usefixtures("small_pieces")
def test_conversations_go_on_after_an_interrupt_where_they_were_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded: list[str] = []
    encode = ConversationEncoder.encode

    def encode_and_note(self: ConversationEncoder, record: Record) -> Any:
        encoded.append(record.fields["completion"])
        return encode(self, record)

    monkeypatch.setattr(ConversationEncoder, "encode", encode_and_note)
    prepare_here("whole")
    everything = list(encoded)
    encoded.clear()
    with pytest.raises(KeyboardInterrupt):
        prepare_here("interrupted", stop_at=0.7)
    first = len(encoded)
    assert 100 < first < 200
    prepare_here("interrupted")
    assert encoded[:first] + encoded[first:][-(200 - first) :] == everything
    assert len(encoded) - 200 < 50, "no more than a piece is encoded twice"
    assert read_files(Path("interrupted")) == read_files(Path("whole"))


@pytest.mark.usefixtures("small_pieces")
def test_a_mask_that_was_left_broken_is_not_gone_on_with(caplog: pytest.LogCaptureFixture) -> None:
    prepare_here("whole")
    with pytest.raises(KeyboardInterrupt):
        prepare_here("broken", stop_at=0.5)
    (left,) = (path for path in Path("broken", "data").iterdir() if "building" in path.name)
    mask = left / ".train.mask.tmp"
    data = mask.read_bytes()
    mask.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    prepare_here("broken")
    assert "is broken and is prepared again" in caplog.text
    assert read_files(Path("broken")) == read_files(Path("whole"))


@pytest.mark.parametrize("kind", ["completion", pytest.param("chat", marks=pytest.mark.slow)])
def test_the_number_of_cores_does_not_change_tokens_and_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(splits, "_MIN_PARALLEL_BYTES", 0)
    monkeypatch.setattr(splits, "_BATCH_BYTES", 2000)
    if kind == "completion":
        write_completions(tmp_path)
        config = DataConfig(source="chat.jsonl", tokenizer="tokenizer")
    else:
        config = make_config(tmp_path, [{"messages": messages} for messages in CONVERSATIONS])
    for num_cores in (1, 2):
        prepare_data(config.model_copy(update={"cache_dir": str(num_cores)}), sequence_length=16, num_cores=num_cores)
    files = read_files(Path("1"))
    assert len([name for name in files if name.endswith(".mask")]) == 2
    assert files == read_files(Path("2"))


@pytest.mark.parametrize("num_cores", [1, 2])
def test_a_bad_record_is_told_of_from_any_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_cores: int
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(splits, "_MIN_PARALLEL_BYTES", 0)
    write_completions(tmp_path)
    with (tmp_path / "chat.jsonl").open("a") as lines:
        lines.write('{"prompt": "a", "completion": ""}\n')
    config = DataConfig(source="chat.jsonl", tokenizer="tokenizer", cache_dir="cache")
    with pytest.raises(DataError, match=r"chat\.jsonl:201: the completion is empty"):
        prepare_data(config, sequence_length=16, num_cores=num_cores)


def make_config(tmp_path: Path, lines: list[Any], **values: Any) -> DataConfig:
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = write_chat_tokenizer(tmp_path / "tokenizer", TEMPLATES["headers"])
    defaults = {"source": str(source), "tokenizer": str(tokenizer), "cache_dir": str(tmp_path / "cache")}
    return DataConfig(**{**defaults, "validation_fraction": 0.1, **values})


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_every_conversation_is_prepared_once_with_its_mask(tmp_path: Path, kind: str) -> None:
    lines: list[dict[str, Any]] = [{"messages": messages} for messages in CONVERSATIONS]
    if kind == "completion":
        lines = [
            {"prompt": messages[0]["content"], "completion": messages[-1]["content"]} for messages in CONVERSATIONS
        ]
    config = make_config(tmp_path, lines)
    (source,) = prepare_data(config, sequence_length=10_000).sources
    assert source.has_loss_mask
    assert source.validation is not None
    assert (source.train.num_documents, source.validation.num_documents) == (36, 4)
    found = set()
    for token_slice in source.slices:
        tokens, mask, bounds = token_slice.load_tokens(), load_loss_mask(token_slice), token_slice.load_bounds()
        assert len(mask) == len(tokens)
        pairs = zip(np.split(tokens, bounds[1:-1]), np.split(mask, bounds[1:-1]), strict=True)
        found |= {(tuple(ids.tolist()), tuple(mask.tolist())) for ids, mask in pairs}
    encoder = ConversationEncoder(tmp_path / "tokenizer" / "tokenizer.json", kind)  # type: ignore[arg-type]
    encoded = [encoder.encode(Record("", line)) for line in lines]
    assert found == {(tuple(ids.tolist()), tuple(mask.astype(int).tolist())) for ids, mask in encoded}
    assert prepare_data(config, sequence_length=10_000).sources == (source,)


def test_another_mask_is_other_data(tmp_path: Path) -> None:
    lines = [{"messages": messages} for messages in CONVERSATIONS]
    config = make_config(tmp_path, lines)
    first = prepare_data(config, sequence_length=16).fingerprint
    template = TEMPLATES["headers"].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    template = template.replace("{% for message", "{% generation %}{% for message").replace(
        "{% endfor %}", "{% endfor %}{% endgeneration %}"
    )
    write_chat_tokenizer(tmp_path / "tokenizer", template)
    assert prepare_data(config, sequence_length=16).fingerprint != first


@pytest.mark.parametrize(
    ("lines", "values", "message"),
    [
        ([{"messages": CONVERSATIONS[0]}, {"messages": []}], {}, r"chat.jsonl:2: the conversation is empty"),
        ([{"messages": CONVERSATIONS[0]}, {"text": "a"}], {}, r"chat.jsonl:2: no key 'messages'; a line of chat is"),
        (
            [{"messages": CONVERSATIONS[0]}],
            {"tokenizer": None},
            r"holds records of chat; set data.tokenizer to the tokenizer of",
        ),
        ([], {"format": "chat"}, r"holds no conversation; give files that are not empty"),
        ([{"prompt": "a"}], {"format": "completion"}, r"chat.jsonl:1: no key 'completion'; a line is {\"prompt\""),
        ([{"prompt": "a", "completion": ""}], {}, r"chat.jsonl:1: the completion is empty"),
    ],
)
def test_bad_records_are_named_by_their_line_and_nothing_is_left(
    tmp_path: Path, lines: list[Any], values: dict[str, Any], message: str
) -> None:
    config = make_config(tmp_path, lines, **values)
    with pytest.raises(DataError, match=message):
        prepare_data(config, sequence_length=16)
    assert [path.name for path in (tmp_path / "cache").glob("data/*") if path.is_dir()] == []
