"""Which implementation attention chooses for the device that a program is traced for."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jsparse import attention, causal, device, streaming
from jsparse.pallas_kernels import measured

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="the interpreter needs jax >= 0.12")


def on(kind):
    abstract = AbstractDevice(device_kind=kind, platform="gpu", num_cores=132)
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract))


def program(mask, dtype=jnp.bfloat16, implementation=None, dim=128, length=512):
    q = jax.ShapeDtypeStruct((1, length, 4, dim), dtype)
    run = jax.jit(lambda q: attention(q, q, q, mask, implementation=implementation))
    return str(run.trace(q).jaxpr)


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("NVIDIA H200", True),
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA GH200 480GB", True),
        ("NVIDIA A100-SXM4-80GB", False),
        ("NVIDIA B200", False),
        ("cpu", False),
    ],
)
def test_kernels_are_chosen_on_hopper(kind, expected):
    with on(kind):
        assert device.hopper() is expected
        assert ("jsparse_forward" in program(causal())) is expected


def test_without_a_gpu_the_choice_is_xla():
    assert not device.hopper()
    assert "jsparse_forward" not in program(causal())


def test_float32_falls_back_to_xla_and_an_explicit_choice_says_why():
    with on("NVIDIA H200"):
        assert "jsparse_forward" not in program(causal(), jnp.float32)
        with pytest.raises(NotImplementedError, match="take bfloat16 and float16, not float32"):
            program(causal(), jnp.float32, "mosaic_gpu")


def test_kernels_trace_under_checkpoint_scan_and_vmap():
    """What the interpreter cannot run, since jax.checkpoint takes none of its effects."""
    x = jax.ShapeDtypeStruct((2, 3, 1, 256, 4, 64), jnp.bfloat16)  # two layers, three mapped batches

    def loss(x):
        def layer(y, x):
            attend = jax.checkpoint(lambda x: attention(x, x, x, streaming(4, 64)))
            return y + jax.vmap(attend)(x).sum(dtype=jnp.float32), None

        return jax.lax.scan(layer, jnp.float32(0), x)[0]

    with on("NVIDIA H200"):
        text = str(jax.jit(jax.grad(loss)).trace(x).jaxpr)
    for name in ("forward", "backward_queries", "backward_keys"):
        assert f"name=jsparse_{name}" in text


def test_a_cuda_that_miscompiles_masks_is_refused(monkeypatch):
    with on("NVIDIA H200"):
        for version, works in ((12060, True), (12080, False), (12090, False), (12091, True), (13000, True)):
            monkeypatch.setattr(device, "_cuda_version", lambda version=version: version)
            assert (device.kernel_limit(interpret=False) is None) is works
            assert ("jsparse_forward" in program(causal())) is works


def test_an_interpreter_that_would_hang_says_what_to_set(monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setenv("PJRT_NPROC", "2")
    q = jnp.zeros((1, 8, 2, 64))
    with pytest.raises(NotImplementedError, match="hang with XLA's 2 threads.*PJRT_NPROC=8"):
        attention(q, q, q, causal(), implementation="mosaic_gpu_interpret")


def test_cudnn_is_chosen_where_it_was_measured_to_be_faster(monkeypatch):
    row = {"device": "NVIDIA H200", "head_dim": 128, "min_tokens": 512}
    monkeypatch.setattr(measured, "_table", lambda: {"tiles": [], "cudnn_faster": [row]})
    chosen = []
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda q, k, v, **options: chosen.append(options["implementation"]) or q,
    )
    for kind, mask, dim in (
        ("NVIDIA H200", causal(), 128),
        ("NVIDIA H100", causal(), 128),  # another device
        ("NVIDIA H200", streaming(4, 64), 128),  # not plain causal
        ("NVIDIA H200", causal(), 64),  # another head_dim
    ):
        with on(kind):
            text = program(mask, dim=dim)
        chosen.append("kernel" if "jsparse_forward" in text else "")
    assert chosen == ["cudnn", "", "kernel", "kernel", "kernel"]


def test_cudnn_names_its_limits():
    q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"takes causal\(\) for every head"):
        attention(q, q, q, streaming(1, 4), implementation="cudnn")
    with pytest.raises(NotImplementedError, match="as many queries as keys, not 4 and 8"):
        attention(q[:, :4], q, q, causal(), implementation="cudnn")
    with pytest.raises(NotImplementedError, match="no differentiable lse"):
        attention(q, q, q, causal(), implementation="cudnn", return_lse=True)


def test_measured_tiles_replace_the_computed_ones(monkeypatch):
    shape = {"head_dim": 128, "block_q": 128, "block_kv": 128}
    row = {
        "kernel": "forward",
        "device": "NVIDIA H200",
        "shape": shape,
        "tiles": {"tile_kv": 64, "stages": 4},
    }
    monkeypatch.setattr(measured, "_table", lambda: {"tiles": [row], "cudnn_faster": []})
    seen = []

    def kernel(q, k, v, lists, heads, *, tiles, **_):
        seen.append((tiles.tile_kv, tiles.stages))
        return q, jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))

    monkeypatch.setattr("jsparse.pallas_kernels.hopper.forward.forward", kernel)
    kernel.__name__ = "forward"
    for kind in ("NVIDIA H200", "NVIDIA H100"):
        with on(kind):
            program(causal(), implementation="mosaic_gpu", length=640)  # traced for the first time
    assert seen == [(64, 4), (128, 2)]
