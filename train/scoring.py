"""The losses of tokens without training: what held-out data and the reference of pairs are made of."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float32, Int32, Integer, PyTree

from jsparse.models.loss import next_targets, token_nll
from jsparse.models.masking import ModelMask
from jsparse.models.sharding import batch_sharding, put
from jsparse.train.step import SplitModel


def token_losses(
    split: SplitModel, mask: ModelMask | None, mesh: Mesh | None
) -> Callable[..., tuple[Float32[Array, "B T"], Bool[Array, "B T"]]]:
    """``losses(params, frozen, tokens, segment_ids, scored)``: of each token, the negative log-likelihood of
    its target, and whether that counts, without dropout. For use inside ``jit``.

    - mask: as the model takes it; None is full causal attention.
    - mesh: the mesh that the arguments lie on.
    """
    parts = 1 if mesh is None else mesh.shape["sequence"]

    def losses(
        params: PyTree,
        frozen: PyTree,
        tokens: Int32[Array, "B T"],
        segment_ids: Int32[Array, "B T"],
        scored: Bool[Array, "B T"],
    ) -> tuple[Float32[Array, "B T"], Bool[Array, "B T"]]:
        model = split.join(params, frozen)
        hidden = model.hidden(tokens, None, model.attend(mask, segment_ids))
        targets, counts = next_targets(tokens, segment_ids, scored)
        return token_nll(hidden, model.logits, targets, parts=parts), counts

    return losses


def jit_for_all(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """``jax.jit``, with results that every process reads whole."""
    return jax.jit(function, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))


def in_batches(
    rows: Integer[np.ndarray, " M"],
    size: int,
    arrays_of: Callable[[Integer[np.ndarray, " B"]], tuple[np.ndarray, ...]],
    mesh: Mesh | None,
) -> Iterator[tuple[slice, list[Any]]]:
    """The arrays [1, size, T] of some windows, ``size`` at a time, and which of ``rows`` they are.

    The last ones are padded with zeros. On a mesh they lie where batches do.

    - arrays_of: the arrays [B, T] of windows by their numbers.
    """
    for first in range(0, len(rows), size):
        some = rows[first : first + size]
        padded = [np.pad(x, [(0, size - len(some)), (0, 0)])[None] for x in arrays_of(some)]
        placed = padded if mesh is None else [put(x, batch_sharding(mesh)) for x in padded]
        yield slice(first, first + len(some)), placed
