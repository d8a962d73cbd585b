"""Where the named axes of parameters and activations lie on a mesh: the rules, in one place.

A mesh has up to four axes of type Auto. ``data`` splits the batch; ``fsdp`` splits the batch and every
matrix; ``tensor`` splits heads, the inside of the MLP and the vocabulary; ``sequence`` splits the tokens of a
sequence, and matrices with them. A mesh axis that does not divide an axis of an array leaves it whole.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jsparse.mesh import BATCH_AXES, SEQUENCE_AXIS, dividing
from jsparse.models.mesh_config import MeshConfig as MeshConfig

# The mesh axes of each named axis of a matrix; a mesh axis splits only the first that asks for it. Vectors
# are whole on every device.
RULES = {
    "embed": ("fsdp", "sequence"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor", "fsdp", "sequence"),
}


def parameter_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of every array in a tree of parameters, or of optimizer states that look like them.

    Reads the logical names that parameters carry; the arrays may be abstract. Arrays without names, and
    vectors, are whole on every device.
    """

    def place(x, names):
        free = {name: size for name, size in mesh.shape.items() if size > 1}
        # A table of the vocabulary is split only by rows: activations would inherit a split along embed.
        whole = {"embed"} if "vocab" in names else set()
        axes = []
        for name, length in zip(names, x.shape, strict=False) if x.ndim > 1 else ():
            chosen = () if name in whole else dividing(RULES.get(name, ()), free, length)
            for axis in chosen:
                del free[axis]
            axes.append(chosen or None)
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(place, tree, nnx.get_partition_spec(tree))


def abstract_parameters(tree: PyTree, mesh: Mesh) -> PyTree:
    """Shapes and dtypes of such a tree, with the shardings of ``parameter_shardings``."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        parameter_shardings(tree, mesh),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of tokens [micro-batches, B, T]."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, SEQUENCE_AXIS))


def row_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of what rows of tokens have beside them, [micro-batches, B, ...]."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def keep_tokens_split(x: Array) -> Array:
    """Activations [B, T, ...], kept split by batch and sequence on the mesh in context, if there is one.

    Said at the border of every layer: otherwise the compiler may propagate a matrix's sharding to them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind == AxisType.Auto and size > 1
    }
    batch, sequence = dividing(BATCH_AXES, free, x.shape[0]), dividing((SEQUENCE_AXIS,), free, x.shape[1])
    if not batch and not sequence:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch or None, sequence or None))


def put_parameter(variable: nnx.Variable, array: Any, *, mesh: Mesh | None) -> jax.Array:
    """The value of one parameter where ``parameter_shardings`` says, or on the default device."""
    if mesh is None:
        return jnp.asarray(array)
    (sharding,) = jax.tree.leaves(parameter_shardings(variable, mesh))
    return put(array, sharding)


def put(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process holds whole, on the devices of ``sharding``: each takes its own part."""
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
