"""Sequences that are decoded together; each may join or leave at any time."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from tokenizers import Tokenizer

from jsparse.integers import is_integer, power_of_two_from
from jsparse.models import Llama
from jsparse.serve import loop
from jsparse.serve.config import CacheConfig
from jsparse.serve.kept_prompt import KeptPrompt, prefill_and_keep
from jsparse.serve.layout import CacheLayout, check_fit, layout_of
from jsparse.serve.logprobs import Scores, TokenLogprobs, on_host, token_logprobs
from jsparse.serve.pages import PageAllocator
from jsparse.serve.request import Request, check_requests
from jsparse.serve.sampling import GREEDY, RowParams, SamplingParams
from jsparse.serve.state import (
    FINISH_REASONS,
    RUNNING,
    DecodeState,
    join,
    new_prefill_state,
    new_state,
    pool_of,
    split_model,
    stop,
    with_pool,
)
from jsparse.serve.stop_strings import TextStream


class _Event(NamedTuple):
    prompt: int
    token: int | None
    finish_reason: str | None


class TokenEvent(_Event):
    """One new token of one sequence: a tuple of its number, token and end, with more beside it.

    - prompt: the number of the sequence, from 0: that of its prompt, unless prompts have several samples.
      Those follow one another.
    - token: its id; None for an error.
    - finish_reason: None unless the sequence ends here, otherwise as in :class:`GenerateResult`.
    - text: what may be printed now; "" without a tokenizer.
    - logprobs: of the token, if ``SamplingParams.logprobs`` asks for it.
    - prompt_logprobs: of the prompt's tokens, with the first new token, if asked for; None for the first.
    """

    text: str = ""
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class Batch:
    """The rows of a cache and the pages that they share: continuous batching.

    Prompts can be added while others are running, as long as a row and enough pages are free. Each reserves
    all the pages that it can need, so it cannot run out later. Its row and pages are free again when it ends
    or is removed. The running rows wait while a new prompt is computed. What a sequence generates depends
    neither on the others nor on what its pages held before.

    - model: what generates.
    - cache: a :class:`CacheConfig` with ``capacity`` and ``batch`` given.
    - tokenizer: that of the model, for events with text, and for stop strings.
    - keeps_prompt: with one row, keep the pages of the newest prompt. If the next one begins with them, it is
      computed from there on, and only then.

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

    def __init__(
        self,
        model: Llama,
        cache: CacheConfig | CacheLayout,
        tokenizer: Tokenizer | None = None,
        *,
        keeps_prompt: bool = False,
    ):
        config = model.config
        self.config = config
        self.tokenizer = tokenizer
        self.layout = layout_of(cache, config) if isinstance(cache, CacheConfig) else cache
        self.structure, self.params = split_model(model)
        self.state = new_state(self.layout, self.structure.shape)
        self._rows = RowParams.of([], [], [], batch=self.layout.batch, vocab_size=config.vocab_size)
        self._device_rows = None
        self._allocator = PageAllocator(self.layout.num_pages)
        self._pages: dict[int, list[int]] = {}  # of each row in use
        self._prompts: dict[int, int] = {}  # row -> number of the sequence
        self._requests: dict[int, Request] = {}  # of each row in use
        self._texts: dict[int, TextStream] = {}  # of each row in use, if there is a tokenizer
        self._next = 0
        if keeps_prompt and (self.layout.batch > 1 or any(self.layout.estimates)):
            raise ValueError("keeps_prompt=True is for a cache with batch=1 and without prefill_estimate")
        self._keeps_prompt = keeps_prompt
        self._kept: KeptPrompt | None = None
        self.reused_tokens = 0  # of the newest prompt, whose pages were kept

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
        sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
        seed: int | Sequence[int] = 0,
    ) -> list[TokenEvent]:
        """Adds prompts, and generates the first token of each. The arguments are those of ``generate``.

        Returns the events of these tokens. Prompts are numbered from 0 in the order in which they are added.

        Raises what ``generate`` raises, and ValueError if too few rows or pages are free. Nothing is added
        then.
        """
        return self.add(check_requests(self.config, prompts, max_new_tokens, sampling, seed, self.tokenizer))

    def add(self, requests: list[Request]) -> list[TokenEvent]:
        """:meth:`add_prompts` for requests that have been checked."""
        layout = self.layout
        lengths, max_new = [len(r.prompt) for r in requests], [r.max_new for r in requests]
        free = [row for row in range(layout.batch) if row not in self._prompts]
        numbers = [request.number for request in requests]
        free_pages = self.free_pages + len(self._kept_pages())
        check_fit(layout, self.config, lengths, max_new, numbers, free_rows=len(free), free_pages=free_pages)
        rows = free[: len(requests)]
        scored = any(r.sampling.prompt_logprobs is not None for r in requests)
        if scored or (self._kept is not None and not self._kept.begins(requests[0].prompt)):
            self._keep(None)
        shared = self._kept_pages()
        self._allocator.share(shared)
        # A power of two of rows: another number of prompts seldom compiles again.
        width = min(layout.batch, power_of_two_from(len(requests)))
        table = np.full((width, layout.pages_of(layout.capacity)), layout.num_pages, np.int32)  # no page
        for i, row in enumerate(rows):
            count = layout.pages_of(lengths[i] + max_new[i])
            self._pages[row] = [*shared, *self._allocator.allocate(count - len(shared))]
            self._prompts[row] = self._next + i
            table[i, :count] = self._pages[row]
            request = self._requests[row] = requests[i]
            if self.tokenizer is not None:
                how = request.sampling
                self._texts[row] = TextStream(
                    self.tokenizer, request.prompt.tolist(), how.stop, how.min_tokens
                )
        self._next += len(requests)
        params = RowParams.of(
            [r.sampling for r in requests],
            [r.seed for r in requests],
            max_new,
            batch=width,
            vocab_size=self.config.vocab_size,
            eos_token_ids=self.config.eos_token_ids,
            prompt_hashes=[r.prompt_hash for r in requests],
        )
        for old, new in zip(jax.tree.leaves(self._rows), jax.tree.leaves(params), strict=True):
            old[rows] = new[: len(rows)]
        self._device_rows = jax.device_put(self._rows)

        joining = new_prefill_state(layout, self.structure.shape, width)
        joining = with_pool(dataclasses.replace(joining, page_table=table), pool_of(self.state))
        prompts = [r.prompt for r in requests]
        model, prompt_scores = (self.structure, self.params), None
        self.reused_tokens = 0 if self._kept is None else len(self._kept.tokens)
        if scored:
            joining, hidden, prompt_scores = loop.scored_prefill(*model, joining, prompts, layout)
        elif self._keeps_prompt:
            joining, hidden, kept = prefill_and_keep(*model, joining, prompts[0], layout, self._kept)
            self._keep(kept)
        else:
            joining, hidden = loop.prefill(*model, joining, prompts, layout)
        joining, tokens = loop.first_token(self.structure, self.params, joining, hidden, params)
        finish = np.asarray(joining.finish)[: len(rows)]
        scores = self._scores(joining, rows, slice(len(rows)))
        places = np.array([*rows, *[layout.batch] * (width - len(rows))], np.int32)
        self.state = join(self.state, joining, places)
        events = self._events(rows, np.asarray(tokens), finish, scores)
        if prompt_scores is not None:
            for i, (event, request) in enumerate(zip(events, requests, strict=True)):
                event.prompt_logprobs = _prompt_logprobs(prompt_scores, i, request)
        return events

    def step(self, steps: int = 1) -> list[TokenEvent]:
        """Generates ``steps`` more tokens of every running sequence, fewer of those that end earlier.

        - steps: from 1 to 32.

        Returns the events step by step, those of one step in the order of the prompts.

        Raises ValueError for other ``steps``.
        """
        if not is_integer(steps) or not 1 <= steps <= loop.MAX_STEPS:
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
        finish, scores = np.asarray(self.state.finish)[rows], self._scores(self.state, rows, rows)
        return self._events(rows, np.asarray(tokens)[rows, :steps], finish, scores)

    def remove(self, prompt: int) -> None:
        """Ends a sequence early. Raises KeyError if no prompt of this number is running."""
        rows = [row for row, number in self._prompts.items() if number == prompt]
        if not rows:
            raise KeyError(f"prompt {prompt} is not running; running are {sorted(self._prompts.values())}")
        self.state = stop(self.state, np.int32(rows[0]))
        self._release(rows[0])

    def _scores(self, state: DecodeState, rows: list[int], places: slice | list[int]) -> Scores | None:
        """The scores of ``rows``, which lie at ``places`` of the state; None if none of them asks."""
        if all(self._requests[row].sampling.logprobs is None for row in rows):
            return None
        return jax.tree.map(lambda x: x[places], on_host(state.scores))

    def _events(
        self, rows: list[int], tokens: np.ndarray, finish: np.ndarray, scores: Scores | None
    ) -> list[TokenEvent]:
        """The events of ``tokens`` [rows, steps], -1 where there is none; rows that have ended are freed.

        A row ends in the middle of the steps where a stop string is complete; what came after is dropped.
        """
        events: list[TokenEvent] = []
        ended: dict[int, int] = {}  # row -> its place
        given = (tokens[: len(rows)] >= 0).sum(axis=1)
        for step in range(tokens.shape[1]):
            for i, row in enumerate(rows):
                if row in ended:
                    continue
                reason, event = FINISH_REASONS.get(int(finish[i])), None
                if step < given[i]:
                    last = step == given[i] - 1 and reason != "error"
                    event = self._event(row, int(tokens[i, step]), reason if last else None)
                    top = self._requests[row].sampling.logprobs
                    if scores is not None and top is not None:
                        event.logprobs = token_logprobs(scores, i, step, top)
                elif step == given[i] and reason == "error":
                    event = self._event(row, None, reason)
                if event is not None:
                    events.append(event)
                    if event.finish_reason is not None:
                        ended[row] = i
        for row, i in ended.items():
            if finish[i] == RUNNING:  # a stop string
                self.state = stop(self.state, np.int32(row))
            self._release(row)
        return events

    def _event(self, row: int, token: int | None, reason: str | None) -> TokenEvent:
        """An event with its text; a stop string makes it the last one."""
        stream = self._texts.get(row)
        if stream is None:
            return TokenEvent(self._prompts[row], token, reason)
        text = "" if token is None else stream.feed(token)
        if reason is not None:
            text += stream.end()
        event = TokenEvent(self._prompts[row], token, "stop" if stream.stopped else reason)
        event.text = text
        return event

    def _kept_pages(self) -> tuple[int, ...]:
        return () if self._kept is None else self._kept.pages

    def _keep(self, kept: KeptPrompt | None) -> None:
        """Replaces what is kept, and owns its pages."""
        old, self._kept = self._kept_pages(), kept
        self._allocator.share(self._kept_pages())
        self._allocator.release(old)

    def _release(self, row: int) -> None:
        del self._prompts[row], self._requests[row]
        self._texts.pop(row, None)
        self._allocator.release(self._pages.pop(row))


def _prompt_logprobs(scores: Scores, row: int, request: Request) -> list[TokenLogprobs | None] | None:
    """Those of each token of a prompt, None for the first, which nothing comes before."""
    top = request.sampling.prompt_logprobs
    if top is None:
        return None
    return [None, *(token_logprobs(scores, row, place, top) for place in range(len(request.prompt) - 1))]
