"""Adapter folders: PEFT's names and our values, the same model when loaded; all else is refused by name."""

import dataclasses
import json
import os
import pickle
import shutil
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jsparse.models import Llama, LoRAParam, RopeConfig, add_lora, has_lora, merge_lora, quantize_base
from jsparse.models.adapter_loading import load_adapter
from jsparse.models.adapter_saving import save_adapter
from jsparse.models.layers import adaptable_layers

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 24)).astype(np.int32)
PREFIX = "base_model.model."
CONFIG, WEIGHTS, BESIDE = "adapter_config.json", "adapter_model.safetensors", "trainable_params.safetensors"


def is_trained(path, variable):
    """LongLoRA's choice, as the trainer's filter makes it."""
    return isinstance(variable, LoRAParam) or any("embed" in str(key) or "norm" in str(key) for key in path)


def perturb(model, is_changed):
    """Other values, as after training, in the parameters that a filter selects."""
    state = dict(nnx.to_flat_state(nnx.state(model, is_changed)))
    rng = np.random.default_rng(1)
    for path, variable in state.items():
        noise = 0.2 * rng.standard_normal(variable.shape).astype(np.float32)
        state[path] = variable.replace(jnp.asarray(np.asarray(variable[...]) + noise))
    nnx.update(model, nnx.from_flat_state(state))


def make_tuned(config, *, rank=3, alpha=6, trained=is_trained, **options):
    """The base of seed 0, trained."""
    model = Llama(config, rngs=nnx.Rngs(0))
    add_lora(model, rank=rank, alpha=alpha, rngs=nnx.Rngs(1), **options)
    perturb(model, trained)
    return model


def values(model):
    return {
        path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def assert_same(ours, theirs):
    assert ours.config == theirs.config
    ours, theirs = values(ours), values(theirs)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=str(path))


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def edit_config(directory, **fields):
    file = directory / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_weights(directory, change):
    tensors = safetensors.numpy.load_file(directory / WEIGHTS)
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / WEIGHTS)


@pytest.fixture(scope="module")
def tuned(tiny_config):
    """Not to be changed."""
    return make_tuned(tiny_config)


@pytest.fixture(scope="module")
def saved(tuned, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    save_adapter(tuned, directory, base="base", trained=is_trained)
    return directory


@pytest.fixture
def folder(saved, tmp_path):
    """The folder of ``tuned``, to be changed."""
    return shutil.copytree(saved, tmp_path / "adapter")


# What is written


def test_file_has_the_names_shapes_and_values_of_peft(tuned, folder):
    trained = values(tuned)
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    expected = {"model.embed_tokens.weight": trained["embed_tokens", "embedding"]}
    expected["model.norm.weight"] = trained["norm", "scale"]
    for layer in (0, 1):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            expected[f"model.layers.{layer}.{norm}.weight"] = trained["layers", layer, norm, "scale"]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                array = trained["layers", layer, "self_attn", name, ours].T
                expected[f"model.layers.{layer}.self_attn.{name}.{theirs}.weight"] = array
    assert tensors.keys() == {PREFIX + name for name in expected}
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[PREFIX + name], array, err_msg=name)
    assert tensors[f"{PREFIX}model.layers.0.self_attn.k_proj.lora_A.weight"].shape == (3, 32)
    assert tensors[f"{PREFIX}model.layers.0.self_attn.k_proj.lora_B.weight"].shape == (16, 3)
    with safetensors.safe_open(folder / WEIGHTS, framework="numpy") as opened:
        assert opened.metadata() == {"format": "pt"}  # transformers asks for it
    assert stat.S_IMODE((folder / WEIGHTS).stat().st_mode) == stat.S_IMODE((folder / CONFIG).stat().st_mode)


