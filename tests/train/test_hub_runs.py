"""Runs on a model that is given by its id: they keep, and record, the commit that they began with."""

import dataclasses
import json

import pytest

from jsparse.__main__ import main
from jsparse.train import FinetuneConfig, HeadsConfig, MergeConfig, finetune, learn_heads, merge
from jsparse.train.run.checkpoint import open_checkpoints

FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture
def move_main(hub_cache, store_snapshot, base, save_checkpoint, tmp_path):
    """``org/name`` at FIRST; a call moves its main to SECOND, which has other weights."""
    other = save_checkpoint(tmp_path / "other", initializer_range=0.2)

    def store(folder, commit):
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        store_snapshot(hub_cache, "org/name", commit, files, main=commit)

    store(base, FIRST)
    return lambda: store(other, SECOND)


def forget_where_main_is():
    import jsparse.hub

    jsparse.hub._fetch_small.cache_clear()


def test_a_run_keeps_the_commit_it_began_with(move_main, base, text, tmp_path):
    config = FinetuneConfig(
        model="org/name",
        data=text,
        output=tmp_path / "run",
        context=32,
        lora_rank=2,
        lora_targets=("q_proj",),
        train_embeddings_and_norms=False,
        steps=2,
        batch_size=2,
    )
    finetune(config, progress=False)
    with open_checkpoints(tmp_path / "run" / "checkpoints", writable=False) as checkpoints:
        assert checkpoints.read_run(2)["config"]["model"] == f"org/name@{FIRST}"

    move_main()
    forget_where_main_is()
    longer = dataclasses.replace(config, steps=3)
    named = rf"its model had other content \(org/name@{FIRST}, here org/name@{SECOND}\)"
    for model in ("org/name@main", f"org/name@{SECOND}"):
        with pytest.raises(ValueError, match=named):
            finetune(dataclasses.replace(longer, model=model), progress=False)
    resumed = finetune(longer, progress=False)

    local = dataclasses.replace(longer, model=base, output=tmp_path / "local")
    assert resumed.losses == finetune(local, progress=False).losses

    assert merge(MergeConfig(run=tmp_path / "run", output=tmp_path / "adapter", adapter=True)) == 3
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/name", FIRST)
    assert (tmp_path / "adapter" / "tokenizer.json").is_file()


def test_a_head_pattern_says_of_which_commit_it_is(
    hub_cache, store_snapshot, save_checkpoint, text, tmp_path
):
    folder = save_checkpoint(tmp_path / "model", max_position_embeddings=256)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    store_snapshot(hub_cache, "org/name", FIRST, files, main=FIRST)
    config = HeadsConfig(
        model="org/name",
        data=text,
        output=tmp_path / "heads",
        context=256,
        min_context=128,
        lengths=1,
        sink=1,
        window=4,
        needles=1,
        words=1,
        steps=1,
    )
    learn_heads(config, progress=False)
    assert json.loads((tmp_path / "heads" / "config.json").read_text())["model"] == f"org/name@{FIRST}"


def test_evaluate_names_the_commit(move_main, text, capfd):
    command = [
        "evaluate",
        "--model",
        "org/name",
        "--contexts",
        "32",
        "--max-windows",
        "1",
        "--data",
        str(text[0]),
    ]
    assert main(command) == 0
    assert FIRST[:20] in capfd.readouterr().out
