"""The pages of retrieval heads, and the function that appends to them.

All caches of a model share one page table and one vector of lengths. They are passed separately, as
:class:`jsparse.cache.tokens.Tokens`, since a donated cache may not hold one buffer twice.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsparse.arrays import DeviceArray
from jsparse.cache.quantize import dequantize, quantize
from jsparse.cache.tokens import Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """Keys and values of retrieval heads, in pages that any sequence may own.

    A page table [B, max_pages] says which page holds tokens ``i * page_size ...`` of a sequence. What a page
    held for an earlier owner is never read, so pages need no clearing.

    - k, v: [num_pages, Hk, page_size, D]; with ``bits``, these as :class:`jsparse.cache.quantize.Quantized`,
      with a scale and a zero per token and KV head.
    - bounds: [num_pages, Hk, page_size / logical_page_size, 2 D], for each logical page the smallest and then
      the largest value of each channel of its keys, before they are quantised. ``k_min`` and ``k_max`` are
      its halves. None keeps no bounds.
    - bits: of a code, 8 or 4; None stores values.

    >>> cache = PagedKVCache.zeros(8, 2, 16, page_size=64, logical_page_size=16, dtype=jnp.float32)
    >>> cache.k.shape, cache.k_min.shape
    ((8, 2, 64, 16), (8, 2, 4, 16))
    """

    k: Any  # arrays; Any because tree functions also put shapes, dtypes and placeholders here
    v: Any
    bounds: DeviceArray | None = None  # one array, since they are read together
    bits: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def num_pages(self) -> int:
        return jax.tree.leaves(self.k)[0].shape[0]

    @property
    def num_heads(self) -> int:
        return jax.tree.leaves(self.k)[0].shape[1]

    @property
    def page_size(self) -> int:
        return jax.tree.leaves(self.k)[0].shape[2]

    @property
    def logical_page_size(self) -> int | None:
        return None if self.bounds is None else self.page_size // self.bounds.shape[2]

    @property
    def k_min(self) -> Any:
        return None if self.bounds is None else self.bounds[..., : self.bounds.shape[-1] // 2]

    @property
    def k_max(self) -> Any:
        return None if self.bounds is None else self.bounds[..., self.bounds.shape[-1] // 2 :]

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
        bits: int | None = None,
    ) -> "PagedKVCache":
        """An empty pool.

        - num_pages, kv_heads, dim: the sizes ``num_pages``, ``Hk`` and ``D`` of the arrays.
        - page_size: tokens per page.
        - logical_page_size: tokens per bound; None keeps no bounds.
        - dtype: of keys, values and bounds; with ``bits``, of the bounds alone.
        - bits: of a code, 8 or 4; None stores values.

        Raises ValueError if ``logical_page_size`` does not divide ``page_size``.
        """
        if logical_page_size is not None and (logical_page_size < 1 or page_size % logical_page_size):
            raise ValueError(f"logical_page_size={logical_page_size} must divide page_size={page_size}")
        stored = jax.ShapeDtypeStruct((num_pages, kv_heads, page_size, dim), dtype)
        if bits is not None:
            stored = jax.eval_shape(functools.partial(quantize, bits=bits), stored)
        # Distinct arrays: a donated cache may not hold one buffer twice.
        k, v = (jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), stored) for _ in range(2))
        if logical_page_size is None:
            return cls(k, v, bits=bits)
        bounds = (num_pages, kv_heads, page_size // logical_page_size, 2 * dim)
        return cls(k, v, jnp.zeros(bounds, dtype), bits)

    def stored(self, x: Float[Array, "*batch D"]) -> Any:
        """Keys or values as the pool holds them."""
        return x.astype(self.k.dtype) if self.bits is None else quantize(x, self.bits)

    def restored(self, stored: Any, dtype: Any) -> Float[Array, "*batch D"]:
        """The values that attention reads."""
        return (stored if self.bits is None else dequantize(stored, self.bits)).astype(dtype)

    def read(
        self, pages: Int[Array, "B H n"], heads: Int[Array, " H"], dtype: Any
    ) -> tuple[Float[Array, "B H n page D"], Float[Array, "B H n page D"]]:
        """Keys and values of whole pages of the pool, each list for one KV head."""
        index = pages, heads[:, None]
        k, v = (
            jax.tree.map(lambda pool: pool.at[index].get(mode="clip"), stored) for stored in (self.k, self.v)
        )
        return self.restored(k, dtype), self.restored(v, dtype)


def append_paged(
    cache: PagedKVCache,
    k: Float[Array, "B C Hk D"],
    v: Float[Array, "B C Hk D"],
    tokens: Tokens,
) -> PagedKVCache:
    """Writes the first ``tokens.added[b]`` of ``C`` tokens of each sequence after those that it has.

    The first token of a logical page starts its bounds: what a recycled page held is never mixed in. Every
    position written must have a page in the table; ``generate`` checks that on the host.
    """
    page_table, lengths, counts = tokens
    assert page_table is not None
    chunk = jnp.arange(k.shape[1])
    position = lengths[:, None] + chunk
    valid = chunk < counts[:, None]
    # Tokens that are not valid get a page outside the pool, which mode="drop" leaves out.
    slot = position % cache.page_size
    page = _page_of(page_table, position // cache.page_size, valid, cache.num_pages)

    def write(pool, new):
        return pool.at[page, :, slot].set(new, mode="drop")

    new_k = jax.tree.map(write, cache.k, cache.stored(k))
    new_v = jax.tree.map(write, cache.v, cache.stored(v))
    bounds = cache.bounds
    if bounds is not None:
        bounds = _append_bounds(cache, k.astype(bounds.dtype), tokens)
    return PagedKVCache(new_k, new_v, bounds, cache.bits)


def _append_bounds(cache: PagedKVCache, k: Float[Array, "B C Hk D"], tokens: Tokens):
    page_table, lengths, counts = tokens
    size = cache.logical_page_size
    assert size is not None and page_table is not None
    logical_pages = cache.page_size // size
    # Align the chunk to logical pages, units of `size` tokens. The first may begin before the chunk.
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
    page = _page_of(page_table, logical // logical_pages, written, cache.num_pages)
    inside = logical % logical_pages
    begun = ((unit == 0) & (offset > 0)[:, None])[..., None, None]  # holds earlier tokens of this sequence

    def extremes(reduce, extreme):
        return reduce(jnp.where(valid, aligned, jnp.array(extreme, k.dtype)), axis=2)

    assert cache.bounds is not None
    # The largest of -k is minus the smallest of k: one comparison serves both halves.
    sign = jnp.where(jnp.arange(2 * k.shape[-1]) < k.shape[-1], -1, 1).astype(k.dtype)
    new = jnp.concatenate([extremes(jnp.min, jnp.inf), extremes(jnp.max, -jnp.inf)], axis=-1)
    old = cache.bounds.at[page, :, inside].get(mode="fill", fill_value=0)
    before = jnp.where(begun, sign * old, -jnp.inf)
    return cache.bounds.at[page, :, inside].set(sign * jnp.maximum(before, sign * new), mode="drop")


def _page_of(
    page_table: Int[Array, "B max_pages"], index: Int[Array, "B C"], valid: Bool[Array, "B C"], num_pages: int
) -> Int[Array, "B C"]:
    page = jnp.take_along_axis(page_table, index, axis=1, mode="clip")
    return jnp.where(valid, page, num_pages)
