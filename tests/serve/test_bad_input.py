"""Everything that cannot be served is refused by name before anything runs."""

import dataclasses

import numpy as np
import pytest

from jsparse import PooledBlocks, VerticalSlash
from jsparse.serve import Batch, CacheConfig, SamplingParams, generate, stream

PROMPTS = [
    ([], "prompts must be a list of at least one list"),
    ("abc", "prompts must be"),
    ([[1], []], r"prompts\[1\] is empty"),
    ([1, 2, 3], r"prompts\[0\] must be a list of token ids, not 1"),
    (["abc"], r"prompts\[0\] must be a list of token ids, not 'abc'"),
    ([[1, 61]], r"prompts\[0\]\[1\] is 61; ids must be integers in \[0, vocab_size=61\)"),
    ([[1], [2, -1]], r"prompts\[1\]\[1\] is -1"),
    ([[1.0]], r"prompts\[0\]\[0\] is 1.0"),
    ([[True]], r"prompts\[0\]\[0\] is True"),
    ([np.array([[1, 2]])], r"prompts\[0\]\[0\] is \[1, 2\]"),
    ([np.array([0.5])], r"prompts\[0\]\[0\] is 0.5"),
]


@pytest.fixture(autouse=True)
def nothing_runs(compilations):
    yield
    assert not compilations


@pytest.mark.parametrize(("prompts", "message"), PROMPTS)
@pytest.mark.parametrize("call", [generate, stream])
def test_prompts(model, cache, call, prompts, message):
    with pytest.raises(ValueError, match=message):
        call(model, prompts, cache=cache)


def test_too_long_for_the_capacity_states_the_arithmetic(model, cache):
    message = r"prompt 1 has 120 tokens, with max_new_tokens=9 129: more than capacity=128 \(16 pages of 8\)"
    with pytest.raises(ValueError, match=message):
        generate(model, [[1], [2] * 120], 9, cache=cache)


def test_too_long_for_the_models_positions(model):
    with pytest.raises(ValueError, match="prompt 0 has 250 tokens, .* 257: .* max_position_embeddings=256"):
        generate(model, [[1] * 250], 7)


def test_more_prompts_than_rows(model, cache):
    with pytest.raises(ValueError, match="5 prompts are more than the cache's batch=4 rows"):
        generate(model, [[1]] * 5, cache=cache)


def test_more_pages_than_there_are_states_the_arithmetic(model, cache):
    few = dataclasses.replace(cache, num_pages=20)
    message = "2 prompts with their new tokens need 23 pages of 8: more than num_pages=20$"
    with pytest.raises(ValueError, match=message):
        generate(model, [[1] * 100, [2] * 40], 20, cache=few)  # 15 pages and 8


def test_a_batch_needs_a_capacity_and_a_number_of_rows(model):
    for missing, given in (("capacity", CacheConfig(batch=2)), ("batch", CacheConfig(capacity=64))):
        with pytest.raises(ValueError, match=f"{missing} must be an integer >= 1 where no requests say"):
            Batch(model, given)


@pytest.mark.parametrize("count", [0, -1, True])
def test_max_new_tokens(model, cache, count):
    with pytest.raises(ValueError, match=f"max_new_tokens must be an integer >= 1, not {count}"):
        generate(model, [[1]], count, cache=cache)


@pytest.mark.parametrize("seed", [-1, 2**32, True, [0, -1]])
def test_seeds(model, cache, seed):
    with pytest.raises(ValueError, match="seed must be an integer from 0"):
        generate(model, [[1], [2]], seed=seed, cache=cache)


def test_one_each_or_one_for_all(model, cache):
    with pytest.raises(ValueError, match="seed has 3 entries for 2 prompts"):
        generate(model, [[1], [2]], seed=[1, 2, 3], cache=cache)
    with pytest.raises(ValueError, match="sampling has 1 entries for 2 prompts"):
        generate(model, [[1], [2]], sampling=[SamplingParams()], cache=cache)


def test_stop_tokens_must_be_in_the_vocabulary(model, cache):
    with pytest.raises(ValueError, match="stop_token_ids has 61; ids must be less than vocab_size=61"):
        generate(model, [[1]], sampling=SamplingParams(stop_token_ids=(1, 61)), cache=cache)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (SamplingParams(logit_bias={61: 1}), "logit_bias has 61; ids must be less than vocab_size=61"),
        (SamplingParams(min_tokens=9), "min_tokens=9 must be at most max_new_tokens=8"),
        (SamplingParams(stop="end"), r"stop=\('end',\) is text, which needs a tokenizer, and none is given"),
        (SamplingParams(n=5), "5 prompts are more than the cache's batch=4 rows"),
    ],
)
def test_parameters_that_do_not_fit_the_request(model, cache, sampling, message):
    for call in (generate, stream):
        with pytest.raises(ValueError, match=message):
            call(model, [[1]], 8, sampling, cache)


