"""LongLoRA (arXiv 2309.12307): which keys a head sees while training, and which parameters are trained."""

from flax import nnx

from jsparse import TokenMask, shifted_groups
from jsparse.models import LoRAParam


def shifted_head_masks(num_heads: int, group_size: int) -> tuple[TokenMask, ...]:
    """LongLoRA's S²-Attn, one mask per query head: what a model or ``jsparse.attention`` takes as ``mask``.

    The first half of the heads (rounded down) attends within groups of ``group_size`` tokens, the second
    within groups shifted by half a group, so neighbouring groups overlap (§3.2, figure 3). Both are causal
    by absolute position. The original rolls the last tokens of the sequence into the first group of the
    shifted heads, which thereby see the future; here the two halves of the group that would wrap around are
    groups of their own.

    >>> plain, shifted = shifted_head_masks(num_heads=2, group_size=4)
    >>> plain
    TokenMask(sink=0, window=None, group_size=4, group_shift=0)
    >>> shifted
    TokenMask(sink=0, window=None, group_size=4, group_shift=2)
    """
    if num_heads < 2:
        raise ValueError(f"num_heads must be at least 2, for half of the heads are shifted, not {num_heads}")
    if group_size < 2 or group_size % 2:
        raise ValueError(f"group_size must be even, so that it can be shifted by half, not {group_size}")
    plain, shifted = shifted_groups(group_size, 0), shifted_groups(group_size, group_size // 2)
    return (plain,) * (num_heads // 2) + (shifted,) * (num_heads - num_heads // 2)


def is_trained_with_lora(path: tuple, variable: nnx.Variable) -> bool:
    """Whether LongLoRA trains a parameter (§3.3): LoRA matrices, embeddings and norms, but not ``lm_head``.

    A filter for ``nnx.split``. Where embeddings are tied, the output layer is the embedding, and is trained.
    """
    return isinstance(variable, LoRAParam) or any("embed" in str(key) or "norm" in str(key) for key in path)
