import inspect
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsparse import BlockMask, TokenMask, attention, causal, streaming
from jsparse.masks.transposed import transposed_lists

token_masks = st.builds(
    lambda sink, window, group: (
        TokenMask(sink, window, group[0], group[1]) if group else TokenMask(sink, window)
    ),
    st.integers(0, 40),
    st.none() | st.integers(1, 40),
    st.none() | st.tuples(st.integers(1, 40), st.integers(0, 40)),
)
geometries = st.fixed_dictionaries(
    {
        "q_len": st.integers(1, 70),
        "kv_len": st.integers(1, 70),
        "block_q": st.integers(1, 17),
        "block_kv": st.integers(1, 17),
    }
)


def lists_of(mask):
    """{(row, query block): (full blocks, the others)}"""
    return {
        (r, i): (entries[:full], entries[full:])
        for r, i in np.ndindex(mask.kv_count.shape)
        for entries in [mask.kv_index[mask.kv_start[r, i] :][: mask.kv_count[r, i]].tolist()]
        for full in [mask.kv_full_count[r, i]]
    }


@given(masks=st.lists(token_masks, min_size=1, max_size=3), geometry=geometries)
@settings(max_examples=300)
def test_lists_are_exactly_the_blocks_with_something_visible(masks, geometry):
    mask = BlockMask.from_token_masks(masks, **geometry)
    lists = lists_of(mask)
    q_len, kv_len, block_q, block_kv = mask.q_len, mask.kv_len, mask.block_q, mask.block_kv
    for head, token_mask in enumerate(masks):
        row = mask.head_rows[head] if mask.head_rows else 0
        visible = token_mask(np.arange(q_len)[:, None] + kv_len - q_len, np.arange(kv_len))
        for i in range(mask.num_q_blocks):
            full, partial = set(), set()
            for j in range(mask.num_kv_blocks):
                block = visible[i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv]
                if block.all() and block.shape[1] == block_kv:
                    full.add(j)
                elif block.any():
                    partial.add(j)
            ours_full, ours_partial = lists[row, i]
            assert len(ours_full) + len(ours_partial) == len(full) + len(partial)
            assert (set(ours_full), set(ours_partial)) == (full, partial)


def test_heads_with_equal_masks_share_a_row():
    mask = BlockMask.from_token_masks([causal(), streaming(1, 2), causal(), causal()], 8, 8)
    assert mask.head_rows == (0, 1, 0, 0)
    assert mask.token_masks == (causal(), streaming(1, 2))
    assert BlockMask.from_token_masks(causal(), 8, 8).head_rows is None


