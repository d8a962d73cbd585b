"""The command line: ``jsparse`` and the name of a command.

This is the only module that knows every room. A room is imported only when one of its commands runs, so
``--help`` answers at once.
"""

import contextlib
import dataclasses
import importlib
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version

from jsparse.extras import MissingExtra
from jsparse.reports.compilation_cache import use_compilation_cache

HELP = frozenset({"-h", "--help"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Command:
    """One command, or several under one name; ``evaluate`` is both.

    - help: what it does, for the usage of the command above it.
    - function: "module:function" in the package; it takes the options and may return an exit code.
    - commands: the commands that follow its name, by their own names.
    - note: the end of its usage, if it is more than one command.
    """

    help: str
    function: str | None = None
    commands: Mapping[str, "_Command"] = dataclasses.field(default_factory=dict)
    note: str = ""


_SCOREBOARD = _Command(
    help="what sparse caches lose of long-context tasks", function="evaluate.commands:scoreboard"
)
_PLAN = _Command(
    help="whether a run fits GPUs this machine does not have",
    commands={
        "finetune": _Command(
            help="bytes and FLOPs of the step that jsparse finetune would run with the same options",
            function="train.commands:plan_finetune",
        ),
        "generate": _Command(
            help="bytes for one chunk of a prompt and for one token, by prompt length and cache",
            function="serve.commands:plan_generate",
        ),
    },
    note="Compiles the real program for GPUs this machine does not have. It needs the extra gpu-compile, and "
    "of the model only its config.json.",
)
_BENCH = _Command(
    help="measure the time per token or per prompt, by context length",
    commands={
        "decode": _Command(
            help="milliseconds per token at several context lengths, for each policy of the cache",
            function="evaluate.commands:bench_decode",
        ),
        "prefill": _Command(
            help="seconds to the first token, for prompts of several lengths",
            function="evaluate.commands:bench_prefill",
        ),
    },
)
_JSPARSE = _Command(
    help="block-sparse attention for long contexts",
    commands={
        "pretrain": _Command(
            help="train a small model from scratch that needs its whole context",
            function="train.commands:pretrain",
        ),
        "finetune": _Command(
            help="extend a model's context with LongLoRA, or train it", function="train.commands:finetune"
        ),
        "merge": _Command(
            help="write what a run has learned so far as a model, or as an adapter for PEFT; or an adapter "
            "and its base as a model",
            function="train.commands:merge",
        ),
        "evaluate": _Command(
            help="perplexity of text files, and passkeys found, at several context lengths",
            function="evaluate.commands:evaluate",
            commands={"scoreboard": _SCOREBOARD},
        ),
        "heads": _Command(
            help="learn which KV heads need the whole context (DuoAttention)", function="train.commands:heads"
        ),
        "convert": _Command(
            help="write a model in pytorch_model.bin, or an adapter, with safetensors, without unpickling it",
            function="models.commands:convert",
        ),
        "generate": _Command(
            help="generate text from a prompt, with a dense or a sparse KV cache",
            function="serve.commands:generate",
        ),
        "chat": _Command(
            help="talk to a model in the terminal, with a cache that is kept between turns",
            function="serve.chat_command:chat",
        ),
        "scoreboard": _SCOREBOARD,
        "plan": _PLAN,
        "bench": _BENCH,
        "demo": _Command(
            help="what sparse caches do to the small model that ships with jsparse, in a minute or two on a "
            "CPU; or the whole path, starting from a random model (demo --train)",
            function="examples.commands:demo",
        ),
    },
    note="jsparse --version prints the version.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 2, with one line on stderr, if the input cannot be used.

    Options that do not parse or do not fit one another end in SystemExit, with code 2 and a line too. Where
    the reader of stdout has gone (``| head``), the code is that of SIGPIPE.
    """
    options = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            with _notes_shown():
                return _checked(options)
        finally:
            print(end="", flush=True)  # a broken pipe shows here, not while Python shuts down
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # where stdout is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13


@contextlib.contextmanager
def _notes_shown() -> Iterator[None]:
    """What jsparse logs becomes lines like its errors, however other libraries configure logging."""
    logger, handler = logging.getLogger("jsparse"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("jsparse: %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def _checked(options: list[str]) -> int:
    """The exit code of one command, with its errors explained."""
    if options[:1] == ["--version"]:
        print(f"jsparse {version('jsparse')}")
        return 0
    try:
        _check_text(options)
        return _run("jsparse", _JSPARSE, options)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, NotImplementedError, MissingExtra, FloatingPointError) as error:
        return _explain(error)
    except (RuntimeError, AssertionError):
        problem = _platform_problem()
        if problem is None:
            raise
        return _explain(problem)
    except KeyboardInterrupt:
        print("jsparse: interrupted", file=sys.stderr)
        return 130


def _explain(error: Exception | str) -> int:
    print("jsparse: error:", " ".join(str(error).split()), file=sys.stderr)
    return 2


def _platform_problem() -> str | None:
    """Why jax has no device of the JAX_PLATFORMS that the environment names; None if it has one."""
    named = os.environ.get("JAX_PLATFORMS")
    if not named:
        return None
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter, without a word, for an absent plugin
        return f"JAX_PLATFORMS={named} names no device that this machine has. {error}"
    return None


def _check_text(options: list[str]) -> None:
    """ValueError for bytes that are not text in the terminal's encoding: no file or prompt can have them."""
    for option in options:
        try:
            option.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the argument {option!r} is not UTF-8 text") from error


def _run(name: str, command: _Command, options: list[str]) -> int:
    """Run a command, or the one among its ``commands`` that the options name; returns the exit code."""
    if options and options[0] in command.commands:
        return _run(f"{name} {options[0]}", command.commands[options[0]], options[1:])
    if command.function is not None:
        if not HELP.intersection(options):
            use_compilation_cache()
        module, function = command.function.split(":")
        return getattr(importlib.import_module(f"jsparse.{module}"), function)(options) or 0
    if not options or options[0] in HELP:
        print(_usage(name, command))
        return 0
    unknown = f"{name} {options[0]}".removeprefix("jsparse ")
    raise ValueError(f"unknown command {unknown!r}; commands are {', '.join(command.commands)}")


def _usage(name: str, command: _Command) -> str:
    columns, width = min(100, shutil.get_terminal_size().columns), 2 + max(map(len, command.commands))
    rows = [
        textwrap.fill(
            f"  {word:{width}}{one.help}",
            columns,
            subsequent_indent=" " * (2 + width),
            break_long_words=False,
        )
        for word, one in command.commands.items()
    ]
    note = textwrap.fill(f"{name} COMMAND --help lists the options. {command.note}", columns)
    return "\n".join([f"usage: {name} COMMAND [options]", "", *rows, "", note])


if __name__ == "__main__":
    sys.exit(main())
