"""A base in 4 or 8 bits: close to the kernels, and from then on exactly the model of its decoded kernels."""

import functools
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jsparse.extras import MissingExtra
from jsparse.models import Llama, LlamaConfig, LoRAParam, add_lora, has_lora, merge_lora
from jsparse.models.frozen_base import dequantize_base, is_quantized, quantize_base
from jsparse.models.layers import FrozenCodes, Linear, linear_layers
from jsparse.models.weight_codes import coded_matmul, decode_kernel, encode_kernel

qwix = pytest.importorskip("qwix", reason="codes need qwix, from the extra `qlora`")

CONFIG = LlamaConfig.tiny(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    initializer_range=0.2,
)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 16)).astype(np.int32)


def make_model(dtype=jnp.float32):
    return Llama(CONFIG, rngs=nnx.Rngs(0), dtype=dtype)


def kernels(model):
    return {path: np.asarray(linear.kernel[...], np.float64) for path, linear in linear_layers(model)}


def randomize(model):
    """Adapters as after some training: B is no longer zero."""
    for _, linear in linear_layers(model):
        if linear.lora_b is not None:
            linear.lora_b[...] = 0.2 * jax.random.normal(jax.random.key(0), linear.lora_b.shape)


def decoded_one_by_one(codes, scales, levels):
    tile = codes.shape[0] // scales.shape[0]
    out = np.zeros(codes.shape)
    for i, j in np.ndindex(codes.shape):
        out[i, j] = levels[int(codes[i, j])] * float(scales[i // tile, j])
    return out


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_the_nearest_and_mean_what_qwix_means(bits):
    kernel = jax.random.normal(jax.random.key(1), (128, 6)) * jnp.array([1e-3, 1, 50, 1, 0, 1])
    codes, scales = encode_kernel(kernel, bits)
    assert codes.dtype == (jnp.uint4 if bits == 4 else jnp.int8)
    assert scales.shape == ((2, 6) if bits == 4 else (1, 6)) and scales.dtype == jnp.float32
    theirs = qwix.dequantize(qwix.QArray(codes, scales, None, "nf4" if bits == 4 else jnp.int8))
    ours = decode_kernel(codes, scales, jnp.float32)
    np.testing.assert_array_equal(ours, theirs)

    if bits == 4:
        every = jnp.arange(16, dtype=jnp.uint4)[:, None]
        values = np.asarray(decode_kernel(every, jnp.ones((1, 1)), jnp.float32), np.float64)[:, 0]
        assert values[0] == -1 and values[7] == 0 and values[15] == 1 and np.all(np.diff(values) > 0)
        levels = dict(enumerate(values.tolist()))
    else:
        values = np.arange(-128.0, 128)
        levels = {int(value): float(value) for value in values}
    expected = decoded_one_by_one(np.asarray(codes), np.asarray(scales), levels)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)

    wide = np.repeat(np.asarray(scales, np.float64), 128 // scales.shape[0], axis=0)
    nearest = np.abs(np.asarray(kernel)[..., None] - wide[..., None] * values).min(-1)
    np.testing.assert_allclose(np.abs(expected - np.asarray(kernel)), nearest, atol=1e-5 * wide.max())
    np.testing.assert_array_equal(ours[:, 4], 0)  # a column of zeros has no largest value to divide by


@pytest.mark.parametrize(("bits", "most"), [(4, 0.11), (8, 0.01)])
def test_kernels_are_kept_up_to_the_precision_of_the_code(bits, most):
    model = make_model()
    before = kernels(model)
    quantize_base(model, bits)
    assert is_quantized(model)
    dequantize_base(model)
    assert not is_quantized(model)
    for path, kernel in kernels(model).items():
        error = np.sqrt(np.mean((kernel - before[path]) ** 2) / np.mean(before[path] ** 2))
        assert 0 < error < most, path


@pytest.mark.parametrize(("bits", "share"), [(4, 4.5 / 16), (8, 0.5 + 2 / 64)])
def test_memory_against_bfloat16(bits, share):
    """In 4 bits 32 more for each 64 weights; in 8 bits 32 more for each output, of 64 or more weights."""
    model = make_model(jnp.bfloat16)
    before = sum(kernel.size * 2 for kernel in kernels(model).values())
    quantize_base(model, bits)
    state = nnx.state(model, FrozenCodes)
    # What a program's buffers take: nbytes counts a byte for each code of 4 bits
    memory = jax.jit(lambda state: 0, keep_unused=True).lower(state).compile().memory_analysis()
    assert memory is not None and memory.argument_size_in_bytes <= share * before
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        assert variable.size <= 61 * 64  # embedding, head and norms are left, and no kernel


@pytest.mark.parametrize("bits", [4, 8])
def test_a_coded_layer_is_the_layer_of_its_decoded_kernel(bits):
    """Value, gradient to the input and to the adapter."""
    linear = Linear(64, 8, ("embed", "mlp"), bias=True, std=1.0, rngs=nnx.Rngs(0), dtype=jnp.float32)
    holder = nnx.Dict(up_proj=linear)
    quantize_base(holder, bits)
    add_lora(holder, rank=2, alpha=4, rngs=nnx.Rngs(1), targets=("up_proj",))
    randomize(holder)
    decoded = nnx.clone(holder)
    dequantize_base(decoded)
    assert decoded.up_proj.kernel.dtype == jnp.float32 and decoded.up_proj.lora_a is not None
    x = jax.random.normal(jax.random.key(2), (3, 64))

    @jax.jit
    def value_and_gradients(state, rest, x):
        def loss(state, x):
            return jnp.sum(jnp.sin(nnx.merge(graph, state, rest).up_proj(x)))

        return jax.value_and_grad(loss, argnums=(0, 1))(state, x)

    graph, *states = nnx.split(holder, LoRAParam, ...)
    ours = jax.tree.leaves(value_and_gradients(*states, x))
    graph, *states = nnx.split(decoded, LoRAParam, ...)
    theirs = jax.tree.leaves(value_and_gradients(*states, x))
    assert len(ours) == len(theirs) == 4
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_the_backward_pass_keeps_no_decoded_kernel():
    codes, scales = encode_kernel(jnp.ones((64, 32)), 4)
    _, backward = jax.vjp(lambda x: coded_matmul(x, codes, scales), jnp.ones((2, 64)))
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.shape == (64, 32)]
    assert {leaf.dtype for leaf in kept} <= {jnp.dtype(jnp.uint4)}


def test_merged_is_what_the_adapters_computed_on_the_codes():
    model = make_model()
    quantize_base(model, 4)
    quantized = model(TOKENS)
    add_lora(model, rank=4, alpha=8, rngs=nnx.Rngs(1), targets=("q_proj", "up_proj"))
    np.testing.assert_array_equal(model(TOKENS), quantized)
    randomize(model)
    adapted = model(TOKENS)
    merge_lora(model)
    assert not has_lora(model) and not is_quantized(model)
    np.testing.assert_allclose(model(TOKENS), adapted, atol=1e-4)
    assert np.abs(np.asarray(adapted - quantized)).max() > 0.01


def test_merged_kernels_have_the_dtype_of_before():
    model = make_model(jnp.bfloat16)
    quantize_base(model, 8)
    add_lora(model, rank=4, alpha=8, rngs=nnx.Rngs(1), targets=("up_proj",))
    randomize(model)
    linear = model.layers[0].mlp.up_proj
    variables = (linear.codes, linear.scales, linear.lora_a, linear.lora_b)
    codes, scales, a, b = (np.asarray(x[...], np.float64) for x in variables if x is not None)
    merge_lora(model)
    assert {linear.kernel.dtype for _, linear in linear_layers(model)} == {jnp.dtype(jnp.bfloat16)}
    assert not jax.tree.leaves(nnx.state(model, FrozenCodes))
    exact = codes * scales + 8 / 4 * a @ b
    rounding = 2**-8 * (np.abs(codes * scales) + np.abs(exact))  # the decoded kernel, then the sum
    assert np.all(np.abs(kernels(model)["layers.0.mlp.up_proj"] - exact) <= rounding)


@pytest.mark.parametrize("bits", [4, 8])
def test_abstract_and_under_jit(bits):
    """What a restored run needs: shapes without arrays, equal to those of the real thing."""

    def make():
        model = make_model(jnp.bfloat16)
        quantize_base(model, bits)
        return model

    graph, abstract = nnx.split(nnx.eval_shape(make))
    model = make()
    real_graph, state = nnx.split(model)
    assert graph == real_graph
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
    assert shapes == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(abstract)]
    eager = model.layers[0].mlp(jnp.ones((1, 2, 64), jnp.bfloat16))

    @functools.partial(jax.jit, donate_argnums=0)
    def compiled(state, x):
        return nnx.merge(graph, state).layers[0].mlp(x), state

    ours, _ = compiled(state, jnp.ones((1, 2, 64), jnp.bfloat16))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    np.testing.assert_allclose(np.asarray(ours, float), np.asarray(eager, float), atol=0.05)


