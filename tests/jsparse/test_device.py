"""What products are computed in on a CPU, by what /proc/cpuinfo says of it."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from jsparse import device


@pytest.fixture(autouse=True)
def not_remembered():
    device._cpu_has_bfloat16_units.cache_clear()
    yield
    device._cpu_has_bfloat16_units.cache_clear()


@pytest.mark.parametrize(
    "flags, product",
    [
        ("flags : avx2 fma", jnp.float32),
        ("flags : avx512f avx512_bf16", jnp.float32),  # float32 is faster there
        ("flags : avx512f avx512_bf16 amx_bf16 amx_tile", jnp.bfloat16),
        ("Features : asimd bf16", jnp.bfloat16),
    ],
)
def test_bfloat16_is_multiplied_as_such_where_the_cpu_has_units_for_it(monkeypatch, flags, product):
    monkeypatch.setattr(device, "Path", lambda _: SimpleNamespace(read_text=lambda: flags))
    assert device.product_dtype(jnp.bfloat16) == product


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_wider_dtypes_are_left_as_they_are(dtype):
    assert device.product_dtype(dtype) == dtype


def test_float16_is_multiplied_as_float32_on_a_cpu():
    assert device.product_dtype(jnp.float16) == jnp.float32
