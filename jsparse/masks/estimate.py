"""Lists for the prefill of long prompts, estimated from the queries and keys themselves.

A prompt is computed whole or in chunks. The keys of a chunk are laid out in two parts: first room for
``cached`` tokens that were computed before (sequence ``b`` has ``held[b]`` of them), then the chunk's own. So
query ``t`` stands at position ``held[b] + t`` of its sequence, and its key is in slot ``cached + t``. The
first ``counts[b]`` tokens of the chunk belong to sequence ``b``. A prompt computed in chunks gets the lists
of the whole prompt, up to the rounding of scores.

Slots without a token may hold anything, NaN included: no query's list depends on them. No list has a block of
room that is not held. A block of queries without a token lists only itself. (Attention multiplies what it
hides inside a listed block by 0, so the values in the chunk's own slots must be finite.)

The estimates count blocks by position, as if no room were left over; the finished lists count them by slot.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Int

from jsparse.arrays import AnyArray, DeviceArray
from jsparse.integers import cdiv
from jsparse.masks.block_mask import BlockMask
from jsparse.masks.token_mask import causal


@runtime_checkable
class Estimate(Protocol):
    """What makes the lists of a prompt from its queries and keys: a frozen dataclass with these two members.

    ``PooledBlocks`` and ``VerticalSlash`` are estimates. One that needs whole segments of a prompt at
    a time has a field ``segment`` too, tokens per segment.
    """

    @property
    def block(self) -> int:
        """Tokens per block, of queries and of keys."""
        ...

    def block_mask(
        self,
        q: Any,
        k: Any,
        *,
        cached: int = 0,
        held: Any = None,
        counts: Any = None,
    ) -> BlockMask:
        """Lists for a prompt, or for a chunk of one, whose keys are laid out as the head of this file says.

        Arguments, result and errors are those of ``PooledBlocks.block_mask``.
        """
        ...


def all_blocks(
    batch: int,
    q_len: int,
    *,
    block: int = 128,
    cached: int = 0,
    held: Int[AnyArray, " B"] | None = None,
    counts: Int[AnyArray, " B"] | None = None,
) -> BlockMask:
    """Lists of every block up to the query's own, which are dense causal attention.

    - batch: sequences.
    - q_len: tokens of the chunk.
    - block: tokens per block.
    - cached, held, counts: as for ``PooledBlocks.block_mask``.

    Returns one list per sequence and block of queries.

    Raises ValueError for numbers that do not fit.

    >>> mask = all_blocks(2, 2, block=1, cached=2, held=np.array([0, 1]))
    >>> mask.kv_index.reshape(2, 2, 4).tolist()
    [[[2, -1, -1, -1], [2, 3, -1, -1]], [[0, 2, -1, -1], [0, 2, 3, -1]]]
    """
    require_multiple("batch", batch)
    require_multiple("q_len", q_len)
    require_multiple("block", block)
    chunk = _layout(batch, q_len, cached, held, counts, block, unit=block)
    return lists_of_blocks(jnp.arange(chunk.num_kv_blocks), chunk)


class Chunk(NamedTuple):
    """Where the queries and keys of a chunk stand."""

    q_len: int
    cached: int
    block: int
    held: DeviceArray  # int32 [B]
    counts: DeviceArray  # int32 [B]
    gap: bool  # held may be less than cached

    @property
    def num_q_blocks(self) -> int:
        return cdiv(self.q_len, self.block)

    @property
    def num_kv_blocks(self) -> int:
        return self.cached // self.block + self.num_q_blocks

    @property
    def own_block(self):
        """[B, nq]: the number, by position, of each block of queries."""
        return self.held[:, None] // self.block + jnp.arange(self.num_q_blocks)


def lists_of_blocks(blocks, chunk: Chunk) -> BlockMask:
    """The lists of the given blocks: [B, R, nq, M], counted by position, or a shape that broadcasts to it.

    They come in any order. Blocks before block 0 or after the query's own are ignored, as are repetitions.
    The query's own block must be among them.
    """
    none = np.iinfo(np.int32).max
    own = chunk.own_block[:, None, :, None]
    begun = jnp.arange(chunk.num_q_blocks) * chunk.block < chunk.counts[:, None]
    blocks = jnp.where(begun[:, None, :, None], blocks, own)  # the least work for missing queries
    blocks = jnp.sort(jnp.where((blocks >= 0) & (blocks <= own), blocks, none), axis=-1)
    again = blocks[..., 1:] == blocks[..., :-1]
    blocks = jnp.sort(blocks.at[..., 1:].set(jnp.where(again, none, blocks[..., 1:])), axis=-1)
    blocks = blocks[..., : chunk.num_kv_blocks]

    listed = blocks < none
    count = jnp.sum(listed, axis=-1, dtype=jnp.int32)
    held = chunk.held[:, None, None, None] // chunk.block
    slots = jnp.where(blocks < held, blocks, blocks + chunk.cached // chunk.block - held)
    return BlockMask.from_indices(
        jnp.where(listed, slots, -1),
        count,
        q_len=chunk.q_len,
        kv_len=chunk.cached + chunk.q_len,
        block_q=chunk.block,
        block_kv=chunk.block,
        token_mask=causal(),
        kv_full_count=count - 1,
    )


def best_blocks(scores, n: int):
    """The n blocks (or all) with the highest scores [..., blocks], the earlier of equals; always block 0."""
    return lax.top_k(scores.at[..., 0].set(jnp.inf), min(n, scores.shape[-1]))[1]


def split_in_blocks(x, block: int):
    """[B, T, ...] to [B, blocks, block, ...], with the last block filled up with zeros."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, block, *x.shape[2:])


