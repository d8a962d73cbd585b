"""Attention when the tokens of a sequence are split over devices: what each reads from the others, and how.

Each of n devices holds C = T / n consecutive tokens. There are three ways, chosen by the masks of all heads:

- *halo*, if every query looks back at most C tokens, and at a sink of the first tokens. A device gets the
  last keys of its left neighbour, as many as the masks reach back, and the sink from the first device.
- *ring*, if every head is plain causal. Keys and values travel around the devices, and each device adds up
  what its queries see of them (ring attention, arXiv 2310.01889, §3). Memory is that of C tokens. The last
  device computes n times as much as the first, which waits for it.
- *gather* otherwise. Every device gets all T keys and values, and reads those up to its own tokens.

The backward pass needs memory and work of the same order: it moves the keys again instead of keeping them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jsparse.implementations.merge import merge
from jsparse.implementations.xla.on_mesh import switch
from jsparse.integers import cdiv
from jsparse.masks.block_mask import BlockMask
from jsparse.masks.token_mask import HeadMasks, TokenMask, causal
from jsparse.mesh import SEQUENCE_AXIS, split_over_mesh


class View(NamedTuple):
    """What one device sees of the keys that it holds after the exchange.

    It sees keys [start, stop), to whose end its C queries are aligned, through one mask per query head.
    """

    start: int
    stop: int
    masks: tuple[TokenMask, ...]


@dataclasses.dataclass(frozen=True)
class SequenceSplit:
    """How ``devices`` devices share a sequence of ``devices * chunk`` tokens.

    After a "halo" exchange, device i > 0 holds the first ``sink`` keys of the sequence, the ``halo`` keys
    before its own, and its own, in this order; device 0 holds anything in place of the first two. After
    "gather", each device holds all keys.

    - exchange: what the devices exchange.
    - devices, chunk: how many devices there are, and how many tokens each holds.
    - masks: one per query head.
    - sink, halo: keys that a device gets from others with "halo".
    - block_q, block_kv: block sizes of the lists in a ring.
    """

    exchange: Literal["halo", "ring", "gather"]
    devices: int
    chunk: int
    masks: tuple[TokenMask, ...]
    sink: int
    halo: int
    block_q: int
    block_kv: int

    def view(self, device: int) -> View:
        """The keys that a device reads, and the masks for them, with "halo" and "gather"."""
        if self.exchange == "gather":
            return View(0, (device + 1) * self.chunk, self.masks)
        before = self.sink + self.halo
        if device == 0:
            return View(before, before + self.chunk, self.masks)
        # Sinks keep their positions. Everything else moves by this much, the borders of groups too.
        moved = device * self.chunk - before
        masks = (
            mask
            if mask.group_size is None
            else dataclasses.replace(mask, group_shift=(mask.group_shift + moved) % mask.group_size)
            for mask in self.masks
        )
        return View(0, before + self.chunk, tuple(masks))


def chunk_length(length: int, devices: int) -> int:
    """How many tokens of a sequence each device holds. ValueError unless the devices divide it evenly."""
    if length % devices:
        raise ValueError(
            f"q and k have {length} tokens, which the {devices} devices of the mesh axis {SEQUENCE_AXIS!r} "
            f"cannot share: allowed are multiples of {devices}"
        )
    return length // devices


def split_sequence(
    masks: tuple[TokenMask, ...], length: int, devices: int, *, block_q: int = 128, block_kv: int = 128
) -> SequenceSplit:
    """How a sequence is split under these masks.

    - masks: one per query head.
    - length: tokens of the sequence.
    - devices: how many share it.
    - block_q, block_kv: block sizes of the lists in a ring.

    Raises ValueError if the devices do not divide the length.

    >>> from jsparse import shifted_groups, streaming
    >>> split = split_sequence((shifted_groups(16, 0), shifted_groups(16, 8)), 64, 4)
    >>> split.exchange, split.halo, [mask.group_shift for mask in split.view(1).masks]
    ('halo', 8, [8, 0])
    >>> [split_sequence(masks, 64, 4).exchange for masks in ((causal(),), (causal(), streaming(2, 4)))]
    ['ring', 'gather']
    """
    chunk = chunk_length(length, devices)
    masks = tuple(_simplified(mask, length) for mask in masks)
    split = functools.partial(
        SequenceSplit, devices=devices, chunk=chunk, masks=masks, block_q=block_q, block_kv=block_kv
    )
    if all(mask == causal() for mask in masks):
        return split("ring", sink=0, halo=0)
    halo = max(_reach(mask, length, chunk) for mask in masks)
    sink = max(mask.sink for mask in masks)
    # A sink that lies in a halo would be read twice.
    if halo + sink <= chunk:
        return split("halo", sink=sink, halo=halo)
    return split("gather", sink=0, halo=0)


def _simplified(mask: TokenMask, length: int) -> TokenMask:
    """The same mask for this many tokens, without the limits that hide none of them."""
    if mask.window is None or mask.sink + mask.window >= length:
        mask = dataclasses.replace(mask, sink=0, window=None)
    if mask.group_size is not None and mask.group_shift % mask.group_size + length <= mask.group_size:
        mask = dataclasses.replace(mask, group_size=None, group_shift=0)
    return mask


def _reach(mask: TokenMask, length: int, chunk: int) -> int:
    """The most keys before its own tokens that any device needs, apart from sinks."""
    first = np.arange(chunk, length, chunk)  # of each device's own tokens
    group = length if mask.group_size is None else (first + mask.group_shift) % mask.group_size
    window = length if mask.window is None else mask.window - 1
    if mask.sink and mask.group_size is not None:
        # The sink is moved next to the halo: only a halo that reaches to the group's start keeps it outside.
        window = length
    return int(np.max(np.minimum(np.minimum(group, window), first)))


# --- on all devices ---
#
# ``compute`` is the forward or backward pass of an implementation, here on the arrays of one device.


def forward(compute: Callable, q, k, v, split: SequenceSplit, scale, q_ids, kv_ids):
    """out [B, T, Hq, D] in q's dtype, lse [B, T, Hq] float32."""
    run = _ring_forward if split.exchange == "ring" else _exchange_forward
    run = functools.partial(run, compute, split, scale)
    return _over_devices(run, (q, k, v, q_ids, kv_ids), ("bshd", "bsh"))


