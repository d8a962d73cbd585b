"""Reordered heads: the same logits from other places, and the order that was asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jsparse
from jsparse.models import Llama, LlamaConfig, add_lora, reorder_heads

TOKENS = np.random.default_rng(0).integers(0, 31, (2, 24)).astype(np.int32)
LAYERS, HEADS, KV_HEADS = 2, 8, 4
STREAMING = jsparse.streaming(1, 3)


def random_model(model_type="llama", **fields) -> Llama:
    """Every parameter random, biases and norms too, so that none that stays behind goes unnoticed."""
    config = LlamaConfig.tiny(
        vocab_size=31,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        initializer_range=0.3,
        model_type=model_type,
        **fields,
    )
    model = Llama(config, rngs=nnx.Rngs(0))
    for number, (path, parameter) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.Param))):
        if path[-1] in ("scale", "bias"):
            noise = jax.random.normal(jax.random.key(number), parameter.shape)
            parameter[...] = parameter[...] + 0.5 * noise
    return model


VARIANTS = {
    "llama": {},
    "with biases, o_proj too": {"attention_bias": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
}


@functools.cache
def model_of(variant) -> Llama:
    return random_model(**VARIANTS[variant])


def streaming_attend(streams):
    """Attention of a whole sequence in which the heads of a pattern see a sink and a window only."""
    head_masks = [
        [STREAMING if row[head // (HEADS // KV_HEADS)] else jsparse.causal() for head in range(HEADS)]
        for row in streams
    ]

    def attend(layer, q, k, v):
        return jsparse.attention(q, k, v, head_masks[layer], implementation="reference")

    return attend


def logits(model, streams):
    return model.logits(model.hidden(TOKENS, None, streaming_attend(streams)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "pattern",
    [
        [[1, 0, 0, 1], [0, 1, 1, 0]],
        [[0, 0, 0, 0], [1, 1, 1, 1]],
        [[1, 0, 1, 0], [1, 1, 0, 1]],
    ],
    ids=["halves", "none and all", "uneven"],
)
def test_the_same_logits_from_other_places(variant, pattern):
    model, streams = model_of(variant), np.array(pattern, bool)
    before = jax.tree.map(np.array, nnx.state(model))
    reordered, new_streams = reorder_heads(model, streams)

    assert new_streams.dtype == bool and new_streams.shape == streams.shape
    np.testing.assert_array_equal(new_streams, np.sort(streams, axis=1))
    # Each head streams or not, as before: a head that took another one's place would give other logits.
    np.testing.assert_allclose(logits(reordered, new_streams), logits(model, streams), atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))  # the input did not change


def test_these_logits_tell_heads_apart():
    """The control of the test above: with the heads moved and the pattern not, or half moved, they differ."""
    model, streams = model_of("qwen2"), np.array([[1, 0, 0, 1], [0, 1, 1, 0]], bool)
    reordered, new_streams = reorder_heads(model, streams)
    expected = logits(model, streams)
    assert np.abs(logits(reordered, streams) - expected).max() > 1e-2
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        for part in ("kernel", "bias"):
            mixed = nnx.clone(reordered)
            there, here = (getattr(m.layers[0].self_attn, name) for m in (mixed, model))
            if getattr(there, part) is not None:
                getattr(there, part)[...] = getattr(here, part)[...]
                assert np.abs(logits(mixed, new_streams) - expected).max() > 1e-3, (name, part)


@settings(max_examples=8)
@given(bits=st.lists(st.booleans(), min_size=LAYERS * KV_HEADS, max_size=LAYERS * KV_HEADS))
def test_any_pattern_keeps_the_order_within_each_kind(bits):
    streams = np.array(bits).reshape(LAYERS, KV_HEADS)
    model = model_of("llama")
    reordered, _ = reorder_heads(model, streams)
    dim = model.config.head_dim
    for layer, row in enumerate(streams):
        order = [h for h in range(KV_HEADS) if not row[h]] + [h for h in range(KV_HEADS) if row[h]]
        group = HEADS // KV_HEADS * dim
        for name, size in (("q_proj", group), ("k_proj", dim), ("v_proj", dim)):
            old, new = (
                np.asarray(getattr(m.layers[layer].self_attn, name).kernel[...]) for m in (model, reordered)
            )
            expected = np.concatenate([old[:, h * size : (h + 1) * size] for h in order], axis=1)
            np.testing.assert_array_equal(new, expected)
        old, new = (np.asarray(m.layers[layer].self_attn.o_proj.kernel[...]) for m in (model, reordered))
        expected = np.concatenate([old[h * group : (h + 1) * group] for h in order])
        np.testing.assert_array_equal(new, expected)


def test_dtype_and_config_stay():
    graphdef, state = nnx.split(model_of("llama"))
    model = nnx.merge(graphdef, jax.tree.map(lambda p: p.astype(jnp.bfloat16), state))
    reordered, _ = reorder_heads(model, np.array([[True, False, False, False]] * LAYERS))
    assert reordered.config == model.config
    assert {p.dtype for p in jax.tree.leaves(nnx.state(reordered))} == {jnp.dtype("bfloat16")}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (np.zeros((4, 2), bool), r"streaming_heads is \(4, 2\), but must be \(2, 4\): .* 2 layers of 4 KV"),
        (np.zeros((2, 8), bool), r"\(2, 8\), but must be \(2, 4\)"),
        (np.zeros(4, bool), r"\(4,\), but must be \(2, 4\)"),
        (np.zeros((2, 4)), "streaming_heads must be boolean.* not float64"),
    ],
)
def test_patterns_that_do_not_fit(pattern, message):
    with pytest.raises(ValueError, match=message):
        reorder_heads(model_of("llama"), pattern)


def test_adapters_are_merged_first():
    model = random_model()
    add_lora(model, rank=2, alpha=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="LoRA adapters.*merge_lora"):
        reorder_heads(model, np.zeros((LAYERS, KV_HEADS), bool))