def test_fields_of_the_config(folder):
    fields = json.loads((folder / CONFIG).read_text())
    assert fields == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "inference_mode": True,
        "r": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"],
        "modules_to_save": ["embed_tokens", "input_layernorm", "norm", "post_attention_layernorm"],
    }
    assert isinstance(fields["lora_alpha"], int)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"alpha": 6}, {}),
        ({"rslora": True, "rank": 4, "alpha": 5}, {"r": 4, "lora_alpha": 5, "use_rslora": True}),
        (
            {"rank": 2, "rank_pattern": {"layers.1.self_attn.q_proj": 8}, "alpha_pattern": {"v_proj": 3}},
            {"r": 2, "rank_pattern": {"layers.1.self_attn.q_proj": 8}, "alpha_pattern": {"v_proj": 3}},
        ),
        (
            {"targets": ("q_proj", "up_proj"), "layers": (1,)},
            {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        ),
        (
            {"targets": ("q_proj", "layers.0.mlp.up_proj", "lm_head")},
            {"target_modules": ["lm_head", "model.layers.0.mlp.up_proj", "q_proj"]},
        ),
    ],
)
def test_settings_are_written_where_they_differ(options, expected, tiny_config, tmp_path):
    targets = ("q_proj", "v_proj")
    model = make_tuned(tiny_config, **({"rank": 3, "alpha": 6, "targets": targets} | options))
    save_adapter(model, tmp_path, base="base", trained=LoRAParam)
    fields = json.loads((tmp_path / CONFIG).read_text())
    optional = ("use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern")
    assert {name for name in optional if name in fields} == expected.keys() & set(optional)
    plain = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    for name, value in (plain | expected).items():
        assert fields[name] == value


# Round trips


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ({}, {}),
        ({"tie_word_embeddings": True}, {"targets": ("q_proj", "down_proj")}),
        ({"model_type": "qwen3", "head_dim": 16}, {"targets": ("layers.1.self_attn.*", "gate_proj")}),
        ({"model_type": "qwen2"}, {"rank": 1, "alpha": 0.3, "dropout": 0.25}),
        ({}, {"rslora": True, "targets": ("q_proj", "down_proj"), "rank_pattern": {"down_proj": 7}}),
        ({}, {"targets": ("*",), "layers": (1,), "alpha_pattern": {"layers.1.self_attn.q_proj": 0.7}}),
        ({"tie_word_embeddings": True}, {"targets": ("all-linear", "lm_head"), "alpha": 5}),
    ],
)
def test_round_trip(variant, options, tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, **variant)
    tuned = make_tuned(config, **options)
    save_adapter(tuned, tmp_path, base="base", trained=is_trained)
    model = Llama(config, rngs=nnx.Rngs(0))
    load_adapter(model, tmp_path)
    assert_same(model, tuned)
    theirs = dict(adaptable_layers(tuned))
    for path, linear in adaptable_layers(model):
        assert linear.lora_scale == pytest.approx(theirs[path].lora_scale, rel=1e-12)
        assert linear.lora_dropout == theirs[path].lora_dropout
        assert linear.lora_rslora == theirs[path].lora_rslora


def test_loaded_logits_and_merged_weights(tiny_config, tuned, folder):
    """The model is the base with W + (alpha / r) B A, computed here in float64 from the file alone."""
    model = Llama(tiny_config, rngs=nnx.Rngs(0))
    before = model(TOKENS)
    weights = {path: array.astype(np.float64) for path, array in values(model).items()}
    load_adapter(model, folder)
    adapted = model(TOKENS)
    np.testing.assert_array_equal(adapted, tuned(TOKENS))
    assert np.abs(np.asarray(adapted - before)).max() > 0.1

    merge_lora(model)
    np.testing.assert_allclose(model(TOKENS), adapted, atol=1e-4)
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    for layer in (0, 1):
        name = f"{PREFIX}model.layers.{layer}.self_attn.v_proj"
        a, b = (tensors[f"{name}.lora_{part}.weight"].astype(np.float64) for part in "AB")
        path = ("layers", layer, "self_attn", "v_proj", "kernel")
        np.testing.assert_allclose(values(model)[path], weights[path] + 6 / 3 * (b @ a).T, atol=1e-6)


