"""What users ask to be continued: a text, a conversation, or a file with many of them."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from jsparse.texts.chat_template import ChatTemplate
from jsparse.texts.files.rows import text_of
from jsparse.texts.tokenizer import prompt_ids

_ALLOWED = (
    '{"prompt": "..."} or {"messages": [...]}, with "tools" beside messages if there are any, and an "id" if '
    "its results are to have it"
)


class Prompt(NamedTuple):
    """A text, or a conversation whose next turn is the model's."""

    text: str | None = None
    messages: Sequence[Any] = ()
    tools: Sequence[Any] | None = None
    place: str = "prompt"  # for errors
    id: str | int | None = None  # whatever the user calls it

    def encode(self, tokenizer: Tokenizer, template: ChatTemplate | None, vocab_size: int) -> list[int]:
        """The tokens that a model with ``vocab_size`` embeddings continues. ValueErrors name the place."""
        try:
            if self.text is not None:
                ids = prompt_ids(tokenizer, self.text)
            else:
                assert template is not None
                ids = template.encode(self.messages, tools=self.tools)
        except ValueError as error:
            raise ValueError(f"{self.place}: {error}") from error
        if not ids:
            raise ValueError(f"{self.place}: the text is empty, it has no tokens; give at least one")
        if max(ids) >= vocab_size:
            raise ValueError(
                f"{self.place} has token id {max(ids)}, but the model's vocabulary has {vocab_size} entries: "
                "the tokenizer beside it is another model's"
            )
        return ids


def read_text(file: Path) -> Prompt:
    """The text of a file, as training reads it, or of standard input if its name is "-".

    Raises ValueError if there is none, and for what is not UTF-8.
    """
    text = _read(file, "prompt_file")
    if not text:
        raise ValueError(f"prompt_file: {'standard input' if str(file) == '-' else file} is empty")
    return Prompt(text=text, place=f"prompt_file: {file}")


def read_conversation(file: Path) -> Prompt:
    """The conversation in a JSON file ("-" for standard input): a list of messages, or an object with them.

    Raises ValueError, naming the file, for anything else.
    """
    place, text = f"messages: {file}", _read(file, "messages")
    first, _, rest = text.strip().partition("\n")
    if rest and _is_json(first):
        raise ValueError(
            f"{place} has JSON lines; jsparse generate --prompts takes one conversation per line"
        )
    content = _parse(text, place)
    return _prompt({"messages": content} if isinstance(content, list) else content, place)


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts of a file with one JSON object per line ("-" for standard input): texts or conversations.

    Blank lines are skipped. Raises ValueError, naming file and line, for anything else, and for a file
    without a prompt.
    """
    lines = _read(file, "prompts").split("\n")  # and not splitlines: JSON may have other separators in it
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"prompts: {file}, line {number}"
            prompts.append(_prompt(_parse(line, place), place))
    if not prompts:
        raise ValueError(f"prompts: {file} is empty; a line is {_ALLOWED}")
    return prompts


def _prompt(content: Any, place: str) -> Prompt:
    if not isinstance(content, dict):
        raise ValueError(f"{place} holds {_short(content)}; allowed is {_ALLOWED}")
    fields = content.keys() - {"id"}
    if fields != {"prompt"} and ("messages" not in fields or fields - {"messages", "tools"}):
        raise ValueError(f"{place} has the fields {sorted(content)}; allowed is {_ALLOWED}")
    name = content.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise ValueError(f"{place}: id must be a string or an integer, not {_short(name)}")
    if "prompt" in fields:
        if not isinstance(content["prompt"], str):
            raise ValueError(f"{place}: prompt must be a string, not {_short(content['prompt'])}")
        return Prompt(text=content["prompt"], place=place, id=name)
    for field in sorted(fields):
        if not isinstance(content[field], list):
            raise ValueError(f"{place}: {field} must be a list, not {_short(content[field])}")
    return Prompt(messages=content["messages"], tools=content.get("tools"), place=place, id=name)


def _read(file: Path, option: str) -> str:
    try:
        content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise type(error)(f"{option}: {file} cannot be read: {error.strerror}") from error
    return text_of(content, f"{option}: {file}")


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{place} is not valid JSON ({reason}); allowed is {_ALLOWED}") from error


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _short(value: Any) -> str:
    return json.dumps(value)[:50]
