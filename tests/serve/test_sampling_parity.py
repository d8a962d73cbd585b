"""The transforms of sampling against the logits processors of transformers, in torch float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.models import Llama
from jsparse.serve import SamplingParams, generate
from jsparse.serve.draw import adjust, drop_unlikely, restrict, scale_logits
from jsparse.serve.penalties import History, with_prompt, with_token
from jsparse.serve.sampling import RowParams

torch = pytest.importorskip("torch", reason="the oracle needs torch, from the extra `parity`")
process = pytest.importorskip(
    "transformers.generation.logits_process", reason="the oracle needs transformers, from the extra `parity`"
)

transformers = pytest.importorskip("transformers")

transformers.utils.logging.disable_progress_bar()
VOCAB, ROWS = 40, 16


@pytest.fixture(scope="module")
def logits():
    return 3 * np.random.default_rng(0).normal(size=(ROWS, VOCAB)).astype(np.float32)


def by_transformers(logits, processors, ids=None):
    scores = torch.from_numpy(np.float64(logits))
    ids = torch.zeros((len(logits), 1), dtype=torch.long) if ids is None else torch.from_numpy(ids)
    for processor in processors:
        scores = processor(ids, scores)
    return scores.numpy()


def assert_same_distribution(ours, theirs):
    """The same tokens are left, and logits agree but for a constant per row."""
    ours = np.asarray(ours, np.float64)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    for mine, other in zip(ours, theirs, strict=True):
        left = np.isfinite(mine)
        np.testing.assert_allclose(
            mine[left] - mine[left].max(), other[left] - other[left].max(), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"temperature": 0.3}, {"TemperatureLogitsWarper": 0.3}),
        ({"min_p": 0.1}, {"MinPLogitsWarper": 0.1}),
        ({"top_k": 5}, {"TopKLogitsWarper": 5}),
        ({"top_p": 0.7}, {"TopPLogitsWarper": 0.7}),
        (
            {"temperature": 1.7, "min_p": 0.02, "top_k": 12, "top_p": 0.9},
            {
                "TemperatureLogitsWarper": 1.7,
                "MinPLogitsWarper": 0.02,
                "TopKLogitsWarper": 12,
                "TopPLogitsWarper": 0.9,
            },
        ),
    ],
)
def test_what_is_drawn_from(logits, fields, names):
    params = SamplingParams(**{"temperature": 1.0} | fields)
    rows = RowParams.of([params] * ROWS, [0] * ROWS, [9] * ROWS, batch=ROWS, vocab_size=VOCAB)
    scaled = scale_logits(jnp.array(logits), rows.temperature)
    ours = restrict(drop_unlikely(scaled, rows.min_p), rows.top_k, rows.top_p)
    processors = [getattr(process, name)(value) for name, value in names.items()]
    assert_same_distribution(ours, by_transformers(logits, processors))


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_in_prompt_and_continuation(logits, penalty):
    ids = np.random.default_rng(1).integers(0, VOCAB, (ROWS, 14))
    prompt, new = ids[:, :9].astype(np.int32), ids[:, 9:].astype(np.int32)
    history = with_prompt(History.empty(ROWS, VOCAB), jnp.array(prompt), jnp.full(ROWS, 9))
    for token in new.T:
        history = with_token(history, jnp.array(token), jnp.ones(ROWS, bool))
    params = SamplingParams(repetition_penalty=penalty)
    ours = adjusted(logits, params, history, generated=5)
    theirs = by_transformers(logits, [process.RepetitionPenaltyLogitsProcessor(penalty)], ids)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("generated", [0, 3, 4])
def test_end_tokens_before_the_least_number_of_new_ones(logits, generated):
    params = SamplingParams(min_tokens=4, stop_token_ids=[3, 17])
    ours = adjusted(logits, params, History.empty(ROWS, VOCAB), generated)
    processor = process.MinNewTokensLengthLogitsProcessor(7, 4, [3, 17], device="cpu")
    theirs = by_transformers(logits, [processor], np.zeros((ROWS, 7 + generated), np.int64))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_biases(logits):
    bias = {3: -7.5, 20: 100, 39: 0.25}
    ours = adjusted(logits, SamplingParams(logit_bias=bias), History.empty(ROWS, VOCAB), 0)
    processor = process.SequenceBiasLogitsProcessor({(token,): float(one) for token, one in bias.items()})
    np.testing.assert_allclose(ours, by_transformers(logits, [processor]), rtol=1e-6)


def adjusted(logits, params, history, generated):
    rows = RowParams.of([params] * ROWS, [0] * ROWS, [9] * ROWS, batch=ROWS, vocab_size=VOCAB)
    waiting = np.full(ROWS, generated) < rows.min_tokens
    return np.asarray(jax.jit(adjust)(jnp.array(logits), rows, history, jnp.array(waiting)))


def test_greedy_generation_with_penalties_and_a_least_length(tmp_path, save_tiny_model):
    """Whole continuations of one checkpoint. Its end token is one that plain generation meets early."""
    save_tiny_model(tmp_path)
    ours, prompt = Llama.from_pretrained(tmp_path), [72, 101, 108, 108, 111, 108, 108]
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    end = generate(ours, [prompt], 24, SamplingParams(ignore_eos=True)).tokens[0][4]
    several: tuple[dict[str, Any], ...] = (
        {},
        {"repetition_penalty": 1.2},
        {"min_tokens": 12},
        {"repetition_penalty": 0.9, "min_tokens": 7},
    )
    for fields in several:
        new = generate(ours, [prompt], 24, SamplingParams(stop_token_ids=[end], **fields)).tokens[0]
        expected = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            min_new_tokens=fields.get("min_tokens", 0),
            repetition_penalty=fields.get("repetition_penalty", 1.0),
            eos_token_id=[end, 256],
            pad_token_id=0,
        )
        assert new == expected[0, len(prompt) :].tolist()