def test_extended_context_comes_back(tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, eos_token_ids=(2, 3)).extend_context(200)
    assert config.rope == RopeConfig(kind="linear", factor=4.0)
    tuned = make_tuned(config)
    save_adapter(tuned, tmp_path, base="base", trained=is_trained)
    model = Llama(tiny_config, rngs=nnx.Rngs(0))
    load_adapter(model, tmp_path)
    assert model.config == dataclasses.replace(config, eos_token_ids=(2,))  # stop tokens stay the base's
    np.testing.assert_array_equal(model(TOKENS), tuned(TOKENS))


def test_adapters_alone(tiny_config, tmp_path):
    tuned = make_tuned(tiny_config, trained=LoRAParam)
    save_adapter(tuned, tmp_path, base="base", trained=LoRAParam)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] is None
    model = Llama(tiny_config, rngs=nnx.Rngs(0))
    load_adapter(model, tmp_path)
    assert_same(model, tuned)


def test_dtypes_are_kept_and_cast(tiny_config, tmp_path):
    """A bfloat16 model's adapters are float32; on a float32 base, what was bfloat16 is widened."""
    tuned = Llama(tiny_config, rngs=nnx.Rngs(0))
    nnx.update(tuned, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(tuned)))
    add_lora(tuned, rank=2, alpha=4, rngs=nnx.Rngs(1))
    save_adapter(tuned, tmp_path, base="base", trained=is_trained)
    dtypes = {
        name: array.dtype.name for name, array in safetensors.numpy.load_file(tmp_path / WEIGHTS).items()
    }
    assert all(dtype == ("float32" if "lora" in name else "bfloat16") for name, dtype in dtypes.items())
    model = Llama(tiny_config, rngs=nnx.Rngs(5))
    load_adapter(model, tmp_path)
    assert model.norm.scale.dtype == jnp.float32
    embedding = tuned.embed_tokens.embedding[...].astype(jnp.float32)
    np.testing.assert_array_equal(model.embed_tokens.embedding[...], embedding)


@pytest.mark.parametrize(
    ("selected", "names"),
    [
        (lambda path: path == ("norm",), ["model.norm"]),  # "norm" alone would be every norm to PEFT
        (lambda path: path[-1] == "input_layernorm", ["input_layernorm"]),
        (lambda path: path[-1] == "input_layernorm" and path[1] == 1, ["model.layers.1.input_layernorm"]),
        (lambda path: path == ("lm_head",), ["lm_head"]),
    ],
)
def test_some_modules_only(selected, names, tiny_config, tmp_path):
    def trained(path, variable):
        return isinstance(variable, nnx.Param) and selected(path[:-1])

    tuned = make_tuned(tiny_config, trained=trained)
    save_adapter(tuned, tmp_path, base="base", trained=trained)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == names
    model = Llama(tiny_config, rngs=nnx.Rngs(0))
    load_adapter(model, tmp_path)
    assert_same(model, tuned)


def test_save_replaces_an_adapter_and_keeps_other_files(tiny_config, folder):
    (folder / "tokenizer.json").write_text("mine")
    (folder / ".saving").mkdir()  # of a save that was killed
    tuned = make_tuned(tiny_config, rank=2, targets=("gate_proj",), trained=LoRAParam)
    save_adapter(tuned, folder, base="base", trained=LoRAParam)
    assert sorted(contents(folder)) == [CONFIG, WEIGHTS, "config.json", "tokenizer.json"]
    model = Llama(tiny_config, rngs=nnx.Rngs(0))
    load_adapter(model, folder)
    assert_same(model, tuned)


def test_a_save_that_fails_leaves_what_was_there(tiny_config, folder, monkeypatch):
    before = contents(folder)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        save_adapter(make_tuned(tiny_config, rank=2), folder, base="base", trained=is_trained)
    assert contents(folder) == before


# Folders of others