def by_position(x, chunk: Chunk, unit: int):
    """Slots [B, S, ...], each of ``unit`` tokens, moved to their positions. The rest may be anything."""
    if not chunk.gap:
        return x
    cached, held = chunk.cached // unit, chunk.held // unit
    return jax.vmap(lambda x, n: lax.dynamic_update_slice_in_dim(x, x[cached:], n, axis=0))(x, held)


def chunk_of(q, k, cached, held, counts, block, unit) -> Chunk:
    """The layout of these queries and keys; ValueError unless they fit it. ``held`` is in whole ``unit``s."""
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 4 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be floating, [batch, tokens, heads, head_dim] with no empty axis, "
                f"not {x.dtype} {list(x.shape)}"
            )
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q {list(q.shape)} and k {list(k.shape)} must agree in batch and head_dim, "
            "and the query heads must be a multiple of the KV heads"
        )
    chunk = _layout(q.shape[0], q.shape[1], cached, held, counts, block, unit)
    if k.shape[1] != cached + q.shape[1]:
        raise ValueError(f"k must have cached + T = {cached} + {q.shape[1]} keys, not {k.shape[1]}")
    return chunk


def _layout(batch, q_len, cached, held, counts, block, unit) -> Chunk:
    require_multiple("cached", cached, block, least=0)
    gap = cached > 0 and held is not None
    if held is None:
        require_multiple("held", cached, unit, least=0)
        held = np.full(batch, cached)
    counts = np.full(batch, q_len) if counts is None else counts
    for name, x, most, of in (("held", held, cached, unit), ("counts", counts, q_len, 1)):
        if tuple(x.shape) != (batch,) or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers [{batch}], not {x.dtype} {list(x.shape)}")
        if isinstance(x, Tracer):
            continue  # the caller's responsibility
        values = np.asarray(x)
        wrong = values[(values < 0) | (values > most) | (values % of != 0)]
        if wrong.size:
            multiples = f" and be a multiple of {of}" if of > 1 else ""
            raise ValueError(f"{name} must lie in 0..{most}{multiples}, not {wrong[0]}")
    held, counts = (jnp.asarray(x, jnp.int32) for x in (held, counts))
    return Chunk(q_len, cached, block, held, counts, gap)


def require_multiple(name: str, value: object, of: int = 1, least: int = 1) -> None:
    """ValueError that names the argument unless it is a multiple of ``of`` and at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least or value % of:
        kind = "an integer" if of == 1 else f"a multiple of {of}"
        raise ValueError(f"{name} must be {kind}, at least {least}, not {value!r}")
