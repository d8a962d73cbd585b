"""Files to tokens: text files and JSON lines; documents to pre-train on, and prompts with completions."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32
from tokenizers import Encoding, Tokenizer

from jsparse.texts.tokenizer import plain_text_tokenizer

_BATCH_CHARACTERS = 1 << 18  # tokenised at a time, on all cores; a batch is longer only if one record is
_ALLOWED = (
    'a line must be {"text": ...}, {"prompt": ..., "completion": ...} or '
    '{"instruction": ..., "input": ... (may be left out), "output": ...}, and have no other field'
)
_SHAPES = (
    {"text"},
    {"prompt", "completion"},
    {"instruction", "output"},
    {"instruction", "input", "output"},
)


class Sample(NamedTuple):
    """The tokens of one document, or of one prompt and its completion.

    - tokens: int32 [T].
    - prompt_tokens: how many of the first tokens are the prompt's, which are no targets; None for a document,
      which may be cut anywhere and where all tokens count.
    - place: file and line, for errors.
    - size: the bytes it took in its file.
    """

    tokens: Int32[np.ndarray, " T"]
    prompt_tokens: int | None
    place: str
    size: int


class _Record(NamedTuple):
    """A record of a file: a document's text, or a completion with the prompt before it."""

    prompt: str | None
    text: str
    place: str
    size: int


def check_files(files: Sequence[str | Path]) -> None:
    """Raises an error for the first of ``files`` that is missing or a directory, without reading any."""
    for file in map(Path, files):
        if file.is_dir():
            raise ValueError(f"data: {file} is a directory; name the files themselves")
        if not file.is_file():
            raise FileNotFoundError(f"data: {file} does not exist")


def is_json_lines(file: str | Path) -> bool:
    """Whether a file is read line by line, as JSON. Any other file is UTF-8 text and one document."""
    return Path(file).suffix.lower() == ".jsonl"


def read_documents(
    files: Sequence[str | Path], tokenizer: Tokenizer, *, eos_token_id: int | None, vocab_size: int
) -> list[Int32[np.ndarray, " _"]]:
    """Tokens of every document, in memory: one int32 array each, with the end-of-sequence token last.

    A document is a UTF-8 text file, or a line ``{"text": ...}`` of a ``.jsonl`` file. The rest is as in
    ``read_samples``, but a prompt with a completion, which is for fine-tuning, raises ValueError.
    """
    records = map(_require_document, _read_files(files))
    samples = _tokenise(records, tokenizer, eos_token_id=eos_token_id, vocab_size=vocab_size)
    return [sample.tokens for sample in samples]


def read_samples(
    files: Sequence[str | Path], tokenizer: Tokenizer, *, eos_token_id: int | None, vocab_size: int
) -> Iterator[Sample]:
    """Tokens of every document, and of every prompt with its completion, in the order of the files.

    A ``.jsonl`` file has one JSON object per line, which is one of

    - ``{"text": str}``: a document;
    - ``{"prompt": str, "completion": str}``: the completion's tokens are scored, the prompt's are not;
    - ``{"instruction": str, "input": str, "output": str}``: the same, with the prompt
      ``[INST]{instruction}[/INST]`` (LongLoRA, supervised-fine-tune.py). ``input`` may be left out; unless it
      is empty, it follows the instruction on a line of its own.

    Any other file is UTF-8 text, and one document. Line ends are kept as they are.

    Each sample ends with the end-of-sequence token, which is scored; with ``eos_token_id=None`` there is
    none. It begins with what the tokenizer adds by itself (Llama's begin-of-sequence token). Prompt and
    completion are tokenised separately, so the prompt has the same tokens as when the model is served. Text
    is read as text: a literal ``<|endoftext|>`` does not become the special token, and a truncation length
    saved in tokenizer.json is not applied.

    Lines are read as they are needed, and 262,144 characters of them, or one line, are held at a time. A text
    file is read whole, because a tokenizer may merge across any place where it could be cut. For one of 20
    MB, tokenizers 0.23 took 2.5 GB of memory. Give larger texts as JSON lines.

    Raises FileNotFoundError for a file that is missing. Raises ValueError, naming file and line when it comes
    to them, for what is a directory, not UTF-8, empty, not JSON or of another shape, and for ids that the
    model's vocabulary does not have.

    >>> import tempfile
    >>> from jsparse.models import byte_tokenizer
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "questions.jsonl")
    ...     _ = file.write_text('{"prompt": "2+2=", "completion": "4"}')
    ...     (sample,) = read_samples([file], byte_tokenizer(), eos_token_id=256, vocab_size=257)
    >>> sample.tokens, sample.prompt_tokens
    (array([ 50,  43,  50,  61,  52, 256], dtype=int32), 4)
    """
    return _tokenise(_read_files(files), tokenizer, eos_token_id=eos_token_id, vocab_size=vocab_size)


def _read_files(files: Sequence[str | Path]) -> Iterator[_Record]:
    check_files(files)
    for file in map(Path, files):
        yield from _read_lines(file) if is_json_lines(file) else [_read_text(file)]


