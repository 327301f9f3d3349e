from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipekit.data.chat_template import ChatTemplate
from pipekit.data.tokenizer import (
    TOKENIZER_FILE,
    copy_tokenizer,
    find_tokenizer_file,
    load_tokenizer,
    special_token_ids,
    train_tokenizer,
    write_hf_tokenizer,
)
from pipekit.data.tokenizer_conversion import SENTENCEPIECE_TRANSFORMERS
from pipekit.errors import DataError

sentencepiece = pytest.importorskip("sentencepiece")
WORDS = ["the", "model,", "trains", "its", "123", "layers", "of", "größer", "(in", "bf16)", "and", "漢字", "doesn't"]
LINES = [" ".join(random.Random(seed).choices(WORDS, k=12)) for seed in range(400)]
HTML = [f"{line} <s>{line}</s> & <pad>" for line in LINES]
RANDOM = random.Random(1)
TEXTS = [
    *LINES[:50],
    "",
    " ",
    "  two  spaces ",
    "tab\tnew\nline\n\nend",
    "ünï 😀 ﬁ ① a\u00a0b\u3000c ▁under▁",
    "</s><s> <unk> <pad> <0x0A> <|im_start|>user<|im_end|>",
    *("".join(RANDOM.choices("abc \n\t0123.,é漢😀<|>_▁", k=30)) for _ in range(100)),
]
BYTES = {"byte_fallback": True, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def train(folder: Path, model_type: str, **options: Any) -> Path:
    """Train a SentencePiece model, and return its file."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(options.pop("lines", LINES)),
        model_prefix=str(folder / "tokenizer"),
        model_type=model_type,
        vocab_size=400,
        hard_vocab_limit=False,
        pad_id=3,
        minloglevel=2,
        **options,
    )
    return folder / "tokenizer.model"


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options", [{}, BYTES, {"user_defined_symbols": ["<|im_start|>", "<|im_end|>"]}, {"lines": HTML}]
)
def test_a_sentencepiece_model_gives_the_ids_of_sentencepiece(
    tmp_path: Path, model_type: str, options: dict[str, Any]
) -> None:
    path = train(tmp_path, model_type, **options)
    theirs, ours = sentencepiece.SentencePieceProcessor(model_file=str(path)), load_tokenizer(path)
    assert ours.vocab_size == theirs.vocab_size()
    assert ours.end_token_id == theirs.eos_id()
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)).replace(" \u2047 ", "")
    assert special_token_ids(path) == {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 3}


def test_what_was_converted_once_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = train(tmp_path, "bpe")
    found = find_tokenizer_file(path)
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast", None)
    shutil.copyfile(path, tmp_path / "same.model")
    assert find_tokenizer_file(path) == found
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder/tokenizer.model")
    assert find_tokenizer_file(tmp_path / "folder") == found


def test_an_export_of_it_is_read_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = train(tmp_path, "unigram", **BYTES)
    write_hf_tokenizer(path, tmp_path / "export", max_length=64)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert (theirs.bos_token, theirs.eos_token, theirs.unk_token, theirs.pad_token) == ("<s>", "</s>", "<unk>", "<pad>")
    for text in TEXTS[:60]:
        if "<" not in text:  # transformers takes special tokens in a text for themselves
            assert theirs(text, add_special_tokens=False)["input_ids"] == load_tokenizer(path).encode(text)


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """A folder that `transformers` has saved, with special tokens of its own and a chat template."""
    from transformers import PreTrainedTokenizerFast

    backend = train_tokenizer(LINES, vocab_size=400).backend
    backend.encode_special_tokens = False
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        bos_token="<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", "<|tool|>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )
    tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("through", ["a checkpoint", "an export"])
def test_special_tokens_and_the_chat_template_are_kept(hf_folder: Path, tmp_path: Path, through: str) -> None:
    from transformers import AutoTokenizer

    kept = tmp_path / "kept"
    kept.mkdir()
    copy_tokenizer(hf_folder, kept)
    if through == "an export":
        write_hf_tokenizer(kept / TOKENIZER_FILE, tmp_path / "export", max_length=64)
        kept = tmp_path / "export"
    given, read = AutoTokenizer.from_pretrained(hf_folder), AutoTokenizer.from_pretrained(kept)
    assert read.special_tokens_map == given.special_tokens_map
    assert read.all_special_ids == given.all_special_ids
    assert read.padding_side == "left"
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": LINES[0]}]
    assert read.apply_chat_template(chat) == given.apply_chat_template(chat)
    assert read.apply_chat_template(chat, tokenize=False).startswith("<|im_start|>user\nhi<|im_end|>\n")
    for text in (*LINES[:20], "<|im_start|> <|tool|>"):
        assert read(text)["input_ids"] == given(text)["input_ids"]
    assert load_tokenizer(kept).end_token == "<|im_end|>"


def test_all_chat_templates_are_kept_in_flat_folders(hf_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    given = AutoTokenizer.from_pretrained(hf_folder)
    given.chat_template = {"default": CHAT_TEMPLATE, "tool_use": "{{ tools[0] }}" + CHAT_TEMPLATE}
    given.save_pretrained(tmp_path / "many")
    assert (tmp_path / "many/additional_chat_templates/tool_use.jinja").is_file()
    (tmp_path / "kept").mkdir()
    copy_tokenizer(tmp_path / "many" / TOKENIZER_FILE, tmp_path / "kept")
    write_hf_tokenizer(tmp_path / "kept" / TOKENIZER_FILE, tmp_path / "export", max_length=64)
    for name in ("kept", "export"):
        assert AutoTokenizer.from_pretrained(tmp_path / name).chat_template == given.chat_template
        assert all(path.is_file() for path in (tmp_path / name).iterdir())
        assert load_tokenizer(tmp_path / name).end_token == "<|im_end|>"
    template = ChatTemplate(tmp_path / "kept" / TOKENIZER_FILE)
    assert (template.source(), template.source([{}])) == tuple(given.chat_template.values())


def test_a_version_of_transformers_that_gives_other_ids_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = train(tmp_path, "bpe")
    monkeypatch.setattr("pipekit.data.tokenizer_conversion.version", lambda name: "5.23.1")
    with pytest.raises(DataError, match=r"needs transformers 5\.24 or newer, and 5\.23\.1 is installed"):
        load_tokenizer(path)
    stated = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert f'"transformers>={".".join(map(str, SENTENCEPIECE_TRANSFORMERS))}"' in stated


def test_a_folder_without_tokenizer_json_is_that_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "gpt2"
    folder.mkdir()
    stored = json.loads(train_tokenizer(LINES, vocab_size=400).backend.to_str())["model"]
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in stored["merges"]]
    (folder / "vocab.json").write_text(json.dumps(stored["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (folder / "generation_config.json").write_text('{"top_k": 3}')
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in TEXTS[:50]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert (find_tokenizer_file(folder).parent / "generation_config.json").read_text() == '{"top_k": 3}'


def test_a_name_on_the_hub_is_its_folder_in_the_cache(hf_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def snapshot_download(repository: str, **options: Any) -> str:
        calls.append((repository, options["revision"]))
        return str(hf_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_tokenizer_file("hf://owner/name?revision=v1") == hf_folder / TOKENIZER_FILE
    assert calls == [("owner/name", "v1")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.model", b"no model", r"data\.tokenizer='.*a\.model': not a SentencePiece model \(.+\); give one"),
        ("a.model", b"", r"not a SentencePiece model: it has no pieces"),
        (
            "tokenizer_config.json",
            b'{"auto_map": {"AutoTokenizer": ["own.Own", null]}, "tokenizer_class": "Own"}',
            r"transformers reads no tokenizer there \(.*custom code",
        ),
        ("vocab.json", b"{", r"no tokenizer\.json in .*, and transformers reads no tokenizer there \(.+\); give"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(path if path.suffix == ".model" else path.parent)
    assert not (tmp_path / "home").exists()


def test_a_name_that_is_in_no_cache_is_refused_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"data\.tokenizer='hf://owner/none': cannot be read from the Hugging Face hub"):
        find_tokenizer_file("hf://owner/none")
