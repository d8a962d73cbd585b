"""The loss of held-out data while a run trains: of documents and of answers to prompts, each on its own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float32, Int32, PyTree

from jsparse.models.loss import next_targets, token_nll
from jsparse.models.sharding import batch_sharding, put
from jsparse.train.config import FinetuneConfig
from jsparse.train.data.windows import Windows
from jsparse.train.step import SplitModel, TrainState

KINDS = ("documents", "instructions")


def held_out_loss(
    config: FinetuneConfig, split: SplitModel, mesh: Mesh | None, windows: Windows
) -> Callable[[TrainState], dict[str, Any]]:
    """``measure(state)``: the loss and perplexity of ``windows`` under a state's parameters.

    The model is the one that is trained, with full causal attention, as it is served by default, and without
    dropout. As many windows are computed at a time as in a micro-batch. It compiles once, and the state stays
    as it is.

    ``measure`` returns the mean negative log-likelihood per token, its exponential, and the number of tokens
    that were scored; the same for "documents" and for "instructions" alone, if there are any. The sums of the
    windows are added in float64. A number that is not finite is None.
    """
    rows = windows.with_targets()
    at_a_time = config.batch_size // config.micro_batches
    compiled = _sums(split, mesh)

    def measure(state: TrainState) -> dict[str, Any]:
        nll, tokens = np.zeros(len(KINDS)), np.zeros(len(KINDS), np.int64)
        for first in range(0, len(rows), at_a_time):
            batch = _batch(windows, rows[first : first + at_a_time], at_a_time, mesh)
            sums, counts = compiled(state.params, split.frozen, *batch)
            nll += np.asarray(sums, np.float64).sum(axis=0)
            tokens += np.asarray(counts, np.int64).sum(axis=0)
        each = dict(zip(KINDS, zip(nll.tolist(), tokens.tolist(), strict=True), strict=True))
        kinds = {name: _summary(*sums) for name, sums in each.items() if sums[1]}
        return _summary(float(nll.sum()), int(tokens.sum())) | kinds

    return measure


def _summary(nll: float, tokens: int) -> dict[str, Any]:
    loss = nll / tokens
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(loss))
    return {
        "loss": loss if np.isfinite(loss) else None,
        "perplexity": perplexity if np.isfinite(perplexity) else None,
        "tokens": tokens,
    }


def _batch(windows: Windows, rows: np.ndarray, size: int, mesh: Mesh | None) -> list[Any]:
    """Tokens, segment ids, scored tokens and which of them are answers, [1, size, T] each, padded."""
    batch = [*windows[rows], windows.answers(rows)]
    padded = [np.pad(x, [(0, size - len(rows)), (0, 0)])[None] for x in batch]
    return padded if mesh is None else [put(x, batch_sharding(mesh)) for x in padded]


def _sums(split: SplitModel, mesh: Mesh | None) -> Callable[..., tuple[Array, Array]]:
    """The jitted ``sums(params, frozen, tokens, segment_ids, scored, answers)``: of each window and kind, the
    sum of the negative log-likelihoods and the number of tokens.
    """
    parts = 1 if mesh is None else mesh.shape["sequence"]

    def sums(
        params: PyTree,
        frozen: PyTree,
        tokens: Int32[Array, "1 B T"],
        segment_ids: Int32[Array, "1 B T"],
        scored: Bool[Array, "1 B T"],
        answers: Bool[Array, "1 B T"],
    ) -> tuple[Float32[Array, "B K"], Int32[Array, "B K"]]:
        tokens, segment_ids, scored, answers = (x[0] for x in (tokens, segment_ids, scored, answers))
        model = split.join(params, frozen)
        hidden = model.hidden(tokens, None, model.attend(None, segment_ids))
        targets, counts = next_targets(tokens, segment_ids, scored)
        nll = token_nll(hidden, model.logits, targets, parts=parts)
        answers = jnp.roll(answers, -1, axis=1)
        kinds = jnp.stack([counts & ~answers, counts & answers], axis=-1)
        return jnp.where(kinds, nll[..., None], 0.0).sum(axis=1), kinds.sum(axis=1, dtype=jnp.int32)

    # Every process reads the sums of all windows.
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(sums, out_shardings=whole)
