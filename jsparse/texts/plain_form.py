"""A chat template for a base model, whose folder has none: Alpaca's form without its preamble."""

import json
import re

import tokenizers

from jsparse.texts.chat_template import ChatTemplate
from jsparse.texts.jinja_sandbox import compile_template
from jsparse.texts.tokenizer import start_ids

TEMPLATE_FILE = "chat_template.jinja"  # in a model's folder

# Each tag strips the space around it, so that it does not matter whether a program trims blocks.
_SOURCE = """\
{%- if tools %}
    {{- raise_exception("this template renders no tools") }}
{%- endif %}
{{- START }}
{%- for message in messages %}
    {%- if message["tool_calls"] or message["content"] is not string %}
        {{- raise_exception("this template renders messages whose content is a text") }}
    {%- elif message["role"] == "system" %}
        {{- message["content"] + "\\n\\n" }}
    {%- elif message["role"] == "user" %}
        {{- "### Instruction:\\n" + message["content"] + "\\n\\n" }}
    {%- elif message["role"] == "assistant" %}
        {{- "### Response:\\n" }}
        {%- generation %}
            {{- message["content"] + END }}
        {%- endgeneration %}
        {%- if add_generation_prompt or not loop.last %}
            {{- "\\n\\n" }}
        {%- endif %}
    {%- else %}
        {{- raise_exception("this template renders the roles system, user and assistant") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "### Response:\\n" }}
{%- endif %}
"""


def plain_chat_template(tokenizer: tokenizers.Tokenizer, end_token_id: int | None) -> ChatTemplate:
    """A chat template for a base model that has none: that of Alpaca, without its preamble.

    A text begins with what the tokenizer puts before every text. A system message is its text and a blank
    line; those of the user and the assistant stand below "### Instruction:" and "### Response:". The
    assistant's turn ends with the model's end token, and is marked by ``{% generation %}``.

    - tokenizer: the model's, which encodes prompts.
    - end_token_id: the model's end token; None for none, and then a model does not learn to stop.

    Returns a `ChatTemplate`. ``templates["default"].source`` is its source, which other programs read as
    ``chat_template.jinja``. It refuses tools, and messages without a text, by a ValueError.

    Raises ValueError for an end token that the tokenizer does not have, or does not read where it is written.

    Source: Taori et al. 2023, Stanford Alpaca.

    >>> from jsparse.texts.tokenizer import byte_tokenizer
    >>> template = plain_chat_template(byte_tokenizer(), end_token_id=256)
    >>> template.render([{"role": "user", "content": "Hello"}])
    '### Instruction:\\nHello\\n\\n### Response:\\n'
    """
    loaded = tokenizers.Tokenizer.from_str(tokenizer.to_str())  # it reads the names of tokens as tokens
    loaded.no_truncation()
    loaded.no_padding()
    literals = {
        "START": "".join(_written(loaded, id) for id in start_ids(loaded)),
        "END": "" if end_token_id is None else _written(loaded, end_token_id),
    }
    source = re.sub("START|END", lambda match: json.dumps(literals[match[0]], ensure_ascii=False), _SOURCE)
    return ChatTemplate(None, {"default": compile_template(source, "the plain form")}, {}, loaded)


def with_input(instruction: str, input: str) -> str:
    """What the user says in a row of Alpaca that has an input.

    >>> with_input("Add.", "1 2")
    'Add.\\n\\n### Input:\\n1 2'
    """
    return f"{instruction}\n\n### Input:\n{input}"


def _written(loaded: tokenizers.Tokenizer, id: int) -> str:
    """The name of a token, which the tokenizer must read as that token."""
    name = loaded.id_to_token(id)
    if name is None:
        raise ValueError(f"end_token_id={id}, but the tokenizer has no such token")
    if loaded.encode(name, add_special_tokens=False).ids != [id]:
        raise ValueError(
            f"the tokenizer does not read {name!r} as its token {id}, so no text can end with it; it must be "
            "one of the special tokens in tokenizer.json, under added_tokens"
        )
    return name
