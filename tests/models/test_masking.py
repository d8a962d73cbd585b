"""One mask for all layers, or one entry a layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jsparse
from jsparse import BlockMask
from jsparse.models.masking import hashable, layer_masks

CAUSAL, WINDOW = jsparse.causal(), jsparse.sliding_window(3)
HEADS = (CAUSAL, WINDOW, CAUSAL, WINDOW)
BLOCKS = BlockMask.from_token_masks(HEADS, 16, 16, block_q=8, block_kv=8)


def test_a_flat_sequence_is_one_a_head_and_a_nested_one_is_one_a_layer(tiny_config):
    assert layer_masks(tiny_config, HEADS) == [HEADS, HEADS]
    assert layer_masks(tiny_config, [HEADS, HEADS[::-1]]) == [HEADS, HEADS[::-1]]
    assert layer_masks(tiny_config, [[WINDOW], BLOCKS]) == [WINDOW, BLOCKS]
    assert layer_masks(tiny_config, (BLOCKS, BLOCKS)) == [BLOCKS, BLOCKS]


def test_two_heads_and_two_layers_are_not_mixed_up(tiny_config):
    """Where there are as many heads as layers, the nesting alone tells them apart."""
    config = dataclasses.replace(tiny_config, num_attention_heads=2, num_key_value_heads=2)
    assert layer_masks(config, (CAUSAL, WINDOW)) == [(CAUSAL, WINDOW)] * 2
    assert layer_masks(config, ((CAUSAL,), (WINDOW,))) == [CAUSAL, WINDOW]


def test_each_layer_has_its_own_sliding_window(tiny_config):
    config = dataclasses.replace(tiny_config, model_type="qwen2", sliding_windows=(None, 2))
    assert layer_masks(config, [BLOCKS, [WINDOW]]) == [BLOCKS, jsparse.sliding_window(2)]
    with pytest.raises(NotImplementedError, match=r"mask\[1\], of layer 1, is a BlockMask.* 2 tokens"):
        layer_masks(config, [[WINDOW], BLOCKS])


def test_a_model_follows_the_mask_of_each_layer(tiny_model):
    """Against the same model with attention left to the caller, which sees plain causal and window masks."""
    tokens = np.arange(16)[None]

    def attend(layer, q, k, v):
        return jsparse.attention(q, k, v, (WINDOW, CAUSAL)[layer], implementation="reference")

    @nnx.jit
    def expected(model):
        return model.logits(model.hidden(tokens, None, attend))

    blocks = BlockMask.from_token_masks(WINDOW, 16, 16, block_q=8, block_kv=8)
    masks = [blocks, [CAUSAL]], [[CAUSAL], [WINDOW]]
    found = nnx.jit(lambda model: [model(tokens, mask=mask) for mask in masks])
    same, other = found(tiny_model)
    np.testing.assert_allclose(same, expected(tiny_model), atol=1e-5)
    assert float(jnp.abs(same - other).max()) > 1e-3


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[CAUSAL]] * 3, "mask has 3 entries for num_hidden_layers=2"),
        ([BLOCKS], "mask has 1 entries for num_hidden_layers=2"),
        ([HEADS, HEADS[:3]], r"mask\[1\], of layer 1, has 3 TokenMasks for num_attention_heads=4"),
        ([[], HEADS], r"mask\[0\], of layer 0, has 0 TokenMasks"),
        (HEADS[:2], "mask has 2 TokenMasks for num_attention_heads=4"),
    ],
)
def test_wrong_lengths(tiny_config, mask, message):
    with pytest.raises(ValueError, match=message):
        layer_masks(tiny_config, mask)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([BLOCKS, CAUSAL], r"mask\[1\] is a TokenMask among entries of layers.*write \[TokenMask"),
        ([HEADS, "full"], r"mask\[1\], of layer 1, must be None"),
        ([HEADS, [1] * 4], r"mask\[1\], of layer 1, must be None"),
        ([HEADS, [HEADS]], r"mask\[1\], of layer 1, must be None"),
    ],
)
def test_wrong_types(tiny_config, mask, message):
    with pytest.raises(TypeError, match=message):
        layer_masks(tiny_config, mask)


def test_a_hashable_mask_is_the_same_mask():
    for mask in (None, CAUSAL, BLOCKS):
        assert hashable(mask) is mask
    nested = hashable([[CAUSAL, WINDOW], BLOCKS])
    assert nested == ((CAUSAL, WINDOW), BLOCKS) and hash(nested) == hash(hashable([[CAUSAL, WINDOW], BLOCKS]))
    jax.jit(lambda x, mask: x, static_argnums=1)(1.0, nested)
