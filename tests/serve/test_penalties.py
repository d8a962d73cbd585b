"""Penalties, biases and min_tokens against NumPy in float64, alone and in generation."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jsparse.serve import Batch, SamplingParams, generate
from jsparse.serve.draw import adjust
from jsparse.serve.penalties import History, with_prompt, with_token
from jsparse.serve.sampling import RowParams

VOCAB = 12


def adjusted_by_numpy(logits, params, prompt, generated, stops=()):
    """Token by token, as the docstrings say, in vLLM's order."""
    out = np.asarray(logits, np.float64).copy()
    for token in range(len(out)):
        if token in stops and len(generated) < params.min_tokens:
            out[token] = -np.inf
        out[token] += params.logit_bias.get(token, 0)
        if token in prompt or token in generated:
            out[token] *= 1 / params.repetition_penalty if out[token] > 0 else params.repetition_penalty
        times = generated.count(token)
        out[token] -= params.frequency_penalty * times + params.presence_penalty * (times > 0)
    return out


@jax.jit
def history_of(prompts, counts, generated, given):
    history = with_prompt(History.empty(len(prompts), VOCAB), prompts, counts)
    return jax.lax.fori_loop(
        0, generated.shape[1], lambda i, past: with_token(past, generated[:, i], i < given), history
    )


adjusting = jax.jit(adjust)
ids = st.lists(st.integers(0, VOCAB - 1), max_size=6)


@given(
    st.integers(0, 2**31),
    ids,
    ids,
    st.fixed_dictionaries(
        {
            "repetition_penalty": st.floats(0.1, 10),
            "presence_penalty": st.floats(-2, 2),
            "frequency_penalty": st.floats(-2, 2),
            "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=3),
            "min_tokens": st.integers(0, 4),
            "stop_token_ids": ids,
        }
    ),
)
def test_adjusted_logits_are_numpys_and_a_plain_row_keeps_its_own(seed, prompt, generated, fields):
    params = SamplingParams(**fields)
    logits = 3 * np.random.default_rng(seed).normal(size=(2, VOCAB)).astype(np.float32)
    fill = np.zeros((2, 6), np.int32)
    prompts, new = fill.copy(), fill.copy()
    prompts[:, : len(prompt)], new[:, : len(generated)] = prompt, generated
    history = history_of(prompts, np.full(2, len(prompt)), new, np.full(2, len(generated)))
    rows = RowParams.of([params, SamplingParams()], [0, 0], [9, 9], batch=2, vocab_size=VOCAB)
    waiting = len(generated) < rows.min_tokens
    out = np.asarray(adjusting(jnp.array(logits), rows, history, waiting))
    expected = adjusted_by_numpy(logits[0], params, prompt, generated, params.stop_token_ids)
    np.testing.assert_allclose(out[0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out[1], logits[1])


PENALISED = [
    SamplingParams(ignore_eos=True, repetition_penalty=1.3),
    SamplingParams(ignore_eos=True, presence_penalty=1.5, logit_bias={7: 3.0, 11: -100}),
    SamplingParams(ignore_eos=True, frequency_penalty=0.7),
    SamplingParams(ignore_eos=True),
]


def assert_greedy(uncached, model, prompt, new, params):
    """Each new token is the most likely one of the uncached model's adjusted logits, within rounding."""
    logits = uncached(model, prompt + new)[len(prompt) - 1 : -1]
    for turn, token in enumerate(new):
        expected = adjusted_by_numpy(logits[turn], params, prompt, new[:turn])
        assert expected[token] >= expected.max() - 1e-3


def test_penalised_generation_follows_the_uncached_model(small, cache, prompts, uncached):
    prompts = [prompts[3], prompts[2], prompts[1], prompts[0]]
    plain = generate(small, prompts, 40, SamplingParams(ignore_eos=True), cache).tokens
    result = generate(small, prompts, 40, PENALISED, cache).tokens
    for prompt, new, params in zip(prompts, result, PENALISED, strict=True):
        assert_greedy(uncached, small, prompt, new, params)
    changed = [new != free for new, free in zip(result, plain, strict=True)]
    assert changed == [True, True, True, False]
    for row in range(4):
        alone = generate(small, [prompts[row]], 40, PENALISED[row], cache)
        assert alone.tokens == [result[row]]


def test_a_row_that_is_used_again_starts_with_no_history(small, cache, prompts, uncached):
    batch = Batch(small, cache)
    batch.add_prompts([prompts[3], prompts[2]], 60, PENALISED[:2])
    batch.step(20)
    batch.remove(0)
    new = [event.token for event in batch.add_prompts([prompts[0]], 40, PENALISED[2])]
    while any(number == 2 for number in batch._prompts.values()):
        new += [event.token for event in batch.step(8) if event.prompt == 2]
    assert [new] == generate(small, [prompts[0]], 40, PENALISED[2], cache).tokens
    assert_greedy(uncached, small, prompts[0], new, PENALISED[2])


def test_no_token_ends_a_sequence_before_min_tokens(small, cache, prompts):
    free = generate(small, prompts[:1], 20, SamplingParams(ignore_eos=True), cache).tokens[0]
    stop = free[3]
    early = generate(small, prompts[:1], 20, SamplingParams(stop_token_ids=[stop]), cache)
    assert early.tokens == [free[: free.index(stop) + 1]]
    how = SamplingParams(stop_token_ids=[stop], min_tokens=9)
    late = generate(small, prompts[:1], 20, how, cache).tokens[0]
    assert stop not in late[:9] and len(late) > 9
    assert late[: free.index(stop)] == free[: free.index(stop)]
