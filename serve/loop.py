"""The device side of generation: prefill, choose a first token, decode a number of steps.

These are the only functions that run the model. They are jitted once for a model's structure, a batch and a
capacity, and donate their state: the cache is updated in place. ``generate`` and ``stream`` call the same
ones.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jsparse.cache.layer import LayerKVCache, attend_and_append
from jsparse.cache.pages import PagedKVCache
from jsparse.cache.ring import StreamingKVCache
from jsparse.cache.select.selection import Selection
from jsparse.cache.tokens import Tokens
from jsparse.models import Llama, LlamaConfig
from jsparse.serve.config import CacheLayout, Reading
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


class ModelShape(NamedTuple):
    """What of a model decides the shapes of its cache."""

    q_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    dtype: Any

    @classmethod
    def of(cls, config: LlamaConfig, dtype: Any) -> "ModelShape":
        return cls(
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.hidden_size,
            dtype,
        )


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
    selected_at: Any  # int32 [B]: the length at which pages were chosen last, 0 if never


@functools.partial(jax.jit, static_argnames=("layout", "shape"))
def new_state(layout: CacheLayout, shape: ModelShape) -> DecodeState:
    """An empty batch: all rows free, and the pool of pages."""
    state = _empty_rows(layout, shape, layout.batch, prefill=False)
    layers = []
    for number, layer in enumerate(state.layers):
        heads = shape.kv_heads - len(layer.streaming_heads)
        selection = layout.reading.selection_of(number)
        paged = selected = None
        if heads:
            paged = PagedKVCache.zeros(
                layout.num_pages,
                heads,
                shape.head_dim,
                page_size=layout.page_size,
                logical_page_size=None if selection is None else layout.logical_page_size,
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
    """Empty rows for prompts: rings as long as prompts see, and no pool, which the running rows bring."""
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
    return DecodeState(tuple(layers), table, *(jnp.zeros(rows, jnp.int32) for _ in range(5)))


def _list_shape(layout: CacheLayout, selection: Selection, kv_heads: int, group: int) -> tuple[int, int]:
    """How many lists of chosen pages a row has, and how long they are: as best_pages gives them."""
    pages = layout.pages_of(layout.capacity)
    count = min(selection.budget // layout.page_size, pages)
    if selection.heads == "query":
        return kv_heads * group, count
    return kv_heads, min(count * group, pages) if selection.heads == "union" else count


Pool = tuple[PagedKVCache | None, ...]  # the pages of each layer


def pool_of(state: DecodeState) -> Pool:
    return tuple(layer.paged for layer in state.layers)


def with_pool(state: DecodeState, pool: Pool) -> DecodeState:
    """The state on other pages, or on none: the running rows and new prompts take turns with one pool."""
    layers = (
        dataclasses.replace(layer, paged=paged) for layer, paged in zip(state.layers, pool, strict=True)
    )
    return dataclasses.replace(state, layers=tuple(layers))


def join(state: DecodeState, joining: DecodeState, rows: Int[np.ndarray, " n"]) -> DecodeState:
    """``state`` with the rows of ``joining``, and its pool; a row number beyond the batch takes no row."""
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
    fields = (field.name for field in dataclasses.fields(state) if field.name != "layers")
    return DecodeState(
        tuple(layers), **{name: put(getattr(state, name), getattr(joining, name)) for name in fields}
    )


@functools.partial(jax.jit, donate_argnames="state")
def stop(state: DecodeState, row: Int[Array, ""]) -> DecodeState:
    """The state with one row ended."""
    return dataclasses.replace(state, finish=state.finish.at[row].set(STOP))


def prefill(
    structure: ModelStructure,
    params: list[Array],
    state: DecodeState,
    prompts: list[np.ndarray],
    layout: CacheLayout,
    shape: ModelShape,
) -> tuple[DecodeState, Float[Array, "B embed"]]:
    """The state with the prompts in it, chunk by chunk, and the hidden state of each one's last token."""
    batch = state.lengths.shape[0]
    hidden = jax.device_put(np.zeros((batch, shape.hidden_size), shape.dtype))
    for start in range(0, max(map(len, prompts)), layout.prefill_chunk):
        tokens = np.zeros((batch, layout.prefill_chunk), np.int32)
        counts = np.zeros(batch, np.int32)
        for row, prompt in enumerate(prompts):
            piece = prompt[start : start + layout.prefill_chunk]
            tokens[row, : len(piece)] = piece
            counts[row] = len(piece)
        state, hidden = prefill_chunk(
            structure, params, state, hidden, tokens, counts, reading=layout.reading
        )
    return state, hidden


