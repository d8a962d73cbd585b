"""Hugging Face folders: what is written is read again bit for bit, and what is damaged is refused by name."""

import dataclasses
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from jsparse.models import Llama, RopeConfig, add_lora, checkpoint

INDEX = "model.safetensors.index.json"


def parameters_of(model):
    return {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(nnx.state(model))}


def assert_same_model(ours, theirs):
    ours_parameters, theirs_parameters = parameters_of(ours), parameters_of(theirs)
    assert ours.config == theirs.config
    assert ours_parameters.keys() == theirs_parameters.keys()
    for path, array in ours_parameters.items():
        assert array.dtype == theirs_parameters[path].dtype
        assert array.tobytes() == theirs_parameters[path].tobytes(), path


def contents(directory):
    return {
        str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


@pytest.fixture
def saved(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def sharded(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "sharded", max_shard_bytes=20_000)
    return tmp_path / "sharded"


def edit_weights(directory, change):
    """Rewrite model.safetensors after ``change`` has edited its dictionary of tensors."""
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def edit_json(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# Round trips


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("max_shard_bytes", [10_000_000, 7_000])
def test_round_trip_is_bit_exact(dtype, max_shard_bytes, tiny_config, tmp_path):
    model = Llama(tiny_config, rngs=nnx.Rngs(0), dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / INDEX).exists() == (max_shard_bytes == 7_000)
    assert_same_model(Llama.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    "variant",
    [
        {"tie_word_embeddings": True, "rope": RopeConfig(kind="linear", factor=4.0)},
        {"attention_bias": True, "mlp_bias": True, "eos_token_ids": (2, 3)},
        {"model_type": "mistral", "sliding_windows": (5, 5)},
        {"model_type": "qwen2", "sliding_windows": (None, 5), "eos_token_ids": ()},
        {"model_type": "qwen3", "head_dim": 16},
    ],
)
def test_round_trip_of_each_variant(variant, tiny_config, tmp_path):
    model = Llama(dataclasses.replace(tiny_config, **variant), rngs=nnx.Rngs(0))
    model.save_pretrained(tmp_path)
    assert_same_model(Llama.from_pretrained(tmp_path), model)


def test_dtype_casts(saved, tiny_model):
    loaded = Llama.from_pretrained(saved, dtype=jnp.bfloat16)
    kernel = loaded.layers[0].mlp.up_proj.kernel[...]
    assert kernel.dtype == jnp.bfloat16
    assert (kernel == tiny_model.layers[0].mlp.up_proj.kernel[...].astype(jnp.bfloat16)).all()
    with pytest.raises(ValueError, match="dtype must be float32, float16, bfloat16 or None, not int8"):
        Llama.from_pretrained(saved, dtype=jnp.int8)


def test_shards_hold_at_most_what_they_may_and_the_index_knows_where(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    files = sorted(file.name for file in sharded.glob("*.safetensors"))
    assert len(files) > 2 and set(weight_map.values()) == set(files)
    for file in files:
        tensors = safetensors.numpy.load_file(sharded / file)
        assert set(tensors) == {name for name, place in weight_map.items() if place == file}
        assert sum(array.nbytes for array in tensors.values()) <= 20_000
        with safetensors.safe_open(sharded / file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}  # transformers asks for it


def test_generation_config_wins_over_the_config(saved):
    assert json.loads((saved / "generation_config.json").read_text())["eos_token_id"] == 2
    edit_json(saved / "generation_config.json", eos_token_id=[4, 5])
    assert Llama.from_pretrained(saved).config.eos_token_ids == (4, 5)
    edit_json(saved / "generation_config.json", eos_token_id=[4, 61])
    with pytest.raises(ValueError, match="eos_token_ids.*vocab_size=61.*61"):
        Llama.from_pretrained(saved)


def test_saving_again_keeps_settings_of_generation(saved):
    given = {"bos_token_id": 9, "do_sample": True, "top_p": 0.9, "eos_token_id": 2}
    file = saved / "generation_config.json"
    file.write_text(json.dumps(given))
    model = Llama.from_pretrained(saved)
    model.save_pretrained(saved)
    assert json.loads(file.read_text()) == given
    model.config = dataclasses.replace(model.config, eos_token_ids=(2, 5))
    model.save_pretrained(saved)
    assert json.loads(file.read_text()) == given | {"eos_token_id": [2, 5]}
    before = (saved / "config.json").read_bytes()
    file.write_text("{")
    with pytest.raises(ValueError, match=r"generation_config.json cannot be read"):
        model.save_pretrained(saved)
    assert (saved / "config.json").read_bytes() == before


def test_old_inverse_frequencies_are_passed_over(saved, tiny_model):
    edit_weights(
        saved, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    )
    assert_same_model(Llama.from_pretrained(saved), tiny_model)


def test_tied_head_may_be_there_twice_if_equal(tiny_config, tmp_path):
    model = Llama(dataclasses.replace(tiny_config, tie_word_embeddings=True), rngs=nnx.Rngs(0))
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert_same_model(Llama.from_pretrained(tmp_path), model)
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] * 2}))
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        Llama.from_pretrained(tmp_path)


