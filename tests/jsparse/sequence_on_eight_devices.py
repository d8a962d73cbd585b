"""Run by test_sequence.py in a process of its own: a process decides once how many devices its CPU is."""

import math
import re
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jsparse
from jsparse import BlockMask, causal, shifted_groups, sliding_window, streaming

BATCH, Q_HEADS, KV_HEADS, DIM = 2, 4, 2, 16


class Case(NamedTuple):
    mesh: dict[str, int]
    masks: object
    length: int
    segments: bool
    collectives: set[str]  # all that the compiled program, forward and backward, may contain
    moved: int = 0  # tokens of a sequence that the largest collective permute moves
    kind: AxisType = AxisType.Auto


PERMUTE, GATHER, SCATTER, REDUCE = "collective-permute", "all-gather", "reduce-scatter", "all-reduce"

CASES = {
    # Devices of 40 tokens, of which shifted groups need 20 of the neighbour's.
    "groups": Case(
        {"sequence": 8}, [shifted_groups(40, 0)] * 2 + [shifted_groups(40, 20)] * 2, 320, True, {PERMUTE}, 20
    ),
    # Groups of two devices, and each device of "tensor" has a mask of its own.
    "groups, heads split": Case(
        {"tensor": 2, "sequence": 4},
        [shifted_groups(160, 0)] * 2 + [shifted_groups(160, 80)] * 2,
        320,
        False,
        {PERMUTE},
        80,
    ),
    "sinks and windows": Case(
        {"data": 2, "sequence": 4},
        [streaming(5, 30)] * 2 + [sliding_window(17), shifted_groups(50, 7)],
        320,
        True,
        {PERMUTE, REDUCE},
        47,
    ),
    # Devices of 160 tokens, which are not whole blocks.
    "ring": Case({"sequence": 8}, causal(), 1280, True, {PERMUTE}, 160),
    "ring, batch split": Case({"data": 2, "sequence": 4}, causal(), 256, False, {PERMUTE}, 64),
    # For interpreted kernels, of which each call takes long. How more devices share does not depend on them.
    "groups, two devices": Case(
        {"sequence": 2}, [shifted_groups(40, 0)] * 2 + [shifted_groups(40, 20)] * 2, 80, True, {PERMUTE}, 20
    ),
    "ring, two devices": Case({"sequence": 2}, causal(), 128, True, {PERMUTE}, 64),
    "mixed": Case(
        {"sequence": 8}, [causal()] * 2 + [streaming(3, 20)] * 2, 320, True, {GATHER, SCATTER, REDUCE}
    ),
    "mixed, heads split": Case(
        {"tensor": 2, "sequence": 4},
        [causal()] * 2 + [streaming(3, 20)] * 2,
        320,
        False,
        {GATHER, SCATTER, REDUCE},
    ),
    # No sequence axis: XLA on each device's own sequences and heads.
    "heads": Case(
        {"data": 2, "tensor": 2, "other": 2}, [causal()] * 3 + [streaming(3, 20)], 160, True, set()
    ),
    "heads, explicit": Case(
        {"data": 2, "tensor": 2},
        [causal()] * 3 + [streaming(3, 20)],
        160,
        True,
        set(),
        kind=AxisType.Explicit,
    ),
    "lists": Case(
        {"data": 2, "tensor": 2, "other": 2},
        BlockMask.from_indices(
            np.arange(16).reshape(2, 2, 2, 2) % 2, np.array([[[1, 2], [1, 1]], [[1, 2], [0, 2]]]),
            q_len=160, kv_len=160, block_q=128, block_kv=128,
        ),
        160,
        False,
        set(),
    ),
}  # fmt: skip


def main(implementation: str, *names: str) -> None:
    if implementation == "mosaic_gpu_interpret":
        from on_eight_devices import _make_interpreter_take_many_devices

        _make_interpreter_take_many_devices()
    for name in names:
        _check(implementation, name, CASES[name])
    print("agree on", jax.device_count(), "devices")


def _check(implementation: str, name: str, case: Case) -> None:
    rng = np.random.default_rng(0)
    shape = BATCH, case.length
    q, d_out = (jnp.asarray(rng.normal(size=(*shape, Q_HEADS, DIM)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(*shape, KV_HEADS, DIM)), jnp.float32) for _ in range(2))
    d_lse = jnp.asarray(rng.normal(size=(*shape, Q_HEADS)), jnp.float32)
    # Documents that end within devices, and one that is longer than a device.
    ends = np.sort(rng.choice(case.length, size=(BATCH, 4)), axis=1)
    ids = jnp.asarray((np.arange(case.length) >= ends[:, :, None]).sum(axis=1)) if case.segments else None

    def step(implementation):
        def loss(q, k, v, ids, d_out, d_lse):
            out, lse = jsparse.attention(
                q,
                k,
                v,
                case.masks,  # type: ignore[arg-type]
                q_segment_ids=ids,
                kv_segment_ids=ids,
                implementation=implementation,
                return_lse=True,
            )
            seen = jnp.where(jnp.isfinite(lse), lse, 0)
            return jnp.sum(out * d_out) + jnp.sum(seen * d_lse), (out, seen)

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))

    arrays = q, k, v, ids, d_out, d_lse
    expected = step("reference")(*arrays)
    mesh = jax.make_mesh(
        tuple(case.mesh.values()), tuple(case.mesh), axis_types=(case.kind,) * len(case.mesh)
    )
    with jax.set_mesh(mesh):
        axes = (axis if axis in case.mesh else None for axis in ("data", "sequence", "tensor"))
        spec = PartitionSpec(*axes)
        arrays = jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec[: x.ndim]))), arrays
        )
        compiled = step(implementation).lower(*arrays).compile()
    ours = compiled(*arrays)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), (name, x.sharding)
        error = np.linalg.norm(np.asarray(x) - np.asarray(y)) / np.linalg.norm(np.asarray(y))
        assert error < 1e-5, (name, error)

    moves = _collectives(str(compiled.as_text()))
    assert set(moves) <= case.collectives, (name, moves)
    if PERMUTE in case.collectives:
        batch = BATCH // case.mesh.get("data", 1)
        heads = KV_HEADS // case.mesh.get("tensor", 1)
        assert max(moves[PERMUTE]) == batch * case.moved * heads * DIM, (name, moves)


def _collectives(hlo: str) -> dict[str, list[int]]:
    """The elements of each array that each kind of collective makes, in the text of a compiled program."""
    found: dict[str, list[int]] = {}
    kinds = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", hlo):
        sizes = [math.prod(int(n) for n in s.split(",") if n) for s in re.findall(r"\[([\d,]*)\]", shapes)]
        found.setdefault(kind, []).extend(sizes)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