@functools.partial(jax.jit, static_argnames=("structure", "reading"), donate_argnames=("state", "hidden"))
def prefill_chunk(
    structure: ModelStructure,
    params: list[Array],
    state: DecodeState,
    hidden: Float[Array, "B embed"],
    tokens: Int[Array, "B C"],
    counts: Int[Array, " B"],
    *,
    reading: Reading,
) -> tuple[DecodeState, Float[Array, "B embed"]]:
    """Takes the next ``counts[b]`` of ``C`` prompt tokens a row into the cache.

    ``hidden`` is that of each row's newest token: rows whose prompts end early keep theirs.
    """
    model = structure.model(params)
    chunk, state = forward(model, state, tokens, counts, reading, prompt=True)
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


@functools.partial(jax.jit, static_argnames=("structure", "reading"), donate_argnames="state")
def decode_steps(
    structure: ModelStructure,
    params: list[Array],
    state: DecodeState,
    rows: RowParams,
    steps: Int[Array, ""],
    *,
    reading: Reading,
) -> tuple[DecodeState, Int[Array, "B steps"]]:
    """Runs up to ``steps`` (at most MAX_STEPS) decode steps, fewer when every row ends before.

    Returns the tokens of each step, -1 where a row had ended. ``steps`` is traced, ``reading`` static.
    """
    model = structure.model(params)

    def unfinished(turn, state, out):
        return (turn < steps) & (state.finish == RUNNING).any()

    def newest(turn, state, out):
        return state.token[:, None], (state.finish == RUNNING).astype(jnp.int32)

    def choose(turn, state, hidden, out):
        state, token = _choose(model, hidden[:, 0], state, rows)
        return state, out.at[:, turn].set(token)

    out = jnp.full((state.token.shape[0], MAX_STEPS), -1, jnp.int32)
    return feed(model, state, reading, out, unfinished=unfinished, tokens=newest, use=choose)


def feed(
    model: Llama,
    state: DecodeState,
    reading: Reading,
    carry: Any,
    *,
    unfinished: Callable[..., Bool[Array, ""]],
    tokens: Callable[..., tuple[Int[Array, "B n"], Int[Array, " B"]]],
    use: Callable[..., tuple[DecodeState, Any]],
) -> tuple[DecodeState, Any]:
    """Feeds a decode state turn by turn: the one loop around :func:`forward`, to be called inside ``jit``.

    - carry: what the caller records, any tree of arrays of fixed shapes.
    - unfinished: ``(turn, state, carry)`` gives whether there is another turn.
    - tokens: ``(turn, state, carry)`` gives the tokens of a turn, and how many of them each row takes.
    - use: ``(turn, state, hidden, carry)`` makes the next state and carry of the hidden states
      ``[B, n, embed]`` of these tokens, which ``state`` holds by then.

    Returns the last state and carry.
    """

    def step(carried):
        turn, state, carry = carried
        fed, counts = tokens(turn, state, carry)
        hidden, state = forward(model, state, fed, counts, reading)
        return turn + 1, *use(turn, state, hidden, carry)

    _, state, carry = jax.lax.while_loop(
        lambda carried: unfinished(*carried), step, (jnp.int32(0), state, carry)
    )
    return state, carry


def forward(model: Llama, state: DecodeState, tokens, counts, reading: Reading, *, prompt: bool = False):
    """Hidden states of ``counts[b]`` new tokens a row, and the state with them in the cache.

    A ``prompt`` is read as ``reading.estimate`` says, new tokens as ``reading.selection`` does.
    """
    layers, select, selected_at = list(state.layers), None, state.selected_at
    if reading.selection is not None and not prompt:
        select, selected_at = _due(state, counts, reading.selection)

    new = Tokens(state.page_table, state.lengths, counts)

    def attend(layer, q, k, v):
        out, layers[layer] = attend_and_append(
            q,
            k,
            v,
            layers[layer],
            new,
            selection=None if prompt else reading.selection_of(layer),
            select=select,
            estimate=reading.estimate if prompt else None,
        )
        return out

    positions = state.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    hidden = model.hidden(tokens, positions, attend)
    changed = {"layers": tuple(layers), "lengths": state.lengths + counts, "selected_at": selected_at}
    return hidden, dataclasses.replace(state, **changed)


def _due(state: DecodeState, counts, selection: Selection):
    """Which rows choose pages at this step, and when each row last did.

    A row counts its own tokens, from the first that is beyond the budget.
    """
    after = state.lengths + counts
    due = (state.selected_at == 0) | (after - state.selected_at >= selection.every)
    now = due & (after > selection.budget) & (counts > 0)
    return now, jnp.where(now, after, state.selected_at)


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
