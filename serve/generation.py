"""Text generation from a list of prompts: checks on the host, then prefill and decode on the device."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from jsparse.models import Llama
from jsparse.serve import loop
from jsparse.serve.batch import Batch, TokenEvent
from jsparse.serve.config import CacheConfig
from jsparse.serve.layout import plan_cache
from jsparse.serve.logprobs import TokenLogprobs
from jsparse.serve.request import Request, check_requests
from jsparse.serve.sampling import GREEDY, SamplingParams

DENSE = CacheConfig(policy="dense")  # the cache if none is given


@dataclasses.dataclass(frozen=True)
class GenerateStats:
    """What a generation took. The first call for a model, a batch and a capacity includes compiling.

    - prefill_seconds: until every prompt has its first new token.
    - decode_seconds: for all tokens after it.
    - decode_steps: each gives a token to every prompt that has not ended.
    - prompt_tokens, new_tokens: of all prompts together.
    - decoded_tokens: the new tokens without the first of each prompt.
    - cache_bytes: the size of the cache.
    """

    prefill_seconds: float
    decode_seconds: float
    decode_steps: int
    prompt_tokens: int
    new_tokens: int
    decoded_tokens: int
    cache_bytes: int

    @property
    def decode_tokens_per_second(self) -> float:
        """Over all prompts; 0 if nothing was decoded."""
        return self.decoded_tokens / self.decode_seconds if self.decoded_tokens else 0.0


@dataclasses.dataclass(frozen=True)
class GenerateResult:
    """The new tokens of each sequence, and why each ended.

    There is one sequence per prompt. Where ``SamplingParams.n`` asks for more, all samples of the first
    prompt come first, then those of the second, and so on.

    - tokens: ``tokens[i]`` are the new tokens of sequence ``i``, a stop token included (as in Hugging Face
      and vLLM), and those of a stop string.
    - finish_reasons: one per sequence: "stop" (a stop token or a stop string came), "length"
      (``max_new_tokens`` came) or "error" (the logits were not finite; the tokens before that are kept).
    - stats: times and counts.
    - texts: one per sequence, cut before a stop string, without special tokens; none without a tokenizer.
    - logprobs: for each sequence those of its new tokens, or None if its parameters do not ask for them.
    - prompt_logprobs: for each sequence those of its prompt's tokens, the first of which has None; or None.
    """

    tokens: list[list[int]]
    finish_reasons: list[str]
    stats: GenerateStats
    texts: Sequence[str] = ()
    logprobs: Sequence[list[TokenLogprobs] | None] = ()
    prompt_logprobs: Sequence[list[TokenLogprobs | None] | None] = ()


def generate(
    model: Llama,
    prompts: Sequence[Any],
    max_new_tokens: int = 64,
    sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
    cache: CacheConfig | None = None,
    seed: int | Sequence[int] = 0,
    tokenizer: Tokenizer | None = None,
) -> GenerateResult:
    """Continues each prompt by up to ``max_new_tokens`` tokens.

    A sequence's tokens depend only on its prompt, parameters and seed, not on the others in the batch: equal
    prompts with one seed give equal samples. Calls with the same batch and capacity share their compiled
    functions, whatever the prompt lengths and sampling parameters. Give ``CacheConfig`` a ``batch`` and a
    ``capacity`` to make them the same.

    - model: what generates.
    - prompts: lists of token ids, of any lengths.
    - max_new_tokens: at which length a continuation ends.
    - sampling, seed: one for all prompts, or one for each.
    - cache: how much each head reads. None reads everything, as ``jsparse generate`` does without options;
      ``CacheConfig()`` is LServe's, which reads at most 4096 tokens of the context per step.
    - tokenizer: that of the model, for texts beside the tokens; ``SamplingParams.stop`` needs it.

    Returns the new tokens of each prompt, why it ended, and times.

    Raises, before anything runs, ValueError for an argument out of range (no prompts, an empty prompt, ids
    outside the vocabulary, prompt and new tokens beyond the capacity or the model's positions, a cache that
    does not fit the model, stop strings without a tokenizer), and TypeError for a ``sampling``, ``seed``,
    ``cache`` or ``tokenizer`` of another type.

    >>> from flax import nnx
    >>> from jsparse.models import Llama, LlamaConfig
    >>> config = LlamaConfig.tiny()
    >>> result = generate(Llama(config, rngs=nnx.Rngs(0)), [[1, 2, 3], [4]], max_new_tokens=5)
    >>> [len(tokens) for tokens in result.tokens], result.finish_reasons
    ([5, 5], ['length', 'length'])
    """
    requests, batch = _start(model, prompts, max_new_tokens, sampling, cache, seed, tokenizer)
    of_each: list[list[TokenEvent]] = [[] for _ in requests]
    steps = 0
    start = first = time.perf_counter()
    for number, events in enumerate(_calls(batch, requests, steps=loop.MAX_STEPS)):
        before = [len(row) for row in of_each]
        for event in events:
            of_each[event.prompt].append(event)
        if number == 0:
            first = time.perf_counter()
        else:
            steps += max(_count(row[old:]) for row, old in zip(of_each, before, strict=True))
    tokens = [[event.token for event in row if event.token is not None] for row in of_each]
    new_tokens = sum(map(len, tokens))
    return GenerateResult(
        tokens,
        [row[-1].finish_reason or "" for row in of_each],
        GenerateStats(
            prefill_seconds=first - start,
            decode_seconds=time.perf_counter() - first,
            decode_steps=steps,
            prompt_tokens=sum(len(request.prompt) for request in requests),
            new_tokens=new_tokens,
            decoded_tokens=new_tokens - sum(map(bool, tokens)),
            cache_bytes=batch.cache_bytes,
        ),
        texts=[] if tokenizer is None else ["".join(event.text for event in row) for row in of_each],
        logprobs=[
            None
            if request.sampling.logprobs is None
            else [event.logprobs for event in row if event.logprobs is not None]
            for request, row in zip(requests, of_each, strict=True)
        ],
        prompt_logprobs=[row[0].prompt_logprobs for row in of_each],
    )


def _count(events: list[TokenEvent]) -> int:
    return sum(event.token is not None for event in events)


def stream(
    model: Llama,
    prompts: Sequence[Any],
    max_new_tokens: int = 64,
    sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
    cache: CacheConfig | None = None,
    seed: int | Sequence[int] = 0,
    tokenizer: Tokenizer | None = None,
) -> Iterator[TokenEvent]:
    """:func:`generate`, token by token as they come: the same arguments, errors and tokens.

    Returns an iterator over the events of all steps, those of one step in the order of the prompts. Prompts
    that have ended have none. What an event has beside its token is in :class:`TokenEvent`.

    >>> from flax import nnx
    >>> from jsparse.models import Llama, LlamaConfig
    >>> config = LlamaConfig.tiny()
    >>> events = stream(Llama(config, rngs=nnx.Rngs(0)), [[1, 2, 3]], max_new_tokens=2)
    >>> [(event.prompt, event.finish_reason) for event in events]
    [(0, None), (0, 'length')]
    """
    requests, batch = _start(model, prompts, max_new_tokens, sampling, cache, seed, tokenizer)
    return (event for events in _calls(batch, requests, steps=1) for event in events)


def _start(
    model, prompts, max_new_tokens, sampling, cache, seed, tokenizer=None
) -> tuple[list[Request], Batch]:
    """Checks every argument before anything is launched."""
    requests = check_requests(model.config, prompts, max_new_tokens, sampling, seed, tokenizer)
    cache = DENSE if cache is None else cache
    if not isinstance(cache, CacheConfig):
        raise TypeError(f"cache must be a CacheConfig or None, not {cache!r}")
    lengths, max_new = [len(r.prompt) for r in requests], [r.max_new for r in requests]
    numbers = [r.number for r in requests]
    layout = plan_cache(cache, model.config, lengths, max_new, numbers)
    return requests, Batch(model, layout, tokenizer)


def _calls(batch: Batch, requests: list[Request], *, steps: int) -> Iterator[list[TokenEvent]]:
    """The events of the first tokens, then those of each call, until every prompt has ended."""
    yield batch.add(requests)
    while batch.running:
        yield batch.step(steps)
