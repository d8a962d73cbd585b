"""The KV cache: pages for retrieval heads, a sink and a ring for streaming heads; functions that append.

All caches of a model share one page table and one vector of lengths, which are passed beside them: a donated
cache never holds one buffer twice.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """Keys and values of retrieval heads, in pages that any sequence may own.

    - ``k``, ``v``: ``[num_pages, Hk, page_size, D]``
    - ``k_min``, ``k_max``: ``[num_pages, Hk, page_size / logical_page_size, D]``, the bounds of the keys of
      each logical page, or None in a cache from which nothing is selected.

    A page table ``[B, max_pages]`` says which page holds tokens ``i * page_size ...`` of a sequence. What a
    page held for an earlier owner is never read, so pages need no clearing.

    >>> cache = PagedKVCache.zeros(8, 2, 16, page_size=64, logical_page_size=16, dtype=jnp.float32)
    >>> cache.k.shape, cache.k_min.shape
    ((8, 2, 64, 16), (8, 2, 4, 16))
    """

    k: Any  # arrays; Any because tree functions also put shapes, dtypes and placeholders here
    v: Any
    k_min: Any = None
    k_max: Any = None

    @property
    def page_size(self) -> int:
        return self.k.shape[2]

    @property
    def logical_page_size(self) -> int | None:
        return None if self.k_min is None else self.page_size // self.k_min.shape[2]

    @classmethod
    def zeros(
        cls,
        num_pages: int,
        kv_heads: int,
        dim: int,
        *,
        page_size: int,
        logical_page_size: int | None,
        dtype: Any,
    ) -> "PagedKVCache":
        """An empty pool; ``logical_page_size=None`` keeps no bounds. It must divide the page."""
        if logical_page_size is not None and (logical_page_size < 1 or page_size % logical_page_size):
            raise ValueError(f"logical_page_size={logical_page_size} must divide page_size={page_size}")
        # Distinct arrays: a donated cache may not hold one buffer twice.
        k, v = (jnp.zeros((num_pages, kv_heads, page_size, dim), dtype) for _ in range(2))
        if logical_page_size is None:
            return cls(k, v)
        bounds = (num_pages, kv_heads, page_size // logical_page_size, dim)
        return cls(k, v, jnp.zeros(bounds, dtype), jnp.zeros(bounds, dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamingKVCache:
    """Keys and values of streaming heads: the first ``sink`` tokens and a ring of the last ``window``.

    - ``k``, ``v``: ``[B, Hk, sink + window, D]``. Position ``p`` lies in slot ``p`` where ``p < sink``,
      then in ``sink + (p - sink) % window``. Nothing else is allocated (StreamingLLM, DuoAttention).

    >>> cache = StreamingKVCache.zeros(1, 2, 16, sink=2, window=3, dtype=jnp.float32)
    >>> cache.positions(jnp.array([7])).tolist()  # after seven tokens
    [[0, 1, 5, 6, 4]]
    """

    k: Any
    v: Any
    sink: int = dataclasses.field(metadata={"static": True})

    @property
    def window(self) -> int:
        return self.k.shape[2] - self.sink

    @classmethod
    def zeros(
        cls, batch: int, kv_heads: int, dim: int, *, sink: int, window: int, dtype: Any
    ) -> "StreamingKVCache":
        """An empty cache. A window holds at least the query's own token."""
        if sink < 0 or window < 1:
            raise ValueError(f"sink={sink} must be >= 0 and window={window} >= 1")
        k, v = (jnp.zeros((batch, kv_heads, sink + window, dim), dtype) for _ in range(2))
        return cls(k, v, sink)

    def positions(self, lengths: Int[Array, " B"]) -> Int[Array, "B S"]:
        """The position of the token that each slot holds after ``lengths`` tokens; -1 where it holds none."""
        slot = jnp.arange(self.sink + self.window)
        last = lengths[:, None] - 1
        ring = last - (last - slot) % self.window  # the latest p <= last with p % window == slot % window
        position = jnp.where(slot < self.sink, slot, ring)
        return jnp.where((position <= last) & ((slot < self.sink) | (position >= self.sink)), position, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerKVCache:
    """The cache of one attention layer, split by KV head: ``streaming_heads`` stream, all others are paged.

    ``paged`` is None in a layer that only streams, ``streaming`` is None in a layer that never does.
    """

    paged: PagedKVCache | None
    streaming: StreamingKVCache | None
    streaming_heads: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})


