"""Every kernel at every choice of tiles that its chooser can return, or at those that most calls get."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from compile_only import compile_for, mesh_of
from jax.sharding import NamedSharding, PartitionSpec

from jsparse.device import device_kind
from jsparse.implementations import hopper
from jsparse.pallas_kernels import measured
from jsparse.pallas_kernels.hopper import backward_keys, backward_queries, forward, paged_decode
from jsparse.pallas_kernels.lists import HEAD_DIMS, Heads, Lists

BLOCKS = (64, 128, 192, 384)  # one or three steps a block, whether the widest step is 64 or 128
PAGES = (8, 64, 384)  # eight to a step, one a step, a ring of several steps
BATCH, LENGTH, HEADS, KV_HEADS, LISTED = 2, 4096, 32, 8, 1000
SHARED_MEMORY = 227 * 1024  # bytes that a thread block may ask for on compute capability 9.0

COLUMNS = {"kernel": 17, "arrays": 43, "tiles": 50, "registers": 10, "spills": 7, "shared KiB": 11, "s": 6}


class Case(NamedTuple):
    """One kernel to compile: ``call(*shapes)``, and how the table names it."""

    kernel: str
    arrays: str
    tiles: str
    call: Callable
    shapes: tuple


def check(case: Case) -> tuple[list, list[str]]:
    """A row of the table, and what is wrong."""
    name = f"{case.kernel}, {case.arrays}, {case.tiles}"
    mesh = mesh_of()
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), case.shapes)
    compiled = compile_for(mesh, jax.jit(case.call), *shapes)
    (kernel,), (report,) = compiled.kernels, compiled.reports
    wrong = [f"{name}: {warning}" for warning in compiled.warnings]
    if report.stack or report.spills:
        wrong.append(f"{name}: {report}")
    if kernel.shared_memory > SHARED_MEMORY:
        wrong.append(f"{name}: {kernel.shared_memory} bytes of shared memory, more than {SHARED_MEMORY}")
    numbers = report.registers, report.spills, f"{kernel.shared_memory / 1024:.1f}", f"{compiled.seconds:.1f}"
    return [*case[:3], *numbers], wrong


def cases(short: bool) -> list[Case]:
    """All of them, or with ``short`` bfloat16, blocks as ``attention`` makes them, pages of 64 tokens.

    Choosers are asked on the compiled device, for which choices may have been measured.
    """
    every = not short
    with jax.set_mesh(mesh_of()):
        return [
            *_attention_cases(forward.forward, forward.forward_tiles, every),
            *_attention_cases(backward_queries.backward_queries, backward_queries.queries_tiles, every),
            *_attention_cases(backward_keys.backward_keys, backward_keys.keys_tiles, every),
            *_decode_cases(every),
        ]


def _attention_cases(kernel: Callable, choose: Callable, every: bool) -> Iterator[Case]:
    name = kernel.__name__
    for head_dim in HEAD_DIMS:
        choices: dict[Any, list] = {}
        for blocks in itertools.product(BLOCKS, BLOCKS) if every else [hopper.block_sizes(LENGTH, LENGTH)]:
            shape = {"head_dim": head_dim, "block_q": blocks[0], "block_kv": blocks[1]}
            tiles = measured.tiles(name, device_kind(), choose, **shape)
            choices.setdefault(tiles, []).append(blocks)
        for tiles, blocks in choices.items():
            # The smallest blocks that lead to this choice and the largest. float16 differs in one conversion.
            small, large = (jnp.bfloat16, *blocks[0]), (jnp.bfloat16, *blocks[-1])
            variants = [*itertools.product((small, large), (False, True))]
            variants += [((jnp.float16, *blocks[-1]), True)] if every else []
            for (dtype, block_q, block_kv), segments in dict.fromkeys(variants):
                arrays = f"{jnp.dtype(dtype).name} {head_dim}, blocks {block_q} {block_kv}"
                yield Case(
                    name,
                    arrays + ", segments" * segments,
                    _fields(tiles),
                    functools.partial(_attention, kernel, block_q=block_q, block_kv=block_kv, tiles=tiles),
                    _attention_shapes(name, dtype, head_dim, block_q, block_kv, segments),
                )


def _attention_shapes(name, dtype, head_dim, block_q, block_kv, segments) -> tuple:
    q = _shape((BATCH, LENGTH, HEADS, head_dim), dtype)
    kv = _shape((BATCH, LENGTH, KV_HEADS, head_dim), dtype)
    row = _shape((BATCH, HEADS, LENGTH), jnp.float32)
    entry = _shape(
        (BATCH, HEADS, -(-LENGTH // (block_kv if name == "backward_keys" else block_q))), jnp.int32
    )
    ids = _shape((BATCH, LENGTH), jnp.int32)
    return (
        (q, kv, kv) if name == "forward" else (q, kv, kv, q, row, row),
        Lists(_shape((LISTED,), jnp.int32), entry, entry, entry),
        Heads(_shape((HEADS,), jnp.int32), _shape((HEADS, 4), jnp.int32)),
        (ids, ids) if segments else None,
    )


def _attention(kernel: Callable, arrays, lists, heads, segments, **options: Any):
    return kernel(*arrays, lists, heads, segments=segments, scale=0.125, **options)


def _decode_cases(every: bool) -> Iterator[Case]:
    for head_dim, bits, group, tiles in paged_decode.all_tiles():
        variants = [*((jnp.bfloat16, page) for page in PAGES), (jnp.float16, 64)]
        for dtype, page in variants if every else [(jnp.bfloat16, 64)]:
            q = _shape((BATCH, KV_HEADS * group, head_dim), dtype)
            table = _shape((BATCH, KV_HEADS, LENGTH // page), jnp.int32)
            pool = (BATCH * LENGTH // page, KV_HEADS, page)
            scale = _shape(pool, jnp.float32)
            codes = _shape((*pool, head_dim * bits // 8), jnp.int8)
            pages = _shape((*pool, head_dim), dtype) if bits == 16 else (codes, scale, scale)
            arrays = f"{jnp.dtype(dtype).name} {head_dim}, pages {page}, {bits} bits, group {group}"
            yield Case("paged_decode", arrays, _fields(tiles), _paged_decode, (q, pages, pages, table, table))


def _paged_decode(q, k, v, pages, used):
    return paged_decode.paged_decode(q, k, v, pages, used, scale=0.125)


def _shape(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _fields(tiles: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(tiles).items())
