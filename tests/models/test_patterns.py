"""Attention patterns show what brute force over every query and key says, and survive a file."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jsparse
from jsparse import BlockMask, HeadPattern, causal, streaming
from jsparse.models import LlamaConfig
from jsparse.models.patterns import (
    AttentionPattern,
    StridedBlocks,
    full_pattern,
    grouped_pattern,
    load_pattern,
    longgen_pattern,
    middle_third,
    save_pattern,
    shifted_pattern,
    streaming_pattern,
    strided_block_mask,
)

LAYERS, HEADS, KV_HEADS = 3, 4, 2
STRIDED = StridedBlocks(block=4, window=2, stride=3)
STREAMS = np.array([[True, False], [False, False], [True, True]])


@pytest.fixture(scope="module")
def config():
    return LlamaConfig.tiny(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        initializer_range=0.3,
    )


def listed(mask, length):
    """What a BlockMask of one row for all heads shows, read off its lists entry by entry: [T, T]."""
    assert mask.kv_count.shape[0] == 1 and mask.head_rows is None and mask.q_len == mask.kv_len == length
    seen = np.zeros((length, length), bool)
    position = np.arange(length)
    for block, (start, count) in enumerate(zip(mask.kv_start[0], mask.kv_count[0], strict=True)):
        queries = position[position // mask.block_q == block]
        for kv_block in mask.kv_index[start : start + count]:
            keys = position[position // mask.block_kv == kv_block]
            seen[np.ix_(queries, keys)] = mask.token_masks[0](queries[:, None], keys)
    return seen


def visible(pattern, config, length):
    """What each layer and head sees: [layers, heads, T, T]."""
    position = np.arange(length)

    def layer(mask):
        if isinstance(mask, BlockMask):
            return [listed(mask, length)] * config.num_attention_heads
        return [head(position[:, None], position) for head in mask]

    return np.array([layer(mask) for mask in pattern.masks(config, length)])


def by_brute_force(sees, length):
    """[layers, heads, T, T] of ``sees(layer, head, query, key)``, and only the past."""
    shape = LAYERS, HEADS, length, length
    cells = (key <= query and sees(layer, head, query, key) for layer, head, query, key in np.ndindex(shape))
    return np.fromiter(cells, bool).reshape(shape)


def sees_shifted(layer, head, query, key):
    shift = 4 if head >= HEADS // 2 else 0
    borders = [0, 4, 12, 20, 24] if shift else [0, 8, 16, 24]
    return sum(query >= border for border in borders) == sum(key >= border for border in borders)


def sees_strided(layer, head, query, key):
    query_block, key_block = query // 4, key // 4
    return layer == 1 or key_block in (query_block, query_block - 1) or key_block in (0, 3, 6, 9)


PATTERNS = {
    "full": (full_pattern, lambda layer, head, query, key: True),
    "shifted": (lambda config: shifted_pattern(config, 8), sees_shifted),
    "grouped": (
        lambda config: grouped_pattern(config, 8),
        lambda layer, head, query, key: query // 8 == key // 8,
    ),
    "longgen": (
        lambda config: longgen_pattern(config, streaming(3, 5)),
        lambda layer, head, query, key: layer == 1 or key < 3 or query - key < 5,
    ),
    "longgen, other layers": (
        lambda config: longgen_pattern(config, streaming(0, 2), full_layers=(0, 2)),
        lambda layer, head, query, key: layer != 1 or query - key < 2,
    ),
    "longgen, strided": (lambda config: longgen_pattern(config, STRIDED), sees_strided),
    "streaming": (
        lambda config: streaming_pattern(config, STREAMS, sink=2, window=4),
        lambda layer, head, query, key: not STREAMS[layer, head // 2] or key < 2 or query - key < 4,
    ),
}


@pytest.mark.parametrize("name", list(PATTERNS))
def test_each_kind_shows_what_it_says_and_never_the_future(config, name):
    make, sees = PATTERNS[name]
    pattern = make(config)
    assert pattern.kind == name.split(",")[0]
    found = visible(pattern, config, 24)
    assert not np.triu(found, 1).any()
    np.testing.assert_array_equal(found, by_brute_force(sees, 24))


@pytest.mark.parametrize("name", list(PATTERNS))
def test_a_pattern_survives_its_file(config, name, tmp_path):
    pattern = PATTERNS[name][0](config)
    save_pattern(pattern, tmp_path)
    assert load_pattern(tmp_path) == pattern
    assert AttentionPattern.from_json(pattern.to_json()) == pattern


def test_the_file_alone_says_what_each_head_saw(config, tmp_path):
    save_pattern(streaming_pattern(config, STREAMS, sink=2, window=4), tmp_path)
    stored = json.loads((tmp_path / "attention_pattern.json").read_text())
    assert stored["version"] == 1 and stored["kind"] == "streaming"
    windows = [[stored["rules"][rule]["window"] for rule in layer] for layer in stored["layers"]]
    assert windows == [[4, 4, None, None], [None] * 4, [4] * 4]


@given(length=st.integers(1, 70), block=st.integers(1, 9), window=st.integers(1, 4), stride=st.integers(1, 5))
def test_strided_blocks_are_those_of_brute_force(length, block, window, stride):
    mask = strided_block_mask(StridedBlocks(block, window, stride), length)
    position = np.arange(length)
    apart = position[:, None] // block - position // block
    expected = ((apart < window) | (position // block % stride == 0)) & np.tri(length, dtype=bool)
    np.testing.assert_array_equal(listed(mask, length), expected)
    for i in range(mask.num_q_blocks):  # what is called wholly visible skips the element mask
        whole = mask.kv_index[mask.kv_start[0, i] :][: mask.kv_full_count[0, i]]
        assert all((k + 1) * block <= i * block for k in whole)


def test_strided_blocks_are_known_while_tracing_and_made_once():
    inside = []
    jax.jit(lambda x: inside.append(strided_block_mask(STRIDED, 40)) or x)(1.0)
    assert strided_block_mask(STRIDED, 40) is inside[0]
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(inside[0]))


@pytest.mark.parametrize("stride", [2, 3, 5])
def test_the_last_token_of_strided_layers_reaches_the_first_and_in_as_many_layers_as_the_stride_all(stride):
    """A block's tokens go on through windows of two blocks to the next strided block, which all later see."""
    length, block = 16 * stride, 2
    one_layer = listed(strided_block_mask(StridedBlocks(block, 2, stride), length), length)
    assert one_layer[-1, :block].all()
    reach = np.eye(length, dtype=bool)
    for layer in range(1, stride + 1):
        reach = (one_layer.astype(int) @ reach) > 0
        assert reach[-1].all() == (layer == stride)


