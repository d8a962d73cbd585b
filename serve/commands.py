"""The commands of this room: ``jsparse generate | plan generate``.

What needs jax is imported once the options are parsed, so that --help answers at once.
"""

import dataclasses
import json
import os
import stat
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsparse.models.mesh_config import MeshConfig
from jsparse.models.options import ModelOptions
from jsparse.plan.memory_fraction import DEFAULT_MEMORY_FRACTION
from jsparse.reports.console import check_can_write, parse, print_part, rate_of, write_json
from jsparse.serve.config import CacheConfig
from jsparse.serve.options import CacheOptions, SamplingOptions

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from jsparse.models import Llama
    from jsparse.serve.prompts import Prompt
    from jsparse.serve.sampling import SamplingParams
else:
    Llama = Prompt = SamplingParams = Tokenizer = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateCommand(SamplingOptions, CacheOptions, ModelOptions):
    """Print the continuation of a prompt as it is generated; tokens per second go to stderr.

    The cache is dense unless --budget, --pattern or --policy makes it sparse. Text may come from a pipe too.
    """

    prompt: str | None = None
    """The text to continue. Special tokens written in it are those tokens."""
    prompt_file: Path | None = None
    """A UTF-8 file with the text to continue; "-" is standard input."""
    messages: Path | None = None
    """A JSON file with a conversation, a list of {"role": ..., "content": ...}, which the model's own chat
    template renders; "-" is standard input."""
    prompts: Path | None = None
    """A file with a JSON object per line, {"prompt": ...} or {"messages": ...}, with an "id" if you like; "-"
    is standard input. The results are JSON lines too, with the number of the prompt, from 0, and its id."""
    n: int = 1
    """Samples per prompt; more than one are printed as JSON lines."""
    batch_size: int = 8
    """With --prompts: how many are continued at once."""

    def __post_init__(self):
        ways = ("prompt", "prompt_file", "messages", "prompts")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) > 1 or (not given and not _is_piped()):
            raise ValueError(
                "exactly one of --prompt and --prompt-file must be given, or of --messages and --prompts; "
                "a text may also come from a pipe"
            )
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, not {self.batch_size}")
        super().__post_init__()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanGenerateCommand(CacheOptions):
    """What generation needs on each device, for prompts of one length. No weights are read."""

    model: str | Path
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
    from jsparse.models import Llama, load_chat_template, load_config, load_tokenizer
    from jsparse.serve.head_order import streaming_heads_last

    cache = command.cache()  # first: its errors come before the model is loaded
    sampling, max_new, notes = command.sampling(command.model)
    sampling = dataclasses.replace(sampling, n=command.n)
    prompts = _read_prompts(command)
    config, tokenizer = load_config(command.model), load_tokenizer(command.model)
    talks = any(prompt.text is None for prompt in prompts)
    template = load_chat_template(command.model) if talks else None
    ids = [prompt.encode(tokenizer, template, config.vocab_size) for prompt in prompts]
    for note in notes:
        print(f"jsparse: {note}", file=sys.stderr)
    model, cache = streaming_heads_last(Llama.from_pretrained(command.model, dtype=command.dtype), cache)
    if command.prompts is None and command.n == 1:
        _print_as_it_comes(command, model, tokenizer, ids[0], max_new, sampling, cache)
    else:
        names = [prompt.id for prompt in prompts]
        _print_lines(command, model, tokenizer, ids, names, max_new, sampling, cache)


def _is_piped() -> bool:
    """Whether standard input is a pipe or a file: nobody is asked to type a text."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # closed, or no file at all
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _read_prompts(command: GenerateCommand) -> list[Prompt]:
    from jsparse.serve.prompts import Prompt, read_conversation, read_prompts, read_text

    if command.prompts is not None:
        return read_prompts(command.prompts)
    if command.messages is not None:
        return [read_conversation(command.messages)]
    if command.prompt is not None:
        return [Prompt(text=command.prompt)]
    return [read_text(command.prompt_file or Path("-"))]


def _print_as_it_comes(
    command: GenerateCommand,
    model: Llama,
    tokenizer: Tokenizer,
    ids: list[int],
    max_new: int,
    sampling: SamplingParams,
    cache: CacheConfig,
) -> None:
    """Print one text token by token, and its speed on stderr."""
    from jsparse.serve.generation import stream

    arrivals = [time.perf_counter()]
    reason = None
    for event in stream(model, [ids], max_new, sampling, cache, command.seed, tokenizer):
        reason = event.finish_reason
        if event.token is None:
            raise FloatingPointError(
                f"the logits of {command.model} are not finite after {len(arrivals) - 1} tokens"
            )
        arrivals.append(time.perf_counter())
        print_part(event.text)
    print()
    _report_speed(arrivals, len(ids), str(reason))


def _print_lines(
    command: GenerateCommand,
    model: Llama,
    tokenizer: Tokenizer,
    ids: list[list[int]],
    names: list[str | int | None],
    max_new: int,
    sampling: SamplingParams,
    cache: CacheConfig,
) -> None:
    """Print a JSON object per sample, those of one prompt after another, batch by batch."""
    from jsparse.serve.generation import generate
    from jsparse.serve.layout import capacity_for

    # One capacity for all batches, so that they compile once.
    cache = dataclasses.replace(cache, capacity=capacity_for(cache, max(map(len, ids)) + max_new))
    for start in range(0, len(ids), command.batch_size):
        batch = ids[start : start + command.batch_size]
        result = generate(model, batch, max_new, sampling, cache, command.seed, tokenizer)
        for i, (text, tokens, reason) in enumerate(
            zip(result.texts, result.tokens, result.finish_reasons, strict=True)
        ):
            number, sample = divmod(i, command.n)
            line: dict[str, Any] = {"prompt": start + number}
            line |= {"id": names[start + number]} if names[start + number] is not None else {}
            line |= {"sample": sample} if command.n > 1 else {}
            line |= {"text": text, "finish_reason": reason}
            line |= {"prompt_tokens": len(batch[number]), "new_tokens": len(tokens)}
            print(json.dumps(line, ensure_ascii=False), flush=True)


def _report_speed(arrivals: list[float], prompt_tokens: int, reason: str) -> None:
    """Print the speed on stderr. The first call for a prompt and the first for a token compile."""
    start, *arrivals = arrivals
    print(f"prompt of {prompt_tokens} tokens: {arrivals[0] - start:.2f} s with compiling", file=sys.stderr)
    print(f"{len(arrivals)} tokens{rate_of(arrivals)}; ended by {reason}", file=sys.stderr)


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
