"""What stands in the files, and which tokens it becomes."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jsparse.models import byte_tokenizer
from jsparse.texts import documents
from jsparse.texts.documents import read_documents, read_samples

END = 256


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


def test_text_cannot_forge_the_end_of_a_document_nor_be_truncated(tmp_path):
    text = "a<|endoftext|>b"
    (tmp_path / "a").write_text(text)
    tokenizer = byte_tokenizer()
    tokenizer.encode_special_tokens = False
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=40)
    assert read(tmp_path / "a", tokenizer=tokenizer)[0].tolist() == [*text.encode(), END]
    assert len(tokenizer.encode("abcdefgh").ids) == 40  # the caller's tokenizer is as it was


def test_ids_beyond_16_bits(tmp_path):
    (tmp_path / "a").write_text("big big")
    words = word_tokenizer()
    (document,) = read(tmp_path / "a", tokenizer=words, eos_token_id=None, vocab_size=150_000)
    assert document.tolist() == [120_000, 120_000]
    with pytest.raises(ValueError, match="a has token id 120000, .* 257 entries: the tokenizer is not"):
        read(tmp_path / "a", tokenizer=words)
    with pytest.raises(ValueError, match="eos_token_id=300 must be .* vocab_size=257"):
        read(tmp_path / "a", eos_token_id=300)


def test_json_lines_are_documents_too(tmp_path):
    file = lines(tmp_path / "a.JSONL", {"text": "né\n"}, {"text": "b "})
    (tmp_path / "b.json").write_text('{"text": "c"}')  # one text, for its name does not say lines
    found = [document.tolist() for document in read(file, tmp_path / "b.json")]
    assert found == [[*"né\n".encode(), END], [*b"b ", END], [*b'{"text": "c"}', END]]


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
    # "</s>" that is written out is three unknown words, not the end.
    assert found == [[0, 4, 5, 2, 2, 2, 1], [0, 4, 1]]


def test_instructions_are_longlora_prompts(tmp_path):
    file = lines(
        tmp_path / "a.jsonl",
        {"instruction": "Sum up.", "output": "Ok"},
        {"instruction": "Sum up.", "input": "", "output": "Ok"},
        {"instruction": "Sum up.", "input": "A\nbook", "output": "Ok"},
    )
    prompts = ["[INST]Sum up.[/INST]", "[INST]Sum up.[/INST]", "[INST]Sum up.\nA\nbook[/INST]"]
    for sample, prompt in zip(samples(file), prompts, strict=True):
        assert sample.tokens.tolist() == [*prompt.encode(), *b"Ok", END]
        assert sample.prompt_tokens == len(prompt)


def test_evaluation_takes_documents_only(tmp_path):
    file = lines(tmp_path / "a.jsonl", {"text": "a"}, {"prompt": "a", "completion": "b"})
    with pytest.raises(ValueError, match="a.jsonl, line 2 is a prompt .* for fine-tuning"):
        read(file)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "bad.txt does not exist"),
        ("directory", ValueError, "bad.txt is a directory"),
        (b"", ValueError, "bad.txt is empty"),
        (b" \n ", ValueError, "bad.txt is empty"),
        (b"good \xff\xfe", ValueError, "bad.txt is not UTF-8 text: byte 0xff at offset 5"),
    ],
)
def test_bad_files_are_named(tmp_path, content, error, message):
    (tmp_path / "good.txt").write_text("good")
    bad = tmp_path / "bad.txt"
    if content == "directory":
        bad.mkdir()
    elif content is not None:
        bad.write_bytes(content)
    with pytest.raises(error, match=message):
        read(tmp_path / "good.txt", bad)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", r"is not valid JSON \(Expecting value at character 0\); a line must be .*completion"),
        (b'{"text": "a"', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"text": "a", "text": "b"}', r"is not valid JSON \(a field stands there twice\)"),
        (b'{"text": "\xff"}', "is not UTF-8 text: byte 0xff at offset 10"),
        (b'["a"]', "is no JSON object; a line must be"),
        (b"{}", r"has the fields \[\]; a line must be"),
        (b'{"text": "a", "url": "b"}', r"has the fields \['text', 'url'\]; .* no other field"),
        (b'{"prompt": "a"}', r"has the fields \['prompt'\]"),
        (b'{"instruction": "a", "input": "b"}', r"has the fields \['input', 'instruction'\]"),
        (b'{"prompt": "a", "completion": "b", "input": "c"}', "has the fields"),
        (b'{"text": 5}', '"text" must be a string, not 5'),
        (b'{"instruction": "a", "input": null, "output": "b"}', '"input" must be a string, not null'),
        (b'{"text": " "}', """"text" is ' '; it must hold some text"""),
        (b'{"prompt": "a", "completion": ""}', """"completion" is ''; it must"""),
        (b'{"prompt": "\\n", "completion": "a"}', '"prompt" is .*; it must'),
        (b'{"instruction": "a", "input": " ", "output": "b"}', """"input" is ' '; it must"""),
        (b'{"text": "\\ud800"}', r""""text" holds '\\ud800', which is not Unicode"""),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(ValueError, match=f"data: .*a.jsonl, line 2.*{message}"):
        samples(tmp_path / "a.jsonl")


def test_samples_without_tokens_are_named(tmp_path):
    words = word_tokenizer(start=0)
    words.normalizer = tokenizers.normalizers.Replace("one", " ")  # after which nothing is left
    for fields, message in [
        ({"prompt": "one", "completion": "two"}, "line 1: the prompt has no tokens"),
        ({"prompt": "two", "completion": "one"}, "line 1: the completion has no tokens"),
    ]:
        file = lines(tmp_path / "a.jsonl", fields)
        with pytest.raises(ValueError, match=message):
            samples(file, tokenizer=words, eos_token_id=1, vocab_size=200_000)
    words.post_processor = tokenizers.processors.ByteLevel()
    file = lines(tmp_path / "a.jsonl", {"text": "one"})
    with pytest.raises(ValueError, match="line 1 has no tokens"):
        samples(file, tokenizer=words, eos_token_id=None, vocab_size=200_000)
