"""Our side of the CPU benchmark: a worker that runs jsparse on the inputs of inputs.py."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jsparse
from cpu import inputs
from cpu.rows import BLOCK, KINDS, OURS, Sizes, sizes
from cpu.workers import Ready, repeated, serve
from jsparse import BlockMask
from jsparse.cache.decode import decode_attention
from jsparse.cache.pages import PagedKVCache
from jsparse.cache.select.best import select_pages
from jsparse.masks.block_mask import build_block_mask
from jsparse.masks.bounds import page_bounds

PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def make(spec: Mapping[str, Any]) -> Ready:
    of = sizes(spec["small"])
    length, name = spec["length"], spec["name"]
    dtype = None if spec["dtype"] == "none" else jnp.dtype(spec["dtype"])
    match spec["row"]:
        case "prefill-streaming" | "prefill-half":
            return prefill(masks_of(spec["row"], of), length, dtype, of)
        case "forward-backward":
            return forward_backward(streaming(of), length, dtype, of)
        case "decode-pages":
            return decode(length, dtype, of)
        case "selection":
            return select(length, dtype, of) if name == OURS else decode(length, dtype, of)
        case "mask-building":
            return build_mask(length, of)
        case "growth":
            return prefill(lists_of(name, length, of), length, dtype, of)
        case "matmul":
            return matmul(length, dtype)
        case "generate" | "finetune-step":
            from cpu import ours_model

            return ours_model.make(spec)
    raise ValueError(f"row={spec['row']!r} is not one of ours")


def ready(call: Callable[[], Any], names: tuple[str, ...] = ("out",)) -> Ready:
    """call() returns an array for each name."""

    def outputs() -> dict[str, np.ndarray]:
        return {name: np.asarray(x, np.float32) for name, x in zip(names, call(), strict=True)}

    return Ready(repeated(lambda: jax.block_until_ready(call())), outputs)


# Whole sequences ---------------------------------------------------------------------------------------


def streaming(of: Sizes) -> jsparse.TokenMask:
    return jsparse.streaming(sink=of.sink, window=of.window)


def masks_of(row: str, of: Sizes) -> Any:
    if row == "prefill-streaming":
        return streaming(of)
    half = of.heads // 2
    return [jsparse.causal()] * half + [streaming(of)] * (of.heads - half)


def lists_of(kind: str, length: int, of: Sizes) -> Any:
    """The mask for a kind of the row "growth"."""
    dense, stream, top = KINDS
    if kind == top:
        index, count = inputs.top_blocks(length, of)
        return BlockMask.from_indices(
            index, count, q_len=length, kv_len=length, block_q=BLOCK, block_kv=BLOCK
        )
    return {dense: jsparse.causal(), stream: streaming(of)}[kind]


def prefill(mask: Any, length: int, dtype, of: Sizes) -> Ready:
    q, k, v, _ = (jnp.asarray(x, dtype) for x in inputs.sequences(length, of))
    if isinstance(mask, BlockMask):  # lists that a selector chose are data
        attend = jax.jit(jsparse.attention)
        return ready(lambda: (attend(q, k, v, mask),))
    attend = jax.jit(lambda q, k, v: jsparse.attention(q, k, v, mask))
    return ready(lambda: (attend(q, k, v),))


def forward_backward(mask: Any, length: int, dtype, of: Sizes) -> Ready:
    arrays = [jnp.asarray(x, dtype) for x in inputs.sequences(length, of)]

    @jax.jit
    def both(q, k, v, d_out):
        out, pullback = jax.vjp(lambda q, k, v: jsparse.attention(q, k, v, mask), q, k, v)
        return out, *pullback(d_out)

    return ready(lambda: both(*arrays), ("out", "dq", "dk", "dv"))


def build_mask(length: int, of: Sizes) -> Ready:
    mask = streaming(of)

    def call() -> BlockMask:
        return build_block_mask(mask, length, length, BLOCK, BLOCK)

    def outputs() -> dict[str, np.ndarray]:
        """1 where a block is listed, 2 where it is wholly visible: [1, query blocks, 1, key blocks]."""
        lists = call()
        shown = np.zeros((lists.num_q_blocks, lists.num_kv_blocks), np.float32)
        for i in range(lists.num_q_blocks):
            start, count, full = (int(x[0, i]) for x in (lists.kv_start, lists.kv_count, lists.kv_full_count))
            shown[i, lists.kv_index[start : start + count]] = 1
            shown[i, lists.kv_index[start : start + full]] = 2
        return {"lists": shown[None, :, None]}

    return Ready(repeated(call), outputs)


def matmul(side: int, dtype) -> Ready:
    a, b = (jnp.asarray(inputs.normal(seed, side, side), dtype) for seed in (1, 2))
    product = jax.jit(jnp.matmul)
    return ready(lambda: (product(a, b),))


# One query to a cache ----------------------------------------------------------------------------------


def paged(x: np.ndarray, dtype, of: Sizes) -> jax.Array:
    """[Hk, S, D] as a pool of pages, [pages, Hk, page size, D]."""
    heads, length, dim = x.shape
    pages = x.reshape(heads, length // of.page, of.page, dim).swapaxes(0, 1)
    return jnp.asarray(np.ascontiguousarray(pages), dtype)


def decode(length: int, dtype, of: Sizes) -> Ready:
    q = jnp.asarray(inputs.token_of(of), dtype)
    k, v = inputs.cache(length, of)
    pool = PagedKVCache(paged(k, dtype, of), paged(v, dtype, of))
    table, lengths = jnp.arange(length // of.page)[None], jnp.array([length])
    lists = [jnp.asarray(each)[None] for each in inputs.page_lists(length, of)]
    turn = itertools.cycle(lists)

    @jax.jit
    def attend(q, pool, lengths, table, pages):
        return decode_attention(q, pool, lengths, table, pages=pages)

    def outputs() -> dict[str, np.ndarray]:
        outs = [np.asarray(attend(q, pool, lengths, table, pages), np.float32) for pages in lists]
        return {"out": np.stack(outs, axis=1)}

    return Ready(repeated(lambda: attend(q, pool, lengths, table, next(turn)).block_until_ready()), outputs)


def select(length: int, dtype, of: Sizes) -> Ready:
    q = jnp.asarray(inputs.token_of(of), dtype)
    k, _ = inputs.cache(length, of)
    bounds = np.concatenate(page_bounds(k, of.logical_page), axis=-1)
    logical = of.page // of.logical_page
    bounds = jnp.asarray(bounds.reshape(1, of.kv_heads, length // of.page, logical, -1))
    choose = jax.jit(
        lambda q, bounds, lengths: select_pages(
            q, bounds, lengths, budget=of.pages * of.page, page_size=of.page
        )
    )
    lengths = jnp.array([length])
    return ready(lambda: (choose(q, bounds, lengths),))


if __name__ == "__main__":
    serve(make, PACKAGES)
