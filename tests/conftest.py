"""What every test shares: the CPU unless told otherwise, and random cases that are the same in every run."""

import hashlib
import os
import platform
import signal
import sys
import threading
from importlib.metadata import version
from pathlib import Path

# Before anything imports jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("PJRT_NPROC", "8")  # interpreted GPU kernels: jsparse.device says why
# Most of a test is compiling. XLA's own passes stay as they are; only machine code is optimised less.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# A shell starts jobs in the background with Ctrl-C ignored, and so would be what the tests start.
if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):
    signal.signal(signal.SIGINT, signal.default_int_handler)


def compilation_cache() -> Path:
    """A folder of the user's for what jax has compiled: a second run of the tests takes half the time.

    Its name says for what: code of another jaxlib, or for a CPU with other instructions, may not run here.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((line for line in lines if line.startswith(("flags", "Features"))), platform.node())
    name = f"jaxlib-{version('jaxlib')}-{hashlib.sha256(cpu.encode()).hexdigest()[:12]}"
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "jsparse-tests" / name
    folder.mkdir(parents=True, exist_ok=True)
    folder.parent.chmod(0o700)  # code that we run later must be nobody else's
    return folder


if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compilation_cache())
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import hypothesis  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("jsparse", derandomize=True, deadline=None, max_examples=20)
hypothesis.settings.load_profile("jsparse")


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Forget what is compiled before it takes all memory maps that Linux gives a process, which are 65530.

    A program takes dozens, and the one for which none are left crashes. What is needed again is read from
    the folder above.
    """
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.is_file() and maps.read_text().count("\n") > 20_000:
        sys.modules["jax"].clear_caches()


_SERVED = {
    "vocab_size": 61,
    "intermediate_size": 48,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
    "eos_token_ids": (60,),
}


@pytest.fixture(scope="session")
def save_tiny_model():
    """``save(folder, **fields)`` writes a tiny byte-level checkpoint: of 64 positions, unless fields of its
    config say otherwise, with its tokenizer."""
    # Not above: jaxtyping checks only what is imported after pytest has read this file.
    from flax import nnx

    from jsparse.models import Llama, LlamaConfig, byte_tokenizer

    def save(folder, **fields) -> None:
        config = LlamaConfig.tiny(**{"initializer_range": 0.2} | fields)
        Llama(config, rngs=nnx.Rngs(0)).save_pretrained(folder)
        byte_tokenizer().save(str(folder / "tokenizer.json"))

    return save


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty folder for what huggingface_hub fetches, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs the extra `hub`")
    import jsparse.hub

    def forget():
        jsparse.hub._fetch_small.cache_clear()
        jsparse.hub._fetch_weights.cache_clear()
        jsparse.hub.list_dataset.cache_clear()

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget()
    yield tmp_path / "hub"
    forget()


@pytest.fixture(scope="session")
def store_snapshot():
    """``store_snapshot(cache, repository, commit, files, **refs)`` fills such a folder, as the library does.

    The snapshot of the commit has links to blobs; ``refs`` are branches and tags with their commits.
    """

    def store(cache: Path, repository: str, commit: str, files: dict[str, bytes], **refs: str) -> Path:
        home = cache / f"models--{repository.replace('/', '--')}"
        snapshot = home / "snapshots" / commit
        for part in (snapshot, home / "blobs", home / "refs"):
            part.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if "/" not in name:
                (home / "blobs" / f"{commit[:4]}-{name}").write_bytes(content)
                (snapshot / name).symlink_to(f"../../blobs/{commit[:4]}-{name}")
        for ref, at in refs.items():
            (home / "refs" / ref).write_text(at)
        return snapshot

    return store


# One small model for all tests of serving and of evaluation, and the oracle: the same model without a cache.


@pytest.fixture(scope="session")
def model():
    from flax import nnx

    from jsparse.models import Llama, LlamaConfig

    model = Llama(LlamaConfig.tiny(**_SERVED), rngs=nnx.Rngs(0))
    assert model.lm_head is not None
    kernel = model.lm_head.kernel
    kernel[...] = kernel[...].at[:, 60].set(0)  # its end token is never the most likely one
    return model


@pytest.fixture(scope="session")
def one_layer():
    """The configuration of a model that compiles faster."""
    from jsparse.models import LlamaConfig

    return LlamaConfig.tiny(**_SERVED, num_hidden_layers=1)


@pytest.fixture(scope="session")
def small(one_layer):
    from flax import nnx

    from jsparse.models import Llama

    return Llama(one_layer, rngs=nnx.Rngs(0))


@pytest.fixture(scope="session")
def uncached():
    """logits [T, vocab] of a sequence without a cache; one compilation for every length up to 128."""
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    call = nnx.jit(lambda model, tokens, mask: model(tokens, mask=mask), static_argnames="mask")

    def logits(model, tokens, mask=None):
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(call(model, jnp.array(padded), mask))[0, : len(tokens)]

    return logits
