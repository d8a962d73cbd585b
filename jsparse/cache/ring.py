"""The sink and the ring of streaming heads, and the function that appends to them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsparse.cache.tokens import Tokens


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
        return _ring_positions(lengths, self.sink, self.window)

    def slots(self, positions: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """Where the tokens of these positions lie, while they do."""
        ring = self.sink + (positions - self.sink) % self.window
        return jnp.where(positions < self.sink, positions, ring)

    def take(self, positions: Int[Array, "B n"]) -> tuple[Float[Array, "B Hk n D"], Float[Array, "B Hk n D"]]:
        """Keys and values of tokens that lie here; for other positions anything."""
        slot = self.slots(jnp.maximum(positions, 0))[:, None, :, None]
        k, v = (jnp.take_along_axis(x, slot, axis=2) for x in (self.k, self.v))
        return k, v

    def narrowed(self, window: int, lengths: Int[Array, " B"]) -> "StreamingKVCache":
        """The same tokens in a ring that is no longer than this one, of which the last ``window`` stay.

        Prompts may see a longer window than new tokens do: what decoding never reads is not kept.
        """
        if window > self.window:
            raise ValueError(f"window={window} must be at most the {self.window} of the ring")
        if window == self.window:
            return self
        return StreamingKVCache(*self.take(_ring_positions(lengths, self.sink, window)), self.sink)


def _ring_positions(lengths, sink: int, window: int):
    slot = jnp.arange(sink + window)
    last = lengths[:, None] - 1
    ring = last - (last - slot) % window  # the latest p <= last of this slot
    position = jnp.where(slot < sink, slot, ring)
    return jnp.where((position <= last) & ((slot < sink) | (position >= sink)), position, -1)


def append_streaming(
    cache: StreamingKVCache,
    k: Float[Array, "B C Hk D"],
    v: Float[Array, "B C Hk D"],
    tokens: Tokens,
) -> StreamingKVCache:
    """Writes the first ``tokens.added[b]`` of ``C`` tokens of each sequence behind those that it has.

    Of a chunk longer than the window only the last tokens are written, so that no slot is written twice.
    """
    _, lengths, counts = tokens
    chunk = jnp.arange(k.shape[1])
    position = lengths[:, None] + chunk
    last = (lengths + counts)[:, None] - 1
    kept = (chunk < counts[:, None]) & ((position < cache.sink) | (position > last - cache.window))
    slot = jnp.where(kept, cache.slots(position), cache.k.shape[2])
    row = jnp.arange(k.shape[0])[:, None]
    return StreamingKVCache(
        cache.k.at[row, :, slot].set(k.astype(cache.k.dtype), mode="drop"),
        cache.v.at[row, :, slot].set(v.astype(cache.v.dtype), mode="drop"),
        cache.sink,
    )
