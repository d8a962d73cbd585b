"""Each policy by name: where it must read everything, and what it must read otherwise."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse
from jsparse.cache.select.selection import Selection
from jsparse.models import LlamaConfig
from jsparse.serve import CacheConfig, SamplingParams, decode_logits, generate, loop
from jsparse.serve.config import POLICIES
from jsparse.serve.layout import layout_of
from jsparse.serve.sampling import RowParams
from jsparse.serve.state import ModelShape, new_state, split_model

SELECTING = ["lserve", "oracle", "mean", "random"]
CACHE = CacheConfig(
    capacity=64, batch=2, page_size=8, logical_page_size=4, budget=16, sink=2, window=5, prefill_chunk=16
)
GREEDY = SamplingParams(ignore_eos=True)


@pytest.fixture(scope="module")
def sequence():
    return np.random.default_rng(4).integers(0, 60, 40)


def config(policy, **fields):
    logical = None if policy == "quest" else 4
    return dataclasses.replace(CACHE, **{"policy": policy, "logical_page_size": logical, **fields})


def logits_after(model, sequence, policy, prompt):
    return decode_logits(model, sequence[:prompt], sequence[prompt:], config(policy))


# "lserve" within and beyond its budget: test_generate.py, and test_lserve_defects.py for logits.
@pytest.mark.parametrize("policy", ["oracle", "mean", "random"])
def test_policies_that_select_are_dense_within_the_budget_and_sparse_beyond(
    small, sequence, uncached, policy
):
    expected = uncached(small, sequence)
    logits = logits_after(small, sequence, policy, 2)  # the budget is 16
    np.testing.assert_allclose(logits[:14], expected[2:16], atol=1e-4)
    assert np.abs(logits[16:] - expected[18:]).max() > 1e-3
    new = generate(small, [sequence[:2]], 14, GREEDY, config(policy)).tokens[0]
    after = uncached(small, [*sequence[:2], *new])[1:-1]
    np.testing.assert_array_equal(np.argmax(after, axis=-1), new)


def test_random_pages_are_the_same_alone_and_in_a_batch(small, sequence):
    alone = generate(small, [sequence[:30]], 12, GREEDY, config("random")).tokens
    assert generate(small, [[1, 2], sequence[:30]], 12, GREEDY, config("random")).tokens[1:] == alone


def test_streaming_is_the_model_with_every_head_masked(small, sequence, uncached):
    """In a single layer, what the prompt sees decides the first new token alone: its window is of its own."""
    streaming = config("streaming", prefill_window=9)
    logits = decode_logits(small, sequence[:30], sequence[30:], streaming)
    np.testing.assert_allclose(logits, uncached(small, sequence, jsparse.streaming(2, 5))[30:], atol=1e-4)
    first = np.argmax(uncached(small, sequence, jsparse.streaming(2, 9)), axis=-1)
    for length in range(6, 41, 2):
        assert generate(small, [sequence[:length]], 1, GREEDY, streaming).tokens == [[first[length - 1]]]


def test_quest_leaves_the_first_two_layers_alone(model, sequence, uncached):
    expected = uncached(model, sequence)
    np.testing.assert_allclose(logits_after(model, sequence, "quest", 30), expected[30:], atol=1e-4)


def test_dense_is_the_cache_that_reads_everything(model, cache):
    """Which test_generate compares with the uncached model; budget and streaming heads do not apply."""
    dense = dataclasses.replace(cache, policy="dense", budget=16, streaming_heads=[[True, False]] * 2)
    assert layout_of(dense, model.config) == layout_of(cache, model.config)


def test_a_prompt_is_read_whole_however_it_is_cut(small, sequence, uncached):
    """The budget is for new tokens; chunks of one token are prompt all the same."""
    whole = np.argmax(uncached(small, sequence), axis=-1)
    one_by_one = config("lserve", prefill_chunk=1)
    for length in range(20, 41, 4):
        assert generate(small, [sequence[:length]], 1, GREEDY, one_by_one).tokens[0] == [whole[length - 1]]


# --- what a policy makes of the configuration; nothing is compiled ---


def test_what_each_policy_selects_and_keeps(model):
    streams = [[True, False], [False, False]]
    scores: dict[str, Any] = {"lserve": "bounds", "quest": "bounds", "oracle": "exact"}
    scores |= {name: name for name in ("mean", "random")}
    for policy in POLICIES:
        layout = layout_of(config(policy, streaming_heads=streams), model.config)
        selections = (None, None)
        if policy in scores and policy != "quest":  # in these layers Quest reads everything
            first = Selection(16, 4, "max", scores[policy], seed=0)
            selections = (first, dataclasses.replace(first, seed=1))  # random pages differ by layer
        assert layout.selections == selections
        heads = {"dense": ((), ()), "quest": ((), ()), "streaming": ((0, 1), (0, 1))}.get(policy, ((0,), ()))
        assert tuple(layer.streaming_heads for layer in layout.layers) == heads
        # Bounds are kept where they are read, and nowhere else.
        logical = 4 if policy == "lserve" else None
        assert [layer.logical_page_size for layer in layout.layers] == [logical] * 2


def test_whether_a_layer_with_a_sliding_window_selects_does_not_follow_from_the_capacity(one_layer):
    """Without a capacity, the longest request makes it: the others must get the same tokens beside it."""
    mistral = dataclasses.replace(one_layer, model_type="mistral", sliding_windows=(24,))

    def selects(capacity):
        layout = layout_of(config("lserve", budget=8, capacity=capacity), mistral)
        return layout.selections[0] is not None

    assert len({selects(capacity) for capacity in (16, 24, 32, 64)}) == 1


@pytest.mark.parametrize("policy", SELECTING)
def test_a_budget_over_the_capacity_keeps_no_bounds_and_chooses_nothing(model, policy):
    layout = layout_of(config(policy, budget=64), model.config)
    assert layout.selections == (None, None)
    assert [layer.logical_page_size for layer in layout.layers] == [None, None]


def test_quest_reads_pages_of_16_tokens_from_the_third_layer_on():
    assert CacheConfig(policy="quest").page_sizes() == (16, 16)
    assert CacheConfig(policy="quest", page_size=32).page_sizes() == (32, 32)
    assert CacheConfig().page_sizes() == (64, 16)
    deep = LlamaConfig.tiny(vocab_size=61, intermediate_size=48, num_hidden_layers=4, num_key_value_heads=4)
    layout = layout_of(CacheConfig(policy="quest", capacity=64, batch=1, budget=32), deep)
    chosen = [Selection(32, 1, "max", "bounds", seed) for seed in (2, 3)]
    assert layout.selections == (None, None, *chosen)
    assert [layer.logical_page_size for layer in layout.layers] == [None, None, 16, 16]


def traced(model, cache):
    """The state after generate's decode loop, which would not trace if it changed the shape of its state."""
    layout = layout_of(cache, model.config)
    structure, params = split_model(model)
    state = jax.eval_shape(lambda: new_state(layout, ModelShape(4, 2, 8, 32, jnp.float32)))
    rows = RowParams.of([GREEDY] * 2, [0, 0], [4, 4], batch=2, vocab_size=61)

    def decode(params, state):
        return loop.decode_steps(structure, params, state, rows, np.int32(1), selections=layout.selections)

    return jax.eval_shape(decode, params, state)[0]


@pytest.mark.parametrize("heads", ["max", "union", "query"])
@pytest.mark.parametrize("streams", [None, [[True, False]]])
def test_the_lists_that_are_kept_have_the_shape_of_those_that_are_chosen(small, heads, streams):
    after = traced(small, config("lserve", select_heads=heads, streaming_heads=streams))
    lists = {"max": (1, 2), "union": (1, 4), "query": (2, 2)}[heads]
    lists = lists if streams else (2 * lists[0], lists[1])
    assert after.layers[0].selected.shape == (2, *lists)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("bits", [None, 4])
def test_every_policy_goes_through_the_loop_with_and_without_codes(model, policy, bits):
    after = traced(model, config(policy, kv_bits=bits, select_heads="query"))
    kept = [layer.selected is not None for layer in after.layers]
    assert kept == [policy in SELECTING] * 2  # quest chooses for each token, and here in no layer