# Damage. Every message names the thing, and the folder stays as it was.


def refused(directory, error, *names):
    before = contents(directory)
    with pytest.raises(error) as caught:
        Llama.from_pretrained(directory)
    for name in names:
        assert name in str(caught.value)
    assert contents(directory) == before


def test_all_wrong_tensors_in_one_message(saved):
    def change(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.ones((2, 2), np.float32)
        tensors["model.layers.0.self_attn.k_proj.weight"] = np.ones((32, 32), np.float32)
        tensors["model.layers.0.self_attn.q_proj.weight"] = np.ones((32, 32), np.int8)

    edit_weights(saved, change)
    refused(
        saved,
        ValueError,
        "missing model.norm.weight",
        "missing model.layers.1.mlp.up_proj.weight",
        "unexpected model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.k_proj.weight has shape [32, 32], the config says [16, 32]",
        "model.layers.0.self_attn.q_proj.weight has dtype I8",
    )


def test_transposed_kernel_is_misshapen(saved):
    edit_weights(
        saved,
        lambda t: t.update({"lm_head.weight": np.ascontiguousarray(t["lm_head.weight"].T)}),
    )
    refused(saved, ValueError, "lm_head.weight has shape [32, 61], the config says [61, 32]")


def test_mixed_dtypes_need_a_choice(saved):
    edit_weights(saved, lambda t: t.update({"model.norm.weight": np.ones(32, ml_dtypes.bfloat16)}))
    assert Llama.from_pretrained(saved).norm.scale.dtype == jnp.float32  # config.json says so
    edit_json(saved / "config.json", dtype=None)
    refused(saved, ValueError, "BF16 and F32", "dtype")
    assert Llama.from_pretrained(saved, dtype=jnp.float32).norm.scale.dtype == jnp.float32


def test_pickle_is_never_opened(saved):
    class Bomb:
        def __reduce__(self):
            return os._exit, (1,)

    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(saved, FileNotFoundError, "pytorch_model.bin", "jsparse convert", "safetensors")


def test_missing_files(saved, tmp_path):
    refused(tmp_path / "nowhere", FileNotFoundError, "nowhere", "config.json")
    (saved / "model.safetensors").unlink()
    refused(saved, FileNotFoundError, "model.safetensors", INDEX)
    (saved / "config.json").unlink()
    refused(saved, FileNotFoundError, "config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"vocab_size": 1, "vocab_size": 2}', "\xff"])
def test_unreadable_config(text, saved):
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    refused(saved, ValueError, "config.json")


def test_config_that_cannot_be_represented(saved):
    edit_json(saved / "config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    refused(saved, ValueError, str(saved), "dynamic", "default, linear, llama3, yarn")
    edit_json(saved / "config.json", rope_parameters=None, num_attention_heads=3)
    refused(saved, ValueError, str(saved), "num_attention_heads=3")


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:7],
        lambda raw: raw[:200],
        lambda raw: raw[:-1],
        lambda raw: raw + b"x",
        lambda raw: struct.pack("<Q", 1 << 60) + raw[8:],
        lambda raw: raw[:8] + b"]" + raw[9:],
        lambda raw: raw.replace(b'"dtype"', b'"dtypo"', 1),
        lambda raw: raw.replace(b"[32,32]", b"[1e999]", 1),  # JSON's way to infinity
    ],
)
def test_damaged_file(damage, saved):
    file = saved / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refused(saved, ValueError, "model.safetensors")


def test_tensor_named_twice_in_one_file(saved):
    file = saved / "model.safetensors"
    raw = file.read_bytes()
    name, other = b'"model.layers.0.self_attn.k_proj.weight"', b'"model.layers.0.self_attn.v_proj.weight"'
    file.write_bytes(raw.replace(name, other, 1))
    refused(saved, ValueError, "model.safetensors", "twice", other.decode().strip('"'))


def test_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded, FileNotFoundError, INDEX, shard.name)


def test_index_that_disagrees_with_its_shards(sharded):
    index = json.loads((sharded / INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    moved = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][moved] = second
    index["weight_map"]["ghost.weight"] = second
    (sharded / INDEX).write_text(json.dumps(index))
    refused(
        sharded, ValueError, f"{moved} is in {first}, not in {second}", f"ghost.weight is not in {second}"
    )


def test_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = safetensors.numpy.load_file(second)
    name, array = next(iter(safetensors.numpy.load_file(first).items()))
    safetensors.numpy.save_file(tensors | {name: array}, second)
    refused(sharded, ValueError, f"{name} is in {first.name} and in {second.name}")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/outside.safetensors", "a\\b.safetensors", "x.bin"]
)
def test_shard_names_stay_inside(name, sharded):
    index = json.loads((sharded / INDEX).read_text())
    tensor = next(iter(index["weight_map"]))
    index["weight_map"][tensor] = name
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, ValueError, repr(name))


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}])
def test_index_without_a_map(weight_map, sharded):
    edit_json(sharded / INDEX, weight_map=weight_map)
    refused(sharded, ValueError, INDEX, "weight_map")


