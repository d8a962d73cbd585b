"""Both demos from end to end, in miniature: everything happens, and the numbers are what they say."""

import json
import math
from typing import Any

import numpy as np
import pytest

import jsparse
from jsparse.__main__ import main
from jsparse.evaluate.compare import difference
from jsparse.examples.demo import DemoConfig, prepare_output, run_demo
from jsparse.examples.shipped import ShippedDemoConfig, run_shipped_demo
from jsparse.models import Llama
from jsparse.serve import CacheConfig, decode_logits
from jsparse.texts.corpus import standard_library_files


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo of a model too small to learn anything: (config, results)."""
    config = DemoConfig(
        output=tmp_path_factory.mktemp("demo") / "out",
        hidden_size=32,
        layers=2,
        context=32,
        base_steps=4,
        extension_steps=2,
        batch_tokens=128,
        evaluation_tokens=512,
        prompt_tokens=100,
        new_tokens=20,
        budget=64,
        window=32,
    )
    return config, run_demo(config)


@pytest.mark.slow
def test_results_are_complete(demo):
    config, results = demo
    assert results["contexts"] == [32, 64, 128]
    assert len(results["perplexity"]) == 4
    for row in results["perplexity"].values():
        assert len(row) == 3 and all(1 < value < 2 * 257 for value in row)
    dense, pages, both = results["generation"].values()
    assert dense["max_difference"] == 0 and dense["same_top_token"] == 1
    assert pages["max_difference"] > 0 and both["max_difference"] > 0
    for row in (dense, pages, both):
        assert row["tokens_per_second"] > 0 and len(row["kl"]) == 4 * config.new_tokens
        assert all(math.isfinite(value) for value in row["kl"])
    assert (
        both["cache_bytes"] < dense["cache_bytes"] < pages["cache_bytes"]
    )  # pages keep the bounds of their keys too


@pytest.mark.slow
def test_the_output_folder_holds_what_it_says(demo):
    config, results = demo
    assert json.loads((config.output / "demo.json").read_text()) == results
    assert (config.output / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert Llama.from_pretrained(config.output / "base").config.max_position_embeddings == 32
    extended = Llama.from_pretrained(config.output / "long").config
    assert (extended.max_position_embeddings, extended.rope.kind, extended.rope.factor) == (
        128,
        "linear",
        4.0,
    )


@pytest.mark.slow
def test_forced_logits_are_the_models(demo):
    config, _ = demo
    model = Llama.from_pretrained(config.output / "long")
    tokens = np.arange(70, dtype=np.int32) % 50
    cache = CacheConfig(budget=None, page_size=32, prefill_chunk=32)
    logits = decode_logits(model, tokens[:40], tokens[40:], cache)
    np.testing.assert_allclose(logits, model(tokens[None])[0, 40:], atol=1e-4)
    found = difference(logits, logits)
    assert found["max_difference"] == 0 and found["mean_kl"] == 0


@pytest.mark.slow
def test_a_second_run_replaces_the_first_and_nothing_else(demo, tmp_path):
    config, _ = demo
    copy = tmp_path / "again"
    copy.mkdir()
    (copy / "demo.json").write_text("{}")
    (copy / "base").mkdir()
    prepare_output(copy)
    assert [file.name for file in copy.iterdir()] == ["demo.json"]

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="output: .* no earlier demo wrote it"):
        prepare_output(mine)
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_the_text_is_deterministic_and_disjoint():
    train, held_out = standard_library_files()
    assert standard_library_files() == (train, held_out)
    assert len(held_out) >= 4 and not set(train) & set(held_out)
    assert {file.suffix for file in train + held_out} == {".py"}


def test_a_prompt_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="prompt_tokens=1000 and new_tokens=96 do not fit 1024"):
        DemoConfig(prompt_tokens=1000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_tiny_model):
    """A tiny checkpoint of 512 positions with a head pattern, in the place of the shipped one."""
    folder = tmp_path_factory.mktemp("shipped")
    save_tiny_model(folder, num_hidden_layers=1, max_position_embeddings=512)
    jsparse.HeadPattern([[0.1, 0.9]]).save(folder / "full_attention_heads.tsv")
    return folder


SMALL: dict[str, Any] = {
    "evaluation_tokens": 1024,
    "prompt_tokens": 300,
    "new_tokens": 10,
    "budget": 128,
    "samples": 1,
}


@pytest.mark.slow
def test_the_shipped_model_is_measured(folder, tmp_path, capsys):
    output = tmp_path / "out"
    results = run_shipped_demo(ShippedDemoConfig(model=folder, output=output, **SMALL))
    assert json.loads((output / "demo.json").read_text()) == results
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert results["contexts"] == [128, 256, 512] and len(results["perplexity"]) == 3
    for row in results["perplexity"].values():
        assert len(row) == 3 and all(1 < value < 2 * 257 for value in row)

    methods = ["dense", "streaming", "lserve", "lserve-heads"]
    assert list(results["generation"]) == methods
    assert results["generation"]["dense"]["max_difference"] == 0
    for method in methods[1:]:
        assert results["generation"][method]["max_difference"] > 0
    assert [(row["task"], row["method"]) for row in results["recall"]] == [
        (task, method) for task in ("needle", "recall") for method in methods
    ]
    assert {row["budget"] for row in results["recall"]} == {None, 128}
    out = capsys.readouterr().out
    assert "held-out modules" in out and "Found in texts of 512 tokens" in out and "lserve-heads:" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 100}, "budget=100 must be a multiple of 64, the tokens of a page, and 128 at least"),
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"prompt_tokens": 510}, "prompt_tokens=510 and new_tokens=10 do not fit the model's 512 positions"),
    ],
)
def test_what_does_not_fit_the_shipped_model_is_refused(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_shipped_demo(ShippedDemoConfig(model=folder, output=tmp_path / "new", **(SMALL | changes)))
    assert not (tmp_path / "new").exists()


def test_train_says_which_demo_runs(monkeypatch, capsys, tmp_path):
    ran = []
    monkeypatch.setattr("jsparse.examples.demo.run_demo", ran.append)
    monkeypatch.setattr("jsparse.examples.shipped.run_shipped_demo", ran.append)
    assert main(["demo"]) == 0
    assert main(["demo", "--layers", "2", "--train", "--output", str(tmp_path)]) == 0
    assert ran == [ShippedDemoConfig(), DemoConfig(layers=2, output=tmp_path)]
    with pytest.raises(SystemExit):
        main(["demo", "--train", "--help"])
    assert "usage: jsparse demo --train" in capsys.readouterr().out
