"""What stands in the files, and which tokens it becomes."""

import gzip
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jsparse.models import byte_tokenizer
from jsparse.serve.prompts import read_conversation
from jsparse.texts import documents
from jsparse.texts.chat_template import load_chat_template
from jsparse.texts.documents import read_documents, read_samples
from jsparse.texts.findings import Findings, Problems
from jsparse.texts.reading import Reading
from jsparse.texts.tokenizer import load_tokenizer, prompt_ids

END = 256
TALK = [{"role": "user", "content": "a" * 900}, {"role": "assistant", "content": "b" * 100}]


def read(*files, tokenizer=None, eos_token_id: int | None = END, vocab_size=257):
    tokenizer = tokenizer or byte_tokenizer()
    return read_documents(files, tokenizer, eos_token_id=eos_token_id, vocab_size=vocab_size)


def samples(*files, tokenizer=None, eos_token_id: int | None = END, vocab_size=257):
    tokenizer = tokenizer or byte_tokenizer()
    return list(read_samples(files, tokenizer, eos_token_id=eos_token_id, vocab_size=vocab_size))


def lines(file, *objects):
    file.write_text("".join(json.dumps(fields) + "\n" for fields in objects), encoding="utf-8")
    return file


def word_tokenizer(**special):
    """Words of a small vocabulary; ``special`` are the ids of its start and end tokens, which it adds."""
    words = {"<s>": 0, "</s>": 1, "?": 2, "add": 3, "one": 4, "two": 5, "three": 6, "big": 120_000}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if special:
        template = " ".join(["<s>"] * ("start" in special) + ["$A"] + ["</s>"] * ("end" in special))
        pairs = [("<s>", 0), ("</s>", 1)]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(template, special_tokens=pairs)
    return tokenizer


def test_a_document_is_its_text_and_the_end_token(tmp_path):
    (tmp_path / "a").write_bytes("né\r\n".encode())
    (document,) = read(tmp_path / "a")
    assert document.tolist() == [*"né\r\n".encode(), END] and document.dtype == np.int32
    assert read(tmp_path / "a", eos_token_id=None)[0].tolist() == [*"né\r\n".encode()]


def test_a_text_has_the_tokens_that_it_has_as_a_prompt(tmp_path):
    text = "a<|endoftext|>b"
    (tmp_path / "a").write_text(text)
    tokenizer = byte_tokenizer()
    tokenizer.encode_special_tokens = False  # as every tokenizer that is loaded
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=40)
    assert read(tmp_path / "a", tokenizer=tokenizer)[0].tolist() == [*b"a", END, *b"b", END]
    assert len(tokenizer.encode("abcdefgh").ids) == 40  # the caller's tokenizer is as it was
    tokenizer.encode_special_tokens = True
    assert read(tmp_path / "a", tokenizer=tokenizer)[0].tolist() == [*text.encode(), END]


@given(
    texts=st.lists(st.sampled_from(["one", " two", "<s>", "</s>", "\n", "zwei"]), min_size=1, max_size=6),
    start=st.booleans(),
)
@settings(max_examples=40)
def test_prompts_and_texts_have_the_tokens_that_generate_gives_them(tmp_path_factory, texts, start):
    text = "one" + "".join(texts)
    tokenizer = word_tokenizer(**({"start": 0} if start else {}))
    file = lines(
        tmp_path_factory.mktemp("any") / "a.jsonl", {"text": text}, {"prompt": text, "completion": "two"}
    )
    document, completion = samples(file, tokenizer=tokenizer, eos_token_id=1, vocab_size=200_000)
    served = prompt_ids(tokenizer, text)
    assert document.tokens.tolist() == (served if served[-1] == 1 else [*served, 1])
    assert completion.tokens[: completion.prompt_tokens].tolist() == served


