"""Page bounds, scores and selection, against LServe's worked example and dense products."""

import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.cache.select.best import select_pages as select_by_bounds
from jsparse.masks.bounds import page_bounds, page_scores

# LServe (arXiv 2502.14866), figure 7: a query, and the bounds (max, min) of four logical pages with their
# scores.
Q = [1, -2, 2, -2, 1, 1, 1, -3]
GOLDEN = [
    ([2, 3, 2, 8, 4, 5, 2, 6], [-6, -1, -6, 1, -5, -6, -6, -2], 23),
    ([4, 6, 3, 4, 2, 4, 5, 7], [0, -2, -8, -3, -8, -7, -3, -3], 40),
    ([6, 6, 8, 7, 8, 8, 7, -1], [-7, -4, -7, -5, -5, -5, -8, -5], 78),
    ([2, 8, 0, 4, 4, 6, 6, 4], [-4, 0, -8, -5, -5, 0, 0, -7], 49),
]


def select_pages(q, k_min, k_max, lengths, **options):
    bounds = jnp.concatenate([jnp.asarray(k_min), jnp.asarray(k_max)], axis=-1)
    return select_by_bounds(q, bounds, lengths, **options)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_scores_of_lserve_figure_7():
    k_max, k_min, scores = (np.array(x, np.float32) for x in zip(*GOLDEN, strict=True))
    got = page_scores(jnp.array(Q, jnp.float32), jnp.array(k_min), jnp.array(k_max))
    assert got.tolist() == scores.tolist()


def test_figure_7_selects_the_page_of_the_best_logical_page():
    k_max, k_min, _ = (np.array(x, np.float32) for x in zip(*GOLDEN, strict=True))
    # Physical pages of two logical ones score 40 and 78; a third, the newest, is always taken.
    k_min, k_max = (jnp.array([[*x, *x[:2]]]).reshape(1, 1, 3, 2, 8) for x in (k_min, k_max))
    q = jnp.array(Q, jnp.float32).reshape(1, 1, 8)
    assert select_pages(q, k_min, k_max, jnp.array([96]), budget=64, page_size=32).tolist() == [[[1, 2]]]
    assert select_pages(q, k_min, k_max, jnp.array([96]), budget=32, page_size=32).tolist() == [[[2]]]


def test_the_score_bounds_every_product_and_is_tight_for_one_key():
    q, k = random(5, 1, 16), random(1, 64, 16, seed=1)
    products = np.einsum("atd,bsd->as", q.astype(np.float64), k.astype(np.float64))
    for size in (1, 4, 16):
        scores = np.asarray(page_scores(jnp.array(q[:, 0]), *page_bounds(jnp.array(k), size)))
        largest = products.reshape(5, -1, size).max(-1)
        assert (scores >= largest - 1e-5).all()
        if size == 1:
            np.testing.assert_allclose(scores, largest, atol=1e-5)


def test_smaller_logical_pages_only_tighten_the_bound():
    q, k = jnp.array(random(16)), jnp.array(random(64, 16, seed=1))
    coarse = page_scores(q, *page_bounds(k, 16))
    fine = page_scores(q, *page_bounds(k, 4)).reshape(4, 4).max(-1)
    assert (fine <= coarse + 1e-5).all() and (fine < coarse - 0.1).any()


