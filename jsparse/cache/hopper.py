"""Decoding on the Hopper kernel: what it can take, and how a cache becomes pages and lists of pages."""

from typing import Any

import jax
import jax.numpy as jnp

from jsparse.cache.pages import PagedKVCache
from jsparse.cache.quantize import Quantized
from jsparse.cache.ring import StreamingKVCache
from jsparse.device import kernel_limit
from jsparse.implementations import hopper
from jsparse.mesh import split_over_mesh


def limit(q, cache: PagedKVCache | StreamingKVCache, *, interpret: bool) -> str | None:
    """Why the kernel cannot take this call, or None if it can."""
    # The kernel reads a page from its beginning, but a ring with spare slots has gaps, where drafts may be.
    if isinstance(cache, StreamingKVCache) and cache.spare:
        return f"the decode kernel takes streaming caches of spare=0, not spare={cache.spare}"
    if (reason := kernel_limit(interpret=interpret)) is not None:
        return reason
    from jsparse.pallas_kernels.hopper.paged_decode import shape_limit

    return shape_limit(q, _pool(cache.k), interpret=interpret)


def decode(q, cache: PagedKVCache | StreamingKVCache, lengths, page_table, pages, scale, *, interpret: bool):
    """``decode_attention`` by the kernel; on a mesh, each device's own sequences and heads."""
    from jsparse.pallas_kernels.hopper.paged_decode import paged_decode

    options = {
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "interpret": hopper.interpreter() if interpret else None,
    }
    streaming = isinstance(cache, StreamingKVCache)
    pools, structure = jax.tree.flatten((_pool(cache.k), _pool(cache.v)))
    num_heads, slots = pools[0].shape[1:3]

    def run(q, lengths, *arrays):
        k, v = jax.tree.unflatten(structure, arrays[: len(pools)])
        listed = (
            _ring_lists(lengths, slots) if streaming else _page_lists(lengths, slots, *arrays[len(pools) :])
        )
        out, _ = paged_decode(q, k, v, *listed, **options)
        return (out.astype(q.dtype),)

    # Each sequence has its own ring; all sequences share the pages.
    owner, lists, axes = ("b", (), ()) if streaming else (".", (page_table,), ("b.",))
    if pages is not None:
        lists, axes = (*lists, pages), (*axes, "bh.")
    operands = (q, lengths, *pools, *lists)
    letters = ("bhd", "b", *(f"{owner}h".ljust(pool.ndim, ".") for pool in pools), *axes)
    (out,) = split_over_mesh(run, operands, letters, ("bhd",), num_heads=num_heads)
    return out


def _pool(stored: Any) -> Any:
    """Pages as the kernel takes them: one array, or codes with their scales and zeros."""
    return tuple(stored) if isinstance(stored, Quantized) else stored


def _ring_lists(lengths, slots: int):
    """One page per sequence, shared by its heads: slots fill in order, and every filled one is visible."""
    page = jnp.arange(lengths.shape[0], dtype=jnp.int32)
    return page[:, None, None], jnp.minimum(lengths, slots).astype(jnp.int32)[:, None, None]


def _page_lists(lengths, page_size: int, page_table, pages=None):
    """Where the pages are in the pool, [B, 1 or Hk, n], and how many tokens of the sequence each holds."""
    if pages is None:
        pages, physical = jnp.arange(page_table.shape[1])[None, None], page_table[:, None]
    else:
        physical = jnp.take_along_axis(page_table[:, None], pages, axis=2, mode="clip")
    used = jnp.clip(lengths[:, None, None] - pages * page_size, 0, page_size)
    return physical.astype(jnp.int32), jnp.where(pages >= 0, used, 0).astype(jnp.int32)
