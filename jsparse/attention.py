"""The one differentiable attention function: checks, choice of implementation, and the gradient rule."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jsparse import sequence
from jsparse.device import device_kind
from jsparse.device import hopper as on_hopper
from jsparse.implementations import cudnn, hopper, reference
from jsparse.implementations.xla import on_mesh
from jsparse.masks.block_mask import BlockMask
from jsparse.masks.token_mask import TokenMask
from jsparse.mesh import SEQUENCE_AXIS, sequence_devices
from jsparse.pallas_kernels.measured import cudnn_is_faster
from jsparse.sequence import SequenceSplit

_IMPLEMENTATIONS = ("mosaic_gpu", "xla", "cudnn", "reference", "mosaic_gpu_interpret")
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

    For each query: ``out = sum_s p_s v_s``, ``p = softmax_s(scale * q · k_s)``, over the keys that the query
    sees, and ``lse = log sum_s exp(scale * q · k_s)``. Differentiable in q, k and v (through lse too). Memory
    grows with T + S, time with the number of listed blocks, forward and backward.

    q [B, T, Hq, D], k and v [B, S, Hk, D], of one floating dtype; query head h reads KV head h // (Hq / Hk).
    Queries are aligned to the end of the keys: query t stands at position t + S - T.

    - mask: a TokenMask for all heads, a sequence of one a query head, or a BlockMask.
    - scale: 1 / sqrt(D) if None.
    - q_segment_ids [B, T], kv_segment_ids [B, S]: a query sees only keys of its own segment (packed
      documents). Both or neither.
    - implementation: "mosaic_gpu" (the kernels for Hopper GPUs: bfloat16 or float16, head_dim up to 256,
      blocks of multiples of 64), "xla" (any device, block-sparse), "cudnn" (dense, where every head is plain
      causal), "reference" (dense, for tests), "mosaic_gpu_interpret" (the kernels' own source on a CPU,
      slowly, with a race detector, float32 too; for tests), or None: on a GPU the kernels, or cuDNN where it
      can serve and was measured to be faster; elsewhere, and where they cannot run, XLA.

    On a mesh in context (``jax.set_mesh``) the kernels and XLA run on each device's own sequences and heads.
    Mesh axes of type Explicit split as q says; of those of type Auto, "data" and "fsdp" split the batch and
    "tensor" the heads. Where T = S, an Auto axis "sequence" of n devices splits the tokens: each device holds
    T / n consecutive ones. If no head looks back further than that, a sink aside (windows, LongLoRA's
    groups), a device reads only the sink and the last keys of the device before it. If every head is plain
    causal, keys and values travel around the devices (``jsparse.sequence``). Under other masks every device
    gets all keys and values.

    Returns out [B, T, Hq, D] in q's dtype, and with ``return_lse`` also lse [B, T, Hq] float32, natural
    logarithm. A query that sees nothing has out 0 and lse -inf.

    Raises ValueError, before anything runs, for shapes, dtypes, masks and names that do not fit, and for a T
    that a "sequence" axis does not divide; and NotImplementedError where the implementation asked for cannot
    take them, naming the limit, and for a BlockMask where a "sequence" axis splits the tokens.

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
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation must be None or one of {_IMPLEMENTATIONS}, not {implementation!r}")
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    devices = sequence_devices()
    if devices > 1 and q.shape[1] == k.shape[1] and implementation != "reference":
        options, leaves = _split_options(implementation, mask, q, k, factor, devices), ()
    else:
        options, leaves = _whole_options(implementation, mask, q, k, factor, q_segment_ids, return_lse)
        if options.implementation == "cudnn":
            return cudnn.attention(q, k, v, factor)
    out, lse = _attention(options, q, k, v, (q_segment_ids, kv_segment_ids), leaves)
    return (out, lse) if return_lse else out


class _Options(NamedTuple):
    # A BlockMask of known lists, the tree structure of one whose lists are arguments, or a SequenceSplit.
    mask: Any
    scale: float
    implementation: str

    def lists(self, leaves) -> Any:
        known = isinstance(self.mask, BlockMask | SequenceSplit)
        return self.mask if known else jax.tree.unflatten(self.mask, leaves)

    def passes(self) -> tuple[Callable, Callable]:
        """forward(q, k, v, lists, scale, q_segment_ids, kv_segment_ids), which gives out and lse, and
        backward(the same, out, lse, d_out, d_lse), which gives the gradients of q, k and v."""
        forward, backward = on_mesh.forward, on_mesh.backward
        if self.implementation != "xla":
            interpret = self.implementation == "mosaic_gpu_interpret"
            forward = functools.partial(hopper.forward, interpret=interpret)
            backward = functools.partial(hopper.backward, interpret=interpret)
        if isinstance(self.mask, SequenceSplit):
            forward = functools.partial(sequence.forward, forward)
            backward = functools.partial(sequence.backward, backward)
        return forward, backward


@functools.partial(jax.jit, static_argnums=0)  # so that a call outside jit compiles once as well
def _attention(options: _Options, q, k, v, segment_ids, leaves):
    if options.implementation == "reference":
        return reference.forward(q, k, v, options.lists(leaves), options.scale, *segment_ids)
    return _blocked(options, q, k, v, segment_ids, leaves)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(options: _Options, q, k, v, segment_ids, leaves):
    forward, _ = options.passes()
    return forward(q, k, v, options.lists(leaves), options.scale, *segment_ids)


def _blocked_forward(options, q, k, v, segment_ids, leaves):
    out, lse = _blocked(options, q, k, v, segment_ids, leaves)
    # Rematerialization may keep these by name, and then computes no attention again.
    out, lse = (checkpoint_name(x, "attention") for x in (out, lse))
    return (out, lse), (q, k, v, segment_ids, leaves, out, lse)


def _blocked_backward(options, residuals, cotangents):
    q, k, v, segment_ids, leaves, out, lse = residuals
    _, backward = options.passes()
    arguments = q, k, v, options.lists(leaves), options.scale, *segment_ids
    return *backward(*arguments, out, lse, *cotangents), None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def default_block_sizes(q_len: int, kv_len: int) -> tuple[int, int]:
    """(block_q, block_kv) for token masks: 128, or the power of two that holds a shorter sequence."""
    block_q, block_kv = (min(128, max(16, 1 << (n - 1).bit_length())) for n in (q_len, kv_len))
    return block_q, block_kv


def _whole_options(
    implementation, mask, q, k, scale, q_segment_ids, return_lse
) -> tuple[_Options, tuple[Array, ...]]:
    """For sequences that every device holds whole, and the lists that are arguments."""

    def limit(candidate, lists) -> str | None:
        if candidate == "cudnn":
            return cudnn.limit(q, k, lists, q_segment_ids, return_lse)
        return _limit(candidate, q, lists, scale)

    lists, implementation = _choose(implementation, mask, q, k, limit)
    # Lists known while tracing are compiled in.
    if not any(isinstance(x, jax.Array) for x in jax.tree.leaves(lists)):
        return _Options(lists, scale, implementation), ()
    leaves, structure = jax.tree.flatten(lists)
    return _Options(structure, scale, implementation), tuple(leaves)


def _split_options(implementation, mask, q, k, scale, devices: int) -> _Options:
    """For sequences whose tokens are split over devices."""
    where = f"where the mesh axis {SEQUENCE_AXIS!r} splits the tokens over {devices} devices"
    if isinstance(mask, BlockMask):
        raise NotImplementedError(f"mask must be a TokenMask, or one a query head, {where}, not a BlockMask")
    chunk = sequence.chunk_length(q.shape[1], devices)
    own_q, own_k = (jax.ShapeDtypeStruct((x.shape[0], chunk, *x.shape[2:]), x.dtype) for x in (q, k))

    def limit(candidate, lists) -> str | None:
        return f"cuDNN is not called {where}" if candidate == "cudnn" else _limit(candidate, q, lists, scale)

    masks = (mask,) * q.shape[2] if isinstance(mask, TokenMask) else tuple(mask)
    own, implementation = _choose(implementation, masks, own_q, own_k, limit)
    sizes = {"block_q": own.block_q, "block_kv": own.block_kv}
    return _Options(sequence.split_sequence(masks, q.shape[1], devices, **sizes), scale, implementation)


def _limit(candidate: str, q, lists: BlockMask, scale: float) -> str | None:
    """Why an implementation other than cuDNN cannot take this call, or None where it can."""
    if candidate.startswith("mosaic_gpu"):
        return hopper.limit(q, lists, scale, interpret=candidate == "mosaic_gpu_interpret")
    return None


def _choose(implementation, mask, q, k, limit) -> tuple[BlockMask, str]:
    """The lists to follow, and the first of the implementations that can."""
    candidates = _preferences(q) if implementation is None else (implementation,)
    for candidate in candidates:
        portable = default_block_sizes(q.shape[1], k.shape[1])
        sizes = hopper.block_sizes() if candidate.startswith("mosaic_gpu") else portable
        lists = _as_block_mask(mask, q.shape, k.shape, sizes)
        if limit(candidate, lists) is None:
            return lists, candidate
    raise NotImplementedError(f"implementation={candidate!r}: {limit(candidate, lists)}")


def _preferences(q) -> tuple[str, ...]:
    if not on_hopper():
        return ("xla",)
    if cudnn_is_faster(device_kind(), q.shape[-1], q.shape[1]):
        return "cudnn", "mosaic_gpu", "xla"
    return "mosaic_gpu", "xla"


def _as_block_mask(mask, q_shape, k_shape, block_sizes: tuple[int, int]) -> BlockMask:
    (_, q_len, q_heads, _), (batch, kv_len, kv_heads, _) = q_shape, k_shape
    if isinstance(mask, BlockMask):
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
        heads = mask.head_rows
    else:
        block_q, block_kv = block_sizes
        mask = BlockMask.from_token_masks(mask, q_len, kv_len, block_q=block_q, block_kv=block_kv)
        heads = mask.head_rows
    if heads is not None and len(heads) != q_heads:
        raise ValueError(
            f"mask must have one TokenMask a query head: {len(heads)} were given for {q_heads} heads"
        )
    return mask


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
