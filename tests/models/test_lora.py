"""LoRA: nothing at first, then what its formula says, and the same after merging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jsparse.models import Llama, LoRAParam, add_lora, has_lora, merge_lora
from jsparse.models.layers import Linear

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
        ({"targets": ("lm_head",)}, "lm_head"),
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
