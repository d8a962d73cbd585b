"""Messages, tools and documents as a chat template gets them: checked copies of plain types."""

from collections.abc import Callable, Mapping
from typing import Any

from jsparse.texts.control_tokens import CUT, GENERATION_END, GENERATION_START, has_surrogate, remove_marks
from jsparse.texts.tool_arguments import Arguments, with_arguments

MAX_DEPTH = 100  # of lists and mappings
# Names under which the text of what a model thought is given; templates read the first or the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def plain(value: Any, place: str, mark: Callable[[str], str], depth: int = 0) -> Any:
    """A copy of plain types, in which each text is marked. ValueError, which names the place, for others."""
    if isinstance(value, str):
        if has_surrogate(value):
            raise ValueError(f"{place} has a lone surrogate, which cannot be written in UTF-8")
        return mark(str.__str__(value))
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if depth == MAX_DEPTH:
        raise ValueError(f"{place} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Arguments):
        return Arguments(plain(dict(value), place, mark, depth), plain(str(value), place, mark))
    if isinstance(value, Mapping):
        return {
            plain(key, f"a key of {place}", mark, depth + 1): plain(item, f"{place}.{key}", mark, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(item, f"{place}[{n}]", mark, depth + 1) for n, item in enumerate(value)]
    kind = type(value).__name__
    raise ValueError(f"{place} must be a text, a number, a boolean, None, a list or a mapping, not {kind}")


def read_mappings(values: Any, place: str, mark: Callable[[str], str]) -> list[dict[str, Any]]:
    """A plain copy of a list of mappings, with each text marked. ValueError for anything else."""
    require_mappings(values, place)
    return plain(values, place, mark)


def require_mappings(values: Any, place: str) -> None:
    """ValueError, which names the place, unless this is a list of mappings."""
    if not isinstance(values, list | tuple):
        raise ValueError(f"{place} must be a list of mappings, not {type(values).__name__}")
    for n, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise ValueError(f"{place}[{n}] must be a mapping, not {type(value).__name__}")


def read_messages(messages: Any, mark: Callable[[str], str]) -> list[dict[str, Any]]:
    """A plain copy of messages, with each text marked. ValueError if there is none, or one without a role.

    As transformers does, it leaves out what is None, and gives what the model thought all names that
    templates read. Arguments of calls that OpenAI's API has written as JSON are the objects, as in vLLM.
    """
    require_mappings(messages, "messages")
    chat = plain([with_arguments(message) for message in messages], "messages", mark)
    if not chat:
        raise ValueError("messages is empty; there must be at least one")
    for n, message in enumerate(chat):
        if not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{n}].role must be a text, not {message.get('role')!r}")
    return [_with_reasoning({k: v for k, v in message.items() if v is not None}) for message in chat]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    thought = next((message[key] for key in _REASONING if key in message), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def mark_end(chat: list[dict[str, Any]]) -> str:
    """Puts a mark after the last message's text, and returns that text. ValueError if it has none."""
    message = chat[-1]
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + CUT + " "
        return content
    parts = content if isinstance(content, list) else []
    texts = [part for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if not texts:
        raise ValueError(f"messages[{len(chat) - 1}].content has no text to continue")
    text = texts[-1]["text"]
    texts[-1]["text"] = text + CUT + " "
    return text


def cut(rendered: str, last: str, file: str) -> str:
    """A rendered text up to the end of the last message's text.

    - rendered: with the mark of `mark_end`. If the space after it is gone, the template trims the text.
    - last: the text.
    - file: the template's, for the message of the ValueError that is raised if the text is not there.
    """
    rendered = rendered.replace(GENERATION_START, "").replace(GENERATION_END, "")
    at = rendered.rfind(CUT)
    if at < 0 or remove_marks(last).strip() not in remove_marks(rendered):
        raise ValueError(f"{file} does not write the last message's text as it is, so it cannot be continued")
    return rendered[:at] if rendered[at + 1 : at + 2] == " " else rendered[:at].rstrip()