def append_paged(
    cache: PagedKVCache,
    k: Float[Array, "B C Hk D"],
    v: Float[Array, "B C Hk D"],
    page_table: Int[Array, "B max_pages"],
    lengths: Int[Array, " B"],
    counts: Int[Array, " B"],
) -> PagedKVCache:
    """Writes the first ``counts[b]`` of ``C`` tokens of each sequence after the ``lengths[b]`` it has.

    The bounds of a logical page start afresh with its first token: what a recycled page held is never mixed
    in. Every position written must have a page in the table; ``generate`` checks that on the host.
    """
    chunk = jnp.arange(k.shape[1])
    position = lengths[:, None] + chunk
    valid = chunk < counts[:, None]
    # Tokens that are not valid get a page outside the pool, and mode="drop" leaves them out.
    slot = position % cache.page_size
    page = _page_of(page_table, position // cache.page_size, valid, cache.k.shape[0])
    k, v = k.astype(cache.k.dtype), v.astype(cache.v.dtype)
    new_k = cache.k.at[page, :, slot].set(k, mode="drop")
    new_v = cache.v.at[page, :, slot].set(v, mode="drop")
    if cache.k_min is None:
        return PagedKVCache(new_k, new_v)
    k_min, k_max = _append_bounds(cache, k, page_table, lengths, counts)
    return PagedKVCache(new_k, new_v, k_min, k_max)


def _append_bounds(cache, k, page_table, lengths, counts):
    size = cache.logical_page_size
    logical_pages = cache.page_size // size
    # Align the chunk to logical pages: units of `size` tokens; the first may have begun before the chunk.
    units = (k.shape[1] - 1) // size + 2 if k.shape[1] > 1 else 1
    offset = lengths % size
    token = jnp.arange(units * size) - offset[:, None]
    valid = (token >= 0) & (token < counts[:, None])
    aligned = jnp.take_along_axis(k, jnp.clip(token, 0, k.shape[1] - 1)[:, :, None, None], axis=1)
    aligned = aligned.reshape(k.shape[0], units, size, *k.shape[2:])
    valid = valid.reshape(k.shape[0], units, size, 1, 1)

    unit = jnp.arange(units)
    logical = (lengths // size)[:, None] + unit
    written = valid.any(axis=2)[..., 0, 0]
    page = _page_of(page_table, logical // logical_pages, written, cache.k.shape[0])
    inside = logical % logical_pages
    begun = ((unit == 0) & (offset > 0)[:, None])[..., None, None]  # holds earlier tokens of this sequence

    def merge(old, extreme, reduce, combine):
        new = reduce(jnp.where(valid, aligned, extreme), axis=2)
        before = jnp.where(begun, old.at[page, :, inside].get(mode="fill", fill_value=0), extreme)
        return old.at[page, :, inside].set(combine(before, new), mode="drop")

    infinity = jnp.array(jnp.inf, k.dtype)
    return (
        merge(cache.k_min, infinity, jnp.min, jnp.minimum),
        merge(cache.k_max, -infinity, jnp.max, jnp.maximum),
    )


def _page_of(
    page_table: Int[Array, "B max_pages"], index: Int[Array, "B C"], valid: Bool[Array, "B C"], num_pages: int
) -> Int[Array, "B C"]:
    page = jnp.take_along_axis(page_table, index, axis=1, mode="clip")
    return jnp.where(valid, page, num_pages)


def append_streaming(
    cache: StreamingKVCache,
    k: Float[Array, "B C Hk D"],
    v: Float[Array, "B C Hk D"],
    lengths: Int[Array, " B"],
    counts: Int[Array, " B"],
) -> StreamingKVCache:
    """Writes the first ``counts[b]`` of ``C`` tokens of each sequence after the ``lengths[b]`` it has.

    Of a chunk longer than the window only the last tokens are written, so that no slot is written twice.
    """
    chunk = jnp.arange(k.shape[1])
    position = lengths[:, None] + chunk
    last = (lengths + counts)[:, None] - 1
    kept = (chunk < counts[:, None]) & ((position < cache.sink) | (position > last - cache.window))
    ring = cache.sink + (position - cache.sink) % cache.window
    slot = jnp.where(kept, jnp.where(position < cache.sink, position, ring), cache.k.shape[2])
    row = jnp.arange(k.shape[0])[:, None]
    return StreamingKVCache(
        cache.k.at[row, :, slot].set(k.astype(cache.k.dtype), mode="drop"),
        cache.v.at[row, :, slot].set(v.astype(cache.v.dtype), mode="drop"),
        cache.sink,
    )
