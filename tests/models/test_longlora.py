import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jsparse.models import Llama, LlamaConfig, LoRAParam, add_lora
from jsparse.models.longlora import is_trained_with_lora
from jsparse.train import shifted_head_masks
from jsparse.train.step import split_model


def dense(mask, length):
    return mask(np.arange(length)[:, None], np.arange(length)[None])


def rolled_mask(length, group):
    """The original's shifted heads: rolled by half a group and cut into groups, causal inside."""
    visible = np.zeros((length, length), bool)
    order = np.roll(np.arange(length), -group // 2)
    for start in range(0, length, group):
        members = order[start : start + group]
        for place, query in enumerate(members):
            visible[query, members[: place + 1]] = True
    return visible


@given(half_group=st.integers(1, 6), groups=st.integers(1, 5), heads=st.integers(2, 5))
def test_shifted_masks_are_the_rolled_ones_without_the_future(half_group, groups, heads):
    group, length = 2 * half_group, 2 * half_group * groups
    masks = shifted_head_masks(heads, group)
    assert len(masks) == heads
    plain = np.tril(np.kron(np.eye(groups, dtype=bool), np.ones((group, group), bool)))
    rolled = rolled_mask(length, group)
    assert rolled[0, -1]  # the leak: the first token sees the last
    for mask in masks[: heads // 2]:
        assert np.array_equal(dense(mask, length), plain)
    for mask in masks[heads // 2 :]:
        assert np.array_equal(dense(mask, length), rolled & np.tri(length, dtype=bool))


@pytest.mark.parametrize(("groups", "layers"), [(2, 3), (4, 7), (8, 15)])
def test_the_last_token_sees_the_first_after_two_layers_a_group_less_one(groups, layers):
    length = 8 * groups
    one_layer = np.any([dense(mask, length) for mask in shifted_head_masks(2, 8)], axis=0)
    reach = np.eye(length, dtype=bool)
    for layer in range(1, layers + 1):
        reach = (one_layer.astype(int) @ reach) > 0
        assert reach[-1, 0] == (layer == layers)


def future_gradients(attend_for):
    """For every i and later j, how far hidden state i moves with the input at j: [T, T], 0 where j <= i."""
    config = LlamaConfig.tiny(vocab_size=16, hidden_size=16, intermediate_size=24, initializer_range=0.3)
    model = Llama(config, rngs=nnx.Rngs(0))
    graphdef, embedding, rest = nnx.split(model, lambda path, _: "embed_tokens" in path, ...)
    tokens = jnp.arange(16, dtype=jnp.int32)[None]  # each token once, so a row of the table is one input

    def states(embedding):
        model = nnx.merge(graphdef, embedding, rest)
        return jnp.sin(model.hidden(tokens, None, attend_for(model))[0]).sum(-1)  # sin: no symmetry to cancel

    (jacobian,) = jax.tree.leaves(jax.jit(jax.jacrev(states))(embedding))
    return np.abs(np.asarray(jacobian)).sum(-1) * ~np.tri(16, dtype=bool)


def rolling_attend(model):
    """LongLoRA's first implementation: later heads are rolled by half a group, attended, and rolled back."""
    plain, group = shifted_head_masks(2, 4)[0], 4

    def attend(layer, q, k, v):
        heads = q.shape[2]
        k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
        shift = lambda x, by: x.at[:, :, heads // 2 :].set(jnp.roll(x[:, :, heads // 2 :], by, axis=1))  # noqa: E731
        q, k, v = (shift(x, -group // 2) for x in (q, k, v))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(dense(plain, q.shape[1]), scores, -jnp.inf))
        return shift(jnp.einsum("bhts,bshd->bthd", weights, v), group // 2)

    return attend


def test_no_token_sees_the_future():
    assert (future_gradients(lambda model: model.attend(shifted_head_masks(4, 4))) == 0).all()


def test_that_test_finds_the_leak_of_the_roll():
    leak = future_gradients(rolling_attend)
    assert leak[0, -1] > 1e-3 and leak[1, -2] > 1e-3


@pytest.mark.parametrize(
    ("heads", "group", "message"),
    [(1, 4, "num_heads must be at least 2.* not 1"), (2, 3, "group_size must be even.* not 3")],
)
def test_what_cannot_be_halved(heads, group, message):
    with pytest.raises(ValueError, match=message):
        shifted_head_masks(heads, group)


def trained_names(model):
    _, split = split_model(model, is_trained_with_lora)
    return {".".join(map(str, path)): np.prod(v.shape) for path, v in nnx.to_flat_state(split.trained)}


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_lora_embeddings_and_norms_are_trained_and_nothing_else(model_type):
    layers, hidden, heads, kv_heads, head_dim, rank = 3, 32, 4, 2, 16, 4
    config = LlamaConfig.tiny(
        vocab_size=50,
        hidden_size=hidden,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        model_type=model_type,
    )
    model = Llama(config, rngs=nnx.Rngs(0))
    add_lora(model, rank=rank, alpha=8, rngs=nnx.Rngs(1))
    trained = trained_names(model)
    sums = {"lora": 0, "embed": 0, "norm": 0}
    for name, size in trained.items():
        sums[next(kind for kind in sums if kind in name)] += size
    query, key = heads * head_dim, kv_heads * head_dim
    assert sums["lora"] == layers * rank * (2 * (hidden + query) + 2 * (hidden + key))
    assert sums["embed"] == 50 * hidden
    per_head = 2 * head_dim if model_type == "qwen3" else 0
    assert sums["norm"] == layers * (2 * hidden + per_head) + hidden
    assert not any("lm_head" in name or "mlp" in name or "kernel" in name for name in trained)


def test_trained_parameters_are_float32_and_the_model_keeps_its_own_dtype():
    config = LlamaConfig.tiny(
        vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = Llama(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    add_lora(model, rank=2, alpha=4, rngs=nnx.Rngs(1))
    before = {path: p.dtype for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    params, split = split_model(model, is_trained_with_lora)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    joined = nnx.state(split.join(params, split.frozen), nnx.Param)
    table = ("embed_tokens", "embedding")  # read in bfloat16, but its gradients are summed in float32
    assert {path: p.dtype for path, p in nnx.to_flat_state(joined)} == before | {table: jnp.float32}
    exported = nnx.state(split.exported(params), nnx.Param)
    assert {path: p.dtype for path, p in nnx.to_flat_state(exported)} == before
    assert any(isinstance(p, LoRAParam) for _, p in nnx.to_flat_state(joined))