def test_longlora_folder(tiny_config, tuned, folder):
    """Its embeddings and norms are in a file of their own, without the prefix, and no config says so."""
    beside = {}

    def move(tensors):
        for name in [name for name in tensors if "lora_" not in name]:
            beside[name.removeprefix(PREFIX)] = tensors.pop(name)

    edit_weights(folder, move)
    safetensors.numpy.save_file(beside, folder / BESIDE)
    edit_config(folder, modules_to_save=None)
    (folder / "config.json").unlink()
    model = Llama(tiny_config, rngs=nnx.Rngs(0))
    load_adapter(model, folder)
    assert_same(model, tuned)

    edit_weights(folder, lambda t: t.update({f"{PREFIX}model.norm.weight": beside["model.norm.weight"]}))
    refused(tiny_config, folder, ValueError, WEIGHTS, BESIDE, "model.norm.weight")


def test_target_modules_may_be_an_expression(tiny_config, tuned, folder):
    edit_config(folder, target_modules=r".*\.self_attn\.[qkvo]_proj")
    model = Llama(tiny_config, rngs=nnx.Rngs(0))
    load_adapter(model, folder)
    assert_same(model, tuned)


# Refusals. The model stays as it was.


def refused(config, directory, error, *named):
    model = Llama(config, rngs=nnx.Rngs(0))
    with pytest.raises(error) as caught:
        load_adapter(model, directory)
    for name in named:
        assert name in str(caught.value)
    assert not has_lora(model)
    assert_same(model, Llama(config, rngs=nnx.Rngs(0)))


def test_all_wrong_tensors_in_one_message(tiny_config, folder):
    q_proj = f"{PREFIX}model.layers.1.self_attn.q_proj"

    def change(tensors):
        del tensors[f"{q_proj}.lora_A.weight"]
        del tensors[f"{PREFIX}model.norm.weight"]
        tensors[f"{q_proj}.lora_B.weight"] = tensors[f"{q_proj}.lora_B.weight"].T.copy()
        tensors[f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight"] = np.ones((3, 32), np.float32)
        tensors[f"{PREFIX}lm_head.weight"] = np.ones((61, 32), np.int8)

    edit_weights(folder, change)
    refused(
        tiny_config,
        folder,
        ValueError,
        "missing model.layers.1.self_attn.q_proj.lora_A.weight",
        "missing model.norm.weight",
        "model.layers.1.self_attn.q_proj.lora_B.weight has shape [3, 32], not [32, 3]",
        "unexpected model.layers.0.mlp.up_proj.lora_A.weight",
        "lm_head.weight has dtype I8",
    )


def test_embeddings_that_were_trained_but_not_saved(tiny_config, folder):
    """LongLoRA's commonest failure."""
    edit_weights(folder, lambda t: t.pop(f"{PREFIX}model.embed_tokens.weight"))
    refused(tiny_config, folder, ValueError, "missing model.embed_tokens.weight")


def test_added_tokens(tiny_config, folder):
    name = f"{PREFIX}model.embed_tokens.weight"
    edit_weights(folder, lambda t: t.update({name: np.concatenate([t[name], t[name][:1]])}))
    words = "[62, 32], not [61, 32]", "[PAD]", "resize_token_embeddings(62)"
    refused(tiny_config, folder, ValueError, *words)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"r": 4}, "lora_A.weight has shape [3, 32], not [4, 32]"),
        ({"r": 0}, "r must be an integer >= 1, not 0"),
        ({"lora_alpha": -1}, "lora_alpha must be a positive number, not -1"),
        ({"lora_dropout": 1.0}, "lora_dropout must be a number in [0, 1), not 1.0"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS'"),
        ({"use_dora": True}, "use_dora=True is not supported (allowed: False or None)"),
        ({"use_dora": True, "bias": "all"}, "bias='all'"),
        ({"use_rslora": "no"}, "use_rslora must be True, False or None, not 'no'"),
        ({"rank_pattern": {"q_proj": 8}}, "q_proj.lora_A.weight has shape [3, 32], not [8, 32]"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] must be an integer >= 1, not 0"),
        ({"rank_pattern": [8]}, "rank_pattern must map names of modules to numbers, not [8]"),
        ({"rank_pattern": {"(q_proj": 8}}, "rank_pattern '(q_proj' is no regular expression"),
        ({"alpha_pattern": {"q_proj": -8}}, "alpha_pattern['q_proj'] must be a positive number, not -8"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"layers_to_transform": [0]}, "unexpected model.layers.1.self_attn.k_proj.lora_A.weight"),
        ({"layers_to_transform": [2]}, "leave no module to adapt, with layers_to_transform=[2]"),
        ({"layers_to_transform": [-1]}, "layers_to_transform must be an integer >= 0, not -1"),
        ({"layers_to_transform": "0"}, "layers_to_transform must be a number or a list of numbers, not '0'"),
        ({"layers_to_transform": [0], "target_modules": "all-linear"}, "needs a list of target_modules"),
        ({"layers_to_transform": 0, "layers_pattern": ["("]}, "layers_pattern '(' is no regular expression"),
        ({"exclude_modules": ["k_proj"]}, "unexpected model.layers.0.self_attn.k_proj.lora_A.weight"),
        ({"exclude_modules": ".*"}, "leave no module to adapt"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"use_something_new": True}, "use_something_new=True is not known"),
        ({"target_modules": ["q_proj", "c_attn"]}, "target_modules ['c_attn'] name no module"),
        ({"target_modules": ["embed_tokens"]}, "target_modules ['embed_tokens'] name no module"),
        ({"target_modules": ["lm_head"]}, "missing lm_head.lora_A.weight"),
        ({"target_modules": "all-linear"}, "missing model.layers.0.mlp.down_proj.lora_A.weight"),
        ({"target_modules": "["}, "no regular expression"),
        ({"target_modules": "q_proj"}, "target_modules ['q_proj'] name no module"),
        ({"target_modules": []}, "target_modules must name at least one module, not []"),
        ({"target_modules": ["q_proj", 1]}, "target_modules must be a list of module names"),
        ({"modules_to_save": ["embed_tokens", "classifier"]}, "modules_to_save ['classifier']"),
        ({"modules_to_save": "norm"}, "modules_to_save must be a list"),
        ({"modules_to_save": ["v_proj"]}, "missing model.layers.0.self_attn.v_proj.weight"),
        ({"modules_to_save": ["k_proj"]}, "unexpected model.layers.0.self_attn.k_proj.lora_A.weight"),
        ({"modules_to_save": ["_proj"]}, "both name model.layers.0.self_attn.k_proj"),
        ({"target_modules": ["q_proj"]}, "unexpected model.layers.0.self_attn.k_proj.lora_A.weight"),
    ],
)
def test_configs_that_ask_for_something_else(fields, named, tiny_config, folder):
    edit_config(folder, **fields)
    refused(tiny_config, folder, ValueError, named)


