"""The model of the serving benchmarks, and which of its heads stream."""

from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from jsparse.evaluate.speed.options import check_integers as check_integers
from jsparse.evaluate.speed.options import check_list as check_list
from jsparse.evaluate.speed.options import last_heads_stream as last_heads_stream
from jsparse.models import Llama, LlamaConfig, load_config
from jsparse.models.choices import Dtype
from jsparse.models.positions import check_length

# The model if no checkpoint is given: 32.5 million parameters, few enough for the cache to matter.
RANDOM_LLAMA = LlamaConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=1 << 20,
)


def model_config(folder: str | Path | None, contexts: tuple[int, ...], new_tokens: int) -> LlamaConfig:
    """The configuration of a checkpoint, or of the random model, without weights.

    Raises ValueError if a context and ``new_tokens`` after it exceed the model's positions.
    """
    config = RANDOM_LLAMA if folder is None else load_config(folder)
    longest = max(contexts)
    tokens = f"contexts has {longest}, which with {new_tokens} new tokens is {longest + new_tokens}"
    check_length(config, longest + new_tokens, tokens, "choose shorter ones")
    return config


def load_model(folder: str | Path | None, dtype: Dtype | None) -> Llama:
    if folder is None:
        return Llama(RANDOM_LLAMA, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype or "float32"))
    return Llama.from_pretrained(folder, dtype=dtype)
