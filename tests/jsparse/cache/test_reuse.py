"""How pages are chosen, and reused between choices, against loops over float64 numbers."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.cache.layer import LayerKVCache, attend_and_append
from jsparse.cache.pages import PagedKVCache, append_paged
from jsparse.cache.ring import StreamingKVCache
from jsparse.cache.select.best import best_pages, random_scores, with_newest_pages
from jsparse.cache.select.choose import choose_pages
from jsparse.cache.select.selection import Selection
from jsparse.cache.tokens import Tokens

PAGE, LOGICAL, DIM, PAGES = 8, 4, 8, 10
HEADS, KV_HEADS = 4, 2
MODES = ["max", "union", "query"]


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def best(scores, budget_pages):
    """Of the scores of the pages that hold tokens: the last page and the best others, earlier ones first."""
    last = len(scores) - 1
    rest = sorted(range(last), key=lambda page: (-scores[page], page))
    return sorted([last, *rest[: budget_pages - 1]])


def lists_of(scores, budget_pages, mode):
    """One list a KV head, or one a query head, from scores [Hk, G, pages of the sequence]."""
    if mode == "max":
        return [best(group.max(0), budget_pages) for group in scores]
    each = [[best(head, budget_pages) for head in group] for group in scores]
    if mode == "query":
        return [pages for group in each for pages in group]
    return [sorted(set().union(*group)) for group in each]


def padded(pages, n):
    return pages + [-1] * (n - len(pages))


choose_best = jax.jit(best_pages, static_argnames=("budget", "page_size", "heads"))


@pytest.mark.parametrize("mode", MODES)
@hypothesis.given(data=st.data())
def test_lists_of_a_group_are_those_of_the_loops_with_ties(mode, data):
    batch, group, pages, page_size = 4, 3, 7, 4
    budget_pages = data.draw(st.sampled_from([1, 3, 9]))
    seed = data.draw(st.integers(0, 2**16))
    lengths = data.draw(st.lists(st.integers(1, pages * page_size), min_size=batch, max_size=batch))
    rng = np.random.default_rng(seed)
    scores = rng.integers(-2, 3, (batch, KV_HEADS, group, pages)).astype(np.float32)  # many are equal
    held = [-(-length // page_size) for length in lengths]
    for row, count in enumerate(held):
        scores[row, ..., count:] = np.nan if row % 2 else 1e30  # of no page
    got = choose_best(
        scores, jnp.array(lengths), budget=budget_pages * page_size, page_size=page_size, heads=mode
    )
    n = min(budget_pages, pages)
    n = min(group * n, pages) if mode == "union" else n
    assert got.shape == (batch, KV_HEADS * (group if mode == "query" else 1), n)
    for row, count in enumerate(held):
        expected = lists_of(scores[row, ..., :count], budget_pages, mode)
        assert got[row].tolist() == [padded(pages, n) for pages in expected]


def oracle_scores(q, k, score):
    """Scores [Hk, G, pages] of one sequence: q [Hq, D], k [Hk, T, D]."""
    pages = -(-k.shape[1] // PAGE)
    scores = np.zeros((KV_HEADS, HEADS // KV_HEADS, pages))
    for h, query in enumerate(np.asarray(q, np.float64)):
        kv, g = divmod(h, HEADS // KV_HEADS)
        for page in range(pages):
            keys = np.asarray(k[kv, page * PAGE : (page + 1) * PAGE], np.float64)
            if score == "exact":
                scores[kv, g, page] = max(keys @ query)
            elif score == "mean":
                scores[kv, g, page] = keys.mean(0) @ query
            else:
                logical = (keys[i : i + LOGICAL] for i in range(0, len(keys), LOGICAL))
                scores[kv, g, page] = max(
                    np.maximum(query * x.min(0), query * x.max(0)).sum() for x in logical
                )
    return scores


def dirty(cache):
    """The cache as if every page and ring were recycled from a broken sequence."""
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.dtype == jnp.float32 else x, cache)


def pool(batch, dim=DIM, logical: int | None = LOGICAL):
    cache = PagedKVCache.zeros(
        batch * PAGES, KV_HEADS, dim, page_size=PAGE, logical_page_size=logical, dtype=jnp.float32
    )
    table = np.random.default_rng(5).permutation(batch * PAGES).reshape(batch, PAGES)
    return dirty(cache), jnp.array(table)


append = jax.jit(append_paged)
choose = jax.jit(choose_pages, static_argnames="selection")


@pytest.mark.parametrize("score", ["bounds", "exact", "mean"])
@pytest.mark.parametrize("mode", MODES)
def test_pages_are_chosen_by_the_scores_that_are_named(mode, score):
    lengths = np.array([80, 45, 17, 8])
    q, k = random(4, HEADS, DIM), random(4, PAGES * PAGE, KV_HEADS, DIM, seed=1)
    cache, table = pool(4)
    tokens = Tokens(table, jnp.zeros(4, jnp.int32), jnp.array(lengths))
    cache = append(cache, jnp.array(k), jnp.array(k), tokens)
    selection = Selection(3 * PAGE, heads=mode, score=score)
    got = choose(jnp.array(q), cache, tokens, selection)
    for row, length in enumerate(lengths):
        scores = oracle_scores(q[row], k[row, :length].swapaxes(0, 1), score)
        expected = lists_of(scores, 3, mode)
        assert got[row].tolist() == [padded(pages, got.shape[2]) for pages in expected]


draw = jax.jit(random_scores, static_argnames=("seed", "shape"))


def test_random_scores_depend_on_the_length_and_the_seed_alone():
    lengths = jnp.array([9, 70, 9, 71])
    scores = np.asarray(draw(lengths, 3, (2, 2, 5)))
    np.testing.assert_array_equal(scores[0], scores[2])
    np.testing.assert_array_equal(scores[[1, 0, 3, 0]], draw(lengths[jnp.array([1, 0, 3, 2])], 3, (2, 2, 5)))
    apart = [*scores[[0, 1, 3]], *np.asarray(draw(lengths, 4, (2, 2, 5)))[[0, 1, 3]]]
    assert len({x.tobytes() for x in apart}) == 6
    assert len(np.unique(scores[0])) == 20  # heads and pages apart too


def test_random_scores_do_not_depend_on_the_capacity():
    """Else a sequence would read other pages in a batch whose longest sequence needs more of them."""
    lengths = jnp.array([9, 70, 9, 71])
    few, many = (np.asarray(draw(lengths, 3, (2, 2, pages))) for pages in (5, 8))
    np.testing.assert_array_equal(few, many[..., :5])


@hypothesis.given(data=st.data())
def test_reused_lists_hold_what_was_chosen_and_every_page_begun_since(data):
    """Every length of a sequence at once, each with the list that was in force when it was reached."""
    page_size = data.draw(st.sampled_from([1, 4, 8, 16]))
    every = data.draw(st.sampled_from([1, 2, 4, 8, 16]))
    count, width, steps = data.draw(st.integers(1, 3)), 4, 64  # the end of a list may be empty
    budget = count * page_size
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    start = data.draw(st.integers(1, budget + 3 * page_size))  # the first token decoded; a prompt may be long
    lengths = start + np.arange(steps)
    lists, selected_at = rng.integers(-1, 9, (steps, 2, width)), np.zeros(steps, int)  # before: anything
    at = 0
    for i, length in enumerate(lengths):
        if length > budget and (at == 0 or length - at >= every):
            at, last = int(length), (length - 1) // page_size
            best_others = (sorted(rng.choice(last, count - 1, replace=False)) for _ in range(2))
            lists[i:] = [[*others, last, *[-1] * (width - count)] for others in best_others]
        selected_at[i] = at
    got = np.asarray(
        with_newest_pages(
            jnp.array(lists), jnp.array(lengths), page_size=page_size, budget=budget, every=every
        )
    )
    assert got.shape == (steps, 2, width + -(-(every - 1) // page_size))
    for i, length in enumerate(lengths):
        newest = (length - 1) // page_size
        for pages, before in zip(got[i], lists[i], strict=True):
            listed = pages[pages >= 0].tolist()
            assert listed == sorted(set(listed)) and listed[-1] == newest
            if length <= budget:
                assert pages.tolist() == padded(list(range(newest + 1)), got.shape[2])
            else:
                written = range(selected_at[i] - 1, length)  # positions, from the one that selected
                assert set(listed) == {*before[before >= 0].tolist(), *(t // page_size for t in written)}


# --- a layer, step by step ---

STREAMING = (1,)  # of three KV heads; two query heads each
SINK, WINDOW = 2, 6
step = jax.jit(attend_and_append, static_argnames="selection")


def layer_cache(batch):
    paged, table = pool(batch)
    ring = dirty(StreamingKVCache.zeros(batch, 1, DIM, sink=SINK, window=WINDOW, dtype=jnp.float32))
    return LayerKVCache(paged, ring, STREAMING), table


def attended(q, k, v, seen):
    """One query head over the tokens seen, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k[seen], v[seen]))
    scores = k @ q / np.sqrt(q.size)
    weights = np.exp(scores - scores.max())
    return weights @ v / weights.sum()


