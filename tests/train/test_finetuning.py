import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jsparse.models import Llama
from jsparse.models.patterns import full_pattern, load_pattern, shifted_pattern
from jsparse.train import FinetuneConfig, finetune, finetuning
from jsparse.train.run.checkpoint import open_checkpoints
from jsparse.train.start import load_start

CONTEXT = 32  # of the base model


@pytest.fixture(scope="module")
def config(base, text, tmp_path_factory):
    return FinetuneConfig(
        model=base,
        data=text,
        output=tmp_path_factory.mktemp("run") / "output",
        context=2 * CONTEXT,
        lora_rank=4,
        lora_alpha=8.0,
        steps=6,
        batch_size=4,
        learning_rate=1e-2,
        warmup_steps=2,
        checkpoint_every=4,
    )


@pytest.fixture(scope="module")
def run(config):
    return finetune(config, progress=False)


def parameters(folder):
    state = nnx.state(Llama.from_pretrained(folder), nnx.Param)
    return {".".join(map(str, path)): np.asarray(value[...]) for path, value in nnx.to_flat_state(state)}


def snapshot(folder):
    """Every file's content and time of change."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_speed(lines):
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def test_it_learns_and_reports_every_step(config, run):
    assert run.output == config.output
    assert np.mean(run.losses[-2:]) < 0.9 * run.losses[0]
    lines = metrics_of(config.output)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert tuple(line["loss"] for line in lines) == run.losses and lines[-1] == run.metrics
    np.testing.assert_allclose([line["learning_rate"] for line in lines], [5e-3] + [1e-2] * 5, rtol=1e-6)
    assert all(line["grad_norm"] > 0 and line["tokens_per_second"] > 0 for line in lines)
    # The first four steps are one epoch: 721 + 261 tokens in 16 windows, so 981 pairs of neighbours, of which
    # one is of two documents and 15 of two windows.
    assert sum(line["tokens"] for line in lines[:4]) == 981 - 1 - 15


def test_the_output_is_a_model_and_nothing_is_left_behind(config, run):
    names = {path.name for path in config.output.iterdir()}
    model = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert names == model | {"metrics.jsonl", "checkpoints", "attention_pattern.json", "run.yaml"}
    assert load_pattern(config.output) == shifted_pattern(Llama.from_pretrained(config.output).config, 16)
    assert {path.name for path in (config.output / "checkpoints").iterdir()} == {"4", "6"}
    tokenizer = (config.output / "tokenizer.json").read_bytes()
    assert tokenizer == (config.model / "tokenizer.json").read_bytes()


def test_only_what_longlora_trains_has_changed(config, run):
    before, after = parameters(config.model), parameters(config.output)
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    trained = ("embed_tokens", "norm", "q_proj", "k_proj", "v_proj", "o_proj")
    assert changed == {name for name in before if any(part in name for part in trained)}


def test_the_context_is_interpolated_and_interpolation_compounds(config, run, tmp_path):
    extended = json.loads((config.output / "config.json").read_text())
    assert extended["max_position_embeddings"] == 64
    rope = Llama.from_pretrained(config.output).config.rope
    assert (rope.kind, rope.factor) == ("linear", 2.0)

    further = dataclasses.replace(config, model=config.output, output=tmp_path / "o", context=192, steps=1)
    finetune(dataclasses.replace(further, warmup_steps=0), progress=False)
    rope = Llama.from_pretrained(tmp_path / "o").config.rope
    assert (rope.kind, rope.factor) == ("linear", 6.0)


def test_merged_weights_compute_what_the_adapters_did(config, run):
    trained = Llama.from_pretrained(config.output).config
    state, split = load_start(config, trained, mesh=None)
    with open_checkpoints(config.output / "checkpoints", writable=False) as checkpoints:
        state = checkpoints.restore(6, state)
    assert int(state.step) == 6
    tokens = np.random.default_rng(0).integers(0, 257, (1, config.context), np.int32)
    merged, adapted = (
        jax.jit(lambda model=model: model(tokens))()
        for model in (Llama.from_pretrained(config.output), split.join(state.params, split.frozen))
    )
    np.testing.assert_allclose(merged, adapted, atol=1e-4)


def test_a_finished_run_is_not_run_again(config, run):
    before = {path: content for path, (content, _) in snapshot(config.output).items()}
    assert finetune(config, progress=False) == run
    assert {path: content for path, (content, _) in snapshot(config.output).items()} == before


def test_a_run_that_stopped_before_its_model_was_written_writes_it(config, run, tmp_path):
    stopped = dataclasses.replace(config, output=tmp_path / "output")
    shutil.copytree(config.output / "checkpoints", stopped.output / "checkpoints")
    shutil.copy(config.output / "metrics.jsonl", stopped.output)
    assert finetune(stopped, progress=False).losses == run.losses
    for name in ("config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl"):
        assert (stopped.output / name).read_bytes() == (config.output / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.02}, "learning_rate is 0.01, here 0.02"),
        (
            {"lora_rank": None, "lora_alpha": 16.0, "seed": 3},
            "lora_rank is 4, here None; .*seed is 0, here 3",
        ),
        ({"group_size": 32}, "its attention was shifted with rules .*16.*, here shifted with rules .*32"),
        ({"attention": "full"}, "its attention was shifted .*, here full"),
        ({"rope": "ntk"}, "its rope is .*'linear'.*, here .*'default'"),
        ({"micro_batches": 2}, "micro_batches is 1, here 2"),
        ({"schedule": "cosine"}, "schedule is 'constant', here 'cosine to step 6'"),
        ({"data": "one file less"}, "its data had other content"),
        ({"context": 32}, "^(?!.*other content).*its context is 64, here 32"),  # the text is the same
        ({"loss_on": "all"}, "^(?!.*other content).*its loss_on is 'answers', here 'all'"),
        ({"model": "another"}, "its model had other content"),
        ({"steps": 5}, "steps=5, but .* has come to step 6"),
    ],
)
def test_checkpoints_of_another_run_are_refused_and_stay_as_they_are(config, run, tmp_path, changes, message):
    if "data" in changes:
        changes = {"data": config.data[:1]}
    if "model" in changes:
        model = Llama.from_pretrained(config.model)
        model.norm.scale[...] = model.norm.scale[...] + 1
        model.save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_bytes((config.model / "tokenizer.json").read_bytes())
        changes = {"model": tmp_path}
    before = snapshot(config.output)
    with pytest.raises(ValueError, match=message):
        finetune(dataclasses.replace(config, **changes), progress=False)
    assert snapshot(config.output) == before


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(config, run, tmp_path, monkeypatch):
    broken = dataclasses.replace(config, output=tmp_path / "output", checkpoint_every=2)
    batch_at = finetuning.batch_at

    def stop_at_step_5(windows, step, **options):
        if step == 4:
            raise KeyboardInterrupt  # as a crash
        return batch_at(windows, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "batch_at", stop_at_step_5)
        with pytest.raises(KeyboardInterrupt):
            finetune(dataclasses.replace(broken, steps=5), progress=False)
    assert {path.name for path in broken.output.iterdir()} == {
        "metrics.jsonl",
        "checkpoints",
        "data",
        "run.yaml",
    }
    with open(broken.output / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # as a crash in mid-line leaves it

    resumed = finetune(broken, progress=False)
    assert resumed.losses == run.losses
    assert without_speed(metrics_of(broken.output)) == without_speed(metrics_of(config.output))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (broken.output, config.output)]
    assert weights[0] == weights[1]


def test_pretraining_trains_every_parameter(config, text, tmp_path):
    pretraining = dataclasses.replace(
        config,
        output=tmp_path / "output",
        context=CONTEXT,
        lora_rank=None,
        lora_alpha=16.0,
        weight_decay=0.1,
    )
    result = finetune(pretraining, progress=False)
    assert result.losses[-1] < 0.8 * result.losses[0]
    before, after = parameters(config.model), parameters(result.output)
    assert not any(np.array_equal(before[name], after[name]) for name in before)
    trained = Llama.from_pretrained(result.output)
    assert trained.config == Llama.from_pretrained(config.model).config  # the context is not extended
    assert load_pattern(result.output) == full_pattern(trained.config)
    with open_checkpoints(result.output / "checkpoints", writable=False) as checkpoints:
        assert checkpoints.read_run(6)["config"]["attention"] == "full"  # what None came to


def test_a_loss_that_is_not_finite_ends_the_run_and_writes_no_model(config, tmp_path):
    wild = dataclasses.replace(config, output=tmp_path / "output", learning_rate=1e30, warmup_steps=0)
    with pytest.raises(FloatingPointError, match="step 4: loss is .* max_skipped=3 steps in a row"):
        finetune(wild, progress=False)
    lines = metrics_of(wild.output)
    assert [(line["step"], line["skipped"]) for line in lines] == [(1, 0), (2, 1), (3, 2)]
    assert lines[0]["loss"] > 0 and lines[1]["loss"] is None and lines[2]["grad_norm"] is None
    assert not (wild.output / "config.json").exists()


@pytest.mark.parametrize(("skipped", "in_row", "taken"), [(0, 0, 4), (2, 0, 2), (2, 1, 3), (2, 2, 3)])
def test_the_learning_rate_reported_is_that_of_the_steps_the_optimizer_took(config, skipped, in_row, taken):
    """In line 5, ``taken`` steps have moved the weights before: the one that is skipped there has not."""
    rising = dataclasses.replace(config, learning_rate=1.0, warmup_steps=10)
    numbers = (jnp.float32(2.0), jnp.float32(1.0), *(jnp.int32(n) for n in (7, skipped, in_row)))
    line = finetuning._metrics_line(rising, 5, finetuning.Metrics(*numbers, rewards=None), 0.0)
    np.testing.assert_allclose(line["learning_rate"], (taken + 1) / 10, rtol=1e-6)
    assert (line["loss"] is None) == (in_row > 0) and line["skipped"] == skipped


def test_the_speed_is_that_of_the_tokens_read_not_of_the_few_that_are_learned(config, monkeypatch):
    """Where only answers are learned, the targets are few, and their number differs from step to step."""
    monkeypatch.setattr(finetuning.time, "perf_counter", lambda: 12.0)
    numbers = (jnp.float32(2.0), jnp.float32(1.0), *(jnp.int32(n) for n in (7, 0, 0)))
    line = finetuning._metrics_line(config, 5, finetuning.Metrics(*numbers, rewards=None), 10.0)
    assert line["tokens_per_second"] == config.batch_size * config.context / 2


@pytest.mark.parametrize("in_row", [0, 1])
def test_the_line_of_a_step_without_a_target_has_no_loss(config, in_row):
    """It is counted as skipped; steps before it that were not finite end no run with it."""
    rising = dataclasses.replace(config, learning_rate=1.0, warmup_steps=10, max_skipped=2)
    numbers = (jnp.float32(0.0), jnp.float32(0.0), *(jnp.int32(n) for n in (0, 1 + in_row, in_row)))
    line = finetuning._metrics_line(rising, 5, finetuning.Metrics(*numbers, rewards=None), 0.0)
    assert (line["loss"], line["grad_norm"], line["tokens"]) == (None, None, 0)
    np.testing.assert_allclose(line["learning_rate"], (4 - in_row + 1) / 10, rtol=1e-6)
