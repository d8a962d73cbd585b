"""Greedy answers under many caches, to texts whose last part is fed to the decode step.

A sparse cache chooses what it reads at a decode step alone: the prompt's own pass sees the whole prompt. So a
question counts only where it is fed token by token, and not as the end of a prompt.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from jsparse.integers import cdiv, power_of_two_from
from jsparse.models import Llama
from jsparse.serve import loop
from jsparse.serve.batch import Batch
from jsparse.serve.config import CacheConfig
from jsparse.serve.layout import CacheLayout, Selections, check_fit, layout_of
from jsparse.serve.request import Request, check_ids
from jsparse.serve.sampling import SamplingParams
from jsparse.serve.state import DecodeState, ModelShape, ModelStructure, new_state

# Arrays are as long as a power of two, these at least: tasks seldom compile again for another length.
_SHORTEST_TAIL, _SHORTEST_ANSWER = 64, 16


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """``context`` is prefilled, ``tail`` fed to the decode step, and ``new_tokens`` are then decoded."""

    context: Int32[np.ndarray, " C"]
    tail: Int32[np.ndarray, " T"]
    new_tokens: int


def greedy_answers(
    model: Llama, questions: Sequence[Question], caches: Sequence[CacheConfig], *, batch_size: int = 16
) -> list[list[list[int]]]:
    """For each cache the ``new_tokens`` most likely tokens after each question, end tokens included.

    What a cache answers to a question depends on neither the other questions nor the other caches: they only
    share the work. ``batch_size`` questions are computed at a time, and caches that differ in nothing but
    what is read at a decode step share the prefill of the contexts.

    ``caches`` must leave ``batch`` and ``num_pages`` open; a ``capacity`` of None takes what the longest
    question needs, in whole pages. Raises ``ValueError`` before anything is computed where a question has an
    empty part or ids outside the vocabulary, or does not fit a cache or the model's positions;
    ``FloatingPointError`` where logits are not finite.

    >>> from flax import nnx
    >>> from jsparse.models import LlamaConfig
    >>> config = LlamaConfig.tiny(max_position_embeddings=256)
    >>> model = Llama(config, rngs=nnx.Rngs(0))
    >>> question = Question(np.arange(200, dtype=np.int32), np.arange(9, dtype=np.int32), new_tokens=3)
    >>> caches = [CacheConfig(policy="dense"), CacheConfig(budget=128)]
    >>> np.shape(greedy_answers(model, [question], caches, batch_size=1))
    (2, 1, 3)
    """
    _check(questions, caches, model.config.vocab_size, batch_size)
    needed = [len(q.context) + len(q.tail) + q.new_tokens for q in questions]
    layouts = [_layout(cache, model, max(needed), batch_size) for cache in caches]
    lengths, fed = [len(q.context) for q in questions], [len(q.tail) + q.new_tokens for q in questions]
    for layout in layouts:  # before the first batch runs; there are rows and pages enough for each batch
        pages = sum(map(layout.pages_of, needed))
        check_fit(layout, model.config, lengths, fed, free_rows=len(questions), free_pages=pages)
    shared = prefill_layouts(layouts)
    groups = {layout: [i for i, of in enumerate(shared) if of == layout] for layout in shared}
    answers: list[list[list[int]]] = [[] for _ in caches]
    for start in range(0, len(questions), batch_size):
        rows = list(questions[start : start + batch_size])
        arrays = _arrays(rows, questions, batch_size)
        for layout, members in groups.items():
            batch = prefilled(model, rows, layout)
            for i in members:
                state = _state_of(batch.state, layouts[i], batch.structure.shape)
                tokens, finite = _decode(
                    batch.structure, batch.params, state, *arrays, selections=layouts[i].selections
                )
                if not np.asarray(finite).all():
                    raise FloatingPointError(f"logits are not finite with the cache {caches[i]}")
                found = np.asarray(tokens)
                answers[i] += [found[row, : q.new_tokens].tolist() for row, q in enumerate(rows)]
    return answers


def prefill_layouts(layouts: Sequence[CacheLayout]) -> list[CacheLayout]:
    """The layout of the prefill that each layout can start from, equal where one prefill serves several.

    Prompts are read whole, whatever is selected later. What is kept of them differs in the bounds of the
    keys; a cache that needs none takes the pages from one with any.
    """

    def changed(layout: CacheLayout, **fields: None) -> CacheLayout:
        layers = tuple(dataclasses.replace(layer, **fields) for layer in layout.layers)
        return dataclasses.replace(layout, layers=layers)

    own = [changed(layout, selection=None) for layout in layouts]
    bare = [changed(layout, logical_page_size=None) for layout in own]
    kept: dict[CacheLayout, CacheLayout] = {}
    for without, layout in zip(bare, own, strict=True):
        if layout != without:
            kept.setdefault(without, layout)
    return [
        kept.get(without, layout) if layout == without else layout
        for without, layout in zip(bare, own, strict=True)
    ]


def prefilled(model: Llama, questions: Sequence[Question], layout: CacheLayout) -> Batch:
    """A batch whose rows hold the contexts, with pages for the rest of the questions too."""
    batch = Batch(model, layout)
    greedy = SamplingParams(ignore_eos=True)
    events = batch.add(
        [Request(q.context, len(q.tail) + q.new_tokens, greedy, 0, i) for i, q in enumerate(questions)]
    )
    if any(event.finish_reason == "error" for event in events):
        raise FloatingPointError("logits are not finite after a prompt")
    return batch


def _state_of(state: DecodeState, layout: CacheLayout, shape: ModelShape) -> DecodeState:
    """A prefilled state as ``layout`` decodes from it: without bounds that it does not read, with lists."""
    wanted = jax.eval_shape(lambda: new_state(layout, shape)).layers
    layers = []
    for layer, like in zip(state.layers, wanted, strict=True):
        paged, selected = layer.paged, like.selected
        if paged is not None and like.paged.bounds is None:
            paged = dataclasses.replace(paged, bounds=None)
        if selected is not None:
            selected = jnp.zeros(selected.shape, selected.dtype)
        layers.append(dataclasses.replace(layer, paged=paged, selected=selected))
    return dataclasses.replace(state, layers=tuple(layers))


# The state is not donated: other caches start from it too.
@functools.partial(jax.jit, static_argnames=("structure", "selections"))
def _decode(
    structure: ModelStructure,
    params: list[Array],
    state: DecodeState,
    tails: Int[Array, "B T"],
    tail_lengths: Int[Array, " B"],
    new_tokens: Int[Array, " B"],
    answers: Int[Array, "B A"],
    *,
    selections: Selections,
) -> tuple[Int[Array, "B A"], Bool[Array, " B"]]:
    """``answers`` with the greedy tokens after each tail, and whether all logits of a row were finite.

    A row is fed its tail, then what it answers, and stands still when it is done.
    """
    model = structure.model(params)
    row = jnp.arange(tails.shape[0])
    steps = tail_lengths + new_tokens - 1  # the last token is not fed

    def tail_or_newest(turn, state, carry):
        token, _, _ = carry
        fed = jnp.where(turn < tail_lengths, tails[:, jnp.minimum(turn, tails.shape[1] - 1)], token)
        return fed[:, None], (turn < steps).astype(jnp.int32)

    def answer(turn, state, hidden, carry):
        _, answers, finite = carry
        running = turn < steps
        logits = model.logits(hidden[:, 0])
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        place = turn - (tail_lengths - 1)
        place = jnp.where(running & (place >= 0), place, answers.shape[1])  # beyond: dropped
        finite &= jnp.isfinite(logits).all(axis=-1) | ~running
        return state, (token, answers.at[row, place].set(token, mode="drop"), finite)

    _, (_, answers, finite) = loop.feed(
        model,
        state,
        selections,
        (jnp.zeros_like(row, jnp.int32), answers, jnp.ones_like(row, bool)),
        unfinished=lambda turn, *_: turn < steps.max(),
        tokens=tail_or_newest,
        use=answer,
    )
    return answers, finite


def _layout(cache: CacheConfig, model: Llama, longest: int, batch_size: int) -> CacheLayout:
    page, _ = cache.page_sizes()
    capacity = cache.capacity or cdiv(longest, page) * page
    return layout_of(dataclasses.replace(cache, capacity=capacity, batch=batch_size), model.config)


def _arrays(rows: Sequence[Question], questions: Sequence[Question], batch_size: int):
    """Tails, their lengths, the numbers of new tokens, and room for answers; empty rows have one token."""
    longest_tail = max(_SHORTEST_TAIL, *(len(q.tail) for q in questions))
    longest_answer = max(_SHORTEST_ANSWER, *(q.new_tokens for q in questions))
    tails = np.zeros((batch_size, power_of_two_from(longest_tail)), np.int32)
    lengths, new = np.zeros(batch_size, np.int32), np.ones(batch_size, np.int32)
    for i, q in enumerate(rows):
        tails[i, : len(q.tail)] = q.tail
        lengths[i], new[i] = len(q.tail), q.new_tokens
    return tails, lengths, new, np.full((batch_size, power_of_two_from(longest_answer)), -1, np.int32)


def _check(
    questions: Sequence[Question], caches: Sequence[CacheConfig], vocab_size: int, batch_size: int
) -> None:
    if not questions or not caches:
        raise ValueError(f"questions and caches must not be empty, not {len(questions)} and {len(caches)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    for number, cache in enumerate(caches):
        for name in ("batch", "num_pages"):
            if getattr(cache, name) is not None:
                given = getattr(cache, name)
                raise ValueError(f"caches[{number}].{name} must be None, not {given}: batch_size decides")
    for number, question in enumerate(questions):
        for name in ("context", "tail"):
            check_ids(f"questions[{number}].{name}", getattr(question, name), vocab_size)
        if question.new_tokens < 1:
            raise ValueError(f"questions[{number}].new_tokens must be at least 1, not {question.new_tokens}")
