"""The one differentiable attention function: checks, choice of implementation, and the gradient rule."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jsparse import sequence
from jsparse.implementations.interface import Call, Implementation, Visible, choose
from jsparse.implementations.table import IMPLEMENTATIONS
from jsparse.masks.block_mask import BlockMask
from jsparse.masks.token_mask import HeadMasks, TokenMask
from jsparse.mesh import SEQUENCE_AXIS, sequence_devices
from jsparse.sequence import SequenceSplit

Mask = TokenMask | Sequence[TokenMask] | BlockMask


@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    *,
    scale: float | None = ...,
    q_segment_ids: Array | None = ...,
    kv_segment_ids: Array | None = ...,
    implementation: str | None = ...,
    return_lse: Literal[False] = ...,
) -> Array: ...
@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    *,
    scale: float | None = ...,
    q_segment_ids: Array | None = ...,
    kv_segment_ids: Array | None = ...,
    implementation: str | None = ...,
    return_lse: Literal[True],
) -> tuple[Array, Array]: ...
def attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hk D"],
    v: Float[Array, "B S Hk D"],
    mask: Mask,
    *,
    scale: float | None = None,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T Hq D"] | tuple[Float[Array, "B T Hq D"], Float[Array, "B T Hq"]]:
    """Attention that visits only the blocks that the mask lists.

    For each query, over the keys that it sees::

        out = sum_s p_s v_s      p = softmax_s(scale * q · k_s)      lse = log sum_s exp(scale * q · k_s)

    Differentiable in q, k and v (through lse too). Memory grows with T + S, time with the number of listed
    blocks, forward and backward.

    - q: [B, T, Hq, D], floating. Query t stands at position t + S - T: queries are aligned to the end of the
      keys.
    - k, v: [B, S, Hk, D], of q's dtype. Query head h reads KV head h // (Hq / Hk).
    - mask: a TokenMask for all heads, a sequence of one TokenMask per query head, or a BlockMask.
    - scale: of the scores; 1 / sqrt(D) if None.
    - q_segment_ids, kv_segment_ids: integers [B, T] and [B, S]. A query sees only keys of its own segment
      (packed documents). Both or neither.
    - implementation: "mosaic_gpu" (the kernels for Hopper GPUs: bfloat16 or float16, head_dim up to 256,
      blocks of multiples of 64), "xla" (any device, block-sparse), "cudnn" (dense; every head must be plain
      causal), "reference" (dense, for tests), "mosaic_gpu_interpret" (the kernels' own source on a CPU,
      slowly, with a race detector, float32 too; for tests). None chooses: on a Hopper GPU the kernels, or
      cuDNN if it can take the call and was measured to be faster; XLA everywhere else.
    - return_lse: whether to return lse as well.

    On a mesh in context (``jax.set_mesh``) the kernels and XLA run on each device's own sequences and heads.
    Mesh axes of type Explicit split as q says; of those of type Auto, "data" and "fsdp" split the batch and
    "tensor" the heads. Where T = S, an Auto axis "sequence" of n devices splits the tokens: each device holds
    T / n consecutive ones. If no head looks back further than that, apart from a sink (windows, LongLoRA's
    groups), a device reads only the sink and the last keys of the device before it. If every head is plain
    causal, keys and values travel around the devices (``jsparse.sequence``). Under other masks every device
    gets all keys and values.

    Returns out [B, T, Hq, D] in q's dtype, and with ``return_lse`` also lse [B, T, Hq], float32, a natural
    logarithm. A query that sees nothing has out 0 and lse -inf.

    Raises, before anything runs, ValueError for shapes, dtypes, masks and names that do not fit, and for a T
    that a "sequence" axis does not divide. Raises NotImplementedError, which names the limit, if the
    implementation asked for cannot take the call, and for a BlockMask if a "sequence" axis splits the tokens.

    Source: FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2), on lists of blocks.

    >>> import jsparse
    >>> q = jax.random.normal(jax.random.key(0), (1, 6, 4, 16))
    >>> k = v = q[:, :, :2]
    >>> jsparse.attention(q, k, v, jsparse.streaming(sink=1, window=2)).shape
    (1, 6, 4, 16)
    >>> masks = [jsparse.causal()] * 2 + [jsparse.sliding_window(1)] * 2
    >>> out, lse = jsparse.attention(q, k, v, masks, return_lse=True)
    >>> bool(jnp.allclose(out[:, :, 2:], v[:, :, 1:], atol=1e-5))  # a window of one key gives its value
    True
    """
    _check_arrays(q, k, v, q_segment_ids, kv_segment_ids)
    visible = _visible(mask, q.shape, k.shape)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    devices = sequence_devices() if q.shape[1] == k.shape[1] else 1
    call = Call(q, k, visible, factor, q_segment_ids is not None, return_lse, devices)
    chosen = choose(IMPLEMENTATIONS, implementation, call)
    followed, lists = visible, ()
    if devices > 1 and chosen.block_sizes is not None:
        followed = _split_tokens(visible, q.shape[2], devices, chosen.block_sizes)
    elif any(isinstance(x, jax.Array) for x in jax.tree.leaves(visible)):
        lists, followed = jax.tree.flatten(visible)  # arguments; those known while tracing are compiled in
    options = _Options(followed, factor, chosen)
    out, lse = _attention(options, q, k, v, (q_segment_ids, kv_segment_ids), tuple(lists))
    return (out, lse) if return_lse else out


class _Options(NamedTuple):
    """What is compiled in. ``visible`` is the tree structure of a BlockMask whose lists are arguments."""

    visible: Any  # Visible, SequenceSplit, or the structure
    scale: float
    implementation: Implementation

    def with_lists(self, lists) -> Visible | SequenceSplit:
        known = isinstance(self.visible, Visible | SequenceSplit)
        return self.visible if known else jax.tree.unflatten(self.visible, lists)

    def passes(self) -> tuple[Callable, Callable | None]:
        """Forward and backward pass of the implementation, on each device's tokens if sequences are split."""
        passes = self.implementation.forward, self.implementation.backward
        if isinstance(self.visible, SequenceSplit):
            split = sequence.forward, sequence.backward
            forward, backward = (functools.partial(*pair) for pair in zip(split, passes, strict=True))
            return forward, backward
        return passes


