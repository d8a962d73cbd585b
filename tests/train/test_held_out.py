"""Held-out loss while a run trains: its numbers, the best step, early stopping, and going on after a stop."""

import dataclasses
import json
import logging
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.__main__ import main
from jsparse.models import Llama, load_config
from jsparse.train import FinetuneConfig, MergeConfig, evaluate_perplexity, finetune, finetuning, merge
from jsparse.train.data.windows import open_windows, write_windows
from jsparse.train.held_out import held_out_loss
from jsparse.train.run import identity
from jsparse.train.run.evaluations import best_line
from jsparse.train.start import extended_config, load_start

END = 256
# In capitals, which the training data do not have: after a few steps, their loss rises.
DOCUMENTS = ["THE DOG SAT.", "THE CAT RAN."]
ANSWERED = [("WHO RAN? ", "THE DOG."), ("AND WHO SAT ON THE MAT? ", "THE CAT.")]


def write_lines(folder, documents, answered):
    """A folder with a file of documents, and one of answers."""
    shapes = [{"text": text} for text in documents], [{"prompt": p, "completion": c} for p, c in answered]
    folder.mkdir()
    for name, lines in zip(("0.jsonl", "1.jsonl"), shapes, strict=True):
        if lines:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_speed(lines):
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def checkpoints(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("held-out") / "held", DOCUMENTS, ANSWERED)


