"""The loop of ``passes.py`` over lists of blocks: a chunk of items at a time, some entries at a time."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jsparse.implementations.xla.items import Lists
from jsparse.integers import cdiv, power_of_two_up_to

# Scores of one chunk: large enough to keep the cores busy, small enough to stay in the cache.
_CHUNK_SCORES = 1 << 20
# Tokens that an item visits at a time: by default, and at most.
_STEP_TOKENS, _MOST_STEP_TOKENS = 512, 1024
# Another step costs about as much as this many more tokens in one step.
_NEXT_STEP_TOKENS = 64


def over_lists(
    lists: Lists,
    computation: tuple[Callable, Callable, Callable, Callable],
    *,
    scores_per_entry: int,
    entry_tokens: int,
    alike: Callable | None,
    backward: bool = False,
):
    """A loop over all items, a chunk at a time, of ``computation = (start, init, step, finish)``::

        own = start(items); carry = init(own)
        carry = step(own, carry, items, entries, listed, masked)     # entries [n, W] of the items' lists
        result = finish(carry)

    First come the steps in which no entry needs the element mask, then the others (``masked``), where
    ``listed`` says which entries exist. With segments, blocks that are not ``alike(items, entries)`` are
    masked in any case. If all lists are known to fit one step, its carry is None.

    - scores_per_entry: scores of one item with one entry of its list.
    - entry_tokens: tokens of an entry.
    - alike: whether all tokens of some items and entries are of one segment; None without segments.
    - backward: whether a step holds several arrays as large as the scores.
    """
    start, init, step, finish = computation
    num_items = lists.start.shape[0]
    xp = np if lists.known else jnp
    longest = int(lists.count.max()) if lists.known else cdiv(lists.index.shape[0], num_items)
    width = _width(lists.count if lists.known else None, longest, entry_tokens)
    once = lists.known and longest <= width
    # A single step forward holds little besides its scores.
    most_scores = _CHUNK_SCORES * (2 if once and not backward else 1)
    chunk = _chunk(num_items, most_scores, scores_per_entry * width)
    # If all lists take one step, items keep their order. Otherwise they are sorted by length: then few wait
    # for the longest list of their chunk.
    order = xp.arange(num_items) if once else xp.argsort(lists.count, stable=True)
    padding = xp.broadcast_to(order[:1], -num_items % chunk)
    chunks = xp.concatenate([padding, order]).astype(np.int32).reshape(-1, chunk)
    all_full = once and alike is None and bool(np.all(lists.full_count == width))
    index, begin, count, full_count = (jnp.asarray(x) for x in lists)
    index = jnp.pad(index, (0, 1))  # lists may all be empty

    def one_chunk(items):
        first, total = begin[items], count[items]
        own = start(items)

        def visit(t, carry, masked):
            nth = t * width + jnp.arange(width, dtype=jnp.int32)
            # An item whose list has ended looks at one of its own blocks again, not at another item's.
            entry = first[:, None] + jnp.minimum(nth, jnp.maximum(total - 1, 0)[:, None])
            blocks, listed = index[entry], nth < total[:, None]
            if masked or alike is None:
                return step(own, carry, items, blocks, listed, masked)
            either = [functools.partial(step, masked=masked) for masked in (False, True)]
            return lax.cond(alike(items, blocks), *either, own, carry, items, blocks, listed)

        if once:
            return finish(visit(0, None, masked=not all_full))
        unmasked = jnp.min(full_count[items]) // width
        steps = (jnp.max(total) + width - 1) // width
        carry = lax.fori_loop(0, unmasked, lambda t, carry: visit(t, carry, masked=False), init(own))
        carry = lax.fori_loop(unmasked, steps, lambda t, carry: visit(t, carry, masked=True), carry)
        return finish(carry)

    results = lax.map(one_chunk, jnp.asarray(chunks))
    results = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[padding.shape[0] :], results)
    if once:
        return results
    place = xp.argsort(order)
    return jax.tree.map(lambda x: x[place], results)


def _chunk(num_items: int, most_scores: int, item_scores: int) -> int:
    """How many items are taken at a time.

    A power of two, for which products are fastest, or fewer if the last chunk would be mostly empty.

    >>> _chunk(64, 1 << 21, 7 << 15), _chunk(9, 1 << 21, 7 << 15), _chunk(9, 1 << 21, 1 << 22)
    (8, 5, 1)
    """
    most = power_of_two_up_to(most_scores // item_scores)
    return cdiv(num_items, cdiv(num_items, most))


def _width(counts, longest: int, entry_tokens: int) -> int:
    """How many entries of a list are visited at a time.

    For lists that are known, it is the number that costs the fewest tokens: those of the entries, those that
    fill up the last step of a list, and the cost of going on from one step to the next.
    """
    if longest * entry_tokens <= _STEP_TOKENS:
        return max(longest, 1)
    if counts is None:
        return max(1, _STEP_TOKENS // entry_tokens)
    counts, number = np.unique(counts, return_counts=True)

    def tokens(width: int) -> int:
        steps = int(-(-counts // width) @ number)
        return steps * (width * entry_tokens + (0 if width >= longest else _NEXT_STEP_TOKENS))

    return min(range(1, max(_MOST_STEP_TOKENS // entry_tokens, 1) + 1), key=tokens)


def cut_in_pieces(lists: Lists):
    """(owner [P], the same lists cut into P pieces of bounded length).

    A sink's key block is listed by every query block. Left whole, its list would keep a chunk of short lists
    waiting.
    """
    xp = np if lists.known else jnp
    num_items, num_entries = lists.start.shape[0], lists.index.shape[0]
    length = max(1, cdiv(num_entries, num_items))
    last = xp.cumsum(-(-lists.count // length))
    num_pieces = int(last[-1]) if xp is np else num_items + num_entries // length
    piece = xp.arange(max(1, num_pieces), dtype=np.int32)
    owner = xp.minimum(xp.searchsorted(last, piece, side="right"), num_items - 1).astype(np.int32)
    skipped = (piece - last[owner] + -(-lists.count[owner] // length)) * length
    return owner, Lists(
        lists.index,
        (lists.start[owner] + skipped).astype(np.int32),
        xp.clip(lists.count[owner] - skipped, 0, length).astype(np.int32),
        xp.clip(lists.full_count[owner] - skipped, 0, length).astype(np.int32),
    )


def sum_by_owner(parts, owner, num_owners: int):
    """The sum of each owner's pieces, in their order; owners ascend.

    This is a loop and not ``segment_sum``, which on a GPU adds by atomics, in any order. Told that the owners
    are sorted, it becomes more machine code than ptxas can compile in minutes. Most owners have one piece; if
    owners are known, the loop is over the other pieces only.
    """
    if isinstance(owner, np.ndarray):
        first = np.minimum(np.searchsorted(owner, np.arange(num_owners)), len(owner) - 1)
        has_one = jnp.asarray(owner[first] == np.arange(num_owners))[:, None, None, None, None]
        totals = jax.tree.map(lambda x: jnp.where(has_one, x[first], 0), parts)
        rest = jnp.asarray(np.flatnonzero(owner[1:] == owner[:-1]) + 1)
    else:
        totals = jax.tree.map(lambda x: jnp.zeros((num_owners, *x.shape[1:]), x.dtype), parts)
        rest = jnp.arange(owner.shape[0])
    owners = jnp.asarray(owner)

    def add(nth, totals):
        to = owners[rest[nth]]
        return jax.tree.map(lambda total, x: total.at[to].set(total[to] + x[rest[nth]]), totals, parts)

    return lax.fori_loop(0, rest.shape[0], add, totals) if rest.shape[0] else totals