@functools.partial(jax.jit, static_argnums=0)  # so that a call outside jit compiles once as well
def _attention(options: _Options, q, k, v, segment_ids, lists):
    forward, backward = options.passes()
    if backward is None:
        return forward(q, k, v, options.with_lists(lists), options.scale, *segment_ids)
    return _with_backward(options, q, k, v, segment_ids, lists)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_backward(options: _Options, q, k, v, segment_ids, lists):
    forward, _ = options.passes()
    return forward(q, k, v, options.with_lists(lists), options.scale, *segment_ids)


def _forward_rule(options: _Options, q, k, v, segment_ids, lists):
    out, lse = _with_backward(options, q, k, v, segment_ids, lists)
    # Rematerialization may keep these by name, and then does not compute attention again.
    out, lse = (checkpoint_name(x, "attention") for x in (out, lse))
    return (out, lse), (q, k, v, segment_ids, lists, out, lse)


def _backward_rule(options: _Options, residuals, cotangents):
    q, k, v, segment_ids, lists, out, lse = residuals
    _, backward = options.passes()
    assert backward is not None
    arguments = q, k, v, options.with_lists(lists), options.scale, *segment_ids
    return *backward(*arguments, out, lse, *cotangents), None, None


_with_backward.defvjp(_forward_rule, _backward_rule)


def _split_tokens(visible: Visible, q_heads: int, devices: int, block_sizes: Callable) -> SequenceSplit:
    """How the devices share the tokens of each sequence."""
    if isinstance(visible, BlockMask):
        raise NotImplementedError(
            f"mask must be a TokenMask, or one per query head, where the mesh axis {SEQUENCE_AXIS!r} splits "
            f"the tokens over {devices} devices, not a BlockMask"
        )
    chunk = sequence.chunk_length(visible.q_len, devices)
    block_q, block_kv = block_sizes(chunk, chunk)
    masks = visible.per_head(q_heads)
    return sequence.split_sequence(masks, visible.q_len, devices, block_q=block_q, block_kv=block_kv)


def _visible(mask: Mask, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> Visible:
    """The mask with its lengths; ValueError unless it fits these heads, lengths and sequences."""
    (_, q_len, q_heads, _), (batch, kv_len, kv_heads, _) = q_shape, k_shape
    if not isinstance(mask, BlockMask):
        visible = HeadMasks.from_masks(mask, q_len, kv_len)
        _check_heads(len(visible.per_head(q_heads)), q_heads)
        return visible
    if (mask.q_len, mask.kv_len) != (q_len, kv_len):
        raise ValueError(
            f"mask is for q_len={mask.q_len}, kv_len={mask.kv_len}, not for {q_len} and {kv_len}"
        )
    rows = mask.kv_start.shape[-2]
    if mask.head_rows is None and (q_heads % rows or (kv_heads % rows and rows % kv_heads)):
        raise ValueError(
            f"mask has {rows} rows, which {q_heads} query heads on {kv_heads} KV heads cannot share"
        )
    if mask.kv_start.ndim == 3 and mask.kv_start.shape[0] != batch:
        raise ValueError(f"mask has lists for {mask.kv_start.shape[0]} sequences, but q has {batch}")
    _check_heads(len(mask.row_of_head(q_heads)), q_heads)
    return mask


def _check_heads(given: int, q_heads: int) -> None:
    if given != q_heads:
        raise ValueError(
            f"mask must have one TokenMask per query head: {given} were given for {q_heads} heads"
        )


def _check_arrays(q, k, v, q_segment_ids, kv_segment_ids):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(
                f"{name} must be [batch, tokens, heads, head_dim] with no empty axis, not {list(x.shape)}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != q.dtype:
            raise ValueError(f"q, k and v must have one floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, not {list(k.shape)} and {list(v.shape)}")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q {list(q.shape)} and k {list(k.shape)} must agree in batch and head_dim, "
            "and the query heads must be a multiple of the KV heads"
        )
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("q_segment_ids and kv_segment_ids must be given together or not at all")
    for name, ids, x in (("q_segment_ids", q_segment_ids, q), ("kv_segment_ids", kv_segment_ids, k)):
        if ids is not None and (ids.shape != x.shape[:2] or not jnp.issubdtype(ids.dtype, jnp.integer)):
            raise ValueError(
                f"{name} must be integers {list(x.shape[:2])}, not {ids.dtype} {list(ids.shape)}"
            )
