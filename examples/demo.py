"""The whole path in minutes on a CPU: train, extend with LongLoRA, measure, generate from a sparse cache.

The text is the Python standard library's own sources, one byte per token. Every number is measured in the
run. The model is far too small to write Python: the demo shows that each step works, and what it changes.
"""

import dataclasses
import shutil
import statistics
import time
from pathlib import Path

import jax
import numpy as np
import tokenizers
from flax import nnx
from rich.console import Console

from jsparse.evaluate.compare import difference
from jsparse.examples.report import check_can_draw, draw_plot, print_trained
from jsparse.examples.settings import DemoConfig as DemoConfig
from jsparse.models import Llama, LlamaConfig, byte_tokenizer, load_tokenizer
from jsparse.reports.console import write_json
from jsparse.reports.machine import describe_machine
from jsparse.reports.progress import progress_bar
from jsparse.serve import CacheConfig, SamplingParams, decode_logits, generate
from jsparse.texts.corpus import standard_library_files
from jsparse.train import FinetuneConfig, finetune, perplexity_by_context, read_documents, shifted_head_masks

END_OF_TEXT = 256  # the byte tokenizer's one id that is not a byte
RESULTS = "demo.json"
PROMPTS = 4  # held-out modules that the logits are compared on
TIMED_RUNS = 5  # after one that compiles; the median speed counts


