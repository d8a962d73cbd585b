"""Tokenizers: the one of a checkpoint, and one of plain bytes that needs no training."""

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(directory: str | Path) -> tokenizers.Tokenizer:
    """The tokenizer in ``tokenizer.json`` of a Hugging Face folder.

    Raises FileNotFoundError if there is none (older checkpoints have only ``tokenizer.model``), ValueError if
    it cannot be read.
    """
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; a fast tokenizer is needed: in transformers, "
            "AutoTokenizer.from_pretrained(directory).save_pretrained(directory) writes it"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer of UTF-8 bytes: id = byte, and 256 is the special token ``<|endoftext|>``.

    Every text comes back from its ids. ``tokenizer.save(path)`` writes a tokenizer.json that transformers
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
    # The marker written out in a document is text, not the end of a document. tokenizer.json cannot say so:
    # a tokenizer that was loaded again reads the marker as id 256, unless this is set there too.
    tokenizer.encode_special_tokens = True
    return tokenizer