def decoded(sequences, starts, steps, selection, reuse=True):
    """Outputs [steps, B, Hq, D] of decoding from ``starts`` tokens on; every sequence at its own phase."""
    batch, chunk, (q, k, v) = len(starts), 48, sequences
    layer, table = layer_cache(batch)
    prompt = (jnp.array(x[:, :chunk]) for x in (q, k, v))
    _, layer = step(*prompt, layer, Tokens(table, jnp.zeros(batch, jnp.int32), jnp.array(starts)))
    if selection is not None and reuse:
        lists = HEADS if selection.heads == "query" else KV_HEADS
        n = selection.budget // PAGE * (2 if selection.heads == "union" else 1)
        stale = jnp.full((batch, lists, n), 7, jnp.int32)  # another sequence's
        layer = dataclasses.replace(layer, selected=stale)
    ones, outs, held, at = jnp.ones(batch, jnp.int32), [], np.array(starts), np.zeros(batch, int)
    for _ in range(steps):
        pieces = (jnp.array(x[np.arange(batch), held][:, None]) for x in (q, k, v))
        select = None
        if selection is not None and layer.selected is not None:
            due = (held + 1 > selection.budget) & ((at == 0) | (held + 1 - at >= selection.every))
            at = np.where(due, held + 1, at)
            select = jnp.array(due)
        out, layer = step(
            *pieces, layer, Tokens(table, jnp.array(held), ones), selection=selection, select=select
        )
        outs.append(np.asarray(out[:, 0]))
        held = held + 1
    return np.array(outs)


