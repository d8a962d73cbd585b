"""A cache filled with random keys and values, and the parts of decoding that are timed on it."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jsparse.cache.decode import decode_attention
from jsparse.cache.layer import LayerKVCache
from jsparse.cache.pages import PagedKVCache
from jsparse.cache.select.choose import choose_pages, pages_to_read
from jsparse.cache.select.selection import Selection
from jsparse.cache.tokens import Tokens
from jsparse.evaluate.speed.turns import milliseconds
from jsparse.masks.bounds import page_bounds
from jsparse.serve import loop
from jsparse.serve.layout import CacheLayout, Selections
from jsparse.serve.sampling import RowParams, SamplingParams
from jsparse.serve.state import RUNNING, DecodeState, ModelShape, ModelStructure, new_state

Lists = tuple[Int[Array, "B H n"] | None, ...]  # the pages listed of each pool; None: all of them


def random_state(layout: CacheLayout, shape: ModelShape, context: int, seed: int = 0) -> DecodeState:
    """A running batch: every row holds ``context`` tokens, with normal keys and values, in its own pages.

    Bounds are those of the keys, as appending would have made them.
    """
    empty = jax.eval_shape(functools.partial(new_state, layout, shape))
    keys = jax.random.split(jax.random.key(seed), len(empty.layers))
    layers = (_random_layer(layer, shape, key) for layer, key in zip(empty.layers, keys, strict=True))
    pages = layout.pages_of(layout.capacity)
    table = jnp.arange(layout.batch * pages, dtype=jnp.int32).reshape(layout.batch, pages)
    state = dataclasses.replace(empty, layers=tuple(layers), page_table=table)
    history, scores = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (empty.history, empty.scores))
    state = dataclasses.replace(state, history=history, scores=scores)
    return at_context(state, context)


def _random_layer(empty: LayerKVCache, shape: ModelShape, key) -> LayerKVCache:
    paged, ring, selected = empty.paged, empty.streaming, empty.selected
    of_k, of_v, of_ring_k, of_ring_v = jax.random.split(key, 4)
    if paged is not None:
        size = (paged.num_pages, paged.num_heads, paged.page_size, shape.head_dim)
        k, v = (jax.random.normal(one, size, shape.dtype) for one in (of_k, of_v))
        logical = paged.logical_page_size
        bounds = None if logical is None else jnp.concatenate(page_bounds(k, logical), axis=-1)
        paged = PagedKVCache(paged.stored(k), paged.stored(v), bounds, paged.bits)
    if ring is not None:
        k, v = (jax.random.normal(one, ring.k.shape, ring.k.dtype) for one in (of_ring_k, of_ring_v))
        ring = dataclasses.replace(ring, k=k, v=v)
    if selected is not None:
        selected = jnp.zeros(selected.shape, selected.dtype)
    return LayerKVCache(paged, ring, empty.streaming_heads, selected)


def at_context(state: DecodeState, context: int) -> DecodeState:
    """The state as it is when ``context`` tokens are held and no pages have been chosen yet."""
    batch = state.page_table.shape[0]

    def each(value):
        return jnp.full(batch, value, jnp.int32)  # a new array: a donated state may not hold one twice

    return dataclasses.replace(
        state,
        lengths=each(context),
        token=each(0),
        generated=each(1),
        finish=each(RUNNING),
        selected_at=each(0),
    )


def endless_rows(batch: int, vocab_size: int) -> RowParams:
    """Greedy rows that no token ends."""
    sampling, most = [SamplingParams(ignore_eos=True)] * batch, [2**31 - 1] * batch
    return jax.device_put(RowParams.of(sampling, [0] * batch, most, batch=batch, vocab_size=vocab_size))


class FilledCache:
    """The cache of one layout at one context. Every timing starts there, with a selection.

    Decode steps donate their state, so ``state`` is a new one after each call.
    """

    def __init__(self, layout: CacheLayout, shape: ModelShape, context: int):
        self.layout, self.shape, self.context = layout, shape, context
        self.state = random_state(layout, shape, context)
        heads = (shape.q_heads, shape.kv_heads, shape.kv_heads)
        sizes = [(layout.batch, 1, count, shape.head_dim) for count in heads]
        keys = jax.random.split(jax.random.key(1), len(sizes))
        self._qkv = [jax.random.normal(key, size, shape.dtype) for key, size in zip(keys, sizes, strict=True)]
        self._query = jax.block_until_ready(self._qkv[0][:, 0])

        paged = [(n, layer.paged) for n, layer in enumerate(self.state.layers) if layer.paged is not None]
        chosen = [(n, layout.layers[n].selection) for n, _ in paged]
        choosing = {n: one for n, one in chosen if one is not None and context >= one.budget}
        self.selections: tuple[Selection, ...] = tuple(choosing.values())
        # The layers that choose pages at this context; if none does, all that have pages.
        self._pooled = [n for n, _ in paged if n in choosing or not choosing]

    def decode(self, structure: ModelStructure, params: list[Array], rows: RowParams, steps: int) -> float:
        """Milliseconds per token of ``steps`` decode steps. FloatingPointError if they end early."""
        time = self._advance(
            lambda state: loop.decode_steps(
                structure, params, state, rows, np.int32(steps), selections=self.layout.selections
            )
        )
        taken = np.asarray(self.state.lengths) - self.context
        if (taken != steps).any():
            raise FloatingPointError(
                f"decoding ended after {taken.min()} of {steps} steps at context {self.context}: "
                "the logits are not finite"
            )
        return time / steps

    def attend(self, steps: int) -> float:
        """Milliseconds per token that all layers take to append, choose pages and attend."""
        selections = self.layout.selections
        return self._advance(lambda state: attention_steps(state, *self._qkv, selections, steps)) / steps

    def choose(self, steps: int) -> float:
        """Milliseconds per token for choosing pages: the time of a choice over the tokens that it serves."""
        arguments = self.arguments()
        time, _ = milliseconds(lambda: choose_steps(*arguments, self.selections, steps))
        return time / steps / self.selections[0].every

    def read(self, steps: int) -> float:
        """Milliseconds per token for reading the pages that are chosen here, or all pages."""
        arguments, lists = self.arguments(), (None,) * len(self._pooled)
        if self.selections:
            lists = jax.block_until_ready(listed_pages(*arguments, self.selections))
        time, _ = milliseconds(lambda: read_steps(*arguments, lists, steps))
        return time / steps

    @property
    def has_pages(self) -> bool:
        return bool(self._pooled)

    def _advance(self, call) -> float:
        state = jax.block_until_ready(at_context(self.state, self.context))
        time, (self.state, _) = milliseconds(lambda: call(state))
        return time

    def arguments(self):
        """A query, the pools that it reads, the tokens that they hold, and the query heads per KV head."""
        pools = tuple(self.state.layers[n].paged for n in self._pooled)
        group = self.shape.q_heads // self.shape.kv_heads
        batch = self.layout.batch
        held, one = (jnp.full(batch, n, jnp.int32) for n in (self.context, 1))  # the newest token too
        return self._query, pools, Tokens(self.state.page_table, held, one), group


class _AttentionAlone(NamedTuple):
    """Attention layers with nothing between them, each with the same queries, keys and values."""

    q: Float[Array, "B 1 Hq D"]
    k: Float[Array, "B 1 Hk D"]
    v: Float[Array, "B 1 Hk D"]
    layers: int

    def hidden(self, tokens, positions, attend):
        out = self.q
        for layer in range(self.layers):
            # The queries of a layer wait for the previous layer, as in a model.
            out = self.q + attend(layer, out, self.k, self.v)
        return out


@functools.partial(jax.jit, static_argnames=("selections", "steps"), donate_argnames="state")
def attention_steps(
    state: DecodeState,
    q: Float[Array, "B 1 Hq D"],
    k: Float[Array, "B 1 Hk D"],
    v: Float[Array, "B 1 Hk D"],
    selections: Selections,
    steps: int,
) -> tuple[DecodeState, Float[Array, "B 1 Hq D"]]:
    """The attention of ``steps`` decode steps with these queries, keys and values: the state and the sum."""
    model = _AttentionAlone(q, k, v, len(state.layers))
    counts = jnp.ones_like(state.lengths)
    return loop.feed(
        model,
        state,
        selections,
        jnp.zeros_like(q),
        unfinished=lambda turn, *_: turn < steps,
        tokens=lambda turn, state, total: (state.token[:, None], counts),
        use=lambda turn, state, out, total: (state, total + out),
    )


Pools = tuple[PagedKVCache, ...]


@functools.partial(jax.jit, static_argnames=("group", "selections", "times"))
def choose_steps(
    query: Float[Array, "B Hq D"],
    pools: Pools,
    tokens: Tokens,
    group: int,
    selections: tuple[Selection, ...],
    times: int,
) -> Int[Array, " B"]:
    """Chooses pages of all pools for the query, ``times`` times; returns ``tokens.before``.

    The pages of a pool come in another order each time, and each choice waits for the previous one. Otherwise
    a compiler could compute equal turns once, and independent ones at the same time.
    """

    def turn(_, carry):
        table, before = carry
        for pool, selection in zip(pools, selections, strict=True):
            chosen = choose_pages(
                query[:, : pool.num_heads * group],
                pool,
                Tokens(table, before, tokens.added),
                selection,
            )
            before = jnp.where(chosen.max() < 0, 0, before)  # never: the newest page is always chosen
        return (table + 1) % pools[0].num_pages, before

    return jax.lax.fori_loop(0, times, turn, (tokens.page_table, tokens.before))[1]


@functools.partial(jax.jit, static_argnames=("group", "selections"))
def listed_pages(
    query: Float[Array, "B Hq D"],
    pools: Pools,
    tokens: Tokens,
    group: int,
    selections: tuple[Selection, ...],
) -> Lists:
    """The pages of each pool that a decode step reads if it chooses pages."""
    lists = []
    for pool, selection in zip(pools, selections, strict=True):
        q = query[:, : pool.num_heads * group]
        stale = jnp.zeros_like(jax.eval_shape(lambda: choose_pages(q, pool, tokens, selection)))  # noqa: B023
        lists.append(pages_to_read(q, pool, tokens, selection, selected=stale)[0])
    return tuple(lists)


@functools.partial(jax.jit, static_argnames=("group", "times"))
def read_steps(
    query: Float[Array, "B Hq D"],
    pools: Pools,
    tokens: Tokens,
    group: int,
    lists: Lists,
    times: int,
) -> Float[Array, "B Hq D"]:
    """Attention to the listed pages of all pools, ``times`` times; each result is added to the next query."""

    def turn(_, query):
        for pool, pages in zip(pools, lists, strict=True):
            heads = pool.num_heads * group
            out = decode_attention(query[:, :heads], pool, tokens.after, tokens.page_table, pages=pages)
            query = query.at[:, :heads].add(out)
        return query

    return jax.lax.fori_loop(0, times, turn, query)
