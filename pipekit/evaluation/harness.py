"""Tasks of lm-eval, the lm-evaluation-harness of EleutherAI: multiple choice, likelihood and generation.

Every task is built, asked and judged by lm-eval; the model answers through `HarnessModel`. This module needs the extra
`eval`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pipekit.data.randomness import OwnRandomness
from pipekit.errors import ConfigError, PipekitError
from pipekit.evaluation.models import AskedModel
from pipekit.evaluation.scoring import Span, score_spans
from pipekit.evaluation.tasks import TaskResults, TaskSettings
from pipekit.settings.base import alternatives
from pipekit.settings.suggest import closest

# What lm-eval takes where a task says nothing.
_MAX_NEW_TOKENS = 256
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Seeds of lm_eval, with which tasks choose their examples: of numpy and torch, and of `random`.
_SEED, _RANDOM_SEED = 1234, 0
_SAMPLING_NAMES = ("do_sample", "temperature", "top_k", "top_p")

TaskProgress = Callable[[str, float], None]
"""Called with what is being done, and the fraction of it that is done."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model of pipekit's as lm-eval asks it.

    Text becomes tokens as in `lm_eval --model hf` on the export of the model.

    Args:
        model: answers.
        tokenizer: the one that `transformers` loads from an export.
        batch_size: rows of a forward.
        on_progress: called as it goes.

    Attributes:
        num_truncated: requests whose context did not fit.
    """

    def __init__(
        self, model: AskedModel, tokenizer: Any, *, batch_size: int, on_progress: TaskProgress | None = None
    ) -> None:
        super().__init__()
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self._model = model
        self._report = on_progress or (lambda message, fraction: None)
        self.num_truncated = 0

    @property
    def max_length(self) -> int:
        """Most tokens that the model sees at once."""
        return self._model.longest_sequence

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a document."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before a text without a context: that which begins a document, or else ends one."""
        begins = self.tokenizer.bos_token_id
        return self.eot_token_id if begins is None else int(begins)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, by which lm-eval tells caches of requests apart."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds unless it begins with one already."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Text of the messages of a chat, by the template of the tokenizer."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text in nats, each token once, in windows of the model's length."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            found = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(window)) for window in found]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any) -> Any:
        """Log-likelihood of each continuation after its context, and whether it is what greedy decoding says."""
        spans = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise PipekitError(
                    f"a continuation of {len(continuation)} tokens is longer than the {self.max_length} that the model "
                    "sees at once; leave this task out"
                )
            tokens = (*context, *continuation)[-self.max_length - 1 :]
            self.num_truncated += len(tokens) < len(context) + len(continuation)
            spans.append(Span(tokens, len(continuation)))
        scores = score_spans(
            spans,
            self._model.score,
            batch_size=self.batch_size,
            on_progress=lambda done: self._report("scoring answers", done / len(spans)),
        )
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text that follows each context, up to the first of the strings that end it."""
        answers: dict[int, str] = {}
        by_options: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_options.setdefault(repr(request.args[1]), []).append(index)
        for indices in by_options.values():
            options = _read_options(requests[indices[0]].args[1], end=self.tokenizer.decode(self.eot_token_id))
            room = self.max_length - options.max_new_tokens
            if room < 1:
                raise ConfigError(
                    f"task {requests[indices[0]].task_name}: max_gen_toks={options.max_new_tokens} must be less than "
                    f"the {self.max_length} tokens that the model sees at once; set max_gen_toks in the task's "
                    "generation_kwargs"
                )
            prompts = {index: self.tok_encode(requests[index].args[0]) for index in indices}
            self.num_truncated += sum(len(prompt) > room for prompt in prompts.values())
            ordered = sorted(indices, key=lambda index: len(prompts[index]), reverse=True)
            for begin in range(0, len(ordered), self.batch_size):
                batch = ordered[begin : begin + self.batch_size]
                generated = self._model.generate(
                    [prompts[index][-room:] for index in batch],
                    max_new_tokens=options.max_new_tokens,
                    temperature=options.temperature,
                    top_k=options.top_k,
                    top_p=options.top_p,
                    stop=options.ends,
                    seed=begin,
                )
                for index, tokens in zip(batch, generated, strict=True):
                    answers[index] = self._cut(tokens, options.ends)
                self._report("generating answers", len(answers) / len(requests))
        return [answers[index] for index in range(len(requests))]

    def _cut(self, tokens: Sequence[int], ends: Sequence[str]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        for end in ends:
            text = text.split(end)[0]
        return text


@dataclass(frozen=True)
class _Generation:
    """Settings with which a task has text generated."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    ends: tuple[str, ...]


