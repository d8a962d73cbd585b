"""A tiny byte-level checkpoint and some text to train it on."""

import jax
import pytest
from flax import nnx

from jsparse.models import Llama, LlamaConfig, byte_tokenizer

CONTEXT = 32
END_OF_TEXT = 256


def make_checkpoint(folder, **changes):
    """A random model with perturbed norms, so that no parameter is at a value that hides a mistake."""
    fields = {
        "intermediate_size": 48,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.12,
        "eos_token_ids": (END_OF_TEXT,),
    }
    model = Llama(LlamaConfig.tiny(**fields | changes), rngs=nnx.Rngs(0))
    for number, (path, parameter) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.Param))):
        if path[-1] == "scale":
            noise = jax.random.normal(jax.random.key(number), parameter.shape)
            parameter[...] = parameter[...] + 0.1 * noise
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "base")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Two documents of a language with little to learn."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("the cat sat on the mat. " * 30, encoding="utf-8")
    (folder / "b.txt").write_text("the dog ran. " * 20, encoding="utf-8")
    return folder / "a.txt", folder / "b.txt"


@pytest.fixture(scope="session")
def save_checkpoint():
    """``save_checkpoint(folder, **fields)`` writes a checkpoint like ``base``, with other fields."""
    return make_checkpoint
