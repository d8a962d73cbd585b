"""A chat template for a base model, whose folder has none: Alpaca's form without its preamble."""

import json
import re
from pathlib import Path

import tokenizers

from jsparse.texts.chat_template import ChatTemplate
from jsparse.texts.jinja_sandbox import compile_template
from jsparse.texts.tokenizer import start_ids

# Each tag strips the space around it, so that it does not matter whether a program trims blocks.
_SOURCE = """\
{%- if tools %}
    {{- raise_exception("the plain form of a base model has no tools") }}
{%- endif %}
{{- START }}
{%- for message in messages %}
    {%- if message["tool_calls"] or message["content"] is not string %}
        {{- raise_exception("the plain form of a base model takes messages whose content is a text") }}
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
        {{- raise_exception("the plain form of a base model has the roles system, user and assistant") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "### Response:\\n" }}
{%- endif %}
"""


def plain_chat_template(
    directory: str | Path, tokenizer: tokenizers.Tokenizer, end_token_id: int | None
) -> ChatTemplate:
    """A chat template for a base model that has none: that of Alpaca, without its preamble.

    A text begins with what the tokenizer puts before every text. A system message is its text and a blank
    line; those of the user and the assistant stand below "### Instruction:" and "### Response:". The
    assistant's turn ends with the model's end token, and is marked by ``{% generation %}``. A row of Alpaca
    with an input is the message ``"{instruction}\\n\\n### Input:\\n{input}"`` of the user.

    - directory: the model's folder, whose tokenizer.json encodes prompts.
    - tokenizer: the same tokenizer, which names the tokens.
    - end_token_id: the model's end token; None for none, and then a model does not learn to stop.

    Returns a `ChatTemplate`. ``templates["default"].source`` is its source, which other programs read as
    ``chat_template.jinja``. It refuses tools, and messages without a text, by a ValueError.

    Raises ValueError for an end token that the tokenizer does not have, or does not read where it is written.

    Source: Taori et al. 2023, Stanford Alpaca.

    >>> import tempfile
    >>> from jsparse.texts.tokenizer import byte_tokenizer
    >>> folder, tokenizer = tempfile.TemporaryDirectory(), byte_tokenizer()
    >>> tokenizer.save(f"{folder.name}/tokenizer.json")
    >>> template = plain_chat_template(folder.name, tokenizer, end_token_id=256)
    >>> template.render([{"role": "user", "content": "Hello"}])
    '### Instruction:\\nHello\\n\\n### Response:\\n'
    >>> folder.cleanup()
    """
    literals = {
        "START": "".join(_written(tokenizer, id) for id in start_ids(tokenizer)),
        "END": "" if end_token_id is None else _written(tokenizer, end_token_id),
    }
    source = re.sub("START|END", lambda match: json.dumps(literals[match[0]], ensure_ascii=False), _SOURCE)
    file = f"the plain form of {directory}"
    return ChatTemplate(Path(directory), {"default": compile_template(source, file)}, {}, ())


def _written(tokenizer: tokenizers.Tokenizer, id: int) -> str:
    """The name of a token, which a tokenizer loaded from tokenizer.json must read as that token."""
    name = tokenizer.id_to_token(id)
    if name is None:
        raise ValueError(f"end_token_id={id}, but the tokenizer has no such token")
    loaded = tokenizers.Tokenizer.from_str(tokenizer.to_str())  # some read no names until loaded again
    if loaded.encode(name, add_special_tokens=False).ids != [id]:
        raise ValueError(
            f"the tokenizer does not read {name!r} as its token {id}, so no text can end with it; it must be "
            "one of the special tokens in tokenizer.json, under added_tokens"
        )
    return name
