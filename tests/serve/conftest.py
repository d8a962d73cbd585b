"""One small model for all tests of serving, and the oracle: the same model without a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jsparse.models import Llama, LlamaConfig
from jsparse.serve import CacheConfig

CAPACITY = 128
CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
    max_position_embeddings=256,
    eos_token_ids=(60,),
)


@pytest.fixture(scope="session")
def model():
    model = Llama(CONFIG, rngs=nnx.Rngs(0))
    assert model.lm_head is not None
    kernel = model.lm_head.kernel
    kernel[...] = kernel[...].at[:, 60].set(0)  # its end token is never the most likely one
    return model


@pytest.fixture(scope="session")
def one_layer():
    """The configuration of a model that compiles faster."""
    return dataclasses.replace(CONFIG, num_hidden_layers=1, sliding_windows=(None,))


@pytest.fixture(scope="session")
def small(one_layer):
    return Llama(one_layer, rngs=nnx.Rngs(0))


@pytest.fixture(scope="session")
def cache():
    """Shared by most tests, which so share what is compiled: everything is read, four rows, small pages."""
    return CacheConfig(
        capacity=CAPACITY, batch=4, page_size=8, logical_page_size=4, budget=None, prefill_chunk=16
    )


@pytest.fixture(scope="session")
def uncached():
    """logits [T, vocab] of a sequence without a cache; one compilation for every length."""
    call = nnx.jit(lambda model, tokens, mask: model(tokens, mask=mask), static_argnames="mask")

    def logits(model, tokens, mask=None):
        padded = np.zeros((1, CAPACITY), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(call(model, jnp.array(padded), mask))[0, : len(tokens)]

    return logits


@pytest.fixture(scope="session")
def prompts():
    """Ragged prompts: lengths around pages of 8 and chunks of 16."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 60, length).tolist() for length in (1, 8, 33, 50)]


@pytest.fixture
def compilations():
    """A list that grows with every compilation while the test runs."""
    seen = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)
