"""Fine-tuning on 8 simulated devices, and on two processes of four, is fine-tuning on one."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from jsparse.models import Llama

PROGRAM = Path(__file__).parent / "on_many_devices.py"
# On 8 devices: tokens of a window on 16, 32 or 64 of them, groups of 16.
SHIFTED = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "sequence": {"sequence": 4, "fsdp": 2},
    "sequence and tensor": {"sequence": 2, "tensor": 2, "data": 2},
}
FULL = {"ring": {"sequence": 4, "data": 2}}


def launch(folder, cases, *, devices, processes=1):
    """Run all cases, in one process or in two that share them."""
    # Programs this small take longer to optimise than to run.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    running = []
    for index in range(processes):
        apart = [port, str(index)] if processes > 1 else []
        command = [sys.executable, str(PROGRAM), str(folder), json.dumps(cases), *apart]
        running.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        for process in running:
            out, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-4000:]
            assert f"done on {devices * processes} devices of {processes} processes" in out
    finally:
        for process in running:  # one that waits for another that failed
            process.kill()
            process.communicate()


def check_equal(folder, name, expected):
    lines = [
        [json.loads(line) for line in (folder / one / "metrics.jsonl").read_text().splitlines()]
        for one in (name, expected)
    ]
    for one, other in zip(*lines, strict=True):
        assert one["tokens"] == other["tokens"]
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-5)
        np.testing.assert_allclose(one["grad_norm"], other["grad_norm"], rtol=1e-5)
        for when in {"eval", "eval_before"} & other.keys():
            for kind in ("documents", "instructions"):
                ours, theirs = one[when][kind], other[when][kind]
                assert ours["tokens"] == theirs["tokens"]
                np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
    states = [
        dict(nnx.to_flat_state(nnx.state(Llama.from_pretrained(folder / one)))) for one in (name, expected)
    ]
    for path, value in states[0].items():
        ours, theirs = (np.asarray(x, np.float64) for x in (value[...], states[1][path][...]))
        assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs), (name, path)
    assert (folder / name / "attention_pattern.json").is_file()


@pytest.fixture(scope="module")
def folder(base, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    shutil.copytree(base, folder / "base")
    shutil.copy(text[0], folder / "text.txt")
    held_out = {"prompt": "who sat? ", "completion": "the cat."}, {"text": "the dog ran. " * 7}
    (folder / "held").mkdir()
    for number, line in enumerate(held_out):
        (folder / "held" / f"{number}.jsonl").write_text(json.dumps(line))
    return folder


def cases(meshes, **settings):
    return {name: {"mesh": mesh} | settings for name, mesh in meshes.items()}


def test_meshes_of_eight_devices_train_as_one_device_does(folder):
    held_out = {"eval_data": [str(folder / "held")], "eval_every": 1}
    meshes = {name: SHIFTED[name] for name in ("tensor", "sequence")}
    launch(folder, {"one": held_out} | cases(meshes, **held_out), devices=8)
    assert '"eval"' in (folder / "one" / "metrics.jsonl").read_text()
    for name in ("tensor", "sequence"):
        check_equal(folder, name, "one")


@pytest.mark.slow
def test_other_meshes_and_full_attention_in_a_ring(folder):
    names = [name for name in SHIFTED if name not in ("tensor", "sequence")]
    full = cases(FULL, attention="full") | {"full": {"attention": "full"}}
    more = {"parts": {"mesh": {"fsdp": 2, "sequence": 4}, "micro_batches": 2, "remat": "layers"}}
    launch(folder, {"one": {}} | cases({name: SHIFTED[name] for name in names}) | full | more, devices=8)
    for name in [*names, "parts"]:
        check_equal(folder, name, "one")
    check_equal(folder, "ring", "full")


@pytest.mark.slow
def test_adapters_on_the_head_and_whole_layers_on_a_mesh(folder):
    settings = {"lora_targets": ["all-linear", "lm_head"], "modules_to_save": ["layers.0.mlp.up_proj"]}
    settings |= {"lora_rank_pattern": {"lm_head": 4}, "lora_dropout": 0.1}
    meshes = {f"{name}, head": SHIFTED[name] for name in ("tensor", "sequence")}
    launch(folder, {"one, head": settings} | cases(meshes, **settings), devices=8)
    for name in meshes:
        check_equal(folder, name, "one, head")


@pytest.mark.slow
def test_pairs_of_answers_on_meshes(folder):
    words = ["cat", "dog", "tree", "house", "river", "stone", "bird", "salt"] * 3
    rows = [{"prompt": f"{word}: ", "chosen": word, "rejected": word[::-1]} for word in words]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"data": "pairs.jsonl", "dpo_beta": 0.5}
    meshes = {f"{name}, pairs": SHIFTED[name] for name in ("tensor", "sequence")}
    launch(folder, {"one, pairs": settings} | cases(meshes, **settings), devices=8)
    assert '"reward_margin"' in (folder / "one, pairs" / "metrics.jsonl").read_text()
    for name in meshes:
        check_equal(folder, name, "one, pairs")


@pytest.mark.slow
def test_two_processes_train_as_one_device_does(folder):
    held_out = {"eval_data": [str(folder / "held")], "eval_every": 1}
    launch(folder, {"alone": held_out}, devices=1)
    meshes = {"two, fsdp": {"data": 2, "fsdp": 4}, "two, sequence": {"sequence": 4, "tensor": 2}}
    launch(folder, cases(meshes, **held_out), devices=4, processes=2)
    for name in meshes:
        check_equal(folder, name, "alone")
