"""The loss of held-out data while a run trains: of documents and of answers to prompts, each on its own."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int32, PyTree

from jsparse.train.config import FinetuneConfig
from jsparse.train.data.windows import Windows
from jsparse.train.scoring import in_batches, jit_for_all, token_losses
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

    def arrays_of(some: np.ndarray) -> tuple[np.ndarray, ...]:
        return *windows[some], windows.answers(some)

    def measure(state: TrainState) -> dict[str, Any]:
        nll, tokens = np.zeros(len(KINDS)), np.zeros(len(KINDS), np.int64)
        for _, batch in in_batches(rows, at_a_time, arrays_of, mesh):
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


def _sums(split: SplitModel, mesh: Mesh | None) -> Callable[..., tuple[Array, Array]]:
    """The jitted ``sums(params, frozen, tokens, segment_ids, scored, answers)``: of each window and kind, the
    sum of the negative log-likelihoods and the number of tokens.
    """
    losses = token_losses(split, None, mesh)

    def sums(
        params: PyTree,
        frozen: PyTree,
        tokens: Int32[Array, "1 B T"],
        segment_ids: Int32[Array, "1 B T"],
        scored: Bool[Array, "1 B T"],
        answers: Bool[Array, "1 B T"],
    ) -> tuple[Float32[Array, "B K"], Int32[Array, "B K"]]:
        nll, counts = losses(params, frozen, tokens[0], segment_ids[0], scored[0])
        answers = jnp.roll(answers[0], -1, axis=1)
        kinds = jnp.stack([counts & ~answers, counts & answers], axis=-1)
        return jnp.where(kinds, nll[..., None], 0.0).sum(axis=1), kinds.sum(axis=1, dtype=jnp.int32)

    return jit_for_all(sums, mesh)
