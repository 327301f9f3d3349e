from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from pipekit.data.tokenizer import (
    END_TOKEN,
    MAX_VOCAB_SIZE,
    load_tokenizer,
    tokenizer_threads,
    train_tokenizer,
    write_hf_tokenizer,
)
from pipekit.errors import DataError

TEXTS = [f"def function_{index}(argument):\n    return argument + {index}\n" for index in range(200)]
TOKENIZER = train_tokenizer(TEXTS, vocab_size=400)


@pytest.fixture
def tokenizer_path(tmp_path: Path) -> Path:
    path = tmp_path / "trained" / "tokenizer.json"
    path.parent.mkdir()
    TOKENIZER.backend.save(str(path))
    return path


def test_training_is_deterministic_and_compresses() -> None:
    assert train_tokenizer(TEXTS, vocab_size=400).backend.to_str() == TOKENIZER.backend.to_str()
    assert TOKENIZER.vocab_size <= 400
    assert len(TOKENIZER.encode(TEXTS[7])) < len(TEXTS[7]) / 3


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60))
def test_every_text_comes_back(text: str) -> None:
    token_ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(token_ids) == text
    assert all(0 <= token_id < TOKENIZER.vocab_size for token_id in token_ids)
    assert TOKENIZER.encode_batch([text])[0] == token_ids


def test_text_cannot_forge_the_end_of_a_document() -> None:
    text = f"before{END_TOKEN}after"
    assert TOKENIZER.end_token_id not in TOKENIZER.encode(text)
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.vocab_size=256 .* at least 257"):
        train_tokenizer(TEXTS, vocab_size=256)
    assert train_tokenizer(TEXTS, vocab_size=257).vocab_size == 257


def test_loading_gives_the_same_tokenizer(tokenizer_path: Path) -> None:
    for path in (tokenizer_path, str(tokenizer_path.parent)):
        loaded = load_tokenizer(path)
        assert loaded.encode(TEXTS[3]) == TOKENIZER.encode(TEXTS[3])
        assert (loaded.end_token, loaded.end_token_id) == (END_TOKEN, TOKENIZER.end_token_id)


def test_truncation_and_padding_of_a_given_tokenizer_are_switched_off(tokenizer_path: Path) -> None:
    backend = Tokenizer.from_file(str(tokenizer_path))
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(tokenizer_path))
    tokens = load_tokenizer(tokenizer_path).encode_batch([TEXTS[0], "a"])
    assert [len(ids) for ids in tokens] == [len(TOKENIZER.encode(TEXTS[0])), 1]


def test_end_token_is_found_or_asked_for(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "STOP": 7}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    with pytest.raises(DataError, match=r"no token that ends a document .*tokenizer_config\.json"):
        load_tokenizer(path)
    for named in ("STOP", {"content": "STOP", "lstrip": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        tokenizer = load_tokenizer(path)
        assert (tokenizer.end_token, tokenizer.end_token_id, tokenizer.vocab_size) == ("STOP", 7, 8)


def test_an_id_that_no_embedding_has_a_row_for_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    vocab = {END_TOKEN: 0, "word": MAX_VOCAB_SIZE - 1}
    Tokenizer(models.WordLevel(vocab, unk_token="word")).save(str(path))
    assert load_tokenizer(path).backend.token_to_id("word") == MAX_VOCAB_SIZE - 1
    Tokenizer(models.WordLevel({**vocab, "word": MAX_VOCAB_SIZE}, unk_token="word")).save(str(path))
    with pytest.raises(DataError, match="the token 'word' has the id 16777216, and an embedding needs a row for each"):
        load_tokenizer(path)


def test_a_text_with_unknown_words_is_refused_where_there_is_no_token_for_them(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({END_TOKEN: 0, "word": 1}, unk_token="[UNK]")).save(str(path))
    tokenizer = load_tokenizer(path)
    for encode in (lambda: tokenizer.encode("other"), lambda: tokenizer.encode_batch(["other"])):
        with pytest.raises(
            DataError, match=r"data\.tokenizer: cannot encode the text: .*; give a tokenizer that knows"
        ):
            encode()


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer=.*no such file.*or leave data\.tokenizer out"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("with_model_config", [False, True])
def test_transformers_reads_what_is_written(
    tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_model_config: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    folder = tmp_path / "export"
    write_hf_tokenizer(tokenizer_path, folder, max_length=128)
    if with_model_config:
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 400}))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id == TOKENIZER.end_token_id
    assert theirs.model_max_length == 128
    for text in (*TEXTS[:5], " leading  spaces\tand\nünïcode 😀 ."):
        assert theirs(text)["input_ids"] == TOKENIZER.encode(text)
        assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs(END_TOKEN)["input_ids"] == [TOKENIZER.end_token_id]


def test_settings_beside_a_given_tokenizer_are_exported(tokenizer_path: Path, tmp_path: Path) -> None:
    given = {"eos_token": END_TOKEN, "chat_template": "{{ messages }}", "auto_map": {"AutoTokenizer": "x.Y"}}
    (tokenizer_path.parent / "tokenizer_config.json").write_text(json.dumps(given))
    write_hf_tokenizer(tokenizer_path.parent, tmp_path / "export", max_length=64)
    written = json.loads((tmp_path / "export" / "tokenizer_config.json").read_text())
    assert written == {"eos_token": END_TOKEN, "chat_template": "{{ messages }}", "model_max_length": 64}


FORKING_PROGRAM = """
import os
from pipekit.data.tokenizer import tokenizer_threads, train_tokenizer
with tokenizer_threads():
    tokenizer = train_tokenizer(["some words " * 50] * 50, vocab_size=300)
    tokenizer.encode_batch(["some words"] * 50)
child = os.fork()
if child == 0:
    tokenizer.encode_batch(["some words"] * 50)  # must not deadlock
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_after_encoding_is_silent_and_works() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-c", FORKING_PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stderr == ""


@pytest.mark.parametrize("given", ["true", "false"])
def test_the_users_own_setting_is_kept(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", given)
    with tokenizer_threads():
        assert os.environ["TOKENIZERS_PARALLELISM"] == given
    assert os.environ["TOKENIZERS_PARALLELISM"] == given