def _read_options(given: Mapping[str, Any], *, end: str) -> _Generation:
    """Read a task's `generation_kwargs`; `end` ends a text, too."""
    known = {"until", *_LENGTH_NAMES, *_SAMPLING_NAMES}
    if unknown := [name for name in given if name not in known]:
        raise ConfigError(
            f"generation_kwargs.{unknown[0]}={given[unknown[0]]!r} of a task is not known here; known are "
            f"{alternatives(sorted(known), last='and')}"
        )
    until = given.get("until") or ()
    ends = (until,) if isinstance(until, str) else until
    lengths = [int(given[name]) for name in _LENGTH_NAMES if given.get(name) is not None]
    temperature = float(given.get("temperature") or 0.0)
    return _Generation(
        max_new_tokens=lengths[0] if lengths else _MAX_NEW_TOKENS,
        temperature=temperature if given.get("do_sample", temperature > 0) else 0.0,
        top_k=given.get("top_k"),
        top_p=given.get("top_p"),
        ends=tuple(word for word in (*ends, end) if word),
    )


def find_tasks(settings: TaskSettings) -> tuple[TaskManager, list[str]]:
    """Find tasks in the folder that is given, and where it lacks one, in lm-eval; return their manager and names.

    Raises:
        ConfigError: if there is none of a name.
    """
    folder = settings.include_path
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--include-path {folder}: no such folder; give the one that holds the YAML files of tasks")
    # To go through the thousands of lm-eval's own takes seconds.
    manager = TaskManager(include_path=folder and str(folder), include_defaults=folder is None)
    if folder is not None and any(not _match(name, manager) for name in settings.tasks):
        manager = TaskManager(include_path=str(folder))
    names = []
    for name in settings.tasks:
        found = _match(name, manager)
        if not found:
            similar = closest(name, manager.all_tasks)
            hint = f"did you mean {similar}?" if similar else "lm_eval ls tasks lists those that there are"
            raise ConfigError(f"--tasks {name}: there is no such task; {hint}")
        names += found
    return manager, list(dict.fromkeys(names))


def _match(name: str, manager: TaskManager) -> list[str]:
    if name.endswith((".yaml", ".yml")):
        return [name] if Path(name).is_file() else []
    return list(manager.match_tasks([name]))


def run_tasks(
    model: AskedModel, tokenizer: Any, settings: TaskSettings, *, on_progress: TaskProgress | None = None
) -> TaskResults:
    """Run tasks of lm-eval on a model.

    Args:
        model: answers.
        tokenizer: see `HarnessModel`.
        settings: the tasks.
        on_progress: called as it goes.

    Raises:
        PipekitError: if there is no such task, or lm-eval cannot load or judge one.
    """
    if settings.apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise ConfigError("--apply-chat-template: the tokenizer has no chat template; leave it out")
    manager, names = find_tasks(settings)
    asked = HarnessModel(model, tokenizer, batch_size=settings.batch_size, on_progress=on_progress)
    # It tells of every setting that is as it was asked for.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        with OwnRandomness(seed=_SEED):
            random.seed(_RANDOM_SEED)
            loaded = manager.load(names)
            for task in loaded["tasks"].values():
                own = task.get_config("num_fewshot")
                if own is None or (own != 0 and settings.num_fewshot is not None):
                    task.set_config(key="num_fewshot", value=settings.num_fewshot or 0)
                task.set_fewshot_seed(seed=_SEED)
            found = evaluate(
                asked,
                loaded,
                limit=settings.limit,
                apply_chat_template=settings.apply_chat_template,
                fewshot_as_multiturn=settings.apply_chat_template,
                log_samples=settings.keeps_samples,
                bootstrap_iters=1000,
            )
    except PipekitError:
        raise
    except Exception as error:  # tasks are code and data of anyone's
        raise PipekitError(
            f"--tasks {','.join(settings.tasks)}: lm-eval stopped with {type(error).__name__}: {error}"
        ) from error
    assert found is not None
    results = {name: dict(_metrics(values)) for name, values in {**found["results"], **found.get("groups", {})}.items()}
    counts = {name: int(sizes["effective"]) for name, sizes in found["n-samples"].items()}
    return TaskResults(results, counts, asked.num_truncated, found.get("samples", {}))


def _metrics(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a task: those that are filtered bear the filter's name."""
    for name, value in values.items():
        metric, _, answer_filter = name.partition(",")
        if answer_filter and isinstance(value, (int, float)):
            yield metric if answer_filter == "none" else f"{metric}_{answer_filter}", float(value)
