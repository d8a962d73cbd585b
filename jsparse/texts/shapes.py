"""The shapes of training rows: which fields make a document, a completion, an instruction, a conversation."""

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from jsparse.texts.plain_form import with_input

ALLOWED = (
    'a row must be {"text": ...}, {"prompt": ..., "completion": ...}, '
    '{"instruction": ..., "input": ... (may be left out), "output": ...}, {"messages": [...]} or '
    '{"conversations": [...]}'
)


_ALLOWED_PAIR = (
    'with --dpo-beta a row must have "chosen" and "rejected": texts beside a "prompt" or an "instruction", '
    "or messages"
)


class Document(NamedTuple):
    """A text, all of which is learned, and which may be cut anywhere."""

    text: str


class Completion(NamedTuple):
    """A prompt as the model is given it, and how it goes on."""

    prompt: str
    completion: str


class Instruction(NamedTuple):
    """What is asked, with what it is about (empty if nothing), and the answer."""

    instruction: str
    input: str
    output: str
    system: str

    def messages(self, *, plain: bool) -> list[dict[str, str]]:
        """As a conversation. ``plain``: for the plain form, which has a heading for the input."""
        if plain and self.input:
            question = with_input(self.instruction, self.input)
        else:
            question = "\n".join(filter(None, [self.instruction, self.input]))
        system = [{"role": "system", "content": self.system}] if self.system else []
        answer = {"role": "assistant", "content": self.output}
        return [*system, {"role": "user", "content": question}, answer]


class Conversation(NamedTuple):
    """Messages as chat templates take them, and the tools that they may call, or None."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None


FIELDS = (
    "messages",
    "conversations",
    "tools",
    "system",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "text",
)

Answered: TypeAlias = Completion | Instruction | Conversation


class Preference(NamedTuple):
    """Two answers to one question, of which the first was preferred."""

    chosen: Answered
    rejected: Answered


Record: TypeAlias = Document | Answered | Preference


class BadShape(ValueError):
    """A row that is no training sample; the message goes on after the row's place."""


def read_record(
    row: Mapping[str, Any], fields: Mapping[str, str], *, pairs: bool = False
) -> tuple[Record, set[str]]:
    """What a row is, and those of its fields that were not read.

    A row that has the fields of several shapes, nulls aside, is the first of these: messages, conversations,
    an instruction, a prompt with its completion, a text. So the text that some sets give beside an
    instruction, or the prompt beside a conversation, is not read.

    - row: by the names of its fields.
    - fields: other names for fields: ``{"prompt": "question"}`` reads "question" as the prompt. A shape
      without any of them is not taken.
    - pairs: whether a row is a preference, whatever else it has, and not one of the other shapes.

    Raises BadShape for a row of no shape, or with a field of the wrong kind or without text.

    >>> read_record({"question": "2+2=", "completion": "4", "id": 7}, {"prompt": "question"})
    (Completion(prompt='2+2=', completion='4'), {'id'})
    """
    renamed = _renamed(row, fields)
    # Tables have nulls in the columns of other shapes. Without another shape, the error names the null.
    given = {name for name, value in renamed.items() if value is not None}
    shapes = (_PAIR,) if pairs else _SHAPES
    for names, (needed, optional, make) in itertools.product((given, renamed.keys()), shapes):
        is_asked_for = not fields or not fields.keys().isdisjoint(needed | optional)
        if needed <= names and is_asked_for:
            used = {name: renamed[name] for name in needed | optional if name in renamed}
            record = make(used)
            read = _READ_OF_PAIRS[type(record.chosen)] if isinstance(record, Preference) else used.keys()
            return record, {fields.get(name, name) for name in renamed.keys() - read}
    missing = [theirs for theirs in fields.values() if theirs not in row]
    if missing:
        raise BadShape(f" has no {', '.join(missing)}, which --fields names, but the fields {sorted(row)}")
    if any(needed <= given for needed, _, _ in shapes):
        named = ", ".join(fields.values())
        raise BadShape(f" has the fields {sorted(row)}, and no shape with {named}, which --fields names")
    if pairs:
        raise BadShape(f" has the fields {sorted(row)}; {_ALLOWED_PAIR}; --fields reads other names")
    if _PAIR[0] <= given:
        raise BadShape(" is a pair of answers, one preferred; --dpo-beta 0.1 learns from such pairs")
    raise BadShape(f" has the fields {sorted(row)}; {ALLOWED}; --fields reads other names")


def shape_name(record: Record) -> str:
    """The name of a record's shape, in the plural.

    >>> shape_name(Document("a"))
    'documents'
    """
    return {
        Document: "documents",
        Completion: "prompts with completions",
        Instruction: "instructions",
        Conversation: "conversations",
        Preference: "preferences",
    }[type(record)]


