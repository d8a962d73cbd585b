"""The device side of generation: prefill, choose a first token, decode a number of steps.

These are the only functions that run the model. They are jitted once for a model's structure, a batch and a
capacity, and donate their state: the cache is updated in place. ``generate`` and ``stream`` call the same
ones.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jsparse.cache import LayerKVCache, PagedKVCache, StreamingKVCache
from jsparse.decode import attend_and_append
from jsparse.models import Llama
from jsparse.serve.config import CacheLayout
from jsparse.serve.sampling import RowParams, sample

MAX_STEPS = 32  # tokens a row that one call of decode_steps can return
RUNNING, STOP, LENGTH, ERROR = range(4)  # values of DecodeState.finish
FINISH_REASONS = {STOP: "stop", LENGTH: "length", ERROR: "error"}


@dataclasses.dataclass(frozen=True)
class ModelStructure:
    """A model without its arrays: the static argument of jitted functions.

    Models of equal structure share what is compiled. The hash is computed once: for many layers it takes as
    long as a decode step, and every call needs it.
    """

    graphdef: nnx.GraphDef
    treedef: Any

    def __hash__(self):
        return self._hash

    @functools.cached_property
    def _hash(self):
        return hash((self.graphdef, self.treedef))

    def model(self, params: list[Array]) -> Llama:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, params))


def split_model(model: Llama) -> tuple[ModelStructure, list[Array]]:
    """The structure and the arrays, which together make the model again."""
    graphdef, state = nnx.split(model)
    params, treedef = jax.tree.flatten(state)
    return ModelStructure(graphdef, treedef), params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that changes while a batch is generated. Rows without a prompt have length 0."""

    layers: tuple[LayerKVCache, ...]
    page_table: Any  # int32 [B, pages]: shared by all layers
    lengths: Any  # int32 [B]: tokens in the cache
    token: Any  # int32 [B]: the newest token, not in the cache yet
    generated: Any  # int32 [B]
    finish: Any  # int32 [B]: RUNNING, or why the row ended


@functools.partial(jax.jit, static_argnames=("layout", "kv_heads", "dim", "dtype"))
def new_state(layout: CacheLayout, *, kv_heads: int, dim: int, dtype: Any) -> DecodeState:
    """An empty cache, in which row ``b`` owns the pages from ``b * pages`` on."""
    layers = []
    for layer in layout.layers:
        streaming_heads = len(layer.streaming_heads)
        paged = streaming = None
        if streaming_heads < kv_heads:
            paged = PagedKVCache.zeros(
                layout.batch * layout.pages,
                kv_heads - streaming_heads,
                dim,
                page_size=layout.page_size,
                logical_page_size=layout.logical_page_size,
                dtype=dtype,
            )
        if streaming_heads:
            streaming = StreamingKVCache.zeros(
                layout.batch, streaming_heads, dim, sink=layer.sink, window=layer.window, dtype=dtype
            )
        layers.append(LayerKVCache(paged, streaming, layer.streaming_heads))
    page_table = jnp.arange(layout.batch * layout.pages, dtype=jnp.int32).reshape(layout.batch, layout.pages)
    counters = [jnp.zeros(layout.batch, jnp.int32) for _ in range(4)]
    return DecodeState(tuple(layers), page_table, *counters)


def prefill(
    model: Llama,
    structure: ModelStructure,
    params: list[Array],
    prompts: list[np.ndarray],
    layout: CacheLayout,
) -> tuple[DecodeState, Float[Array, "B embed"]]:
    """A new cache with the prompts in it, chunk by chunk, and the hidden state of each one's last token."""
    config, dtype = model.config, model.embed_tokens.embedding[...].dtype
    state = new_state(layout, kv_heads=config.num_key_value_heads, dim=config.head_dim, dtype=dtype)
    hidden = jax.device_put(np.zeros((layout.batch, config.hidden_size), dtype))
    for start in range(0, max(map(len, prompts)), layout.prefill_chunk):
        tokens = np.zeros((layout.batch, layout.prefill_chunk), np.int32)
        counts = np.zeros(layout.batch, np.int32)
        for row, prompt in enumerate(prompts):
            piece = prompt[start : start + layout.prefill_chunk]
            tokens[row, : len(piece)] = piece
            counts[row] = len(piece)
        state, hidden = prefill_chunk(structure, params, state, hidden, tokens, counts)
    return state, hidden


