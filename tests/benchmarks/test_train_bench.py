"""The benchmarks of training, in miniature: the files come out, and the numbers are what they say."""

import doctest
import json
from pathlib import Path
from typing import Any

import numpy as np
import pages
import pytest
from training import extension, learning_rates, train_step
from training.extension import ExtensionBench, bench_extension
from training.learning_rates import LearningRates, Row, bench_learning_rates
from training.train_step import TrainStepBench, bench_train_step

from jsparse.models import Llama
from jsparse.models.patterns import load_pattern
from jsparse.train import shifted_head_masks

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "layers": 1,
    "context": 32,
    "growth": 2,
    "row": 8,
    "base_steps": 2,
    "base_batch": 2,
    "steps": 2,
    "batch_size": 1,
    "documents": 8,
    "held_out_documents": 2,
}


@pytest.mark.parametrize(
    "module", [train_step, extension, learning_rates, pages], ids=lambda module: module.__name__
)
def test_docstrings(module):
    assert doctest.testmod(module).failed == 0


# Steps -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The step benchmark at one context of blocks enough that groups leave some out: (config, rows)."""
    output = tmp_path_factory.mktemp("steps") / "out"
    config = TrainStepBench(output=output, contexts=(512,), layers=1, heads=4, rounds=2)
    return config, bench_train_step(config)