@pytest.fixture(scope="module")
def sequences():
    """q, k, v of three sequences in which the first key of each page draws the queries after it."""
    q, k, v = (random(3, PAGES * PAGE, heads, DIM, seed=heads + i) for i, heads in enumerate((6, 3, 3)))
    k[:, ::PAGE] *= 0.1
    k[:, ::PAGE] += q[:, ::PAGE].reshape(3, -1, 3, 2, DIM).mean(3)  # of both query heads
    return q, k, v


@pytest.mark.parametrize(("every", "mode"), [(1, "max"), (4, "max"), (4, "query"), (8, "max"), (16, "union")])
def test_every_step_reads_what_was_chosen_and_what_was_written_since(sequences, every, mode):
    q, k, v = sequences
    starts, steps = [9, 30, 43], 36  # the first begins within the budget
    selection = Selection(2 * PAGE, every, mode)
    outs = decoded(sequences, starts, steps, selection)
    retrieval = [h for h in range(3) if h not in STREAMING]
    for row, start in enumerate(starts):
        at, chosen = 0, []
        for i in range(steps):
            length = start + i + 1
            position = length - 1
            if length > selection.budget and (at == 0 or length - at >= every):
                at = length
                heads = [2 * h + g for h in retrieval for g in range(2)]
                keys = k[row, :length][:, retrieval].swapaxes(0, 1)
                lists = lists_of(oracle_scores(q[row, position, heads], keys, "bounds"), 2, mode)
                chosen = lists if mode == "query" else [pages for pages in lists for _ in range(2)]
            for index, h in enumerate(2 * h + g for h in retrieval for g in range(2)):
                if length <= selection.budget:
                    seen = list(range(length))
                else:
                    pages = {*chosen[index], *(t // PAGE for t in range(at - 1, length))}
                    seen = [t for t in range(length) if t // PAGE in pages]
                assert position in seen
                expected = attended(q[row, position, h], k[row, :, h // 2], v[row, :, h // 2], seen)
                np.testing.assert_allclose(outs[i, row, h], expected, atol=3e-6)
            for h in (2, 3):
                seen = [t for t in range(length) if t < SINK or t > position - WINDOW]
                expected = attended(q[row, position, h], k[row, :, 1], v[row, :, 1], seen)
                np.testing.assert_allclose(outs[i, row, h], expected, atol=3e-6)


def test_choosing_at_every_token_keeps_nothing(sequences):
    selection = Selection(2 * PAGE, 1)
    kept = decoded(sequences, [9, 30, 43], 10, selection)
    np.testing.assert_array_equal(kept, decoded(sequences, [9, 30, 43], 10, selection, reuse=False))


def test_a_context_within_the_budget_is_dense_to_the_bit_whatever_was_chosen(sequences):
    starts, selection = [1, 5, 8], Selection(2 * PAGE, 4)
    dense = decoded(sequences, starts, 10, None)
    sparse = decoded(sequences, starts, 10, selection)
    within = np.array(starts) + 1 + np.arange(10)[:, None] <= selection.budget
    np.testing.assert_array_equal(sparse[within], dense[within])
    assert (sparse[~within] != dense[~within]).any(axis=(-2, -1)).all()


@pytest.mark.parametrize(("every", "mode"), [(1, "max"), (4, "max"), (8, "max"), (16, "union")])
def test_the_first_token_of_a_new_page_is_read_at_once(every, mode):
    """Its key and value outweigh all others, and the pages were chosen up to a whole interval before."""
    boundary, steps = 5 * PAGE, 16
    q = np.ones((3, PAGES * PAGE, 6, DIM), np.float32)
    k, v = 0.01 * random(3, PAGES * PAGE, 3, DIM), random(3, PAGES * PAGE, 3, DIM, seed=1)
    k[:, boundary], v[:, boundary] = 30.0, 100.0
    for before in {1, max(1, every // 2), every, every + 3}:
        # A row's first token decoded selects; the rows differ in when.
        starts = np.array([boundary - before, boundary - before - 1, boundary])
        outs = decoded((q, k, v), starts, steps, Selection(2 * PAGE, every, mode))[:, :, [0, 1, 4, 5]]
        for row, start in enumerate(starts):
            assert (outs[: boundary - start, row] < 10).all()
            np.testing.assert_allclose(outs[boundary - start :, row], 100.0, rtol=1e-5)
