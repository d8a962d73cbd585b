"""Logits of given tokens from the decode step of a cache (teacher forcing)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from jsparse.models import Llama
from jsparse.serve import loop
from jsparse.serve.batch import Batch
from jsparse.serve.config import CacheConfig
from jsparse.serve.generation import DENSE
from jsparse.serve.layout import Selections, plan_cache
from jsparse.serve.request import Request, check_ids
from jsparse.serve.sampling import SamplingParams
from jsparse.serve.state import DecodeState, ModelStructure


def decode_logits(
    model: Llama,
    prompt: Int[np.ndarray, " P"],
    continuation: Int[np.ndarray, " T"],
    cache: CacheConfig | None = None,
) -> Float32[np.ndarray, "T vocab"]:
    """Logits after each token of ``continuation``, fed to the decode step one by one after ``prompt``.

    Every cache sees the same tokens, so the logits of a sparse and a dense one can be compared.

    - prompt: [P], integer token ids.
    - continuation: [T], integer token ids.
    - cache: what each head reads; None reads everything, as in :func:`jsparse.serve.generate`.

    Returns logits [T, vocab], float32. Those after the prompt itself are left out, since they come from the
    prefill.

    Raises ValueError if a token is outside the vocabulary, a part is empty, or both together are longer than
    the capacity.

    >>> from flax import nnx
    >>> from jsparse.models import LlamaConfig
    >>> config = LlamaConfig.tiny()
    >>> model = Llama(config, rngs=nnx.Rngs(0))
    >>> decode_logits(model, np.array([1, 2, 3]), np.array([4, 5])).shape
    (2, 257)
    """
    for name, tokens in (("prompt", prompt), ("continuation", continuation)):
        check_ids(name, tokens, model.config.vocab_size)
    layout = plan_cache(DENSE if cache is None else cache, model.config, [len(prompt)], [len(continuation)])
    batch = Batch(model, layout)
    batch.add([Request(prompt.astype(np.int32), len(continuation), SamplingParams(ignore_eos=True), 0, 0)])
    tokens = continuation.astype(np.int32)
    return np.asarray(
        _forced(batch.structure, batch.params, batch.state, tokens, selections=layout.selections)
    )


@functools.partial(jax.jit, static_argnames=("structure", "selections"))
def _forced(
    structure: ModelStructure,
    params: list[Array],
    state: DecodeState,
    continuation: Int[Array, " T"],
    *,
    selections: Selections,
) -> Float[Array, "T vocab"]:
    model = structure.model(params)
    batch, count = state.lengths.shape[0], continuation.shape[0]
    first_row = (jnp.arange(batch) == 0).astype(jnp.int32)

    def given(turn, state, logits):
        return jnp.full((batch, 1), continuation[turn]), first_row

    def record(turn, state, hidden, logits):
        return state, logits.at[turn].set(model.logits(hidden[0, 0]))

    _, logits = loop.feed(
        model,
        state,
        selections,
        jnp.zeros((count, model.config.vocab_size), jnp.float32),
        unfinished=lambda turn, *_: turn < count,
        tokens=given,
        use=record,
    )
    return logits