def test_ids_beyond_16_bits(tmp_path):
    (tmp_path / "a").write_text("big big")
    words = word_tokenizer()
    (document,) = read(tmp_path / "a", tokenizer=words, eos_token_id=None, vocab_size=150_000)
    assert document.tolist() == [120_000, 120_000]
    with pytest.raises(ValueError, match="a has token id 120000, .* 257 entries: the tokenizer is not"):
        read(tmp_path / "a", tokenizer=words)
    with pytest.raises(ValueError, match="eos_token_id=300 must be .* vocab_size=257"):
        read(tmp_path / "a", eos_token_id=300)


def test_json_lines_are_documents_whatever_their_file_is_called(tmp_path):
    file = lines(tmp_path / "a.JSONL", {"text": "né\n"}, {"text": "b "})
    (tmp_path / "b.json").write_text('{"text": "c"}')
    found = [document.tolist() for document in read(file, tmp_path / "b.json")]
    assert found == [[*"né\n".encode(), END], [*b"b ", END], [*b"c", END]]


@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1
    ),
    characters=st.integers(1, 20),
)
@settings(max_examples=30)
def test_any_text_comes_back_whatever_is_tokenised_at_a_time(tmp_path_factory, texts, characters):
    file = lines(tmp_path_factory.mktemp("any") / "a.jsonl", *({"text": text} for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_BATCH_CHARACTERS", characters)
        found = samples(file)
    assert [bytes(sample.tokens[:-1].astype(np.uint8)).decode() for sample in found] == texts
    assert [sample.place for sample in found] == [f"{file}, line {n + 1}" for n in range(len(texts))]
    assert sum(sample.size for sample in found) == file.stat().st_size


def test_prompts_with_completions_by_hand(tmp_path):
    file = lines(
        tmp_path / "a.jsonl",
        {"prompt": "add one two", "completion": "three"},
        {"text": "one two"},
        {"completion": "two three", "prompt": "one"},
    )
    words = word_tokenizer(start=0)
    found = samples(file, tokenizer=words, eos_token_id=1, vocab_size=200_000)
    assert [sample.tokens.tolist() for sample in found] == [[0, 3, 4, 5, 6, 1], [0, 4, 5, 1], [0, 4, 5, 6, 1]]
    assert [sample.prompt_tokens for sample in found] == [4, None, 2]
    without_end = samples(file, tokenizer=words, eos_token_id=None, vocab_size=200_000)
    assert without_end[0].tokens.tolist() == [0, 3, 4, 5, 6]


def test_a_tokenizer_that_adds_the_end_itself_does_not_part_prompt_and_completion(tmp_path):
    file = lines(tmp_path / "a.jsonl", {"prompt": "one", "completion": "two </s>"}, {"text": "one"})
    words = word_tokenizer(start=0, end=1)
    found = [
        sample.tokens.tolist()
        for sample in samples(file, tokenizer=words, eos_token_id=1, vocab_size=200_000)
    ]
    assert found == [[0, 4, 5, 1], [0, 4, 1]]  # and "</s>" that is written out is the end, once


def test_instructions_of_a_base_model_have_the_plain_form(tmp_path):
    file = lines(
        tmp_path / "a.jsonl",
        {"instruction": "Sum up.", "output": "Ok"},
        {"instruction": "Sum up.", "input": "A\nbook", "output": "Ok", "file": "a.pdf"},
        {"instruction": "Sum up.", "input": "", "output": ""},
    )
    found = Findings()
    settings = {"eos_token_id": END, "vocab_size": 257, "findings": found}
    heads = ["### Instruction:\nSum up.\n\n", "### Instruction:\nSum up.\n\n### Input:\nA\nbook\n\n"]
    answers = [b"Ok", b"Ok", b""]
    for sample, head, answer in zip(
        read_samples([file], byte_tokenizer(), **settings), [*heads, heads[0]], answers, strict=True
    ):
        prompt = f"{head}### Response:\n".encode()
        assert sample.tokens.tolist() == [*prompt, *answer, END]
        assert sample.prompt_tokens == len(prompt)
    assert found.form == "plain" and found.ignored == {"file": 1}
    assert (found.samples, found.targets) == (3, 3 + 3 + 1)
    assert found.example == f"{heads[0]}### Response:\n⟦Ok<|endoftext|>⟧"


@pytest.mark.parametrize("fields", [{"text": "a" * 1000}, {"messages": TALK}])
@pytest.mark.parametrize("kind", ["Parquet", "gzip"])
def test_compressed_rows_are_held_by_their_text(tmp_path, fields, kind, monkeypatch):
    rows, file = [fields] * 300, tmp_path / "a.jsonl"
    if kind == "Parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert file.stat().st_size < 5_000
    held, encode = [], documents._Encoder.samples

    def noted(self, batch, findings):
        held.append(len(batch))
        return encode(self, batch, findings)

    monkeypatch.setattr(documents, "_BATCH_CHARACTERS", 20_000)
    monkeypatch.setattr(documents._Encoder, "samples", noted)
    assert len(samples(file)) == 300 and held == [20] * 15


def test_loss_on_all(tmp_path):
    file = lines(tmp_path / "a.jsonl", {"prompt": "ab", "completion": "c"})
    (sample,) = read_samples(
        [file], byte_tokenizer(), eos_token_id=END, vocab_size=257, reading=Reading(loss_on="all")
    )
    assert sample.scored is not None and sample.scored.tolist() == [True] * 4 and sample.targets == 3


def test_loss_on_all_needs_no_turns_of_the_assistant(tmp_path, save_chat_model):
    save_chat_model(tmp_path / "model", "{{ messages | tojson }}<e>", ["<s>", "<e>"])
    chat, tokenizer = load_chat_template(tmp_path / "model"), load_tokenizer(tmp_path / "model")
    settings = {"eos_token_id": None, "vocab_size": tokenizer.get_vocab_size(), "chat_template": chat}
    file = lines(tmp_path / "a.jsonl", {"messages": TALK})
    with pytest.raises(ValueError, match="line 1: .* cannot be told"):
        list(read_samples([file], tokenizer, **settings))
    (sample,) = read_samples([file], tokenizer, **settings, reading=Reading(loss_on="all"))
    assert sample.tokens.tolist() == chat.encode(TALK, add_generation_prompt=False)
    assert sample.targets == len(sample.tokens) - 1


def test_evaluation_takes_documents_only(tmp_path):
    file = lines(tmp_path / "a.jsonl", {"text": "a"}, {"prompt": "a", "completion": "b"})
    with pytest.raises(ValueError, match="a.jsonl, line 2 is a prompt .* for fine-tuning"):
        read(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"line 2 is not valid JSON \("),
        (b'{"text": "a", "text": "b"}', r"line 2 is not valid JSON \(a field stands there twice\)"),
        (b'{"text": "\xff"}', "line 2 is not UTF-8 text: byte 0xff at offset 10"),
        (b'["a"]', "line 2 is no JSON object"),
        (b"{}", r"line 2 has the fields \[\]; a row must be"),
        (b'{"text": 5}', 'line 2: "text" must be a string, not 5'),
    ],
)
def test_bad_lines_are_named_and_can_be_left_out(tmp_path, line, message):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "good"}\r\n' + line + b'\n\n{"text": "too"}\n')
    with pytest.raises(ValueError, match=f"data: .*a.jsonl, {message}"):
        samples(file)
    found = Findings()
    skipping = {"reading": Reading(bad_rows="skip"), "findings": found}
    kept = list(read_samples([file], byte_tokenizer(), eos_token_id=None, vocab_size=257, **skipping))
    assert [bytes(sample.tokens.tolist()) for sample in kept] == [b"good", b"too"]
    assert found.bad.count == 1 and "line 2" in str(found.bad)


