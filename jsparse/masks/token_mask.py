"""Which keys one query may see: four integers that every implementation understands."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Int

from jsparse.integers import require_integer


@dataclasses.dataclass(frozen=True)
class TokenMask:
    """Which keys a query may see, as four integers.

    Query ``i`` sees key ``j`` where all of these hold::

        j <= i
        window is None  or  j < sink  or  j > i - window
        group_size is None  or  (j + group_shift) // group_size == (i + group_shift) // group_size

    Positions are absolute; no mask ever shows a later token.

    - sink: how many of the first keys stay visible beside a window.
    - window: how many of the last keys are visible, the query's own included. None: all.
    - group_size: tokens per group. None: one group.
    - group_shift: by how many tokens the groups' borders are moved to the left.

    Raises ValueError for fields that are not integers in range, and for a ``group_shift`` without groups.

    Source: sink and window from StreamingLLM and DuoAttention (arXiv 2410.10819, §2.1); groups from LongLoRA
    (arXiv 2309.12307, §3.2), in causal form. The original rolls the sequence, which lets the first tokens of
    a shifted head see the last ones. Here the group that the roll would wrap around becomes two groups.

    >>> TokenMask(sink=1, window=2)(np.arange(4)[:, None], np.arange(4)).astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 0],
           [1, 0, 1, 1]])
    """

    sink: int = 0
    window: int | None = None
    group_size: int | None = None
    group_shift: int = 0

    def __post_init__(self):
        require_integer("sink", self.sink, 0)
        if self.window is not None:
            require_integer("window", self.window)
        if self.group_size is not None:
            require_integer("group_size", self.group_size)
        require_integer("group_shift", self.group_shift, 0)
        if self.group_shift and self.group_size is None:
            raise ValueError(f"group_shift={self.group_shift} needs a group_size")

    def __call__(
        self, q_position: Int[Array | np.ndarray, "..."], kv_position: Int[Array | np.ndarray, "..."]
    ) -> Bool[Array | np.ndarray, "..."]:
        """The mask itself, for NumPy or JAX arrays of positions that broadcast against each other."""
        visible = kv_position <= q_position
        if self.window is not None:
            visible = visible & ((kv_position < self.sink) | (kv_position > q_position - self.window))
        if self.group_size is not None:
            q_group = (q_position + self.group_shift) // self.group_size
            visible = visible & ((kv_position + self.group_shift) // self.group_size == q_group)
        return visible


def causal() -> TokenMask:
    """Every key up to and including the query's own.

    >>> causal()(np.arange(3)[:, None], np.arange(3)).astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [1, 1, 1]])
    """
    return TokenMask()


def streaming(sink: int, window: int) -> TokenMask:
    """The first ``sink`` keys and the last ``window``, the query's own included.

    Source: StreamingLLM (arXiv 2309.17453, §3.2); DuoAttention (arXiv 2410.10819, §2.1).

    >>> streaming(sink=1, window=2)(np.array([3]), np.arange(4)).tolist()
    [True, False, True, True]
    """
    return TokenMask(sink=sink, window=window)


def sliding_window(n: int) -> TokenMask:
    """The last ``n`` keys, the query's own included.

    Source: Mistral 7B (arXiv 2310.06825, §2).

    >>> sliding_window(2)(np.array([3]), np.arange(4)).tolist()
    [False, False, True, True]
    """
    return TokenMask(window=n)


def shifted_groups(size: int, shift: int) -> TokenMask:
    """The keys up to the query's own in its group, where the group is ``(position + shift) // size``.

    Source: the shifted sparse attention (S²-Attn) of LongLoRA (arXiv 2309.12307, §3.2), in causal form.

    >>> shifted_groups(4, 2)(np.array([5]), np.arange(6)).tolist()
    [False, False, True, True, True, True]
    """
    return TokenMask(group_size=size, group_shift=shift)


@dataclasses.dataclass(frozen=True)
class HeadMasks:
    """The token masks of all query heads, for ``q_len`` queries aligned to the end of ``kv_len`` keys.

    - masks: one for all heads, or a tuple of one per query head.
    """

    masks: TokenMask | tuple[TokenMask, ...]
    q_len: int
    kv_len: int

    @staticmethod
    def from_masks(masks: Any, q_len: int, kv_len: int) -> "HeadMasks":
        """From one mask or a sequence of masks; ValueError for anything else."""
        masks = masks if isinstance(masks, TokenMask) else tuple(masks)
        listed = (masks,) if isinstance(masks, TokenMask) else masks
        if not listed or not all(isinstance(mask, TokenMask) for mask in listed):
            raise ValueError(
                f"masks must be a TokenMask or a sequence of them, one per query head, not {masks!r}"
            )
        return HeadMasks(masks, q_len, kv_len)

    def distinct(self) -> tuple[TokenMask, ...]:
        """The different masks, in the order of the heads."""
        return (self.masks,) if isinstance(self.masks, TokenMask) else tuple(dict.fromkeys(self.masks))

    def per_head(self, num_q_heads: int) -> tuple[TokenMask, ...]:
        """One mask for each query head."""
        return (self.masks,) * num_q_heads if isinstance(self.masks, TokenMask) else self.masks