def test_scores_are_the_formula_in_float32_for_bfloat16_too():
    q = jnp.array(random(2, 3, 8)).astype(jnp.bfloat16)
    k_min, k_max = page_bounds(jnp.array(random(2, 1, 32, 8, seed=1)).astype(jnp.bfloat16), 8)
    scores = page_scores(q, k_min, k_max)
    wide = [np.asarray(x, np.float64) for x in (q[..., None, :], k_min, k_max)]
    assert scores.dtype == jnp.float32 and scores.shape == (2, 3, 4)
    np.testing.assert_allclose(
        scores, np.maximum(wide[0] * wide[1], wide[0] * wide[2]).sum(-1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("size", [0, 5])
def test_page_bounds_refuses_a_page_that_does_not_divide(size):
    with pytest.raises(ValueError, match=f"logical_page_size={size} must divide the 16 keys"):
        page_bounds(jnp.zeros((16, 4)), size)


def oracle(q, k, lengths, budget, page_size, logical):
    """Selection by loops over float64 numbers."""
    batch, q_heads, _ = q.shape
    kv_heads, pages = k.shape[1], k.shape[2] // page_size
    chosen = []
    for b in range(batch):
        for h in range(kv_heads):
            scores = {}
            for page in range(-(-lengths[b] // page_size)):
                best = -np.inf
                for start in range(page * page_size, min((page + 1) * page_size, lengths[b]), logical):
                    keys = k[b, h, start : min(start + logical, lengths[b])]
                    for query in q[b, h * q_heads // kv_heads : (h + 1) * q_heads // kv_heads]:
                        best = max(best, np.maximum(query * keys.min(0), query * keys.max(0)).sum())
                scores[page] = best
            last = max(scores)
            rest = sorted(set(scores) - {last}, key=lambda page: (-scores[page], page))
            best_pages = sorted([last, *rest[: budget // page_size - 1]])
            n = min(budget // page_size, pages)
            chosen.append(best_pages + [-1] * (n - len(best_pages)))
    return np.array(chosen).reshape(batch, kv_heads, -1)


@pytest.mark.parametrize("budget", [8, 16, 24, 64, 128])
def test_selection_matches_the_loops(budget):
    q, k = random(4, 4, 8), random(4, 2, 64, 8, seed=1)
    lengths = [1, 17, 40, 64]
    k_min, k_max = (np.array(x).reshape(4, 2, 8, 2, 8) for x in page_bounds(jnp.array(k), 4))
    for b, length in enumerate(
        lengths
    ):  # a partial logical page has the bounds of what it holds; after it: dirt
        if length % 4:
            keys = k[b, :, length - length % 4 : length]
            k_min[b, :, length // 8, length // 4 % 2], k_max[b, :, length // 8, length // 4 % 2] = (
                keys.min(1),
                keys.max(1),
            )
        for begin in range(-(-length // 4), 16):
            k_min[b, :, begin // 2, begin % 2] = k_max[b, :, begin // 2, begin % 2] = np.nan if b % 2 else 1e6
    got = select_pages(
        jnp.array(q), jnp.array(k_min), jnp.array(k_max), jnp.array(lengths), budget=budget, page_size=8
    )
    assert got.tolist() == oracle(q.astype(np.float64), k.astype(np.float64), lengths, budget, 8, 4).tolist()


def test_of_equal_pages_the_earlier_is_selected():
    bounds = jnp.zeros((1, 1, 6, 1, 4))
    assert select_pages(
        jnp.ones((1, 2, 4)), bounds, bounds, jnp.array([6]), budget=3, page_size=1
    ).tolist() == [[[0, 1, 5]]]


@pytest.mark.parametrize("budget", [0, 8, 20])
def test_a_budget_that_is_no_number_of_pages_is_refused(budget):
    bounds = jnp.zeros((1, 1, 2, 1, 4))
    with pytest.raises(ValueError, match=f"budget={budget} must be a multiple of page_size=16"):
        select_pages(jnp.ones((1, 1, 4)), bounds, bounds, jnp.array([3]), budget=budget, page_size=16)


def test_the_score_is_quests_and_flat_pages_are_quests_pages():
    # Quest writes it as the sum of |q| times the largest key in the direction of q's sign.
    q, k = random(16), random(64, 16, seed=1)
    k_min, k_max = page_bounds(jnp.array(k), 8)
    signed = np.maximum(np.sign(q) * np.asarray(k_min), np.sign(q) * np.asarray(k_max))
    scores = page_scores(jnp.array(q), k_min, k_max)
    np.testing.assert_allclose(scores, (np.abs(q) * signed).sum(-1), rtol=1e-5)
    # Where the logical page is the page, the pages are those of the best scores, and the newest.
    low, high = (np.asarray(x).reshape(1, 1, 8, 1, 16) for x in (k_min, k_max))
    chosen = select_pages(jnp.array(q)[None, None], low, high, jnp.array([64]), budget=24, page_size=8)
    best = sorted(np.argsort(-np.asarray(scores)[:7], kind="stable")[:2].tolist())
    assert chosen.tolist() == [[[*best, 7]]]
