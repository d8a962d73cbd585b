"""Runs that are as long as so many epochs, and windows that are no step."""

import dataclasses
import json
import logging

import numpy as np
import pytest

from jsparse.__main__ import main
from jsparse.train import FinetuneConfig, MergeConfig, finetune, merge
from jsparse.train.data import run_data


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def config(save_checkpoint, tmp_path_factory):
    """Four windows of 32 tokens, and a fifth that holds the last token alone."""
    folder = tmp_path_factory.mktemp("epochs")
    (folder / "a.txt").write_text("abcdefgh" * 16)
    return FinetuneConfig(
        model=save_checkpoint(folder / "base", num_hidden_layers=1),
        data=(folder / "a.txt",),
        output=folder / "output",
        context=32,
        lora_rank=2,
        batch_size=2,
        epochs=1.5,
        warmup_ratio=0.3,
        schedule="linear",
        learning_rate=1.0e-3,
    )


@pytest.fixture(scope="module")
def run(config):
    return finetune(config, progress=False)


def test_the_steps_are_those_of_the_windows_that_have_a_target(config, run):
    lines = lines_of(config.output)
    assert [line["tokens"] for line in lines] == [2 * 31] * 3  # 1.5 times four windows, two per step
    # A warm-up of 0.3 times three steps, rounded up, is one; then it falls to a tenth.
    np.testing.assert_allclose([line["learning_rate"] for line in lines], [1e-3, 1e-3, 5.5e-4], rtol=1e-5)


def test_it_is_the_run_of_as_many_steps(config, run, tmp_path):
    in_steps = dataclasses.replace(config, epochs=None, warmup_ratio=None, steps=3, warmup_steps=1)
    apart = finetune(dataclasses.replace(in_steps, output=tmp_path / "apart"), progress=False)
    assert apart.losses == run.losses
    assert finetune(in_steps, progress=False) == run  # resumed, with nothing to do
    assert finetune(config, progress=False) == run
    assert merge(MergeConfig(run=config.output, output=tmp_path / "merged")) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"epochs": 2.0},
            "its warmup_steps is 1, here 2; its schedule is 'linear to step 3', here 'linear to step 4'",
        ),
        ({"warmup_ratio": 0.6}, "its warmup_steps is 1, here 2"),
    ],
)
def test_another_length_is_refused_if_the_schedule_depends_on_it(config, run, changes, message):
    before = set(config.output.rglob("*"))
    with pytest.raises(ValueError, match=f"belongs to another run: {message}"):
        finetune(dataclasses.replace(config, **changes), progress=False)
    assert set(config.output.rglob("*")) == before  # without the windows, which told the steps


def test_another_run_is_refused_before_the_data_are_read_for_their_windows(config, run, monkeypatch):
    monkeypatch.setattr(run_data, "write_windows", None)
    with pytest.raises(ValueError, match="its seed is 0, here 1"):
        finetune(dataclasses.replace(config, seed=1), progress=False)


def test_a_constant_schedule_goes_on_for_more_epochs_and_not_for_fewer(config, tmp_path):
    constant = dataclasses.replace(
        config, schedule="constant", warmup_ratio=None, epochs=1.0, output=tmp_path / "o"
    )
    first = finetune(constant, progress=False)
    more = finetune(dataclasses.replace(constant, epochs=2.0), progress=False)
    assert len(more.losses) == 4 and more.losses[:2] == first.losses
    with pytest.raises(ValueError, match="steps=2, but .* has come to step 4 already"):
        finetune(constant, progress=False)


def test_what_a_run_of_epochs_writes_resumes_it_and_takes_steps_in_their_place(config, tmp_path, capsys):
    constant = dataclasses.replace(
        config, schedule="constant", warmup_ratio=None, epochs=1.0, output=tmp_path / "o"
    )
    first = finetune(constant, progress=False)
    written = (constant.output / "run.yaml").read_text()
    command = ["finetune", "--config", str(constant.output / "run.yaml")]
    assert main(command) == 0
    assert (constant.output / "run.yaml").read_text() == written
    assert main([*command, "--steps", "4"]) == 0
    losses = [line["loss"] for line in lines_of(constant.output)]
    assert len(losses) == 4 and losses[:2] == list(first.losses)
    assert main(command) == 0  # the file says 4 steps now


def test_windows_without_a_target_are_counted_before_the_first_step(config, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "jsparse"):
        finetune(dataclasses.replace(config, output=tmp_path / "o"), progress=False)
    assert [record.getMessage() for record in caplog.records] == [
        "note: 1 of 5 windows have no target and are not taken"
    ]