def test_all_bad_rows_are_named_up_to_a_limit(tmp_path):
    file = lines(
        tmp_path / "a.jsonl", {"text": "good"}, {"text": 1}, {"text": "good"}, {"text": 2}, {"x": "y"}
    )
    with pytest.raises(ValueError) as error:
        samples(file)
    assert all(f"line {n}" in str(error.value) for n in (2, 4, 5)) and "data: 3 bad rows" in str(error.value)
    file = lines(tmp_path / "b.jsonl", *[{"text": 1}] * 30, {"text": "good"})
    with pytest.raises(ValueError, match="data: at least 20 bad rows") as error:
        samples(file)
    assert "b.jsonl, line 1:" in str(error.value) and "(and so line 2, line 3," in str(error.value)
    assert "line 20)" in str(error.value) and "line 21" not in str(error.value)
    found = Findings()
    skipping = {"reading": Reading(bad_rows="skip"), "findings": found}
    assert (
        len(list(read_samples([file], byte_tokenizer(), eos_token_id=None, vocab_size=257, **skipping))) == 1
    )
    assert found.bad.count == 30 and "and 10 more" in str(found.bad)


def test_findings_survive_their_file(tmp_path):
    file = lines(
        tmp_path / "a.jsonl", {"text": "a", "id": 1, "meta": {}}, {"text": "b", "id": 2}, {"text": 1}
    )
    found = Findings()
    skipping = {"reading": Reading(bad_rows="skip"), "findings": found}
    list(read_samples([file], byte_tokenizer(), eos_token_id=None, vocab_size=257, **skipping))
    assert found.lines()[0].endswith("a.jsonl: JSON lines, 2 documents")
    stored = Findings.from_json(json.loads(json.dumps(found.to_json())))
    assert stored.ignored == {"id": 2, "meta": 1}
    assert (
        stored.lines() == found.lines()
        and "fields not read, with their rows: id (2), meta (1)" in stored.lines()
    )