def test_rows_of_steps_are_complete_and_read_back(measured):
    config, rows = measured
    assert [(row.attention, row.group_size) for row in rows] == [("full", None), ("shifted", 128)]
    for row in rows:
        assert len(row.step.rounds) == len(row.attention_part.rounds) == 2
        assert 0 < row.attention_part.least and 0 < row.step.least
    results = json.loads((config.output / "results.json").read_text())
    assert [row["step"]["median"] for row in results["rows"]] == [row.step.median for row in rows]
    assert results["machine"]["date"] and results["machine"]["flax"]
    assert (config.output / "train_step.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileExistsError, match="has files"):
        bench_train_step(config)


def test_ratios_of_steps_are_taken_within_a_round(measured):
    full, shifted = measured[1]
    for part in ("step", "attention_part"):
        times = [getattr(row, part).rounds for row in (full, shifted)]
        expected = np.median(np.divide(*times))
        name = {"step": "step_times_faster", "attention_part": "attention_times_faster"}[part]
        assert getattr(shifted, name) == pytest.approx(expected) and getattr(full, name) == 1


def test_flops_of_attention_are_those_of_the_blocks_counted_by_hand(measured):
    """In blocks of 128, causal attention has 4 + 3 + 2 + 1 of them. Groups of 128 are the diagonal; shifted
    by 64, they show each block of queries the one before it as well."""
    full, shifted = measured[1]
    block = (2 + 7) * 2 * 128 * 128 * 64  # products forward and backward
    assert full.attention_flops == 4 * 10 * block
    assert shifted.attention_flops == (2 * 4 + 2 * 7) * block
    assert full.step_flops - full.attention_flops == shifted.step_flops - shifted.attention_flops
    assert shifted.attention_times_fewer_flops == pytest.approx(40 / 22)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"contexts": ()}, "contexts must have at least one entry"),
        ({"contexts": (100,)}, "contexts has 100, not a multiple of 8"),
        ({"heads": 3}, "heads=3 must be even"),
        ({"rounds": 0}, "rounds must be an integer >= 1"),
    ],
)
def test_bad_settings_of_steps(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        TrainStepBench(output=tmp_path, **settings)


# Extension ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """The experiment with models too small to learn anything: (config, rows)."""
    folder = tmp_path_factory.mktemp("extension")
    config = ExtensionBench(output=folder / "out", models=folder / "models", seeds=(1,), **SMALL)
    return config, bench_extension(config)


def test_every_kind_is_trained_and_measured(extended):
    config, rows = extended
    assert [(row.model, row.measured_with, row.seed) for row in rows] == [
        ("base", "full", None),
        ("extended", "full", None),
        ("full", "full", 1),
        ("shifted", "full", 1),
        ("shifted", "pattern", 1),
        ("grouped", "full", 1),
        ("grouped", "pattern", 1),
    ]
    assert config.contexts == [32, 64]
    results = json.loads((config.output / "results.json").read_text())
    assert [tuple(row["perplexity"]) for row in results["rows"]] == [row.perplexity for row in rows]
    assert results["group_size"] == 16
    assert sorted(file.name for file in config.output.iterdir()) == ["extension.png", "results.json"]
    assert (config.output / "extension.png").read_bytes().startswith(b"\x89PNG")


def test_runs_differ_in_the_attention_alone(extended):
    config, _ = extended
    patterns = {kind: load_pattern(config.models / f"{kind}-1") for kind in extension.KINDS}
    assert {kind: pattern.kind for kind, pattern in patterns.items()} == {k: k for k in extension.KINDS}
    assert patterns["shifted"].layers[0] == shifted_head_masks(4, 16)
    assert len(set(patterns["grouped"].layers[0])) == 1


def test_perplexity_is_that_of_the_saved_model_and_its_pattern(extended):
    config, rows = extended
    documents = extension.make_documents(config, 2, "test")
    rows_of_text = np.stack([[*document.encode(), 256] for document in documents])
    model = Llama.from_pretrained(config.models / "shifted-1")
    of = {(row.model, row.measured_with): row.perplexity for row in rows}
    for measured_with, mask in (("full", None), ("pattern", shifted_head_masks(4, 16))):
        logits = np.asarray(model(rows_of_text.astype(np.int32), mask=mask), np.float64)[:, :-1]
        picked = np.take_along_axis(logits, rows_of_text[:, 1:, None], axis=-1)[..., 0]
        nll = np.log(np.exp(logits).sum(-1)) - picked
        assert of["shifted", measured_with][-1] == pytest.approx(np.exp(nll.mean()), rel=1e-5)


def test_documents_fill_a_window_and_repeat_the_row_above(tmp_path):
    config = ExtensionBench(output=tmp_path)
    texts = {which: list(extension.make_documents(config, 3, which)) for which in ("train", "dev", "test")}
    every = [text for of_it in texts.values() for text in of_it]
    assert {len(text) for text in every} == {2047} and len(set(every)) == 9
    for text in every:
        repeated = np.mean([letter == above for letter, above in zip(text[64:], text, strict=False)])
        assert abs(repeated - (0.8 + 0.2 / 52)) < 0.04  # 4.5 standard deviations
        assert len(set(text)) == 52
    assert texts["dev"] == list(extension.make_documents(config, 3, "dev"))


@pytest.mark.parametrize("group", [None, 512])
def test_expected_perplexity_is_that_of_a_predictor_that_knows_the_rule(tmp_path, group):
    """Likelihoods letter by letter, of the next one after each query that sees the row above in its group."""
    config = ExtensionBench(output=tmp_path)
    nll = []
    for text in extension.make_documents(config, 40, "dev"):
        for query in range(2046):
            target = query + 1
            if query % (group or 2048) >= 63:
                nll.append(-np.log(0.8 * (text[target] == text[target - 64]) + 0.2 / 52))
            else:
                nll.append(np.log(52))
    assert np.mean(nll) == pytest.approx(np.log(extension.expected_perplexity(config, 2048, group)), abs=0.02)


def test_the_table_has_means_and_the_range_over_the_seeds():
    config = ExtensionBench(output=Path("unused"), growth=2)
    rows = [extension.Row("grouped", "pattern", seed, (5.0, 4.0 + seed)) for seed in (0, 1)]
    *_, measured, window, group = extension.markdown(config, rows).splitlines()
    assert measured == "| groups without the shift, measured with the same | 5.000 | 4.500 (4.000–5.000) |"
    assert window.startswith("| *expected by one that knows the rule and sees its window* | 6.8")
    assert group.startswith("| *expected by one that knows the rule and sees its group* | 13.")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"growth": 1}, "growth=1 must be at least 2"),
        ({"seeds": ()}, "seeds must have at least one entry"),
        ({"group_ratio": 0.3}, r"group_size=19 \(0.3 of the context\) does not fit context=64"),
        ({"row": 17}, "row=17 must be at most half of context=32"),
        ({"documents": 0}, "documents must be an integer >= 1"),
    ],
)
def test_bad_settings_of_the_extension(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        ExtensionBench(**{"output": tmp_path} | SMALL | settings)


# Learning rates ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rates(tmp_path_factory, save_tiny_model):
    """The experiment with a tiny model, which learns with one of the rates: (config, before, rows)."""
    folder = tmp_path_factory.mktemp("rates")
    save_tiny_model(folder / "model", eos_token_ids=(256,))
    config = LearningRates(
        output=folder / "out",
        model=folder / "model",
        rates=(1e-12, 1e-2),
        seeds=(1,),
        context=32,
        steps=12,
        batch_size=2,
        lora_rank=2,
        held_out_windows=4,
    )
    return config, *bench_learning_rates(config)


def test_every_kind_is_trained_with_every_rate(rates):
    config, before, rows = rates
    kinds = list(learning_rates.KINDS)
    assert [(row.trained, row.learning_rate) for row in rows] == [(k, r) for r in config.rates for k in kinds]
    for row in rows:
        if row.learning_rate == 1e-12:
            assert row.loss == pytest.approx(before, abs=1e-5)
        else:
            assert row.loss < before - 1e-3
    results = json.loads((config.output / "results.json").read_text())
    assert [Row(**row) for row in results["rows"]] == rows and results["before"] == before
    assert results["machine"]["date"] and results["machine"]["optax"]
    assert (config.output / "learning_rates.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileExistsError, match="has files"):
        bench_learning_rates(config)


def test_the_loss_before_is_that_of_the_documents_held_out(rates):
    config, before, _ = rates
    text = learning_rates.make_documents()[1][0].encode()[: 4 * 32]
    windows = np.frombuffer(text, np.uint8).reshape(4, 32).astype(np.int32)
    logits = np.asarray(Llama.from_pretrained(config.model)(windows), np.float64)[:, :-1]
    picked = np.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
    assert before == pytest.approx((np.log(np.exp(logits).sum(-1)) - picked).mean(), rel=1e-5)


def test_runs_differ_in_what_is_trained(rates):
    config, _, _ = rates
    runs = [config.run(Path("out"), kind, 1e-3, 1) for kind in learning_rates.KINDS]
    assert [(run.lora_rank, run.train_embeddings_and_norms) for run in runs] == [
        (2, False),
        (2, True),
        (None, True),
    ]
    assert len({run.output for run in runs}) == 3


def test_no_paragraph_is_in_two_documents():
    long = ["a " * 300, "b " * 300, "c " * 300]
    texts = {"one": "\n\n".join(long[:2]), "three": long[2], "two": "\n\n".join([long[1], "short"])}
    assert learning_rates.make_documents(texts | {"debugger": "d " * 300}) == (
        [long[2]],
        ["\n\n".join(long[:2])],
    )
    train, held_out = ({p for t in part for p in t.split("\n\n")} for part in learning_rates.make_documents())
    assert len(train) > 1000 and not train & held_out


def test_a_run_that_breaks_down_has_no_loss(rates, monkeypatch):
    def fail(run):
        raise FloatingPointError("step 3: loss is nan")

    config, _, _ = rates
    monkeypatch.setattr(learning_rates, "finetune", fail)
    run = config.run(Path("out"), "LoRA", 1e-3, 1)
    assert learning_rates.trained_loss(config, run, np.arange(64)) is None


def test_the_table_of_rates_has_means_and_the_best_in_bold():
    rows = [
        Row(kind, rate, seed, None if rate == 1 and seed else 2.0 + seed + rate)
        for seed in (0, 1)
        for rate in (0.1, 0.5, 1)
        for kind in learning_rates.KINDS
    ]
    *_, before, best, second, broken = learning_rates.markdown(4.0, rows).splitlines()
    assert before == "| *before training* | 4.000 | 4.000 | 4.000 |"
    assert best == "| 0.1 |" + 3 * " **2.600** (2.100–3.100) |"
    assert second == "| 0.5 |" + 3 * " 3.000 (2.500–3.500) |"
    assert broken == "| 1 |" + 3 * " not finite |"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rates": ()}, "rates must have at least one entry"),
        ({"rates": (0.0,)}, "learning_rate must be a number > 0"),
        ({"seeds": ()}, "seeds must have at least one entry"),
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"held_out_windows": 0}, "held_out_windows must be an integer >= 1"),
    ],
)
def test_bad_settings_of_the_rates(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        LearningRates(output=tmp_path, **settings)


# Pages -------------------------------------------------------------------------------------------------


def test_the_pages_are_what_the_command_writes():
    for page, sections in pages.pages().items():
        text = (pages.PAGES / page).read_text(encoding="utf-8")
        assert pages.with_sections(text, sections) == text, f"python benchmarks/pages.py changes {page}"


def test_tables_have_the_numbers_of_the_files():
    written = pages.pages()
    assert "| lserve | 80.8 (75.4–85.3) | 92.1 (88.0–94.9) |" in written["scoreboard.md"]["recall"]
    assert "| 128k | 192.5 | 6.2 | 65.3 | 8.9 | 21.7 | 53.5 | 0.64 |" in written["decode_cpu.md"]["times"]
    assert "| int4 pages | 128 | 32 | 64 | 224 |  |" in written["decode_cpu.md"]["bytes"]
    assert "| 16k | 21.38 | 9.61 | 2.36 | 2.34 |" in written["training.md"]["step"]
    assert (
        "| 0.006 | **3.260** (3.259–3.262) | **3.199** (3.193–3.205) | 3.412"
        in written["training.md"]["rates"]
    )
    assert "| 70B | 32,768 | 70.4 | 70.7 | 113,049 | 29.5% |" in written["training.md"]["claims"]