def test_samples_that_do_not_fit_are_said_to_be_samples(model, cache):
    few = dataclasses.replace(cache, num_pages=20)
    n = SamplingParams(n=2)
    for prompts, new, options, message in (
        (
            [[1], [2], [3]],
            8,
            cache,
            "6 prompts are more than the cache's batch=4 rows, each sample counted as one",
        ),
        (
            [[1] * 70],
            20,
            few,
            "2 prompts with .* need 24 pages of 8: more than num_pages=20, each sample counted",
        ),
        ([[1], [2] * 120], 9, cache, "prompt 1 has 120 tokens, with max_new_tokens=9 129: more than"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, prompts, new, n, options)


def test_a_tokenizer_of_another_library(model, cache, unchecked_types):
    with pytest.raises(TypeError, match="tokenizer must be a tokenizers.Tokenizer or None, not 'gpt2'"):
        generate(model, [[1]], 8, cache=cache, tokenizer="gpt2")  # type: ignore[arg-type]


def test_streaming_heads_of_another_model(model, cache):
    wrong = dataclasses.replace(cache, streaming_heads=np.zeros((2, 4), bool))
    with pytest.raises(ValueError, match=r"streaming_heads is \(2, 4\), but must be \(2, 2\)"):
        generate(model, [[1]], cache=wrong)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": "1"}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_k": -2}, "top_k must be an integer >= 1, or 0 or -1 for all tokens, not -2"),
        ({"top_k": True}, "top_k"),
        ({"top_p": 0.0}, r"top_p must be a number in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_p": True}, "top_p"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids must be integers >= 0, not -1"),
        ({"stop_token_ids": (True,)}, "stop_token_ids"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a sequence of ids, not 5"),
        ({"min_p": -0.1}, "min_p must be a number from 0 to 1, not -0.1"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number from 0.01 to 100, not 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty must be a number from -2 to 2, not 2.1"),
        ({"frequency_penalty": -3}, "frequency_penalty must be a number from -2 to 2, not -3"),
        ({"frequency_penalty": True}, "frequency_penalty"),
        ({"logit_bias": [1]}, r"logit_bias must be a mapping from ids to numbers, not \[1\]"),
        ({"logit_bias": {-1: 1}}, "logit_bias must be of ids, integers >= 0, not -1"),
        ({"logit_bias": {"5": 1}}, "logit_bias must be of ids, integers >= 0, not '5'"),
        ({"logit_bias": {5: 101}}, r"logit_bias\[5\] must be a number from -100 to 100, not 101"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias must have at most 1024 ids, not 1025"),
        ({"min_tokens": -1}, "min_tokens must be an integer from 0 to"),
        ({"stop": 5}, "stop must be a string or a list of strings, not 5"),
        ({"stop": ""}, "stop must be strings of one character or more, not ''"),
        ({"stop": ["a", b"b"]}, "stop must be strings of one character or more, not b'b'"),
        ({"stop": ["a"] * 17}, "stop must have at most 16 strings, not 17"),
        ({"n": 0}, "n must be an integer from 1 to 128, not 0"),
        ({"logprobs": 21}, "logprobs must be an integer from 0 to 20 or None, not 21"),
        ({"prompt_logprobs": True}, "prompt_logprobs must be an integer from 0 to 20 or None, not True"),
    ],
)
def test_sampling_params(unchecked_types, fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"capacity": 100}, "capacity=100 must be a multiple of page_size=64"),
        ({"capacity": 0}, "capacity must be an integer >= 1 or None, not 0"),
        ({"batch": 0}, "batch must be an integer >= 1 or None, not 0"),
        ({"batch": True}, "batch"),
        ({"page_size": 0}, "page_size must be an integer >= 1 or None, not 0"),
        ({"logical_page_size": 24}, "page_size=64 must be a multiple of logical_page_size=24"),
        ({"budget": 32}, "budget=32 must be a multiple of page_size=64"),
        ({"budget": 0}, "budget must be an integer >= 1 or None, not 0"),
        ({"sink": -1}, "sink must be an integer >= 0, not -1"),
        ({"window": 0}, "window must be an integer >= 1, not 0"),
        ({"prefill_chunk": 0}, "prefill_chunk must be an integer >= 1, not 0"),
        ({"streaming_heads": [True, False]}, "streaming_heads must be booleans"),
        ({"streaming_heads": [[0.1, 0.9]]}, "streaming_heads must be booleans"),
        ({"streaming_heads": [[True], [True, False]]}, "streaming_heads must be booleans"),
        ({"policy": "h2o"}, "policy must be one of lserve, dense, .*, oracle, random, not 'h2o'"),
        ({"policy": None}, "policy must be one of lserve, .* not None"),
        ({"policy": "quest", "logical_page_size": 8}, "logical_page_size=8 must be page_size=16 or None"),
        ({"policy": "quest", "budget": 24}, "budget=24 must be a multiple of page_size=16"),
        ({"kv_bits": 2}, "kv_bits must be 8, 4 or None, not 2"),
        ({"kv_bits": True}, "kv_bits must be 8, 4 or None, not True"),
        ({"kv_bits": "8"}, "kv_bits must be 8, 4 or None, not '8'"),
        ({"select_every": 0}, "select_every must be an integer >= 1 or None, not 0"),
        ({"select_every": 1.5}, "select_every must be an integer >= 1 or None, not 1.5"),
        ({"select_heads": "mean"}, "select_heads must be max, union or query, not 'mean'"),
        ({"select_heads": None}, "select_heads must be max, union or query, not None"),
        ({"num_pages": 0}, "num_pages must be an integer >= 1 or None, not 0"),
        ({"prefill_window": 0}, "prefill_window must be an integer >= 1 or None, not 0"),
        ({"prefill_window": 255}, "prefill_window=255 must be at least window=256"),
        ({"prefill_estimate": "mean"}, "prefill_estimate must be PooledBlocks, VerticalSlash or None, not"),
        (
            {"prefill_estimate": PooledBlocks(512), "prefill_chunk": 192},
            "prefill_chunk=192 must be a multiple of prefill_estimate's block=128",
        ),
        (
            {"prefill_estimate": VerticalSlash(512, 512), "prefill_chunk": 256},
            "prefill_chunk=256 must be a multiple of prefill_estimate's segment=512",
        ),
    ],
)
def test_cache_config(unchecked_types, fields, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig(**fields)
