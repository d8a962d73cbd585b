"""What goes wrong in the code that was published with LServe (omniserve) must hold here.

Each has its test where it belongs; here are those without a better place.

 1. A ring cut to the sink's size: jsparse/test_streaming_heads.py, "lserves_sizes", "every_prompt_length".
 2. A ring turned whenever a page is added: the same two, over three turns.
 3. Bounds of a recycled page never reset: jsparse/test_cache.py, "appending_pools_like_the_whole_prompt",
    from NaN and 1e30; for codes jsparse/test_quantised_cache.py, "bounds_are_of_the_keys".
 4. A reused list that forces an old last page: jsparse/test_reuse.py, "the_first_token_of_a_new_page",
    "every_step_reads" and "reused_lists_hold".
 5. Ragged batches selected by the longest: jsparse/test_reuse.py, "every_step_reads"; serve/test_batch.py.
 6. One list for a layer, whoever joins: serve/test_batch.py, "come_and_go" and "at_their_own_tokens".
 7. A layer without retrieval heads: jsparse/test_decode.py, "prompts_in_chunks" with streaming heads
    (0, 1, 2); beside one that selects: here.
 8. Codes that wrap around, constant vectors: jsparse/test_quantised_cache.py, "no_value_wraps_around".
 9. int8 whatever the model is: jsparse/test_quantised_cache.py, "holds_the_very_numbers"; the default: here.
10. Heads of equal scores drawn by chance: jsparse/test_heads.py, "ties_stream_in_order" and "the_count".
11. Architectures that cannot be built: here.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jsparse.models import Llama, LlamaConfig
from jsparse.serve import CacheConfig, decode_logits
from jsparse.serve.layout import layout_of
from jsparse.serve.state import ModelShape, new_state

# Two pages of 8 tokens and a ring that holds them too: up to there nothing is hidden, beyond it much is.
CACHE = CacheConfig(
    capacity=64, batch=1, page_size=8, logical_page_size=4, budget=16, sink=2, window=14, prefill_chunk=16
)
FIELDS = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


def hf_config(model_type, layers):
    config = LlamaConfig.from_hf({"model_type": model_type, "num_hidden_layers": layers} | FIELDS)
    assert config.model_type == model_type
    return config


def assert_dense_within_the_budget(uncached, config, streaming_heads):
    model = Llama(config, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 61, 40)
    cache = dataclasses.replace(CACHE, streaming_heads=streaming_heads)
    logits, expected = decode_logits(model, tokens[:2], tokens[2:], cache), uncached(model, tokens)
    np.testing.assert_allclose(logits[:14], expected[2:16], atol=1e-4)
    assert np.isfinite(logits).all() and np.abs(logits[14:] - expected[16:]).max() > 1e-3


# Llama is what all other tests serve. Mistral differs by its windows: test_generate.py, "sliding_windows".
def test_qwen2_takes_the_sparse_cache(uncached):
    assert_dense_within_the_budget(uncached, hf_config("qwen2", 1), [[True, False]])


def test_qwen3_takes_a_layer_that_only_streams_beside_one_that_selects(uncached):
    assert_dense_within_the_budget(uncached, hf_config("qwen3", 2), [[True, True], [False, False]])


def test_an_architecture_that_is_not_supported_is_refused_by_name():
    with pytest.raises(
        ValueError, match="'mixtral' is not supported; allowed are llama, mistral, qwen2, qwen3"
    ):
        hf_config("mixtral", 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_cache_is_quantised_unless_that_is_asked_for(model, dtype):
    def types(**fields):
        cache = dataclasses.replace(CACHE, streaming_heads=[[True, False]] * 2, select_every=1, **fields)
        layout = layout_of(cache, model.config)
        state = jax.eval_shape(lambda: new_state(layout, ModelShape(4, 2, 8, 32, dtype)))
        return {str(leaf.dtype) for leaf in jax.tree.leaves(state.layers)}

    assert CacheConfig().kv_bits is None and types() == {jnp.dtype(dtype).name}
    assert types(kv_bits=4) == {"int8", "float32", jnp.dtype(dtype).name}  # the ring stays as it is
