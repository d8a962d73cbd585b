"""Who runs in the rows of one query per sequence: decoding from listed pages, and choosing the pages.

Such a step takes microseconds. A launch of a contender is therefore a chain of steps, each on other pages and
with the output of the one before as its query: one XLA program for JAX, one CUDA graph for torch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import Contender, Work

import jsparse
from gpu.peers import OURS, Maker, Setup, from_torch, load, random_normal, to_torch, torch_wait
from gpu.rows import BLOCK, Decode, Select, dense, page_lists, work
from jsparse.cache.pages import PagedKVCache
from jsparse.cache.quantize import Quantized, dequantize, quantize


def decode(row: Decode, setup: Setup) -> dict[str, Maker]:
    q = random_normal(0, row.batch, row.q_heads, row.dim)
    k, v = (random_normal(i, row.batch, row.kv_heads, row.length, row.dim) for i in (1, 2))
    lists = page_lists(row)

    lengths = jnp.full(row.batch, row.length, jnp.int32)
    in_pool = Pool(row)

    def paged(name: str, k, v) -> Contender:
        def step(q, pages, cache, lengths):
            return jsparse.decode_attention(
                q, cache, lengths, in_pool.table, pages=pages, implementation=setup.implementation
            )

        data = PagedKVCache(in_pool(k), in_pool(v)), lengths
        of = dataclasses.replace(row, dtype="bfloat16")
        return jax_chain(name, step, q, list(jnp.asarray(lists)), data, work(of))

    if row.dtype != "bfloat16":
        return _quantised(row, setup, q, k, v, lists, in_pool, paged)

    fused = setup.fused

    def fused_dense() -> Contender:
        def step(q, _, k, v):
            return setup.fused_attention(q[:, None], k, v, is_causal=False)[:, 0]

        data = tuple(jnp.swapaxes(x, 1, 2) for x in (k, v))  # [B, S, Hk, D], as cuDNN wants it
        return jax_chain(f"{fused}, dense", step, q, [()] * 4, data, work(dense(row)), same_work=False)

    def gathered() -> Contender:
        def step(q, pages, k, v):
            index = pages[..., None, None]
            listed = (jnp.take_along_axis(x, index, axis=2, mode="clip") for x in (k, v))
            listed = (x.reshape(row.batch, row.kv_heads, -1, row.dim).swapaxes(1, 2) for x in listed)
            return setup.fused_attention(q[:, None], *listed, is_causal=False)[:, 0]

        data = tuple(x.reshape(row.batch, row.kv_heads, -1, row.page, row.dim) for x in (k, v))
        return jax_chain(f"gather + {fused}", step, q, list(jnp.asarray(lists)), data, work(row))

    def in_torch(name: str, make: Callable, *, whole: bool = False) -> Maker:
        def build() -> Contender:
            step, each = make(row, lists, to_torch(k), to_torch(v), setup)
            of = dense(row) if whole else row
            return torch_chain(name, step, to_torch(q), each, work(of), setup, same_work=not whole)

        return build

    return {
        OURS: lambda: paged(OURS, k, v),
        "torch Flex": in_torch("torch Flex", flex_decode),
        f"gather + {fused}": gathered,
        "gather + torch SDPA": in_torch("gather + torch SDPA", gathered_sdpa),
        f"{fused}, dense": fused_dense,
        "torch SDPA, dense": in_torch("torch SDPA, dense", whole_sdpa, whole=True),
    }


class Pool:
    """Where the pages of all sequences lie: in one pool, in random order."""

    def __init__(self, row: Decode):
        pages = row.length // row.page
        place = np.random.default_rng(1).permutation(row.batch * pages).astype(np.int32)
        self.row, self.owner = row, np.argsort(place)
        self.table = jnp.asarray(place.reshape(row.batch, pages))

    def __call__(self, x):
        """[B, Hk, S, ...] as [pages, Hk, page size, ...], or each array of a tuple."""
        row = self.row

        @jax.jit
        def gather(x):
            x = x.reshape(row.batch, row.kv_heads, -1, row.page, *x.shape[3:]).swapaxes(1, 2)
            return x.reshape(-1, *x.shape[2:])[self.owner]

        return jax.tree.map(gather, x)


def _quantised(row: Decode, setup: Setup, q, k, v, lists, in_pool: Pool, paged: Callable) -> dict[str, Maker]:
    """The decode kernel on codes, and on pages that hold the values of the same codes in bfloat16."""
    bits = {"int8": 8, "int4": 4}[row.dtype]
    # One sequence at a time, since it is done in float32.
    codes = [jax.lax.map(functools.partial(quantize, bits=bits), x) for x in (k, v)]

    def ours() -> Contender:
        if setup.implementation not in ("mosaic_gpu", "mosaic_gpu_interpret"):
            raise NotImplementedError(f"implementation={setup.implementation!r} has no quantised pages")
        from jsparse.implementations.hopper import interpreter
        from jsparse.pallas_kernels.hopper.paged_decode import paged_decode

        interpret = interpreter() if setup.implementation == "mosaic_gpu_interpret" else None

        def step(q, pages, k, v):
            places = jnp.take_along_axis(in_pool.table[:, None], pages, axis=2)
            used = jnp.full_like(places, row.page)
            out, _ = paged_decode(q, k, v, places, used, scale=row.dim**-0.5, interpret=interpret)
            return out.astype(q.dtype)

        return jax_chain(OURS, step, q, list(jnp.asarray(lists)), tuple(in_pool(x) for x in codes), work(row))

    def values() -> Contender:
        def decoded(each: Quantized):
            return jax.lax.map(lambda x: dequantize(x, bits).astype(q.dtype), each)

        return paged("jsparse, bfloat16", *(decoded(x) for x in codes))

    return {OURS: ours, "jsparse, bfloat16": values}


def flex_decode(row: Decode, lists, k, v, setup: Setup) -> tuple[Callable, list]:
    """(step, block masks). KV heads are part of the batch: Flex's decoding kernel takes one list per item."""
    torch, flex = load("torch"), load("torch.nn.attention.flex_attention")

    torch._dynamo.reset()
    items, page = row.batch * row.kv_heads, row.page

    def block_list(chosen):
        listed = torch.zeros(items, row.length // page, dtype=torch.bool, device=k.device)
        listed.scatter_(1, torch.tensor(chosen.reshape(items, -1), dtype=torch.int64, device=k.device), True)
        mask = flex.create_block_mask(
            lambda b, h, q_index, kv_index: listed[b, kv_index // page],
            B=items,
            H=None,
            Q_LEN=1,
            KV_LEN=row.length,
            device=k.device,
            BLOCK_SIZE=(BLOCK, page),
        )
        # There are no full blocks, and their lists are left out: with them, the kernel splits its work over
        # the whole sequence, not over what is listed.
        return flex.BlockMask.from_kv_blocks(
            mask.kv_num_blocks,
            mask.kv_indices,
            BLOCK_SIZE=mask.BLOCK_SIZE,
            mask_mod=mask.mask_mod,
            seq_lengths=(1, row.length),
        )

    attend = torch.compile(flex.flex_attention, dynamic=False) if setup.gpu else flex.flex_attention
    k, v = (x.reshape(items, 1, row.length, row.dim) for x in (k, v))

    def step(q, mask):
        out = attend(q.reshape(items, -1, 1, row.dim), k, v, block_mask=mask, enable_gqa=True)
        return out.reshape(q.shape)

    return step, [block_list(chosen) for chosen in lists]


def gathered_sdpa(row: Decode, lists, k, v, setup: Setup) -> tuple[Callable, list]:
    """(step, page lists): the listed pages copied together, then dense attention to them."""
    torch = load("torch")

    k, v = (x.reshape(row.batch, row.kv_heads, -1, row.page, row.dim) for x in (k, v))
    sequence = torch.arange(row.batch, device=k.device)[:, None, None]
    head = torch.arange(row.kv_heads, device=k.device)[:, None]

    def step(q, pages):
        gathered = (x[sequence, head, pages].reshape(row.batch, row.kv_heads, -1, row.dim) for x in (k, v))
        return _sdpa_token(q, *gathered)

    return step, [torch.tensor(pages, dtype=torch.int64, device=k.device) for pages in lists]


def whole_sdpa(row: Decode, lists, k, v, setup: Setup) -> tuple[Callable, list]:
    """(step, four empty items): attention to all keys."""
    return lambda q, _: _sdpa_token(q, k, v), [None] * 4


def _sdpa_token(q, k, v):
    torch = load("torch")

    return torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


# Selection ---------------------------------------------------------------------------------------------


def _products(q, k_min, k_max):
    return jsparse.page_scores(q, k_min[:, :, None], k_max[:, :, None]).max(axis=2)


def _elementwise(q, k_min, k_max):
    """The formula as it is written, for XLA to fuse: each bound is read once and nothing large is written."""
    q, k_min, k_max = q[:, :, :, None], k_min[:, :, None], k_max[:, :, None]
    q, k_min, k_max = (x.astype(jnp.float32) for x in (q, k_min, k_max))
    return jnp.maximum(q * k_min, q * k_max).sum(axis=-1).max(axis=2)


def select(row: Select, setup: Setup) -> dict[str, Maker]:
    pages, chosen = row.length // row.page, row.selected // row.page
    q = random_normal(0, row.batch, row.kv_heads, row.q_heads // row.kv_heads, row.dim)
    bounds = []
    for i in range(2):  # two caches take turns, each larger than L2
        a, b = (random_normal(2 * i + j, row.batch, row.kv_heads, pages, row.dim) for j in (1, 2))
        bounds.append((jnp.minimum(a, b), jnp.maximum(a, b)))

    # Choices are compared by their scores: among pages that score nearly alike, any is right.
    known = jax.jit(_elementwise)(q, *bounds[0])

    def of_the_chosen(index) -> dict[str, Any]:
        return {
            "scores": jnp.sort(jnp.take_along_axis(known, index.astype(jnp.int32), axis=-1), axis=-1)[:, None]
        }

    def in_jax(name: str, scores: Callable) -> Maker:
        def best(q, bounds):
            return jax.lax.top_k(scores(q, *bounds), chosen)[1]

        def step(q, bounds):
            # q itself, but only once the last index of each list is known: steps run one after another.
            return q + jnp.minimum(best(q, bounds)[..., -1:, None], 0).astype(q.dtype)

        def outputs():
            return of_the_chosen(jax.jit(best)(q, bounds[0]))

        return lambda: jax_chain(name, step, q, bounds * 4, (), work(row), outputs=outputs)

    def in_torch() -> Contender:
        torch = load("torch")

        def best(q, k_min, k_max):  # in bfloat16, in which its matrix product is fast
            scores = q.clamp(min=0) @ k_max.mT + q.clamp(max=0) @ k_min.mT
            return scores.amax(dim=2).topk(chosen, dim=-1).indices

        torch._dynamo.reset()
        pick = torch.compile(best, dynamic=False) if setup.gpu else best
        tensors = [tuple(to_torch(x) for x in each) for each in bounds]

        def step(q, each):
            return q + pick(q, *each)[..., -1:, None].clamp(max=0).to(q.dtype)

        def outputs():
            return of_the_chosen(from_torch(pick(to_torch(q), *tensors[0])))

        return torch_chain(
            "torch, compiled", step, to_torch(q), tensors * 4, work(row), setup, outputs=outputs
        )

    return {
        OURS: in_jax(OURS, _products),
        "XLA, elementwise": in_jax("XLA, elementwise", _elementwise),
        "torch, compiled": in_torch,
    }


# Chains ------------------------------------------------------------------------------------------------


def jax_chain(
    name: str, step: Callable, q, each: list, data: tuple, work: Work, *, same_work: bool = True, outputs=None
) -> Contender:
    """One program with a step per item of ``each``; step(q, item, *data) gives the next step's q."""
    one = jax.jit(step)  # traced and lowered once for all steps

    @jax.jit
    def program(q, each, data):
        for item in each:
            q = one(q, item, *data)
        return q

    return Contender(
        name=name,
        launch=lambda: program(q, each, data),
        wait=jax.block_until_ready,
        outputs=outputs or (lambda: {"out": one(q, each[0], *data)[:, None]}),
        work=work,
        calls=len(each),
        same_work=same_work,
    )


def torch_chain(
    name: str,
    step: Callable,
    q,
    each: list,
    work: Work,
    setup: Setup,
    *,
    same_work: bool = True,
    outputs=None,
) -> Contender:
    """The same in torch."""
    torch = load("torch")

    @torch.no_grad()
    def program():
        x = q
        for item in each:
            x = step(x, item)
        return x

    @torch.no_grad()
    def one():
        return {"out": from_torch(step(q, each[0]))[:, None]}

    launch = captured(program) if setup.gpu else program
    return Contender(
        name=name,
        launch=launch,
        wait=torch_wait,
        outputs=outputs or one,
        work=work,
        calls=len(each),
        same_work=same_work,
    )


def captured(program: Callable) -> Callable:
    """The program as a CUDA graph: its launches without Python's overhead between them."""
    torch = load("torch")

    side = torch.cuda.Stream()  # capturing wants a warm-up on a stream of its own
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        program()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # whatever JAX's threads do
        program()
    return graph.replay
