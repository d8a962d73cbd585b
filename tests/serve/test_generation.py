"""generate() and stream() against the model without a cache, and that they neither recompile nor copy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jsparse
from jsparse.models import Llama
from jsparse.serve import CacheConfig, SamplingParams, decode_logits, generate, loop, stream
from jsparse.serve.commands import CacheOptions
from jsparse.serve.generation import _start
from jsparse.serve.layout import plan_cache
from jsparse.serve.sampling import RowParams
from jsparse.serve.state import ModelShape, new_state, split_model


def assert_greedy(uncached, model, prompt, new, mask=None):
    """Each new token is the uncached model's most likely one, or is as likely within rounding."""
    logits = uncached(model, prompt + new, mask)[len(prompt) - 1 : -1]
    chosen = np.take_along_axis(logits, np.array(new)[:, None], axis=1)[:, 0]
    assert (chosen >= logits.max(axis=1) - 1e-4).all()
    assert len(set(new)) > 1  # a model that repeats itself would prove little


def test_greedy_tokens_are_the_uncached_models(model, cache, prompts, uncached):
    result = generate(model, prompts, max_new_tokens=40, cache=cache)  # over several calls of 32 steps
    assert result.finish_reasons == ["length"] * 4
    for prompt, new in zip(prompts, result.tokens, strict=True):
        assert len(new) == 40
        assert_greedy(uncached, model, prompt, new)
    stats = result.stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.decoded_tokens) == (92, 160, 156)
    assert stats.decode_steps == 39 and stats.decode_tokens_per_second > 0 and stats.prefill_seconds > 0
    assert (
        stats.cache_bytes == 2 * 2 * 4 * 128 * 2 * 8 * 4
    )  # layers, k and v, rows, tokens, heads, dim, float32


def test_the_defaults_are_dense(one_layer, prompts, uncached):
    model = Llama(one_layer, rngs=nnx.Rngs(0))
    result = generate(model, prompts, sampling=SamplingParams(ignore_eos=True))
    for prompt, new in zip(prompts, result.tokens, strict=True):
        assert len(new) == 64
        assert_greedy(uncached, model, prompt, new)


def test_generate_and_its_command_read_everything_unless_a_cache_is_given(one_layer):
    model = Llama(dataclasses.replace(one_layer, max_position_embeddings=16384), rngs=nnx.Rngs(0))
    _, batch = _start(model, [[1] * 8000], 8, SamplingParams(), None, 0)
    by_command, given = (
        plan_cache(cache, model.config, [8000], [8]) for cache in (CacheOptions().cache(), CacheConfig())
    )
    assert batch.layout == by_command and not any(batch.layout.selections)
    assert any(given.selections)  # LServe's, where a cache is given


def test_decode_logits_are_the_uncached_models(model, cache, prompts, uncached):
    prompt, continuation = np.array(prompts[3]), np.array(prompts[2])
    logits = decode_logits(model, prompt, continuation, cache)
    expected = uncached(model, [*prompts[3], *prompts[2]])[50:]
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    for bad in (np.array([61]), np.array([-1]), np.array([], int)):
        with pytest.raises(ValueError, match=r"continuation must be one id or more in \[0, vocab_size=61\)"):
            decode_logits(model, prompt, bad, cache)


def test_a_budget_reads_a_context_within_it_whole_and_a_longer_one_in_part(model, cache, prompts):
    dense = generate(model, prompts, max_new_tokens=24, cache=cache).tokens
    sparse = generate(model, prompts, max_new_tokens=24, cache=dataclasses.replace(cache, budget=32)).tokens
    assert sparse[:2] == dense[:2]  # 8 + 24 tokens at most
    assert sparse[3] != dense[3]


def masks_of(layer_streams, sink, window):
    return [
        tuple(jsparse.streaming(sink, window) if s else jsparse.causal() for s in heads for _ in range(2))
        for heads in layer_streams
    ]


# Layers with one, none or only streaming heads; sink and window of 3 and 9 tokens.
LAYERS = [[[True, False], [False, True]], [[False, False], [True, True]]]


