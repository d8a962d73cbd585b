"""Estimated lists, against loops over float64 numbers; and chunk by chunk, against the prompt in one shot."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jsparse import BlockMask, PooledBlocks, VerticalSlash, attention, causal
from jsparse.masks.estimate import all_blocks

BLOCK, SEGMENT = 4, 8
ESTIMATES = {
    "mean": PooledBlocks(3 * BLOCK, "mean", BLOCK),
    "bounds": PooledBlocks(3 * BLOCK, "bounds", BLOCK),
    "vertical-slash": VerticalSlash(2 * BLOCK, 2 * BLOCK, last_queries=3, block=BLOCK, segment=SEGMENT),
}
BATCH, HEADS, KV_HEADS, DIM = 3, 4, 2, 8
ROOM, CHUNK = 32, 16  # of the chunked layouts
by_estimate = pytest.mark.parametrize("name", ESTIMATES)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def block_mask(estimate, q, k, cached=0, held=None, counts=None):
    return estimate.block_mask(q, k, cached=cached, held=held, counts=counts)


def lists_of(mask, room_blocks=0, held=None):
    """{(sequence, row, query block): the blocks by position}. Checks that the lists are as promised."""
    index = np.asarray(mask.kv_index).reshape(*mask.kv_count.shape, -1)
    count, full = np.asarray(mask.kv_count), np.asarray(mask.kv_full_count)
    assert (full == count - 1).all() and (count >= 1).all()
    sizes = {name: getattr(mask, name) for name in ("q_len", "kv_len", "block_q", "block_kv")}
    BlockMask.from_indices(index, count, kv_full_count=full, **sizes)  # known lists are checked

    lists = {}
    for b, h, i in np.ndindex(count.shape):
        blocks = index[b, h, i, : count[b, h, i]].tolist()
        held_blocks = room_blocks if held is None else held[b] // BLOCK
        assert blocks == sorted(blocks) and blocks[-1] == room_blocks + i
        assert not any(held_blocks <= j < room_blocks for j in blocks)
        lists[b, h, i] = [j if j < held_blocks else j - room_blocks + held_blocks for j in blocks]
    return lists


# --- the oracle: one head of one sequence at a time ---


def best(scores, n, always):
    ranked = sorted(scores, key=lambda j: (j not in always, -scores[j], j))
    return set(ranked[:n])


def pooled_oracle(estimate, q, k):
    block, lists = estimate.block, []
    for i in range(-(-len(q) // block)):
        mean = q[i * block : (i + 1) * block].mean(axis=0)
        scores = {i: 0.0}
        for j in range(i):
            keys = k[j * block : (j + 1) * block]
            if estimate.pool == "mean":
                scores[j] = mean @ keys.mean(axis=0)
            else:
                scores[j] = np.maximum(mean * keys.min(axis=0), mean * keys.max(axis=0)).sum()
        lists.append(sorted(best(scores, estimate.budget // block, {0, i})))
    return lists


def vertical_slash_oracle(estimate, q, k):
    block, lists = estimate.block, []
    for start in range(0, len(q), estimate.segment):
        end = min(start + estimate.segment, len(q))
        columns, diagonals = np.zeros(end), np.zeros(end)
        for t in range(max(start, end - estimate.last_queries), end):
            weights = np.exp(k[: t + 1] @ q[t] / np.sqrt(q.shape[1]))
            weights /= weights.sum()
            for s in range(t + 1):
                columns[s] += weights[s]
                diagonals[t - s] += weights[s]
        blocks = range(-(-end // block))
        vertical, slash = (
            best({j: x[j * block : (j + 1) * block].max() for j in blocks}, size // block, {0})
            for x, size in ((columns, estimate.vertical), (diagonals, estimate.slash))
        )
        for i in range(start // block, -(-end // block)):
            listed = vertical | {i - d for d in slash} | {i - d - 1 for d in slash}
            lists.append(sorted(j for j in listed if 0 <= j <= i))
    return lists


def oracle(estimate, q, k, lengths):
    """{(sequence, head, query block): blocks}, of the blocks that have a token."""
    one_head = pooled_oracle if isinstance(estimate, PooledBlocks) else vertical_slash_oracle
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    return {
        (b, h, i): blocks
        for b, length in enumerate(lengths)
        for h in range(q.shape[2])
        for i, blocks in enumerate(
            one_head(estimate, q[b, :length, h], k[b, :length, h * k.shape[2] // q.shape[2]])
        )
    }


@by_estimate
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lists_are_those_of_the_loops(name, dtype):
    """Ragged sequences with a tail, and NaN after their ends; fewer KV heads than heads."""
    length, counts = 42, np.array([42, 17, 25])
    q, k = jnp.asarray(random(BATCH, length, HEADS, DIM), dtype), random(BATCH, length, KV_HEADS, DIM, seed=1)
    k = jnp.asarray(k, dtype)
    expected = oracle(ESTIMATES[name], q, k, counts)
    after = (np.arange(length) >= counts[:, None])[..., None, None]
    q, k = (jnp.where(after, jnp.nan, x) for x in (q, k))
    got = lists_of(block_mask(ESTIMATES[name], q, k, 0, None, counts))
    assert {where: got[where] for where in expected} == expected
    assert all(got[where] == [where[2]] for where in got.keys() - expected.keys())  # no token: only itself


# --- chunk by chunk ---


def lay_out(x, held, counts, start):
    """A chunk's tokens after ``start`` slots of room; NaN in every slot that has no token."""
    out = np.full((len(x), start + CHUNK, *x.shape[2:]), np.nan, np.float32)
    for b, (h, n) in enumerate(zip(held, counts, strict=True)):
        out[b, : min(h, start)] = x[b, : min(h, start)]
        out[b, start : start + n] = x[b, h : h + n]
    return out