def test_no_token_leaves_its_group_without_the_shift(config):
    layers = visible(grouped_pattern(config, 8), config, 24)[:, 0].astype(int)
    reach = np.linalg.multi_dot(list(layers)) > 0
    assert reach[15, 8] and not reach[15, 7] and not reach[16:, :16].any()


def test_one_group_of_the_whole_length_is_full_attention(config):
    found = visible(grouped_pattern(config, 24), config, 24)
    np.testing.assert_array_equal(found, visible(full_pattern(config), config, 24))


def test_query_heads_follow_the_thresholded_scores_of_their_kv_head(config):
    scores = HeadPattern([[0.9, 0.1], [0.8, 0.7], [0.2, 0.3]])
    pattern = streaming_pattern(config, scores.threshold(0.5), sink=1, window=2)
    streams = [[rule == streaming(1, 2) for rule in layer] for layer in pattern.layers]
    assert streams == [[False, False, True, True], [False] * 4, [True] * 4]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, (0,)), (2, (0,)), (3, (1,)), (4, (1,)), (12, (4, 5, 6, 7)), (80, tuple(range(26, 53)))],
)
def test_the_middle_third(layers, expected):
    assert middle_third(layers) == expected


def test_attention_follows_strided_blocks(config):
    """Against dense attention with the brute-force mask: the output, and the gradients."""
    length, dense = 24, jnp.asarray(by_brute_force(sees_strided, 24)[0])
    mask = longgen_pattern(config, STRIDED).masks(config, length)[0]
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (1, length, h, 8)) for key, h in zip(keys, (4, 2, 2), strict=True)]

    def dense_attention(q, k, v):
        k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(dense, scores, -jnp.inf)), v)

    def run(attention):
        def total(*arrays):
            out = attention(*arrays)
            return jnp.sin(out).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)
        return out, *gradients

    found = run(lambda q, k, v: jsparse.attention(q, k, v, mask))
    for one, other in zip(found, run(dense_attention), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("length", [4, 12, 20])
def test_groups_keep_their_size_at_every_length_that_they_divide(config, length):
    pattern = grouped_pattern(config, 4)
    assert pattern.masks(config, length)[0] == pattern.layers[0]
    with pytest.raises(
        ValueError, match=rf"length={length + 2} is not .* group_size=4; .* such as {length + 4}"
    ):
        pattern.masks(config, length + 2)


def test_a_pattern_is_for_a_model_of_its_shape(config):
    for changes in ({"num_hidden_layers": 2, "sliding_windows": (None,) * 2}, {"num_attention_heads": 8}):
        other = dataclasses.replace(config, **changes)
        with pytest.raises(ValueError, match="3 layers of 4 query heads, but the model has"):
            full_pattern(config).masks(other, 8)
    with pytest.raises(ValueError, match="length must be an integer >= 1, not 0"):
        full_pattern(config).masks(config, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda config: shifted_pattern(config, 7), "group_size must be even.* not 7"),
        (lambda config: grouped_pattern(config, 7), "group_size must be even.* not 7"),
        (lambda config: grouped_pattern(config, 0), "group_size must be even.* not 0"),
        (
            lambda config: longgen_pattern(config, STRIDED, (0, 3)),
            r"full_layers must be .* 0 to 2, not \[0, 3\]",
        ),
        (lambda config: longgen_pattern(config, STRIDED, (-1,)), r"full_layers must be .* not \[-1\]"),
        (lambda config: longgen_pattern(config, STRIDED, (1, 1)), r"full_layers must be different"),
        (lambda config: longgen_pattern(config, streaming(-1, 4)), "sink must be"),
        (lambda config: longgen_pattern(config, streaming(1, 0)), "window must be"),
        (lambda config: StridedBlocks(0, 1, 1), "block must be an integer >= 1, not 0"),
        (lambda config: StridedBlocks(1, 0, 1), "window must be an integer >= 1, not 0"),
        (lambda config: StridedBlocks(1, 1, 0), "stride must be an integer >= 1, not 0"),
        (
            lambda config: streaming_pattern(config, STREAMS[:2], sink=1, window=1),
            r"\[layers, kv_heads\] = \[3, 2\] for this model, not bool \[2, 2\]",
        ),
        (lambda config: AttentionPattern("dense", ((causal(),),)), "kind must be one of .* not 'dense'"),
        (lambda config: AttentionPattern("full", ()), "at least one layer"),
        (lambda config: AttentionPattern("full", ((causal(),), (causal(),) * 2)), r"layers\[1\] has 2 heads"),
        (lambda config: AttentionPattern("longgen", ((causal(), STRIDED),)), r"layers\[0\]: where one head"),
    ],
)
def test_what_cannot_be_a_pattern(config, make, message):
    with pytest.raises(ValueError, match=message):
        make(config)