@pytest.mark.parametrize(("streams", "budget"), [(LAYERS[0], 120), (LAYERS[1], None)])
def test_cached_logits_are_the_masked_models_from_dirty_caches(model, prompts, streams, budget):
    cache = CacheConfig(128, 4, 8, 4, budget, streams, sink=3, window=9, prefill_chunk=16)
    masks = masks_of(streams, 3, 9)

    @nnx.jit
    def oracle(model, tokens):
        return model.logits(
            model.hidden(tokens, None, lambda layer, q, k, v: jsparse.attention(q, k, v, masks[layer]))
        )

    rng = np.random.default_rng(1)
    steps = 12
    sequences = [prompt + rng.integers(0, 61, steps).tolist() for prompt in prompts]
    padded = np.zeros((4, 64), np.int32)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = sequence
    expected = np.asarray(oracle(model, jnp.array(padded)))

    layout = plan_cache(cache, model.config, [len(prompt) for prompt in prompts], [14] * 4)
    structure, params = split_model(model)
    state = new_state(layout, ModelShape(4, 2, 8, 32, jnp.float32))
    # As if every page and ring were recycled from a broken sequence; pages lie anywhere.
    layers = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.layers)
    shuffled = np.random.default_rng(2).permutation(64).reshape(4, 16).astype(np.int32)
    state = dataclasses.replace(state, layers=layers, page_table=jnp.array(shuffled))
    hidden = jnp.zeros((4, 32))
    for start in range(0, 50, 16):
        counts = np.array([max(0, min(16, len(prompt) - start)) for prompt in prompts], np.int32)
        state, hidden = loop.prefill_chunk(
            structure,
            params,
            state,
            hidden,
            padded[:, start : start + 16].copy(),
            counts,
            estimates=layout.estimates,
        )
    lengths = np.array([len(prompt) for prompt in prompts])
    np.testing.assert_array_equal(state.lengths, lengths)
    rows = np.arange(4)
    np.testing.assert_allclose(model.logits(hidden), expected[rows, lengths - 1], atol=1e-4)

    step = jax.jit(
        lambda params, state, token: loop.forward(
            structure.model(params), state, token, jnp.ones(4, jnp.int32), selections=layout.selections
        )
    )
    for i in range(steps):
        hidden, state = step(params, state, padded[rows, lengths + i][:, None])
        np.testing.assert_allclose(model.logits(hidden[:, 0]), expected[rows, lengths + i], atol=1e-4)


def test_sliding_windows_of_the_model_are_kept(one_layer, uncached, prompts):
    config = dataclasses.replace(one_layer, model_type="mistral", sliding_windows=(6,))
    model = Llama(config, rngs=nnx.Rngs(0))
    cache = CacheConfig(capacity=64, batch=4, page_size=8, logical_page_size=4, prefill_chunk=16)
    result = generate(model, prompts, 14, SamplingParams(ignore_eos=True), cache)
    for prompt, new in zip(prompts, result.tokens, strict=True):
        assert_greedy(uncached, model, prompt, new)
    assert result.stats.cache_bytes == 2 * 4 * 6 * 2 * 8 * 4  # six tokens a sequence and head, no pages
    with pytest.raises(ValueError, match="layer 0, which has a sliding window of 6"):
        generate(model, prompts, 14, cache=dataclasses.replace(cache, streaming_heads=[[True, False]]))


