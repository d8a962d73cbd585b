"""The device side of generation: prefill, choose a first token, decode a number of steps.

Only these functions run the model. They are compiled once per model structure, batch and capacity, and donate
their state: the cache is updated in place. ``generate`` and ``stream`` call the same ones.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jsparse.cache.layer import attend_and_append
from jsparse.cache.select.selection import Selection
from jsparse.cache.tokens import Tokens
from jsparse.models import Llama
from jsparse.serve.draw import sample
from jsparse.serve.layout import CacheLayout, Estimates, Selections
from jsparse.serve.logprobs import Scores, on_host, score
from jsparse.serve.penalties import with_prompt, with_token
from jsparse.serve.sampling import RowParams
from jsparse.serve.state import ERROR, LENGTH, MAX_STEPS, RUNNING, STOP, DecodeState, ModelStructure

_SCORED_AT_ONCE = 64  # prompt tokens whose logits are held at a time


def prefill(
    structure: ModelStructure,
    params: list[Array],
    state: DecodeState,
    prompts: list[np.ndarray],
    layout: CacheLayout,
) -> tuple[DecodeState, Float[Array, "B embed"]]:
    """The state with the prompts in it, chunk by chunk, and the hidden state of each one's last token."""
    hidden = _no_hidden(structure, state)
    for tokens, counts, _ in _chunks(prompts, state.lengths.shape[0], layout.prefill_chunk):
        state, hidden = prefill_chunk(
            structure, params, state, hidden, tokens, counts, estimates=layout.estimates
        )
    return state, hidden


def scored_prefill(
    structure: ModelStructure,
    params: list[Array],
    state: DecodeState,
    prompts: list[np.ndarray],
    layout: CacheLayout,
) -> tuple[DecodeState, Float[Array, "B embed"], Scores]:
    """:func:`prefill`, and the scores of each prompt's tokens from the second on, as NumPy arrays."""
    hidden, chunks = _no_hidden(structure, state), []
    for tokens, counts, targets in _chunks(prompts, state.lengths.shape[0], layout.prefill_chunk):
        state, hidden, scores = scored_prefill_chunk(
            structure, params, state, hidden, tokens, counts, targets, estimates=layout.estimates
        )
        chunks.append(on_host(scores))
    return state, hidden, jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *chunks)


def _no_hidden(structure: ModelStructure, state: DecodeState) -> Float[Array, "B embed"]:
    shape = structure.shape
    return jax.device_put(np.zeros((state.lengths.shape[0], shape.hidden_size), shape.dtype))


