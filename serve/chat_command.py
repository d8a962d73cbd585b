"""``jsparse chat``: its options, and a conversation in the terminal.

What needs jax is imported once the options are parsed, so that --help answers at once.
"""

import contextlib
import dataclasses
import functools
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsparse.models.options import ModelOptions
from jsparse.reports.console import parse, print_part
from jsparse.serve.options import CacheOptions, SamplingOptions

if TYPE_CHECKING:
    from jsparse.serve.chat import Chat
else:
    Chat = Any

_MOST = 1024  # new tokens of an answer
_MOST_OF_TEXT = 64  # where nothing tells an answer's end
_BLOCK = '"""'


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatCommand(SamplingOptions, CacheOptions, ModelOptions):
    """Talk to a model in the terminal; /help lists what it understands beside messages.

    What the model says is printed as it comes, and the cache is kept between turns. A model without a chat
    template continues the text so far, to which what you type is added. Text may come from a pipe too, with
    a message in each line.
    """

    system: str | None = None
    """The system prompt."""
    messages: Path | None = None
    """A conversation to go on with, as /save writes it: a JSON list of {"role": ..., "content": ...}."""
    seed: int | None = None
    """Seed of the sampling; another one each time unless given. /stats tells it."""
    max_new_tokens: int | None = None
    """The most tokens of an answer. Unless given: what the model says, or 1024; 64 without a chat
    template."""

    def __post_init__(self):
        if self.system is not None and self.messages is not None:
            raise ValueError("--system begins a conversation and --messages continues one: give one of them")
        super().__post_init__()


def chat(options: list[str]) -> int:
    """Returns 2 if a line from a pipe could not be answered or followed; in a terminal, the user saw it."""
    command = parse(ChatCommand, "chat", options)
    if sys.stdin is None or sys.stdout is None:
        raise ValueError("a conversation needs standard input and output, and one of them is closed")
    talk = _load(command)
    interactive = _in_terminal()
    if interactive:
        talk.warm_up()
        if talk.messages:
            _tell(f"the conversation has {len(talk.messages)} messages so far")
        _tell("type a message, or /help; Ctrl-D ends")
    failed = False
    if talk.messages and talk.messages[-1]["role"] == "user":
        failed = not _done(lambda: _print_answer(talk, talk.answer, interactive), interactive)
    for line in _lines(interactive):
        if line.split()[:1] in (["/exit"], ["/quit"]):
            break
        failed |= not _done(lambda line=line: _take(talk, line, interactive), interactive)
    return 2 if failed and not interactive else 0


def _take(talk: Chat, line: str, interactive: bool) -> None:
    """Do what a line says, or answer it."""
    try:
        line.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the line {line!r} is not UTF-8 text") from None
    if line.startswith("/") and not line.startswith("//"):
        print(talk.follow(line), file=sys.stderr, flush=True)
    elif line.strip():
        _print_answer(talk, functools.partial(talk.say, line.removeprefix("/")), interactive)


def _in_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _done(act: Callable[[], None], interactive: bool) -> bool:
    """Whether it could be done. An error, or a second Ctrl-C, does not end the conversation."""
    try:
        act()
        return True
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        _tell(f"error: {' '.join(str(error).split())}")
    except (FloatingPointError, RuntimeError) as error:  # the latter is jax's, where memory is short
        if not interactive:
            raise
        _tell(f"error: {error}")
    except KeyboardInterrupt:
        if not interactive:
            raise
        print()
        _tell("interrupted: the answer is dropped")
    return False


def _load(command: ChatCommand) -> Chat:
    """The model and the conversation so far. Whatever is wrong with the options comes before the weights."""
    from jsparse.models import Llama, load_chat_template, load_config, load_tokenizer
    from jsparse.serve.chat import Chat, check_messages
    from jsparse.serve.conversation import Conversation
    from jsparse.serve.head_order import streaming_heads_last
    from jsparse.serve.prompts import Prompt, read_conversation
    from jsparse.serve.request import check_requests

    cache = command.cache()
    config, tokenizer = load_config(command.model), load_tokenizer(command.model)
    try:
        template = load_chat_template(command.model)
    except FileNotFoundError:
        template = None  # a base model
        _tell("the model has no chat template: what you type is added to the text, which it continues")
    sampling, most, notes = command.sampling(command.model, _MOST_OF_TEXT if template is None else _MOST)
    for note in notes:
        _tell(note)
    prompt = Prompt(place="the conversation")
    if command.messages is not None:
        prompt = read_conversation(command.messages)
    elif command.system is not None:
        if template is None:
            raise ValueError("--system: the model has no chat template, so it takes no system prompt")
        prompt = prompt._replace(messages=[{"role": "system", "content": command.system}])
    check_messages(prompt, template)
    seed = secrets.randbelow(2**32) if command.seed is None else command.seed
    check_requests(config, [[0]], most, sampling, seed, tokenizer)
    model, cache = streaming_heads_last(Llama.from_pretrained(command.model, dtype=command.dtype), cache)
    return Chat(
        Conversation(model, cache, tokenizer),
        config,
        tokenizer,
        template,
        prompt,
        max_new_tokens=most,
        sampling=sampling,
        seed=seed,
        file=command.messages,
    )


def _print_answer(
    talk: Chat, answer: Callable[[Callable[[], bool]], Iterator[str]], interactive: bool
) -> None:
    with _interrupts() as stopped:
        for part in answer(stopped):
            print_part(part)
        print()
        if stopped() and not interactive:
            raise KeyboardInterrupt
    turn = talk.turns[-1]
    if turn.finish_reason == "full":
        _tell(
            "the answer was cut where the model's context ends; /reset begins anew, /save keeps what there is"
        )
    elif turn.finish_reason == "length" and talk.template is not None:
        _tell(f"the answer was cut after {turn.new_tokens} tokens (--max-new-tokens allows more)")


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed. Only a second one interrupts at once: the answer is lost then."""
    pressed = []

    def handle(signum, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(signum)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(interactive: bool) -> Iterator[str]:
    """What the user types, message by message, until the end of the input."""
    if interactive:
        with contextlib.suppress(ImportError):  # absent on some systems
            import readline  # noqa: F401, input() then has a history
    while True:
        try:
            line = _line("> ", interactive)
            if line.startswith(_BLOCK):
                line = _block(line.removeprefix(_BLOCK), interactive)
            yield line
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()  # drops what was typed


def _line(prompt: str, interactive: bool) -> str:
    return input(prompt if interactive else "")


def _block(line: str, interactive: bool) -> str:
    """The lines up to the one that ends with the mark that began them."""
    lines = [line]
    while not lines[-1].rstrip().endswith(_BLOCK):
        try:
            lines.append(_line("... ", interactive))
        except EOFError:
            if interactive:
                raise
            raise ValueError(f"the input ends within a message that began with {_BLOCK}") from None
    return "\n".join(lines).rstrip().removesuffix(_BLOCK)


def _tell(text: str) -> None:
    """Print for the user, beside the conversation."""
    print(f"jsparse: {text}", file=sys.stderr, flush=True)
