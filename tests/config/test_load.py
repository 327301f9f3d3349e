"""Every wrong input is refused with its place, its value, the rule, and what to type instead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipekit.config import Config, load_config, parse_config
from pipekit.config.schema import RunConfig
from pipekit.errors import ConfigError
from pipekit.models.gpt2 import GPT2Config

MODEL = "model: {preset: tiny}\n"
TRAIN = "train: {steps: 300}\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that writes `c.yaml` into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str, name: str = "c.yaml") -> str:
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write_file


def refusal(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_a_small_file_gives_a_whole_configuration(write):
    config = load_config(write(MODEL + TRAIN))
    assert config.train.steps == 300
    assert isinstance(config.model, GPT2Config)
    assert (config.model.hidden_size, config.model.ffn_size) == (128, 512)
    assert config.run.dir == "runs/c"


def test_run_dir_is_kept_where_it_is_given(write):
    path = write(MODEL + TRAIN + "run: {dir: elsewhere}\n")
    assert load_config(path).run.dir == "elsewhere"
    assert load_config(path, ["run.dir=there"]).run.dir == "there"
    assert load_config(path, ["run.dir=null"]).run.dir == "runs/c"


def test_sections_without_keys_mean_their_defaults(write):
    assert load_config(write(MODEL + TRAIN + "optimizer:\nrun:\n")) == load_config(write(MODEL + TRAIN))


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("1E-3", 1e-3), (".5e-3", 5e-4), ("1", 1.0), ("1_0.5", 10.5), ("2.", 2.0)],
)
def test_numbers_are_read_as_people_write_them(write, text: str, value: float):
    assert load_config(write(MODEL + TRAIN + f"optimizer: {{lr: {text}}}\n")).optimizer.lr == value
    assert load_config(write(MODEL + TRAIN), [f"optimizer.lr={text}"]).optimizer.lr == value


REFUSED = {
    "misspelt key": (
        MODEL + "train:\n  setps: 300\n  steps: 5\n",
        "c.yaml:3: train.setps: unknown key; did you mean 'train.steps'?",
    ),
    "not a number": (
        MODEL + "train:\n  steps: ten\n",
        "c.yaml:3: train.steps=ten: must be a whole number greater than 0; for example steps: 300",
    ),
    "quoted number": (
        MODEL + "train: {steps: '30'}\n",
        "c.yaml:2: train.steps=30: must be a whole number greater than 0; write it without quotes: steps: 30",
    ),
    "float for an int": (
        MODEL + "train: {steps: 30.0}\n",
        "c.yaml:2: train.steps=30.0: must be a whole number greater than 0; write it as steps: 30",
    ),
    "bool for an int": (
        MODEL + "train: {steps: true}\n",
        "c.yaml:2: train.steps=true: must be a whole number greater than 0; for example steps: 300",
    ),
    "bool for a stage": (
        MODEL + TRAIN + "parallel: {zero: true}\n",
        "c.yaml:3: parallel.zero=true: must be a whole number at least 0 and at most 3; for example zero: 1",
    ),
    "word for a bool": (
        MODEL + TRAIN + "data: {shuffle: no}\n",
        "c.yaml:3: data.shuffle=no: must be true or false; did you mean false?",
    ),
    "number for text": (
        MODEL + TRAIN + "run: {dir: 7}\n",
        'c.yaml:3: run.dir=7: must be text that is not empty; write it in quotes: dir: "7"',
    ),
    "out of range": (
        MODEL + TRAIN + "data: {validation_fraction: 1}\n",
        "c.yaml:3: data.validation_fraction=1: must be a number at least 0 and less than 1; "
        "for example validation_fraction: 0.05",
    ),
    "infinite": (
        MODEL + TRAIN + "optimizer: {lr: .inf}\n",
        "c.yaml:3: optimizer.lr=inf: must be a number greater than 0; for example lr: 0.0003",
    ),
    "not a choice": (
        MODEL + "train: {steps: 3, precision: bf17}\n",
        "c.yaml:2: train.precision=bf17: must be auto, fp32, bf16 or fp16; did you mean bf16?",
    ),
    "number or word": (
        MODEL + TRAIN + "parallel: {dp: many}\n",
        "c.yaml:3: parallel.dp=many: must be a whole number greater than 0, or auto; for example dp: 2",
    ),
    "too short a list": (
        MODEL + TRAIN + "optimizer: {betas: [0.9]}\n",
        "c.yaml:3: optimizer.betas=[0.9]: must be a list of 2, each a number at least 0 and less than 1, or null; "
        "for example betas: [0.9, 0.95]",
    ),
    "wrong item in a list": (
        MODEL + TRAIN + "data: {source: [a.txt, 3]}\n",
        "c.yaml:3: data.source=[a.txt, 3]: must be text, or a list that is not empty with every entry text; "
        "for example source: data/my-text.txt",
    ),
    "nested unknown key": (
        MODEL + TRAIN + "logging:\n  wandb:\n    projct: x\n",
        "c.yaml:5: logging.wandb.projct: unknown key; did you mean 'logging.wandb.project'?",
    ),
    "wandb neither switch nor mapping": (
        MODEL + TRAIN + "logging: {wandb: 3}\n",
        "c.yaml:3: logging.wandb=3: must be true, false, or a mapping of project, entity, name, mode",
    ),
    "key of another section": (
        MODEL + "train:\n  steps: 3\n  lr: 1e-3\n",
        "c.yaml:4: train.lr: unknown key; it belongs in optimizer.lr",
    ),
    "another program's key": (
        MODEL + TRAIN + "optimizer: {learning_rate: 1e-3}\n",
        "c.yaml:3: optimizer.learning_rate: unknown key; here it is optimizer.lr",
    ),
    "key nobody knows": (
        MODEL + TRAIN + "scheduler: {zzz: 3}\n",
        "c.yaml:3: scheduler.zzz: unknown key; scheduler has type, warmup_steps, warmup_tokens, min_lr_ratio, "
        "decay_steps, decay_tokens, args",
    ),
    "unknown section": (
        MODEL + TRAIN + "paralel: {pp: 2}\n",
        "c.yaml:3: paralel: unknown section; did you mean 'parallel'?",
    ),
    "key outside a section": (
        MODEL + TRAIN + "lr: 3\n",
        "c.yaml:3: lr: unknown section; it belongs in optimizer.lr",
    ),
    "section is not a mapping": (
        MODEL + "train: 5\n",
        "c.yaml:2: train=5: must be a mapping of keys; for example train: {steps: 300}",
    ),
    "required key missing": (
        MODEL + "train:\n  seed: 3\n",
        "c.yaml:2: train.steps: missing, and it has no default; for example steps: 300, or in its place tokens or "
        "epochs",
    ),
    "required section missing": (
        TRAIN,
        "c.yaml: model: missing; for example model: {preset: tiny}, or model: my_package.my_model:build_layers",
    ),
    "sizes missing": (
        "model: {hidden_size: 64, num_layers: 2}\n" + TRAIN,
        "c.yaml:1: model.num_heads and model.max_positions are missing; give them, or name a preset, "
        "for example model.preset=tiny",
    ),
    "unknown preset": (
        "model: {preset: tinny}\n" + TRAIN,
        "c.yaml:1: model.preset=tinny: must be tiny, mini, gpt2, gpt2-medium, gpt2-large or gpt2-xl, "
        "or null; did you mean tiny?",
    ),
    "preset in the place of a function": (
        "model: mini\n" + TRAIN,
        "c.yaml:1: model=mini: must be a mapping, or package.module:function; for a preset write model: {preset: mini}",
    ),
    "no function name": (
        "model: 'my.module:'\n" + TRAIN,
        "c.yaml:1: model.builder=my.module:: must name a function as package.module:function; "
        "for example builder: my_package.my_model:build_layers",
    ),
    "size beside a builder": (
        "model: {builder: 'a.b:c', hidden_size: 3}\n" + TRAIN,
        "c.yaml:1: model.hidden_size: unknown key; "
        "the settings of your own model stand under model.args, as model.args.hidden_size",
    ),
    "unknown partition": (
        MODEL + TRAIN + "parallel: {partition: best}\n",
        "c.yaml:3: parallel.partition=best: must be parameters, uniform, flops, profile, memory, type:<regex>, "
        "manual or one that you install (there are none); for example parameters",
    ),
    "broken regular expression": (
        MODEL + TRAIN + "parallel: {partition: 'type:['}\n",
        "c.yaml:3: parallel.partition=type:[: must have a regular expression after 'type:' "
        "(unterminated character set at position 0); for example type:Attention",
    ),
    "key given twice": (
        MODEL + "train:\n  steps: 3\n  seed: 1\n  steps: 4\n",
        "c.yaml:5: train.steps: given twice, first in line 3; remove one of them",
    ),
    "two colons": (
        "model: preset: tiny\n",
        "c.yaml:1: not valid YAML: a second ':' in the line, or a wrong indentation; write one 'key: value' a line",
    ),
    "tab": ("model:\n\tpreset: tiny\n", "c.yaml:2: not valid YAML: a tab; indent with spaces"),
    "two documents": (
        MODEL + "---\n" + TRAIN,
        "c.yaml:2: not valid YAML here: a second document begins; keep one document a file",
    ),
    "control character": (
        MODEL + "train: \x01\n",
        "c.yaml:2: not valid YAML: a control character; retype the line",
    ),
    "empty": (
        "# nothing here\n",
        "c.yaml: is empty; it needs at least\n  model: {preset: tiny}\n  train: {steps: 300}",
    ),
    "not a mapping": (
        "[1, 2]\n",
        "c.yaml: must be a mapping of sections, not [1, 2]; it needs at least\n"
        "  model: {preset: tiny}\n  train: {steps: 300}",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_refused_with_one_clear_message(write, case: str):
    text, message = REFUSED[case]
    assert refusal(write(text)) == message


def test_a_python_object_in_the_file_is_not_built(write):
    for value in (
        "!!python/object/apply:os.getcwd []",
        "!!python/object:os.x {}",
        "!!python/name:os.getcwd ''",
    ):
        text = refusal(write(MODEL + TRAIN + f"deepspeed:\n  dump_state: {value}\n"))
        assert text.startswith("c.yaml:4: ")
        assert "python" in text


def test_an_alias_that_contains_itself_ends(write):
    assert "c.yaml:1: an alias that contains itself" in refusal(write("model: &x {args: *x, builder: 'a:b'}\n"))


def test_a_merge_key_fills_in_what_is_not_given(write):
    text = MODEL + "train: &t {steps: 3, seed: 5}\n"
    merged = text + "scheduler: {type: linear}\ndeepspeed: {}\n"
    assert load_config(write(merged)).train.seed == 5
    args = "model: {builder: 'a:b', args: {one: &o {x: 1, y: 2}, two: {<<: *o, y: 3}}}\n"
    assert load_config(write(args + TRAIN)).model.args["two"] == {"x": 1, "y": 3}


def test_every_mistake_is_listed_in_the_order_of_the_file_then_of_the_command_line(write):
    path = write("model: {preset: tiny, num_heads: 5}\ntrain:\n  steps: ten\n  lr: 3\nzzz: 1\n")
    lines = refusal(path, "parallel.tp=0", "train.seed=x").splitlines()
    assert lines[0] == "6 mistakes in the configuration:"
    assert [line.split(": ")[0].strip() for line in lines[1:]] == [
        "c.yaml:1", "c.yaml:3", "c.yaml:4", "c.yaml:5", "command line", "command line",
    ]  # fmt: skip


class TestOverrides:
    def test_they_are_applied_in_order_and_read_as_yaml(self, write):
        overrides = ["train.steps=20", "train.steps=21", "data.source=[a, b]", "logging.wandb.project=mine"]
        config = load_config(write(MODEL + TRAIN + "logging: {wandb: true}\n"), overrides)
        assert config.train.steps == 21
        assert config.data.entries[0].sources == ("a", "b")
        assert config.logging.wandb is not None
        assert config.logging.wandb.project == "mine"

    def test_they_reach_into_a_model_given_as_a_function(self, write):
        config = load_config(write("model: a.b:c\n" + TRAIN), ["model.args.width=3"])
        assert config.model.args == {"width": 3}

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("train.setps=20", "command line: train.setps=20: unknown key; did you mean 'train.steps'?"),
            ("train.steps=ten", "command line: train.steps=ten: must be a whole number greater than 0; "
                                "for example steps: 300"),
            ("train.steps", "command line: train.steps: must be section.key=value; "
                            "for example train.steps=300"),
            ("parallel.pp={", "command line: parallel.pp={: the value is not valid YAML; "
                              "try parallel.pp='\"...\"', with quotes"),
            ("train.steps.x=3", "command line: train.steps={x: 3}: must be a whole number greater than 0; "
                                "for example steps: 300"),
            ("paralel.pp=2", "command line: paralel: unknown section; did you mean 'parallel'?"),
        ],
    )  # fmt: skip
    def test_a_wrong_one_is_refused_at_the_command_line(self, write, override: str, message: str):
        assert refusal(write(MODEL + TRAIN), override) == message

    def test_a_rule_is_broken_at_the_key_that_was_given(self, write):
        assert refusal(write(MODEL + TRAIN), "train.micro_batch_size=3").startswith("command line: train.global")

    def test_a_preset_that_changes_nothing_is_refused(self, write):
        path = write(load_config(write(MODEL + TRAIN)).to_yaml(), "saved.yaml")
        assert refusal(path, "model.preset=mini").startswith(
            "command line: model.preset=mini: changes nothing, since saved.yaml gives model.vocab_size"
        )


class TestFiles:
    def test_a_missing_file_suggests_one_with_a_similar_name(self, write):
        write(MODEL, "train.yaml")
        assert refusal("trian.yaml") == "trian.yaml: no such file; did you mean 'train.yaml'?"

    def test_a_missing_file_lists_what_there_is(self, write):
        write(MODEL, "one.yaml")
        write(MODEL, "two.yml")
        assert refusal("zzzzzz") == "zzzzzz: no such file; the YAML files of . are one.yaml, two.yml"

    def test_a_missing_folder_is_said(self, write):
        assert refusal("no/c.yaml") == "no/c.yaml: no such file; the folder no does not exist either"

    def test_a_folder_is_refused(self, write):
        Path("folder").mkdir()
        assert refusal("folder").startswith("folder: is a folder, not a YAML file")

    def test_bytes_are_refused(self, write):
        Path("c.yaml").write_bytes(b"\xff\xfe\x00")
        assert refusal("c.yaml") == "c.yaml: is not UTF-8 text; a configuration is a YAML file"

    def test_a_byte_order_mark_is_skipped(self, write):
        assert load_config(write("\ufeff" + MODEL + TRAIN)).train.steps == 300


class TestDicts:
    def test_messages_have_no_place(self):
        with pytest.raises(ConfigError) as caught:
            parse_config({"model": {"preset": "tiny"}, "train": {"setps": 3, "steps": 3}})
        assert str(caught.value) == "train.setps: unknown key; did you mean 'train.steps'?"

    def test_sections_may_be_built_already(self):
        values = {"model": GPT2Config(preset="tiny"), "train": {"steps": 3}, "run": RunConfig(dir="x")}
        config = parse_config(values, ["run.device=cpu"])
        assert (config.run.dir, config.run.device) == ("x", "cpu")
        assert config == parse_config(
            {"model": {"preset": "tiny"}, "train": {"steps": 3}, "run": {"dir": "x", "device": "cpu"}}
        )

    def test_what_was_given_is_left_as_it_was(self):
        values = {"model": {"preset": "tiny"}, "train": {"steps": 3}}
        parse_config(values, ["train.steps=4", "model.dropout=0.5"])
        assert values == {"model": {"preset": "tiny"}, "train": {"steps": 3}}


class TestUpdated:
    config = parse_config({"model": {"preset": "tiny"}, "train": {"steps": 3}})

    def test_it_changes_a_copy(self):
        changed = self.config.updated({"train.steps": 5})
        assert (changed.train.steps, self.config.train.steps) == (5, 3)
        assert changed.updated({"train.steps": 3}) == self.config

    def test_it_checks_again(self):
        with pytest.raises(ConfigError, match=r"parallel\.pp=13 stages are more than the model's 12 layers"):
            self.config.updated({"parallel.pp": 13})

    def test_what_follows_from_a_size_or_a_preset_follows(self):
        assert self.config.updated({"model.hidden_size": 64}).model.ffn_size == 256
        assert self.config.updated({"model.preset": "gpt2"}).model == GPT2Config(preset="gpt2")

    def test_a_size_that_was_chosen_stays(self):
        chosen = self.config.updated({"model.num_layers": 2})
        assert chosen.updated({"model.preset": "mini"}).model.num_layers == 2


def test_loading_needs_neither_torch_nor_deepspeed(write):
    code = (
        "import sys; from pipekit.config import load_config; load_config('c.yaml');"
        "print(sorted({'torch', 'deepspeed', 'numpy'} & set(sys.modules)))"
    )
    write(MODEL + TRAIN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_config_is_the_type_that_loading_returns(write):
    assert isinstance(load_config(write(MODEL + TRAIN)), Config)


def test_keys_that_were_there_once_are_read_where_they_mean_what_holds_without_them(write):
    assert load_config(write(MODEL + TRAIN + "logging: {profile: false}\n")) == load_config(write(MODEL + TRAIN))
    with pytest.raises(ConfigError, match=r"logging\.profile: unknown key; here it is profile\.steps"):
        load_config(write(MODEL + TRAIN + "logging: {profile: true}\n"))
