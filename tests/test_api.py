"""The functions of `pipekit.api`, and the code of docs/python.md."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import pipekit
from fork_server import StartedCommand, run_script
from pipekit.config.sources import read_config, read_run_config, write_overrides
from pipekit.config.trial_config import TrialConfig
from pipekit.errors import ConfigError
from pipekit.settings.script_file import name_class, read_script
from train_runs import metrics, ranks_of, wait_for, write_workspace

ROOT = Path(__file__).resolve().parents[1]
VALUES = {"model": {"preset": "tiny"}, "train": {"steps": 3}}


def page_scripts() -> list[str]:
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


class SomeTrial(pipekit.LayersTrial):
    pass


class SomeLoop(pipekit.Trial):
    pass


class TestSources:
    def test_all_forms_tell_the_same(self, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text(json.dumps({**VALUES, "run": {"dir": "runs/a"}}))
        changes = {"train.steps": 20, "optimizer.lr": 1e-5, "run.dir": Path("runs/a"), "train.freeze": ("embed.*",)}
        texts = ["train.steps=20", "optimizer.lr=1e-5", "run.dir=runs/a", "train.freeze=[embed.*]"]
        for source in (tmp_path / "c.yaml", str(tmp_path / "c.yaml"), VALUES, pipekit.parse_config(VALUES)):
            config = read_config(source, changes)
            assert config == read_config(source, texts)
            assert (config.train.steps, config.optimizer.lr, config.run.dir) == (20, 1e-5, "runs/a")

    def test_numbers_of_numpy_are_numbers(self) -> None:
        assert read_config(VALUES, {"train.steps": np.int64(7), "optimizer.lr": np.float32(0.5)}).train.steps == 7

    @pytest.mark.parametrize("changes", ["train.steps=20", {"train.steps": object()}], ids=["a text", "an object"])
    def test_other_changes_are_refused(self, changes: object) -> None:
        with pytest.raises(ConfigError, match=r"^overrides"):
            write_overrides(changes)  # type: ignore[arg-type]

    def test_a_trial_of_ones_own_has_its_own_configuration(self) -> None:
        config = read_run_config({"fit": {"max_length": {"batches": 3}}}, ["trial=a:B"])
        assert isinstance(config, TrialConfig)
        assert config.trial == "a:B"

    def test_a_mistake_is_the_message_of_the_command(self) -> None:
        with pytest.raises(ConfigError, match=r"train\.setps=3: unknown key; did you mean 'train\.steps'"):
            pipekit.train(VALUES, {"train.setps": 3})
        with pytest.raises(ConfigError, match="trial=3: must be a subclass"):
            pipekit.train(VALUES, trial=3)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"must be a subclass of pipekit\.LayersTrial, the"):
            pipekit.plan(VALUES, trial=SomeLoop)  # type: ignore[arg-type]


class TestScripts:
    def test_a_script_is_read_up_to_its_run_and_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        script = tmp_path / "my script.py"
        (tmp_path / "beside_it.py").write_text("VALUE = 3\n")
        script.write_text(
            "import pipekit\nfrom beside_it import VALUE\nclass A: pass\ntry:\n    pipekit.train('no.yaml')\n"
            "except Exception: pass\nclass B: pass\n"
        )
        monkeypatch.setattr(sys, "path", [*sys.path])
        module = read_script(script, key="run.trial")
        monkeypatch.delitem(sys.modules, "beside_it")
        monkeypatch.delitem(sys.modules, module.__name__, raising=False)
        assert module.A.__name__ == "A"
        assert not hasattr(module, "B")
        with pytest.raises(ConfigError, match=r"run\.trial: there is no script .*gone\.py"):
            read_script(tmp_path / "gone.py", key="run.trial")

    def test_the_script_that_runs_is_not_run_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        script = tmp_path / "s.py"
        script.write_text("raise AssertionError\n")
        main = ModuleType("__main__")
        main.__file__ = str(script)
        monkeypatch.setitem(sys.modules, "__main__", main)
        assert read_script(script, key="run.trial") is main
        monkeypatch.setattr(SomeTrial, "__module__", "__main__")
        assert name_class(SomeTrial, argument="trial") == f"{script}:SomeTrial"

    def test_what_no_process_can_import_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Local(pipekit.LayersTrial):
            pass

        with pytest.raises(ConfigError, match=r"Local is defined inside a function, .*; define it at the top"):
            pipekit.train(VALUES, trial=Local)
        monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
        monkeypatch.setattr(SomeTrial, "__module__", "__main__")
        with pytest.raises(ConfigError, match=r"in a notebook with %%writefile my_trial\.py"):
            pipekit.train(VALUES, trial=SomeTrial)


def test_packages_of_the_same_name_are_called_and_imported() -> None:
    import pipekit.plan.plan

    assert inspect.ismodule(pipekit.plan)
    report = pipekit.plan(VALUES, {"data.vocab_size": 300, "model.vocab_size": 300, "parallel.pp": 2}, device="h100")
    assert report == pipekit.plan(pipekit.parse_config(VALUES), ["parallel.pp=2", "model.vocab_size=300",
                                                                "data.vocab_size=300"], device="h100")  # fmt: skip
    with pytest.raises(ConfigError, match="unknown key"):
        pipekit.verify(VALUES, {"train.setps": 3})


def test_a_result_is_what_the_records_say(tmp_path: Path) -> None:
    lines = [{"step": 0, "val_loss": 3.5}, {"step": 1, "loss": 4, "note": "x"}, {"step": 2, "loss": None, "lr": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    result = pipekit.TrainResult.read(tmp_path)
    assert (result.step, result.checkpoint, result.run_dir) == (2, None, tmp_path)
    np.testing.assert_array_equal(result.losses.steps, [1, 2])
    np.testing.assert_array_equal(result.losses.values, [4.0, np.nan])
    np.testing.assert_array_equal(result.validation_losses.values, [3.5])
    assert set(result.metrics) == {"loss", "lr", "val_loss"}
    assert len(pipekit.TrainResult.read(tmp_path / "none").losses) == 0


@pytest.mark.distributed
def test_a_trial_of_a_script_without_a_guard_trains(tmp_path: Path) -> None:
    workspace = write_workspace(tmp_path)
    scripts = workspace / "scripts"
    scripts.mkdir()
    _, trial = page_scripts()
    (scripts / "half.py").write_text(trial.replace('if __name__ == "__main__":', "if True:"))
    done = run_script(scripts / "half.py", cwd=workspace, fork_ranks=True)
    assert done.returncode == 0, done.stderr
    records = metrics(workspace, "runs/half")
    rates = [record["lr"] for record in records if "lr" in record]
    assert rates[0] == pytest.approx(pipekit.parse_config(VALUES).optimizer.lr / 2)
    assert done.stdout.splitlines()[-1] in str(np.array(rates))
    assert ranks_of("runs/half") == []


@pytest.mark.slow
@pytest.mark.distributed
def test_the_sweep_of_the_docs_exports_the_best(tmp_path: Path) -> None:
    workspace = write_workspace(tmp_path)
    sweep, _ = page_scripts()
    (workspace / "sweep.py").write_text(
        sweep + "    import torch\n    print(model(torch.zeros(1, 5, dtype=torch.int64)).shape)\n"
    )
    done = run_script(workspace / "sweep.py", cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 5, " in done.stdout
    assert len([*workspace.glob("runs/lr-*")]) == 3
    assert len([*workspace.glob("runs/lr-*/export/config.json")]) == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_an_interrupt_leaves_no_process(tmp_path: Path) -> None:
    workspace = write_workspace(tmp_path)
    (workspace / "stop.py").write_text(
        "import pipekit\ntry:\n    pipekit.train('c.yaml', {'train.steps': 100000, 'run.dir': 'runs/stop'})\n"
        "except pipekit.PipekitError as error:\n    print(type(error).__name__, error.exit_code)\n"
    )
    output = tmp_path / "output"
    output.mkdir()
    script = StartedCommand([str(workspace / "stop.py")], cwd=workspace, output=output)
    wait_for(lambda: (workspace / "runs/stop/metrics.jsonl").is_file() and '"loss"' in (
        workspace / "runs/stop/metrics.jsonl").read_text(), "a step")  # fmt: skip
    os.kill(script.pid, signal.SIGINT)
    done = script.wait(120)
    assert done.stdout.splitlines()[-1] == "StoppedError 75", done.stderr
    assert ranks_of("runs/stop") == []
