"""Our side of the rows of the CPU benchmark that run a whole model: generation, and a step of fine-tuning."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cpu import inputs
from cpu.rows import Sizes, sizes
from cpu.workers import Ready, repeated
from jsparse import PooledBlocks
from jsparse.evaluate.speed.settings import last_heads_stream
from jsparse.models import Llama, LlamaConfig
from jsparse.serve import CacheConfig, SamplingParams, generate
from jsparse.train import FinetuneConfig
from jsparse.train.start import is_trained, make_step, prepare
from jsparse.train.step import new_state, split_model


def make(spec: Mapping[str, Any]) -> Ready:
    of, length = sizes(spec["small"]), spec["length"]
    model = base_model(Path(spec["folder"]), of)
    policy = spec["name"].removeprefix("jsparse, ")
    if spec["row"] == "generate":
        return generation(model, policy, length, of)
    return training_step(model, policy, length, of)


def base_model(folder: Path, of: Sizes) -> Llama:
    """A Llama with random weights, the same each time. The first call saves it for the peers."""
    config = LlamaConfig(
        vocab_size=of.vocabulary,
        hidden_size=of.hidden,
        intermediate_size=of.ffn,
        num_hidden_layers=of.layers,
        num_attention_heads=of.model_heads,
        num_key_value_heads=of.model_kv_heads,
        max_position_embeddings=1 << 17,
    )
    model = Llama(config, rngs=nnx.Rngs(0))
    if not (folder / "config.json").exists():
        model.save_pretrained(folder)
    return model


def cache_config(policy: str, model: LlamaConfig, capacity: int, of: Sizes) -> CacheConfig:
    if policy == "dense":
        return CacheConfig(policy="dense", capacity=capacity)
    streams = last_heads_stream(model, 0.5)
    estimate = PooledBlocks(budget=of.prompt_budget) if policy == "sparse prompt" else None
    return CacheConfig(
        budget=of.budget, streaming_heads=streams, prefill_estimate=estimate, capacity=capacity
    )


def generation(model: Llama, policy: str, length: int, of: Sizes) -> Ready:
    prompt = inputs.tokens(length, of)
    page, _ = CacheConfig().page_sizes()
    cache = cache_config(policy, model.config, -(-(length + of.new_tokens) // page) * page, of)
    greedy = SamplingParams(temperature=0.0, ignore_eos=True)
    said: dict[str, Any] = {}

    def call(prompt: np.ndarray):
        return generate(model, [prompt], of.new_tokens, greedy, cache)

    def run(repeats: int) -> dict[str, float]:
        results = [call(prompt) for _ in range(repeats)]
        said["tokens"] = results[-1].tokens[0]
        stats = [result.stats for result in results]
        return {
            "prefill": sum(each.prefill_seconds for each in stats) / repeats,
            "token": sum(each.decode_seconds / each.decode_steps for each in stats) / repeats,
        }

    # Compiled functions depend on the capacity, not on the prompt: more than one chunk of it is enough.
    call(prompt[: 2 * cache.prefill_chunk])

    def outputs() -> dict[str, np.ndarray]:
        """Logits at the start of the prompt, which need no cache: they show that the weights are the same."""
        return {"logits": np.asarray(model(jnp.asarray(prompt[None, :512])))[:, :, None]}

    return Ready(run, outputs, lambda: dict(said))


def training_step(model: Llama, attention: str, length: int, of: Sizes) -> Ready:
    """LongLoRA's recipe: LoRA, embeddings and norms, one window of the context."""
    run = FinetuneConfig(model="-", data="-", output="-", context=length, attention=attention, batch_size=1)
    config = dataclasses.replace(model.config, max_position_embeddings=1 << 17)
    params, split = split_model(prepare(run, model), is_trained(run))
    step = make_step(run, split, run.pattern(config).masks(config, length), None)
    state = new_state(params, run.optimizer())
    window = inputs.tokens(length, of)[None, None]
    batch = window, np.ones_like(window), np.ones(window.shape, bool)

    def call() -> float:
        nonlocal state
        state, metrics = step(state, split.frozen, *batch)
        return float(metrics.loss)

    def outputs() -> dict[str, np.ndarray]:
        return {"loss": np.full((1, 1, 1, 1), call(), np.float32)}

    about = {"trained": sum(x.size for x in jax.tree.leaves(params))}
    return Ready(repeated(call), outputs, lambda: about)