def test_missing_fields(tiny_config, folder):
    (folder / CONFIG).write_text('{"peft_type": "LORA", "r": 3}')
    refused(tiny_config, folder, ValueError, CONFIG, "lora_alpha is missing", "target_modules is missing")


@pytest.mark.parametrize("name", [WEIGHTS, BESIDE])
def test_pickles_are_never_opened(name, tiny_config, folder):
    class Bomb:
        def __reduce__(self):
            return os._exit, (1,)

    if name == WEIGHTS:
        (folder / WEIGHTS).unlink()
    pickled = name.replace(".safetensors", ".bin")
    (folder / pickled).write_bytes(pickle.dumps(Bomb()))
    advice = f"jsparse convert --model {folder} --output NEW_FOLDER writes it"
    refused(tiny_config, folder, FileNotFoundError, pickled, f"allowed is {name}", advice)


def test_missing_and_damaged_files(tiny_config, folder):
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[:-1])
    refused(tiny_config, folder, ValueError, WEIGHTS)
    (folder / WEIGHTS).unlink()
    refused(tiny_config, folder, FileNotFoundError, WEIGHTS)
    (folder / CONFIG).unlink()
    refused(tiny_config, folder, FileNotFoundError, "no adapter_config.json")


def test_adapter_of_another_model(tiny_config, folder):
    other = dataclasses.replace(
        tiny_config, rms_norm_eps=1e-5, num_hidden_layers=3, sliding_windows=(None,) * 3
    )
    refused(other, folder, ValueError, "config.json", "rms_norm_eps is 1e-06, the model's 1e-05")
    (folder / "config.json").unlink()
    refused(other, folder, ValueError, "missing model.layers.2.self_attn.q_proj.lora_A.weight")


