"""Where the assistant writes in a rendered conversation, for templates that do not mark it.

A turn begins where the prompt ends that the model is served with for it, so that prompt is rendered. It ends
with the token by which the model stops. Many templates write the past otherwise than the present: they drop
thoughts, or tell of tools in the last message only. Then the prompt of a turn is not a prefix of the whole,
and what comes between the text of the message before and the turn is compared instead. Marks, as those of
control tokens, show where the texts of messages are.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias

from jsparse.texts.control_tokens import CLOSE, GENERATION_END, GENERATION_START, OPEN, TURNS, TURNS_COUNT
from jsparse.texts.tool_arguments import Arguments

Chat: TypeAlias = list[dict[str, Any]]
_TURN = re.compile(f"[{TURNS}]")
_FIRST = ord(TURNS[0])
# What the prompt of an answer may open or close that the same turn, once past, does not have.
_THINKING = re.compile(r"(?:</?(?:think|thinking|thought|reasoning)>|\s)*+\Z")


def mark_assistant(
    chat: Chat,
    render: Callable[[Chat, bool], str],
    *,
    generation_prompt: bool,
    special: Collection[str],
    added: Collection[str],
    eos: str | None,
    file: str,
) -> str:
    """The rendered conversation with marks of generation around all that the assistant writes.

    - chat: the messages, in which control tokens are marked.
    - render: renders messages, with the prompt of an answer after them or without.
    - generation_prompt: whether that prompt ends the conversation.
    - special, added: the tokenizer's special tokens, and all tokens that it has added.
    - eos: its end token.
    - file: the template's, for messages.

    Raises ValueError for messages without one of the assistant, and where a turn's beginning or end cannot be
    told.
    """
    turns = [n for n, message in enumerate(chat) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("messages has none of the assistant, so there is nothing for it to write")
    whole = render(chat, generation_prompt)
    unmarked = chat
    chat, places = _with_places(chat, whole, render, generation_prompt)
    limit = _common(whole, _read_places(render(chat, False))[0]) if generation_prompt else len(whole)
    begins = {n: _begin(n, chat, whole, places, render, file) for n in turns}
    stops, ends = {eos}, {}
    for n in sorted(turns, key=lambda n: "tool_calls" in chat[n]):  # calls have special tokens of their own
        start = max([begins[n], *places.get(n, [])])
        others = [at for m, found in places.items() if m != n for at in found if at >= start]
        rest = whole[: min([limit, *others])]
        found = _tokens(rest, start, special) or _tokens(rest, start, added)
        if not found:
            ends[n] = max(start, _end_without_token(n, chat, whole, render, file))
            continue
        known = [token for token in found if token[0] in stops] if "tool_calls" in chat[n] else []
        name, ends[n] = (known or found)[0]
        stops |= {name} if "tool_calls" not in chat[n] else set()
    pieces, done = [], 0
    for n in turns:
        begin, end = begins[n], ends[n]
        if n not in places and chat[n] != unmarked[n]:
            raise _unclear(n, file, "the template writes none of its texts")
        _check(n, (done, begin, end), whole, places, file)
        pieces += [whole[done:begin], GENERATION_START, whole[begin:end], GENERATION_END]
        done = end
    return "".join([*pieces, whole[done:]])


def _unclear(n: int, file: str, why: str) -> ValueError:
    return ValueError(
        f"{file}: what the assistant writes in messages[{n}] cannot be told from the rendered text, since "
        f"{why}; put {{% generation %}} and {{% endgeneration %}} around it in the template"
    )


def _with_places(
    chat: Chat, whole: str, render: Callable[[Chat, bool], str], generation_prompt: bool
) -> tuple[Chat, dict[int, list[int]]]:
    """The messages with marks, where these do not change what is written, and where they are in the whole."""

    def found(marked: Chat) -> dict[int, list[int]] | None:
        try:
            text, places = _read_places(render(marked, generation_prompt))
        except ValueError:
            return None
        return places if text == whole else None

    marks = [chr(_FIRST + n % TURNS_COUNT) for n in range(len(chat))]
    marked = [_mark_texts(message, mark, mark) for message, mark in zip(chat, marks, strict=True)]
    places = found(marked)
    if places is not None:
        return marked, places
    marked, places = chat, {}
    for n, (message, mark) in enumerate(zip(chat, marks, strict=True)):
        for after in (mark, ""):  # `content.split("</think>")[-1].lstrip()` keeps the space before a mark
            trial = [*marked[:n], _mark_texts(message, mark, after), *marked[n + 1 :]]
            more = found(trial)
            if more is not None:
                marked, places = trial, more
                break
    return marked, places


def _mark_texts(message: dict[str, Any], before: str, after: str) -> dict[str, Any]:
    """A message with marks around what its texts, thoughts and calls say, but for the space around it."""

    def text(value: Any) -> Any:
        if isinstance(value, str):
            body = value.strip()  # so that a template that trims does so nevertheless
            return value.replace(body, f"{before}{body}{after}", 1) if body else value
        if isinstance(value, list):
            return [text(item) for item in value]
        if isinstance(value, Arguments):
            return Arguments(text(dict(value)), text(str(value)))
        return {key: text(item) for key, item in value.items()} if isinstance(value, dict) else value

    def part(value: Any) -> Any:
        return value | {"text": text(value["text"])} if isinstance(value, dict) and "text" in value else value

    def call(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        marked = {key: text(value[key]) for key in ("name", "arguments") if key in value}
        return value | marked | ({"function": call(value["function"])} if "function" in value else {})

    result = dict(message)
    for key in ("content", "thinking", "reasoning_content", "reasoning"):
        if isinstance(result.get(key), list):
            result[key] = [part(item) for item in result[key]]
        elif key in result:
            result[key] = text(result[key])
    if isinstance(result.get("tool_calls"), list):
        result["tool_calls"] = [call(item) for item in result["tool_calls"]]
    return result


def _read_places(rendered: str) -> tuple[str, dict[int, list[int]]]:
    """The text without the marks of messages, and the places of these, by the number of the message."""
    places: dict[int, list[int]] = {}
    number, half = 0, TURNS_COUNT // 2
    for n, match in enumerate(_TURN.finditer(rendered)):
        # The marks begin again after TURNS_COUNT messages; messages that are near in the text are near.
        number += (ord(match[0]) - _FIRST - number + half) % TURNS_COUNT - half
        places.setdefault(number, []).append(match.start() - n)
    return _TURN.sub("", rendered), places


def _common(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginnings."""
    return len(os.path.commonprefix([a, b]))


