from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jsparse import BlockMask, causal, sliding_window
from jsparse.models import Llama, LlamaConfig
from jsparse.train import evaluate_perplexity, perplexity_by_context, shifted_head_masks
from jsparse.train.evaluate import _nll

VOCAB = 31


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return Llama(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, VOCAB, 61)


def huggingface_nll(model, tokens, context, stride, mask=None):
    """Hugging Face's recipe, a window at a time, in float64: sum and number of the scored tokens."""
    forward = jax.jit(lambda window: model(window[None], mask=mask)[0])
    total, scored, previous_end = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        window = tokens[begin:end]
        logits = np.asarray(forward(jnp.asarray(window, jnp.int32)), np.float64)
        log_probability = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        for position in range(max(previous_end, begin + 1), end):
            total -= log_probability[position - begin - 1, tokens[position]]
            scored += 1
        previous_end = end
        if end == len(tokens):
            break
    return total, scored


@pytest.mark.parametrize(
    ("context", "stride", "batch_size"),
    [(16, 8, 1), (16, 15, 3), (16, 1, 8), (61, 30, 2), (24, None, 4), (16, 9, 2)],
)
def test_equals_the_recipe_a_window_at_a_time(model, tokens, context, stride, batch_size):
    result = evaluate_perplexity(model, tokens, context=context, stride=stride, batch_size=batch_size)
    total, scored = huggingface_nll(model, tokens, context, stride or context // 2)
    assert result.tokens == scored == len(tokens) - 1
    np.testing.assert_allclose(result.nll, total / scored, rtol=1e-5)
    np.testing.assert_allclose(result.perplexity, np.exp(total / scored), rtol=1e-5)


@pytest.mark.parametrize("kind", ["token mask", "per head", "block mask"])
def test_every_kind_of_mask(model, tokens, kind):
    heads = [sliding_window(3), causal()] if kind != "token mask" else sliding_window(3)
    mask = BlockMask.from_token_masks(heads, 16, 16, block_q=8, block_kv=8) if kind == "block mask" else heads
    result = evaluate_perplexity(model, tokens, context=16, mask=mask)
    total, scored = huggingface_nll(model, tokens, 16, 8, heads)
    np.testing.assert_allclose(result.nll, total / scored, rtol=1e-5)
    full = evaluate_perplexity(model, tokens, context=16)
    assert abs(full.nll - result.nll) > 1e-3  # or the mask would be ignored


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(model, tokens):
    blank = nnx.merge(nnx.graphdef(model), jax.tree.map(jnp.zeros_like, nnx.state(model)))
    assert evaluate_perplexity(blank, tokens, context=16).perplexity == pytest.approx(VOCAB, rel=1e-6)


def test_fewer_windows_score_the_first_tokens_only(model, tokens):
    result = evaluate_perplexity(model, tokens, context=16, stride=8, max_windows=3)
    total, scored = huggingface_nll(model, tokens[: 16 + 2 * 8], 16, 8)
    assert result.tokens == scored == 31
    np.testing.assert_allclose(result.nll, total / scored, rtol=1e-5)


def test_one_compilation_a_context_and_several_contexts(model, tokens):
    compiled: Any = _nll
    before = compiled._cache_size()
    results = perplexity_by_context(
        model, tokens, (12, 20), mask_for=lambda context: shifted_head_masks(2, context // 2)
    )
    evaluate_perplexity(model, tokens[:-3], context=12, mask=shifted_head_masks(2, 6))
    assert compiled._cache_size() == before + 2
    assert [(r.context, r.stride, r.tokens) for r in results] == [(12, 6, 60), (20, 10, 60)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": np.zeros(15, np.int32)}, "at least one window of context=16, not 15"),
        ({"tokens": np.full(20, VOCAB)}, f"tokens must be 0 to {VOCAB - 1}"),
        ({"tokens": np.full(20, -1)}, "not -1 to -1"),
        ({"stride": 16}, "stride must be 1 to context - 1 = 15, not 16"),
        ({"stride": 0}, "stride must be"),
        ({"context": 1}, "context must be at least 2, not 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_windows": 0}, "max_windows must be at least 1"),
    ],
)
def test_bad_arguments(model, tokens, changes, message):
    arguments = {"tokens": tokens, "context": 16} | changes
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(model, **arguments)


def test_a_broken_model_has_no_perplexity(model, tokens):
    state = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), nnx.state(model))
    with pytest.raises(FloatingPointError, match="not finite in windows 0 to 0"):
        evaluate_perplexity(nnx.merge(nnx.graphdef(model), state), tokens, context=16)
