"""Requests: prompts with their parameters, checked on the host before anything is launched."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import tokenizers

from jsparse.integers import is_integer
from jsparse.models import LlamaConfig
from jsparse.serve.sampling import SamplingParams


class Request(NamedTuple):
    """One sample of a prompt, and how it is to be continued."""

    prompt: np.ndarray  # int32
    max_new: int
    sampling: SamplingParams
    seed: int
    number: int  # of the prompt in its call: its samples share it

    @property
    def prompt_hash(self) -> int:
        """32 bits of the prompt, the same on every machine: equal seeds of other prompts draw otherwise."""
        return int.from_bytes(hashlib.blake2b(self.prompt.astype("<i4").tobytes(), digest_size=4).digest())


def check_requests(
    model: LlamaConfig, prompts, max_new_tokens, sampling, seed, tokenizer=None
) -> list[Request]:
    """The requests for these arguments of ``generate``: the ``n`` samples of each prompt in turn.

    Raises ValueError or TypeError.
    """
    if tokenizer is not None and not isinstance(tokenizer, tokenizers.Tokenizer):
        raise TypeError(f"tokenizer must be a tokenizers.Tokenizer or None, not {tokenizer!r}")
    prompts = _check_prompts(prompts, model.vocab_size)
    if not is_integer(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an integer >= 1, not {max_new_tokens!r}")
    sampling = _one_each("sampling", sampling, SamplingParams, len(prompts))
    sampling = [_stopping_at_special_tokens(params, tokenizer) for params in sampling]
    for params in sampling:
        _check_sampling(params, model.vocab_size, max_new_tokens, tokenizer)
    seeds = _one_each("seed", seed, int | np.integer, len(prompts))
    for one in seeds:
        if not is_integer(one) or not 0 <= one < 2**32:
            raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, not {one!r}")
    return [
        Request(prompt, int(max_new_tokens), dataclasses.replace(params, n=1), (int(one) + i) % 2**32, number)
        for number, (prompt, params, one) in enumerate(zip(prompts, sampling, seeds, strict=True))
        for i in range(params.n)
    ]


def _check_sampling(params: SamplingParams, vocab_size: int, max_new_tokens: int, tokenizer) -> None:
    for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
        beyond = [token for token in ids if token >= vocab_size]
        if beyond:
            raise ValueError(f"{name} has {beyond[0]}; ids must be less than vocab_size={vocab_size}")
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > vocab_size:
            raise ValueError(f"{name}={getattr(params, name)} must be at most vocab_size={vocab_size}")
    if params.min_tokens > max_new_tokens:
        raise ValueError(f"min_tokens={params.min_tokens} must be at most max_new_tokens={max_new_tokens}")
    if params.stop and tokenizer is None:
        raise ValueError(f"stop={params.stop!r} is text, which needs a tokenizer, and none is given")
    for string in params.stop:
        for token, name in _special_tokens(tokenizer).items():
            if name in string:
                raise ValueError(
                    f"stop has {string!r}, but the special token {name!r} has no text; stop at it with "
                    f"stop_token_ids=[{token}]"
                )


def _stopping_at_special_tokens(params: SamplingParams, tokenizer) -> SamplingParams:
    """Stop strings that are special tokens, which have no text, as stop tokens."""
    if tokenizer is None or not params.stop:
        return params
    ids = tuple(token for token, name in _special_tokens(tokenizer).items() if name in params.stop)
    stop = tuple(string for string in params.stop if tokenizer.token_to_id(string) not in ids)
    return dataclasses.replace(params, stop=stop, stop_token_ids=(*params.stop_token_ids, *ids))


def _special_tokens(tokenizer: tokenizers.Tokenizer) -> dict[int, str]:
    added = tokenizer.get_added_tokens_decoder()
    return {token: one.content for token, one in added.items() if one.special}


def check_ids(name: str, tokens: np.ndarray, vocab_size: int) -> None:
    """Raise ValueError for an array without tokens, or with one outside the vocabulary."""
    if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(f"{name} must be one id or more in [0, vocab_size={vocab_size}), not {tokens}")


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
    """One value per prompt: ``value`` repeated, or its entries if it is a list."""
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
