"""``jsparse merge``: what a run has learned, as a model and as an adapter."""

import importlib.util
import json
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from flax import nnx

from jsparse.__main__ import main
from jsparse.models import Llama, LlamaConfig, byte_tokenizer, load_adapter, load_config, load_tokenizer
from jsparse.models.patterns import load_pattern
from jsparse.train import FinetuneConfig, MergeConfig, finetune, merge
from jsparse.train.data.windows import write_windows

TOKENS = np.random.default_rng(0).integers(0, 257, (2, 64)).astype(np.int32)


@pytest.fixture(scope="module")
def config(base, text, tmp_path_factory):
    return FinetuneConfig(
        model=base,
        data=text,
        output=tmp_path_factory.mktemp("export") / "run",
        context=64,
        rope="yarn",
        lora_rank=2,
        lora_targets=("q_proj", "layers.0.mlp.*"),
        steps=3,
        batch_size=2,
        learning_rate=1e-2,
        warmup_steps=0,
        checkpoint_every=2,
    )


@pytest.fixture(scope="module")
def run(config):
    return finetune(config, progress=False).output


def logits(model):
    return np.asarray(jax.jit(lambda: model(TOKENS))())


def test_the_last_checkpoint_merges_into_the_runs_own_model(run, tmp_path):
    assert merge(MergeConfig(run=run, output=tmp_path / "merged")) == 3
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {path.name for path in run.iterdir()} - {"checkpoints", "metrics.jsonl", "run.yaml"}
    for name in names:
        assert (tmp_path / "merged" / name).read_bytes() == (run / name).read_bytes()


def test_an_earlier_checkpoint_by_the_command_line(run, tmp_path, capsys):
    assert main(["merge", "--run", str(run), "--output", str(tmp_path / "two"), "--step", "2"]) == 0
    assert "model of step 2" in capsys.readouterr().out
    earlier, last = Llama.from_pretrained(tmp_path / "two"), Llama.from_pretrained(run)
    assert earlier.config == last.config and earlier.config.rope.kind == "yarn"
    assert not np.array_equal(earlier.norm.scale[...], last.norm.scale[...])
    assert load_pattern(tmp_path / "two") == load_pattern(run)


def test_the_adapter_gives_the_base_the_same_logits(config, run, tmp_path):
    merge(MergeConfig(run=run, output=tmp_path / "adapter", adapter=True))
    assert (tmp_path / "adapter" / "tokenizer.json").is_file()
    model = Llama.from_pretrained(config.model)
    load_adapter(model, tmp_path / "adapter")
    np.testing.assert_allclose(logits(model), logits(Llama.from_pretrained(run)), atol=2e-5)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch and transformers")
def test_transformers_reads_the_merged_model_to_the_same_logits(run):
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(logits(Llama.from_pretrained(run)), expected, atol=1e-4)


def test_an_adapter_merges_into_the_base_that_it_names(
    config, run, hub_cache, store_snapshot, tmp_path, capsys, monkeypatch
):
    commit = "a" * 40
    merge(MergeConfig(run=run, output=tmp_path / "adapter", adapter=True))
    settings = tmp_path / "adapter" / "adapter_config.json"
    (tmp_path / "adapter" / "tokenizer.json").unlink()  # then the base's is copied

    def rename(**fields):
        settings.write_text(json.dumps(json.loads(settings.read_text()) | fields))

    def merged(name, *options, adapter=str(tmp_path / "adapter"), code=0):
        options = ["--run", adapter, "--output", str(tmp_path / name), *options]
        assert main(["merge", *options]) == code
        out, err = capsys.readouterr()
        if code == 0:
            assert out == f"{tmp_path / name}: the model of the adapter and its base\n"
            model = Llama.from_pretrained(tmp_path / name)
            np.testing.assert_allclose(logits(model), logits(Llama.from_pretrained(run)), atol=2e-5)
            assert model.config.rope.kind == "yarn" and (tmp_path / name / "tokenizer.json").is_file()
        else:
            assert not (tmp_path / name).exists() and err.count("\n") == 1
        return err

    merged("of a folder")
    of_base, of_adapter = (
        {file.name: file.read_bytes() for file in folder.iterdir()}
        for folder in (Path(config.model), tmp_path / "adapter")
    )
    store_snapshot(hub_cache, "org/name", commit, of_base, main="b" * 40)
    store_snapshot(hub_cache, "org/adapter", commit, of_adapter, main=commit)
    rename(base_model_name_or_path="org/name", revision=commit)
    merged("of an id")
    merged("by id", adapter="org/adapter")
    rename(base_model_name_or_path="./nowhere", revision=None)
    err = merged("new", code=2)
    assert "./nowhere does not exist" in err and f"{settings} names it as the base" in err
    merged("of another folder", "--model", str(config.model))
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["its own"])
    tokenizer.save(str(tmp_path / "adapter" / "tokenizer.json"))
    merged("with its own tokenizer", "--model", str(config.model))
    assert load_tokenizer(tmp_path / "with its own tokenizer").token_to_id("its own") is not None
    rename(base_model_name_or_path=None)
    assert f"{settings} names no base: --model must" in merged("new", code=2)
    assert "step=2 is of a run's checkpoints" in merged("new", "--step", "2", code=2)
    assert "is an adapter already" in merged("new", "--adapter", code=2)


def test_what_cannot_be_merged(config, run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 1; it has steps \[2, 3\]"):
        merge(MergeConfig(run=run, output=tmp_path / "new", step=1))
    with pytest.raises(FileNotFoundError, match="has no checkpoint; it has steps"):
        merge(MergeConfig(run=config.model, output=tmp_path / "new"))
    with pytest.raises(FileExistsError, match="choose a new folder"):
        merge(MergeConfig(run=run, output=run))
    other = Llama.from_pretrained(config.model)
    other.norm.scale[...] = other.norm.scale[...] + 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has other content than the model that the run"):
        merge(MergeConfig(run=run, output=tmp_path / "new", model=tmp_path / "other"))
    assert not (tmp_path / "new").exists()


def test_completions_end_with_the_tokenizers_end_token_and_the_model_stops_there(tmp_path):
    """Llama 3 Instruct stops at the base model's end token too, which comes first."""
    base = tmp_path / "base"
    model = Llama(LlamaConfig.tiny(vocab_size=258, eos_token_ids=(256,)), rngs=nnx.Rngs(0))
    model.save_pretrained(base)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|eot|>"])  # 257
    tokenizer.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text('{"eos_token": "<|eot|>"}')
    data = tmp_path / "chat.jsonl"
    data.write_text('{"prompt": "2+2?", "completion": "4"}\n' * 30)
    config = FinetuneConfig(
        model=base, data=[data], output=tmp_path / "out", context=64, steps=1, batch_size=1
    )
    with mock.patch("jsparse.train.finetuning.write_windows", wraps=write_windows) as write:
        finetune(config, progress=False)
    assert write.call_args.kwargs["eos_token_id"] == 257
    assert load_config(tmp_path / "out").eos_token_ids == (256, 257)