@functools.partial(jax.jit, static_argnames="structure", donate_argnames=("state", "hidden"))
def prefill_chunk(
    structure: ModelStructure,
    params: list[Array],
    state: DecodeState,
    hidden: Float[Array, "B embed"],
    tokens: Int[Array, "B C"],
    counts: Int[Array, " B"],
) -> tuple[DecodeState, Float[Array, "B embed"]]:
    """Takes the next ``counts[b]`` of ``C`` prompt tokens a row into the cache.

    ``hidden`` is that of each row's newest token: rows whose prompts end early keep theirs.
    """
    model = structure.model(params)
    chunk, state = forward(model, state, tokens, counts, budget=None)
    newest = jnp.take_along_axis(chunk, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return state, jnp.where(counts[:, None] > 0, newest, hidden)


@functools.partial(jax.jit, static_argnames="structure", donate_argnames="state")
def first_token(
    structure: ModelStructure,
    params: list[Array],
    state: DecodeState,
    hidden: Float[Array, "B embed"],
    rows: RowParams,
) -> tuple[DecodeState, Int[Array, "B 1"]]:
    """Chooses the token after each prompt, -1 where the logits are not finite."""
    state, token = _choose(structure.model(params), hidden, state, rows)
    return state, token[:, None]


@functools.partial(jax.jit, static_argnames=("structure", "budget"), donate_argnames="state")
def decode_steps(
    structure: ModelStructure,
    params: list[Array],
    state: DecodeState,
    rows: RowParams,
    steps: Int[Array, ""],
    *,
    budget: int | None,
) -> tuple[DecodeState, Int[Array, "B steps"]]:
    """Runs up to ``steps`` (at most MAX_STEPS) decode steps, fewer when every row ends before.

    Returns the tokens of each step, -1 where a row had ended. ``steps`` is traced, ``budget`` static.
    """
    model = structure.model(params)

    def unfinished(carry):
        i, state, _ = carry
        return (i < steps) & (state.finish == RUNNING).any()

    def step(carry):
        i, state, out = carry
        running = (state.finish == RUNNING).astype(jnp.int32)
        hidden, state = forward(model, state, state.token[:, None], running, budget=budget)
        state, token = _choose(model, hidden[:, 0], state, rows)
        return i + 1, state, out.at[:, i].set(token)

    out = jnp.full((state.token.shape[0], MAX_STEPS), -1, jnp.int32)
    _, state, out = jax.lax.while_loop(unfinished, step, (0, state, out))
    return state, out


def forward(model: Llama, state: DecodeState, tokens, counts, *, budget: int | None):
    """Hidden states of ``counts[b]`` new tokens a row, and the state with them in the cache."""
    layers = list(state.layers)

    def attend(layer, q, k, v):
        out, layers[layer] = attend_and_append(
            q, k, v, layers[layer], state.page_table, state.lengths, counts, budget=budget
        )
        return out

    positions = state.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    hidden = model.hidden(tokens, positions, attend)
    return hidden, dataclasses.replace(state, layers=tuple(layers), lengths=state.lengths + counts)


def _choose(model: Llama, hidden, state: DecodeState, rows: RowParams):
    """The next token of each running row, and why rows end with it; -1 where no token comes."""
    running = state.finish == RUNNING
    token, finite = sample(model.logits(hidden), rows, state.lengths)
    chosen = running & finite
    generated = state.generated + chosen
    stops = jnp.take_along_axis(rows.stops, token[:, None], axis=1)[:, 0]
    finish = jnp.where(generated >= rows.max_new, LENGTH, RUNNING)
    finish = jnp.where(stops, STOP, finish)
    finish = jnp.where(finite, finish, ERROR)
    state = dataclasses.replace(
        state,
        token=jnp.where(chosen, token, state.token),
        generated=generated,
        finish=jnp.where(running, finish, state.finish),
    )
    return state, jnp.where(chosen, token, -1)
