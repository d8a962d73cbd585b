"""What a generation holds on the device: a model without its arrays, and the rows and pages of a batch."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from jsparse.arrays import DeviceArray
from jsparse.cache.layer import LayerKVCache
from jsparse.cache.pages import PagedKVCache
from jsparse.cache.ring import StreamingKVCache
from jsparse.cache.select.selection import Selection
from jsparse.models import Llama, LlamaConfig
from jsparse.serve.layout import CacheLayout
from jsparse.serve.logprobs import Scores
from jsparse.serve.penalties import History

MAX_STEPS = 32  # tokens per row that one call of loop.decode_steps can return
RUNNING, STOP, LENGTH, ERROR = range(4)  # values of DecodeState.finish
FINISH_REASONS = {STOP: "stop", LENGTH: "length", ERROR: "error"}


class ModelShape(NamedTuple):
    """The sizes of a model that decide the shapes of its cache."""

    q_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    dtype: Any

    @classmethod
    def from_config(cls, config: LlamaConfig, dtype: Any) -> "ModelShape":
        return cls(
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.hidden_size,
            dtype,
        )


@dataclasses.dataclass(frozen=True)
class ModelStructure:
    """A model without its arrays, and their shape: the static argument of jitted functions.

    Models of equal structure share compiled code. The hash is computed once: every call needs it, and with
    many layers it takes as long as a decode step.
    """

    graphdef: nnx.GraphDef
    treedef: Any
    shape: ModelShape

    def __hash__(self):
        return self._hash

    @functools.cached_property
    def _hash(self):
        return hash((self.graphdef, self.treedef, self.shape))

    def model(self, params: list[Array]) -> Llama:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, params))


def split_model(model: Llama) -> tuple[ModelStructure, list[Array]]:
    """The structure and the arrays of a model, from which ``ModelStructure.model`` makes it again."""
    graphdef, state = nnx.split(model)
    params, treedef = jax.tree.flatten(state)
    shape = ModelShape.from_config(model.config, model.embed_tokens.embedding[...].dtype)
    return ModelStructure(graphdef, treedef, shape), params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that changes while a batch is generated. Rows without a prompt have length 0."""

    layers: tuple[LayerKVCache, ...]
    page_table: DeviceArray  # int32 [B, pages]: shared by all layers
    lengths: DeviceArray  # int32 [B]: tokens in the cache
    token: DeviceArray  # int32 [B]: the newest token, not in the cache yet
    generated: DeviceArray  # int32 [B]
    finish: DeviceArray  # int32 [B]: RUNNING, or why the row ended
    selected_at: DeviceArray  # int32 [B]: the length at the last choice of pages, 0 if none
    history: History
    scores: Scores  # of the MAX_STEPS tokens that the last call returned, where rows ask for them


@functools.partial(jax.jit, static_argnames=("layout", "shape"))
def new_state(layout: CacheLayout, shape: ModelShape) -> DecodeState:
    """An empty batch: all rows free, and the pool of pages."""
    state = _empty_rows(layout, shape, layout.batch, prefill=False)
    layers = []
    for layer, of_layer in zip(state.layers, layout.layers, strict=True):
        heads = shape.kv_heads - len(layer.streaming_heads)
        selection = of_layer.selection
        paged = selected = None
        if heads:
            paged = PagedKVCache.zeros(
                layout.num_pages,
                heads,
                shape.head_dim,
                page_size=layout.page_size,
                logical_page_size=of_layer.logical_page_size,
                dtype=shape.dtype,
                bits=layout.kv_bits,
            )
            if selection is not None and selection.every > 1:
                group = shape.q_heads // shape.kv_heads
                selected = jnp.zeros((layout.batch, *_list_shape(layout, selection, heads, group)), jnp.int32)
        layers.append(dataclasses.replace(layer, paged=paged, selected=selected))
    return dataclasses.replace(state, layers=tuple(layers), finish=jnp.full(layout.batch, STOP, jnp.int32))


@functools.partial(jax.jit, static_argnames=("layout", "shape", "rows"))
def new_prefill_state(layout: CacheLayout, shape: ModelShape, rows: int) -> DecodeState:
    """Empty rows for prompts: rings of the window that prompts see, without a pool (:func:`with_pool`)."""
    return _empty_rows(layout, shape, rows, prefill=True)


def _empty_rows(layout: CacheLayout, shape: ModelShape, rows: int, *, prefill: bool) -> DecodeState:
    layers = []
    for layer in layout.layers:
        streaming = None
        if layer.streaming_heads:
            streaming = StreamingKVCache.zeros(
                rows,
                len(layer.streaming_heads),
                shape.head_dim,
                sink=layer.sink,
                window=layer.prefill_window if prefill else layer.window,
                dtype=shape.dtype,
            )
        layers.append(LayerKVCache(None, streaming, layer.streaming_heads))
    table = jnp.full((rows, layout.pages_of(layout.capacity)), layout.num_pages, jnp.int32)  # no page
    history = History.empty(rows, layout.vocab_size)
    scores = Scores.zeros(rows, MAX_STEPS, layout.vocab_size)
    zeros = [jnp.zeros(rows, jnp.int32) for _ in range(5)]  # one each, for they are donated
    return DecodeState(tuple(layers), table, *zeros, history=history, scores=scores)


def _list_shape(layout: CacheLayout, selection: Selection, kv_heads: int, group: int) -> tuple[int, int]:
    """How many lists of chosen pages a row has, and how long they are, as ``best_pages`` returns them."""
    pages = layout.pages_of(layout.capacity)
    count = min(selection.budget // layout.page_size, pages)
    if selection.heads == "query":
        return kv_heads * group, count
    return kv_heads, min(count * group, pages) if selection.heads == "union" else count


Pool = tuple[PagedKVCache | None, ...]  # the pages of each layer


def pool_of(state: DecodeState) -> Pool:
    return tuple(layer.paged for layer in state.layers)


def with_pool(state: DecodeState, pool: Pool) -> DecodeState:
    """The state with another pool, or with none: running rows and new prompts take turns with one pool."""
    layers = (
        dataclasses.replace(layer, paged=paged) for layer, paged in zip(state.layers, pool, strict=True)
    )
    return dataclasses.replace(state, layers=tuple(layers))


def join(state: DecodeState, joining: DecodeState, rows: Int[np.ndarray, " n"]) -> DecodeState:
    """``state`` with the rows and the pool of ``joining``; a row number beyond the batch drops its row."""
    pool, none = pool_of(joining), (None,) * len(joining.layers)
    return with_pool(_put_rows(with_pool(state, none), with_pool(joining, none), rows), pool)


@functools.partial(jax.jit, donate_argnames="state")
def _put_rows(state: DecodeState, joining: DecodeState, rows: Int[Array, " n"]) -> DecodeState:

    def put(old, new):
        return old.at[rows].set(new.astype(old.dtype), mode="drop")

    layers = []
    for old, new in zip(state.layers, joining.layers, strict=True):
        ring = old.streaming
        if ring is not None and new.streaming is not None:
            ring = jax.tree.map(put, ring, new.streaming.narrowed(ring.window, joining.lengths))
        layers.append(dataclasses.replace(old, streaming=ring))
    others = jax.tree.map(put, dataclasses.replace(state, layers=()), dataclasses.replace(joining, layers=()))
    return dataclasses.replace(others, layers=tuple(layers))


@functools.partial(jax.jit, donate_argnames="state")
def stop(state: DecodeState, row: Int[Array, ""]) -> DecodeState:
    """The state with one row ended."""
    return dataclasses.replace(state, finish=state.finish.at[row].set(STOP))
