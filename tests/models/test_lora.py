"""LoRA: nothing at first, then what its formula says, and the same after merging."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jsparse.models import Llama, LoRAParam, add_lora, has_lora, merge_lora
from jsparse.models.layers import Linear, adaptable_layers, linear_layers
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
        (("all-linear",), ALL_LAYERS),
        (("lm_head", "layers.0.mlp.up_proj"), {"lm_head", "layers.0.mlp.up_proj"}),
    ],
)  # fmt: skip
def test_targets_by_path(targets, expected, tiny_model):
    add_lora(tiny_model, rank=1, alpha=1, rngs=nnx.Rngs(1), targets=targets)
    assert {path for path, linear in adaptable_layers(tiny_model) if linear.lora_a is not None} == expected


def adapters(model):
    """(rank, scale) by path."""
    return {
        path: (linear.lora_a.shape[1], linear.lora_scale)
        for path, linear in adaptable_layers(model)
        if linear.lora_a is not None
    }


def test_ranks_and_alphas_of_some_layers(tiny_model):
    options = {"targets": ("q_proj", "up_proj", "lm_head"), "rank": 4, "alpha": 8, "rngs": nnx.Rngs(1)}
    add_lora(
        tiny_model,
        rank_pattern={r"layers\.1\.mlp.*": 2, "up_proj": 16, "lm_head": 1},  # the first counts
        alpha_pattern={"1.self_attn.q_proj": 3, "up_proj": 0.5},
        **options,
    )
    assert adapters(tiny_model) == {
        "layers.0.self_attn.q_proj": (4, 8 / 4),
        "layers.1.self_attn.q_proj": (4, 3 / 4),
        "layers.0.mlp.up_proj": (16, 0.5 / 16),
        "layers.1.mlp.up_proj": (2, 0.5 / 2),
        "lm_head": (1, 8 / 1),
    }


def test_rslora_and_layers(tiny_model):
    options = {"targets": ("q_proj", "lm_head"), "alpha": 8, "rngs": nnx.Rngs(1)}
    add_lora(tiny_model, rank=4, rank_pattern={"lm_head": 9}, layers=(1,), rslora=True, **options)
    scales = {"layers.1.self_attn.q_proj": (4, 8 / 2), "lm_head": (9, 8 / 3)}
    assert adapters(tiny_model) == scales


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 0.15)])
def test_an_adapter_on_the_head_adds_its_formula(tied, dtype, tolerance, tiny_config):
    config = dataclasses.replace(tiny_config, tie_word_embeddings=tied)
    model = Llama(config, rngs=nnx.Rngs(0), dtype=dtype)
    hidden = jax.random.normal(jax.random.key(0), (2, 5, 32), dtype)
    plain = model.logits(hidden)
    others = Llama(config, rngs=nnx.Rngs(0), dtype=dtype)
    add_lora(model, rank=2, alpha=3, rngs=nnx.Rngs(1), targets=("lm_head", "q_proj"))
    add_lora(others, rank=2, alpha=3, rngs=nnx.Rngs(1), targets=("q_proj",))
    np.testing.assert_array_equal(model.logits(hidden), plain)  # nothing at first
    ours, theirs = (each.layers[1].self_attn.q_proj.lora_a for each in (model, others))
    assert ours is not None and theirs is not None
    np.testing.assert_array_equal(
        ours[...], theirs[...]
    )  # the head comes last: the others start as without it
    randomize(model)
    head = model.lm_head
    assert head is not None and head.lora_a is not None and head.lora_b is not None
    assert (head.kernel is None) == tied and has_lora(model)
    x, a, b = (np.asarray(v, np.float64) for v in (hidden, head.lora_a[...], head.lora_b[...]))
    added = np.asarray(model.logits(hidden), np.float64) - np.asarray(plain, np.float64)
    np.testing.assert_allclose(added, 3 / 2 * x @ a @ b, atol=tolerance)
    assert model.logits(hidden).dtype == jnp.float32


def test_the_heads_adapter_drops_by_the_key_that_it_is_given(tiny_model):
    add_lora(tiny_model, rank=2, alpha=4, rngs=nnx.Rngs(1), targets=("lm_head",), dropout=0.5)
    randomize(tiny_model)
    hidden = jax.random.normal(jax.random.key(0), (1, 3, 32))
    plain = tiny_model.logits(hidden)
    np.testing.assert_array_equal(tiny_model.logits(hidden, jax.random.key(5)), plain)  # not in training
    set_dropout_keys(tiny_model, jax.random.key(1))
    keys = jax.random.split(jax.random.key(2), 4000)
    drawn = np.asarray(jax.vmap(lambda key: tiny_model.logits(hidden, key))(keys))
    assert len(np.unique(drawn[:, 0, 0, 0])) > 3900
    spread = drawn.std(0) / len(keys) ** 0.5
    assert (np.abs(drawn.mean(0) - plain) < 6 * spread + 1e-5).all()  # the same on average
    assert tiny_model.lm_head is not None and tiny_model.lm_head.dropout_key is not None
    own = tiny_model.lm_head.dropout_key[...]
    np.testing.assert_array_equal(tiny_model.logits(hidden), tiny_model.logits(hidden, own))


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
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] must be an integer >= 1, not 0"),
        (
            {"rank_pattern": {"up_proj": 3}},
            r"rank_pattern \['up_proj'\] match no .*k_proj, o_proj, q_proj, v_proj",
        ),
        ({"alpha_pattern": {"q_proj": 0}}, r"alpha_pattern\['q_proj'\] must be a positive number, not 0"),
        ({"alpha_pattern": {"[": 1}}, r"alpha_pattern '\[' is no regular expression"),
        ({"layers": (0, 2)}, r"layers must be None or some of the model's layers, 0 to 1, not \(0, 2\)"),
        ({"layers": ()}, r"layers .* not \(\)"),
        ({"layers": (1,), "targets": ("layers.0.mlp.*",)}, r"match no linear layer among layers=\(1,\)"),
        ({"exclude": ("layers.0.mlp.up_proj",), "targets": ("layers.0.mlp.up_*",)}, "without exclude="),
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