def _read_text(file: Path) -> _Record:
    content = file.read_bytes()
    text = _decode(content, str(file))
    if not text.strip():
        raise _empty(file)
    return _Record(None, text, str(file), len(content))


def _read_lines(file: Path) -> Iterator[_Record]:
    number = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{file}, line {number}"
            prompt, text = _parse(line, place)
            yield _Record(prompt, text, place, len(line))
    if number == 0:
        raise _empty(file)


def _parse(line: bytes, place: str) -> tuple[str | None, str]:
    """The prompt of a line, None for a document, and its text."""
    content = _decode(line, place).rstrip()
    try:
        fields = json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"data: {place} is not valid JSON ({reason}); {_ALLOWED}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"data: {place} is no JSON object; {_ALLOWED}")
    if fields.keys() not in _SHAPES:
        raise ValueError(f"data: {place} has the fields {sorted(fields)}; {_ALLOWED}")
    for name, value in fields.items():
        _check_value(name, value, place)

    if "text" in fields:
        return None, fields["text"]
    if "prompt" in fields:
        return fields["prompt"], fields["completion"]
    instruction = "\n".join(filter(None, [fields["instruction"], fields.get("input")]))
    return f"[INST]{instruction}[/INST]", fields["output"]


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field stands there twice")
    return fields


def _check_value(name: str, value: object, place: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f'data: {place}: "{name}" must be a string, not {json.dumps(value)[:50]}')
    if not value.strip() and not (name == "input" and value == ""):
        raise ValueError(f'data: {place}: "{name}" is {value[:50]!r}; it must hold some text')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half a surrogate pair, not a character
        half = error.object[error.start]
        raise ValueError(f'data: {place}: "{name}" holds {half!r}, which is not Unicode text') from error


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data: {place} is not UTF-8 text: byte {content[error.start]:#04x} at offset {error.start}"
        ) from error


def _empty(file: Path) -> ValueError:
    return ValueError(f"data: {file} is empty; every data file must hold some text")


def _require_document(record: _Record) -> _Record:
    if record.prompt is not None:
        raise ValueError(
            f"data: {record.place} is a prompt with its completion, which is for fine-tuning; "
            'here a document is needed: a text file, or a line {"text": ...}'
        )
    return record


def _tokenise(
    records: Iterable[_Record], tokenizer: Tokenizer, *, eos_token_id: int | None, vocab_size: int
) -> Iterator[Sample]:
    if eos_token_id is not None and not 0 <= eos_token_id < vocab_size:
        raise ValueError(f"eos_token_id={eos_token_id} must be at least 0 and less than {vocab_size=}")
    plain = plain_text_tokenizer(tokenizer)
    for batch in _batches(records):
        starts = [record.text if record.prompt is None else record.prompt for record in batch]
        completions = [record.text for record in batch if record.prompt is not None]
        encoded_starts = plain.encode_batch_fast(starts)
        encoded_completions = iter(plain.encode_batch_fast(completions, add_special_tokens=False))
        for record, start in zip(batch, encoded_starts, strict=True):
            completion = None if record.prompt is None else next(encoded_completions)
            yield _sample(record, start, completion, eos_token_id=eos_token_id, vocab_size=vocab_size)


def _sample(
    record: _Record,
    start: Encoding,
    completion: Encoding | None,
    *,
    eos_token_id: int | None,
    vocab_size: int,
) -> Sample:
    """The sample of a record. ``start`` is a document, or a prompt if there is a completion."""
    prompt, ids = ([], start.ids) if completion is None else (_without_end(start), completion.ids)
    if completion is not None and not (prompt and ids):
        name = "completion" if prompt else "prompt"
        raise ValueError(f"data: {record.place}: the {name} has no tokens for this tokenizer")
    # Some tokenizers add the end-of-sequence token to a text by themselves.
    if eos_token_id is not None and ids[-1:] != [eos_token_id]:
        ids.append(eos_token_id)
    tokens = prompt + ids
    if not tokens:
        raise ValueError(f"data: {record.place} has no tokens for this tokenizer")
    if max(tokens) >= vocab_size:
        raise ValueError(
            f"data: {record.place} has token id {max(tokens)}, but the model's vocabulary has {vocab_size} "
            "entries: the tokenizer is not this model's"
        )
    prompt_tokens = None if completion is None else len(prompt)
    return Sample(np.asarray(tokens, np.int32), prompt_tokens, record.place, record.size)


def _batches(records: Iterable[_Record]) -> Iterator[list[_Record]]:
    batch, characters = [], 0
    for record in records:
        batch.append(record)
        characters += len(record.prompt or "") + len(record.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _without_end(encoded: Encoding) -> list[int]:
    """The tokens of a prompt without what the tokenizer puts after every text: a completion follows."""
    ids, added = encoded.ids, encoded.special_tokens_mask
    while ids and added[len(ids) - 1]:
        ids.pop()
    return ids
