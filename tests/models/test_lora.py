"""LoRA: nothing at first, then what its formula says, and the same after merging."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jsparse.models import Llama, LoRAParam, add_lora, has_lora, merge_lora
from jsparse.models.layers import Linear, linear_layers
from jsparse.models.lora import set_dropout_keys

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 24)).astype(np.int32)


def randomize(model):
    """Adapters as after some training: B is no longer zero."""
    state = nnx.state(model, LoRAParam)
    nnx.update(
        model,
        jax.tree.map(lambda leaf: 0.2 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), state),
    )


def test_fresh_adapters_change_nothing(tiny_model):
    before = tiny_model(TOKENS)
    add_lora(tiny_model, rank=4, alpha=8, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(tiny_model(TOKENS), before)
    assert has_lora(tiny_model)


def test_which_layers_and_which_shapes(tiny_model):
    add_lora(tiny_model, rank=3, alpha=8, rngs=nnx.Rngs(1), targets=("k_proj", "down_proj"))
    shapes = {
        ".".join(map(str, path)): v.shape for path, v in nnx.to_flat_state(nnx.state(tiny_model, LoRAParam))
    }
    assert shapes == {
        f"layers.{layer}.{name}": shape
        for layer in (0, 1)
        for name, shape in {
            "self_attn.k_proj.lora_a": (32, 3),
            "self_attn.k_proj.lora_b": (3, 16),
            "mlp.down_proj.lora_a": (48, 3),
            "mlp.down_proj.lora_b": (3, 32),
        }.items()
    }


def test_linear_adds_the_formula():
    linear = Linear(6, 5, ("embed", "mlp"), std=1.0, rngs=nnx.Rngs(0), dtype=jnp.float32)
    holder = nnx.Dict(up_proj=linear)
    add_lora(holder, rank=2, alpha=3, rngs=nnx.Rngs(1), targets=("up_proj",))
    randomize(holder)
    assert linear.lora_a is not None and linear.lora_b is not None
    x = np.random.default_rng(0).standard_normal((4, 6))
    w, a, b = (np.asarray(v[...], np.float64) for v in (linear.kernel, linear.lora_a, linear.lora_b))
    np.testing.assert_allclose(linear(jnp.asarray(x, jnp.float32)), x @ w + 3 / 2 * x @ a @ b, atol=1e-5)


ALL_LAYERS = {
    f"layers.{layer}.{name}"
    for layer in (0, 1)
    for name in (
        *(f"self_attn.{letter}_proj" for letter in "qkvo"),
        *(f"mlp.{which}_proj" for which in ("gate", "up", "down")),
    )
}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("layers.*.mlp.up_proj",), {"layers.0.mlp.up_proj", "layers.1.mlp.up_proj"}),
        (("layers.1.self_attn.*",), {f"layers.1.self_attn.{letter}_proj" for letter in "qkvo"}),
        (("*.mlp.*", "layers.0.self_attn.q_proj"), {path for path in ALL_LAYERS if "mlp" in path}
         | {"layers.0.self_attn.q_proj"}),
        (("o_proj", "layers.[!1].mlp.gate_proj"), {path for path in ALL_LAYERS if path.endswith("o_proj")}
         | {"layers.0.mlp.gate_proj"}),
        (("k_proj", "layers.*.self_attn.k_proj"), {path for path in ALL_LAYERS if path.endswith("k_proj")}),
        (("*",), ALL_LAYERS),  # and not lm_head
    ],
)  # fmt: skip
def test_targets_by_path(targets, expected, tiny_model):
    add_lora(tiny_model, rank=1, alpha=1, rngs=nnx.Rngs(1), targets=targets)
    assert {path for path, linear in linear_layers(tiny_model) if linear.lora_a is not None} == expected


def dropping(size, dropout):
    """A linear layer whose adapter adds what dropout leaves of its input, and nothing else."""
    linear = Linear(size, size, ("embed", "mlp"), std=0.0, rngs=nnx.Rngs(0), dtype=jnp.float32)
    holder = nnx.Dict(up_proj=linear)
    add_lora(holder, rank=size, alpha=size, rngs=nnx.Rngs(1), targets=("up_proj",), dropout=dropout)
    assert linear.lora_a is not None and linear.lora_b is not None
    linear.lora_a[...] = linear.lora_b[...] = jnp.eye(size)
    return holder, linear


def test_dropout_zeroes_or_scales_up_each_element_of_the_adapters_input():
    holder, linear = dropping(8, 0.25)
    x = jnp.arange(1.0, 8 * 4000 + 1).reshape(4000, 8)
    np.testing.assert_array_equal(linear(x), x)  # no key, no dropout
    set_dropout_keys(holder, jax.random.key(0))
    ratio = np.asarray(linear(x) / x)
    assert np.all((ratio == 0) | (np.abs(ratio - 1 / 0.75) < 1e-6))
    # 4000 elements a column: 5 standard deviations of the fraction that is kept
    np.testing.assert_allclose((ratio > 0).mean(0), 0.75, atol=5 * (0.75 * 0.25 / 4000) ** 0.5)
    np.testing.assert_array_equal(linear(x) / x, ratio)  # the same key drops the same
    set_dropout_keys(holder, jax.random.key(1))
    assert np.any(linear(x) / x != ratio)
    set_dropout_keys(holder, None)
    np.testing.assert_array_equal(linear(x), x)


def test_dropout_leaves_the_base_alone_and_the_dtype():
    holder, linear = dropping(8, 0.5)
    linear.kernel[...] = jnp.eye(8)
    linear.lora_scale = 0.0
    set_dropout_keys(holder, jax.random.key(0))
    x = jnp.ones((3, 8), jnp.bfloat16)
    np.testing.assert_array_equal(linear(x), x)
    assert linear(x).dtype == jnp.bfloat16


def test_every_layer_drops_by_a_key_of_its_own(tiny_model):
    add_lora(tiny_model, rank=1, alpha=1, rngs=nnx.Rngs(1), targets=("*",), dropout=0.1)
    set_dropout_keys(tiny_model, jax.random.key(3))
    keys = [linear.dropout_key for _, linear in linear_layers(tiny_model)]
    data = {tuple(jax.random.key_data(key[...]).tolist()) for key in keys if key is not None}
    assert len(data) == len(keys) == 14
    set_dropout_keys(tiny_model, None)
    assert all(linear.dropout_key is None for _, linear in linear_layers(tiny_model))
    merge_lora(tiny_model)
    set_dropout_keys(tiny_model, jax.random.key(3))  # merged layers have nothing to drop
    assert all(linear.dropout_key is None for _, linear in linear_layers(tiny_model))


def test_dropout_in_a_training_step_is_the_same_when_layers_are_computed_again(tiny_model):
    add_lora(tiny_model, rank=4, alpha=8, rngs=nnx.Rngs(1), targets=("q_proj", "down_proj"), dropout=0.3)
    randomize(tiny_model)
    graph, adapters, rest = nnx.split(tiny_model, LoRAParam, ...)

    @functools.partial(jax.jit, static_argnames="remat")
    def gradient(adapters, key, remat):
        def loss(adapters):
            model = nnx.merge(graph, adapters, rest)
            set_dropout_keys(model, key)
            hidden = model.hidden(jnp.asarray(TOKENS), None, lambda layer, q, k, v: q, remat=remat)
            return jnp.sum(hidden**3)

        return jax.tree.leaves(jax.grad(loss)(adapters))

    first = gradient(adapters, jax.random.key(0), remat="none")
    again = gradient(adapters, jax.random.key(0), remat="layers")
    other = gradient(adapters, jax.random.key(1), remat="none")
    for ours, theirs, another in zip(first, again, other, strict=True):
        scale = float(jnp.abs(ours).max())
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * scale)
        assert float(jnp.abs(ours - another).max()) > 0.01 * scale


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-4), (jnp.bfloat16, 0.25)])
def test_merged_is_what_the_adapters_computed(dtype, tolerance, tiny_config):
    model = Llama(tiny_config, rngs=nnx.Rngs(0), dtype=dtype)
    plain = model(TOKENS)
    add_lora(model, rank=4, alpha=8, rngs=nnx.Rngs(1), targets=("q_proj", "v_proj", "o_proj", "up_proj"))
    randomize(model)
    adapted = model(TOKENS)
    merge_lora(model)
    assert not has_lora(model) and not nnx.to_flat_state(nnx.state(model, LoRAParam))
    assert model.layers[0].mlp.up_proj.kernel.dtype == dtype
    np.testing.assert_allclose(model(TOKENS), adapted, atol=tolerance)
    assert np.abs(np.asarray(adapted - plain)).max() > 4 * tolerance
    add_lora(model, rank=2, alpha=2, rngs=nnx.Rngs(2))  # a merged model takes new ones


def test_gradients_reach_adapters_only_when_asked(tiny_model):
    add_lora(tiny_model, rank=4, alpha=8, rngs=nnx.Rngs(1))
    graph, adapters, rest = nnx.split(tiny_model, LoRAParam, ...)

    def loss(adapters):
        return jnp.sum(nnx.merge(graph, adapters, rest)(TOKENS) ** 2)

    gradients = dict(nnx.to_flat_state(jax.jit(jax.grad(loss))(adapters)))
    assert {path[-1] for path in gradients} == {"lora_a", "lora_b"}
    assert len(gradients) == 2 * 4 * 2
    for path, gradient in gradients.items():  # B is zero at first, so A's gradient is too
        assert bool(jnp.any(gradient[...] != 0)) == (path[-1] == "lora_b")


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"rank": 0}, "rank must be an integer >= 1, not 0"),
        ({"rank": 2.0}, "rank"),
        ({"rank": True}, "rank"),
        ({"alpha": 0}, "alpha must be a positive number, not 0"),
        ({"alpha": float("nan")}, "alpha"),
        ({"targets": ("q_proj", "w_proj")}, "'w_proj'.*allowed are down_proj, gate_proj, k_proj, o_proj"),
        ({"targets": ("q_proj", "head")}, r"\['head'\] match.*v_proj, lm_head, all-linear, and"),
        (
            {"targets": ("q_proj", "layers.2.*")},
            r"\['layers.2.\*'\] match.*like layers.0.mlp.down_proj \(the last is layers.1.self_attn.v_proj",
        ),
        ({"targets": ("proj",)}, "'proj'"),  # a name is a whole name
        ({"dropout": 1}, r"dropout must be a number in \[0, 1\), not 1"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": True}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"targets": ()}, "targets"),
        ({"targets": "q_proj"}, "string 'q_proj'"),
    ],
)
def test_refusals(arguments, named, tiny_model):
    with pytest.raises(ValueError, match=named):
        add_lora(tiny_model, **({"rank": 2, "alpha": 4, "rngs": nnx.Rngs(0)} | arguments))
    assert not has_lora(tiny_model)


def test_no_adapter_twice_and_nothing_to_merge(tiny_model):
    with pytest.raises(ValueError, match="no LoRA adapters"):
        merge_lora(tiny_model)
    add_lora(tiny_model, rank=2, alpha=4, rngs=nnx.Rngs(0), targets=("q_proj",))
    with pytest.raises(ValueError, match="already.*merge_lora"):
        add_lora(tiny_model, rank=2, alpha=4, rngs=nnx.Rngs(0), targets=("k_proj",))