def _renamed(row: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """The row by our names. A field of one of our names that another stands for is left as unread."""
    if not fields:
        return dict(row)
    missing = [theirs for theirs in fields.values() if theirs not in row]
    if len(missing) == len(fields):
        raise BadShape(f" has the fields {sorted(row)}, and so none of --fields: {', '.join(missing)}")
    ours = {theirs: name for name, theirs in fields.items()}
    return {
        ours.get(name, f"{name} (not read)" if name in fields else name): value for name, value in row.items()
    }


def _document(row: dict[str, Any]) -> Document:
    return Document(_text(row, "text"))


def _completion(row: dict[str, Any]) -> Completion:
    return Completion(_text(row, "prompt"), _text(row, "completion", blank=True))


def _instruction(row: dict[str, Any]) -> Instruction:
    return Instruction(
        _text(row, "instruction"),
        _some_text(row, "input"),
        _text(row, "output", blank=True),
        _some_text(row, "system"),
    )


def _text(row: Mapping[str, Any], name: str, *, blank: bool = False, absent: bool = False) -> str:
    """A field that holds text. ``blank``: it may be empty; ``absent``: also missing or null."""
    value = row.get(name)
    if value is None and absent:
        return ""
    if not isinstance(value, str):
        raise BadShape(f': "{name}" must be a string, not {_shortened(value)}')
    if not blank and not value.strip():
        raise BadShape(f': "{name}" is {value[:50]!r}; it must hold some text')
    _check_unicode(value, name)
    return value


def _some_text(row: Mapping[str, Any], name: str) -> str:
    """A field that may be left out; "" also if it is blank, for then it says nothing."""
    value = _text(row, name, blank=True, absent=True)
    return value if value.strip() else ""


def _check_unicode(value: str, name: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half a surrogate pair, not a character
        half = error.object[error.start]
        raise BadShape(f': "{name}" holds {half!r}, which is not Unicode text') from error


def _messages(row: dict[str, Any]) -> Conversation:
    messages = _decoded(row, "messages")
    _require_messages("messages", messages, "role")
    # As templates do: a key whose value is null counts as absent.
    return _conversation(_without_nulls(messages), row)


def _without_nulls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in one.items() if value is not None} for one in messages]


def _preference(row: dict[str, Any]) -> Preference:
    pair = Preference(_answered(row, "chosen"), _answered(row, "rejected"))
    if type(pair.chosen) is not type(pair.rejected):
        names = ["messages" if isinstance(one, Conversation) else "a text" for one in pair]
        raise BadShape(
            f': "chosen" is {names[0]} and "rejected" {names[1]}; both must be the same kind of answer'
        )
    if isinstance(pair.chosen, Conversation) and isinstance(pair.rejected, Conversation):
        _require_one_question(pair.chosen.messages, pair.rejected.messages)
    if _says_nothing(pair.chosen):
        raise BadShape(': "chosen" says nothing, and a model that prefers it would not answer either')
    return pair


def _require_one_question(chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> None:
    """Two talks are the same until one of the assistant's messages differs."""
    for number, both in enumerate(itertools.zip_longest(chosen, rejected)):
        if both[0] == both[1]:
            continue
        if not all(message is not None and message["role"] == "assistant" for message in both):
            raise BadShape(
                f": chosen[{number}] and rejected[{number}] differ and are no answers; both must answer one "
                "question"
            )
        return


def _says_nothing(answer: Answered) -> bool:
    if isinstance(answer, Conversation):
        last = answer.messages[-1]
        is_more_than_text = not last.keys() <= {"role", "content"}  # a call of a tool says something
        text = None if is_more_than_text else last.get("content", "")
    else:
        text = answer.completion if isinstance(answer, Completion) else answer.output
    return isinstance(text, str) and not text.strip()


def _answered(row: dict[str, Any], name: str) -> Answered:
    """The question with one of its answers: a text, or messages, which may begin with the question."""
    answer, prompt = row[name], row.get("prompt")
    if isinstance(answer, str) and row.get("instruction") is not None:
        return _instruction({**row, "output": answer})
    if isinstance(answer, str) and isinstance(prompt, str):
        return _completion({"prompt": prompt, "completion": answer})
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if not isinstance(answer, list):
        raise BadShape(f': "{name}" must be a text or a list of messages, not {_shortened(answer)}')
    _require_messages(name, answer, "role")
    if isinstance(prompt, str) and answer[0]["role"] == "assistant":
        prompt = [{"role": "user", "content": prompt}]
    before = []
    if isinstance(prompt, list) and prompt:
        _require_messages("prompt", prompt, "role")
        # Columns of a table have nulls for fields that only others have.
        begins_with_prompt = _without_nulls(answer[: len(prompt)]) == _without_nulls(prompt)
        before = [] if begins_with_prompt else prompt
    if not before and all(message["role"] == "assistant" for message in answer):
        raise BadShape(f': "{name}" answers nothing; {_ALLOWED_PAIR}')
    return _messages({**row, "messages": [*before, *answer]})


# ShareGPT's names of who speaks.
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}


