import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jsparse import BlockMask, TokenMask, causal, shifted_groups, sliding_window, streaming


def test_the_named_masks_are_the_four_integers():
    assert causal() == TokenMask()
    assert streaming(4, 8) == TokenMask(sink=4, window=8)
    assert sliding_window(8) == TokenMask(window=8)
    assert shifted_groups(8, 4) == TokenMask(group_size=8, group_shift=4)
    assert len({causal(), TokenMask(), streaming(1, 2)}) == 2  # hashable, equal by value


@given(
    sink=st.integers(0, 9),
    window=st.none() | st.integers(1, 9),
    group=st.none() | st.tuples(st.integers(1, 9), st.integers(0, 9)),
)
def test_every_pair_follows_the_definition(sink, window, group):
    size, shift = group or (None, 0)
    visible = TokenMask(sink, window, size, shift)(np.arange(20)[:, None], np.arange(20))
    for i in range(20):
        for j in range(20):
            expected = j <= i and (window is None or j < sink or j > i - window)
            expected = expected and (size is None or (j + shift) // size == (i + shift) // size)
            assert visible[i, j] == expected


def test_shifted_groups_are_the_original_roll_without_the_leak():
    """LongLoRA rolls by half a group; the pairs in which a query sees a later key are the ones to drop."""
    n, size = 32, 8
    rolled = np.roll(np.arange(n), -size // 2)
    original = np.zeros((n, n), bool)
    for start in range(0, n, size):
        group = rolled[start : start + size]
        original[np.ix_(group, group)] = np.tri(size, dtype=bool)
    ours = shifted_groups(size, size // 2)(np.arange(n)[:, None], np.arange(n))
    np.testing.assert_array_equal(ours, original & np.tri(n, dtype=bool))
    assert np.any(original & ~np.tri(n, dtype=bool))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sink": -1}, "sink must be an integer >= 0, not -1"),
        ({"sink": True}, "sink"),
        ({"window": 0}, "window must be an integer >= 1, not 0"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": 8, "group_shift": -1}, "group_shift"),
        ({"group_shift": 4}, "group_shift=4 needs a group_size"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        TokenMask(**fields)


# The lengths of queries and keys that Block-Sparse-Attention is tested with.
LENGTHS = [(113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1023, 1024), (1024, 1023)]


@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
def test_streaming_is_exact_to_the_token_with_queries_at_the_end_of_the_keys(q_len, kv_len):
    sink, window = 32, 64
    mask = BlockMask.from_token_masks(streaming(sink, window), q_len, kv_len)
    position = np.arange(q_len)[:, None] + mask.kv_len - mask.q_len
    visible = streaming(sink, window)(position, np.arange(kv_len))
    for t in range(0, q_len, 7):
        place = t + kv_len - q_len
        seen = {k for k in range(kv_len) if k <= place and (k < sink or k > place - window)}
        assert set(np.flatnonzero(visible[t]).tolist()) == seen
        if place < 0:
            assert not seen  # more queries than keys: the first ones see nothing
        block = t // mask.block_q
        begin, count = mask.kv_start[0, block], mask.kv_count[0, block]
        assert {k // mask.block_kv for k in seen} <= set(mask.kv_index[begin : begin + count].tolist())
