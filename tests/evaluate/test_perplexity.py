from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jsparse import BlockMask, causal, sliding_window
from jsparse.evaluate import perplexity
from jsparse.evaluate.perplexity import _nll
from jsparse.models import Llama, LlamaConfig
from jsparse.models.patterns import StridedBlocks, longgen_pattern
from jsparse.train import evaluate_perplexity, perplexity_by_context, shifted_head_masks

VOCAB = 31


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig.tiny(
        vocab_size=VOCAB,
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


@pytest.fixture(scope="module")
def forward(model):
    return jax.jit(lambda window: model(window[None])[0])


def window_nll(forward, tokens, context, stride):
    """The negative log-likelihood of all tokens but the first of each full window, in float64: [N, T - 1]."""
    rows = []
    for begin in range(0, len(tokens) - context + 1, stride):
        window = tokens[begin : begin + context]
        logits = np.asarray(forward(jnp.asarray(window, jnp.int32)), np.float64)[:-1]
        log_probability = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        rows.append([-row[token] for row, token in zip(log_probability, window[1:], strict=True)])
    return np.array(rows)


@pytest.mark.parametrize(
    ("stride", "batch_size", "windows"), [(5, 3, 10), (45, 1, 2), (46, 1, 1), (70, 1, 1)]
)
def test_longlora_scores_every_token_of_every_window(model, forward, tokens, stride, batch_size, windows):
    result = evaluate_perplexity(
        model, tokens, context=16, stride=stride, scoring="all", batch_size=batch_size
    )
    expected = window_nll(forward, tokens, 16, stride)
    assert len(expected) == windows and result.tokens == windows * 15
    np.testing.assert_allclose(result.nll, expected.mean(axis=1).mean(), rtol=1e-5)  # the mean of their means
    assert (result.context, result.stride, result.scoring, result.last) == (16, stride, "all", None)


@pytest.mark.parametrize(("last", "stride"), [(4, None), (4, 9), (15, 5), (1, 3)])
def test_only_the_last_tokens_of_a_window(model, forward, tokens, last, stride):
    result = evaluate_perplexity(model, tokens, context=16, stride=stride, scoring="last", last=last)
    expected = window_nll(forward, tokens, 16, stride or last)[:, -last:]
    assert result.tokens == expected.size and result.stride == (stride or last) and result.last == last
    np.testing.assert_allclose(result.nll, expected.mean(), rtol=1e-5)


def test_the_strides_by_default(model, tokens):
    assert evaluate_perplexity(model, tokens, context=16).stride == 8
    assert evaluate_perplexity(model, tokens, context=16, scoring="all").stride == 256
    assert evaluate_perplexity(model, tokens, context=16, scoring="last", last=3).stride == 3


def test_a_file_of_tokens_is_read_in_place(model, tokens, tmp_path, monkeypatch):
    tokens.astype(np.uint16).tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", np.uint16, "r")
    read_from = []

    def spied(tokens, *arguments, cut=perplexity._windows):
        read_from.append(tokens)
        return cut(tokens, *arguments)

    monkeypatch.setattr(perplexity, "_windows", spied)
    result = evaluate_perplexity(model, mapped, context=16)
    assert all(np.shares_memory(one, mapped) for one in read_from) and read_from
    assert result == evaluate_perplexity(model, tokens, context=16)


def test_a_pattern_of_layers_and_blocks(model, tokens):
    pattern = longgen_pattern(model.config, StridedBlocks(block=4, window=1, stride=2), full_layers=())
    masks = pattern.masks(model.config, 16)
    result = evaluate_perplexity(model, tokens, context=16, mask=[masks[0]])  # a list cannot be hashed
    compiled: Any = _nll
    before = compiled._cache_size()
    assert evaluate_perplexity(model, tokens, context=16, mask=pattern.masks(model.config, 16)) == result
    assert compiled._cache_size() == before
    assert abs(result.nll - evaluate_perplexity(model, tokens, context=16).nll) > 1e-3


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
        ({"tokens": np.zeros(0, np.int32)}, "at least one window of context=16, not 0"),
        ({"last": 4}, "last=4 must be given with scoring='last'"),
        ({"scoring": "last"}, "last=None must be given with scoring='last'"),
        ({"scoring": "last", "last": 16}, "last must be 1 to context - 1 = 15, not 16"),
        ({"scoring": "last", "last": 0}, "last must be 1 to"),
        ({"scoring": "all", "stride": 0}, "stride must be at least 1, not 0"),
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
