"""FLOPs by arithmetic: those of block-sparse attention, and how those of a training step add up.

XLA's own analysis counts neither kernels nor the iterations of a loop. Here a product of [m, c] and [c, n] is
2 m c n FLOPs, and only products are counted: no norms, rotations, softmax, activations or optimizer.
"""

import dataclasses

import numpy as np

from jsparse.masks.block_mask import BlockMask

# Products of a block of queries with a block of keys, each 2 * block_q * block_kv * head_dim FLOPs. Forward:
# scores, and weights times values. Backward: one pass makes dQ from scores, dweights and their product with
# the keys; another computes the first two again, and dK and dV from them by two products. (FlashAttention-2
# has five products, in one pass with atomics.)
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 2, 3 + 4


@dataclasses.dataclass(frozen=True)
class Passes:
    """FLOPs of one part of a step.

    - forward, backward: in each pass.
    - again: in computing the forward pass again, if the backward pass needs what was not kept.
    """

    forward: int = 0
    backward: int = 0
    again: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.again

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.forward + other.forward, self.backward + other.backward, self.again + other.again)

    def times(self, n: int) -> "Passes":
        return Passes(n * self.forward, n * self.backward, n * self.again)


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of a training step.

    - attention: over the blocks that are visited.
    - causal_attention: the same under plain causal attention.
    - projections: of queries, keys, values and outputs.
    - mlp: the MLPs.
    - head: the output layer.

    >>> flops = StepFlops(Passes(1, 2), Passes(10, 20), Passes(3, 6), Passes(4, 8), Passes(1, 2))
    >>> flops.total, flops.total_with_causal, round(flops.saved, 3)
    (27, 54, 0.5)
    """

    attention: Passes
    causal_attention: Passes
    projections: Passes
    mlp: Passes
    head: Passes

    def parts(self) -> dict[str, Passes]:
        return {name: getattr(self, name) for name in ("attention", "projections", "mlp", "head")}

    @property
    def total(self) -> int:
        return sum(part.total for part in self.parts().values())

    @property
    def total_with_causal(self) -> int:
        return self.total - self.attention.total + self.causal_attention.total

    @property
    def saved(self) -> float:
        """The fraction of a step's FLOPs with causal attention that the mask saves."""
        return 1 - self.total / self.total_with_causal

    def to_json(self) -> dict:
        derived = {"total": self.total, "total_with_causal": self.total_with_causal, "saved": self.saved}
        return dataclasses.asdict(self) | derived


def attention_flops(mask: BlockMask, num_q_heads: int, head_dim: int) -> Passes:
    """FLOPs of attention over the lists of ``mask``, for one sequence.

    Forward: ``4 * head_dim`` per pair of a query and a key in a visited block, hidden pairs included.
    Backward: 7/2 of that, since both implementations take one pass for dQ and one for dK and dV, and each
    computes the scores again. ``again`` is the forward pass once more.

    - mask: the lists. If they differ between sequences, the sequence with the most blocks counts.
    - num_q_heads, head_dim: of the attention.

    Raises ValueError if the mask is for another number of query heads.

    >>> from jsparse import causal
    >>> mask = BlockMask.from_token_masks(causal(), 256, 256, block_q=128, block_kv=128)
    >>> attention_flops(mask, num_q_heads=1, head_dim=64).forward == 4 * 64 * 3 * 128 * 128
    True
    """
    counts = np.asarray(mask.kv_count, dtype=np.int64).sum(axis=-1)  # [R] or [B, R]
    rows = mask.row_of_head(num_q_heads)
    if len(rows) != num_q_heads:
        raise ValueError(f"num_q_heads={num_q_heads}, but the mask is for {len(rows)} query heads")
    blocks = int(counts[..., list(rows)].sum(axis=-1).max())
    product = 2 * blocks * mask.block_q * mask.block_kv * head_dim
    forward = _FORWARD_PRODUCTS * product
    return Passes(forward, _BACKWARD_PRODUCTS * product, forward)
