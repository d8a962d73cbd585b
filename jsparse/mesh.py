"""Running a function on each device's own sequences, heads and tokens."""

from collections.abc import Callable

import jax
from jax.sharding import AxisType, PartitionSpec

# The mesh axes that split each dimension if the compiler chooses shardings (axes of type Auto): arrays do not
# say then.
BATCH_AXES = ("data", "fsdp")
HEAD_AXES = ("tensor",)
SEQUENCE_AXIS = "sequence"


def sequence_devices() -> int:
    """How many devices of the mesh in context share a sequence's tokens; 1 without an Auto "sequence"."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_names, mesh.axis_types, mesh.axis_sizes, strict=True)
    return next((n for name, kind, n in sizes if name == SEQUENCE_AXIS and kind == AxisType.Auto), 1)


def split_over_mesh(
    run: Callable, operands: tuple, axes: tuple[str, ...], outputs: tuple[str, ...], *, num_heads: int
):
    """``run(*operands)``, by ``shard_map`` over the mesh in context (``jax.set_mesh``) if there is one.

    Mesh axes of type Explicit split as operand 0 is sharded; of those of type Auto, ``BATCH_AXES``,
    ``HEAD_AXES`` and ``SEQUENCE_AXIS`` split. If an axis does not divide the batch or the heads, its devices
    repeat the work.

    - run: computes a device's outputs, a tuple, from its shares of the operands.
    - operands: arrays.
    - axes: the axes of each operand, one letter each. ``b`` is split over the devices that share the batch,
      ``h`` over those that share the heads, ``s`` over those that share each sequence. Axes with any other
      letter are whole on every device.
    - outputs: the axes of each output, in the same letters.
    - num_heads: the number of KV heads.

    Raises ValueError if operand 0 is explicitly sharded along another axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    free = {name for name, kind in kinds.items() if kind != AxisType.Manual}
    if not free:
        return run(*operands)
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    given = _explicit_axes(operands[0], axes[0])
    lengths = {"b": operands[0].shape[axes[0].index("b")], "h": num_heads}
    split = {}
    for letter, names in (("b", BATCH_AXES), ("h", HEAD_AXES)):
        auto = tuple(name for name in names if kinds.get(name) == AxisType.Auto)
        split[letter] = dividing(given[letter] + auto, sizes, lengths[letter])
    split["s"] = (SEQUENCE_AXIS,) if kinds.get(SEQUENCE_AXIS) == AxisType.Auto else ()

    def spec(letters, among):
        parts = (tuple(name for name in split.get(letter, ()) if name in among) for letter in letters)
        return PartitionSpec(*(part or None for part in parts))

    # Types say how arrays are sharded along Explicit axes, and shard_map requires the sharding it cuts by.
    explicit = {name for name, kind in kinds.items() if kind == AxisType.Explicit}
    if explicit:
        operands = tuple(jax.reshard(x, spec(of, explicit)) for x, of in zip(operands, axes, strict=True))
    return jax.shard_map(
        run,
        in_specs=tuple(spec(letters, free) for letters in axes),
        out_specs=tuple(spec(letters, free) for letters in outputs),
        axis_names=free,
        check_vma=False,
    )(*operands)


def dividing(names: tuple[str, ...], size: dict[str, int], length: int) -> tuple[str, ...]:
    """Those of the mesh axes, in order, whose sizes together divide the length; some may have no ``size``."""
    chosen: list[str] = []
    for name in names:
        if name in size and length % size[name] == 0:
            chosen.append(name)
            length //= size[name]
    return tuple(chosen)


def _explicit_axes(x, letters: str) -> dict[str, tuple[str, ...]]:
    spec = jax.typeof(x).sharding.spec
    given: dict[str, tuple[str, ...]] = {}
    for letter, part in zip(letters, (*spec, *(None,) * (len(letters) - len(spec))), strict=True):
        names = () if part is None else part if isinstance(part, tuple) else (part,)
        if names and letter not in "bh":
            raise ValueError(
                f"q is sharded as {spec}, but axes of type Explicit split only its batch and heads; an axis "
                f"{SEQUENCE_AXIS!r} of type Auto splits its tokens"
            )
        given[letter] = names
    return given
