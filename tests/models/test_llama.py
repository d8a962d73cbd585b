"""The model without an outside oracle: causality, segments, windows, masks, rematerialisation, refusals."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jsparse
from jsparse.masks.block_mask import BlockMask
from jsparse.models import Llama
from jsparse.models.masking import layer_masks, within_window

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 40)).astype(np.int32)


def variant(config, **fields):
    return Llama(dataclasses.replace(config, **fields), rngs=nnx.Rngs(0))


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=0)


def differ(a, b):
    assert np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-2


def test_the_past_does_not_see_the_future(tiny_model):
    changed = TOKENS.copy()
    changed[:, 25:] = (changed[:, 25:] + 1) % 61
    before, after = tiny_model(jnp.asarray(TOKENS)), tiny_model(jnp.asarray(changed))
    close(before[:, :25], after[:, :25], atol=0)
    differ(before[:, 25:], after[:, 25:])


def test_logits_are_float32_and_jit_changes_nothing(tiny_model, tiny_config):
    eager = tiny_model(jnp.asarray(TOKENS))
    assert eager.shape == (2, 40, 61) and eager.dtype == jnp.float32
    close(jax.jit(lambda model, tokens: model(tokens))(tiny_model, TOKENS), eager)
    half = Llama(tiny_config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    assert half.hidden(TOKENS, None, half.attend()).dtype == jnp.bfloat16
    assert half(TOKENS).dtype == jnp.float32


def test_segments_are_separate_sequences(tiny_model):
    segments = jnp.asarray(np.repeat([[0, 1, 2]], [15, 10, 15], axis=1).repeat(2, axis=0).astype(np.int32))
    packed = tiny_model(jnp.asarray(TOKENS), segment_ids=segments)
    for start, stop in ((0, 15), (15, 25), (25, 40)):
        close(packed[:, start:stop], tiny_model(jnp.asarray(TOKENS[:, start:stop])))
    differ(packed[:, 15:], tiny_model(jnp.asarray(TOKENS))[:, 15:])


def test_only_distances_between_positions_matter(tiny_model):
    shifted = jnp.broadcast_to(jnp.arange(40) + 17, (2, 40))
    close(tiny_model(TOKENS, shifted), tiny_model(TOKENS))
    differ(tiny_model(TOKENS, 2 * shifted), tiny_model(TOKENS))


def test_a_window_hides_what_is_behind_it(tiny_config):
    model = variant(tiny_config, model_type="mistral", sliding_windows=(5, 5))
    changed = TOKENS.copy()
    changed[:, 0] = (changed[:, 0] + 1) % 61
    before, after = model(TOKENS), model(changed)
    # two layers of window 5: token 8 is the last that token 0 reaches
    differ(before[:, 8], after[:, 8])
    close(before[:, 9:], after[:, 9:], atol=0)


@pytest.mark.parametrize("windows", [(6, 6), (None, 6)])
def test_a_layer_keeps_its_window_under_a_mask(windows, tiny_config):
    model = variant(tiny_config, model_type="qwen2", sliding_windows=windows)
    groups = jsparse.shifted_groups(16, 8)
    expected = [
        groups if window is None else dataclasses.replace(groups, window=window) for window in windows
    ]

    def attend(layer, q, k, v) -> Any:
        return jsparse.attention(q, k, v, expected[layer])

    close(model(TOKENS, mask=groups), model.logits(model.hidden(TOKENS, None, attend)))
    differ(model(TOKENS, mask=groups), model(TOKENS))


@pytest.mark.parametrize("window", [1, 5, 9])
@pytest.mark.parametrize(
    "mask",
    [
        jsparse.causal(),
        jsparse.sliding_window(7),
        jsparse.streaming(3, 9),
        jsparse.shifted_groups(8, 4),
        jsparse.TokenMask(sink=2, window=9, group_size=12, group_shift=5),
    ],
)
def test_within_window_is_the_intersection(mask, window):
    q, k = np.arange(40)[:, None], np.arange(40)
    np.testing.assert_array_equal(within_window(mask, window)(q, k), mask(q, k) & (k > q - window))


def test_masks_of_heads_and_blocks(tiny_model):
    masks = [
        jsparse.causal(),
        jsparse.streaming(2, 6),
        jsparse.shifted_groups(16, 8),
        jsparse.sliding_window(9),
    ]
    by_heads = tiny_model(TOKENS, mask=masks)
    blocks = BlockMask.from_token_masks(masks, 40, 40, block_q=16, block_kv=16)
    close(tiny_model(TOKENS, mask=blocks), by_heads)
    differ(by_heads, tiny_model(TOKENS))


def test_mask_refusals(tiny_model, tiny_config):
    with pytest.raises(ValueError, match="2 TokenMasks for num_attention_heads=4"):
        tiny_model(TOKENS, mask=[jsparse.causal()] * 2)
    windowed = dataclasses.replace(tiny_config, model_type="mistral", sliding_windows=(8, 8))
    blocks = BlockMask.from_token_masks([jsparse.causal()] * 4, 40, 40)
    with pytest.raises(NotImplementedError, match="BlockMask.*sliding windows"):
        layer_masks(windowed, blocks)
    with pytest.raises(NotImplementedError, match="sink.*sliding window"):
        layer_masks(windowed, jsparse.streaming(2, 4))


@pytest.mark.usefixtures("unchecked_types")
def test_mask_of_another_type(tiny_config):
    masks: list[Any] = ["causal", [1], 3]
    for mask in masks:
        with pytest.raises(TypeError, match="mask must be None, a TokenMask"):
            layer_masks(tiny_config, mask)


@pytest.mark.parametrize("bad", [-1, 61, 2**31 - 1])
def test_ids_outside_the_vocabulary(bad, tiny_model):
    tokens = TOKENS.copy()
    tokens[1, 3] = bad
    for given in (tokens, jnp.asarray(tokens)):
        with pytest.raises(ValueError, match=f"tokens has ids {bad}; allowed are 0 to 60"):
            tiny_model(given)


@pytest.mark.usefixtures("unchecked_types")
def test_shape_and_dtype_refusals(tiny_model):
    with pytest.raises(ValueError, match=r"tokens must be an array of integers.*\[B, T\].*not int32\[40\]"):
        tiny_model(TOKENS[0])
    with pytest.raises(ValueError, match="tokens must be an array of integers.*float32"):
        tiny_model(TOKENS.astype(np.float32))
    with pytest.raises(ValueError, match=r"neither of them zero.*\[1, 0\]"):
        tiny_model(TOKENS[:1, :0])
    with pytest.raises(TypeError, match="tokens must be an array.*list"):
        tiny_model(TOKENS.tolist())
    with pytest.raises(ValueError, match=r"positions has shape \(40,\), tokens \(2, 40\)"):
        tiny_model(TOKENS, jnp.arange(40))
    with pytest.raises(ValueError, match=r"segment_ids has shape \(1, 40\), tokens \(2, 40\)"):
        tiny_model(TOKENS, segment_ids=TOKENS[:1])


def test_attend_gets_layers_in_order_with_rotated_and_normed_heads(tiny_config):
    model = variant(tiny_config, model_type="qwen3", head_dim=16)
    q_norm = model.layers[1].self_attn.q_norm
    assert q_norm is not None
    q_norm.scale[...] = jnp.full((16,), 3.0)
    seen = []

    def attend(layer, q, k, v) -> Any:
        seen.append((layer, q, k, v))
        return jsparse.attention(q, k, v, jsparse.causal())

    hidden = model.hidden(TOKENS, None, attend)
    close(model.logits(hidden), model(TOKENS), atol=0)
    assert [layer for layer, *_ in seen] == [0, 1]
    assert seen[0][1].shape == (2, 40, 4, 16)
    assert seen[0][2].shape == seen[0][3].shape == (2, 40, 2, 16)
    # a rotation keeps lengths, so the norm of a head shows that its RMS norm came before
    close(jnp.linalg.norm(seen[0][1], axis=-1), 4.0, atol=1e-2)
    close(jnp.linalg.norm(seen[1][1], axis=-1), 12.0, atol=1e-2)


def test_remat_changes_no_gradient(tiny_model):
    graph, state = nnx.split(tiny_model)

    def loss(state, remat, trained=nnx.Param):
        model = nnx.merge(graph, state)
        hidden = model.hidden(TOKENS, None, model.attend(), remat=remat, trained=trained)
        return jnp.sum(model.logits(hidden) ** 2)

    plain = jax.jit(jax.grad(loss), static_argnums=1)(state, "none")
    for policy in ("layers", "attention", "dots"):
        recomputed = jax.jit(jax.grad(loss), static_argnums=1)(state, policy)
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(recomputed), strict=True):
            scale = float(jnp.abs(a).max())
            assert scale > 0
            close(a / scale, b / scale)
        assert "remat" in str(jax.make_jaxpr(loss, static_argnums=1)(state, policy))
    assert "remat" not in str(jax.make_jaxpr(loss, static_argnums=1)(state, "none"))


def test_parameters_carry_logical_axes(tiny_config):
    model = variant(tiny_config, attention_bias=True, mlp_bias=True)
    axes = {
        ".".join(map(str, path)): variable.get_metadata()["out_sharding"]
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    assert axes["embed_tokens.embedding"] == ("vocab", "embed")
    assert axes["lm_head.kernel"] == ("embed", "vocab")
    assert axes["norm.scale"] == axes["layers.1.input_layernorm.scale"] == ("embed",)
    assert axes["layers.0.self_attn.q_proj.kernel"] == ("embed", "heads")
    assert axes["layers.0.self_attn.k_proj.bias"] == ("kv_heads",)
    assert axes["layers.0.self_attn.o_proj.kernel"] == ("heads", "embed")
    assert axes["layers.0.mlp.down_proj.kernel"] == ("mlp", "embed")
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        assert len(variable.get_metadata()["out_sharding"]) == variable[...].ndim, path
        assert variable[...].sharding == jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_modules_have_hugging_faces_names(tiny_config):
    model = variant(tiny_config, tie_word_embeddings=True)
    assert model.lm_head is None
    names = {".".join(map(str, path)).replace("layers.1.", "") for path, _ in nnx.iter_modules(model)}
    for name in (
        "embed_tokens",
        "input_layernorm",
        "self_attn.q_proj",
        "post_attention_layernorm",
        "mlp.gate_proj",
        "norm",
    ):
        assert name in names
