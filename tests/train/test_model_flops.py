"""FLOPs of a step against brute force, the paper's numbers, and the products that the real step traces."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jsparse import BlockMask, TokenMask, causal, shifted_groups, streaming
from jsparse.models import Llama, LlamaConfig, add_lora
from jsparse.models.longlora import is_trained_with_lora
from jsparse.plan.flops import Passes, attention_flops
from jsparse.train import shifted_head_masks
from jsparse.train.model_flops import step_flops
from jsparse.train.step import new_state, split_model, train_step

LLAMA_2_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=4096,
)
SMALL = LlamaConfig.tiny(vocab_size=96, intermediate_size=80)


def abstract_model(config: LlamaConfig, **lora) -> Llama:
    """``config``'s model without arrays, with adapters where ``lora`` has a rank."""

    def make():
        model = Llama(config, rngs=nnx.Rngs(0))
        if lora:
            add_lora(model, alpha=1.0, rngs=nnx.Rngs(0), **lora)
        return model

    return nnx.eval_shape(make)


@pytest.fixture(scope="module")
def llama_2_7b() -> Llama:
    return abstract_model(LLAMA_2_7B)


def visited_pairs(mask: TokenMask, length: int, block_q: int, block_kv: int) -> int:
    """Pairs of a query and a key in blocks where anything is visible, by looking at every pair."""
    position = np.arange(length)
    visible = mask(position[:, None], position)
    blocks = 0
    for first in range(0, length, block_q):
        for key in range(0, length, block_kv):
            blocks += visible[first : first + block_q, key : key + block_kv].any()
    return int(blocks) * block_q * block_kv


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 90),
    blocks=st.tuples(st.sampled_from((8, 16)), st.sampled_from((8, 16))),
    masks=st.lists(
        st.sampled_from((causal(), streaming(3, 9), shifted_groups(24, 0), shifted_groups(24, 12))),
        min_size=4,
        max_size=4,
    ),
)
def test_attention_counts_the_pairs_of_visited_blocks(length, blocks, masks):
    lists = BlockMask.from_token_masks(masks, length, length, block_q=blocks[0], block_kv=blocks[1])
    pairs = sum(visited_pairs(mask, length, *blocks) for mask in masks)
    passes = attention_flops(lists, 4, 10)
    assert passes == Passes(forward=4 * 10 * pairs, backward=14 * 10 * pairs, again=4 * 10 * pairs)


def test_attention_of_shared_rows_and_of_lists_a_sequence():
    index = np.array([[[0, 0], [0, 1]], [[0, 0], [1, 0]]], np.int32)  # two KV heads' rows
    count = np.array([[1, 2], [1, 1]], np.int32)
    geometry: dict[str, Any] = {"q_len": 32, "kv_len": 32, "block_q": 16, "block_kv": 16}
    shared = BlockMask.from_indices(index, count, **geometry)
    assert attention_flops(shared, 4, 8).forward == 4 * 8 * 256 * (2 * 3 + 2 * 2)
    batched = BlockMask.from_indices(np.stack([index, index]), np.stack([count, count - [0, 1]]), **geometry)
    assert attention_flops(batched, 4, 8) == attention_flops(shared, 4, 8)
    with pytest.raises(ValueError, match="num_q_heads=3, but the mask is for 4"):
        attention_flops(BlockMask.from_token_masks([causal()] * 4, 32, 32), 3, 8)


# 7B, TFLOP forward of one sequence, where attention is counted as the whole square: 4 N^2 d L.
@pytest.mark.parametrize(
    ("context", "attention", "projections", "mlp"),
    [
        (8192, 35.2, 35.2, 70.9),
        (16384, 140.7, 70.4, 141.8),
        (32768, 562.9, 140.7, 283.7),
        (65536, 2251.8, 281.5, 567.3),
    ],
)
def test_the_numbers_of_longlora(llama_2_7b, context, attention, projections, mlp):
    flops = step_flops(llama_2_7b, None, context=context, windows=1)
    assert flops.projections.forward / 1e12 == pytest.approx(projections, abs=0.06)
    assert flops.mlp.forward / 1e12 == pytest.approx(mlp, abs=0.06)
    # With one block for the sequence, or one a group, the blocks are the paper's squares.
    square = BlockMask.from_token_masks(causal(), context, context, block_q=context, block_kv=context)
    layer = attention_flops(square, 32, 128)
    assert 32 * layer.forward / 1e12 == pytest.approx(attention, abs=0.06)
    group = context // 4
    groups = BlockMask.from_token_masks(
        shifted_groups(group, 0), context, context, block_q=group, block_kv=group
    )
    assert 4 * attention_flops(groups, 32, 128).forward == layer.forward
    # Causal blocks of 128 tokens: half of the square, and half of the blocks on the diagonal.
    assert flops.attention.forward == 32 * layer.forward * (1 + 128 / context) / 2
    assert flops.saved == 0.0 and flops.total == flops.total_with_causal


def test_the_saving_of_longlora_at_65536(llama_2_7b):
    full = step_flops(llama_2_7b, None, context=65536, windows=1)
    sparse = step_flops(llama_2_7b, shifted_head_masks(32, 16384), context=65536, windows=1)
    assert (
        2251.8e12 + sum(p.forward for p in (full.mlp, full.head, full.projections))
    ) / 1e12 == pytest.approx(3118, rel=2e-3)
    # The causal form without the leak visits 23.4% of the causal pairs, in blocks slightly more.
    assert sparse.attention.forward / full.attention.forward == pytest.approx(0.234, abs=0.005)
    assert sparse.causal_attention == full.attention
    assert sparse.total_with_causal == full.total
    assert sparse.saved == pytest.approx(1 - sparse.total / full.total)


