"""Tasks give what `lm_eval --model hf` gives on the export, item by item."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import lm_eval.tasks
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hand_made import small_tokenizer
from pipekit.errors import ConfigError, PipekitError
from pipekit.evaluation.evaluate import evaluate_tasks
from pipekit.evaluation.harness import HarnessModel, find_tasks
from pipekit.evaluation.models import GeneratorModel
from pipekit.evaluation.tasks import TaskResults, TaskSettings
from pipekit.inference.generator import Generator

QUESTIONS = [
    {"question": "def function", "choices": ["(argument)", " return", ":\n"], "answer": 0},
    {"question": "return argument ", "choices": ["+ 1", "- function argument", "a"], "answer": 1},
    {"question": "", "choices": ["def", "return"], "answer": 0},
    {"question": "argument + 1\n" * 9, "choices": ["a", "r", "d"], "answer": 2},
    {"question": "function(", "choices": ["x", "y", "z", " "], "answer": 3},
]
COMMON: Mapping[str, Any] = {"dataset_path": "json", "test_split": "test"}
TASKS: Mapping[str, Mapping[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}{{choices[0]}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}{{choices[0]}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def include_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of one's own, on the disk."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    files = {"data_files": {"test": str(folder / "questions.jsonl")}, "cache_dir": str(folder / "cache")}
    for name, task in TASKS.items():
        text = yaml.safe_dump({"task": name, **COMMON, "dataset_kwargs": files, **task})
        (folder / f"{name}.yaml").write_text(text)
    return folder


def ours(source: Path, *tasks: str, include_path: Path, **settings: Any) -> TaskResults:
    generator = Generator.open(source, device="cpu")
    return evaluate_tasks(
        GeneratorModel(generator),
        TaskSettings(tasks, include_path, **{"batch_size": 3, "keeps_samples": True, **settings}),
        tokenizer_file=generator.stored.path / "tokenizer.json",
        on_progress=lambda message, fraction: None,
    )


def theirs(export: Path, *tasks: str, include_path: Path, **settings: Any) -> dict[str, Any]:
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(export), device="cpu", batch_size=1, dtype="float32")
    manager = TaskManager(include_path=str(include_path), include_defaults=False)
    # It would ask pip and others what there is on the machine, which takes seconds.
    with mock.patch.object(evaluator, "add_env_info"):
        found = evaluator.simple_evaluate(
            model, tasks=list(tasks), task_manager=manager, bootstrap_iters=1000, **settings
        )
    assert found is not None
    return dict(found)


@pytest.mark.parametrize("until", ["stop", ["stop", "<end>"], None])
def test_what_ends_a_text_is_what_lm_eval_takes(until: str | list[str] | None) -> None:
    from lm_eval.models.utils import handle_stop_sequences

    from pipekit.evaluation.harness import _read_options

    expected = handle_stop_sequences(list(until) if isinstance(until, list) else until, eos="<end>")
    assert list(dict.fromkeys(_read_options({"until": until}, end="<end>").ends)) == expected


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from flat(each)
    else:
        yield value


def check_same(found: TaskResults, expected: Mapping[str, Any], task: str) -> None:
    samples: Sequence[Mapping[str, Any]] = expected["samples"][task]
    assert len(found.samples[task]) == len(samples) == len(QUESTIONS)
    for mine, other in zip(found.samples[task], samples, strict=True):
        assert mine["doc_id"] == other["doc_id"]
        assert mine["arguments"] == other["arguments"]
        for one, another in zip(flat(mine["resps"]), flat(other["resps"]), strict=True):
            assert one == (pytest.approx(another, abs=1e-4) if isinstance(another, float) else another)
        for metric in other["metrics"]:
            assert list(flat(mine[metric])) == pytest.approx(list(flat(other[metric])), abs=1e-4)
    values = {name.removesuffix(",none"): value for name, value in expected["results"][task].items()}
    for name, value in found.metrics[task].items():
        assert value == pytest.approx(values[name], rel=1e-4), name


@pytest.mark.parametrize("num_fewshot", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_a_choice_is_scored_as_by_lm_eval_on_the_export(
    run: Path, export: Path, include_path: Path, num_fewshot: int | None
) -> None:
    expected = theirs(export, "choose", include_path=include_path, num_fewshot=num_fewshot)
    for source in (run, export):
        found = ours(source, "choose", include_path=include_path, num_fewshot=num_fewshot)
        check_same(found, expected, "choose")
        assert found.num_questions == {"choose": 5}
        assert found.numbers().keys() == {"choose_acc", "choose_acc_norm"}
    assert found.num_truncated == 3 if num_fewshot is None else found.num_truncated > 3


@pytest.mark.slow
def test_whole_texts_are_scored_in_windows_as_by_lm_eval(export: Path, include_path: Path) -> None:
    expected = theirs(export, "read", include_path=include_path)
    check_same(ours(export, "read", include_path=include_path), expected, "read")


@pytest.mark.slow
def test_texts_are_generated_up_to_stop_strings_as_by_lm_eval(run: Path, export: Path, include_path: Path) -> None:
    expected = theirs(export, "write", include_path=include_path)
    found = ours(run, "write", include_path=include_path)
    check_same(found, expected, "write")
    answers = [sample["resps"][0][0] for sample in found.samples["write"]]
    assert len(set(answers)) > 1
    assert not any("e" in answer for answer in answers)


@pytest.mark.slow
def test_a_tokenizer_that_begins_every_text_does_so_here(
    run: Path, export: Path, include_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(export, tmp_path / "export")
    path = tmp_path / "export/tokenizer.json"
    stored = json.loads(path.read_text())
    first = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    stored["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    path.write_text(json.dumps(stored))
    assert AutoTokenizer.from_pretrained(tmp_path / "export").encode("def")[0] == 0
    expected = theirs(tmp_path / "export", "choose", include_path=include_path)
    check_same(ours(tmp_path / "export", "choose", include_path=include_path), expected, "choose")


# What the model is asked


class Scripted:
    """A model that says the same tokens after every prompt, and notes what it is asked."""

    longest_sequence = 12

    def __init__(self, says: list[int]) -> None:
        self.says = says
        self.asked: list[tuple[Any, ...]] = []

    def score(self, inputs: Tensor, lengths: Sequence[int], targets: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones(targets.shape), torch.ones(targets.shape, dtype=torch.bool)

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        self.asked.append((prompts, options))
        return [self.says for _ in prompts]


@pytest.fixture
def scripted() -> tuple[HarnessModel, Scripted]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer(), eos_token="<|endoftext|>")
    model = Scripted(tokenizer.encode("return argument + 1"))
    return HarnessModel(model, tokenizer, batch_size=2), model


def request(*arguments: Any) -> Instance:
    return Instance("generate_until", {}, arguments, 0, metadata=("task", 0, 1))


def test_prompts_keep_their_ends_and_answers_end_before_the_first_stop_string(
    scripted: tuple[HarnessModel, Scripted],
) -> None:
    harness, model = scripted
    some = {"until": ["+", "u"], "max_gen_toks": 4}
    other = {"until": "m", "max_gen_toks": 3, "temperature": 0.5}
    requests = [request("x" * 20, some), request("abc", some), request("a", {**other, "do_sample": False})]
    assert harness.generate_until([*requests, request("b", other)]) == ["ret", "ret", "return argu", "return argu"]
    assert harness.num_truncated == 1
    encode = harness.tokenizer.encode
    assert [prompts for prompts, _ in model.asked] == [
        [encode("x" * 20)[-8:], encode("abc")],
        [encode("a")],
        [encode("b")],
    ]
    found = [[options[name] for name in ("max_new_tokens", "temperature", "stop")] for _, options in model.asked]
    assert found == [
        [4, 0.0, ("+", "u", "<|endoftext|>")],
        [3, 0.0, ("m", "<|endoftext|>")],
        [3, 0.5, ("m", "<|endoftext|>")],
    ]


def test_a_whole_text_is_scored_with_each_token_once(scripted: tuple[HarnessModel, Scripted]) -> None:
    harness, _ = scripted
    texts = ["abcdefghijklmnopq" * 2, "x"]
    counts = [len(harness.tokenizer.encode(text)) for text in texts]
    assert counts[0] > 2 * harness.max_length
    assert harness.loglikelihood_rolling([request(text) for text in texts]) == [-count for count in counts]


def test_what_begins_a_text_is_the_token_that_does_or_else_the_one_that_ends_it(
    scripted: tuple[HarnessModel, Scripted],
) -> None:
    harness, _ = scripted
    assert harness.prefix_token_id == harness.eot_token_id == 0
    harness.tokenizer.bos_token = "x"
    assert harness.prefix_token_id == harness.tokenizer.encode("x")[0] != 0


# What goes wrong


def test_tasks_are_of_the_folder_and_of_lm_eval_and_others_are_told_of_with_what_is_near(
    include_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # To read the thousands of tasks of lm-eval takes long; these are some of them.
    manager = sys.modules[TaskManager.__module__]
    monkeypatch.setattr(manager, "__file__", str(Path(lm_eval.tasks.__file__).parent / "arc/manager.py"))
    assert find_tasks(TaskSettings(("w*", "choose"), include_path))[1] == ["write", "choose"]
    assert find_tasks(TaskSettings(("choose", "arc_e*"), include_path))[1] == ["choose", "arc_easy"]
    assert find_tasks(TaskSettings(("arc_easy",)))[1] == ["arc_easy"]
    with pytest.raises(ConfigError, match=r"--tasks chose: there is no such task; did you mean choose\?"):
        find_tasks(TaskSettings(("chose",), include_path))
    with pytest.raises(ConfigError, match=r"--include-path .*nowhere: no such folder"):
        find_tasks(TaskSettings(("choose",), include_path / "nowhere"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generation_kwargs": {"max_gen_toks": 24}}, r"max_gen_toks=24 must be less than the 24 tokens"),
        ({"generation_kwargs": {"num_beams": 2}}, r"generation_kwargs\.num_beams=2 .* is not known here"),
        (
            {"doc_to_text": "{{missing.field}}"},
            r"--tasks odd: lm-eval stopped with UndefinedError: 'missing' is undefined",
        ),
        ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, r"lm-eval stopped with FileNotFoundError"),
    ],
)
def test_a_task_that_cannot_be_run_is_one_error(
    run: Path, include_path: Path, tmp_path: Path, change: Mapping[str, Any], message: str
) -> None:
    task = {**yaml.safe_load((include_path / "write.yaml").read_text()), "task": "odd", **change}
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(task))
    with pytest.raises(PipekitError, match=message):
        ours(run, "odd", include_path=tmp_path)


def test_a_chat_needs_a_template(run: Path, include_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--apply-chat-template: the tokenizer has no chat template"):
        ours(run, "choose", include_path=include_path, apply_chat_template=True)
