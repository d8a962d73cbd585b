import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType

import jsparse
from jsparse import BlockMask, TokenMask, causal, shifted_groups, sliding_window, streaming
from jsparse.implementations.reference import visible_keys
from jsparse.sequence import earlier_keys, split_sequence

token_masks = st.builds(
    lambda sink, window, size, shift: TokenMask(sink, window, size, shift if size else 0),
    st.integers(0, 9),
    st.none() | st.integers(1, 40),
    st.none() | st.integers(1, 40),
    st.integers(0, 50),
)


@settings(max_examples=200)
@given(
    masks=st.lists(token_masks, min_size=1, max_size=3),
    devices=st.integers(2, 5),
    chunk=st.integers(1, 16),
)
def test_each_device_sees_what_the_masks_show(masks, devices, chunk):
    """Dense and brute force: the local masks on the fetched keys are the global masks."""
    length = devices * chunk
    dense = np.stack([mask(np.arange(length)[:, None], np.arange(length)) for mask in masks])
    split = split_sequence(tuple(masks), length, devices)
    if split.exchange == "ring":
        assert (dense == np.tri(length, dtype=bool)).all()
        return
    for device in range(devices):
        own = np.arange(device * chunk, (device + 1) * chunk)
        if split.exchange == "gather":
            fetched = np.arange(length)
        else:
            before = np.r_[: split.sink, own[0] - split.halo : own[0]] if device else []
            unknown = np.full(split.sink + split.halo - len(before), -1)
            fetched = np.r_[unknown, before, own].astype(int)
        view = split.view(device)
        keys = fetched[view.start : view.stop]
        assert (keys >= 0).all() and len(set(keys)) == len(keys)
        for mask, expected in zip(view.masks, dense[:, own], strict=True):
            local = mask(np.arange(chunk)[:, None] + len(keys) - chunk, np.arange(len(keys)))
            seen = np.zeros((chunk, length), bool)
            seen[:, keys] = local
            np.testing.assert_array_equal(seen, expected)


@settings(max_examples=200)
@given(
    masks=st.lists(token_masks.filter(lambda mask: mask.sink == 0), min_size=1, max_size=3),
    devices=st.integers(2, 5),
    chunk=st.integers(1, 16),
)
def test_a_halo_has_the_keys_that_are_needed_and_no_more(masks, devices, chunk):
    length = devices * chunk
    dense = np.stack([mask(np.arange(length)[:, None], np.arange(length)) for mask in masks]).any(axis=0)
    starts = np.arange(chunk, length, chunk)
    reach = max(start - np.argmax(dense[start : start + chunk].any(axis=0)) for start in starts)
    split = split_sequence(tuple(masks), length, devices)
    if split.exchange != "ring":
        assert (split.exchange == "halo") == (reach <= chunk)
        assert split.exchange == "gather" or split.halo == reach


@pytest.mark.parametrize(
    "masks, exchange, halo",
    [
        ((shifted_groups(16, 0), shifted_groups(16, 8)), "halo", 8),
        ((shifted_groups(16, 0),), "halo", 0),  # nothing is moved
        ((sliding_window(17),), "halo", 16),
        ((sliding_window(18),), "gather", 0),
        ((streaming(4, 13),), "halo", 12),
        ((streaming(4, 14),), "gather", 0),  # the sink would lie in the halo of device 1
        ((causal(), sliding_window(64), shifted_groups(64, 64)), "ring", 0),  # limits beyond the sequence
        ((causal(), sliding_window(4)), "gather", 0),
    ],
)
def test_the_exchange_follows_from_the_masks(masks, exchange, halo):
    split = split_sequence(masks, 64, 4)
    assert (split.exchange, split.halo) == (exchange, halo)


@pytest.mark.parametrize("chunk, block_q, block_kv", [(1, 16, 16), (32, 16, 16), (33, 16, 32), (40, 64, 16)])
@pytest.mark.parametrize("visible", [True, False])
def test_earlier_keys_are_seen_whole_or_not_at_all(chunk, block_q, block_kv, visible):
    mask = earlier_keys(visible, chunk, block_q=block_q, block_kv=block_kv)
    (seen,) = np.asarray(visible_keys(mask, 1))[0]
    expected = np.zeros_like(seen)
    expected[:, :chunk] = visible
    np.testing.assert_array_equal(seen, expected)


def test_what_cannot_be_split_is_named():
    mesh = AbstractMesh((4,), ("sequence",), axis_types=(AxisType.Auto,))
    q, odd = jnp.zeros((1, 16, 2, 16)), jnp.zeros((1, 18, 2, 16))
    lists = BlockMask.from_token_masks(causal(), 16, 16)
    with jax.sharding.use_abstract_mesh(mesh):
        with pytest.raises(NotImplementedError, match="mask must be a TokenMask.*'sequence'.*BlockMask"):
            jsparse.attention(q, q, q, lists)
        with pytest.raises(ValueError, match="18 tokens.*multiples of 4"):
            jsparse.attention(odd, odd, odd, causal())
        with pytest.raises(NotImplementedError, match="cuDNN is not called where the mesh axis 'sequence'"):
            jsparse.attention(q, q, q, causal(), implementation="cudnn")
        with pytest.raises(ValueError, match="3 were given for 2 heads"):
            jsparse.attention(q, q, q, [causal()] * 3)


@pytest.mark.parametrize(
    "implementation, names",
    [
        ("xla", ["groups", "ring", "mixed, heads split", "heads"]),
        pytest.param(
            "xla",
            [
                "groups, heads split",
                "sinks and windows",
                "ring, batch split",
                "mixed",
                "lists",
                "heads, explicit",
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "mosaic_gpu_interpret", ["groups, two devices", "ring, two devices"], marks=pytest.mark.slow
        ),
    ],
)
def test_devices_that_share_sequences_compute_what_one_does(implementation, names):
    if implementation == "mosaic_gpu_interpret" and jax.__version_info__ < (0, 12):
        pytest.skip("jax < 0.12 cannot interpret Mosaic GPU")
    program = Path(__file__).parent / "sequence_on_eight_devices.py"
    environment = os.environ | {
        # Programs this small take longer to optimise than to run.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "PJRT_NPROC": "64",  # threads for the warpgroups of all devices: jsparse.device says why
    }
    done = subprocess.run(
        [sys.executable, program, implementation, *names],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "agree on 8 devices\n"
