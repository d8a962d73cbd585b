"""Tokenizers: a checkpoint's, one of plain bytes that needs no training, and one trained on texts."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from jsparse.files import pointer_hint, read_json_object
from jsparse.hub import model_folder
from jsparse.integers import is_integer

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(directory: str | Path) -> tokenizers.Tokenizer:
    """The tokenizer in ``tokenizer.json`` of a Hugging Face folder or id, as transformers 5 reads it.

    It never truncates or pads: a length that was saved in the file, as transformers does after a call with
    padding, belongs to that call. ``add_bos_token`` and ``add_eos_token`` of ``tokenizer_config.json`` say
    nothing beside a tokenizer.json, which has its own; ``legacy`` and ``add_prefix_space`` count for a
    ``LlamaTokenizer`` made by SentencePiece, but not for a Mistral model's. The tokens of
    ``added_tokens_decoder`` in that file, or without it of ``added_tokens.json``, that tokenizer.json lacks
    come after its own, in the order of their ids; of those that it has, they change the flags.

    Raises FileNotFoundError if there is none (older checkpoints have only ``tokenizer.model``), and
    ValueError if it cannot be read.
    """
    path = model_folder(directory) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; a fast tokenizer is needed: in transformers, "
            "AutoTokenizer.from_pretrained(directory).save_pretrained(directory) writes it"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        hint = pointer_hint(path.read_bytes())
        raise ValueError(f"{path} is not a tokenizer: {hint or error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = _settings(path.parent)
    declared = str(settings.get("tokenizer_class", "")).removesuffix("Fast")
    if declared == "LlamaTokenizer" and "ByteLevel" not in tokenizer.to_str():
        if _settings(path.parent, "config.json").get("model_type") != "mistral":
            _read_as_sentencepiece(tokenizer, settings)
    known = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    tokens = _added_tokens(path.parent, settings, tokenizer)
    tokenizer.add_tokens([token for token in tokens if repr(token) not in known])
    return tokenizer


def named_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The special tokens that a configuration names, those of a model's own included.

    >>> named_tokens({"eos_token": {"content": "</s>"}, "model_max_length": 4096})
    {'eos_token': '</s>'}
    """
    named = {key: value for key, value in settings.items() if key.endswith("_token")}
    if isinstance(settings.get("extra_special_tokens"), dict):
        named |= settings["extra_special_tokens"]
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _added_tokens(
    directory: Path, settings: dict[str, Any], tokenizer: tokenizers.Tokenizer
) -> list[AddedToken]:
    """The tokens of the files beside tokenizer.json, by their ids."""
    if "added_tokens_decoder" not in settings:  # older checkpoints
        return _tokens_of_older(directory, settings, tokenizer)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        entries = sorted((int(id), entry) for id, entry in settings["added_tokens_decoder"].items())
        tokens = [
            AddedToken(entry["content"], **{flag: entry[flag] for flag in flags if flag in entry})
            for _, entry in entries
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{directory / 'tokenizer_config.json'}, added_tokens_decoder must map ids to tokens with "
            "`content` and flags"
        ) from error
    named = set(named_tokens(settings).values())
    for token in tokens:
        token.special = token.special or token.content in named
    return tokens


def _tokens_of_older(
    directory: Path, settings: dict[str, Any], tokenizer: tokenizers.Tokenizer
) -> list[AddedToken]:
    """Those of ``added_tokens.json``, which has no flags; ids that tokenizer.json gives are its own."""
    settings = settings | _settings(directory, "special_tokens_map.json")
    listed = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    special = {*named_tokens(settings).values(), *(token for token in listed if isinstance(token, str))}
    own = tokenizer.get_added_tokens_decoder()
    ids = _settings(directory, "added_tokens.json")
    if not all(is_integer(id) for id in ids.values()):
        raise ValueError(f"{directory / 'added_tokens.json'} must map tokens to ids")
    contents = [content for content, id in sorted(ids.items(), key=lambda item: item[1]) if id not in own]
    return [AddedToken(one, special=one in special, normalized=one not in special) for one in contents]


def _settings(directory: Path, name: str = "tokenizer_config.json") -> dict[str, Any]:
    """The fields of a file beside tokenizer.json; none if there is no such file."""
    path = directory / name
    return read_json_object(path) if path.is_file() else {}


