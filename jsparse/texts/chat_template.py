"""Chat templates: from messages to the prompt that a checkpoint was trained on."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import AddedToken, Tokenizer

from jsparse.hub import model_folder
from jsparse.texts.assistant_spans import mark_assistant
from jsparse.texts.chat_messages import cut, mark_end, plain, read_mappings, read_messages
from jsparse.texts.control_tokens import (
    ControlTokens,
    Encoded,
    assistant_mask,
    remove_control_marks,
    remove_marks,
)
from jsparse.texts.jinja_sandbox import MAX_SOURCE, CompiledTemplate, compile_template
from jsparse.texts.tokenizer import load_tokenizer, named_tokens

# Lists of mappings. What is in them is checked when it is read, by errors that name the place.
Messages: TypeAlias = Any


@dataclass(frozen=True)
class ChatTemplate:
    """The chat templates of a checkpoint; `load_chat_template` reads them.

    - directory: the checkpoint's folder; None for a template that is not of a checkpoint.
    - templates: by name. Most checkpoints have one, named ``default``.
    - special_tokens: ``bos_token`` and the like, as templates see them. A tokenizer that lacks one gets it.
    - tokenizer: what encodes; by default, the one in the folder.

    Templates come from whoever made the checkpoint, and run in a sandbox. They see plain data only. One that
    runs for more than five seconds, or that builds texts out of proportion to the messages, is stopped by a
    ValueError.
    """

    directory: Path | None
    templates: Mapping[str, CompiledTemplate] = field(repr=False)
    special_tokens: Mapping[str, str]
    tokenizer: Tokenizer | None = field(default=None, repr=False, compare=False)

    def render(
        self,
        messages: Messages,
        *,
        tools: Messages | None = None,
        documents: Messages | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        name: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt as text.

        - messages: mappings with a ``role`` and, in most, ``content``: a text, or a list of
          ``{"type": "text", "text": ...}``. A key whose value is None counts as absent. The ``arguments`` of
          ``tool_calls`` are an object, or a text with its JSON, which gives the same.
        - tools: what the model may call, as JSON schemas.
        - documents: what it may read, with ``title`` and ``text``.
        - add_generation_prompt: end with the beginning of the assistant's answer.
        - continue_final_message: end with the last message's text, for the model to go on with it.
        - name: which template; by default ``tool_use`` if there are tools and such a template, else
          ``default``.
        - variables: what else the template reads, such as ``enable_thinking``. They win over special tokens.

        Raises ValueError for messages of another form, for both of ``add_generation_prompt`` and
        ``continue_final_message``, for a name that no template has, and for whatever the template raises.
        """
        marked = self._prompt(
            messages,
            _unchanged,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            name=name,
            **variables,
        )
        return remove_marks(marked)

    def encode(
        self, messages: Messages, *, sanitize_control_tokens: bool = True, **arguments: Any
    ) -> list[int]:
        """The prompt as token ids, with the special tokens that the template writes and no others.

        What stands in messages, tools, documents and variables is text, also where it spells a special token
        of the tokenizer, such as ``<|im_end|>``. No special token among the ids has a character of it,
        whether it spells one whole, in letters of another case that the template changes, or together with
        what the template writes next to it. Added tokens that the tokenizer does not call special, such as
        ``<think>`` in some, stay tokens.

        This has limits. A token of which the template writes both the beginning and the end, as in
        ``"<|" + message.role + "|>"``, is the template's: check the roles of messages that strangers send. A
        template that takes something out of the middle of a text, or cuts it at a place that it has counted,
        can make a token of the rest. And where texts meet, a part of a token that is only letters and digits
        is not seen.

        For messages that spell no special token, the ids are those of transformers' ``apply_chat_template``;
        for arguments in a text, those that it gives for the object, where the template writes an object.

        - messages: as of `render`.
        - sanitize_control_tokens: False reads the whole prompt as if the template had written it, which is
          what transformers does by default.
        - arguments: the others of `render`.

        Raises ValueError as `render` does, and if a special token in a message cannot be encoded as text,
        because the tokenizer makes the token of it nevertheless.
        """
        return self._encode(messages, sanitize_control_tokens, arguments).ids

    def encode_with_mask(
        self, messages: Messages, *, sanitize_control_tokens: bool = True, **arguments: Any
    ) -> tuple[list[int], list[int]]:
        """The ids of `encode`, and for each of them 1 if the assistant writes it, else 0.

        A template may say what the assistant writes, by ``{% generation %}`` and ``{% endgeneration %}``. If
        it does not, a turn of the assistant begins where the prompt ends that the model is served with for
        it: the messages before it, rendered with ``add_generation_prompt``. It ends with the first special
        token that the template writes after the turn's text, by which a model stops; without one, where the
        messages up to it end when they are rendered, less the space there. A token counts if any of its
        characters does.

        - the arguments: as of `encode`, but ``add_generation_prompt`` is False unless given.

        Raises ValueError as `encode` does, for ``continue_final_message``, and, if the template has no such
        tags, for messages without one of the assistant, and for a turn whose beginning or end cannot be told.
        """
        template = self._choose(arguments.get("name"), arguments.get("tools"))
        if arguments.get("continue_final_message"):
            raise ValueError("continue_final_message=True cuts the prompt, so there is no mask of it")
        arguments = {"add_generation_prompt": False} | arguments
        if template.has_generation:
            prompt = self._encode(messages, sanitize_control_tokens, arguments)
        else:
            prompt = self._encode_turns(messages, sanitize_control_tokens, template.file, **arguments)
        return prompt.ids, assistant_mask(prompt.encoding.offsets, prompt.generated)

    def digest(self) -> str:
        """SHA-256 of all that decides what is rendered and encoded, but for the tokenizer."""
        sources = {name: template.source for name, template in self.templates.items()}
        content = json.dumps([sources, dict(self.special_tokens)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _choose(self, name: str | None, tools: Any) -> CompiledTemplate:
        if name is None:
            name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        if name not in self.templates:
            names = ", ".join(map(repr, self.templates))
            raise ValueError(f"{self.directory} has no chat template named {name!r}; there is {names}")
        return self.templates[name]

    def _encode(self, messages: Messages, sanitize: bool, arguments: Mapping[str, Any]) -> Encoded:
        mark = self._control_tokens.mark if sanitize else _unchanged
        return self._control_tokens.encode(self._prompt(messages, mark, **arguments))

    def _encode_turns(
        self,
        messages: Messages,
        sanitize: bool,
        file: str,
        *,
        add_generation_prompt: bool,
        **arguments: Any,
    ) -> Encoded:
        """The prompt, with what the assistant writes as it shows from prompts rendered for each turn."""
        control = self._control_tokens
        arguments.pop("continue_final_message", None)
        marked = mark_assistant(
            read_messages(messages, control.mark),
            lambda chat, ask: self._render(chat, control.mark, add_generation_prompt=ask, **arguments),
            generation_prompt=add_generation_prompt,
            special=set(control.tokens.values()),
            added={token.content for token in control.tokenizer.get_added_tokens_decoder().values()},
            eos=self.special_tokens.get("eos_token"),
            file=file,
        )
        if sanitize:
            return control.encode(marked)
        arguments["add_generation_prompt"] = add_generation_prompt
        if remove_marks(marked) != self._prompt(messages, _unchanged, **arguments):
            raise ValueError(
                f"{file} changes special tokens of messages, so what the assistant writes cannot be told by "
                "sanitize_control_tokens=False"
            )
        return control.encode(remove_control_marks(marked))

    def _prompt(
        self,
        messages: Messages,
        mark: Callable[[str], str],
        *,
        tools: Messages | None = None,
        documents: Messages | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        name: str | None = None,
        **variables: Any,
    ) -> str:
        template = self._choose(name, tools)
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "add_generation_prompt=True begins a new answer and continue_final_message=True goes on with "
                "the last message: choose one of them"
            )
        chat = read_messages(messages, mark)
        last = mark_end(chat) if continue_final_message else None
        if last is not None and "content" not in template.source:
            raise ValueError(
                f"{template.file} does not read `content`, so the last message cannot be continued"
            )
        rendered = self._render(
            chat,
            mark,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            name=name,
            **variables,
        )
        return rendered if last is None else cut(rendered, last, template.file)

    def _render(
        self,
        chat: list[dict[str, Any]],
        mark: Callable[[str], str],
        *,
        add_generation_prompt: bool,
        tools: Messages | None = None,
        documents: Messages | None = None,
        name: str | None = None,
        **variables: Any,
    ) -> str:
        return self._choose(name, tools).render(
            {
                **self.special_tokens,
                **plain(variables, "variables", mark),
                "messages": chat,
                "tools": None if tools is None else read_mappings(tools, "tools", mark),
                "documents": None if documents is None else read_mappings(documents, "documents", mark),
                "add_generation_prompt": add_generation_prompt,
            }
        )

    @functools.cached_property
    def _control_tokens(self) -> ControlTokens:
        if self.tokenizer is not None:
            return ControlTokens(self.tokenizer)
        assert self.directory is not None
        tokenizer = load_tokenizer(self.directory)
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        missing = [text for text in self.special_tokens.values() if text not in known]
        tokenizer.add_tokens([AddedToken(text, special=True) for text in missing])
        return ControlTokens(tokenizer)


def _unchanged(text: str) -> str:
    return text


def load_chat_template(model: str | Path) -> ChatTemplate:
    """The chat templates of a Hugging Face folder.

    They are read from the first of these that is there: ``chat_template.jinja`` and
    ``additional_chat_templates/*.jinja``, named after their files; ``chat_template`` in
    ``tokenizer_config.json``, one template or a list of named ones; ``chat_template.json``, the old file of
    multimodal models. ``tokenizer.json`` is read when a prompt is first encoded.

    - model: the folder, or an id on the hub.

    Returns a `ChatTemplate`. Raises FileNotFoundError if there is no such folder or no template in it, and
    ValueError, which names the file, for a template or a configuration that cannot be read.

    Source: transformers' documentation, "Chat templates".

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    >>> _ = (Path(folder.name) / "chat_template.jinja").write_text(template)
    >>> load_chat_template(folder.name).render([{"role": "user", "content": "Hello"}])
    '<|user|>Hello'
    >>> folder.cleanup()
    """
    directory = model_folder(model)
    config = _read_json(directory / "tokenizer_config.json")
    sources = _sources(directory, config)
    if not sources:
        raise FileNotFoundError(
            f"{directory} has no chat template: neither chat_template.jinja, nor "
            "additional_chat_templates/*.jinja, nor chat_template in tokenizer_config.json or "
            "chat_template.json"
        )
    templates = {name: compile_template(source, file) for name, (source, file) in sources.items()}
    if "added_tokens_decoder" not in config:  # older checkpoints
        config |= _read_json(directory / "special_tokens_map.json")
    return ChatTemplate(directory, templates, named_tokens(config))


def find_chat_template(model: str | Path) -> ChatTemplate | None:
    """As `load_chat_template`, but None for a model without one."""
    try:
        return load_chat_template(model)
    except FileNotFoundError:
        if not model_folder(model).is_dir():
            raise
        return None


def template_sources(directory: Path) -> dict[str, str]:
    """The chat templates in a folder as texts, by name; none if it has none."""
    sources = _sources(directory, _read_json(directory / "tokenizer_config.json"))
    return {name: source for name, (source, _) in sources.items()}


# Files


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, not {type(content).__name__}")
    return content


def _read_jinja(path: Path) -> tuple[str, str]:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_SOURCE + 1), str(path)  # one more than compile_template takes
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error


def _sources(directory: Path, config: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The source and the file of each template, by name."""
    single, others = directory / "chat_template.jinja", directory / "additional_chat_templates"
    sources = {"default": _read_jinja(single)} if single.is_file() else {}
    for path in sorted(others.glob("*.jinja")):
        sources[path.name.removesuffix(".jinja")] = _read_jinja(path)
    old = directory / "chat_template.json"
    for path, content in ((directory / "tokenizer_config.json", config), (old, _read_json(old))):
        sources = sources or _named(content.get("chat_template"), f"{path}, chat_template")
    return sources


def _named(value: Any, file: str) -> dict[str, tuple[str, str]]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": (value, file)}
    entries = value if isinstance(value, list) else []
    texts: list[tuple[Any, Any]] = [
        (e.get("name"), e.get("template")) for e in entries if isinstance(e, dict)
    ]
    if len(texts) != len(entries) or not texts or not all(isinstance(t, str) for pair in texts for t in pair):
        raise ValueError(f"{file} must be a text, or a list of objects with the texts `name` and `template`")
    return {name: (source, f"{file} {name!r}") for name, source in texts}
