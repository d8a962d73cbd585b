"""Text generation from a list of prompts: checks on the host, then prefill and decode on the device."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jsparse.models import Llama, LlamaConfig
from jsparse.serve import loop
from jsparse.serve.config import CacheConfig, CacheLayout, is_integer, plan_cache
from jsparse.serve.sampling import RowParams, SamplingParams


@dataclasses.dataclass(frozen=True)
class GenerateStats:
    """What a generation took. The first call for a model, a batch and a capacity includes compiling."""

    prefill_seconds: float  # until every row has its first token
    decode_seconds: float  # all tokens after it
    decode_steps: int  # each gives a token to every row that has not ended
    prompt_tokens: int
    new_tokens: int
    decoded_tokens: int  # new tokens but the first of each row
    cache_bytes: int

    @property
    def decode_tokens_per_second(self) -> float:
        """Over all rows; 0 where nothing was decoded."""
        return self.decoded_tokens / self.decode_seconds if self.decoded_tokens else 0.0


@dataclasses.dataclass(frozen=True)
class GenerateResult:
    """The new tokens of each prompt, and why each ended.

    ``tokens[i]`` are the tokens after prompt ``i``, a stop token included (as in Hugging Face and vLLM).
    ``finish_reasons[i]`` is "stop" (a stop token came), "length" (``max_new_tokens`` came) or "error" (the
    logits were not finite; tokens before that are kept).
    """

    tokens: list[list[int]]
    finish_reasons: list[str]
    stats: GenerateStats


class TokenEvent(NamedTuple):
    """One new token of one prompt; ``finish_reason`` where it is the last. An error has no token."""

    prompt: int
    token: int | None
    finish_reason: str | None


def generate(
    model: Llama,
    prompts: Sequence[Any],
    max_new_tokens: int = 64,
    sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(temperature=0.0),  # noqa: B008, it is frozen
    cache: CacheConfig = CacheConfig(),  # noqa: B008
    seed: int | Sequence[int] = 0,
) -> GenerateResult:
    """Continues each prompt, a list of token ids, by up to ``max_new_tokens`` tokens.

    ``prompts`` may be of any lengths. ``sampling`` and ``seed`` are one for all prompts, or one for each.
    ``cache`` says how much each head reads; its default reads everything up to 4096 tokens of context.

    A sequence's tokens depend on its prompt, parameters and seed alone, not on the others of the batch: equal
    prompts with one seed give equal samples. Calls that need the same batch and capacity share their compiled
    functions, whatever the prompt lengths and sampling parameters; give ``CacheConfig`` a ``batch`` and a
    ``capacity`` to make them the same.

    Raises ``ValueError`` before anything runs where an argument is out of range: no prompts, an empty prompt,
    ids outside the vocabulary, prompt and new tokens beyond the capacity or the model's positions, a cache
    configuration that does not fit the model.

    >>> from flax import nnx
    >>> from jsparse.models import Llama, LlamaConfig
    >>> config = LlamaConfig(
    ...     vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    ... )
    >>> result = generate(Llama(config, rngs=nnx.Rngs(0)), [[1, 2, 3], [4]], max_new_tokens=5)
    >>> [len(tokens) for tokens in result.tokens], result.finish_reasons
    ([5, 5], ['length', 'length'])
    """
    request = _check(model.config, prompts, max_new_tokens, sampling, cache, seed)
    count = len(request.prompts)
    tokens: list[list[int]] = [[] for _ in range(count)]
    steps, finish, cache_bytes = 0, np.zeros(count, np.int32), 0
    start = first = time.perf_counter()
    for number, call in enumerate(_run(model, request, steps_per_call=loop.MAX_STEPS)):
        for row in range(count):
            tokens[row] += [int(token) for token in call.tokens[row] if token >= 0]
        finish, cache_bytes = call.finish, call.cache_bytes
        if number == 0:
            first = time.perf_counter()
        else:
            steps += int((call.tokens >= 0).any(axis=0).sum())
    new_tokens = sum(map(len, tokens))
    return GenerateResult(
        tokens,
        [loop.FINISH_REASONS[int(code)] for code in finish],
        GenerateStats(
            prefill_seconds=first - start,
            decode_seconds=time.perf_counter() - first,
            decode_steps=steps,
            prompt_tokens=sum(map(len, request.prompts)),
            new_tokens=new_tokens,
            decoded_tokens=new_tokens - sum(map(bool, tokens)),
            cache_bytes=cache_bytes,
        ),
    )


def stream(
    model: Llama,
    prompts: Sequence[Any],
    max_new_tokens: int = 64,
    sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(temperature=0.0),  # noqa: B008, it is frozen
    cache: CacheConfig = CacheConfig(),  # noqa: B008
    seed: int | Sequence[int] = 0,
) -> Iterator[TokenEvent]:
    """What :func:`generate` gives, token by token as they come: the same arguments, checks and tokens.

    Yields the events of one step in the order of the prompts; those that have ended have none.

    >>> from flax import nnx
    >>> from jsparse.models import Llama, LlamaConfig
    >>> config = LlamaConfig(
    ...     vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    ... )
    >>> events = stream(Llama(config, rngs=nnx.Rngs(0)), [[1, 2, 3]], max_new_tokens=2)
    >>> [(event.prompt, event.finish_reason) for event in events]
    [(0, None), (0, 'length')]
    """
    request = _check(model.config, prompts, max_new_tokens, sampling, cache, seed)
    return _events(_run(model, request, steps_per_call=1))


@dataclasses.dataclass(frozen=True)
class _Request:
    """What was asked for, checked, as arrays of a shape that the layout decides."""

    prompts: list[np.ndarray]
    rows: RowParams
    layout: CacheLayout


class _Call(NamedTuple):
    """What one call to the device gave: tokens [prompts, steps], -1 for none, and why prompts have ended."""

    tokens: np.ndarray
    finish: np.ndarray
    cache_bytes: int


def _run(model: Llama, request: _Request, *, steps_per_call: int) -> Iterator[_Call]:
    """Prefills, then decodes until every prompt has ended: the first tokens alone, then call by call."""
    layout, count = request.layout, len(request.prompts)
    structure, params = loop.split_model(model)
    rows = jax.device_put(request.rows)
    state, hidden = loop.prefill(model, structure, params, request.prompts, layout)
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.layers))
    state, tokens = loop.first_token(structure, params, state, hidden, rows)
    yield _Call(np.asarray(tokens)[:count], np.asarray(state.finish)[:count], cache_bytes)

    while (np.asarray(state.finish)[:count] == loop.RUNNING).any():
        state, tokens = loop.decode_steps(
            structure, params, state, rows, np.int32(steps_per_call), budget=layout.budget
        )
        yield _Call(
            np.asarray(tokens)[:count, :steps_per_call], np.asarray(state.finish)[:count], cache_bytes
        )


def _events(calls: Iterator[_Call]) -> Iterator[TokenEvent]:
    ended: set[int] = set()
    for call in calls:
        for row in range(len(call.finish)):
            if row in ended:
                continue
            reason = loop.FINISH_REASONS.get(int(call.finish[row]))
            if reason is not None:
                ended.add(row)
            token = int(call.tokens[row, 0])
            yield TokenEvent(row, None if token < 0 else token, reason)


def _check(model: LlamaConfig, prompts, max_new_tokens, sampling, cache, seed) -> _Request:
    """Everything that can be wrong, before anything is launched."""
    prompts = _check_prompts(prompts, model.vocab_size)
    if not is_integer(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an integer >= 1, not {max_new_tokens!r}")
    sampling = _one_each("sampling", sampling, SamplingParams, len(prompts))
    for params in sampling:
        beyond = [token for token in params.stop_token_ids if token >= model.vocab_size]
        if beyond:
            raise ValueError(
                f"stop_token_ids has {beyond[0]}; ids must be less than vocab_size={model.vocab_size}"
            )
    seeds = _one_each("seed", seed, int | np.integer, len(prompts))
    for one in seeds:
        if not is_integer(one) or not 0 <= one < 2**32:
            raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, not {one!r}")
    if not isinstance(cache, CacheConfig):
        raise TypeError(f"cache must be a CacheConfig, not {cache!r}")
    layout = plan_cache(cache, model, [len(prompt) for prompt in prompts], int(max_new_tokens))
    rows = RowParams.of(
        sampling,
        seeds,
        batch=layout.batch,
        max_new=int(max_new_tokens),
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
    )
    return _Request(prompts, rows, layout)


def _check_prompts(prompts, vocab_size: int) -> list[np.ndarray]:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence | np.ndarray) or len(prompts) == 0:
        raise ValueError(f"prompts must be a list of at least one list of token ids, not {prompts!r}")
    checked = []
    for number, prompt in enumerate(prompts):
        name = f"prompts[{number}]"
        if isinstance(prompt, str) or not isinstance(prompt, Sequence | np.ndarray | jax.Array):
            raise ValueError(f"{name} must be a list of token ids, not {prompt!r}")
        if len(prompt) == 0:
            raise ValueError(f"{name} is empty; a prompt has at least one token id")
        tokens = prompt if isinstance(prompt, Sequence) else np.asarray(prompt).tolist()
        for place, token in enumerate(tokens):
            if not is_integer(token) or not 0 <= token < vocab_size:
                raise ValueError(
                    f"{name}[{place}] is {token!r}; ids must be integers in [0, vocab_size={vocab_size})"
                )
        checked.append(np.array(tokens, np.int32))
    return checked


def _one_each(name: str, value, kind, count: int) -> list:
    """``value`` for every prompt, or the list that it is."""
    if isinstance(value, kind):
        return [value] * count
    values = list(value) if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) else None
    if values is None or not all(isinstance(one, kind) for one in values):
        raise TypeError(f"{name} must be one for all prompts or a list of one for each, not {value!r}")
    if len(values) != count:
        raise ValueError(
            f"{name} has {len(values)} entries for {count} prompts; it must have one for each, or be one"
        )
    return values