@by_estimate
@given(
    lengths=st.tuples(*[st.integers(1, ROOM + CHUNK)] * BATCH),
    waits=st.tuples(*[st.integers(0, 2)] * BATCH),
    vocabulary=st.none() | st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_a_prompt_in_chunks_has_the_lists_of_the_whole(name, lengths, waits, vocabulary, seed):
    """Each sequence begins at a chunk of its own, so that they stand at different positions. A vocabulary
    makes tokens that repeat, and so equal scores."""
    length = ROOM + CHUNK
    q, k = random(BATCH, length, HEADS, DIM, seed=seed), random(BATCH, length, KV_HEADS, DIM, seed=seed + 1)
    if vocabulary:
        tokens = np.random.default_rng(seed).integers(0, vocabulary, (BATCH, length, 1, 1))
        q, k = (np.take_along_axis(x.round(), tokens, axis=1) for x in (q, k))
    whole = lists_of(block_mask(ESTIMATES[name], q, k, 0, None, np.array(lengths)))

    in_chunks = {}
    for step in range(max(waits) + length // CHUNK):
        done = CHUNK * np.maximum(step - np.array(waits), 0)
        held = np.minimum(done, ROOM)
        counts = np.clip(np.array(lengths) - done, 0, CHUNK) * (step >= np.array(waits))
        chunk = lay_out(q, held, counts, 0), lay_out(k, held, counts, ROOM)
        lists = lists_of(block_mask(ESTIMATES[name], *chunk, ROOM, held, counts), ROOM // BLOCK, held)
        for (b, h, i), blocks in lists.items():
            if i * BLOCK < counts[b]:
                in_chunks[b, h, held[b] // BLOCK + i] = blocks
    assert in_chunks == {where: x for where, x in whole.items() if where[2] * BLOCK < lengths[where[0]]}


def dense(q, k, v, lists, lengths):
    """out [B, T, Hq, D] in float64 of whole sequences; rows without a list are 0."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for (b, h, i), blocks in lists.items():
        for t in range(i * BLOCK, min((i + 1) * BLOCK, lengths[b])):
            seen = [s for j in blocks for s in range(j * BLOCK, (j + 1) * BLOCK) if s <= t]
            weights = np.exp(k[b, seen, h * KV_HEADS // HEADS] @ q[b, t, h] / np.sqrt(DIM))
            out[b, t, h] = weights @ v[b, seen, h * KV_HEADS // HEADS] / weights.sum()
    return out


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", [*ESTIMATES, "all"])
def test_attention_of_a_chunk_is_that_of_the_whole(name, implementation):
    held, counts = np.array([0, 16, 32]), np.array([16, 9, 14])
    lengths = held + counts
    q = random(BATCH, ROOM + CHUNK, HEADS, DIM)
    k, v = (random(BATCH, ROOM + CHUNK, KV_HEADS, DIM, seed=seed) for seed in (1, 2))
    chunk = [lay_out(q, held, counts, 0), lay_out(k, held, counts, ROOM), lay_out(v, held, counts, ROOM)]
    if name == "all":
        mask = all_blocks(BATCH, CHUNK, block=BLOCK, cached=ROOM, held=held, counts=counts)
        blocks = (ROOM + CHUNK) // BLOCK
        rows = {(b, h, i): [*range(i + 1)] for b, h, i in np.ndindex(BATCH, HEADS, blocks)}
    else:
        mask = block_mask(ESTIMATES[name], chunk[0], chunk[1], ROOM, held, counts)
        rows = oracle(ESTIMATES[name], q, k, lengths)
    expected = dense(q, k, v, rows, lengths)

    # The room that is not held stays NaN. The values in the chunk's own blocks must be finite; the dense
    # reference needs them all so.
    finite = slice(None) if implementation == "reference" else slice(ROOM, None)
    chunk[1][:, finite] = np.nan_to_num(chunk[1][:, finite], nan=7)
    chunk[2][:, finite] = np.nan_to_num(chunk[2][:, finite], nan=7)
    q_part, k_part, v_part = (jnp.asarray(x) for x in chunk)
    out = attention(q_part, k_part, v_part, mask, implementation=implementation)
    for b in range(BATCH):
        own = np.s_[held[b] : lengths[b]]
        np.testing.assert_allclose(out[b, : counts[b]], expected[b, own], atol=2e-6)


@pytest.mark.parametrize("counts", [None, np.array([5, 0])])
def test_all_blocks_are_dense_causal_attention(counts):
    lists = lists_of(all_blocks(2, 10, block=BLOCK, counts=counts))
    ends = [10, 10] if counts is None else counts
    assert lists == {
        (b, 0, i): [*range(i + 1)] if i * BLOCK < ends[b] else [i] for b in range(2) for i in range(3)
    }


# --- what the estimates are for ---


def test_a_needle_and_a_diagonal_are_found():
    """Every query attends to key 13 and to the key 21 before it."""
    length, needle, distance = 64, 13, 21
    code = random(length + distance + 1, 64) / 8  # of length 1, and nearly at right angles
    k = code[:length].copy()
    k[needle] = code[-1]
    q = 100 * (np.roll(code[:-1], distance, axis=0)[:length] + code[-1])
    q, k = (jnp.asarray(x)[None, :, None] for x in (q, k))

    estimate = VerticalSlash(2 * BLOCK, 2 * BLOCK, last_queries=4, block=BLOCK, segment=2 * SEGMENT)
    for (_, _, i), blocks in lists_of(block_mask(estimate, q, k)).items():
        if i >= 2 * SEGMENT // BLOCK:  # in the first segment no query is that far from key 0
            there = {0, needle // BLOCK, i - distance // BLOCK, i - distance // BLOCK - 1, i - 1, i}
            assert blocks == sorted(there & {*range(i + 1)})

    only_needle = jnp.broadcast_to(jnp.asarray(100 * code[-1]), q.shape)
    for pool in ("mean", "bounds"):
        lists = lists_of(block_mask(PooledBlocks(3 * BLOCK, pool, BLOCK), only_needle, k))
        assert all({0, needle // BLOCK, i} <= {*lists[0, 0, i]} for i in range(4, length // BLOCK))


@pytest.mark.parametrize(
    "estimate",
    [
        PooledBlocks(48, "mean", BLOCK),
        PooledBlocks(44, "bounds", BLOCK),
        VerticalSlash(44, BLOCK, last_queries=2, block=BLOCK, segment=SEGMENT),
        VerticalSlash(BLOCK, 48, last_queries=2, block=BLOCK, segment=SEGMENT),
    ],
)
def test_a_budget_for_all_blocks_lists_all(estimate):
    q, k = jnp.asarray(random(1, 42, HEADS, DIM)), jnp.asarray(random(1, 42, KV_HEADS, DIM, seed=1))
    mask = block_mask(estimate, q, k)
    assert all(blocks == [*range(where[2] + 1)] for where, blocks in lists_of(mask).items())
    np.testing.assert_allclose(attention(q, k, k, mask), attention(q, k, k, causal()), atol=2e-6)


@by_estimate
def test_of_equals_the_earlier_block_and_the_nearer_diagonal_are_listed(name):
    estimate, length = ESTIMATES[name], 40
    q, k = jnp.ones((1, length, 1, DIM)), jnp.zeros((1, length, 1, DIM))
    for (_, _, i), blocks in lists_of(block_mask(estimate, q, k)).items():
        expected = {0, 1, i - 2, i - 1, i} if name == "vertical-slash" else {0, 1, i}
        assert blocks == sorted(expected & {*range(i + 1)})


# --- as parts of a program ---


@by_estimate
def test_other_lengths_compile_nothing(name):
    compiled: Any = jax.jit(functools.partial(ESTIMATES[name].block_mask, cached=ROOM))
    q, k = random(2, CHUNK, HEADS, DIM), random(2, ROOM + CHUNK, KV_HEADS, DIM)
    masks = [
        compiled(q, k, held=np.array(held), counts=np.array(counts))
        for held, counts in (((0, 32), (16, 3)), ((16, 8), (0, 16)))
    ]
    assert compiled._cache_size() == 1
    assert jax.tree.structure(masks[0]) == jax.tree.structure(masks[1])


def test_memory_grows_with_the_length_and_not_with_its_square():
    length = 8192
    q, k = (jax.ShapeDtypeStruct((1, length, heads, 32), jnp.float32) for heads in (4, 2))
    for estimate in (PooledBlocks(1024), PooledBlocks(1024, "bounds"), VerticalSlash(512, 512)):
        lists = jax.jit(lambda q, k, e=estimate: jax.tree.leaves(e.block_mask(q, k)))
        analysis: Any = lists.lower(q, k).compile().memory_analysis()
        assert analysis.temp_size_in_bytes < length**2 / 4  # a sixteenth of one T x S array of float32


def test_no_gradient_flows_through_the_choice():
    estimate = ESTIMATES["vertical-slash"]
    q, k = jnp.asarray(random(1, 16, HEADS, DIM)), jnp.asarray(random(1, 16, KV_HEADS, DIM, seed=1))
    mask = block_mask(estimate, q, k)

    def loss(q, k, mask=None):
        return attention(q, k, k, estimate.block_mask(q, k) if mask is None else mask).sum()

    ours = jax.jit(jax.grad(loss, (0, 1)))(q, k)
    for x, y in zip(ours, jax.grad(loss, (0, 1))(q, k, mask), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


# --- errors ---


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PooledBlocks(128), "budget must be a multiple of 128, at least 256, not 128"),
        (lambda: PooledBlocks(300), "budget must be a multiple of 128, at least 256, not 300"),
        (lambda: PooledBlocks(256, block=0), "block must be an integer, at least 1, not 0"),
        (lambda: VerticalSlash(0, 128), "vertical must be a multiple of 128, at least 128, not 0"),
        (lambda: VerticalSlash(128, 64), "slash must be a multiple of 128, at least 128, not 64"),
        (lambda: VerticalSlash(128, 128, segment=200), "segment must be a multiple of 128, .* not 200"),
        (lambda: VerticalSlash(128, 128, 0), "last_queries must be an integer, at least 1, not 0"),
        (lambda: VerticalSlash(128, 128, 600), "last_queries must be at most segment=512, not 600"),
        (lambda: VerticalSlash(128, 128, block=True), "block must be an integer, at least 1, not True"),
        (lambda: all_blocks(1, 0), "q_len must be an integer, at least 1, not 0"),
        (lambda: all_blocks(1, 8, cached=64), "cached must be a multiple of 128, at least 0, not 64"),
    ],
)
def test_fields_that_do_not_fit_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_pool_has_two_values():
    estimate = PooledBlocks(256)
    object.__setattr__(estimate, "pool", "max")  # the shape checker would refuse it before we do
    with pytest.raises(ValueError, match="pool must be 'mean' or 'bounds', not 'max'"):
        estimate.__post_init__()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cached": 6}, "cached must be a multiple of 4, at least 0, not 6"),
        ({"cached": 12}, "held must be a multiple of 8, at least 0, not 12"),
        ({"cached": 8}, r"k must have cached \+ T = 8 \+ 16 keys, not 48"),
        ({"held": np.array([0, 12])}, "held must lie in 0..32 and be a multiple of 8, not 12"),
        ({"held": np.array([0, 40])}, "held must lie in 0..32 and be a multiple of 8, not 40"),
        ({"held": np.array([0])}, r"held must be integers \[2\], not int64 \[1\]"),
        ({"counts": np.array([0, 17])}, "counts must lie in 0..16, not 17"),
        ({"counts": np.array([0.0, 1.0])}, r"counts must be integers \[2\], not float64"),
        ({"q": random(2, 16, 3, DIM)}, "query heads must be a multiple of the KV heads"),
        ({"k": random(1, 48, 2, DIM)}, "must agree in batch and head_dim"),
        ({"k": random(2, 48, DIM)}, r"k must be floating, \[batch, tokens, heads, head_dim\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = {"q": random(2, 16, 4, DIM), "k": random(2, 48, 2, DIM), "cached": 32} | change
    unchecked = inspect.unwrap(VerticalSlash.block_mask)  # our own message, not that of the shape checker
    with pytest.raises(ValueError, match=message):
        unchecked(ESTIMATES["vertical-slash"], **arguments)
