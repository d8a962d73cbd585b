"""The commands of this room: ``jsparse generate | plan generate``.

What needs jax is imported once the options are parsed, so that --help answers at once.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Literal

import jsparse
from jsparse.models.mesh_config import MeshConfig
from jsparse.models.shipped import shipped_model
from jsparse.plan.memory_fraction import DEFAULT_MEMORY_FRACTION
from jsparse.reports.console import DefaultsToShipped, check_can_write, parse, write_json
from jsparse.serve.config import CacheConfig, Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What the cache keeps and reads. It is dense unless --budget, --pattern or --policy makes it sparse."""

    budget: int | None = None
    """Tokens of the cache that a retrieval head reads per step, in whole pages; all of them by default."""
    policy: Policy = "lserve"
    """What chooses those tokens; with "streaming" every head streams, with "quest" none."""
    page_size: int | None = None
    """Tokens per page of the cache: 64 by default, and 16 for Quest."""
    kv_bits: Literal[8, 4] | None = None
    """Keep pages as codes of this many bits; by default in the model's dtype."""
    pattern: Path | None = None
    """A head pattern (DuoAttention's full_attention_heads.tsv): the heads with its lowest scores stream."""
    sparsity: float | None = None
    """With --pattern: the fraction of the KV heads that stream; half of them unless given."""
    sink: int | None = None
    """First tokens that a streaming head keeps; 128 unless given."""
    window: int | None = None
    """Recent tokens that a streaming head keeps; 256 unless given."""
    prefill_window: int | None = None
    """Recent tokens that a streaming head sees within the prompt; those of --window unless given."""

    def __post_init__(self):
        if self.pattern is None and self.sparsity is not None:
            raise ValueError("--sparsity says how many heads of a --pattern stream, and none is given")
        for name in ("sink", "window", "prefill_window"):
            if self.pattern is None and self.policy != "streaming" and getattr(self, name) is not None:
                option = name.replace("_", "-")
                raise ValueError(
                    f"--{option} is for streaming heads: give a --pattern, or --policy streaming"
                )
        if self.pattern is not None and self.policy in ("dense", "streaming", "quest"):
            raise ValueError(f"--policy {self.policy} does not ask which heads of a --pattern stream")
        if self.policy in ("dense", "streaming") and self.budget is not None:
            raise ValueError(f"--policy {self.policy} chooses no pages, so a --budget means nothing to it")
        if self.policy in ("quest", "mean", "oracle", "random") and self.budget is None:
            raise ValueError(
                f"--policy {self.policy} chooses what is read within a --budget, and none is given"
            )

    def cache(self) -> CacheConfig:
        """The cache that the options describe. Raises ValueError, before any model is loaded."""
        names = ("policy", "budget", "page_size", "kv_bits", "prefill_window")
        given = {name: getattr(self, name) for name in names}
        given |= {name: getattr(self, name) for name in ("sink", "window") if getattr(self, name) is not None}
        if self.pattern is not None:
            sparsity = 0.5 if self.sparsity is None else self.sparsity
            given["streaming_heads"] = jsparse.HeadPattern.load(self.pattern).threshold(sparsity)
        return CacheConfig(**given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateCommand(CacheOptions):
    """Print the continuation of a prompt as it is generated; tokens per second go to stderr.

    The cache is dense unless --budget, --pattern or --policy makes it sparse.
    """

    model: DefaultsToShipped = shipped_model()
    """A Hugging Face folder with config.json, safetensors and tokenizer.json, or an id on the Hub:
    org/name or org/name@revision."""
    prompt: str | None = None
    """The text to continue."""
    prompt_file: Path | None = None
    """A UTF-8 file with the text to continue."""
    max_new_tokens: int = 64
    """Stop after this many tokens, or at the model's end-of-sequence token."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_k: int = 0
    """Sample among the k most likely tokens only; 0 for all."""
    top_p: float = 1.0
    """Sample among the fewest most likely tokens whose probabilities sum to at least this."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self):
        if (self.prompt is None) == (self.prompt_file is None):
            raise ValueError("exactly one of --prompt and --prompt-file must be given")
        super().__post_init__()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanGenerateCommand(CacheOptions):
    """What generation needs on each device, for prompts of one length. No weights are read."""

    model: Path
    """A folder with the model's config.json, or an id on the Hugging Face Hub; no weights are fetched."""
    prompt_tokens: int
    """Tokens per prompt."""
    max_new_tokens: int = 64
    """Tokens to generate after each prompt."""
    batch: int = 1
    """Prompts per batch."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of the weights."""
    mesh: MeshConfig = MeshConfig()  # noqa: B008, it is frozen
    """How many devices split each part of the work."""
    device: str = "h200"
    """"h200", "h100-80gb" or "a100-80gb"."""
    memory_fraction: float = DEFAULT_MEMORY_FRACTION
    """Fraction of the memory that JAX takes for arrays (XLA_CLIENT_MEM_FRACTION)."""
    json: Path | None = None
    """Write the plan to this file instead of printing tables; "-" is stdout."""


def generate(options: list[str]) -> None:
    command = parse(GenerateCommand, "generate", options)
    import numpy as np
    from tokenizers.decoders import DecodeStream

    from jsparse.models import Llama, load_tokenizer, reorder_heads
    from jsparse.serve.generation import stream
    from jsparse.serve.sampling import SamplingParams
    from jsparse.texts.tokenizer import prompt_ids

    cache = command.cache()  # first: its errors come before the model is loaded
    sampling = SamplingParams(temperature=command.temperature, top_k=command.top_k, top_p=command.top_p)
    prompt = _read_text(command.prompt_file) if command.prompt_file else command.prompt or ""
    tokenizer = load_tokenizer(command.model)
    model = Llama.from_pretrained(command.model)
    if cache.streaming_heads is not None:
        model, streams = reorder_heads(model, np.array(cache.streaming_heads))
        cache = dataclasses.replace(cache, streaming_heads=streams)

    ids = prompt_ids(tokenizer, prompt)
    text = DecodeStream(ids=ids, skip_special_tokens=True)  # holds back incomplete characters
    arrivals = [time.perf_counter()]
    reason = None
    for event in stream(model, [ids], command.max_new_tokens, sampling, cache, seed=command.seed):
        reason = event.finish_reason
        if event.token is None:
            raise FloatingPointError(
                f"the logits of {command.model} are not finite after {len(arrivals) - 1} tokens"
            )
        arrivals.append(time.perf_counter())
        print(text.step(tokenizer, event.token) or "", end="", flush=True)
    print()
    _report_speed(arrivals, len(ids), str(reason))


def _report_speed(arrivals: list[float], prompt_tokens: int, reason: str) -> None:
    """Print the speed on stderr. The first call for a prompt and the first for a token compile."""
    start, first, *later = arrivals
    print(f"prompt of {prompt_tokens} tokens: {first - start:.2f} s with compiling", file=sys.stderr)
    rate = (
        f", {(len(later) - 1) / (later[-1] - later[0]):.1f} tokens/s after the second"
        if len(later) > 1
        else ""
    )
    print(f"{len(arrivals) - 1} tokens{rate}; ended by {reason}", file=sys.stderr)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_file: {file} is not UTF-8 text: {error}") from error


def plan_generate(options: list[str]) -> int:
    command = parse(PlanGenerateCommand, "plan generate", options)
    check_can_write(command.json, "json")
    from jsparse.models import load_config
    from jsparse.plan.compile_only import prepare_process
    from jsparse.plan.program import compiler_errors_explained, print_plan
    from jsparse.serve.plan import plan_generate as make_plan

    prepare_process()
    names = ("device", "prompt_tokens", "max_new_tokens", "batch", "dtype", "mesh", "memory_fraction")
    with compiler_errors_explained():
        plan = make_plan(
            load_config(command.model), command.cache(), **{name: getattr(command, name) for name in names}
        )
    if command.json is None:
        print_plan(plan)
    else:
        write_json(command.json, plan.to_json())
    return 0 if plan.fits else 1
