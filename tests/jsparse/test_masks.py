import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jsparse import TokenMask, causal, shifted_groups, sliding_window, streaming


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
