"""What every test shares: the CPU unless told otherwise, and random cases that are the same in every run."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before anything imports jax

import hypothesis  # noqa: E402

hypothesis.settings.register_profile("jsparse", derandomize=True, deadline=None, max_examples=20)
hypothesis.settings.load_profile("jsparse")
