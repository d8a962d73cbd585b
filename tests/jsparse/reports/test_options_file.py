"""Options from a YAML file are those of the command line, and what a run writes can be read again."""

import dataclasses
import shlex
from pathlib import Path

import pytest

from jsparse.models import MeshConfig
from jsparse.reports.console import parse
from jsparse.reports.options_file import as_yaml, with_file
from jsparse.train import FinetuneConfig
from jsparse.train.commands import FinetuneCommand, PlanFinetuneCommand
from jsparse.train.config_checks import EITHER

RUN = """
model: base
data: [a.txt, b.txt]
output: out
context: 64
learning-rate: 2e-5  # a text in YAML, which wants a point
base_bits: null
train_embeddings_and_norms: false
attention: full
mesh:
  fsdp: 2
"""


@pytest.fixture
def read(tmp_path):
    """What the options come to, with ``text`` in a file."""

    def read(text, *options, command=FinetuneCommand):
        (tmp_path / "run.yaml").write_text(text)
        options = [*options, "--config", str(tmp_path / "run.yaml")]
        return parse(command, "finetune", with_file(command, options, either=EITHER))

    return read


def test_a_file_is_the_same_as_its_options(read):
    given = "--model base --data a.txt b.txt --output out --context 64 --learning-rate 2e-5 --base-bits None"
    given += " --no-train-embeddings-and-norms --attention full --mesh.fsdp 2"
    expected = parse(FinetuneCommand, "finetune", shlex.split(given))
    found = read(RUN)
    assert dataclasses.replace(found, config=None) == expected
    assert (found.learning_rate, found.base_bits, found.mesh) == (2e-5, None, MeshConfig(fsdp=2))


def test_options_beside_the_file_win(read):
    found = read(RUN, "--data", "c.txt", "--base-bits", "4", "--mesh.fsdp=1", "--train-embeddings-and-norms")
    assert list(found.data) == ["c.txt"] and found.base_bits == 4 and found.mesh == MeshConfig()
    assert found.train_embeddings_and_norms and found.context == 64


@pytest.mark.parametrize(
    ("in_file", "option", "steps", "epochs", "ratio"),
    [
        ("epochs: 3", "--steps=1000", 1000, None, None),
        ("epochs: 3\nsteps: null", "--steps 7", 7, None, None),
        ("steps: 1000", "--epochs 2", None, 2.0, None),
        ("warmup_ratio: 0.1\nepochs: 3", "--warmup_steps 20", None, 3.0, None),
        ("warmup-steps: 20", "--warmup-ratio 0.5", None, None, 0.5),
        ("epochs: 3", "--epochs 2", None, 2.0, None),
        ("epochs: 3", "--seed 1", None, 3.0, None),
    ],
)
def test_an_option_beside_the_file_takes_the_place_of_what_says_the_same(
    read, in_file, option, steps, epochs, ratio
):
    found = read(RUN + in_file, *shlex.split(option))
    assert (found.steps, found.epochs, found.warmup_ratio) == (steps, epochs, ratio)


def test_two_ways_to_say_the_same_are_refused_where_both_are_in_the_file_or_both_are_options(read, capsys):
    for text, options in (("epochs: 3\nsteps: 1000", ()), ("", ("--epochs", "3", "--steps", "1000"))):
        with pytest.raises(SystemExit):
            read(RUN + text, *options)
        assert "epochs=3.0 and steps=1000 say the same in two" in capsys.readouterr().err


def test_a_plan_takes_the_same_file(read):
    found = read(RUN + "device: a100-80gb", command=PlanFinetuneCommand)
    assert found.context == 64 and found.device == "a100-80gb"


def test_what_is_written_is_read_as_the_same_settings(read):
    config = FinetuneConfig(
        model="my models/base",
        data=("a.txt", Path("straße: 1.txt")),
        output=Path("yes"),
        context=96,
        attention="longgen",
        full_layers=(0, 3),
        learning_rate=1 / 3e5,
        fields={"prompt": "a question", "completion": "answer"},
        lora_targets=("layers.*.mlp.*", "q_proj"),
        train_embeddings_and_norms=False,
        base_bits=4,
        mesh=MeshConfig(data=2),
    )
    found = read(as_yaml(config))
    for field in dataclasses.fields(FinetuneConfig):
        before, after = getattr(config, field.name), getattr(found, field.name)
        if field.name in ("data", "eval_data"):
            before, after = tuple(map(str, before)), tuple(map(str, after))
        assert str(after) == str(before) if field.name == "output" else after == before, field.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown option learning_rat; the nearest is learning_rate"),
        ("mesh: {fdsp: 2}", "unknown option mesh.fdsp; the nearest is mesh.fsdp"),
        ("config: a.yaml", "unknown option config; the nearest is"),
        ("steps: many", "steps must be an integer or null, not 'many'"),
        ("steps: 1.5", "steps must be an integer or null, not 1.5"),
        ("steps: true", "steps must be an integer or null, not True"),
        ("learning_rate: fast", "learning_rate must be a number or null, not 'fast'"),
        ("weight_decay: much", "weight_decay must be a number, not 'much'"),
        ("lora_rank: [8]", "lora_rank must be an integer or null, not [8]"),
        ("train-embeddings-and-norms: 1", "train_embeddings_and_norms must be true or false, not 1"),
        ("rope: no", "rope must be text or null, not False"),
        ("output: 2026", "output must be text, not 2026"),
        ("data: [a.txt, 3]", "data must be a list, each text, not ['a.txt', 3]"),
        ("fields: {prompt: 3}", "fields must be a mapping from text to text, not {'prompt': 3}"),
        ("mesh: 2", "mesh must have options of its own below it, not 2"),
        ("mesh: {fsdp: 2.0}", "mesh.fsdp must be an integer, not 2.0"),
        ("steps: 1\nsteps: 2", "steps is given twice"),
        ("batch-size: 1\nbatch_size: 2", "batch_size is given twice"),
        ("- steps", "must have one option per line"),
        ("steps: [", "is not YAML"),
        ("steps: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_a_bad_file_is_refused_by_name(read, text, message):
    with pytest.raises(ValueError, match=r"run\.yaml") as error:
        read(text)
    assert message in str(error.value)


def test_a_file_must_exist_and_be_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config: .*no\.yaml does not exist"):
        with_file(FinetuneCommand, [f"--config={tmp_path}/no.yaml"])
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.yaml is not YAML"):
        with_file(FinetuneCommand, ["--config", str(tmp_path / "latin.yaml")])


def test_help_needs_no_file():
    options = ["--config", "no.yaml", "--help"]
    assert with_file(FinetuneCommand, options) == options


def test_an_empty_file_says_nothing(tmp_path):
    (tmp_path / "run.yaml").write_text("# nothing yet\n")
    options = ["--steps", "3", "--config", str(tmp_path / "run.yaml")]
    assert with_file(FinetuneCommand, options) == options
