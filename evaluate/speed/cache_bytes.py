"""How many bytes a cache takes, and how many of them a decode step reads."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jsparse.cache.layer import LayerKVCache
from jsparse.cache.pages import PagedKVCache
from jsparse.cache.ring import StreamingKVCache
from jsparse.cache.select.selection import Selection
from jsparse.serve.config import CacheConfig
from jsparse.serve.layout import CacheLayout
from jsparse.serve.state import ModelShape

PAGE, LOGICAL_PAGE = CacheConfig().page_sizes()


@dataclasses.dataclass(frozen=True)
class CacheBytes:
    """What one layer keeps, over all its KV heads, in one kind of cache.

    Pages take ``per_token`` for each token of their capacity: ``keys_and_values``, ``scales_and_zeros`` if
    they hold codes, and the ``bounds`` of the keys if pages are selected by them. A ring takes
    ``per_sequence``, however long the sequence is.
    """

    kind: str
    keys_and_values: float = 0.0
    scales_and_zeros: float = 0.0
    bounds: float = 0.0
    per_sequence: int = 0

    @property
    def per_token(self) -> float:
        return self.keys_and_values + self.scales_and_zeros + self.bounds


def bytes_table(
    shape: ModelShape,
    *,
    page_size: int = PAGE,
    logical_page_size: int = LOGICAL_PAGE,
    sink: int = 128,
    window: int = 256,
) -> list[CacheBytes]:
    """The bytes of each kind of cache for a model with these heads, counted without making any array.

    The bounds of codes, and the keys and values of a ring, are in ``shape.dtype``.

    >>> shape = ModelShape(q_heads=8, kv_heads=2, head_dim=64, hidden_size=512, dtype=jnp.float32)
    >>> for row in bytes_table(shape):
    ...     print(row.kind, row.per_token, row.per_sequence)
    float32 pages 1088.0 0
    bfloat16 pages 544.0 0
    int8 pages 352.0 0
    int4 pages 224.0 0
    float32 ring 0.0 393216
    """
    dtype = jnp.dtype(shape.dtype)
    kinds = [(jnp.dtype(name), None, f"{name} pages") for name in ("float32", "bfloat16")]
    kinds += [(dtype, 8, "int8 pages"), (dtype, 4, "int4 pages")]
    rows = []
    for kept, bits, kind in kinds:
        cache = _shapes(
            PagedKVCache.zeros,
            1,
            shape.kv_heads,
            shape.head_dim,
            page_size=page_size,
            logical_page_size=logical_page_size,
            dtype=kept,
            bits=bits,
        )
        values = [x if bits is None else x.codes for x in (cache.k, cache.v)]
        kept_bytes = nbytes(values)
        rows.append(
            CacheBytes(
                kind,
                keys_and_values=kept_bytes / page_size,
                scales_and_zeros=(nbytes((cache.k, cache.v)) - kept_bytes) / page_size,
                bounds=nbytes(cache.bounds) / page_size,
            )
        )
    ring = _shapes(
        StreamingKVCache.zeros, 1, shape.kv_heads, shape.head_dim, sink=sink, window=window, dtype=dtype
    )
    return [*rows, CacheBytes(f"{dtype.name} ring", per_sequence=nbytes(ring))]


def nbytes(tree: Any) -> int:
    """The bytes of all arrays in a tree. They may be abstract."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def step_bytes(layout: CacheLayout, layers: tuple[LayerKVCache, ...], length: int) -> int:
    """The bytes of the cache, without weights, that a decode step reads with ``length`` tokens held per row.

    This is arithmetic in whole pages: the pages that are held or, beyond the budget, listed (one list per KV
    head, ``select_heads`` "max"); one step's share of the selector, which does not run in every step; and
    whole rings. Pages that begin between two selections are left out, as is what a step writes.
    """
    held = layout.pages_of(length)
    total = 0.0
    for layer, of_layer in zip(layers, layout.layers, strict=True):
        total += nbytes(layer.streaming)
        if layer.paged is None:
            continue
        pages, selection = layer.paged, of_layer.selection
        listed = held
        if selection is not None and length > selection.budget:
            listed = selection.budget // layout.page_size
            total += layout.batch * held * _scored(pages, selection) / pages.num_pages / selection.every
        total += layout.batch * listed * nbytes((pages.k, pages.v)) / pages.num_pages
    return round(total)


def _scored(pages: PagedKVCache, selection: Selection) -> int:
    """The bytes of a whole pool that scoring reads."""
    looked_at = {"bounds": pages.bounds, "exact": pages.k, "mean": pages.k, "random": ()}
    return nbytes(looked_at[selection.score])


def _shapes(make: Any, *sizes: int, **options: Any) -> Any:
    return jax.eval_shape(functools.partial(make, *sizes, **options))
