"""Sequences that are decoded together; each may join or leave at any time."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from jsparse.integers import power_of_two_from
from jsparse.models import Llama
from jsparse.serve import loop
from jsparse.serve.config import CacheConfig
from jsparse.serve.layout import CacheLayout, check_fit, layout_of
from jsparse.serve.pages import PageAllocator
from jsparse.serve.request import Request, check_requests
from jsparse.serve.sampling import GREEDY, RowParams
from jsparse.serve.state import (
    FINISH_REASONS,
    RUNNING,
    join,
    new_prefill_state,
    new_state,
    pool_of,
    split_model,
    stop,
    with_pool,
)


class TokenEvent(NamedTuple):
    """One new token of one prompt.

    - prompt: the number of the prompt, from 0.
    - token: its id; None for an error.
    - finish_reason: None unless the sequence ends here, otherwise as in :class:`GenerateResult`.
    """

    prompt: int
    token: int | None
    finish_reason: str | None


class Batch:
    """The rows of a cache and the pages that they share: continuous batching.

    Prompts can be added while others are running, as long as a row and enough pages are free. Each reserves
    all the pages that it can need, so it cannot run out later. Its row and pages are free again when it ends
    or is removed. The running rows wait while a new prompt is computed. What a sequence generates depends
    neither on the others nor on what its pages held before.

    - model: what generates.
    - cache: a :class:`CacheConfig` with ``capacity`` and ``batch`` given.

    Raises ValueError if ``cache`` lacks one of these or does not fit the model.

    >>> from flax import nnx
    >>> from jsparse.models import LlamaConfig
    >>> config = LlamaConfig.tiny(max_position_embeddings=128)
    >>> batch = Batch(Llama(config, rngs=nnx.Rngs(0)), CacheConfig(capacity=128, batch=2))
    >>> [event.prompt for event in batch.add_prompts([[1, 2, 3]], max_new_tokens=8)]
    [0]
    >>> events = batch.step(2) + batch.add_prompts([[4, 5]], max_new_tokens=8) + batch.step(1)
    >>> [event.prompt for event in events], batch.running
    ([0, 0, 1, 0, 1], 2)
    """

    def __init__(self, model: Llama, cache: CacheConfig | CacheLayout):
        config = model.config
        self.config = config
        self.layout = layout_of(cache, config) if isinstance(cache, CacheConfig) else cache
        self.structure, self.params = split_model(model)
        self.state = new_state(self.layout, self.structure.shape)
        self._rows = RowParams.of([], [], [], batch=self.layout.batch, vocab_size=config.vocab_size)
        self._device_rows = None
        self._allocator = PageAllocator(self.layout.num_pages)
        self._pages: dict[int, list[int]] = {}  # of each row in use
        self._prompts: dict[int, int] = {}  # row -> number of the prompt
        self._next = 0

    @property
    def running(self) -> int:
        """How many sequences have not ended."""
        return len(self._prompts)

    @property
    def free_pages(self) -> int:
        return self._allocator.free

    @property
    def cache_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state.layers))

    def add_prompts(
        self,
        prompts,
        max_new_tokens: int = 64,
        sampling=GREEDY,
        seed=0,
    ) -> list[TokenEvent]:
        """Adds prompts, and generates the first token of each. The arguments are those of ``generate``.

        Returns the events of these tokens. Prompts are numbered from 0 in the order in which they are added.

        Raises what ``generate`` raises, and ValueError if too few rows or pages are free. Nothing is added
        then.
        """
        return self.add(check_requests(self.config, prompts, max_new_tokens, sampling, seed))

    def add(self, requests: list[Request]) -> list[TokenEvent]:
        """:meth:`add_prompts` for requests that have been checked."""
        layout = self.layout
        lengths, max_new = [len(r.prompt) for r in requests], [r.max_new for r in requests]
        free = [row for row in range(layout.batch) if row not in self._prompts]
        check_fit(layout, self.config, lengths, max_new, free_rows=len(free), free_pages=self.free_pages)
        rows = free[: len(requests)]
        # A power of two of rows: another number of prompts seldom compiles again.
        width = min(layout.batch, power_of_two_from(len(requests)))
        table = np.full((width, layout.pages_of(layout.capacity)), layout.num_pages, np.int32)  # no page
        for i, row in enumerate(rows):
            count = layout.pages_of(lengths[i] + max_new[i])
            self._pages[row], self._prompts[row] = self._allocator.allocate(count), self._next + i
            table[i, :count] = self._pages[row]
        self._next += len(requests)
        params = RowParams.of(
            [r.sampling for r in requests],
            [r.seed for r in requests],
            max_new,
            batch=width,
            vocab_size=self.config.vocab_size,
            eos_token_ids=self.config.eos_token_ids,
        )
        for old, new in zip(jax.tree.leaves(self._rows), jax.tree.leaves(params), strict=True):
            old[rows] = new[: len(rows)]
        self._device_rows = jax.device_put(self._rows)

        joining = new_prefill_state(layout, self.structure.shape, width)
        joining = with_pool(dataclasses.replace(joining, page_table=table), pool_of(self.state))
        prompts = [r.prompt for r in requests]
        joining, hidden = loop.prefill(self.structure, self.params, joining, prompts, layout)
        joining, tokens = loop.first_token(self.structure, self.params, joining, hidden, params)
        finish = np.asarray(joining.finish)[: len(rows)]
        places = np.array([*rows, *[layout.batch] * (width - len(rows))], np.int32)
        self.state = join(self.state, joining, places)
        return self._events(rows, np.asarray(tokens), finish)

    def step(self, steps: int = 1) -> list[TokenEvent]:
        """Generates ``steps`` more tokens of every running sequence, fewer of those that end earlier.

        - steps: from 1 to 32.

        Returns the events step by step, those of one step in the order of the prompts.

        Raises ValueError for other ``steps``.
        """
        if not 1 <= steps <= loop.MAX_STEPS:
            raise ValueError(f"steps must be from 1 to {loop.MAX_STEPS}, not {steps!r}")
        if not self._prompts:
            return []
        self.state, tokens = loop.decode_steps(
            self.structure,
            self.params,
            self.state,
            self._device_rows,
            np.int32(steps),
            selections=self.layout.selections,
        )
        rows = sorted(self._prompts, key=self._prompts.__getitem__)
        finish = np.asarray(self.state.finish)[rows]
        return self._events(rows, np.asarray(tokens)[rows, :steps], finish)

    def remove(self, prompt: int) -> None:
        """Ends a sequence early. Raises KeyError if no prompt of this number is running."""
        rows = [row for row, number in self._prompts.items() if number == prompt]
        if not rows:
            raise KeyError(f"prompt {prompt} is not running; running are {sorted(self._prompts.values())}")
        self.state = stop(self.state, np.int32(rows[0]))
        self._release(rows[0])

    def _events(self, rows: list[int], tokens: np.ndarray, finish: np.ndarray) -> list[TokenEvent]:
        """The events of ``tokens`` [rows, steps], -1 where there is none; rows that have ended are freed."""
        events = []
        given = (tokens[: len(rows)] >= 0).sum(axis=1)
        for step in range(tokens.shape[1]):
            for i, row in enumerate(rows):
                reason = FINISH_REASONS.get(int(finish[i]))
                if step < given[i]:
                    last = step == given[i] - 1 and reason not in (None, "error")
                    events.append(
                        TokenEvent(self._prompts[row], int(tokens[i, step]), reason if last else None)
                    )
                elif step == given[i] and reason == "error":
                    events.append(TokenEvent(self._prompts[row], None, reason))
        for i, row in enumerate(rows):
            if finish[i] != RUNNING:
                self._release(row)
        return events

    def _release(self, row: int) -> None:
        del self._prompts[row]
        self._allocator.release(self._pages.pop(row))