def test_tied_head_that_peft_would_leave_behind(tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, tie_word_embeddings=True)
    tuned = make_tuned(config)
    save_adapter(tuned, tmp_path, base="base", trained=is_trained)
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert "lm_head" in fields["modules_to_save"] and fields["ensure_weight_tying"] is True
    head = f"{PREFIX}lm_head.weight"
    tensors = safetensors.numpy.load_file(tmp_path / WEIGHTS)
    np.testing.assert_array_equal(tensors[head], tensors[f"{PREFIX}model.embed_tokens.weight"])

    edit_weights(tmp_path, lambda t: t.pop(head))  # PEFT ties it, so it may be left out
    model = Llama(config, rngs=nnx.Rngs(0))
    load_adapter(model, tmp_path)
    assert_same(model, tuned)
    edit_config(tmp_path, ensure_weight_tying=False)
    refused(config, tmp_path, ValueError, "lm_head", "tie_word_embeddings")
    edit_weights(tmp_path, lambda t: t.update({head: np.zeros((61, 32), np.float32)}))
    refused(config, tmp_path, ValueError, "lm_head", "tie_word_embeddings")


def test_no_adapter_on_an_adapter(tiny_config, folder):
    model = make_tuned(tiny_config)
    with pytest.raises(ValueError, match="already.*merge_lora"):
        load_adapter(model, folder)
    assert_same(model, make_tuned(tiny_config))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"base": ""}, "base must be a folder or a name"),
        ({"trained": nnx.Param}, r"trained selects .*kernel, \.\.\.; .*merge_lora"),
    ],
)
def test_refusals_to_save(arguments, named, tiny_config, tmp_path):
    with pytest.raises(ValueError, match=named):
        save_adapter(
            make_tuned(tiny_config), tmp_path / "a", **({"base": "b", "trained": is_trained} | arguments)
        )
    assert not (tmp_path / "a").exists()


def test_models_that_no_adapter_folder_holds(tiny_config, tiny_model, tmp_path):
    with pytest.raises(ValueError, match="no LoRA adapters.*save_pretrained"):
        save_adapter(tiny_model, tmp_path / "a", base="base", trained=is_trained)
    tuned = make_tuned(tiny_config)
    tuned.layers[0].self_attn.q_proj.lora_dropout = 0.5
    with pytest.raises(ValueError, match=r"one dropout, but the model has \[0\.0, 0\.5\]"):
        save_adapter(tuned, tmp_path / "a", base="base", trained=is_trained)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.bin", BESIDE, "trainable_params.bin"])
def test_folders_with_other_weights(name, tiny_config, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=name):
        save_adapter(make_tuned(tiny_config), tmp_path, base="base", trained=is_trained)
    with pytest.raises(NotADirectoryError, match=name):
        save_adapter(make_tuned(tiny_config), tmp_path / name, base="base", trained=is_trained)
    assert list(contents(tmp_path)) == [name]


def test_parameters_on_a_mesh_stay_there(tiny_config, tuned, folder):
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    model = Llama(tiny_config, rngs=nnx.Rngs(0))
    model.norm.scale[...] = jax.device_put(model.norm.scale[...], sharding)
    load_adapter(model, folder)
    placed = model.norm.scale[...].sharding
    assert isinstance(placed, NamedSharding) and placed.mesh == mesh
    assert_same(model, tuned)


def test_keys_that_mean_nothing_are_noted(tiny_config, tuned, folder, caplog):
    """PEFT warns, and trains without them."""
    edit_config(folder, alpha_pattern={"c_attn": 1, "up_proj": 2})
    model = Llama(tiny_config, rngs=nnx.Rngs(0))
    load_adapter(model, folder)
    assert_same(model, tuned)
    assert "alpha_pattern ['c_attn', 'up_proj'] means none of the adapted modules" in caplog.text


