"""The plain form of a base model's conversations."""

import json
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, processors

from jsparse.models import byte_tokenizer, load_chat_template, load_tokenizer
from jsparse.texts.plain_form import plain_chat_template
from jsparse.texts.tokenizer import prompt_ids

SYSTEM = {"role": "system", "content": " Be brief."}
USER = {"role": "user", "content": 'Hello "é" {{ 日本 }} \\n <|endoftext|></s> '}
ASSISTANT = {"role": "assistant", "content": " Yes <s>\n"}
AGAIN = {"role": "user", "content": "Add.\n\n### Input:\n1 2"}
TALKS = {
    "single": [USER, ASSISTANT],
    "turns": [USER, ASSISTANT, AGAIN, ASSISTANT],
    "system": [SYSTEM, USER, ASSISTANT, AGAIN],
    "in a row": [USER, ASSISTANT, ASSISTANT],
    "empty": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}],
}


def save_byte_model(folder, start=None, end="<|endoftext|>"):
    """A folder with a tokenizer of bytes, its end token, and a start token before each text."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in {start, end} if t])
    if start:
        special = [(start, tokenizer.token_to_id(start))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", pair=f"{start} $A $B", special_tokens=special
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": start or end}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


@pytest.mark.parametrize("start", [None, "<s>"])
def test_form(tmp_path, start):
    tokenizer = save_byte_model(tmp_path, start, "</s>")
    template = plain_chat_template(tokenizer, tokenizer.token_to_id("</s>"))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add.\n\n### Input:\n1 2"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "Again"},
    ]
    text = (
        f"{start or ''}Be brief.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3</s>\n\n"
        "### Instruction:\nAgain\n\n"
    )
    assert template.render(messages, add_generation_prompt=False) == text
    assert template.render(messages) == text + "### Response:\n"
    assert template.render(messages[:3], add_generation_prompt=False).endswith("### Response:\n3</s>")


@pytest.mark.parametrize("start", [None, "<s>"])
@pytest.mark.parametrize("talk", TALKS)
def test_tokens_and_mask(tmp_path, start, talk):
    tokenizer, messages = save_byte_model(tmp_path, start, "</s>"), TALKS[talk]
    end = tokenizer.token_to_id("</s>")
    assert end is not None
    template = plain_chat_template(tokenizer, end)
    ids, mask = template.encode_with_mask(messages)
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = [id for id, one in zip(ids, mask, strict=True) if one]
    said = [[*messages[n]["content"].encode(), end] for n in turns]  # a token spelled in a text stays text
    assert chosen == sum(said, [])
    assert ids.count(end) == len(turns)
    for n, tokens in zip(turns, said, strict=True):  # trained as served
        prompt = template.encode(messages[:n])
        assert ids[: len(prompt) + len(tokens)] == prompt + tokens
        assert mask[len(prompt) - 1] == 0 and mask[len(prompt)] == 1
        assert prompt[:1] == prompt_ids(tokenizer, "")[:1] or not start
        if start:
            assert [tokenizer.id_to_token(id) for id in prompt].count(start) == 1


def test_end_tokens(tmp_path):
    tokenizer = save_byte_model(tmp_path)
    messages = TALKS["single"]
    ids, mask = plain_chat_template(tokenizer, 256).encode_with_mask(messages)
    assert ids[-1] == 256 and mask[-1] == 1
    assert tokenizer.encode("<|endoftext|>").ids != [256]  # it reads the name as text until it is loaded
    loaded = load_tokenizer(tmp_path)
    assert plain_chat_template(loaded, 256).encode_with_mask(messages) == (ids, mask)
    without = plain_chat_template(tokenizer, None).encode_with_mask(messages)
    assert without == (ids[:-1], mask[:-1])


def test_refused(tmp_path):
    tokenizer = save_byte_model(tmp_path)
    with pytest.raises(ValueError, match="end_token_id=999, but the tokenizer has no such token"):
        plain_chat_template(tokenizer, 999)
    with pytest.raises(ValueError, match="does not read 'end of' as its token 1, so no text can end with it"):
        plain_chat_template(Tokenizer(models.BPE({"a": 0, "end of": 1}, [])), 1)
    template = plain_chat_template(tokenizer, 256)
    options: dict[str, Any]
    for messages, options, error in (
        ([USER], {"tools": [{"name": "f"}]}, "renders no tools"),
        ([{"role": "tool", "content": "1"}], {}, "renders the roles system, user and assistant"),
        ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], {}, "whose content is a text"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], {}, "whose content is a text"),
        ([ASSISTANT | {"tool_calls": [{"name": "f"}]}], {}, "whose content is a text"),
    ):
        with pytest.raises(ValueError, match=f"the plain form: .*{error}"):
            template.encode(messages, **options)


def test_names_of_tokens_are_quoted(tmp_path):
    end = """<"END"\\n{{ 'é' }}>"""
    tokenizer = save_byte_model(tmp_path, "<START_END>", end)
    template = plain_chat_template(tokenizer, tokenizer.token_to_id(end))
    assert template.render(TALKS["empty"], add_generation_prompt=False) == (
        "<START_END>### Instruction:\n\n\n### Response:\n" + end
    )


def test_programs_that_do_not_trim_blocks(tmp_path):
    jinja2 = pytest.importorskip("jinja2")
    template = plain_chat_template(save_byte_model(tmp_path, "<s>"), 256)
    source = template.templates["default"].source
    source = source.replace("{%- generation", "{%- if true").replace("{%- endgeneration", "{%- endif")
    for messages in TALKS.values():
        text = jinja2.Template(source).render(messages=messages, add_generation_prompt=True)
        assert text == template.render(messages)


@pytest.mark.parametrize("start", [None, "<s>"])
def test_as_transformers_reads_the_source(tmp_path, start):
    transformers = pytest.importorskip("transformers", reason="the oracle is in the extra `parity`")
    tokenizer = save_byte_model(tmp_path, start)
    template = plain_chat_template(tokenizer, 256)
    (tmp_path / "chat_template.jinja").write_text(template.templates["default"].source, encoding="utf-8")
    theirs, saved = transformers.AutoTokenizer.from_pretrained(tmp_path), load_chat_template(tmp_path)
    for name, messages in TALKS.items():
        for prompted in (True, False):
            options: dict[str, Any] = {"add_generation_prompt": prompted}
            expected = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
            text = theirs.apply_chat_template(messages, tokenize=False, **options)
            assert template.render(messages, **options) == text, name
            ids, mask = template.encode_with_mask(messages, sanitize_control_tokens=False, **options)
            assert (ids, mask) == (expected["input_ids"], expected["assistant_masks"]), name
            assert saved.encode_with_mask(messages, **options) == template.encode_with_mask(
                messages, **options
            )
    with pytest.raises(Exception, match="renders no tools"):
        theirs.apply_chat_template([USER], tools=[{"type": "function", "function": {"name": "f"}}])
