"""Log-probabilities against the uncached model's logits in float64."""

import dataclasses

import numpy as np
import pytest

from jsparse.serve import Batch, SamplingParams, generate, stream


def log_softmax(logits):
    logits = np.float64(logits)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def assert_scores(scored, logprobs, tokens, top):
    """What was returned for each token is what the model gives, and ``top`` most likely tokens are there."""
    assert len(scored) == len(tokens)
    for one, expected, token in zip(scored, logprobs, tokens, strict=True):
        assert abs(one.logprob - expected[token]) < 1e-4
        assert len(one.top) == top and len({token for token, _ in one.top}) == top
        values = np.array([value for _, value in one.top])
        np.testing.assert_allclose(values, np.sort(expected)[::-1][:top], atol=1e-4)
        np.testing.assert_allclose(values, [expected[token] for token, _ in one.top], atol=1e-4)


def test_new_tokens_have_the_models_own_logprobs_whatever_the_sampling(small, cache, prompts, uncached):
    sampling = [
        SamplingParams(ignore_eos=True, logprobs=3),
        SamplingParams(ignore_eos=True),
        SamplingParams(1.5, ignore_eos=True, logprobs=0, top_k=20, presence_penalty=1.0),
        SamplingParams(0.7, ignore_eos=True, logprobs=20, logit_bias={3: 5.0}, min_p=0.01),
    ]
    result = generate(small, prompts, 36, sampling, cache, seed=1)
    assert result.logprobs[1] is None and result.prompt_logprobs == [None] * 4
    for row in (0, 2, 3):
        prompt, new = prompts[row], result.tokens[row]
        logprobs = log_softmax(uncached(small, prompt + new)[len(prompt) - 1 : -1])
        assert_scores(result.logprobs[row], logprobs, new, sampling[row].logprobs)
    without = [dataclasses.replace(one, logprobs=None) for one in sampling]
    assert generate(small, prompts, 36, without, cache, seed=1).tokens == result.tokens
    events = [event for event in stream(small, prompts, 36, sampling, cache, seed=1) if event.prompt == 3]
    assert [event.logprobs for event in events] == result.logprobs[3]


@pytest.mark.parametrize("top", [0, 4])
def test_prompts_are_scored_over_all_chunks(small, cache, prompts, uncached, top):
    sampling = [SamplingParams(), SamplingParams(prompt_logprobs=top)] * 2
    result = generate(small, prompts, 5, sampling, cache)
    assert result.prompt_logprobs[0] is None and result.prompt_logprobs[2] is None
    for row in (1, 3):  # 8 and 50 tokens, in chunks of 16
        scores = result.prompt_logprobs[row]
        assert scores is not None
        first, *rest = scores
        assert first is None
        assert_scores(rest, log_softmax(uncached(small, prompts[row]))[:-1], prompts[row][1:], top)
    assert result.tokens == generate(small, prompts, 5, cache=cache).tokens


def test_a_prompt_of_one_token_has_nothing_to_score(small, cache):
    assert generate(small, [[5]], 2, SamplingParams(prompt_logprobs=2), cache).prompt_logprobs == [[None]]


def test_rows_that_come_later_get_their_own_scores(small, cache, prompts):
    how = SamplingParams(ignore_eos=True, logprobs=2)
    alone = generate(small, [prompts[2]], 12, how, cache)
    batch = Batch(small, cache)
    batch.add_prompts([prompts[3], prompts[1]], 30, SamplingParams(0.9, ignore_eos=True))
    batch.step(3)
    events = batch.add_prompts([prompts[2]], 12, how)
    while batch.running:
        events += batch.step(5)
    mine = [event for event in events if event.prompt == 2]
    assert [event.token for event in mine] == alone.tokens[0]
    for event, one in zip(mine, alone.logprobs[0] or (), strict=True):
        assert event.logprobs is not None
        assert [token for token, _ in event.logprobs.top] == [token for token, _ in one.top]
        np.testing.assert_allclose(event.logprobs.logprob, one.logprob, atol=1e-5)
    assert all(event.logprobs is None for event in events if event.prompt != 2)
