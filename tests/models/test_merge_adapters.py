"""Adapters added to their base by weight, against sums in float64."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jsparse.models import Llama, LlamaConfig, LoRAParam, add_lora, load_adapter, merge_lora, save_adapter
from jsparse.models.merge_adapters import merge_adapters


def make_base(dtype=jnp.float32, **fields):
    config = LlamaConfig.tiny(intermediate_size=48, initializer_range=0.2, **fields)
    return Llama(config, rngs=nnx.Rngs(0), dtype=dtype)


def is_whole_norm(path, variable):
    return isinstance(variable, LoRAParam) or path[:1] == ("norm",)


def make_adapter(folder, seed, *, rank, alpha, targets, trained: Any = LoRAParam, extend=None):
    model = make_base()
    if extend is not None:
        model.config = model.config.extend_context(extend)
    add_lora(model, rank=rank, alpha=alpha, rngs=nnx.Rngs(seed), targets=targets)
    rng = np.random.default_rng(seed)
    for _, parameter in nnx.to_flat_state(nnx.state(model, trained)):
        noise = 0.3 * rng.standard_normal(parameter.shape)
        parameter[...] = parameter[...] + noise.astype(np.float32)
    save_adapter(model, folder, base="base", trained=trained)
    return folder


def parameters(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(parameter[...], np.float64) for path, parameter in flat}


def tuned(adapter):
    """The weights in float64 with one adapter in them."""
    model = make_base()
    load_adapter(model, adapter)
    weights = parameters(model)
    for name in [name for name in weights if name.endswith("lora_a")]:
        module = name.removesuffix(".lora_a")
        scale = json.loads((adapter / "adapter_config.json").read_text())
        a, b = weights.pop(name), weights.pop(f"{module}.lora_b")
        weights[f"{module}.kernel"] = weights[f"{module}.kernel"] + scale["lora_alpha"] / scale["r"] * a @ b
    return weights


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """With other ranks, scales and layers; the second and the third hold a norm whole."""
    folder = tmp_path_factory.mktemp("adapters")
    return (
        make_adapter(folder / "a", 1, rank=2, alpha=5, targets=("q_proj", "v_proj")),
        make_adapter(folder / "b", 2, rank=3, alpha=2, targets=("q_proj", "up_proj"), trained=is_whole_norm),
        make_adapter(folder / "c", 3, rank=1, alpha=1, targets=("layers.1.mlp.*",), trained=is_whole_norm),
    )


@pytest.mark.parametrize("weights", [(0.7, 0.3, 1.0), (-0.5, 2.0, 0.25), (0.0, 1.0, 0.0)])
def test_every_update_counts_by_its_weight(weights, adapters):
    base = parameters(make_base())
    expected = dict(base)
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, value in tuned(adapter).items():
            expected[name] = expected[name] + weight * (value - base[name])
    model = make_base()
    merge_adapters(model, list(zip(adapters, weights, strict=True)))
    found = parameters(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-6, err_msg=name)
        if "k_proj" in name or "embed" in name:
            assert np.array_equal(found[name], base[name]), name
    assert np.abs(found["layers.0.mlp.up_proj.kernel"] - base["layers.0.mlp.up_proj.kernel"]).max() > 0.02


def test_one_adapter_of_weight_one_is_that_adapter(adapters):
    model, expected = make_base(), make_base()
    merge_adapters(model, [(adapters[1], 1.0)])
    load_adapter(expected, adapters[1])
    merge_lora(expected)
    theirs = parameters(expected)
    for name, value in parameters(model).items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=1e-6, err_msg=name)
    assert np.array_equal(model.norm.scale[...], expected.norm.scale[...])


def in_bfloat16(array):
    return np.asarray(jnp.asarray(array, jnp.float32).astype(jnp.bfloat16), np.float64)


def test_a_model_in_bfloat16_is_rounded_once(tmp_path):
    """Each update is less than what a weight is rounded by, and all together are more."""
    adapters = [
        make_adapter(
            tmp_path / str(seed), seed, rank=1, alpha=0.004, targets=("q_proj",), trained=is_whole_norm
        )
        for seed in (1, 2, 3)
    ]
    weights = (0.9, 1.0, 1.1)
    base = make_base(jnp.bfloat16)
    start = parameters(base)
    expected = dict(start)
    name = "layers.0.self_attn.q_proj.kernel"
    one_by_one = start[name]
    for adapter, weight in zip(adapters, weights, strict=True):
        single = make_base()
        load_adapter(single, adapter)
        q_proj = single.layers[0].self_attn.q_proj
        assert q_proj.lora_a is not None and q_proj.lora_b is not None
        update = np.asarray(q_proj.lora_a[...], np.float64) @ np.asarray(q_proj.lora_b[...], np.float64)
        expected[name] = expected[name] + weight * q_proj.lora_scale * update
        one_by_one = in_bfloat16(one_by_one + weight * q_proj.lora_scale * update)
        whole = np.asarray(single.norm.scale[...], np.float64)
        expected["norm.scale"] = expected["norm.scale"] + weight * (whole - start["norm.scale"])
    merge_adapters(base, list(zip(adapters, weights, strict=True)))
    found = parameters(base)
    for module in (name, "norm.scale"):
        assert (found[module] == in_bfloat16(expected[module])).mean() > 0.99, module
    assert (found[name] == one_by_one).mean() < 0.9
    assert base.norm.scale[...].dtype == jnp.bfloat16


def test_a_tied_embedding_that_adapters_hold(tmp_path):
    def is_embedding(path, variable):
        return isinstance(variable, LoRAParam) or path[:1] == ("embed_tokens",)

    tables = []
    for seed in (1, 2):
        model = make_base(tie_word_embeddings=True)
        add_lora(model, rank=1, alpha=1, rngs=nnx.Rngs(0), targets=("q_proj",))
        model.embed_tokens.embedding[...] = model.embed_tokens.embedding[...] + seed
        save_adapter(model, tmp_path / str(seed), base="base", trained=is_embedding)
        tables.append(np.asarray(model.embed_tokens.embedding[...]))
    model = make_base(tie_word_embeddings=True)
    merge_adapters(model, [(tmp_path / "1", 0.5), (tmp_path / "2", 0.5)])
    np.testing.assert_allclose(model.embed_tokens.embedding[...], (tables[0] + tables[1]) / 2, atol=1e-6)


def test_rope(adapters, tmp_path):
    longer = [
        make_adapter(tmp_path / str(n), 1, rank=1, alpha=1, targets=("q_proj",), extend=n) for n in (128, 256)
    ]
    model = make_base()
    start = parameters(model)
    for other in (longer[1], adapters[0]):
        with pytest.raises(ValueError, match=f"one RoPE, but {longer[0]} has rope=.*, and {other} has rope="):
            merge_adapters(model, [(longer[0], 0.5), (other, 0.5)])
    assert all(np.array_equal(value, start[name]) for name, value in parameters(model).items())
    merge_adapters(model, [(longer[0], 0.5), (longer[0], 0.5)])
    assert model.config == make_base().config.extend_context(128)