def run_demo(config: DemoConfig) -> dict:
    """Run every step, print the tables, and return what ``demo.json`` in the output folder holds."""
    check_can_draw()
    train_files, held_out_files = standard_library_files()
    prepare_output(config.output)
    console = Console(stderr=True)
    started = time.perf_counter()

    console.rule(f"1/5 train a byte-level Llama at {config.context} tokens")
    base = train_base(config, train_files)
    console.rule("2/5 import it again")
    model = Llama.from_pretrained(base)
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    console.print(f"{base}: {parameters:,} parameters")
    console.rule(f"3/5 extend it to {config.long_context} tokens with LongLoRA")
    long = extend(config, base, train_files)
    console.rule("4/5 perplexity on held-out modules")
    documents = read_documents(held_out_files, load_tokenizer(base), eos_token_id=END_OF_TEXT, vocab_size=257)
    perplexity = measure_perplexity(
        config, base, long, pieces(documents, 4 * config.long_context, config.evaluation_tokens)
    )
    console.rule(f"5/5 generate after {config.prompt_tokens} tokens, from a dense and from sparse caches")
    extended = Llama.from_pretrained(long)
    # Learned gates would say which heads stream without harm (DuoAttention). Here half of each layer's do.
    kv_heads = extended.config.num_key_value_heads
    streaming_heads = np.tile(np.arange(kv_heads) < kv_heads // 2, (extended.config.num_hidden_layers, 1))
    generation = measure_generation(
        extended,
        load_tokenizer(long),
        documents,
        cache_kinds(config, streaming_heads),
        config.prompt_tokens,
        config.new_tokens,
    )

    results = {
        "settings": dataclasses.asdict(config) | {"output": str(config.output)},
        "machine": describe_machine(),
        "parameters": parameters,
        "training_files": [file.name for file in train_files],
        "held_out_files": [file.name for file in held_out_files],
        "contexts": config.contexts,
        "perplexity": perplexity,
        "generation": generation,
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(config.output / RESULTS, results)
    draw_plot(results, config.output / "demo.png", "perplexity per byte, held-out modules")
    print_trained(results)
    return results


def prepare_output(output: Path) -> None:
    """Empty the output folder of an earlier demo. Raises ValueError for other folders that are not empty."""
    if output.exists() and (
        not output.is_dir() or (any(output.iterdir()) and not (output / RESULTS).is_file())
    ):
        raise ValueError(f"output: {output} is there and no earlier demo wrote it; name a new folder")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    write_json(output / RESULTS, {})  # marks the folder, so an interrupted demo can be run again


def train_base(config: DemoConfig, files: tuple[Path, ...]) -> Path:
    """Train every parameter of a random model with full attention at the short context."""
    start = config.output / "random"
    llama = LlamaConfig(
        vocab_size=257,
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        eos_token_ids=(END_OF_TEXT,),
        initializer_range=0.08,  # 1 / sqrt(hidden_size), for such a narrow model
    )
    Llama(llama, rngs=nnx.Rngs(config.seed)).save_pretrained(start)
    byte_tokenizer().save(str(start / "tokenizer.json"))
    result = finetune(
        FinetuneConfig(
            model=start,
            data=files,
            output=config.output / "base",
            context=config.context,
            attention="full",
            lora_rank=None,
            steps=config.base_steps,
            batch_size=max(1, config.batch_tokens // config.context),
            learning_rate=2e-3,
            schedule="cosine",
            warmup_steps=min(20, config.base_steps - 1),
            weight_decay=0.01,
            checkpoint_every=config.base_steps,
            seed=config.seed,
        )
    )
    return result.output


def extend(config: DemoConfig, base: Path, files: tuple[Path, ...]) -> Path:
    """LongLoRA: interpolated positions, shifted groups, LoRA with embeddings and norms."""
    result = finetune(
        FinetuneConfig(
            model=base,
            data=files,
            output=config.output / "long",
            context=config.long_context,
            attention="shifted",
            group_size=config.group_size,
            lora_rank=8,
            steps=config.extension_steps,
            batch_size=max(1, config.batch_tokens // config.long_context),
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=min(10, config.extension_steps - 1),
            checkpoint_every=config.extension_steps,
            seed=config.seed + 1,
        )
    )
    return result.output


def pieces(documents: list[np.ndarray], length: int, tokens: int) -> np.ndarray:
    """The first ``length`` tokens of every document that long, joined and cut to ``tokens`` in all.

    >>> pieces([np.array([1, 2, 3]), np.array([4]), np.array([5, 6])], 2, 3)
    array([1, 2, 5])
    """
    return np.concatenate([document[:length] for document in documents if len(document) >= length])[:tokens]


def measure_perplexity(
    config: DemoConfig, base: Path, long: Path, tokens: np.ndarray
) -> dict[str, list[float]]:
    """Perplexity at every context length, by model and attention.

    The models are the base, the base with positions interpolated but without training, and the extended model
    with full attention and with the pattern that it was trained with.
    """
    model, interpolated, extended = (Llama.from_pretrained(folder) for folder in (base, base, long))
    interpolated.config = interpolated.config.extend_context(config.long_context)
    shifted = shifted_head_masks(model.config.num_attention_heads, config.group_size)
    rows = {
        "base": (model, None),
        "base, positions interpolated": (interpolated, None),
        "LongLoRA, full attention": (extended, None),
        f"LongLoRA, shifted groups of {config.group_size}": (extended, shifted),
    }
    perplexity = {}
    for name, (llama, mask) in rows.items():
        results = perplexity_by_context(
            llama, tokens, config.contexts, mask_for=lambda _, mask=mask: mask, batch_size=4
        )
        perplexity[name] = [result.perplexity for result in results]
    return perplexity


def cache_kinds(config: DemoConfig, streaming_heads: np.ndarray) -> dict[str, CacheConfig]:
    """The caches to compare, the dense one first."""
    dense = CacheConfig(budget=None, page_size=32, logical_page_size=16, capacity=config.long_context)
    pages = dataclasses.replace(dense, budget=config.budget)
    both = dataclasses.replace(pages, streaming_heads=streaming_heads, sink=config.sink, window=config.window)
    return {"dense": dense, "pages": pages, "pages and streaming": both}


def measure_generation(
    model: Llama,
    tokenizer: tokenizers.Tokenizer,
    documents: list[np.ndarray],
    caches: dict[str, CacheConfig],
    prompt_tokens: int,
    new_tokens: int,
) -> dict[str, dict]:
    """Speed, text and distance from the logits of the first cache, the dense one, for each cache.

    The prompts are from the middle of held-out modules. Speed (after the prefill) and text are those of the
    first prompt; logits are compared over the true continuations of all prompts.
    """
    needed = prompt_tokens + new_tokens
    middles = [document[len(document) // 2 :] for document in documents]
    texts = [tokens[:needed] for tokens in middles if len(tokens) >= needed][:PROMPTS]
    prompts, continuations = zip(*(np.split(text, [prompt_tokens]) for text in texts), strict=True)
    sampling = SamplingParams(temperature=0.7, ignore_eos=True)
    dense, measured = None, {}
    with progress_bar(True) as bar:
        task = bar.add_task("generating", total=len(caches) * (1 + TIMED_RUNS + len(prompts)), note="")
        for name, cache in caches.items():
            runs = []
            for _ in range(1 + TIMED_RUNS):
                runs.append(generate(model, [prompts[0]], new_tokens, sampling, cache))
                bar.update(task, advance=1, note=name)
            logits = []
            for prompt, continuation in zip(prompts, continuations, strict=True):
                logits.append(decode_logits(model, prompt, continuation, cache))
                bar.update(task, advance=1)
            dense = np.concatenate(logits) if dense is None else dense
            measured[name] = {
                "tokens_per_second": statistics.median(
                    run.stats.decode_tokens_per_second for run in runs[1:]
                ),
                "cache_bytes": runs[0].stats.cache_bytes,
                "text": tokenizer.decode(runs[0].tokens[0]),
                **difference(dense, np.concatenate(logits)),
            }
    return measured