def test_links_stay_inside(saved, tiny_model, tmp_path):
    outside = tmp_path / "elsewhere.safetensors"
    shutil.move(saved / "model.safetensors", outside)
    (saved / "model.safetensors").symlink_to(outside)
    refused(saved, ValueError, "model.safetensors", "elsewhere.safetensors")

    # but the Hugging Face cache is made of links: snapshots/<revision>/<file> -> blobs/<hash>
    snapshot, blobs = tmp_path / "snapshots" / "revision", tmp_path / "blobs"
    blobs.mkdir()
    shutil.copytree(saved, snapshot, symlinks=True)
    shutil.move(outside, blobs / "hash")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/hash")
    assert_same_model(Llama.from_pretrained(snapshot), tiny_model)


def test_two_layouts_at_once(sharded, saved):
    shutil.copy(saved / "model.safetensors", sharded)
    refused(sharded, ValueError, "model.safetensors", INDEX)


# Saving


def test_save_keeps_other_files_and_removes_stale_weights(sharded, tiny_model):
    (sharded / "tokenizer.json").write_text("mine")
    (sharded / "notes").mkdir()
    (sharded / "notes" / "a.txt").write_text("mine too")
    tiny_model.save_pretrained(sharded)
    assert sorted(contents(sharded)) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes/a.txt",
        "tokenizer.json",
    ]
    assert (sharded / "tokenizer.json").read_text() == "mine"
    assert_same_model(Llama.from_pretrained(sharded), tiny_model)
    tiny_model.save_pretrained(sharded, max_shard_bytes=20_000)
    assert not (sharded / "model.safetensors").exists()
    assert_same_model(Llama.from_pretrained(sharded), tiny_model)


@pytest.mark.parametrize("step", ["save_file", "write_json", "os.fsync"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_save_that_fails_leaves_what_was_there(step, nth, sharded, tiny_config, tiny_model, monkeypatch):
    before = contents(sharded)
    owner, name = {
        "save_file": (safetensors.numpy, "save_file"),
        "write_json": (checkpoint, "write_json"),
        "os.fsync": (os, "fsync"),
    }[step]
    real, calls = getattr(owner, name), []

    def disk_full(*args, **kwargs):
        calls.append(args)
        if len(calls) == nth:
            raise OSError("no space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, disk_full)
    with pytest.raises(OSError, match="no space"):
        Llama(tiny_config, rngs=nnx.Rngs(7)).save_pretrained(sharded, max_shard_bytes=20_000)
    assert contents(sharded) == before
    assert_same_model(Llama.from_pretrained(sharded), tiny_model)


def test_a_save_that_is_killed_leaves_what_was_there(saved, tiny_config, tiny_model):
    killed_before_anything_moves = f"""
import os
from jsparse.models import Llama
model = Llama.from_pretrained({str(saved)!r})
model.norm.scale[...] = 2 * model.norm.scale[...]
os.fsync = lambda descriptor: os._exit(9)
model.save_pretrained({str(saved)!r})
"""
    assert subprocess.run([sys.executable, "-c", killed_before_anything_moves]).returncode == 9
    assert_same_model(Llama.from_pretrained(saved), tiny_model)
    other = Llama(tiny_config, rngs=nnx.Rngs(7))
    other.save_pretrained(saved)  # and the next save clears what the killed one left
    assert sorted(contents(saved)) == ["config.json", "generation_config.json", "model.safetensors"]
    assert_same_model(Llama.from_pretrained(saved), other)


def test_save_refusals(saved, tiny_model, tmp_path):
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="max_shard_bytes must be >= 1, not 0"):
        tiny_model.save_pretrained(tmp_path, max_shard_bytes=0)
    with pytest.raises(NotADirectoryError, match="config.json"):
        tiny_model.save_pretrained(saved / "config.json")
    add_lora(tiny_model, rank=2, alpha=4, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="LoRA.*merge_lora"):
        tiny_model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_nothing_is_allocated_for_a_model_that_does_not_fit(saved, monkeypatch):
    edit_json(saved / "config.json", num_hidden_layers=3)
    monkeypatch.setattr(checkpoint, "read_tensor", lambda stored: pytest.fail(f"read {stored.name}"))
    live = len(jax.live_arrays())
    refused(saved, ValueError, "missing model.layers.2.mlp.up_proj.weight")
    assert len(jax.live_arrays()) <= live
