"""Patterns of other papers, written as lists, against dense attention under the papers' definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse
from jsparse.examples import gallery


def dense(q, k, v, seen):
    """softmax(q kᵀ / sqrt(D)) v over what is seen [T, T], in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    weights = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhts,bshd->bthd", weights, v)


def inputs(tokens, batch=1):
    keys = jax.random.split(jax.random.key(tokens), 3)
    heads = (4, 2, 2)
    return [jax.random.normal(key, (batch, tokens, n, 8)) for key, n in zip(keys, heads, strict=True)]


def by_definition(tokens, sees):
    """The mask of ``sees(i, j)`` for tokens i and j, without what comes later."""
    return np.array([[j <= i and sees(i, j) for j in range(tokens)] for i in range(tokens)])


def criss_cross_seen(height, width, block):
    def sees(i, j):
        (y, x), (v, u) = divmod(i // block, width), divmod(j // block, width)
        return y == v or x == u

    return by_definition(height * width * block, sees)


def arrow_seen(num_blocks, window, block):
    def sees(i, j):
        near = i // block - j // block < window
        return near or j < block or i >= (num_blocks - 1) * block

    return by_definition(num_blocks * block, sees)


def local_and_global_seen(anchors, local, window, block):
    first = anchors * block

    def sees(i, j):
        return j < first or (
            i >= first and (i - first) // (window * block) == (j - first) // (window * block)
        )

    return by_definition((anchors + local) * block, sees)


@pytest.mark.parametrize(
    ("lists", "seen"),
    [
        (gallery.criss_cross(5, 6), criss_cross_seen(5, 6, 1)),
        (gallery.criss_cross(3, 4, block=4), criss_cross_seen(3, 4, 4)),
        (gallery.arrow(9, window=2, block=4), arrow_seen(9, 2, 4)),
        (gallery.local_and_global(2, 7, window=3, block=4), local_and_global_seen(2, 7, 3, 4)),
    ],
    ids=["criss-cross", "criss-cross-blocks", "arrow", "local-and-global"],
)
def test_lists_show_what_the_paper_shows(lists, seen):
    q, k, v = inputs(len(seen))
    np.testing.assert_allclose(jsparse.attention(q, k, v, lists), dense(q, k, v, seen), atol=1e-5)


def test_an_arrow_without_its_head_is_streaming():
    q, k, v = inputs(32)
    by_tokens = jsparse.attention(q, k, v, jsparse.streaming(sink=1, window=8))
    seen = by_definition(32, lambda i, j: i - j < 8 or j == 0)
    np.testing.assert_allclose(by_tokens, dense(q, k, v, seen), atol=1e-5)


@pytest.mark.parametrize("top", [1, 3])
def test_routed_regions(top):
    region, n = 4, 6
    q, k, v = inputs(n * region, batch=2)
    out = jsparse.attention(q, k, v, gallery.routed_regions(q, k, region=region, top=top))

    queries, keys = (np.asarray(x, np.float64) for x in (q, jnp.repeat(k, 2, axis=2)))
    for b in range(2):
        regions = {}
        for i in range(n):
            mean_query = queries[b, i * region : (i + 1) * region].mean(axis=0)
            affinity = [
                (mean_query * keys[b, j * region : (j + 1) * region].mean(axis=0)).sum() for j in range(i)
            ]
            regions[i] = {i, *np.argsort(affinity)[::-1][: top - 1]}
        seen = by_definition(n * region, lambda i, j, regions=regions: j // region in regions[i // region])
        one = slice(b, b + 1)
        np.testing.assert_allclose(out[one], dense(q[one], k[one], v[one], seen), atol=1e-5)


def test_every_query_sees_itself_and_lists_have_a_gradient():
    q, k, v = inputs(24)
    lists = gallery.routed_regions(q, k, region=4, top=2)
    assert bool((lists.kv_count >= 1).all()) and bool((lists.kv_full_count == lists.kv_count - 1).all())
    gradient = jax.grad(lambda v: jsparse.attention(q, k, v, lists).sum())(v)
    assert bool(jnp.isfinite(gradient).all()) and float(jnp.abs(gradient).max()) > 0
