"""``jsparse merge``: what a run has learned, as a model and as an adapter."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from flax import nnx

from jsparse.__main__ import main
from jsparse.models import Llama, LlamaConfig, byte_tokenizer, load_adapter, load_config, load_tokenizer
from jsparse.models.patterns import load_pattern
from jsparse.texts.chat_template import load_chat_template
from jsparse.texts.documents import read_samples
from jsparse.train import FinetuneConfig, MergeConfig, finetune, merge
from jsparse.train.data.windows import write_windows
from jsparse.train.export import loading_advice

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


def test_a_base_that_is_gone_can_be_named(config, run, tmp_path):
    moved = config.model.rename(config.model.with_name("moved"))
    try:
        with pytest.raises(
            FileNotFoundError, match=f"does not exist.*{run} began with it; --model says where"
        ):
            merge(MergeConfig(run=run, output=tmp_path / "new"))
        with pytest.raises(FileNotFoundError, match="nowhere does not exist") as error:
            merge(MergeConfig(run=run, output=tmp_path / "new", model=tmp_path / "nowhere"))
        assert "--model" not in str(error.value)
        assert merge(MergeConfig(run=run, output=tmp_path / "new", model=moved)) == 3
    finally:
        moved.rename(config.model)


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
    with mock.patch("jsparse.train.data.run_data.write_windows", wraps=write_windows) as write:
        finetune(config, progress=False)
    assert write.call_args.kwargs["eos_token_id"] == 257
    assert load_config(tmp_path / "out").eos_token_ids == (256, 257)


def test_a_base_model_that_learned_the_plain_form_brings_it_as_its_template(base, text, tmp_path):
    data = tmp_path / "alpaca.json"
    data.write_text(json.dumps([{"instruction": f"Add {n} and 1.", "output": str(n + 1)} for n in range(9)]))
    config = FinetuneConfig(
        model=base, data=[data], output=tmp_path / "out", context=64, steps=1, batch_size=1, lora_rank=2
    )
    finetune(config, progress=False)
    for name, adapter in (("merged", False), ("adapter", True)):
        merge(MergeConfig(run=config.output, output=tmp_path / name, adapter=adapter))
    trained = next(read_samples([data], load_tokenizer(base), eos_token_id=256, vocab_size=257))
    for folder in (config.output, tmp_path / "merged", tmp_path / "adapter"):
        served = load_chat_template(folder).encode([{"role": "user", "content": "Add 0 and 1."}])
        assert served == trained.tokens[: trained.prompt_tokens].tolist()
    documents = dataclasses.replace(config, data=text, output=tmp_path / "documents")
    finetune(documents, progress=False)
    assert not (documents.output_folder / "chat_template.jinja").exists()


FAMILY = """tokenizer.model added_tokens.json vocab.json merges.txt special_tokens_map.json tekken.json
chat_template.jinja additional_chat_templates/rag.jinja LICENSE USE_POLICY.md""".split()
READ = ("added_tokens.json", "special_tokens_map.json")
GENERATION = {
    "_from_model_config": False,
    "bos_token_id": 7,
    "do_sample": True,
    "eos_token_id": 256,
    "pad_token_id": 255,
    "temperature": 0.6,
    "top_p": 0.9,
    "repetition_penalty": 1.05,
    "custom": [1],
}


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "checkpoints" not in path.parts
    }


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """A base with every kind of file, whose tokenizer ends texts with a token that the model does not."""
    base = tmp_path_factory.mktemp("instruct")
    fields = {"vocab_size": 258, "eos_token_ids": (256,), "bos_token_id": 1}
    Llama(LlamaConfig.tiny(**fields), rngs=nnx.Rngs(0)).save_pretrained(base)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|eot|>"])  # 257
    tokenizer.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text('{"eos_token": "<|eot|>"}')
    (base / "generation_config.json").write_text(json.dumps(GENERATION))
    (base / "README.md").write_text("of the base")
    (base / "additional_chat_templates").mkdir()
    for name in FAMILY:
        (base / name).write_text("{}" if name in READ else f"the base's {name}")
    return base


@pytest.fixture(scope="module")
def instruct_run(instruct, tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "text.txt"
    data.write_text("some words in a line\n" * 40)
    output = tmp_path_factory.mktemp("instruct run") / "out"
    config = FinetuneConfig(
        model=instruct,
        data=[data],
        output=output,
        context=64,
        lora_rank=1,
        steps=1,
        batch_size=1,
        learning_rate=1e-2,
        warmup_steps=0,
    )
    return finetune(config, progress=False).output


def test_what_is_exported_has_every_file_of_the_base(instruct, instruct_run, tmp_path):
    merge(MergeConfig(run=instruct_run, output=tmp_path / "model"))
    merge(MergeConfig(run=instruct_run, output=tmp_path / "adapter", adapter=True))
    merge(MergeConfig(run=tmp_path / "adapter", output=tmp_path / "again"))
    shutil.copytree(tmp_path / "adapter", tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()  # so the base's tokenizer is taken
    merge(MergeConfig(run=tmp_path / "bare", output=tmp_path / "bare again"))
    shutil.copytree(tmp_path / "adapter", tmp_path / "plain")
    (tmp_path / "plain" / "config.json").unlink()  # PEFT writes none
    merge(MergeConfig(run=tmp_path / "plain", output=tmp_path / "plain again"))
    weights = {"config.json", "model.safetensors", "README.md"}
    expected = {name: content for name, content in files_of(instruct).items() if name not in weights}
    del expected["generation_config.json"]
    for folder in (
        instruct_run,
        *(tmp_path / name for name in ("model", "adapter", "again", "bare again", "plain again")),
    ):
        found = files_of(folder)
        assert {name: found.get(name) for name in expected} == expected, folder
        assert "README.md" not in found
        generation = json.loads(found["generation_config.json"])
        assert generation == GENERATION | {"eos_token_id": [256, 257]}, folder
        assert load_config(folder).eos_token_ids == (256, 257)


def test_several_adapters_by_weight(config, run, instruct, instruct_run, tmp_path, capsys):
    def merged(*options, runs=("one", "two"), code=0) -> Any:
        paths = [str(tmp_path / name) for name in runs]
        output = tmp_path / "_".join(options)
        assert main(["merge", "--run", *paths, "--output", str(output), *options]) == code
        out, err = capsys.readouterr()
        assert (out == f"{output}: the model of 2 adapters and their base\n") == (code == 0)
        assert output.exists() == (code == 0)
        return Llama.from_pretrained(output) if code == 0 else err

    for name, step in (("one", 2), ("two", 3)):
        merge(MergeConfig(run=run, output=tmp_path / name, adapter=True, step=step))
    last = Llama.from_pretrained(run)
    whole = merged("--weights", "0.25", "0.75", runs=("two", "two"))
    assert whole.config == last.config
    np.testing.assert_allclose(logits(whole), logits(last), atol=2e-5)
    mixed = merged("--weights", "-0.5", "1.5")
    earlier = [Llama.from_pretrained(config.model) for _ in range(2)]
    for model, name in zip(earlier, ("one", "two"), strict=True):
        load_adapter(model, tmp_path / name)
    scales = [np.asarray(model.norm.scale[...]) for model in earlier]
    np.testing.assert_allclose(mixed.norm.scale[...], -0.5 * scales[0] + 1.5 * scales[1], atol=1e-6)
    assert not np.allclose(logits(mixed), logits(last), atol=1e-3)

    for weights, message in (
        (None, r"weights must have one number for each run, which are 2, not \[\]"),
        ([1.0], r"which are 2, not \[1.0\]"),
        ([1.0, float("nan")], "weights must be finite numbers, not nan"),
    ):
        with pytest.raises(ValueError, match=message):
            MergeConfig(run=("one", "two"), output="new", weights=weights)
    err = merged("--weights", "1", "1", runs=("one", "nowhere"), code=2)
    assert f"run={tmp_path / 'nowhere'} has no adapter_config.json" in err
    assert "several runs are adapters already" in merged("--weights", "1", "1", "--adapter", code=2)
    merge(MergeConfig(run=instruct_run, output=tmp_path / "other", adapter=True))
    err = merged("--weights", "1", "1", runs=("one", "other"), code=2)
    assert (
        f"{tmp_path / 'one'} is an adapter of {config.model}, and {tmp_path / 'other'} of {instruct}" in err
    )
    shutil.copytree(tmp_path / "one", tmp_path / "more tokens")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["its own"])
    tokenizer.save(str(tmp_path / "more tokens" / "tokenizer.json"))
    err = merged("--weights", "1", "1", runs=("one", "more tokens"), code=2)
    assert f"tokenizers of {tmp_path / 'one'} and {tmp_path / 'more tokens'} have different tokens" in err
    shutil.copytree(tmp_path / "one", tmp_path / "plain")
    (tmp_path / "plain" / "config.json").unlink()  # as PEFT writes it, trained with the base's RoPE
    err = merged("--weights", "1", "1", runs=("one", "plain"), code=2)
    assert "trained with one RoPE, but" in err and str(tmp_path / "one") in err and "/plain has" in err


def test_chat_templates_that_differ_among_adapters(run, tmp_path, capsys):
    """The first adapter that brings a template decides, and a note says so if another has a different one."""
    folders = {}
    for name, template in (("bare", None), ("a", "A"), ("b", "B"), ("a too", "A")):
        folder = folders[name] = tmp_path / name
        merge(MergeConfig(run=run, output=folder, adapter=True))
        if name == "a too":  # in another file, which transformers reads too
            (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        elif template is not None:
            (folder / "chat_template.jinja").write_text(template)

    def merged(*names):
        paths, output = [folders[name] for name in names], tmp_path / " and ".join(names)
        options = ["--weights", *["0.5"] * len(paths)]
        assert main(["merge", "--run", *map(str, paths), "--output", str(output), *options]) == 0
        template = load_chat_template(output).render([{"role": "user", "content": "Hi"}])
        return template, [line for line in capsys.readouterr().err.splitlines() if "chat template" in line]

    for names, template in ((("a", "b"), "A"), (("b", "a"), "B"), (("bare", "b", "a too", "a"), "B")):
        found, notes = merged(*names)
        first, other = [folders[name] for name in names if name != "bare"][:2]
        assert found == template
        assert len(notes) == 1 and notes[0].endswith(
            f"{first} and {other} have different chat templates; the model gets that of {first}, which comes "
            "first"
        ), notes
    assert merged("a", "a too") == ("A", [])
    assert merged("bare", "a") == ("A", [])


def test_how_to_load_an_extended_rope_in_transformers(
    config, run, instruct_run, hub_cache, store_snapshot, tmp_path, capsys
):
    def merged(run, name, *options):
        output = str(tmp_path / name)
        assert main(["merge", "--run", str(run), "--output", output, *options]) == 0
        return output, *capsys.readouterr()

    adapter, out, err = merged(run, "adapter", "--adapter")
    lines = out.splitlines()
    assert lines[2:] == [
        f"  config = AutoConfig.from_pretrained({adapter!r})",
        f"  base = AutoModelForCausalLM.from_pretrained({str(config.model)!r}, config=config)",
        f"  model = PeftModel.from_pretrained(base, {adapter!r})",
    ]
    assert "its RoPE is extended, and PEFT has no place for that" in lines[1] and err == ""
    for source in (run, adapter):
        model, out, err = merged(source, f"model of {Path(source).name}")
        assert len(out.splitlines()) == 1
        assert f"from_pretrained({model!r}) needs nothing else: config.json has it" in err
    for options in ((), ("--adapter",)):  # within the base's own context
        _, out, err = merged(instruct_run, f"short{options}", *options)
        assert "RoPE" not in out + err and len(out.splitlines()) == 1

    commit = "c" * 40
    files = {file.name: file.read_bytes() for file in Path(config.model).iterdir()}
    store_snapshot(hub_cache, "org/name", commit, files, main=commit)
    advice = loading_advice(tmp_path / "adapter", f"org/name@{commit}")
    assert advice is not None
    assert f"from_pretrained('org/name', revision='{commit}', config=config)" in advice
