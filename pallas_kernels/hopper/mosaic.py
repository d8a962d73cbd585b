"""What the kernels share of Mosaic, and all that differs when its interpreter runs them on a CPU.

Only the functions that take ``interpret`` differ:

- ``multiply_add`` and ``multiply_registers`` use ``jnp.dot``. The interpreter cannot run a matrix product
  whose left operand is in registers, nor ``pl.run_state``, which hands an accumulator on.
- ``release`` adds a fence between such a product, which reads shared memory as ordinary loads do, and the TMA
  copy that overwrites that memory. A real ``wgmma`` reads through the same proxy as TMA and needs none.
- ``launch`` asks for the interpreter.

Barriers, copies, masks, loops and products of two operands in shared memory are interpreted as they are
compiled. The interpreter does not know that TMA refuses a tiled array of more than 8 rows that are not a
multiple of 8, that registers and shared memory are limited, and that a ``wgmma`` may still be running when
the next line does.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu  # its types allow less than it takes


def multiply_add(acc: Array, left: Array, right, *, interpret) -> Array:
    """``acc + left @ right``: acc [m, n] float32 and left [m, k] in registers, right [k, n] in SMEM."""
    if interpret is not None:
        return acc + jnp.dot(left, right[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, left, right))(plgpu.ACC.init(acc))


def multiply(left, right, *, meanwhile: Callable[[], None] | None = None) -> Array:
    """``left @ right`` in float32: left [m, k] and right [k, n] both in shared memory.

    ``meanwhile`` is called while the product is under way.
    """

    def product(acc):
        plgpu.wgmma(acc, left, right)
        if meanwhile is not None:
            meanwhile()
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))


def multiply_registers(pairs: Iterable[tuple[Array, Any]], shape: tuple[int, int], *, interpret) -> Array:
    """The sum of ``left @ right`` in float32, of this shape: left in registers, right in shared memory.

    One product is under way at a time, so at most one more left operand takes registers.
    """
    if interpret is not None:
        products = (jnp.dot(left, right[...], preferred_element_type=jnp.float32) for left, right in pairs)
        return functools.reduce(jnp.add, products)

    def product(acc):
        for left, right in pairs:
            plgpu.wgmma(acc, left, right)
            plgpu.wgmma_wait(0)
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))


def anew(index):
    """``index`` of a tile that a whole loop reads, computed again at each step of the loop.

    The compiler moves loop invariants out of the loop. There, the descriptors by which a tile's products find
    their operands would fill up to 64 registers. The number of a warpgroup comes from a shuffle, which the
    compiler does not move.
    """
    return index + lax.div(lax.axis_index("warpgroup"), 4)  # adds 0: a kernel has fewer than four


def bring(step, *copies: tuple[Any, Any], free, ready) -> None:
    """Has TMA copy the tiles of one step, once every reader has released the buffers they go to.

    Each copy is a tile in global memory and a ring of buffers; buffer ``step % stages`` takes the tile.
    """
    stages = copies[0][1].shape[0]
    slot = lax.rem(step, stages)
    pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
    for tile, ring in copies:
        plgpu.copy_gmem_to_smem(tile, ring.at[slot], ready.at[slot])


def release(barrier, *, interpret) -> None:
    """Tells the memory warpgroup that this one has read a buffer for the last time."""
    if interpret is not None:
        plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)


def share_registers(compute_warpgroups: int, *, compute: bool) -> None:
    """Moves registers from the memory warpgroup to two compute warpgroups; a single one has enough."""
    if compute_warpgroups == 2:
        registers, action = (240, "increase") if compute else (24, "decrease")
        plgpu.set_max_registers(registers, action=action)


def tile_transforms(dtype, swizzle: int = 128) -> tuple:
    """The layout of a tile in shared memory that TMA writes and wgmma reads without bank conflicts.

    - swizzle: the bytes of a row that stay together: 128, or 64 or 32 for a tile or slice that narrow.
    """
    bits = 4 if dtype == jnp.int4 else 8 * jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle)


def launch(kernel: Callable, name: str, *, warpgroups: int, interpret, **options: Any) -> Callable:
    """``plgpu.kernel`` with thread blocks of ``warpgroups`` warpgroups, compiled or interpreted."""
    return plgpu.kernel(
        kernel,
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name=f"jsparse_{name}",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **options,
        **({} if interpret is None else {"interpret": interpret}),
    )
