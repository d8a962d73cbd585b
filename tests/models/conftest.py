"""A model of every kind of layer, small enough to build in each test."""

import jaxtyping
import pytest
from flax import nnx

from jsparse.models import Llama, LlamaConfig


@pytest.fixture(scope="session")
def tiny_config():
    return LlamaConfig.tiny(vocab_size=61, intermediate_size=48, initializer_range=0.2, eos_token_ids=(2,))


@pytest.fixture
def tiny_model(tiny_config):
    return Llama(tiny_config, rngs=nnx.Rngs(0))


@pytest.fixture
def unchecked_types():
    """What refuses a wrong type must be our own check, not the type checker that only tests have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
