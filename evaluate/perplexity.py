"""Perplexity by sliding window, at any context length and with any attention mask."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int32, Integer

from jsparse.models import Llama
from jsparse.models.loss import next_targets, token_nll
from jsparse.models.masking import ModelMask, hashable
from jsparse.reports.progress import progress_bar

Scoring = Literal["new", "all", "last"]


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """``nll`` is the mean negative log-likelihood per token in nats, ``perplexity`` its exponential."""

    perplexity: float
    nll: float
    tokens: int  # how many were scored: once for each window that scored them
    context: int
    stride: int
    scoring: Scoring = "new"
    last: int | None = None


def evaluate_perplexity(
    model: Llama,
    tokens: Integer[np.ndarray | Array, " N"],
    *,
    context: int,
    stride: int | None = None,
    scoring: Scoring = "new",
    last: int | None = None,
    mask: ModelMask | None = None,
    batch_size: int = 1,
    max_windows: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of ``tokens`` under windows of ``context`` tokens, one starting every ``stride``.

    ``scoring`` says which tokens a window scores:

    - "new": those that no earlier window has scored, the usual protocol of Hugging Face's "Perplexity of
      fixed-length models". The first window scores all its tokens except the first, each later one ``stride``
      tokens (the last one what is left), with at least ``context - stride`` to their left. So every token
      except the very first is scored exactly once.
    - "all": every token except its first. With a stride of 256 it is LongLoRA's protocol (its eval.py), and
      equals its mean of the windows' means, since all windows score equally many. A token counts once for
      each window that it is in, with anything from one token to the whole context to its left.
    - "last": its last ``last`` tokens, each with at least ``context - last`` to its left.

    With "new" the last window is filled up on the right, where causal attention does not look. With "all" and
    "last" every window is full: tokens after the last full one are not scored.

    - tokens: one row of ids, all in the vocabulary; at least ``context`` of them. It may be a ``np.memmap``
      of any integers: it is read in place, one window at a time.
    - stride: with "new" 1 to context - 1 (a window's first token has nothing to its left), default
      context // 2. Else at least 1; default 256 with "all", and ``last`` with "last", where it scores
      each token once.
    - last: only with "last", 1 to context - 1.
    - mask: None for full causal attention (with the model's own sliding windows, where it has them), or what
      a model takes: the same for all layers, or one entry per layer (``AttentionPattern.masks``). BlockMasks
      have ``context`` queries and keys.
    - batch_size: windows per batch.
    - max_windows: score only this many windows, the first; the result's ``tokens`` says how many tokens.
    - progress: show a progress bar, if stderr is a terminal.

    Likelihoods are computed in float32, a stretch of tokens at a time, and summed in float64. It compiles
    once for a model, context, batch size and mask.

    Raises ValueError for arguments out of range,
    FloatingPointError where a likelihood is not finite.

    >>> from jsparse.models import LlamaConfig
    >>> config = LlamaConfig.tiny()
    >>> model = Llama(config, rngs=nnx.Rngs(0))
    >>> evaluate_perplexity(model, np.arange(40) % 16, context=16, stride=8).tokens
    39
    """
    tokens = np.asarray(tokens)  # a view of a memmap, not a copy
    _check(tokens, model.config.vocab_size, batch_size)
    plan = _plan(len(tokens), context, stride, scoring, last, max_windows)

    mask = hashable(mask)  # so that it can be static
    graphdef, state = nnx.split(model)
    total, scored = 0.0, 0
    with progress_bar(progress) as bar:
        task = bar.add_task(f"perplexity at {context}", total=plan.windows, note="")
        for first in range(0, plan.windows, batch_size):
            count = min(batch_size, plan.windows - first)
            batch, counts = _windows(tokens, first, count, batch_size, plan)
            nll = np.asarray(_nll(graphdef, state, batch, mask), np.float64)[counts]
            if not np.isfinite(nll).all():
                raise FloatingPointError(
                    f"likelihood is not finite in windows {first} to {first + count - 1}"
                )
            total, scored = total + float(nll.sum()), scored + nll.size
            bar.update(task, advance=count, note=f"{np.exp(total / scored):.3f}")
    mean = total / scored
    return Perplexity(float(np.exp(mean)), mean, scored, context, plan.stride, scoring, last)


