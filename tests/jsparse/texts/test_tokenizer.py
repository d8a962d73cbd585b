"""The byte tokenizer and tokenizer.json."""

import itertools
import json

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from jsparse.models import byte_tokenizer, load_tokenizer
from jsparse.serve.prompts import Prompt
from jsparse.texts.tokenizer import eos_token_id, prompt_ids

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


def test_padding_and_truncation_of_an_earlier_call_are_left_behind(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.enable_padding(length=24, pad_id=256, pad_token="<|endoftext|>")
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("hello").ids == list(b"hello")


def with_bos(tokenizer, bos="<|bos|>", end=""):
    tokenizer.encode_special_tokens = False
    tokenizer.add_special_tokens([bos, "<|eot|>"])
    special = [(bos, tokenizer.token_to_id(bos)), ("<|eot|>", tokenizer.token_to_id("<|eot|>"))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {end}".strip(), special_tokens=special
    )
    return tokenizer


@pytest.mark.parametrize("end", ["", "<|eot|>"])
def test_a_prompt_begins_once_and_does_not_end(end):
    tokenizer = with_bos(byte_tokenizer(), end=end)
    bos, eot = 257, 258
    assert prompt_ids(tokenizer, "hi") == [bos, 104, 105]
    assert prompt_ids(tokenizer, "<|bos|>hi<|eot|>") == [bos, 104, 105, eot]
    assert prompt_ids(tokenizer, "h<|bos|>i") == [bos, 104, bos, 105]
    assert prompt_ids(tokenizer, "<|bos|>") == [bos]
    assert prompt_ids(tokenizer, "") == [bos]
    assert prompt_ids(byte_tokenizer(), "") == []


def test_the_end_token_is_the_tokenizers(tmp_path):
    tokenizer = with_bos(byte_tokenizer())
    assert eos_token_id(tmp_path, tokenizer) is None
    (tmp_path / "special_tokens_map.json").write_text(
        '{"eos_token": {"content": "<|bos|>", "lstrip": false}}'
    )
    assert eos_token_id(tmp_path, tokenizer) == 257
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|eot|>"}')
    assert eos_token_id(tmp_path, tokenizer) == 258
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(ValueError, match="tokenizer_config.json: eos_token is '</s>'.*tokenizer.json"):
        eos_token_id(tmp_path, tokenizer)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="tokenizer_config.json must hold a JSON object"):
        eos_token_id(tmp_path, tokenizer)


