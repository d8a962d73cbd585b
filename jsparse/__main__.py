"""The command line: ``jsparse`` and the name of a command.

The one module that knows every room. Rooms are imported when a command needs them, so that ``--help`` answers
at once.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

from jsparse.extras import MissingExtra

_USAGE = """usage: jsparse COMMAND [options]

  pretrain   train a small model from nothing that needs the whole of its context
  finetune   extend a model's context with LongLoRA, or train it
  merge      write what a run has learned so far as a model, or as an adapter for PEFT
  plan       whether a run fits GPUs that need not be there (plan finetune, plan generate)
  generate   generate text from a prompt, with a dense or a sparse KV cache
  evaluate   perplexity of text files, and passkeys found, at several context lengths; what sparse caches
             lose of long-context tasks (evaluate scoreboard)
  heads      learn which KV heads need the whole context (DuoAttention)
  bench      measure the time of a token (bench decode) or of a prompt (bench prefill) by context length
  demo       what sparse caches do to the small model that ships with jsparse, in a minute or two on a CPU;
             or the whole path from a random model on (demo --train)

jsparse COMMAND --help lists the options; jsparse --version prints the version."""


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
        if name == "plan":
            return _plan(options)
        if [name, *options[:1]] == ["evaluate", "scoreboard"]:
            name, *options = "evaluate scoreboard", *options[1:]
        return _run(name, options)
    except (ValueError, OSError, NotImplementedError, MissingExtra, FloatingPointError) as error:
        print("jsparse: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jsparse: interrupted", file=sys.stderr)
        return 130


def _run(name: str, options: list[str]) -> int:
    if name not in _COMMANDS:
        raise ValueError(f"unknown command {name!r}; commands are {', '.join([*_COMMANDS, 'plan'])}")
    room = importlib.import_module(f"jsparse.{_COMMANDS[name]}")
    return getattr(room, name.split()[-1])(options) or 0


_PLAN_USAGE = """usage: jsparse plan RUN [options]

  finetune   bytes and FLOPs of the step that jsparse finetune would run with the same options
  generate   bytes of a prompt's chunk and of a token, by prompt length and cache

Compiles the real program for GPUs that need not be there; needs the extra gpu-compile, and the model's
config.json only. jsparse plan RUN --help lists the options."""


def _plan(options: list[str]) -> int:
    if not options or options[0] in ("-h", "--help"):
        print(_PLAN_USAGE)
        return 0
    kind, *options = options
    if kind == "finetune":
        from jsparse.train.commands import plan_finetune as plan
    elif kind == "generate":
        from jsparse.serve.commands import plan_generate as plan
    else:
        raise ValueError(f"unknown run {kind!r} to plan; runs are finetune, generate")
    try:
        return plan(options)
    except RuntimeError as error:  # the compiler's
        message = f"the program does not compile, and nothing is estimated: {error}"
        raise NotImplementedError(message) from error


_COMMANDS = {
    "pretrain": "train.commands",
    "finetune": "train.commands",
    "merge": "train.commands",
    "evaluate": "evaluate.commands",
    "heads": "train.commands",
    "generate": "serve.commands",
    "bench": "evaluate.commands",
    "evaluate scoreboard": "evaluate.commands",
    "demo": "examples.commands",
}

if __name__ == "__main__":
    sys.exit(main())