def test_a_head_beside_its_adapter(tiny_config, tmp_path):
    """What PEFT writes as the base of an adapted head replaces the model's; a whole one has no place."""
    tied = dataclasses.replace(tiny_config, tie_word_embeddings=True)
    for config in (tiny_config, tied):
        directory = tmp_path / str(config.tie_word_embeddings)
        save_adapter(
            make_tuned(config, targets=("lm_head",), trained=LoRAParam),
            directory,
            base="b",
            trained=LoRAParam,
        )
        head = np.random.default_rng(3).standard_normal((61, 32)).astype(np.float32)
        edit_weights(directory, lambda t, head=head: t.update({f"{PREFIX}lm_head.base_layer.weight": head}))
        model = Llama(config, rngs=nnx.Rngs(0))
        load_adapter(model, directory)
        if config.tie_word_embeddings:
            np.testing.assert_array_equal(model.embed_tokens.embedding[...], head)
        else:
            assert model.lm_head is not None
            np.testing.assert_array_equal(model.lm_head.kernel[...], head.T)
        edit_weights(directory, lambda t, head=head: t.update({f"{PREFIX}lm_head.weight": head}))
        refused(config, directory, ValueError, "unexpected lm_head.weight")

    edit_weights(directory, lambda t: t.pop(f"{PREFIX}lm_head.weight"))
    edit_weights(directory, lambda t: t.update({f"{PREFIX}model.embed_tokens.weight": 2 * head}))
    edit_config(directory, modules_to_save=["embed_tokens"])
    refused(tied, directory, ValueError, "ties lm_head to the embedding, but with this adapter PEFT")
    edit_config(directory, ensure_weight_tying=True)
    refused(tied, directory, ValueError, "with ensure_weight_tying, lm_head is the embedding")


def test_merging_unties_an_adapted_head(tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, tie_word_embeddings=True)
    model = make_tuned(config, targets=("lm_head", "q_proj"), trained=LoRAParam)
    table = np.asarray(model.embed_tokens.embedding[...])
    head = model.lm_head
    assert head is not None and head.lora_a is not None and head.lora_b is not None
    a, b = (np.asarray(x[...], np.float64) for x in (head.lora_a, head.lora_b))
    adapted = model(TOKENS)
    merge_lora(model)
    assert not model.config.tie_word_embeddings and not has_lora(model)
    np.testing.assert_array_equal(model.embed_tokens.embedding[...], table)
    np.testing.assert_allclose(head.kernel[...], table.T + 2 * a @ b, atol=1e-5)
    np.testing.assert_allclose(model(TOKENS), adapted, atol=1e-4)
    model.save_pretrained(tmp_path)
    np.testing.assert_array_equal(Llama.from_pretrained(tmp_path)(TOKENS), model(TOKENS))


def test_layers_of_a_frozen_base_are_not_replaced(tiny_config, tmp_path):
    pytest.importorskip("qwix", reason="codes need qwix, from the extra `qlora`")
    tuned = make_tuned(
        tiny_config, targets=("q_proj", "lm_head"), rank_pattern={"lm_head": 2}, trained=LoRAParam
    )
    save_adapter(tuned, tmp_path, base="base", trained=LoRAParam)
    model = Llama(tiny_config, rngs=nnx.Rngs(0))
    quantize_base(model, 8)
    load_adapter(model, tmp_path)
    expected = model(TOKENS)
    merge_lora(model)
    np.testing.assert_allclose(model(TOKENS), expected, atol=1e-4)
    edit_config(tmp_path, modules_to_save=["v_proj"])
    model = Llama(tiny_config, rngs=nnx.Rngs(0))
    quantize_base(model, 8)
    with pytest.raises(
        ValueError, match=r"replaces model.layers.0.self_attn.v_proj, .*v_proj, but .*call dequantize_base"
    ):
        load_adapter(model, tmp_path)