def _chunks(prompts: list[np.ndarray], batch: int, size: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Chunks [batch, size] of the prompts, how many tokens each row has there, and the tokens after them."""
    for start in range(0, max(map(len, prompts)), size):
        tokens, targets = np.zeros((2, batch, size), np.int32)
        counts = np.zeros(batch, np.int32)
        for row, prompt in enumerate(prompts):
            piece, after = prompt[start : start + size], prompt[start + 1 : start + size + 1]
            tokens[row, : len(piece)], targets[row, : len(after)] = piece, after
            counts[row] = len(piece)
        yield tokens, counts, targets


@functools.partial(jax.jit, static_argnames=("structure", "estimates"), donate_argnames=("state", "hidden"))
def prefill_chunk(
    structure: ModelStructure,
    params: list[Array],
    state: DecodeState,
    hidden: Float[Array, "B embed"],
    tokens: Int[Array, "B C"],
    counts: Int[Array, " B"],
    *,
    estimates: Estimates,
) -> tuple[DecodeState, Float[Array, "B embed"]]:
    """Takes the next ``counts[b]`` of ``C`` prompt tokens of each row into the cache.

    ``hidden`` is that of each row's newest token: a row that gets none of the chunk keeps its own.
    """
    state, hidden, _ = _take_chunk(structure.model(params), state, hidden, tokens, counts, estimates)
    return state, hidden


@functools.partial(jax.jit, static_argnames=("structure", "estimates"), donate_argnames=("state", "hidden"))
def scored_prefill_chunk(
    structure: ModelStructure,
    params: list[Array],
    state: DecodeState,
    hidden: Float[Array, "B embed"],
    tokens: Int[Array, "B C"],
    counts: Int[Array, " B"],
    targets: Int[Array, "B C"],
    *,
    estimates: Estimates,
) -> tuple[DecodeState, Float[Array, "B embed"], Scores]:
    """:func:`prefill_chunk`, and the scores of ``targets``, the tokens that follow those of the chunk."""
    model = structure.model(params)
    state, hidden, chunk = _take_chunk(model, state, hidden, tokens, counts, estimates)
    # Logits of a whole chunk might not fit: a few places at a time.
    places = max(1, _SCORED_AT_ONCE // tokens.shape[0])
    scores = jax.lax.map(
        lambda place: score(model.logits(place[0])[:, None], place[1][:, None]),
        (chunk.swapaxes(0, 1), targets.T),
        batch_size=places,
    )
    return state, hidden, jax.tree.map(lambda x: x[:, :, 0].swapaxes(0, 1), scores)


def _take_chunk(model: Llama, state: DecodeState, hidden, tokens, counts, estimates: Estimates):
    """The state with a chunk, the hidden state of each row's newest token, and those of the chunk."""
    chunk, state = forward(model, state, tokens, counts, estimates=estimates)
    state = dataclasses.replace(state, history=with_prompt(state.history, tokens, counts))
    newest = jnp.take_along_axis(chunk, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return state, jnp.where(counts[:, None] > 0, newest, hidden), chunk


@functools.partial(jax.jit, static_argnames="structure", donate_argnames="state")
def first_token(
    structure: ModelStructure,
    params: list[Array],
    state: DecodeState,
    hidden: Float[Array, "B embed"],
    rows: RowParams,
) -> tuple[DecodeState, Int[Array, "B 1"]]:
    """Chooses the token after each prompt, or -1 if its logits are not finite."""
    state, token = _choose(structure.model(params), hidden, state, rows, 0)
    return state, token[:, None]


@functools.partial(jax.jit, static_argnames=("structure", "selections"), donate_argnames="state")
def decode_steps(
    structure: ModelStructure,
    params: list[Array],
    state: DecodeState,
    rows: RowParams,
    steps: Int[Array, ""],
    *,
    selections: Selections,
) -> tuple[DecodeState, Int[Array, "B steps"]]:
    """Runs ``steps`` (at most MAX_STEPS) decode steps, fewer if every row ends earlier.

    Returns the state and the tokens of each step, -1 for a row that had ended. ``steps`` is traced.
    """
    model = structure.model(params)

    def unfinished(turn, state, out):
        return (turn < steps) & (state.finish == RUNNING).any()

    def newest(turn, state, out):
        return state.token[:, None], (state.finish == RUNNING).astype(jnp.int32)

    def choose(turn, state, hidden, out):
        state, token = _choose(model, hidden[:, 0], state, rows, turn)
        return state, out.at[:, turn].set(token)

    out = jnp.full((state.token.shape[0], MAX_STEPS), -1, jnp.int32)
    return feed(model, state, selections, out, unfinished=unfinished, tokens=newest, use=choose)


@runtime_checkable
class Decoder(Protocol):
    """What is fed: a Llama, or anything whose layers attend as its layers do."""

    def hidden(self, tokens: Any, positions: Any, attend: Any) -> Any: ...


def feed(
    model: Decoder,
    state: DecodeState,
    selections: Selections,
    carry: Any,
    *,
    unfinished: Callable[..., Bool[Array, ""]],
    tokens: Callable[..., tuple[Int[Array, "B n"], Int[Array, " B"]]],
    use: Callable[..., tuple[DecodeState, Any]],
) -> tuple[DecodeState, Any]:
    """Feeds a decode state turn by turn: the one loop around :func:`forward`, to be called inside ``jit``.

    - carry: what the caller records, any tree of arrays of fixed shapes.
    - unfinished: ``(turn, state, carry)`` returns whether there is another turn.
    - tokens: ``(turn, state, carry)`` returns the tokens of a turn, and how many of them each row takes.
    - use: ``(turn, state, hidden, carry)`` returns the next state and carry. ``hidden`` are the hidden states
      ``[B, n, embed]`` of these tokens, which ``state`` already holds.

    Returns the last state and carry.
    """

    def step(carried):
        turn, state, carry = carried
        fed, counts = tokens(turn, state, carry)
        hidden, state = forward(model, state, fed, counts, selections=selections)
        return turn + 1, *use(turn, state, hidden, carry)

    _, state, carry = jax.lax.while_loop(
        lambda carried: unfinished(*carried), step, (jnp.int32(0), state, carry)
    )
    return state, carry


def forward(
    model: Decoder,
    state: DecodeState,
    tokens: Int[Array, "B n"],
    counts: Int[Array, " B"],
    *,
    selections: Selections = (),
    estimates: Estimates = (),
) -> tuple[Float[Array, "B n ..."], DecodeState]:
    """Hidden states of ``counts[b]`` new tokens per row, and the state with them in the cache.

    Each layer reads what its selection says, or for a chunk of a prompt its estimate.
    """
    layers, select, selected_at = list(state.layers), None, state.selected_at
    selections = selections or (None,) * len(layers)
    estimates = estimates or (None,) * len(layers)
    # All layers that choose pages do so at the same steps.
    selection = next((one for one in selections if one is not None), None)
    if selection is not None:
        select, selected_at = _due(state, counts, selection)

    new = Tokens(state.page_table, state.lengths, counts)

    def attend(layer, q, k, v):
        out, layers[layer] = attend_and_append(
            q,
            k,
            v,
            layers[layer],
            new,
            selection=selections[layer],
            select=select,
            estimate=estimates[layer],
        )
        return out

    positions = state.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    hidden = model.hidden(tokens, positions, attend)
    changed = {"layers": tuple(layers), "lengths": state.lengths + counts, "selected_at": selected_at}
    return hidden, dataclasses.replace(state, **changed)


def _due(state: DecodeState, counts, selection: Selection):
    """Which rows choose pages at this step, and the length at which each row last did.

    Each row counts its own tokens, from the first one beyond the budget.
    """
    after = state.lengths + counts
    due = (state.selected_at == 0) | (after - state.selected_at >= selection.every)
    now = due & (after > selection.budget) & (counts > 0)
    return now, jnp.where(now, after, state.selected_at)


def _choose(model: Llama, hidden, state: DecodeState, rows: RowParams, turn: int | Int[Array, ""]):
    """Chooses the next token of each running row (-1 for none), and ends rows in the state.

    Scores of the tokens that ask for them are those of this ``turn`` in the state.
    """
    running = state.finish == RUNNING
    logits = model.logits(hidden)
    token, finite = sample(
        logits,
        rows,
        state.history,
        generated=state.generated,
        positions=state.lengths,
        running=running,
    )
    scores = jax.lax.cond(
        (rows.scored & running).any(),
        lambda: score(logits[:, None], token[:, None]),
        lambda: Scores.zeros(len(token), 1, logits.shape[-1]),  # spares the search for the most likely
    )
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
        history=with_token(state.history, token, chosen),
        scores=jax.tree.map(lambda all, new: all.at[:, turn].set(new[:, 0]), state.scores, scores),
    )
    return state, jnp.where(chosen, token, -1)