def test_places_are_told_with_their_files_where_these_change():
    problems = Problems()
    for place in ("a, b.jsonl, line 1", "a, b.jsonl, line 2", "c.jsonl, line 3", "c.jsonl, line 4", "d.txt"):
        problems.add(place, " is bad")
    assert str(problems) == "a, b.jsonl, line 1 is bad (and so line 2, c.jsonl, line 3, line 4, d.txt)"


def test_samples_without_tokens_are_named(tmp_path):
    words = word_tokenizer(start=0)
    words.normalizer = tokenizers.normalizers.Replace("one", " ")  # after which nothing is left
    for fields, end, message in [
        ({"prompt": "one", "completion": "two"}, 1, "line 1: the prompt has no tokens"),
        ({"prompt": "two", "completion": "one"}, None, "line 1: the completion has no tokens"),
    ]:
        file = lines(tmp_path / "a.jsonl", fields)
        with pytest.raises(ValueError, match=message):
            samples(file, tokenizer=words, eos_token_id=end, vocab_size=200_000)
    (sample,) = samples(file, tokenizer=words, eos_token_id=1, vocab_size=200_000)
    assert sample.tokens.tolist() == [0, 5, 1]  # an empty answer is its end
    words.post_processor = tokenizers.processors.ByteLevel()
    file = lines(tmp_path / "a.jsonl", {"text": "one"})
    with pytest.raises(ValueError, match="line 1 has no tokens"):
        samples(file, tokenizer=words, eos_token_id=None, vocab_size=200_000)


def test_a_table_gives_messages_and_tools_no_nulls_and_json_keeps_its_own(tmp_path, save_chat_model):
    """As ``generate --messages`` reads the same JSON; a table has nulls for what other rows have."""
    pyarrow = pytest.importorskip("pyarrow")
    template = (
        "{% for t in tools %}{{ t | tojson }}{% endfor %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    )
    template += "{{ m.tool_calls | tojson if m.tool_calls }}<e>{% endfor %}"
    chat = load_chat_template(save_chat_model(tmp_path / "model", template, ["<s>", "<e>"]))
    tokenizer = load_tokenizer(tmp_path / "model")

    def talk(**arguments):
        tools = [{"name": "f", "parameters": arguments}, {"name": "g"}]
        call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}]}
        return {"messages": [{"role": "user", "content": "hi"}, call], "tools": tools}

    rows = [talk(x="1"), talk(y="2")]
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet"
    )
    nulls = [talk(x="1", y=None)]
    for file, content in [
        (tmp_path / "a.parquet", rows),
        (lines(tmp_path / "a.jsonl", *rows), rows),
        (lines(tmp_path / "b.jsonl", *nulls), nulls),
    ]:
        found = read_samples(
            [file], tokenizer, eos_token_id=None, vocab_size=tokenizer.get_vocab_size(), chat_template=chat
        )
        for sample, row in zip(found, content, strict=True):
            assert sample.tokens.tolist() == chat.encode(
                row["messages"], tools=row["tools"], add_generation_prompt=False
            )


