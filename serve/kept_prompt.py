"""What a prompt leaves in the cache for the next one that begins like it, as turns of a conversation do."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jsparse.integers import cdiv
from jsparse.serve import loop
from jsparse.serve.layout import CacheLayout
from jsparse.serve.state import DecodeState, ModelStructure, pool_of, with_pool

_OPEN = 16  # tokens at the end of a prompt that the next one may have otherwise: how an answer was to begin
_SHORT = 64  # tokens of a short chunk, in whole pages: computing fewer at once saves little time


class KeptPrompt(NamedTuple):
    """The first tokens of a prompt, in whole pages that stay in the cache, and the row after them.

    It ends some tokens before the prompt does: the next prompt may be tokenized otherwise there, or leave out
    how the answer was to begin. The answer itself is not kept: single steps may have read less of the cache
    for it than prompts do, and what is kept must not change what comes next.
    """

    tokens: np.ndarray  # int32
    pages: tuple[int, ...]
    row: DecodeState  # of one row, without a pool

    def begins(self, prompt: np.ndarray) -> bool:
        """Whether ``prompt`` begins with what is kept, and goes on."""
        return len(self.tokens) < len(prompt) and np.array_equal(self.tokens, prompt[: len(self.tokens)])


def prefill_and_keep(
    structure: ModelStructure,
    params: list[Array],
    state: DecodeState,
    prompt: np.ndarray,
    layout: CacheLayout,
    kept: KeptPrompt | None,
) -> tuple[DecodeState, Float[Array, "1 embed"], KeptPrompt | None]:
    """``loop.prefill`` of one prompt after ``kept``, and what is kept of this one.

    ``state`` has the pool and the page table of the prompt, whose first pages are those of ``kept``.
    """
    if kept is not None:
        row = dataclasses.replace(_copy(kept.row), page_table=state.page_table)
        state = with_pool(row, pool_of(state))
    start = 0 if kept is None else len(kept.tokens)
    short = _short_chunk(layout)
    whole = max(start, (len(prompt) - _OPEN) // short * short)
    for first, last, chunk in _pieces(start, whole, short, layout.prefill_chunk // short * short):
        layout_of_piece = dataclasses.replace(layout, prefill_chunk=chunk)
        state, _ = loop.prefill(structure, params, state, [prompt[first:last]], layout_of_piece)
    if whole > start:
        pages = np.asarray(state.page_table)[0, : layout.pages_of(whole)]
        row = with_pool(state, (None,) * len(state.layers))
        kept = KeptPrompt(prompt[:whole], tuple(pages.tolist()), _copy(row))
    layout_of_piece = dataclasses.replace(layout, prefill_chunk=short)
    state, hidden = loop.prefill(structure, params, state, [prompt[whole:]], layout_of_piece)
    return state, hidden, kept


def _short_chunk(layout: CacheLayout) -> int:
    """The tokens of a short chunk, in whole pages: a prompt is kept up to a multiple of it."""
    return layout.pages_of(_SHORT) * layout.page_size


def _pieces(start: int, end: int, short: int, long: int) -> Iterator[tuple[int, int, int]]:
    """Pieces from ``start`` to ``end``, and the size of their chunks: long ones where they fit.

    A chunk may only begin at a multiple of its size, and ``start`` and ``end`` are multiples of ``short``.

    >>> list(_pieces(128, 1600, 64, 512))
    [(128, 512, 64), (512, 1536, 512), (1536, 1600, 64)]
    """
    long = long or short
    up = min(cdiv(start, long) * long, end)
    down = max(end // long * long, up)
    pieces = (start, up, short), (up, down, long), (down, end, short)
    return (piece for piece in pieces if piece[0] < piece[1])


@jax.jit
def _copy(state: DecodeState) -> DecodeState:
    """A copy that outlives the state, which the next call is given for good."""
    return jax.tree.map(jnp.copy, state)