def _sharegpt(row: dict[str, Any]) -> Conversation:
    turns = _decoded(row, "conversations")
    if isinstance(turns, list) and turns and all(_has_role(turn) for turn in turns):
        return _messages({**row, "messages": turns})
    _require_messages("conversations", turns, "from")
    messages = []
    for number, turn in enumerate(turns):
        speaker, value = turn["from"], turn.get("value")
        if speaker not in _SPEAKERS:
            raise BadShape(
                f": conversations[{number}] is from {_shortened(speaker)}; allowed are {', '.join(_SPEAKERS)}"
            )
        if not isinstance(value, str):
            raise BadShape(f": conversations[{number}].value must be a string, not {_shortened(value)}")
        learned = {name: turn[name] for name in _LEARNED if turn.get(name) is not None}
        messages.append({"role": _SPEAKERS[speaker], "content": value, **learned})
    return _conversation(messages, row)


def _has_role(turn: Any) -> bool:
    """Whether a turn is a message; tables give every turn the fields of others, as nulls."""
    return isinstance(turn, dict) and turn.get("role") is not None


def _conversation(messages: list[dict[str, Any]], row: Mapping[str, Any]) -> Conversation:
    system = {"role": "system", "content": _some_text(row, "system")}
    if system["content"] and messages[0]["role"] != "system":
        messages = [system, *messages]
    elif system["content"] and messages[0].get("content") != system["content"]:
        raise BadShape(': "system" and the first message are two system messages; one must go')
    roles = list(dict.fromkeys(message["role"] for message in messages))
    if "assistant" not in roles:
        raise BadShape(
            " has no message of the assistant, so there is nothing to learn in it; its roles are "
            f"{_shortened(roles)}"
        )
    _require_content(messages)
    tools = _decoded(row, "tools")
    if tools is not None and not isinstance(tools, list):
        raise BadShape(f': "tools" must be a list, not {_shortened(tools)}')
    return Conversation(messages, tools or None)


# What a message may say beside or instead of its content, and which other trainers leave out of the loss.
_SAID = {"content", "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"}
_LEARNED = ("weight", "train")


def _require_content(messages: list[dict[str, Any]]) -> None:
    """That templates have a text to write of each message, where many write "" or a value as Python does."""
    for number, message in enumerate(messages):
        if message["role"] not in ("system", "user", "assistant"):  # a tool may answer with anything
            continue
        if message.keys().isdisjoint(_SAID if message["role"] == "assistant" else {"content"}):
            raise BadShape(f': messages[{number}] has no "content", but {_shortened(list(message))}')
        place, content = f": messages[{number}].content", message.get("content", "")
        if not isinstance(content, str | list):
            raise BadShape(f"{place} must be a text or a list of texts, not {_shortened(content)}")
        for at, part in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(part.get("text") if isinstance(part, dict) else part, str):
                raise BadShape(f"{place}[{at}] is no text, but {_shortened(part)}")
        for name in _LEARNED if message["role"] == "assistant" else ():
            if message.get(name, 1) != 1:
                raise BadShape(
                    f': messages[{number}] has "{name}": {_shortened(message[name])}; all that the assistant '
                    "says is learned, so end the messages before it, or leave it out"
                )


def _require_messages(name: str, messages: Any, role: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise BadShape(f': "{name}" must be a list of messages, not {_shortened(messages)}')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get(role), str):
            raise BadShape(f': {name}[{number}] must have a text as "{role}", not {_shortened(message)}')


def _decoded(row: Mapping[str, Any], name: str) -> Any:
    """A field that may be written as JSON in a text, as tables do whose columns have one type."""
    value = row.get(name)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise BadShape(f': "{name}" is a text that is not JSON: {_shortened(value)}') from error


def _shortened(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 50 else text[:50] + "..."


_Shape: TypeAlias = tuple[set[str], set[str], Callable[[dict[str, Any]], Record]]
_PAIR: _Shape = (
    {"chosen", "rejected"},
    {"prompt", "instruction", "input", "tools", "system"},
    _preference,
)
# What each kind of answer reads of a pair: a prompt that goes before a text is put to no chat template.
_READ_OF_PAIRS: dict[type, set[str]] = {
    Completion: {"chosen", "rejected", "prompt"},
    Instruction: {"chosen", "rejected", "instruction", "input", "system"},
    Conversation: {"chosen", "rejected", "prompt", "tools", "system"},
}
# What a shape must have, what it may have besides, and what reads it.
_SHAPES: tuple[_Shape, ...] = (
    ({"messages"}, {"tools", "system"}, _messages),
    ({"conversations"}, {"tools", "system"}, _sharegpt),
    ({"instruction", "output"}, {"input", "system"}, _instruction),
    ({"prompt", "completion"}, set(), _completion),
    ({"text"}, set(), _document),
)