def test_a_million_tokens_cost_what_their_lists_cost():
    tokens = 1_000_000
    tracemalloc.start()
    mask = BlockMask.from_token_masks([streaming(128, 8192)], tokens, tokens)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    blocks = -(-tokens // 128)
    assert mask.kv_index.size < 67 * blocks  # sink, window and the two blocks that the window straddles
    assert (
        peak < 100 * blocks * 8 * 8
    )  # a blocks x blocks array of bytes would be 61 MB; this is 50 MB of bounds

    both = BlockMask.from_token_masks([causal(), streaming(128, 8192)], tokens, tokens)
    assert both.kv_index.size == blocks * (blocks + 1) // 2 + mask.kv_index.size


@given(mask=token_masks, geometry=geometries)
def test_transposed_lists_hold_the_same_pairs(mask, geometry):
    mask = BlockMask.from_token_masks(mask, **geometry)
    flat = [x.reshape(-1) for x in (mask.kv_index, mask.kv_start, mask.kv_count, mask.kv_full_count)]
    pairs = {(i, j, j in full) for (_, i), (full, rest) in lists_of(mask).items() for j in full + rest}
    index, start, count, full_count = transposed_lists(*flat, num_kv_items=mask.num_kv_blocks)
    ours = [
        (index[start[j] + t], j, t < full_count[j])
        for j in range(mask.num_kv_blocks)
        for t in range(count[j])
    ]
    assert len(ours) == len(pairs) and set(ours) == pairs


def test_transposed_lists_skip_padding_and_agree_when_traced():
    index = np.array([[2, 0, 9, 9], [9, 9, 9, 9], [2, 1, 0, 9]], np.int32).reshape(-1)
    lists = (
        index,
        np.array([0, 4, 8], np.int32),
        np.array([2, 0, 3], np.int32),
        np.array([1, 0, 0], np.int32),
    )
    q_index, start, count, full_count = transposed_lists(*lists, num_kv_items=3)
    assert [q_index[s : s + c].tolist() for s, c in zip(start, count, strict=True)] == [[0, 2], [2], [0, 2]]
    assert full_count.tolist() == [0, 0, 1]
    traced = jax.jit(lambda *lists: transposed_lists(*lists, num_kv_items=3))(*lists)
    for ours, expected in zip(traced, (q_index, start, count, full_count), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_it_is_a_pytree_whose_lists_may_be_traced():
    mask = BlockMask.from_token_masks(causal(), 32, 32, block_q=16, block_kv=16)
    same = jax.jit(lambda mask: mask)(mask)
    assert (same.q_len, same.block_kv, same.token_masks) == (32, 16, (causal(),))
    np.testing.assert_array_equal(same.kv_index, mask.kv_index)


def as_indices(mask):
    """kv_index, kv_count, kv_full_count of a mask of one row, at a fixed capacity."""
    lists = [full + rest for full, rest in lists_of(mask).values()]
    index = np.full((1, len(lists), max(1, *map(len, lists))), -1)
    for i, blocks in enumerate(lists):
        index[0, i, : len(blocks)] = blocks
    return index, mask.kv_count, mask.kv_full_count


@given(mask=token_masks, geometry=geometries)
@settings(max_examples=200)
def test_wholly_visible_blocks_are_checked(mask, geometry):
    index, count, full_count = as_indices(BlockMask.from_token_masks(mask, **geometry))
    ours = BlockMask.from_indices(index, count, **geometry, token_mask=mask, kv_full_count=full_count)
    np.testing.assert_array_equal(ours.kv_full_count, full_count)
    for where in zip(*np.nonzero(full_count < count), strict=True):
        one_more = full_count.copy()
        one_more[where] += 1
        with pytest.raises(
            ValueError, match=f"calls block {index[where][one_more[where] - 1]} wholly visible"
        ):
            BlockMask.from_indices(index, count, **geometry, token_mask=mask, kv_full_count=one_more)


@pytest.mark.parametrize("traced", [False, True])
def test_attention_skips_the_element_mask_of_wholly_visible_blocks(traced):
    geometry = {"q_len": 45, "kv_len": 61, "block_q": 8, "block_kv": 4}
    token_mask = streaming(9, 25)
    index, count, full_count = as_indices(BlockMask.from_token_masks(token_mask, **geometry))
    assert full_count.any() and (full_count < count).any()
    rng = np.random.default_rng(0)
    q, k, v, d_out = (
        jnp.asarray(rng.normal(size=(1, length, 2, 8)), jnp.float32) for length in (45, 61, 61, 45)
    )

    def gradients(full_count, implementation):
        def loss(q, k, v, full_count):
            lists = BlockMask.from_indices(
                index, count, **geometry, token_mask=token_mask, kv_full_count=full_count
            )
            out = attention(q, k, v, lists, implementation=implementation)
            return jnp.sum(out * d_out), out

        step = jax.grad(loss, (0, 1, 2), has_aux=True)
        return jax.tree.leaves((jax.jit(step) if traced else step)(q, k, v, full_count))

    expected = gradients(full_count, "reference")
    for full in (full_count, None):
        for x, y in zip(gradients(full, "xla"), expected, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)


GEOMETRY: dict[str, Any] = {"q_len": 8, "kv_len": 12, "block_q": 4, "block_kv": 4}


@pytest.mark.parametrize(
    "index, count, message",
    [
        ([[[0, 1]]], [[1]], r"kv_index must be \[R, 2, M\] or \[B, R, 2, M\] for q_len=8, not \[1, 1, 2\]"),
        ([[[0], [1]]], [[1]], r"kv_count must be \[1, 2\]"),
        ([[[0], [1]]], [[1, 2]], r"kv_count must lie in 0..1, not 1..2"),
        ([[[0], [3]]], [[1, 1]], r"kv_index lists block 3, but the blocks are 0..2"),
        ([[[0, 1], [2, 2]]], [[2, 2]], r"lists a block twice"),
    ],
)
def test_bad_lists_are_refused(index, count, message):
    from_indices = inspect.unwrap(BlockMask.from_indices)  # our own message, not that of the shape checker
    with pytest.raises(ValueError, match=message):
        from_indices(np.array(index), np.array(count), **GEOMETRY)


@pytest.mark.parametrize(
    "full_count, message",
    [
        ([[1]], r"kv_full_count must be \[1, 2\] like kv_count, not \[1, 1\]"),
        ([[0, 3]], "kv_full_count must lie in 0..kv_count, not 3 of 2"),
        ([[-1, 0]], "kv_full_count must lie in 0..kv_count, not -1 of 1"),
        ([[1, 2]], r"calls block 2 wholly visible for query block 1, but TokenMask\(.*\) hides a part of it"),
    ],
)
def test_bad_full_counts_are_refused(full_count, message):
    from_indices = inspect.unwrap(BlockMask.from_indices)  # our own message, not that of the shape checker
    lists = np.array([[[0, 9], [1, 2]]]), np.array([[1, 2]])
    with pytest.raises(ValueError, match=message):
        from_indices(*lists, **GEOMETRY, kv_full_count=np.array(full_count))


def test_padding_of_a_list_is_not_looked_at():
    mask = BlockMask.from_indices(jnp.array([[[1, 77], [-5, 1]]]), jnp.array([[1, 0]]), **GEOMETRY)
    assert lists_of(mask) == {(0, 0): ([], [1]), (0, 1): ([], [])}


@pytest.mark.parametrize("name", ["q_len", "kv_len", "block_q", "block_kv"])
def test_lengths_and_blocks_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, not 0"):
        BlockMask.from_token_masks(causal(), **{**GEOMETRY, name: 0})


def test_masks_must_be_token_masks():
    with pytest.raises(ValueError, match="masks must be a TokenMask or a sequence of them"):
        inspect.unwrap(BlockMask.from_token_masks)([None], 8, 8)