@pytest.fixture(scope="module")
def config(save_checkpoint, text, held_out, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return FinetuneConfig(
        model=save_checkpoint(folder / "base", num_hidden_layers=1),
        data=text,
        output=folder / "output",
        context=64,
        lora_rank=2,
        lora_dropout=0.3,
        steps=6,
        batch_size=2,
        learning_rate=0.03,
        warmup_steps=0,
        checkpoint_every=100,
        eval_data=(held_out,),
        eval_every=1,
    )


@pytest.fixture(scope="module")
def run(config):
    return finetune(config, progress=False)


def nll_alone(model, tokens, prompt=0):
    """The negative log-likelihoods of a text's tokens after its prompt, in float64: the text alone, dense."""
    row = np.full((1, 64), END, np.int32)  # one shape, to compile once
    row[0, : len(tokens)] = tokens
    logits = np.asarray(jax.jit(lambda: model(row))(), np.float64)[0, : len(tokens) - 1]
    of_targets = logits[np.arange(len(logits)), tokens[1:]]
    return (np.log(np.exp(logits).sum(-1)) - of_targets)[max(prompt - 1, 0) :]


def expected_loss(model):
    """What a line says of the held-out data, from texts that are computed one by one."""
    documents = [nll_alone(model, [*text.encode(), END]) for text in DOCUMENTS]
    answers = [
        nll_alone(model, [*(prompt + answer).encode(), END], len(prompt)) for prompt, answer in ANSWERED
    ]
    kinds = {"documents": np.concatenate(documents), "instructions": np.concatenate(answers)}
    every = np.concatenate([*kinds.values()])
    summary = {name: (nll.mean(), np.exp(nll.mean()), nll.size) for name, nll in kinds.items()}
    return (every.mean(), np.exp(every.mean()), every.size), summary


def check_equal(found, expected):
    (total, kinds), names = expected, ("loss", "perplexity", "tokens")
    assert found.keys() == {*names, *kinds}
    np.testing.assert_allclose([found[name] for name in names], total, rtol=1e-5)
    for kind, numbers in kinds.items():
        np.testing.assert_allclose([found[kind][name] for name in names], numbers, rtol=1e-5)


def test_the_last_line_is_what_the_exported_model_scores_with_full_attention(config, tmp_path):
    """Trained with shifted groups and dropout, which must not show in the held-out loss."""
    short = dataclasses.replace(config, output=tmp_path / "o", steps=2, export_last=True)
    finetune(short, progress=False)
    last = lines_of(short.output)[-1]
    check_equal(last["eval"], expected_loss(Llama.from_pretrained(short.output)))
    assert last["eval"]["documents"]["tokens"] == sum(map(len, DOCUMENTS))
    assert last["eval"]["instructions"]["tokens"] == sum(len(answer) + 1 for _, answer in ANSWERED)


def test_the_first_line_has_the_loss_before_the_first_step(config, run):
    base = Llama.from_pretrained(config.model)
    base.config = extended_config(config, load_config(config.model))
    first, *others = lines_of(config.output)
    check_equal(first["eval_before"], expected_loss(base))
    assert not any("eval_before" in line for line in others)


def test_a_document_of_several_windows_has_the_loss_that_evaluate_gives(config, tmp_path):
    tokens = np.random.default_rng(0).integers(97, 123, 3 * 64 - 1)
    (tmp_path / "long.txt").write_bytes(tokens.astype(np.uint8).tobytes())
    long = dataclasses.replace(config, eval_data=(tmp_path / "long.txt",), output=tmp_path / "o", steps=1)
    finetune(dataclasses.replace(long, eval_every=None), progress=False)
    found = lines_of(long.output)[-1]["eval"]
    expected = evaluate_perplexity(
        Llama.from_pretrained(long.output),
        np.append(tokens, END),
        context=64,
        stride=64,
        scoring="all",
        progress=False,
    )
    assert found["tokens"] == expected.tokens == 3 * 63 and "instructions" not in found
    np.testing.assert_allclose(found["loss"], expected.nll, rtol=1e-5)
    np.testing.assert_allclose(found["perplexity"], expected.perplexity, rtol=1e-5)


def test_data_of_fewer_tokens_than_a_window_are_padded_and_the_batch_is_filled_up(config, tmp_path):
    (tmp_path / "short.txt").write_text("ab")
    short = dataclasses.replace(config, eval_data=(tmp_path / "short.txt",), output=tmp_path / "o", steps=1)
    finetune(short, progress=False)
    found, model = lines_of(short.output)[-1]["eval"], Llama.from_pretrained(short.output)
    assert found["tokens"] == 2
    np.testing.assert_allclose(found["loss"], nll_alone(model, [*b"ab", END]).mean(), rtol=1e-5)


def test_it_is_measured_every_so_many_steps_and_after_the_last(config, tmp_path):
    every_fourth = dataclasses.replace(config, output=tmp_path / "o", eval_every=4)
    finetune(every_fourth, progress=False)
    lines = lines_of(every_fourth.output)
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert [line["step"] for line in lines if "eval" in line] == [4, 6]
    assert dataclasses.replace(config, eval_every=None).evaluation_interval == config.checkpoint_every


def test_the_model_of_the_best_step_is_written_and_its_checkpoint_kept(config, run, tmp_path):
    lines = lines_of(config.output)
    losses = [line["eval"]["loss"] for line in lines]
    best = 1 + int(np.argmin(losses))
    assert 1 < best < 5  # so that it is none of the last two
    assert (run.best_step, run.best_loss, run.exported_step) == (best, min(losses), best)
    kept = checkpoints(config.output)
    assert best in kept and max(kept) == 6 and len(kept) <= 3
    for step, same in ((best, True), (6, False)):
        merge(MergeConfig(run=config.output, output=tmp_path / str(step), step=step))
        assert (weights(tmp_path / str(step)) == weights(config.output)) is same

    last = dataclasses.replace(config, output=tmp_path / "last", export_last=True)
    assert (finetune(last, progress=False).exported_step, last.steps) == (6, 6)
    assert weights(last.output) == weights(tmp_path / "6")
    assert without_speed(lines_of(last.output)) == without_speed(lines)


def test_merge_takes_the_step_that_the_run_has_written(config, run, tmp_path, capsys):
    def merged(folder, *options):
        output = tmp_path / f"merged {len(list(tmp_path.iterdir()))}"
        assert main(["merge", "--run", str(folder), "--output", str(output), *options]) == 0
        out = capsys.readouterr().out.splitlines()[0]
        return weights(output), out.removeprefix(f"{output}: the model of ")

    best = f"step {run.best_step}, which has the lowest held-out loss"
    assert merged(config.output) == (weights(config.output), best)
    assert merged(config.output, "--step", "6")[1] == "step 6"
    again = dataclasses.replace(config, output=tmp_path / "again", export_last=True)
    shutil.copytree(config.output, again.output)
    assert merged(again.output)[1] == best
    finetune(again, progress=False)  # it has finished, so it only writes another model
    assert merged(again.output) == (weights(again.output), "step 6")
    copied = shutil.copytree(config.output, tmp_path / "without")
    shutil.rmtree(copied / "checkpoints" / str(run.best_step))
    with pytest.raises(FileNotFoundError, match=rf"of step {run.best_step}, .* is gone; --step .* \[6\]"):
        merge(MergeConfig(run=copied, output=tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    (copied / "metrics.jsonl").unlink()
    assert merged(copied)[1] == "step 6"


def test_evaluations_do_not_change_what_is_learned(config, run, tmp_path):
    alone = dataclasses.replace(config, eval_data=(), eval_every=None, output=tmp_path / "o", steps=3)
    result = finetune(alone, progress=False)
    assert result.losses == run.losses[:3]
    assert (result.best_step, result.best_loss, result.exported_step) == (None, None, 3)
    assert "eval" not in result.metrics and "eval_before" not in lines_of(alone.output)[0]


def test_patience_ends_the_run_with_the_best_model_and_more_of_it_goes_on(config, run, tmp_path):
    best = run.best_step
    patient = dataclasses.replace(config, output=tmp_path / "o", patience=2)
    stopped = finetune(patient, progress=False)
    lines = lines_of(patient.output)
    assert stopped.finished and stopped.stopped_by is None
    assert len(lines) == len(stopped.losses) < 6
    losses = [line["eval"]["loss"] for line in lines]
    assert min(losses[-2:]) >= min(losses[:-2]) == stopped.best_loss  # two in vain, and
    assert all(  # never two before
        min(losses[n - 2 : n]) < min(losses[: n - 2]) for n in range(3, len(losses))
    )
    assert without_speed(lines) == without_speed(lines_of(config.output)[: len(lines)])
    assert weights(patient.output) and stopped.exported_step == stopped.best_step
    if stopped.best_step == best:
        assert weights(patient.output) == weights(config.output)

    assert finetune(patient, progress=False) == stopped  # and takes no step
    longer = finetune(dataclasses.replace(patient, patience=None), progress=False)
    assert longer.losses == run.losses and weights(longer.output) == weights(config.output)


def stop_at(step, by):
    """A ``batch_at`` that sends this process a signal, or raises as a crash does."""
    batch_at = finetuning.batch_at

    def stopping(windows, number, **options):
        if number == step - 1:
            if by == "crash":
                raise KeyboardInterrupt
            os.kill(os.getpid(), by)
        return batch_at(windows, number, **options)

    return stopping


@pytest.mark.parametrize(("by", "at"), [("crash", 5), (signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_an_interrupted_run_decides_as_if_nothing_had_happened(config, run, tmp_path, monkeypatch, by, at):
    broken = dataclasses.replace(config, output=tmp_path / "o", checkpoint_every=3)
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "batch_at", stop_at(at, by))
        if by == "crash":
            with pytest.raises(KeyboardInterrupt):
                finetune(broken, progress=False)
        else:
            stopped = finetune(broken, progress=False)
            assert not stopped.finished and stopped.stopped_by == by and stopped.exported_step is None
            assert "eval" not in stopped.metrics  # a signal does not wait for it
            assert max(checkpoints(broken.output)) == at == len(stopped.losses)
    assert not (broken.output / "config.json").exists()
    resumed = finetune(broken, progress=False)
    assert dataclasses.replace(resumed, output=run.output, metrics={}) == dataclasses.replace(run, metrics={})
    assert without_speed(lines_of(broken.output)) == without_speed(lines_of(config.output))
    assert weights(broken.output) == weights(config.output)
    assert run.best_step in checkpoints(broken.output)


def test_a_signal_during_the_last_step_still_ends_in_a_model(config, tmp_path, monkeypatch):
    short = dataclasses.replace(config, output=tmp_path / "o", steps=2)
    monkeypatch.setattr(finetuning, "batch_at", stop_at(2, signal.SIGTERM))
    result = finetune(short, progress=False)
    assert result.finished and result.stopped_by is None and "eval" in result.metrics


def test_held_out_data_may_be_added_to_a_run_but_not_changed_or_left_away(config, run, text, tmp_path):
    with pytest.raises(ValueError, match="its eval_data had other content"):
        finetune(dataclasses.replace(config, eval_data=text[1:]), progress=False)
    alone = dataclasses.replace(config, eval_data=(), eval_every=None)
    with pytest.raises(ValueError, match="it had eval_data, here there are none"):
        finetune(alone, progress=False)
    added = dataclasses.replace(alone, output=tmp_path / "o", steps=2)
    finetune(added, progress=False)
    result = finetune(dataclasses.replace(config, output=added.output, steps=4), progress=False)
    lines = lines_of(added.output)
    assert [line["step"] for line in lines if "eval" in line] == [2, 3, 4]
    best = best_line(lines)
    assert result.losses == run.losses[:4] and best is not None and result.best_step == best["step"]


def test_a_best_checkpoint_that_is_gone_is_named(config, run, tmp_path):
    copied = dataclasses.replace(config, output=tmp_path / "o")
    shutil.copytree(config.output, copied.output)
    shutil.rmtree(copied.output / "checkpoints" / str(run.best_step))
    with pytest.raises(FileNotFoundError, match=f"of step {run.best_step}, .* is gone; export_last=True"):
        finetune(copied, progress=False)
    finetune(dataclasses.replace(copied, export_last=True), progress=False)


def test_a_loss_that_is_not_finite_is_null_and_never_the_best(config, held_out, tmp_path):
    windows = write_windows(
        [held_out],
        finetuning.load_tokenizer(config.model),
        tmp_path / "windows",
        context=64,
        eos_token_id=END,
        vocab_size=257,
        may_be_short=True,
    )
    state, split = load_start(config, extended_config(config, load_config(config.model)), mesh=None)
    measure = held_out_loss(config, split, None, open_windows(tmp_path / "windows"))
    assert len(windows) and measure(state)["loss"] > 0
    broken = state._replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    found = measure(broken)
    assert found["loss"] is None and found["perplexity"] is None and found["tokens"] > 0
    assert best_line([{"step": 1, "eval": found}]) is None


def test_samples_that_are_trained_on_are_warned_of_in_one_line(config, text, tmp_path, caplog):
    lines = write_lines(tmp_path / "b", [text[1].read_text(), "new"], ANSWERED)
    trained = write_lines(tmp_path / "c", DOCUMENTS, ANSWERED[:1])
    shared = dataclasses.replace(
        config, data=(*text, trained), eval_data=(lines,), output=tmp_path / "o", steps=1
    )
    with caplog.at_level(logging.WARNING, "jsparse"):
        finetune(shared, progress=False)
        finetune(dataclasses.replace(shared, steps=2), progress=False)  # only before the first step
    (message,) = [record.getMessage() for record in caplog.records]
    assert "2 of 4 samples of eval_data are in data too" in message

    caplog.clear()
    finetune(dataclasses.replace(config, output=tmp_path / "apart", steps=1), progress=False)
    assert not caplog.records


def test_a_run_that_gets_held_out_data_later_says_what_is_in_them(config, text, tmp_path, caplog, capsys):
    alone = dataclasses.replace(config, eval_data=(), eval_every=None, output=tmp_path / "o", steps=1)
    finetune(alone)
    assert "eval_data: " not in capsys.readouterr().err
    lines = write_lines(tmp_path / "held", [text[1].read_text(), "new"], ANSWERED)
    added = dataclasses.replace(config, eval_data=(lines,), output=alone.output, steps=2)
    with caplog.at_level(logging.WARNING, "jsparse"):
        finetune(added)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "1 of 4 samples of eval_data are in data too" in message
    told = capsys.readouterr().err.splitlines()
    assert any(line.startswith("eval_data: 4 samples, ") for line in told)
    assert not any(line.startswith("data: ") for line in told)  # they were described before the first step

    caplog.clear()
    finetune(dataclasses.replace(added, steps=3))
    assert not caplog.records and "eval_data: " not in capsys.readouterr().err


def test_processes_look_into_the_folder_before_the_first_makes_something_there(config, tmp_path, monkeypatch):
    """A slower process would find what a faster one has made, and wait for it in another place."""
    done, recorded = [], identity._recorded
    monkeypatch.setattr(finetuning, "wait_for_all", done.append)
    monkeypatch.setattr(identity, "_recorded", lambda output: done.append("look") or recorded(output))
    finetune(dataclasses.replace(config, output=tmp_path / "out", steps=1), progress=False)
    assert "look" in done[: done.index("run")] and "look" not in done[done.index("run") :]


def test_a_run_says_what_is_in_its_held_out_data_and_what_is_left_out(config, tmp_path, capsys):
    rows = [{"text": "held out", "id": 7}, {"text": 5}, {"prompt": "p", "completion": "c" * 200}]
    for name, some in (("a.jsonl", rows[:2]), ("b.jsonl", [*rows[2:], {"prompt": "p", "completion": "cc"}])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    finetune(
        dataclasses.replace(
            config,
            eval_data=(tmp_path / "a.jsonl", tmp_path / "b.jsonl"),
            bad_rows="skip",
            too_long="skip",
            output=tmp_path / "o",
            steps=1,
        )
    )
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eval_data: ")]
    assert told[0].endswith("a.jsonl: JSON lines, 1 document")
    assert told[1].endswith("b.jsonl: JSON lines, 2 prompts with completions")  # one is left out below
    assert told[2] == "eval_data: 2 samples, 13 tokens, 11 of them targets"  # with their two ends
    assert told[3] == "eval_data: fields not read, with their rows: id (1)"
    assert told[4].startswith("eval_data: 1 bad row left out: ") and 'a.jsonl, line 2: "text"' in told[4]
    assert told[5].startswith("eval_data: 1 row longer than the context left out: ")
    assert told[6].startswith("eval_data: first sample") and len(told) == 7


@pytest.mark.parametrize(
    ("eval_data", "error", "message"),
    [
        ("no.txt", FileNotFoundError, "eval_data: .*no.txt does not exist"),
        ("empty.txt", ValueError, "eval_data: .*empty.txt is empty"),
        ("held", ValueError, "eval_data: .*held/1.jsonl, line 1 has 72 tokens"),
    ],
)
def test_held_out_files_that_cannot_be_used_are_named_as_such(config, tmp_path, eval_data, error, message):
    (tmp_path / "empty.txt").write_text("")
    write_lines(tmp_path / "held", [], [("a" * 70, "b")])
    with pytest.raises(error, match=f"^{message}"):
        finetune(
            dataclasses.replace(config, eval_data=(tmp_path / eval_data,), output=tmp_path / "o"),
            progress=False,
        )
    assert not (tmp_path / "o").exists()


def test_errors_in_the_data_leave_nothing_of_the_held_out_data(config, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="^data: .*empty.txt is empty"):
        finetune(
            dataclasses.replace(config, data=(tmp_path / "empty.txt",), output=tmp_path / "o"), progress=False
        )
    assert not (tmp_path / "o").exists()


def test_data_without_a_target_is_refused(config, text, save_checkpoint, tmp_path):
    """With no token for the end, a text of one token has nothing to predict."""
    base = save_checkpoint(tmp_path / "base", eos_token_ids=())
    one = write_lines(tmp_path / "one", ["a"] * 64, [])
    for data, held, name in ((text, (one,), "eval_data"), ((one,), text, "data")):
        bad = dataclasses.replace(
            config, model=base, data=data, eval_data=held, output=tmp_path / "o", eval_every=None
        )
        with pytest.raises(
            ValueError, match=f"^{name}: in 1 window.* of context=64 tokens, none has a target"
        ):
            finetune(bad, progress=False)
        assert not bad.output.exists()