def test_a_pointer_of_git_lfs(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 17209920\n"
    (tmp_path / "tokenizer.json").write_text(pointer)
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer: .*git lfs pull"):
        load_tokenizer(tmp_path)
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(pointer)
    with pytest.raises(ValueError, match="tokenizer_config.json cannot be read: .*git lfs pull"):
        load_tokenizer(tmp_path)


TEXTS = ["to be or not to be", "hello world  and two spaces", "12 é\n\n end"] * 20


def sentencepiece_like(normalizer, pre_tokenizer):
    """A tokenizer as SentencePiece's models are converted: byte fallback, and ▁ for spaces."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["id"] < 3]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(saved))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def byte_level():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return with_bos(tokenizer, "<s>")


KINDS = {
    "Llama 2": sentencepiece_like(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None
    ),
    "Mistral": sentencepiece_like(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "Llama 3": byte_level(),
}
SETTINGS = [
    {},
    {"add_bos_token": True},
    {"add_bos_token": False},
    {"add_eos_token": True},
    {"legacy": True},
    {"legacy": False},
    {"add_prefix_space": False},
]


@pytest.mark.parametrize(
    "declared", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", None]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_ids_are_those_of_transformers(tmp_path, model_type, kind, declared):
    transformers = pytest.importorskip("transformers", reason="needs transformers, from the extra `parity`")
    eos = "<|eot|>" if kind == "Llama 3" else "</s>"
    KINDS[kind].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for settings in SETTINGS:
        fields = {"bos_token": "<s>", "eos_token": eos, "unk_token": "<unk>"} | settings
        if kind == "Llama 3":
            del fields["unk_token"]
        if declared is not None:
            fields["tokenizer_class"] = declared
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        ours = load_tokenizer(tmp_path)
        for text in ("to be", f" to  be{eos}or not{eos} é\n 12", f"{eos}x", "<s>hello", ""):
            assert ours.encode(text).ids == theirs(text)["input_ids"], (settings, text)
        ids = ours.encode("hello world").ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), settings


def described(token):
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {flag: getattr(token, flag) for flag in flags}


NEW = [
    tokenizers.AddedToken("<|x|>", special=True, normalized=False),
    tokenizers.AddedToken("<tool>", special=False, normalized=False, lstrip=True),
    tokenizers.AddedToken("[Word]", special=False),
]


def settings_with(case, kind):
    """Of tokenizer_config.json and added_tokens.json, with more tokens than tokenizer.json has."""
    known = {id: described(token) for id, token in KINDS[kind].get_added_tokens_decoder().items()}
    size = KINDS[kind].get_vocab_size()
    new = {size + n: described(token) for n, token in enumerate(NEW)}
    if case == "added_tokens.json":
        return {}, {fields["content"]: id for id, fields in (known | new).items()}
    if case == "the new alone":
        return {"added_tokens_decoder": new}, {}
    if case == "other ids":
        return {"added_tokens_decoder": known | {id + 10: fields for id, fields in new.items()}}, {}
    if case == "other flags":
        changed = {id: fields | {"rstrip": True, "normalized": False} for id, fields in known.items()}
        return {"added_tokens_decoder": changed | new}, {}
    return {"added_tokens_decoder": known | new}, {}


CASES = ["all", "other ids", "added_tokens.json", "the new alone", "other flags", "named"]


# Of a Qwen2Tokenizer, transformers forgets the flags of special tokens, and tokens that the configuration
# does not list.
@pytest.mark.parametrize(
    "case, kind, declared",
    [
        *itertools.product(CASES, KINDS, ["PreTrainedTokenizerFast", "LlamaTokenizerFast"]),
        *itertools.product(CASES[:3], ["Llama 3"], ["Qwen2TokenizerFast"]),
    ],
)
def test_tokens_that_only_the_configuration_has(tmp_path, case, kind, declared):
    transformers = pytest.importorskip("transformers", reason="needs transformers, from the extra `parity`")
    eos = "<|eot|>" if kind == "Llama 3" else "</s>"
    fields, legacy = settings_with(case, kind)
    fields |= {"tokenizer_class": declared, "bos_token": "<s>", "eos_token": eos, "pad_token": eos}
    fields["unk_token"] = eos if kind == "Llama 3" else "<unk>"
    if case == "named":
        fields["tool_token"] = "<tool>"
    KINDS[kind].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    if legacy:
        (tmp_path / "added_tokens.json").write_text(json.dumps(legacy))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert ours.get_vocab() == theirs.get_vocab()
    for text in ("to be<|x|>or <tool> not", f"<|x|> hello {eos} x <s>", " [Word]s <tool>"):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize(
    "file, content, message",
    [
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"3": "<s>"}}',
            "tokenizer_config.json, added_tokens_decoder must map ids to tokens",
        ),
        ("added_tokens.json", '{"<s>": "3"}', "added_tokens.json must map tokens to ids"),
    ],
)
def test_added_tokens_that_cannot_be_read(file, content, message, tmp_path):
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_an_added_token_beyond_the_embeddings_is_refused_in_a_text(tmp_path):
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"257": {"content": "[PAD]"}}}')
    tokenizer = load_tokenizer(tmp_path)
    prompt = Prompt(text="a[PAD]", place="prompts: file, line 1")
    assert prompt.encode(tokenizer, None, vocab_size=258) == [97, 257]
    with pytest.raises(ValueError, match="line 1 has token id 257, but .* has 257 entries"):
        prompt.encode(tokenizer, None, vocab_size=257)
