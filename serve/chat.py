"""A conversation with a model: its messages, and what a line that a user types does to them."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from jsparse.models.config import LlamaConfig
from jsparse.models.positions import describe, positions_of
from jsparse.reports.console import rate_of
from jsparse.serve.conversation import Conversation
from jsparse.serve.prompts import Prompt
from jsparse.serve.sampling import SamplingParams
from jsparse.texts.chat_messages import read_messages
from jsparse.texts.chat_template import ChatTemplate

HELP = '''\
/system TEXT  make TEXT the system prompt; without TEXT, there is none
/reset        begin anew, with the same system prompt
/save FILE    write the conversation as JSON, which --messages reads
/stats        tokens, times and memory
/exit         end; so does Ctrl-D
"""           begins and ends a message of several lines
//            begins a message that begins with /
Ctrl-C        ends an answer; pressed again, drops it at once'''

_SOME_KEPT = 80  # tokens of a prompt of which, with most sizes of pages, some are kept


class Turn(NamedTuple):
    """What one answer took."""

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    first_seconds: float  # until the first token
    rate: str
    finish_reason: str | None  # None if the user ended it, "full" if the model has no more positions


def check_messages(prompt: Prompt, template: ChatTemplate | None) -> None:
    """Raises ValueError, naming the place, for messages without a role, or without text for a base model."""
    if prompt.text is not None:
        raise ValueError(f"{prompt.place} has a prompt and no messages")
    if not prompt.messages:
        return
    try:
        messages = read_messages(prompt.messages, str)
        for number, message in enumerate(messages if template is None else []):
            if not isinstance(message.get("content"), str):
                raise ValueError(f"messages[{number}].content must be a text for a model without a template")
    except ValueError as error:
        raise ValueError(f"{prompt.place}: {error}") from error


class Chat:
    """A conversation with a model.

    - conversation: what answers.
    - config, tokenizer, template: the model's. Without a template the messages are one text, which is
      continued.
    - prompt: the messages so far, and the tools if there are any.
    - max_new_tokens, sampling, seed: of each answer, as of ``generate``; later answers have later seeds.
    - file: where the messages are from; /save may write it.
    """

    def __init__(
        self,
        conversation: Conversation,
        config: LlamaConfig,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        sampling: SamplingParams,
        seed: int,
        file: Path | None = None,
    ):
        self.messages = list(prompt.messages)
        self.turns: list[Turn] = []  # of this conversation
        self._answers = 0  # of all
        self._conversation, self._config = conversation, config
        self._tokenizer, self.template, self._prompt = tokenizer, template, prompt
        self._most, self._sampling, self._seed = max_new_tokens, sampling, seed
        self._own_files = set() if file is None else {file.resolve()}

    def warm_up(self) -> None:
        """Compile what short turns need, so that the first answer need not wait for it."""
        room = positions_of(self._config).most - 2
        for _ in self._conversation.answer([0] * min(_SOME_KEPT, room), 2):
            pass

    def say(self, text: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Adds a message of the user, and yields the model's answer as it comes, which is added too.

        If ``stopped`` returns True, the answer ends there. Raises ValueError for a conversation that is too
        long or that the template refuses, and FloatingPointError for logits that are not finite; nothing is
        added then.
        """
        return self._answer([*self.messages, {"role": "user", "content": text}], stopped)

    def answer(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """:meth:`say` without a message, where the last one is the user's already."""
        return self._answer(self.messages, stopped)

    def _answer(self, messages: list[Any], stopped: Callable[[], bool]) -> Iterator[str]:
        start = time.perf_counter()
        ids = self._encode(messages)
        room = self._room_after(len(ids))
        most = min(self._most, room)
        sampling = dataclasses.replace(self._sampling, min_tokens=min(self._sampling.min_tokens, room))
        arrivals: list[float] = []
        parts: list[str] = []
        reason = None
        seed = (self._seed + self._answers) % 2**32  # the same question again need not have the same answer
        self._answers += 1
        with contextlib.closing(self._conversation.answer(ids, most, sampling, seed)) as events:
            for event in events:
                arrivals.append(time.perf_counter())
                if event.token is None:
                    raise FloatingPointError(f"the logits are not finite after {len(arrivals) - 1} tokens")
                part, reason = event.text, event.finish_reason
                if self.template is not None and not any(parts):
                    part = self._without_border(part, event.token)
                parts.append(part)
                yield part
                if stopped():
                    break
        self.messages = [*messages, {"role": "assistant", "content": "".join(parts)}]
        if reason == "length" and most < self._most:
            reason = "full"
        reused, first = self._conversation.reused_tokens, arrivals[0] - start
        self.turns.append(Turn(len(ids), reused, len(arrivals), first, rate_of(arrivals), reason))

    def follow(self, command: str) -> str:
        """What to tell the user after a line that begins with "/". Raises ValueError or OSError."""
        name, _, rest = command.partition(" ")
        rest = rest.strip()
        taking = {"/system": self._set_system, "/save": self._save}
        alone = {"/reset": self._reset, "/stats": self._stats, "/help": lambda: HELP}
        if name in taking:
            return taking[name](rest)
        if name not in alone:
            raise ValueError(f"{name} is no command; commands are {', '.join([*taking, *alone])} and /exit")
        if rest:
            raise ValueError(f"{name} takes nothing, not {rest!r}")
        return alone[name]()

    def _encode(self, messages: list[Any]) -> list[int]:
        if self.template is not None:
            prompt = self._prompt._replace(messages=messages)
        else:
            prompt = Prompt(text="".join(message["content"] for message in messages), place="the text")
        return prompt.encode(self._tokenizer, self.template, self._config.vocab_size)

    def _room_after(self, tokens: int) -> int:
        left = positions_of(self._config).most - tokens
        if left < 1:
            raise ValueError(
                f"the conversation has {tokens} tokens, which leaves no room for an answer within the "
                f"model's {describe(self._config)}; /reset begins anew"
            )
        return left

    def _without_border(self, text: str, token: int) -> str:
        """The beginning of an answer without a space that is not its own, but parts it from the prompt."""
        if text.startswith(" ") and not self._tokenizer.decode([token]).startswith(" "):
            return text[1:]
        return text

    def _set_system(self, rest: str) -> str:
        if self.template is None:
            raise ValueError("the model has no chat template, so it takes no system prompt")
        others = self.messages[len(self._system()) :]
        self.messages = [*([{"role": "system", "content": rest}] if rest else []), *others]
        return "the system prompt is set" if rest else "there is no system prompt"

    def _system(self) -> list[Any]:
        return [message for message in self.messages[:1] if message["role"] == "system"]

    def _reset(self) -> str:
        self.messages, self.turns = self._system(), []
        return "the conversation begins anew"

    def _save(self, rest: str) -> str:
        if not rest:
            raise ValueError("/save takes the name of a file")
        path = Path(os.path.expanduser(rest))  # noqa: PTH111, it leaves an unknown ~name alone
        if path.exists() and path.resolve() not in self._own_files:
            raise ValueError(f"{path} exists already, and is not this conversation's")
        content = self.messages
        if self._prompt.tools is not None:
            content = {"messages": content, "tools": self._prompt.tools}
        path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        self._own_files.add(path.resolve())
        return f"wrote {len(self.messages)} messages to {path}"

    def _stats(self) -> str:
        lines = []
        for number, turn in enumerate(self.turns, start=1):
            lines.append(
                f"answer {number}: prompt of {turn.prompt_tokens} tokens, {turn.reused_tokens} of them in "
                f"the cache; {turn.first_seconds:.2f} s to the first of {turn.new_tokens} new tokens"
                + turn.rate
            )
        cache = f"{self._conversation.cache_bytes / 2**20:.1f} MiB"
        seed = f"; seed {self._seed}" if self._sampling.temperature else ""
        return "\n".join([*lines, f"cache of {cache}; the model's {describe(self._config)}{seed}"])