def _read_as_sentencepiece(tokenizer: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
    """Put a space before a text, or before each of its parts between special tokens if ``legacy`` is true.

    transformers' LlamaTokenizer does this, whatever tokenizer.json says of spaces.
    """
    prefix = settings.get("add_prefix_space")
    scheme = "always" if settings.get("legacy", False) else "first"
    tokenizer.normalizer = None  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="never" if prefix is False else scheme, split=False
    )
    strip = [] if prefix is False else [decoders.Strip(content=" ", left=1)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def prompt_ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """The tokens of a text that a model is to continue.

    Special tokens written in the text are those tokens. Before the text stands what the tokenizer puts there
    (Llama's begin-of-sequence token), but once: a text that begins with it, as rendered chat templates do,
    gets no second one. What it puts after a text is left out.

    >>> prompt_ids(byte_tokenizer(), "hi")
    [104, 105]
    """
    return started(start_ids(tokenizer), tokenizer.encode(text, add_special_tokens=False).ids)


def start_ids(tokenizer: tokenizers.Tokenizer) -> list[int]:
    """What the tokenizer puts before every text by itself.

    >>> start_ids(byte_tokenizer())
    []
    """
    some = tokenizer.encode("a")
    return list(itertools.compress(some.ids, itertools.takewhile(bool, some.special_tokens_mask)))


def started(start: list[int], ids: list[int]) -> list[int]:
    """The tokens of a text with ``start`` before them, once.

    >>> started([1], [1, 7]), started([1], [7])
    ([1, 7], [1, 7])
    """
    return ids if ids[: len(start)] == start else start + ids


def eos_token_id(directory: str | Path, tokenizer: tokenizers.Tokenizer) -> int | None:
    """The id of ``eos_token`` in ``tokenizer_config.json`` or ``special_tokens_map.json``, or None.

    It ends a text in training. A model may stop at more tokens than that: Llama 3 Instruct also lists the
    base model's end token, and first.

    Raises ValueError for a token that the tokenizer does not have.
    """
    directory = model_folder(directory)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _settings(directory, name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            continue
        token_id = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if token_id is None:
            raise ValueError(
                f"{directory / name}: eos_token is {token!r}, which tokenizer.json does not have"
            )
        return token_id
    return None


def plain_text_tokenizer(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that never truncates or pads, and that reads the names of special tokens as text."""
    plain = whole_text_tokenizer(tokenizer)
    plain.encode_special_tokens = True
    return plain


def whole_text_tokenizer(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that never truncates or pads."""
    whole = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    whole.encode_special_tokens = tokenizer.encode_special_tokens  # which a text of it does not say
    whole.no_truncation()
    whole.no_padding()
    return whole


def text_encoder(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> Callable[[str], list[int]]:
    """A function from text to all its tokens, without special ones. ValueError for ids >= ``vocab_size``."""
    plain = plain_text_tokenizer(tokenizer)

    def encode(text: str) -> list[int]:
        ids = plain.encode(text, add_special_tokens=False).ids
        if max(ids, default=0) >= vocab_size:
            raise ValueError(
                f"tokenizer gives token id {max(ids)}, but the model's vocabulary has {vocab_size} entries: "
                "it is not this model's"
            )
        return ids

    return encode


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer of UTF-8 bytes: id = byte, and 256 is the special token ``<|endoftext|>``.

    Every text can be decoded from its ids. ``tokenizer.save(path)`` writes a tokenizer.json that transformers
    reads.

    >>> tokenizer = byte_tokenizer()
    >>> tokenizer.encode("né").ids
    [110, 195, 169]
    >>> tokenizer.decode([110, 195, 169])
    'né'
    """
    # ByteLevel writes each byte as one printable character: itself, or the next free one from 256 on.
    printable = {ord(character) for character in pre_tokenizers.ByteLevel.alphabet() if ord(character) < 256}
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=characters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    # The marker written out in a document is text, not the end of a document. tokenizer.json cannot say so: a
    # tokenizer that is loaded from it reads the marker as id 256, unless this is set again.
    tokenizer.encode_special_tokens = True
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, words: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer (as GPT-2's) of ``vocab_size`` tokens, trained on ``texts``.

    Each digit is a token, as is each of ``words`` with the space before it, and the special token
    ``<|endoftext|>``. Every text can be decoded from its ids.

    Raises ValueError for a vocabulary that has no room for the 256 bytes and the words.

    >>> tokenizer = train_tokenizer(["to be or not to be"], 262, words=["question"])
    >>> tokenizer.encode("the question 12").tokens
    ['t', 'h', 'e', ' question', 'Ġ', '1', '2']
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(words) + 1
    if vocab_size < least:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {least}: {len(alphabet)} bytes, {len(words)} words "
            "and a special token"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(words) - 1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.add_tokens([AddedToken(f" {word}", normalized=False) for word in words])
    tokenizer.encode_special_tokens = True  # as in byte_tokenizer
    return tokenizer
