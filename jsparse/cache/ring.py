"""The sink and the ring of streaming heads, and the function that appends to them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsparse.arrays import DeviceArray
from jsparse.cache.tokens import Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamingKVCache:
    """Keys and values of streaming heads: the first ``sink`` tokens and a ring of the last ``window``.

    - k, v: [B, Hk, sink + ring, D], ``ring = window + spare``. Position ``p < sink`` is in slot ``p``, any
      other in slot ``sink + (p - sink) % ring``. Nothing else is allocated.
    - sink: how many of the first tokens stay.
    - spare: how many drafts may be written after a sequence and rejected. A caller rejects them by continuing
      with the earlier length. After ``L`` tokens, the drafts ``L ... L + spare - 1`` overwrite positions up
      to ``L - 1 - window``, while the query at ``L - 1`` sees those from ``L - window`` on.

    Source: StreamingLLM (arXiv 2309.17453), DuoAttention (arXiv 2410.10819).

    >>> cache = StreamingKVCache.zeros(1, 2, 16, sink=2, window=3, dtype=jnp.float32)
    >>> cache.positions(jnp.array([7])).tolist()  # after seven tokens
    [[0, 1, 5, 6, 4]]
    >>> cache = StreamingKVCache.zeros(1, 2, 16, sink=2, window=3, spare=1, dtype=jnp.float32)
    >>> cache.positions(jnp.array([7])).tolist()  # the slot of token 3 may hold a draft of token 7
    [[0, 1, 6, -1, 4, 5]]
    """

    k: DeviceArray
    v: DeviceArray
    sink: int = dataclasses.field(metadata={"static": True})
    spare: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def window(self) -> int:
        """How many of the last tokens a query sees, its own included."""
        return self.ring - self.spare

    @property
    def ring(self) -> int:
        """How many slots the ring has: ``window + spare``."""
        return self.k.shape[2] - self.sink

    @classmethod
    def zeros(
        cls, batch: int, kv_heads: int, dim: int, *, sink: int, window: int, spare: int = 0, dtype: Any
    ) -> "StreamingKVCache":
        """An empty cache for ``batch`` sequences.

        - sink, window, spare: as in the fields; a window holds at least the query's own token.
        - dtype: of keys and values.

        Raises ValueError for negative sizes, or a window of 0.
        """
        if sink < 0 or window < 1:
            raise ValueError(f"sink={sink} must be >= 0 and window={window} >= 1")
        if spare < 0:
            raise ValueError(f"spare={spare} must be >= 0")
        k, v = (jnp.zeros((batch, kv_heads, sink + window + spare, dim), dtype) for _ in range(2))
        return cls(k, v, sink, spare)

    def positions(self, lengths: Int[Array, " B"]) -> Int[Array, "B S"]:
        """The position of the token that each slot holds after ``lengths`` tokens, -1 if it holds none.

        These are the tokens of the sink and the last ``window``. A slot that a later draft may have
        overwritten counts as empty.
        """
        return _ring_positions(lengths, self.sink, self.window, self.spare)

    def slots(self, positions: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """The slots of the tokens at these positions, as long as they are held."""
        ring = self.sink + (positions - self.sink) % self.ring
        return jnp.where(positions < self.sink, positions, ring)

    def take(self, positions: Int[Array, "B n"]) -> tuple[Float[Array, "B Hk n D"], Float[Array, "B Hk n D"]]:
        """Keys and values of tokens that are held here; anything for other positions."""
        slot = self.slots(jnp.maximum(positions, 0))[:, None, :, None]
        k, v = (jnp.take_along_axis(x, slot, axis=2) for x in (self.k, self.v))
        return k, v

    def narrowed(self, window: int, lengths: Int[Array, " B"]) -> "StreamingKVCache":
        """The sink and the last ``window`` tokens in a ring of that window, with as many spare slots.

        Prompts may see a longer window than new tokens do: what decoding never reads is not kept.
        """
        if window > self.window:
            raise ValueError(f"window={window} must be at most the {self.window} of the ring")
        if window == self.window:
            return self
        k, v = self.take(_ring_positions(lengths, self.sink, window, self.spare))
        return dataclasses.replace(self, k=k, v=v)


def _ring_positions(lengths, sink: int, window: int, spare: int):
    slot = jnp.arange(sink + window + spare)
    last = lengths[:, None] - 1
    ring = last - (last - slot) % (window + spare)  # the latest p <= last of this slot
    position = jnp.where(slot < sink, slot, ring)
    # Without spare slots, a ring holds nothing from before the window.
    first = jnp.maximum(sink, last - window + 1) if spare else sink
    return jnp.where((position <= last) & ((slot < sink) | (position >= first)), position, -1)


def append_streaming(
    cache: StreamingKVCache,
    k: Float[Array, "B C Hk D"],
    v: Float[Array, "B C Hk D"],
    tokens: Tokens,
) -> StreamingKVCache:
    """Writes the first ``tokens.added[b]`` of ``C`` tokens of each sequence after those that it has.

    Of a chunk longer than the ring, only the tokens of the sink and the last ones are written, so no slot is
    written twice.
    """
    _, lengths, counts = tokens
    chunk = jnp.arange(k.shape[1])
    position = lengths[:, None] + chunk
    last = (lengths + counts)[:, None] - 1
    kept = (chunk < counts[:, None]) & ((position < cache.sink) | (position > last - cache.ring))
    slot = jnp.where(kept, cache.slots(position), cache.k.shape[2])
    row = jnp.arange(k.shape[0])[:, None]
    return dataclasses.replace(
        cache,
        k=cache.k.at[row, :, slot].set(k.astype(cache.k.dtype), mode="drop"),
        v=cache.v.at[row, :, slot].set(v.astype(cache.v.dtype), mode="drop"),
    )