def test_bfloat16_models_have_bfloat16_caches(one_layer, prompts):
    model = Llama(one_layer, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    cache = CacheConfig(64, 4, 8, 4, budget=16, streaming_heads=[[True, False]], sink=2, window=6)
    result = generate(model, prompts, 3, SamplingParams(ignore_eos=True), cache)
    assert [len(new) for new in result.tokens] == [3] * 4
    keys_and_values, bounds, ring = 2 * 64 * 8, 2 * 16 * 8, 2 * 8 * 8
    chosen = 4 * 2 * 4  # two pages a row, as int32
    assert result.stats.cache_bytes == 4 * (keys_and_values + bounds + ring) * 2 + chosen


SAMPLED = SamplingParams(temperature=0.8, top_k=20, top_p=0.9)


def test_a_sequence_is_the_same_alone_and_in_a_batch(model, cache, prompts):
    seeds = [5, 6, 7, 8]
    together = generate(model, prompts, 12, SAMPLED, cache, seeds)
    for row, prompt in enumerate(prompts):
        assert generate(model, [prompt], 12, SAMPLED, cache, seeds[row]).tokens == [together.tokens[row]]
    # Rows with other parameters do not touch it, nor does the order.
    mixed = [SamplingParams(), SamplingParams(temperature=2.0), SAMPLED]
    other = generate(model, [prompts[3], prompts[0], prompts[2]], 12, mixed, cache, [1, 2, 7])
    assert other.tokens[2] == together.tokens[2]
    assert other.tokens[0] == generate(model, [prompts[3]], 12, cache=cache).tokens[0]


def test_seeds_decide_and_equal_prompts_with_one_seed_are_equal(model, cache, prompts):
    prompt = prompts[1]
    first = generate(model, [prompt] * 3, 12, SAMPLED, cache, seed=[1, 1, 2])
    assert first.tokens[0] == first.tokens[1] != first.tokens[2]
    assert generate(model, [prompt] * 3, 12, SAMPLED, cache, seed=[1, 1, 2]).tokens == first.tokens


def test_stop_tokens_end_a_row_and_are_returned(model, cache, prompts):
    free = generate(model, prompts, 20, cache=cache).tokens
    stop = free[2][5]
    sampling = [
        SamplingParams(),
        SamplingParams(),
        SamplingParams(stop_token_ids=(stop, 60)),
        SamplingParams(),
    ]
    result = generate(model, prompts, 20, sampling, cache)
    end = free[2].index(stop) + 1
    assert result.tokens == [free[0], free[1], free[2][:end], free[3]]
    assert result.finish_reasons == ["length", "length", "stop", "length"]
    assert generate(model, prompts, 1, cache=cache).tokens == [new[:1] for new in free]


def test_the_models_end_token_stops_unless_ignored(model, cache, prompts):
    free = generate(model, prompts[:1], 10, cache=cache).tokens[0]
    ending = nnx.clone(model)  # in the place of one token comes the end token, 60
    kernel = ending.lm_head.kernel
    kernel[...] = kernel[...].at[:, 60].set(1.001 * kernel[:, free[3]])
    expected = [*free[: free.index(free[3])], 60]
    result = generate(ending, prompts[:1], 10, cache=cache)
    assert result.tokens == [expected] and result.finish_reasons == ["stop"]
    ignoring = generate(ending, prompts[:1], 10, SamplingParams(ignore_eos=True), cache)
    assert len(ignoring.tokens[0]) == 10 and ignoring.tokens[0][: len(expected)] == expected


def test_numbers_that_are_not_finite_end_their_row_alone(model, cache, prompts):
    clean = generate(model, prompts[:2], 10, cache=cache)
    broken = nnx.clone(model)
    # The second row meets it as it generates, the third in its prompt.
    poison = next(t for t in clean.tokens[1] if t not in [*prompts[0], *prompts[1], *clean.tokens[0]])
    broken.embed_tokens.embedding[...] = broken.embed_tokens.embedding[...].at[poison].set(jnp.nan)
    result = generate(broken, [*prompts[:2], [1, poison, 2]], 10, cache=cache)
    end = clean.tokens[1].index(poison) + 1
    assert result.tokens == [clean.tokens[0], clean.tokens[1][:end], []]
    assert result.finish_reasons == ["length", "error", "error"]


def test_stream_gives_what_generate_gives(model, cache, prompts):
    stop = generate(model, prompts, 9, cache=cache).tokens[3][4]
    sampling = [SAMPLED, SamplingParams(), SAMPLED, SamplingParams(stop_token_ids=[stop])]
    whole = generate(model, prompts, 9, sampling, cache, seed=3)
    events = list(stream(model, prompts, 9, sampling, cache, seed=3))
    for row in range(4):
        mine = [event for event in events if event.prompt == row]
        assert [event.token for event in mine] == whole.tokens[row]
        assert [event.finish_reason for event in mine] == [None] * (len(mine) - 1) + [
            whole.finish_reasons[row]
        ]
    assert [event.prompt for event in events[:8]] == [0, 1, 2, 3] * 2  # step by step


def test_stream_tells_of_an_error(model, cache):
    broken = nnx.clone(model)
    broken.embed_tokens.embedding[...] = broken.embed_tokens.embedding[...].at[9].set(jnp.nan)
    assert list(stream(broken, [[9]], 4, cache=cache)) == [(0, None, "error")]


def test_nothing_compiles_after_the_first_call(model, cache, prompts, compilations):
    generate(model, prompts, 40, cache=cache)
    compilations.clear()
    generate(model, [prompt[::-1] + [3, 4, 5] for prompt in prompts], 11, cache=cache)
    generate(model, prompts[:1], 77, SamplingParams(temperature=0.5), cache, seed=9)
    sampling = [
        SAMPLED,
        SamplingParams(1.0, top_k=3),
        SamplingParams(stop_token_ids=(1, 2, 3), ignore_eos=True),
    ]
    generate(model, [[1, 2], [3] * 60, [4] * 100], 20, sampling, cache, seed=[1, 2, 3])
    list(stream(model, prompts, 5, SamplingParams(1.5, top_p=0.5), cache))
    same_structure = jax.tree.map(lambda x: np.asarray(x) * 2, nnx.state(model))
    generate(nnx.merge(nnx.graphdef(model), jax.device_put(same_structure)), prompts, 4, cache=cache)
    assert not compilations
    jax.jit(lambda x: x + 1.25)(np.ones(3))
    assert compilations  # the counter counts


def test_the_cache_is_donated_and_never_copied(model):
    streams = [[True, False], [False, False]]
    cache = CacheConfig(32768, 2, budget=256, streaming_heads=streams, sink=4, window=60, prefill_chunk=16)
    layout = plan_cache(cache, model.config, [8, 8], [4, 4])
    structure, params = split_model(model)
    state = new_state(layout, ModelShape(4, 2, 8, 32, jnp.float32))
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.layers))
    rows = RowParams.of([SamplingParams()] * 2, [0, 0], [4, 4], batch=2, vocab_size=61)
    selections = layout.selections
    decode = loop.decode_steps.lower(
        structure, params, state, rows, np.int32(1), selections=selections
    ).compile()
    tokens, counts, hidden = np.zeros((2, 16), np.int32), np.full(2, 8, np.int32), jnp.zeros((2, 32))
    prefill = loop.prefill_chunk.lower(
        structure, params, state, hidden, tokens, counts, estimates=layout.estimates
    ).compile()
    for compiled in (decode, prefill):
        memory = compiled.memory_analysis()
        assert memory is not None and memory.alias_size_in_bytes >= cache_bytes
        assert memory.temp_size_in_bytes < cache_bytes / 8  # a copy of one layer's keys would be more
    after, _ = loop.decode_steps(structure, params, state, rows, np.int32(1), selections=selections)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.layers))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, after)))
