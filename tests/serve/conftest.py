"""What tests of serving share: a cache, prompts, a count of compilations. Models are in tests/conftest.py."""

import jax
import jaxtyping
import numpy as np
import pytest

from jsparse.serve import CacheConfig

CAPACITY = 128


@pytest.fixture(scope="session")
def cache():
    """Shared by most tests, which so share what is compiled: everything is read, four rows, small pages."""
    return CacheConfig(
        capacity=CAPACITY, batch=4, page_size=8, logical_page_size=4, budget=None, prefill_chunk=16
    )


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


@pytest.fixture
def unchecked_types():
    """What refuses a wrong type must be our own check, not the type checker that only tests have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
