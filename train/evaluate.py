"""Perplexity by sliding window, at any context length and with any attention mask."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int, Int32

from jsparse import BlockMask, TokenMask
from jsparse.models import Llama
from jsparse.models.llama import Mask
from jsparse.train.loss import next_token_nll
from jsparse.train.progress import progress_bar


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """``nll`` is the mean negative log-likelihood of a token in nats, ``perplexity`` its exponential."""

    perplexity: float
    nll: float
    tokens: int  # how many were scored
    context: int
    stride: int


def evaluate_perplexity(
    model: Llama,
    tokens: Int[np.ndarray | Array, " N"],
    *,
    context: int,
    stride: int | None = None,
    mask: Mask | None = None,
    batch_size: int = 1,
    max_windows: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of ``tokens`` under windows of ``context`` tokens, one starting every ``stride``.

    The protocol is the usual one of Hugging Face's "Perplexity of fixed-length models": the first window
    scores all its tokens but the first, each later window the ``stride`` tokens (in the last window: what is
    left) that no window before it has scored. So every token but the very first is scored exactly once, with
    at least ``context - stride`` tokens to its left. The last window is filled up on the right, where causal
    attention does not look.

    tokens: one row of ids, all in the vocabulary; at least ``context`` of them.
    stride: 1 to context - 1 (a window's first token has nothing to its left); default context // 2.
    mask: None for full causal attention (with the model's own sliding windows, where it has them), or what
        ``jsparse.attention`` takes: a TokenMask, one a query head, or a BlockMask of ``context`` queries and
        keys.
    batch_size: windows at a time.
    max_windows: score the first so many windows only; the result's ``tokens`` says how many that were.
    progress: a progress bar, if stderr is a terminal.

    Computed window by window in float32 and summed in float64; compiled once for a model, context, batch size
    and mask. Raises ValueError for arguments out of range, FloatingPointError where a likelihood is not
    finite.

    >>> from jsparse.models import LlamaConfig
    >>> config = LlamaConfig(
    ...     vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> model = Llama(config, rngs=nnx.Rngs(0))
    >>> evaluate_perplexity(model, np.arange(40) % 16, context=16, stride=8).tokens
    39
    """
    tokens = np.asarray(tokens)
    stride = context // 2 if stride is None else stride
    _check(tokens, model.config.vocab_size, context, stride, batch_size, max_windows)
    if not isinstance(mask, TokenMask | BlockMask | None):
        mask = tuple(mask)  # hashable, so that it can be static

    windows = 1 + -(-(len(tokens) - context) // stride)
    windows = windows if max_windows is None else min(windows, max_windows)
    graphdef, state = nnx.split(model)
    total, scored = 0.0, 0
    with progress_bar(progress) as bar:
        task = bar.add_task(f"perplexity at {context}", total=windows, note="")
        for first in range(0, windows, batch_size):
            count = min(batch_size, windows - first)
            batch, counts = _windows(tokens, first, count, batch_size, context, stride)
            nll = np.asarray(_nll(graphdef, state, batch, mask), np.float64)[counts]
            if not np.isfinite(nll).all():
                raise FloatingPointError(
                    f"likelihood is not finite in windows {first} to {first + count - 1}"
                )
            total, scored = total + float(nll.sum()), scored + nll.size
            bar.update(task, advance=count, note=f"{np.exp(total / scored):.3f}")
    return Perplexity(float(np.exp(total / scored)), total / scored, scored, context, stride)


def perplexity_by_context(
    model: Llama,
    tokens: Int[np.ndarray | Array, " N"],
    contexts: Sequence[int],
    *,
    mask_for: Callable[[int], Mask | None] = lambda context: None,
    **options,
) -> list[Perplexity]:
    """``evaluate_perplexity`` at each of ``contexts``: the same tokens, with more or less to their left.

    mask_for: the mask for a context length, for patterns that depend on it, like
        ``lambda context: shifted_head_masks(heads, context // 4)``. options: as ``evaluate_perplexity`` takes
        them.
    """
    return [evaluate_perplexity(model, tokens, context=c, mask=mask_for(c), **options) for c in contexts]


@functools.partial(jax.jit, static_argnames=("graphdef", "mask"))
def _nll(graphdef, state, tokens: Int32[Array, "B T"], mask: Mask | None) -> Float32[Array, "B T"]:
    logits = nnx.merge(graphdef, state)(tokens, mask=mask)
    return next_token_nll(logits, tokens, jnp.ones_like(tokens))[0]


def _windows(tokens: np.ndarray, first: int, count: int, batch_size: int, context: int, stride: int):
    """Windows ``first`` to ``first + count``, and where in them the next token is scored, [B, T] each."""
    batch = np.zeros((batch_size, context), np.int32)  # rows beyond count stay zero and score nothing
    scores_next = np.zeros((batch_size, context), bool)
    for row, window in enumerate(range(first, first + count)):
        part = tokens[window * stride : window * stride + context]
        batch[row, : len(part)] = part
        seen = 1 if window == 0 else context - stride
        scores_next[row, seen - 1 : len(part) - 1] = True
    return batch, scores_next


def _check(
    tokens: np.ndarray, vocab_size: int, context: int, stride: int, batch_size: int, max_windows: int | None
):
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens must be one row of integers, not {tokens.dtype} of shape {list(tokens.shape)}"
        )
    if context < 2:
        raise ValueError(f"context must be at least 2, not {context}")
    if not 1 <= stride < context:
        raise ValueError(f"stride must be 1 to context - 1 = {context - 1}, not {stride}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows must be at least 1 or None, not {max_windows}")
    if len(tokens) < context:
        raise ValueError(
            f"tokens must fill at least one window of context={context}, not {len(tokens)} tokens"
        )
    if tokens.min() < 0 or tokens.max() >= vocab_size:  # JAX would clamp them without a word
        raise ValueError(
            f"tokens must be 0 to {vocab_size - 1}, the model's vocabulary, "
            f"not {tokens.min()} to {tokens.max()}"
        )