def perplexity_by_context(
    model: Llama,
    tokens: Integer[np.ndarray | Array, " N"],
    contexts: Sequence[int],
    *,
    mask_for: Callable[[int], ModelMask | None] = lambda context: None,
    **options,
) -> list[Perplexity]:
    """``evaluate_perplexity`` at each of ``contexts``: the same tokens, with more or less to their left.

    - mask_for: the mask for a context length, for patterns that depend on it, like
      ``lambda context: shifted_head_masks(heads, context // 4)`` or
      ``lambda context: pattern.masks(model.config, context)``.
    - options: the other arguments of ``evaluate_perplexity``.
    """
    return [evaluate_perplexity(model, tokens, context=c, mask=mask_for(c), **options) for c in contexts]


@functools.partial(jax.jit, static_argnames=("graphdef", "mask"))
def _nll(graphdef, state, tokens: Int32[Array, "B T"], mask: ModelMask | None) -> Float32[Array, "B T"]:
    model = nnx.merge(graphdef, state)
    targets, _ = next_targets(tokens, jnp.ones_like(tokens))
    return token_nll(model.hidden(tokens, None, model.attend(mask)), model.logits, targets)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """``windows`` windows of ``context`` tokens, one every ``stride``.

    The first ``unscored`` tokens of each are not scored; with ``first_scores_all``, the very first window
    scores all tokens that can be scored.
    """

    windows: int
    context: int
    stride: int
    unscored: int
    first_scores_all: bool

    def unscored_in(self, window: int) -> int:
        return 1 if window == 0 and self.first_scores_all else self.unscored


def _plan(
    length: int,
    context: int,
    stride: int | None,
    scoring: Scoring,
    last: int | None,
    max_windows: int | None,
) -> _Plan:
    if context < 2:
        raise ValueError(f"context must be at least 2, not {context}")
    if length < context:
        raise ValueError(f"tokens must fill at least one window of context={context}, not {length} tokens")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows must be at least 1 or None, not {max_windows}")
    if scoring not in ("new", "all", "last"):
        raise ValueError(f"scoring must be 'new', 'all' or 'last', not {scoring!r}")
    if (last is not None) != (scoring == "last"):
        raise ValueError(f"last={last} must be given with scoring='last' and only then, not with {scoring!r}")
    if last is not None and not 1 <= last < context:
        raise ValueError(f"last must be 1 to context - 1 = {context - 1}, not {last}")

    if stride is None:
        stride = last or (256 if scoring == "all" else context // 2)
    if scoring == "new" and not 1 <= stride < context:
        raise ValueError(f"stride must be 1 to context - 1 = {context - 1}, not {stride}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, not {stride}")

    to_the_end = length - context
    windows = 1 + (-(-to_the_end // stride) if scoring == "new" else to_the_end // stride)
    windows = windows if max_windows is None else min(windows, max_windows)
    unscored = {"new": context - stride, "all": 1, "last": context - (last or 0)}[scoring]
    return _Plan(windows, context, stride, unscored, first_scores_all=scoring == "new")


def _windows(tokens: np.ndarray, first: int, count: int, batch_size: int, plan: _Plan):
    """Windows ``first`` to ``first + count``, and where in them the next token is scored, [B, T] each."""
    batch = np.zeros((batch_size, plan.context), np.int32)  # rows beyond count stay zero and score nothing
    scores_next = np.zeros((batch_size, plan.context), bool)
    for row, window in enumerate(range(first, first + count)):
        part = tokens[window * plan.stride : window * plan.stride + plan.context]
        batch[row, : len(part)] = part
        scores_next[row, plan.unscored_in(window) - 1 : len(part) - 1] = True
    return batch, scores_next


def _check(tokens: np.ndarray, vocab_size: int, batch_size: int) -> None:
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens must be one row of integers, not {tokens.dtype} of shape {list(tokens.shape)}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:  # JAX would clamp them silently
        raise ValueError(
            f"tokens must be 0 to {vocab_size - 1}, the model's vocabulary, "
            f"not {tokens.min()} to {tokens.max()}"
        )