def backward(compute: Callable, q, k, v, split: SequenceSplit, scale, q_ids, kv_ids, *results):
    """The gradients of q, k and v; ``results`` are out, lse, d_out and d_lse."""
    run = _ring_backward if split.exchange == "ring" else _exchange_backward
    run = functools.partial(run, compute, split, scale)
    return _over_devices(run, (q, k, v, q_ids, kv_ids, *results), ("bshd",) * 3)


def _over_devices(run: Callable, operands: tuple, outputs: tuple[str, ...]) -> tuple:
    """``run(the numbers of a device's KV heads, *its shares of the operands)`` on each device."""
    num_heads = operands[1].shape[2]
    leaves, structure = jax.tree.flatten((*operands, jnp.arange(num_heads)))
    axes = *("bshd"[: x.ndim] for x in leaves[:-1]), "h"

    def run_share(*leaves):
        *operands, heads = jax.tree.unflatten(structure, leaves)
        return run(heads, *operands)

    return split_over_mesh(run_share, tuple(leaves), axes, outputs, num_heads=num_heads)


# --- halo and gather ---


def _exchange_forward(compute, split: SequenceSplit, scale, heads, q, k, v, q_ids, kv_ids):
    def attend(view: View):
        def run(q, k, v, q_ids, kv_ids):
            k, v, kv_ids = _read(view, (k, v, kv_ids))
            return compute(q, k, v, _visible(split, view), scale, q_ids, kv_ids)

        return run

    k, v, kv_ids = _fetch(split, (k, v, kv_ids))
    return switch(*_own_view(split, heads, q.shape[2]), attend, q, k, v, q_ids, kv_ids)


def _exchange_backward(compute, split: SequenceSplit, scale, heads, q, k, v, q_ids, kv_ids, *results):
    def attend(view: View):
        def run(q, k, v, q_ids, kv_ids, *results):
            unread = (0, 0), (view.start, k.shape[1] - view.stop), (0, 0), (0, 0)
            k, v, kv_ids = _read(view, (k, v, kv_ids))
            dq, dk, dv = compute(q, k, v, _visible(split, view), scale, q_ids, kv_ids, *results)
            return dq, jnp.pad(dk, unread), jnp.pad(dv, unread)

        return run

    held_k, held_v, held_ids = _fetch(split, (k, v, kv_ids))
    views = _own_view(split, heads, q.shape[2])
    dq, *gradients = switch(*views, attend, q, held_k, held_v, q_ids, held_ids, *results)
    # Gradients of fetched keys go back to the devices that own them, and are added up there in float32.
    total = tuple(jax.ShapeDtypeStruct(x.shape, _accumulator(x)) for x in (k, v))
    give_back = jax.linear_transpose(functools.partial(_fetch, split), total)
    ((dk, dv),) = give_back(tuple(dx.astype(_accumulator(dx)) for dx in gradients))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


def _fetch(split: SequenceSplit, keys):
    """What a device holds after the exchange, from its own keys, values and segment ids [B, C, ...]."""

    def fetch(x):
        if split.exchange == "gather":
            return lax.all_gather(x, SEQUENCE_AXIS, axis=1, tiled=True)
        parts = [x]
        if split.halo:
            right = [(i, i + 1) for i in range(split.devices - 1)]
            parts.insert(0, lax.ppermute(x[:, split.chunk - split.halo :], SEQUENCE_AXIS, right))
        if split.sink:
            sink = jnp.where(lax.axis_index(SEQUENCE_AXIS) == 0, x[:, : split.sink], 0)
            parts.insert(0, lax.psum(sink, SEQUENCE_AXIS))
        return jnp.concatenate(parts, axis=1)

    return jax.tree.map(fetch, keys)