def changed(**changes):
    return json.dumps(json.loads(AttentionPattern("full", ((causal(),) * 2,)).to_json()) | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[]", "must have version 1, not None"),
        (changed(version=2), "must have version 1, not 2"),
        (changed(more=1), "has version, kind, rules and layers, not .*more"),
        (changed(kind="dense"), "kind must be one of"),
        (changed(rules=5), "rules must be a list, not 5"),
        (changed(rules=[{"rule": "random"}]), r"rules\[0\] must have a rule of token_mask, strided_blocks"),
        (
            changed(rules=[{"rule": "strided_blocks", "block": 4}]),
            r"rules\[0\] must have block, stride, window",
        ),
        (
            changed(rules=[{"rule": "strided_blocks", "block": 4, "window": 0, "stride": 2}]),
            "window must be an integer >= 1, not 0",
        ),
        (changed(layers=[[0, 1]]), r"layers\[0\] must be a list of numbers of rules, 0 to 0"),
        (changed(layers=[0]), r"layers\[0\] must be a list of numbers"),
        (changed(layers=[]), "at least one layer"),
    ],
)
def test_a_file_that_is_no_pattern(text, message, tmp_path):
    (tmp_path / "attention_pattern.json").write_text(text)
    with pytest.raises(ValueError, match=f"attention_pattern.json: .*{message}"):
        load_pattern(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="was not trained with an attention pattern"):
        load_pattern(tmp_path)