def test_arguments_of_calls_are_trained_as_they_are_served(tmp_path, save_chat_model):
    """Whether OpenAI's API has written them as a text or not."""
    tokens = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    chat = load_chat_template(save_chat_model(tmp_path / "model", "qwen2.5", tokens))
    tokenizer = load_tokenizer(tmp_path / "model")

    def talk(arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}]

    served, answer = [], {"role": "assistant", "content": "done"}
    rows = [{"messages": [*talk(arguments), answer]} for arguments in ({"a": [1]}, '{"a":[1]}')]
    for row in rows:
        (tmp_path / "talk.json").write_text(json.dumps(row["messages"][:-1]))
        prompt = read_conversation(tmp_path / "talk.json")
        served.append(prompt.encode(tokenizer, chat, tokenizer.get_vocab_size()))
    found = read_samples(
        [lines(tmp_path / "a.jsonl", *rows)],
        tokenizer,
        eos_token_id=None,
        vocab_size=tokenizer.get_vocab_size(),
        chat_template=chat,
    )
    (one, two), (prompt, other) = [sample.tokens.tolist() for sample in found], served
    assert one == two and prompt == other and one[: len(prompt)] == prompt
    assert '"arguments": {"a": [1]}' in tokenizer.decode(one)


def test_what_is_nested_too_deep_is_a_bad_row(tmp_path):
    for name, depth in [("content", 120), ("content", 3000), ("tools", 50_000)]:
        deep = "[" * depth + "]" * depth
        row = {"messages": TALK, "tools": deep} if name == "tools" else {"messages": TALK[1:] + TALK[:1]}
        text = json.dumps(row).replace(json.dumps(TALK[0]["content"]), deep if name == "content" else '"a"')
        file = tmp_path / "a.jsonl"
        file.write_text(text)
        with pytest.raises(ValueError, match=r"data: .*a.jsonl,? "):
            samples(file)


def test_a_list_that_a_template_writes_as_python_does_is_a_bad_row(tmp_path, save_chat_model):
    """As many do that expect a text; users would train on brackets and quotes."""
    texts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "user"}]
    talk = [{"role": "user", "content": texts}, {"role": "assistant", "content": "Yes"}]
    file = lines(tmp_path / "talks.jsonl", {"messages": talk})
    header = "{% for m in messages %}{{ m.role }}: "
    footer = "<e>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    as_python = header + "{{ m.content | trim }}" + footer
    as_texts = (
        header
        + "{% if m.content is string %}{{ m.content }}{% else %}"
        + "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
        + footer
    )

    def read_with(template):
        folder = save_chat_model(tmp_path / "model", template, ["<s>", "<e>"])
        settings = {"eos_token_id": None, "vocab_size": 1000, "chat_template": load_chat_template(folder)}
        return load_tokenizer(folder), list(read_samples([file], load_tokenizer(folder), **settings))

    with pytest.raises(
        ValueError, match=r"line 1: messages\[0\].content is a list, which the template writes"
    ):
        read_with(as_python)
    tokenizer, (sample,) = read_with(as_texts)
    assert (
        tokenizer.decode(sample.tokens.tolist(), skip_special_tokens=False)
        == "user: Hellouser<e>assistant: Yes<e>"
    )
    quoted = lines(tmp_path / "talks.jsonl", {"messages": [talk[0] | {"content": ['say "é"']}, talk[1]]})
    assert quoted == file and read_with(header + "{{ m.content[0] | tojson }}" + footer)
    lines(file, {"messages": talk})
    without_lists = header + "{{ m.content if m.content is string else '' }}" + footer  # as Qwen3's
    with pytest.raises(
        ValueError, match=r"line 1: messages\[0\].content is a list, which the template does not write; give"
    ):
        read_with(without_lists)