def _begin(
    n: int,
    chat: Chat,
    whole: str,
    places: Mapping[int, list[int]],
    render: Callable[[Chat, bool], str],
    file: str,
) -> int:
    """Where the prompt of an answer ends, in the whole, that the model is served with for this turn."""
    try:
        prompt, prompt_places = _read_places(render(chat[:n], True))
    except ValueError as error:
        raise _unclear(n, file, f"the messages before it are not rendered alone ({error})") from error
    if whole.startswith(prompt):
        return len(prompt)
    if n - 1 not in places or n - 1 not in prompt_places:
        raise _unclear(n, file, "it does not begin with the prompt before that message")
    # Both from the text of the message before: what comes between that and the answer.
    start = places[n - 1][-1]
    between, header = whole[start : places.get(n, [None])[0]], prompt[prompt_places[n - 1][-1] :]
    same = _common(between, header)
    if same < len(header):
        least = next(match.start() for match in _THINKING.finditer(header))
        borders = [match.start() for match in re.finditer(r"<|(?<=>)|\s|\Z", header)]
        borders = [at for at in borders if least <= at <= same]
        if not borders:
            raise _unclear(n, file, "what is written before it is not the prompt of an answer")
        same = borders[-1]
    return start + same


def _tokens(text: str, start: int, names: Iterable[str]) -> list[tuple[str, int]]:
    """The tokens that the template writes, and their ends, from a place on."""
    choice = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    if not choice:
        return []
    pattern = re.compile(f"{OPEN}(?i:{choice}){CLOSE}|({choice})")
    return [(match[1], match.end()) for match in pattern.finditer(text, start) if match[1]]


def _end_without_token(n: int, chat: Chat, whole: str, render: Callable[[Chat, bool], str], file: str) -> int:
    """Where the messages up to a turn end, if that is still so when a message comes after it."""
    upto = _read_places(render(chat[: n + 1], False))[0].rstrip()
    texts = [whole]
    if n + 1 == len(chat):  # a template may write a prompt that nobody has asked for
        texts.append(_read_places(render([*chat, {"role": "user", "content": "?"}], False))[0])
    if not all(text.startswith(upto) for text in texts):
        raise _unclear(n, file, "no special token ends it and what follows changes how it is written")
    return len(upto)


def _check(
    n: int, span: tuple[int, int, int], whole: str, places: Mapping[int, list[int]], file: str
) -> None:
    """That a turn has all of its texts and no other's.

    - span: where the turn before ends, and where this one begins and ends.
    """
    done, begin, end = span
    if not done <= begin < end:
        raise _unclear(n, file, "nothing is written for it after the prompt of an answer")
    own = places.get(n, [begin])
    # The prompt may have opened a thought, with which the message's text begins.
    if own[-1] > end or own[0] < begin and not _THINKING.fullmatch(whole, own[0], begin):
        raise _unclear(n, file, "its texts are written elsewhere")
    other = [m for m, found in places.items() if m != n and any(begin < at < end for at in found)]
    if other:
        raise _unclear(n, file, f"the text of messages[{other[0]}] is written in it")
