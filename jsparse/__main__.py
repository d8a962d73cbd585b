"""The command line: ``jsparse finetune | generate | evaluate | heads | bench | demo``.

The one module that knows every room. Rooms are imported when a command needs them, so that ``--help`` answers
at once.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TypeVar

import tyro

Config = TypeVar("Config")

_USAGE = """usage: jsparse COMMAND [options]

  finetune   extend a model's context with LongLoRA, or train it
  generate   generate text from a prompt, with a dense or a sparse KV cache
  evaluate   perplexity of text files at several context lengths
  heads      learn which KV heads need the whole context (DuoAttention)
  bench      measure the time of a token (bench decode) or of a prompt (bench prefill) by context length
  demo       all of it on a small model and real text, in a few minutes on a CPU

jsparse COMMAND --help lists the options; jsparse --version prints the version."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateCommand:
    """Print the continuation of a prompt as it is generated; tokens a second go to stderr.

    The cache is dense unless --budget, --pattern or --policy makes it sparse.
    """

    model: Path
    """A Hugging Face folder with config.json, safetensors and tokenizer.json."""
    prompt: str | None = None
    """The text to continue."""
    prompt_file: Path | None = None
    """A UTF-8 file with the text to continue."""
    max_new_tokens: int = 64
    """Stop after so many tokens, or at the model's end-of-sequence token."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability."""
    seed: int = 0
    """Of the sampling."""
    budget: int | None = None
    """Tokens of the cache that a retrieval head reads a step, in whole pages; all of them by default."""
    policy: Literal["lserve", "dense", "streaming", "quest", "oracle", "random"] = "lserve"
    """What decides which tokens those are; "streaming" lets every head stream, "quest" none."""
    page_size: int | None = None
    """Tokens a page of the cache: 64 by default, and 16 for Quest."""
    kv_bits: Literal[8, 4] | None = None
    """Keep pages as codes of so many bits; by default as the model computes."""
    pattern: Path | None = None
    """A head pattern (DuoAttention's full_attention_heads.tsv): its lowest scores become streaming heads."""
    sparsity: float | None = None
    """With --pattern: the fraction of the KV heads that stream (default 0.5)."""
    sink: int | None = None
    """First tokens that a streaming head keeps (default 128)."""
    window: int | None = None
    """Recent tokens that a streaming head keeps (default 256)."""
    prefill_window: int | None = None
    """Recent tokens that a streaming head sees within the prompt (default: as --window)."""

    def __post_init__(self):
        if (self.prompt is None) == (self.prompt_file is None):
            raise ValueError("exactly one of --prompt and --prompt-file must be given")
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
        if self.policy in ("quest", "oracle", "random") and self.budget is None:
            raise ValueError(
                f"--policy {self.policy} chooses what is read within a --budget, and none is given"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """Perplexity of text files at several context lengths: the same tokens, with more or less before them."""

    model: Path
    """A Hugging Face folder with config.json, safetensors and tokenizer.json."""
    data: tuple[Path, ...]
    """UTF-8 text files, each one document; they are scored one after another in one row."""
    contexts: tuple[int, ...] = (1024,)
    """Tokens a window."""
    attention: Literal["full", "shifted"] = "full"
    """"full" causal attention, or LongLoRA's "shifted" groups of a quarter of each context."""
    max_windows: int | None = None
    """Score the first so many windows of each context only."""
    batch_size: int = 1
    """Windows at a time."""
    json: Path | None = None
    """Write the results to this file too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 2, with one line on stderr, where the input cannot be used.

    Options that do not parse or do not fit one another end in tyro's SystemExit, with code 2 too.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if arguments[0] == "--version":
        print(f"jsparse {version('jsparse')}")
        return 0
    name, *options = arguments
    try:
        if name not in _COMMANDS:
            raise ValueError(f"unknown command {name!r}; commands are {', '.join(_COMMANDS)}")
        _COMMANDS[name](options)
    except (ValueError, OSError, NotImplementedError, FloatingPointError) as error:
        print("jsparse: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jsparse: interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(config: type[Config], name: str, options: list[str]) -> Config:
    description = (config.__doc__ or "").split(">>>")[
        0
    ]  # an example in Python is no help on the command line
    return tyro.cli(config, prog=f"jsparse {name}", description=description, args=options)


def _finetune(options: list[str]) -> None:
    from jsparse.train import FinetuneConfig, finetune

    result = finetune(_parse(FinetuneConfig, "finetune", options))
    print(f"{result.output}: trained for {len(result.losses)} steps, last loss {result.losses[-1]:.4f}")


def _generate(options: list[str]) -> None:
    command = _parse(GenerateCommand, "generate", options)
    import numpy as np
    from tokenizers.decoders import DecodeStream

    import jsparse
    from jsparse.models import Llama, load_tokenizer, reorder_heads
    from jsparse.serve import CacheConfig, SamplingParams, stream

    given = ("policy", "budget", "page_size", "kv_bits", "prefill_window")
    cache_options = {name: getattr(command, name) for name in given}
    cache_options |= {
        name: getattr(command, name) for name in ("sink", "window") if getattr(command, name) is not None
    }
    if command.pattern is not None:
        sparsity = 0.5 if command.sparsity is None else command.sparsity
        cache_options["streaming_heads"] = jsparse.HeadPattern.load(command.pattern).threshold(sparsity)
    cache = CacheConfig(**cache_options)  # everything wrong with it is said before the model is loaded
    sampling = SamplingParams(temperature=command.temperature, top_k=command.top_k, top_p=command.top_p)
    prompt = _read_text(command.prompt_file) if command.prompt_file else command.prompt or ""
    tokenizer = load_tokenizer(command.model)
    model = Llama.from_pretrained(command.model)
    if cache.streaming_heads is not None:
        model, streams = reorder_heads(model, np.array(cache.streaming_heads))
        cache = dataclasses.replace(cache, streaming_heads=streams)

    tokenizer.no_truncation()  # a length saved in tokenizer.json must not cut the prompt
    ids = tokenizer.encode(prompt).ids
    text = DecodeStream(ids=ids, skip_special_tokens=True)  # holds back characters that are not complete
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
    """Say on stderr how fast it went. The first call of each kind compiles: for the prompt, for a token."""
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


def _evaluate(options: list[str]) -> None:
    command = _parse(EvaluateCommand, "evaluate", options)
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from jsparse.models import Llama, load_tokenizer
    from jsparse.train import perplexity_by_context, read_documents, shifted_head_masks

    if command.json is not None and not command.json.absolute().parent.is_dir():
        raise FileNotFoundError(f"json: the folder of {command.json} does not exist")
    tokenizer = load_tokenizer(command.model)
    model = Llama.from_pretrained(command.model)
    ends = model.config.eos_token_ids
    documents = read_documents(
        command.data, tokenizer, eos_token_id=ends[0] if ends else None, vocab_size=model.config.vocab_size
    )

    def mask_for(context: int):
        heads = model.config.num_attention_heads
        return shifted_head_masks(heads, context // 4) if command.attention == "shifted" else None

    results = perplexity_by_context(
        model,
        np.concatenate(documents),
        command.contexts,
        mask_for=mask_for,
        batch_size=command.batch_size,
        max_windows=command.max_windows,
    )
    table = Table(title=f"{command.model}, {command.attention} attention")
    for column in ("context", "perplexity", "nll (nats)", "tokens scored"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            str(result.context), f"{result.perplexity:.4f}", f"{result.nll:.4f}", f"{result.tokens:,}"
        )
    Console().print(table)
    if command.json is not None:
        command.json.write_text(
            json.dumps([dataclasses.asdict(result) for result in results], indent=1) + "\n"
        )


def _heads(options: list[str]) -> None:
    from jsparse.train import HeadsConfig, learn_heads

    config = _parse(HeadsConfig, "heads", options)
    result = learn_heads(config)
    for layer, streams in enumerate(result.pattern.threshold(0.5)):
        print(f"layer {layer}: {streams.sum()} of {streams.size} KV heads stream at sparsity 0.5")
    path = result.output / "full_attention_heads.tsv"
    print(f"the pattern is {path}: try")
    print(
        f"  jsparse generate --model {config.model} --pattern {path} --sparsity 0.5 "
        f"--sink {config.sink} --window {config.window} --prompt 'import os'"
    )


_BENCH_USAGE = """usage: jsparse bench KIND [options]

  decode     milliseconds a token at several context lengths, for each policy of the cache
  prefill    seconds to the first token of prompts of several lengths

jsparse bench KIND --help lists the options."""


def _bench(options: list[str]) -> None:
    if not options or options[0] in ("-h", "--help"):
        print(_BENCH_USAGE)
        return
    kind, *options = options
    if kind == "decode":
        from jsparse.serve.bench import DecodeBench, bench_decode

        config = _parse(DecodeBench, "bench decode", options)
        bench_decode(config)
    elif kind == "prefill":
        from jsparse.serve.bench import PrefillBench, bench_prefill

        config = _parse(PrefillBench, "bench prefill", options)
        bench_prefill(config)
    else:
        raise ValueError(f"unknown kind {kind!r} of benchmark; kinds are decode, prefill")
    print(f"the numbers are in {config.output}")


def _demo(options: list[str]) -> None:
    from jsparse.examples.demo import DemoConfig, run_demo

    config = _parse(DemoConfig, "demo", options)
    run_demo(config)
    print(f"model, plot and numbers are in {config.output}: try")
    print(f"  jsparse generate --model {config.output / 'long'} --prompt 'import os' --temperature 0.7")


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "finetune": _finetune,
    "generate": _generate,
    "evaluate": _evaluate,
    "heads": _heads,
    "bench": _bench,
    "demo": _demo,
}

if __name__ == "__main__":
    sys.exit(main())
