"""The byte tokenizer and tokenizer.json."""

import hypothesis
import pytest
from hypothesis import strategies

from jsparse.models import byte_tokenizer, load_tokenizer

TOKENIZER = byte_tokenizer()


@hypothesis.given(strategies.text(strategies.characters(exclude_categories=["Cs"]), max_size=40))
@hypothesis.example("\x00\r\n\t <|endoftext|> ½日本🦀")
def test_ids_are_the_bytes_and_every_text_comes_back(text):
    ids = TOKENIZER.encode(text).ids
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_sizes_and_the_special_token():
    assert TOKENIZER.get_vocab_size() == 257
    assert TOKENIZER.token_to_id("<|endoftext|>") == 256
    assert TOKENIZER.decode([104, 105, 256]) == "hi"
    assert TOKENIZER.decode([104, 105, 256], skip_special_tokens=False) == "hi<|endoftext|>"
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(257))


def test_saved_and_loaded(tmp_path):
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.encode("naïve\n").ids == list("naïve\n".encode())
    assert loaded.decode(loaded.encode("naïve\n").ids) == "naïve\n"


def test_transformers_reads_it(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers, from the extra `parity`")
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs("naïve").input_ids == list("naïve".encode())
    assert theirs.decode(list("naïve".encode())) == "naïve"


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        load_tokenizer(tmp_path)
