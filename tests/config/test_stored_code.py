"""Code in stored configurations is refused unless the user says that it is trusted."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipekit.config.stored_code import check_stored_code
from pipekit.errors import ConfigError


def write(folder: Path, text: str, *beside: str, name: str = "config.yaml") -> Path:
    for other in beside:
        (folder / other).touch()
    (folder / name).write_text(text + "\ntrain: {steps: 3}\n")
    return folder / name


@pytest.mark.parametrize("beside", ["manifest.json", "plan.json", "metrics.jsonl", "checkpoints"])
@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: own:build", "model=own:build"),
        ("model: {builder: own:build}", "model.builder=own:build"),
        ("model: {preset: tiny, hf_names: own:names}", "model.hf_names=own:names"),
        ("model: {preset: tiny, hf_config: own:content}", "model.hf_config=own:content"),
        ("model: {preset: tiny}\nrun: {trial: own:Trial}", "run.trial=own:Trial"),
        ("trial: own:Trial", "trial=own:Trial"),
    ],
)
def test_code_that_came_with_a_folder_is_refused(tmp_path: Path, beside: str, text: str, named: str) -> None:
    path = write(tmp_path, text, beside)
    with pytest.raises(ConfigError, match=rf"config\.yaml:\d: {named} is code .*; add --trust-code"):
        check_stored_code(path, trust_code=False)
    check_stored_code(path, trust_code=True)


def test_a_file_of_the_users_own_is_trusted(tmp_path: Path) -> None:
    check_stored_code(write(tmp_path, "model: own:build"), trust_code=False)
    check_stored_code(write(tmp_path, "model: own:build", "plan.json", name="mine.yaml"), trust_code=False)


def test_code_that_the_command_line_names_is_trusted(tmp_path: Path) -> None:
    path = write(tmp_path, "model: own:build", "plan.json")
    check_stored_code(path, ["model=other:build"], trust_code=False)
    with pytest.raises(ConfigError, match="own:build"):
        check_stored_code(path, ["train.steps=5"], trust_code=False)


def test_a_stored_configuration_without_code_needs_no_trust(tmp_path: Path) -> None:
    check_stored_code(write(tmp_path, "model: {preset: tiny}", "plan.json"), trust_code=False)