def _read(view: View, keys):
    return jax.tree.map(lambda x: x[:, view.start : view.stop], keys)


def _own_view(split: SequenceSplit, heads, count: int) -> tuple[jax.Array, list[View]]:
    """The index of this device's view, and the views of all devices.

    They are ordered by place in the sequence, then by share of ``count`` query heads.
    """
    shares = len(split.masks) // count
    views = [
        view._replace(masks=view.masks[share * count : (share + 1) * count])
        for view in map(split.view, range(split.devices))
        for share in range(shares)
    ]
    return lax.axis_index(SEQUENCE_AXIS) * shares + heads[0] // heads.shape[0], views


def _visible(split: SequenceSplit, view: View) -> HeadMasks:
    return HeadMasks(view.masks, split.chunk, view.stop - view.start)


# --- ring ---


def _ring_forward(compute, split: SequenceSplit, scale, heads, q, k, v, q_ids, kv_ids):
    keys = k, v, kv_ids
    out, lse = compute(q, k, v, _diagonal(split), scale, q_ids, kv_ids)

    def step(s, carry):
        keys, out, lse = carry
        passed_on = _pass_on(split, keys)  # while these are read
        mask = _earlier(split, s)
        k, v, kv_ids = _padded(keys, mask.kv_len)
        part = compute(q, k, v, mask, scale, q_ids, kv_ids)
        return passed_on, *merge(out, lse, *part)

    # One exchange more than necessary lets all steps share one loop body.
    carry = _pass_on(split, keys), out.astype(_accumulator(out)), lse
    _, total, lse = lax.fori_loop(1, split.devices, step, carry)
    return total.astype(out.dtype), lse


def _ring_backward(compute, split: SequenceSplit, scale, heads, q, k, v, q_ids, kv_ids, *results):
    """The gradients of keys and values travel with them, and are home again after n steps."""
    keys = k, v, kv_ids
    gradients = compute(q, k, v, _diagonal(split), scale, q_ids, kv_ids, *results)
    dq, *d_keys = (dx.astype(_accumulator(dx)) for dx in gradients)

    def step(s, carry):
        keys, dq, d_keys = carry
        passed_on = _pass_on(split, keys)
        mask = _earlier(split, s)
        k, v, kv_ids = _padded(keys, mask.kv_len)
        part, *parts = compute(q, k, v, mask, scale, q_ids, kv_ids, *results)
        d_keys = [total + dx[:, : split.chunk] for total, dx in zip(d_keys, parts, strict=True)]
        return passed_on, dq + part, _pass_on(split, d_keys)

    carry = _pass_on(split, keys), dq, _pass_on(split, d_keys)
    _, dq, (dk, dv) = lax.fori_loop(1, split.devices, step, carry)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _pass_on(split: SequenceSplit, arrays):
    around = [(i, (i + 1) % split.devices) for i in range(split.devices)]
    return jax.tree.map(lambda x: lax.ppermute(x, SEQUENCE_AXIS, around), arrays)


def _diagonal(split: SequenceSplit) -> HeadMasks:
    return HeadMasks(causal(), split.chunk, split.chunk)


def _earlier(split: SequenceSplit, step) -> BlockMask:
    """Lists of all keys of the device ``step`` places before this one, or of none without such a device."""
    there = lax.axis_index(SEQUENCE_AXIS) >= step
    return earlier_keys(there, split.chunk, block_q=split.block_q, block_kv=split.block_kv)


def earlier_keys(visible, chunk: int, *, block_q: int, block_kv: int) -> BlockMask:
    """Lists with which ``chunk`` queries see all of the first ``chunk`` keys if ``visible``, else none.

    These keys have whole blocks to themselves. As many keys as there are queries follow, in the queries' own
    places; no list has them.

    - visible: a bool scalar, perhaps traced. If it is False, no block is visited.
    - chunk: how many queries there are.
    - block_q, block_kv: block sizes in tokens.

    >>> mask = earlier_keys(True, 6, block_q=4, block_kv=4)
    >>> mask.kv_len, mask.kv_count.tolist(), mask.kv_full_count.tolist()
    (14, [[2, 2]], [[1, 1]])
    """
    num_q_blocks, num_kv_blocks = cdiv(chunk, block_q), cdiv(chunk, block_kv)
    index = np.broadcast_to(np.arange(num_kv_blocks), (1, num_q_blocks, num_kv_blocks))
    count = jnp.broadcast_to(jnp.where(visible, num_kv_blocks, 0), (1, num_q_blocks))
    return BlockMask.from_indices(
        index,
        count,
        q_len=chunk,
        kv_len=num_kv_blocks * block_kv + chunk,
        block_q=block_q,
        block_kv=block_kv,
        token_mask=TokenMask(sink=chunk, window=1),
        kv_full_count=jnp.minimum(count, chunk // block_kv),
    )


def _padded(keys, length: int):
    return jax.tree.map(
        lambda x: jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)), keys
    )


def _accumulator(x):
    return jnp.promote_types(x.dtype, jnp.float32)
