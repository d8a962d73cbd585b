"""Runs that something ends: SIGTERM, Ctrl-C, and a disk that is full."""

import dataclasses
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.train import FinetuneConfig, finetune, finetuning
from jsparse.train.run.checkpoint import open_checkpoints
from jsparse.train.run.stopping import stop_noted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_within_and_ends_the_process_outside(number):
    before = signal.getsignal(number)
    with stop_noted() as asked:
        assert asked() == 0
        os.kill(os.getpid(), number)
        assert asked() == number
    assert signal.getsignal(number) is before
    with stop_noted() as asked:
        assert asked() == 0  # noted within the block only


def test_a_second_interrupt_ends_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_noted() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked() == signal.SIGINT
        assert capfd.readouterr().err.count("ends after this step, with a checkpoint") == 1
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_that_is_ignored_stays_ignored():
    """As in a job that a shell without job control runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_noted() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert asked() == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_cannot_be_asked():
    answers = []

    def run():
        with stop_noted() as asked:
            answers.append(asked())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert answers == [0]


def test_sigterm_saves_the_step_and_the_run_goes_on_bit_for_bit(save_checkpoint, text, tmp_path, monkeypatch):
    base = save_checkpoint(tmp_path / "base", num_hidden_layers=1)
    config = FinetuneConfig(
        model=base, data=text, output=tmp_path / "stopped", context=32, lora_rank=2, steps=4, batch_size=2
    )
    batch_at = finetuning.batch_at

    def terminate_at_step_2(windows, step, **options):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_at(windows, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "batch_at", terminate_at_step_2)
        stopped = finetune(config, progress=False)
    assert not stopped.finished and len(stopped.losses) == 2
    assert not (config.output_folder / "config.json").exists()
    with open_checkpoints(config.output_folder / "checkpoints", writable=False) as checkpoints:
        assert checkpoints.latest_step() == 2
        run = checkpoints.read_run(2)
    assert run["position"] == {"epoch": 0, "window": 4}
    assert run["rope"]["rope_type"] == "default" and run["seed"] == 0

    resumed = finetune(config, progress=False)
    unbroken = finetune(dataclasses.replace(config, output=tmp_path / "unbroken"), progress=False)
    assert resumed.finished and resumed.losses == unbroken.losses
    weights = [(folder / "model.safetensors").read_bytes() for folder in (resumed.output, unbroken.output)]
    assert weights[0] == weights[1]


# A process that was started in the background of a shell may ignore the signal.
COMMAND = """
import signal, sys
from jsparse.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_ends_the_command_with_a_checkpoint(save_checkpoint, text, tmp_path):
    base, output = save_checkpoint(tmp_path / "base", num_hidden_layers=1), tmp_path / "output"
    options = f"--model {base} --data {text[0]} --output {output} --context 32 --steps 1000000 --batch-size 1"
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "finetune", *options.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        metrics, began = output / "metrics.jsonl", time.monotonic()
        while not (metrics.is_file() and metrics.read_text()):
            assert process.poll() is None and time.monotonic() - began < 300
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    steps = len(metrics.read_text().splitlines())
    assert process.returncode == 130, errors
    assert "Ctrl-C: the run ends after this step" in errors
    assert f"stopped by Ctrl-C after step {steps}, last loss" in errors and "run the same command" in errors
    with open_checkpoints(output / "checkpoints", writable=False) as checkpoints:
        assert checkpoints.latest_step() == steps


FULL_DISK = """
import resource, signal, sys
import jax.numpy as jnp
import numpy as np
from pathlib import Path
from jsparse.train.run.checkpoint import open_checkpoints

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as on a full disk, a write fails
with open_checkpoints(Path(sys.argv[1]), writable=True) as checkpoints:
    checkpoints.save(1, {"w": jnp.arange(4.0)}, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    noise = jnp.asarray(np.random.default_rng(0).normal(size=100_000))  # hard to compress
    try:
        checkpoints.save(2, {"w": noise}, {})
    except OSError as error:
        print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="files cannot be limited here")
def test_a_disk_that_is_full_leaves_the_checkpoint_before(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path / "run"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the checkpoint of step 2 could not be written" in done.stdout
    assert "that of step 1 is intact" in done.stdout and "Make room" in done.stdout
    with open_checkpoints(Path(tmp_path / "run"), writable=False) as checkpoints:
        assert checkpoints.latest_step() == 1
        restored = checkpoints.restore(1, {"w": jnp.zeros(4)})
    np.testing.assert_array_equal(restored["w"], np.arange(4.0))