def test_windows_multiply_everything():
    model = abstract_model(SMALL, rank=4)
    one = step_flops(model, streaming(4, 40), context=100, windows=1, remat="layers")
    three = step_flops(model, streaming(4, 40), context=100, windows=3, remat="layers")
    assert three.attention == one.attention.times(3) and three.head == one.head.times(3)
    assert three.total == 3 * one.total


def test_layers_have_masks_of_their_own():
    model = abstract_model(SMALL)
    mixed = step_flops(model, [[causal()], [shifted_groups(128, 0)]], context=512, windows=1)
    local = step_flops(model, shifted_groups(128, 0), context=512, windows=1)
    full = step_flops(model, None, context=512, windows=1)
    assert 2 * mixed.attention.forward == local.attention.forward + full.attention.forward


def test_attention_again_is_what_the_policy_does_not_keep():
    model = abstract_model(SMALL)
    again = {
        remat: step_flops(model, None, context=64, windows=1, remat=remat).attention.again
        for remat in ("none", "layers", "attention", "dots")
    }
    forward = step_flops(model, None, context=64, windows=1).attention.forward
    assert again == {"none": 0, "layers": forward, "attention": 0, "dots": forward}


CASES = {
    "all trained": ({}, SMALL),
    "all trained, tied": ({}, dataclasses.replace(SMALL, tie_word_embeddings=True)),
    "adapters on attention": ({"rank": 3}, SMALL),
    "adapters, tied": ({"rank": 3}, dataclasses.replace(SMALL, tie_word_embeddings=True)),
    "adapters on all": ({"rank": 3, "targets": ("*",)}, SMALL),
    "adapters in one layer": ({"rank": 3, "targets": ("layers.1.mlp.*", "layers.0.self_attn.k_proj")}, SMALL),
    "adapters of many ranks, the head's too": (
        {"rank": 3, "targets": ("all-linear", "lm_head"), "rank_pattern": {"up_proj": 5, "lm_head": 7}},
        SMALL,
    ),
    "an adapter on a tied head": (
        {"rank": 3, "targets": ("lm_head", "q_proj")},
        dataclasses.replace(SMALL, tie_word_embeddings=True),
    ),
}


@pytest.mark.parametrize(
    ("case", "remat"),
    [
        ("all trained", "none"),
        ("all trained, tied", "layers"),
        ("adapters on attention", "none"),
        ("adapters, tied", "dots"),
        ("adapters on all", "attention"),
        ("adapters in one layer", "layers"),
        ("adapters of many ranks, the head's too", "none"),
        ("an adapter on a tied head", "layers"),
    ],
)
def test_the_step_traces_these_products(monkeypatch, case, remat):
    """All products with weights that the real step holds, in a model whose attention has none."""
    lora, config = CASES[case]
    group = config.num_attention_heads // config.num_key_value_heads
    monkeypatch.setattr(
        Llama,
        "attend",
        lambda self, mask, ids: lambda layer, q, k, v: q * jnp.repeat(k + v, group, axis=2),
    )
    splits = []

    def make():
        model = Llama(config, rngs=nnx.Rngs(0))
        if lora:
            add_lora(model, alpha=1.0, rngs=nnx.Rngs(0), **lora)
        params, split = split_model(model, is_trained_with_lora if lora else nnx.Param)
        splits.append(split)
        return new_state(params, optax.sgd(1.0)), split.frozen

    state, frozen = jax.eval_shape(make)
    step = train_step(splits[0], optax.sgd(1.0), None, remat=remat)
    ids = jnp.zeros((1, 2, 16), jnp.int32)
    traced = step.trace(state, frozen, ids, ids, ids == 0)
    flops = step_flops(abstract_model(config, **lora), None, context=16, windows=2, remat=remat)
    expected = sum(part.total for part in (flops.projections, flops.mlp, flops.head))
    assert product_flops(traced.jaxpr.jaxpr) == expected


@pytest.mark.parametrize("tied", [False, True])
def test_modules_trained_whole_have_gradients_of_their_own(tied):
    config = dataclasses.replace(SMALL, tie_word_embeddings=tied)
    model = abstract_model(config, rank=3, targets=("q_proj",))

    def of(*whole):
        return step_flops(model, None, context=16, windows=2, train_embeddings=False, whole=whole)

    plain, more = of(), of("model.layers.1.mlp.up_proj", "model.embed_tokens" if tied else "lm_head")
    per_token = 2 * config.hidden_size * config.intermediate_size
    assert more.mlp.backward - plain.mlp.backward == 32 * per_token
    assert more.head.backward == 2 * plain.head.backward == 2 * plain.head.forward
    assert more.projections == plain.projections


def product_flops(jaxpr) -> int:
    """FLOPs of all products in a jaxpr, those of inner ones too."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval
            inner = np.prod([lhs.shape[axis] for axis in contracted], dtype=int)
            total += 2 * int(np.prod(eqn.outvars[0].aval.shape)) * int(inner)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += eqn.params.get("length", 1) * product_flops(inner)
    return total


def test_json_names_every_part():
    flops = step_flops(abstract_model(SMALL), None, context=64, windows=1)
    fields = flops.to_json()
    assert fields["total"] == sum(
        fields[name][which]
        for name in ("attention", "projections", "mlp", "head")
        for which in ("forward", "backward", "again")
    )
    assert set(fields) == {f.name for f in dataclasses.fields(flops)} | {
        "total",
        "total_with_causal",
        "saved",
    }
