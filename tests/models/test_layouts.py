"""The layouts and names in which weights are found, and downloads that are no weights."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from jsparse.models import Llama

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def saved(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def tied(tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, tie_word_embeddings=True)
    Llama(config, rngs=nnx.Rngs(0)).save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def edit(folder, change):
    tensors = safetensors.numpy.load_file(folder / SINGLE)
    safetensors.numpy.save_file(change(tensors), folder / SINGLE)


def set_fields(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def parameters(folder):
    state = nnx.to_flat_state(nnx.state(Llama.from_pretrained(folder)))
    return {path: np.asarray(variable[...]) for path, variable in state}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[path], theirs[path]) for path in ours)


def refused(folder, error, *names):
    with pytest.raises(error) as caught:
        Llama.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    for name in names:
        assert name in str(caught.value)


# Names


def rename(old, new):
    return lambda tensors: {new + name.removeprefix(old): tensor for name, tensor in tensors.items()}


def test_a_tied_embedding_may_be_stored_as_the_head(tied):
    before = parameters(tied)
    edit(
        tied, lambda t: {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in t.items()}
    )
    assert "lm_head.weight" in safetensors.numpy.load_file(tied / SINGLE)
    assert_equal(parameters(tied), before)


def test_an_untied_embedding_may_not(saved):
    edit(saved, lambda t: {name: tensor for name, tensor in t.items() if "embed_tokens" not in name})
    refused(saved, ValueError, "missing model.embed_tokens.weight")


def test_peft_may_be_wrapped_around(saved):
    before = parameters(saved)
    edit(saved, rename("", "base_model.model."))
    assert_equal(parameters(saved), before)
    edit(
        saved, lambda t: t | {"base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight": np.ones(2)}
    )
    refused(saved, ValueError, str(saved), "LoRA", "merge_and_unload")


def test_a_bare_model_that_is_tied(tied):
    before = parameters(tied)
    edit(tied, rename("model.", ""))
    assert "layers.0.mlp.up_proj.weight" in safetensors.numpy.load_file(tied / SINGLE)
    assert_equal(parameters(tied), before)


def test_a_bare_model_that_is_not(saved):
    before = parameters(saved)
    edit(saved, lambda t: {name.removeprefix("model."): tensor for name, tensor in t.items()})
    assert_equal(parameters(saved), before)  # with its lm_head beside it
    edit(saved, lambda t: {name: tensor for name, tensor in t.items() if name != "lm_head.weight"})
    refused(saved, ValueError, "lm_head.weight", "tie_word_embeddings", "LlamaForCausalLM")


# Files


def write_index(folder, **files):
    names = safetensors.numpy.load_file(folder / SINGLE)
    weight_map = {name: files.get(name, SINGLE) for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_an_index_may_name_the_single_file(saved):
    before = parameters(saved)
    write_index(saved)
    assert_equal(parameters(saved), before)
    edit(saved, lambda t: {name: tensor for name, tensor in t.items() if name != "model.norm.weight"})
    refused(saved, ValueError, INDEX, f"model.norm.weight is not in {SINGLE}")


def test_an_index_that_names_other_files_beside_the_single_one(saved):
    write_index(saved, **{"model.norm.weight": "model-00001-of-00001.safetensors"})
    refused(saved, ValueError, SINGLE, INDEX, "remove the one that is out of date")


@pytest.fixture
def shards(tiny_model, tmp_path):
    folder = tmp_path / "shards"
    tiny_model.save_pretrained(folder, max_shard_bytes=20_000)
    (folder / INDEX).unlink()
    return folder


def test_shards_without_an_index(shards, saved):
    assert_equal(parameters(shards), parameters(saved))
    names = sorted(file.name for file in shards.glob("*.safetensors"))
    assert len(names) > 3
    other = shards / f"model-00001-of-{len(names) + 1:05d}.safetensors"
    shutil.copy(shards / names[0], other)
    refused(shards, ValueError, "several sets", names[0], other.name)
    other.unlink()
    second = safetensors.numpy.load_file(shards / names[1])
    safetensors.numpy.save_file(second, shards / names[0])
    refused(shards, ValueError, next(iter(second)), names[0], names[1])
    for name in (names[0], names[2]):
        (shards / name).unlink()
    refused(shards, FileNotFoundError, str(shards), f"lacks {names[0]}, {names[2]}; download")


def test_a_file_of_another_name(saved):
    (saved / SINGLE).rename(saved / "llama.safetensors")
    refused(saved, FileNotFoundError, SINGLE, INDEX, "it has llama.safetensors")


# What is no weights


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"\n  <html>Access to this model is restricted</html>", "web page"),
        (b"", "cut short at 0 bytes"),
    ],
)
def test_other_content(content, named, saved):
    (saved / SINGLE).write_bytes(content)
    refused(saved, ValueError, str(saved / SINGLE), named)


def test_links_that_lead_nowhere(saved):
    for name in (SINGLE, "model-00001-of-00001.safetensors"):
        (saved / SINGLE).unlink(missing_ok=True)
        (saved / name).symlink_to("gone")
        (saved / "pytorch_model.bin").touch()
        refused(saved, FileNotFoundError, f"{saved}: {name} is a link to a file that does not exist")


def test_a_download_that_stopped(saved):
    raw = (saved / SINGLE).read_bytes()
    (saved / SINGLE).write_bytes(raw[: len(raw) - 100])
    refused(saved, ValueError, SINGLE, f"{len(raw) - 100} of {len(raw)} bytes", "download it again")


# Dtypes


def test_config_json_gives_the_dtype(saved):
    set_fields(saved, dtype=None, torch_dtype="bfloat16")  # as transformers 4 wrote it
    assert {array.dtype for array in parameters(saved).values()} == {jnp.dtype("bfloat16")}
    set_fields(saved, dtype="float16")
    assert {array.dtype for array in parameters(saved).values()} == {jnp.dtype("float16")}
    assert Llama.from_pretrained(saved, dtype=jnp.float32).norm.scale.dtype == jnp.float32
    set_fields(saved, dtype=None, torch_dtype=None)
    assert {array.dtype for array in parameters(saved).values()} == {jnp.dtype("float32")}
    for strange in ("float64", ["float32"]):
        set_fields(saved, dtype=strange)
        refused(saved, ValueError, str(saved), f"dtype {strange!r}", "jnp.float32")
        assert Llama.from_pretrained(saved, dtype=jnp.float32).norm.scale.dtype == jnp.float32