def test_codes_carry_the_names_of_the_kernels_axes():
    for bits, tiles in ((4, "mlp"), (8, None)):
        model = make_model()
        quantize_base(model, bits)
        layer = model.layers[0].mlp.down_proj
        (codes,), (scales,) = (
            jax.tree.leaves(nnx.get_partition_spec(x)) for x in (layer.codes, layer.scales)
        )
        assert tuple(codes) == ("mlp", "embed") and tuple(scales) == (tiles, "embed")


def test_only_adapters_norms_and_embeddings_are_parameters():
    model = make_model()
    quantize_base(model, 8)
    add_lora(model, rank=2, alpha=2, rngs=nnx.Rngs(0))
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    assert {path[-1] for path in paths} == {"embedding", "kernel", "lora_a", "lora_b", "scale"}
    assert [path for path in paths if path[-1] == "kernel"] == [("lm_head", "kernel")]


@pytest.mark.usefixtures("unchecked_types")
def test_refusals(monkeypatch, tiny_model):
    model = make_model()
    bad: list[Any] = [2, 16, True, 4.5, "4"]
    for bits in bad:
        with pytest.raises(ValueError, match=re.escape(f"bits must be 4 or 8, not {bits!r}")):
            quantize_base(model, bits)
    with pytest.raises(ValueError, match=r"multiple of 64.*mlp.down_proj \(48\).*allowed is bits=8"):
        quantize_base(tiny_model, 4)
    with pytest.raises(ValueError, match="multiple of 64 inputs, not 48"):
        encode_kernel(jnp.ones((48, 2)), 4)
    with pytest.raises(ValueError, match="not quantized"):
        dequantize_base(model)
    with pytest.raises(ValueError, match="no linear layers"):
        quantize_base(model.norm, 8)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "qwix", None)
        with pytest.raises(MissingExtra, match=r"pip install -e '\.\[qlora\]'"):
            quantize_base(model, 8)
    assert not is_quantized(model) and not is_quantized(tiny_model)
    quantize_base(model, 8)
    with pytest.raises(ValueError, match="quantized already.*dequantize_base"):
        quantize_base(model, 4)
    with pytest.raises(ValueError, match="no LoRA adapters"):
        merge_lora(model)


def test_a_checkpoint_holds_no_codes(tmp_path):
    model = make_model()
    quantize_base(model, 8)
    with pytest.raises(ValueError, match="quantized.*dequantize_base"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    dequantize_base(model)
    model.save_pretrained(tmp_path)
    saved = Llama.from_pretrained(tmp_path)
    for path, kernel in kernels(saved).items():
        np.testing.assert_array_equal(kernel, kernels(model)[path])
