"""What the assistant writes, by prompts rendered for each turn. The oracle: test_chat_template_parity.py."""

import hypothesis
import pytest
from hypothesis import strategies

from jsparse.models import load_chat_template, load_tokenizer
from jsparse.texts.jinja_sandbox import CompiledTemplate

CHATML = {
    "special": ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "</s>", "<|eot_id|>", "[/INST]"],
    "others": ["<think>", "</think>"],
}
USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Yes, "}
PAIR = [USER, ASSISTANT]


@pytest.fixture
def load(save_chat_model, tmp_path):
    """``load(template)``: with the tokenizer of ChatML's special tokens, unless others are given."""
    return lambda template, **tokens: load_chat_template(
        save_chat_model(tmp_path / "model", template, **(tokens or CHATML))
    )


def targets(template, messages, **options):
    """The texts of the stretches that the assistant writes."""
    ids, mask = template.encode_with_mask(messages, **options)
    assert ids == template.encode(messages, **{"add_generation_prompt": False} | options)
    tokenizer, runs = load_tokenizer(template.directory), [[]]
    for id, one in zip(ids, mask, strict=True):
        if one:
            runs[-1].append(id)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs if run]


LOOP = "{%% for m in messages %%}%s{%% endfor %%}{%% if add_generation_prompt %%}%s{%% endif %%}"
FORMS = {
    # Without a token that ends a turn, it ends where the text does.
    "no end token": (LOOP % ("{{ m.role }}: {{ m.content }}\n\n", "assistant: "), ["Yes,", "Yes,"]),
    "no prompt": (
        LOOP
        % ("{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + '</s>' }}", ""),
        [" Yes, </s>"] * 2,
    ),
    # Here the model is served with no header, and so writes it.
    "no header in the prompt": (
        LOOP % ("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", ""),
        ["<|im_start|>assistant\nYes, <|im_end|>"] * 2,
    ),
    "an added token that is not special": (
        LOOP % ("{{ m.role }}: {{ m.content }}</think>\n", "assistant: "),
        ["Yes, </think>"] * 2,
    ),
    "tokens after the end": (
        LOOP % ("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|></s>\n", "<|im_start|>assistant\n"),
        ["Yes, <|im_end|>"] * 2,
    ),
    "a default system message": (
        "<|im_start|>system\nHelp.<|im_end|>\n"
        + LOOP % ("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n"),
        ["Yes, <|im_end|>"] * 2,
    ),
    "the last question written otherwise": (
        LOOP
        % (
            "{% if m.role == 'user' and "
            "messages[loop.index0 + 2:] | selectattr('role', 'equalto', 'user') | list == [] %}"
            "Answer: {% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
            "<|im_start|>assistant\n",
        ),
        ["Yes, <|im_end|>"] * 2,
    ),
    "the prompt opens a thought": (
        LOOP
        % (
            "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
            "<|im_start|>assistant\n<think>\n",
        ),
        ["Yes, <|im_end|>"] * 2,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, load):
    source, expected = FORMS[form]
    assert targets(load(source), PAIR * 2) == expected
    assert targets(load(source), [*PAIR, *PAIR, USER]) == expected


def test_a_thought_that_the_prompt_opens_is_kept(load):
    source, _ = FORMS["the prompt opens a thought"]
    thought = ASSISTANT | {"content": "<think>\nHm\n</think>\nYes"}
    assert targets(load(source), [USER, thought]) == ["Hm\n</think>\nYes<|im_end|>"]
    assert targets(load(source), [USER, ASSISTANT | {"content": "<thin"}]) == ["<thin<|im_end|>"]


def test_many_messages(load):
    """There are fewer marks than messages here."""
    talk = [
        USER | {"content": f"{n}"} if n % 2 == 0 else ASSISTANT | {"content": f"{n}"} for n in range(1100)
    ]
    assert targets(load("chatml"), talk) == [f"{n}<|im_end|>" for n in range(1, 1100, 2)]


def test_how_often_a_template_is_rendered(load, monkeypatch):
    count, render = [], CompiledTemplate.render
    monkeypatch.setattr(CompiledTemplate, "render", lambda *a: count.append(1) or render(*a))
    load("chatml").encode_with_mask(PAIR * 10)
    assert len(count) <= 20 + 2


CALL = {"function": {"name": "f", "arguments": {"n": 1}}}
REFUSED = {
    "unlike the prompt": (
        LOOP % ("<{{ m.role }}>{{ m.content }}</s>", "assistant: "),
        PAIR,
        "not the prompt of an",
    ),
    "the past reworded": (
        LOOP % ("{{ messages | length }} {{ m.role }}: {{ m.content }}</s>", "assistant: "),
        PAIR,
        "not the prompt of an",
    ),
    "the text left out": (LOOP % ("{{ m.role }}: </s>", "assistant: "), PAIR, "writes none of its texts"),
    "a call left out": (
        LOOP % ("{{ m.role }}: {{ m.content }}</s>", "assistant: "),
        [USER, {"role": "assistant", "tool_calls": [CALL]}],
        "writes none of its texts",
    ),
    "the other way round": (
        "{% for m in messages[::-1] %}{{ m.role }}: {{ m.content }}</s>{% endfor %}",
        PAIR,
        "cannot be told",
    ),
    "no end, and the past rewritten": (
        LOOP % ("{{ m.role }}: {{ m.content }}{{ '.' if loop.last and m.role != 'user' }}\n", "assistant: "),
        PAIR * 2,
        "no special token ends it",
    ),
    "no end, and a prompt that nobody asks for": (
        LOOP % ("{{ m.role }}: {{ m.content }}\n", "") + "assistant: ",
        PAIR,
        "no special token ends it",
    ),
    "the assistant first": (
        "{{ messages[0].role[0] }}" + LOOP % ("{{ m.content }}</s>", "assistant: "),
        [ASSISTANT, USER],
        "messages before it are not rendered alone",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_refused(form, load):
    source, messages, why = REFUSED[form]
    with pytest.raises(ValueError, match=why) as error:
        load(source).encode_with_mask(messages)
    text = str(error.value)
    assert "chat_template.jinja: what the assistant writes in messages[" in text and "\n" not in text
    assert text.endswith("put {% generation %} and {% endgeneration %} around it in the template")


def test_an_assistant_that_begins(load):
    assert targets(load("chatml"), [ASSISTANT, USER, ASSISTANT]) == ["Yes, <|im_end|>"] * 2


def test_messages_without_an_assistant(load):
    for role in ("user", "system", "model"):
        with pytest.raises(ValueError, match="^messages has none of the assistant"):
            load("chatml").encode_with_mask([USER | {"role": role}])
    with pytest.raises(ValueError, match="there is no mask of it"):
        load("chatml").encode_with_mask(PAIR, continue_final_message=True)


PIECES = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|IM_END|>",
    "<|im_",
    "end|>",
    "<",
    "</s>",
    "[/INST]",
    "\n",
    "  ",
    "a",
    "é日🦀",
]
texts = strategies.lists(strategies.sampled_from(PIECES), max_size=4).map("".join)
talks = strategies.lists(
    strategies.tuples(texts, strategies.lists(texts, min_size=1, max_size=2)), min_size=1, max_size=3
)
ENDS = {"chatml": "<|im_end|>", "llama-2": "<|im_end|>", "qwen2.5": "<|im_end|>", "qwen3": "<|im_end|>"}


@pytest.mark.parametrize("family", ENDS)
def test_random_talks(family, load):
    template = load(family)
    alternating = family == "llama-2"

    @hypothesis.settings(max_examples=50)
    @hypothesis.given(talks, strategies.booleans())
    def check(turns, prompted):
        messages = []
        for question, answers in turns:
            messages.append({"role": "user", "content": "Q" + question + "Q"})
            answers = answers[:1] if alternating else answers
            messages += [{"role": "assistant", "content": "A" + answer} for answer in answers]
        if prompted and alternating:
            messages.append(USER)
        ids, mask = template.encode_with_mask(messages, add_generation_prompt=prompted)
        written = targets(template, messages, add_generation_prompt=prompted)
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        end = template.special_tokens["eos_token"]
        if family == "llama-2":
            assert written == [f" {text.strip()} {end}" for text in said]
        else:
            thought = "<think>\n\n</think>\n\n"
            assert [text.replace(thought, "") for text in written] == [text + end for text in said]
        for n, message in enumerate(messages):
            if message["role"] == "assistant":  # what is trained is what is served
                prompt = template.encode(messages[:n])
                if ids[: len(prompt)] == prompt:
                    assert mask[len(prompt)] == 1 and mask[len(prompt) - 1] == 0

    check()
