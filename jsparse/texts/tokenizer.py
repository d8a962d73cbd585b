"""Tokenizers: a checkpoint's, one of plain bytes that needs no training, and one trained on texts."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from jsparse.hub import model_folder

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(directory: str | Path) -> tokenizers.Tokenizer:
    """The tokenizer in ``tokenizer.json`` of a Hugging Face folder or id.

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
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


def plain_text_tokenizer(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that never truncates or pads, and that reads the names of special tokens as text."""
    plain = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    plain.encode_special_tokens = True
    return plain


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
