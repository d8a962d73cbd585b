"""Files to tokens: documents to pre-train on, and questions of several shapes to learn the answers of."""

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Int32
from tokenizers import Tokenizer

from jsparse.texts.chat_template import ChatTemplate
from jsparse.texts.files.data_files import Found, find_data
from jsparse.texts.files.file_kinds import ROWS, DataFile
from jsparse.texts.files.rows import BadRow, Row, read_rows
from jsparse.texts.findings import LIMIT, Findings
from jsparse.texts.plain_form import plain_chat_template
from jsparse.texts.reading import Reading
from jsparse.texts.shapes import (
    Answered,
    BadShape,
    Completion,
    Conversation,
    Document,
    Instruction,
    Preference,
    Record,
    read_record,
    shape_name,
)
from jsparse.texts.tokenizer import start_ids, started, whole_text_tokenizer

_BATCH_CHARACTERS = 1 << 18  # tokenised at a time, on all cores; a batch is longer only if one record is
_TOKENS_SHOWN, _PARTS_SHOWN, _CUT = 160, 8, " […] "  # of the sample that users see

Sources: TypeAlias = Sequence[str | Path] | Found


class Sample(NamedTuple):
    """The tokens of one document, or of one prompt, instruction or conversation with its answers.

    - tokens: int32 [T].
    - scored: [T], which tokens are targets; None for a document, which may be cut anywhere and where all
      tokens count.
    - place: file and line, for errors.
    - size: the bytes it took in its file.
    - second: of a preference, where the rejected answer with its question begins; it follows the chosen one.
    """

    tokens: Int32[np.ndarray, " T"]
    scored: Bool[np.ndarray, " T"] | None
    place: str
    size: int
    second: int | None = None

    @property
    def prompt_tokens(self) -> int | None:
        """How many tokens come before the first target; None for a document."""
        if self.scored is None:
            return None
        return int(self.scored.argmax()) if self.scored.any() else len(self.scored)

    @property
    def targets(self) -> int:
        """How many tokens are learned: never the first, which nothing comes before."""
        return len(self.tokens) - 1 if self.scored is None else int(np.count_nonzero(self.scored[1:]))


class _Placed(NamedTuple):
    record: Record
    place: str
    size: int


def read_documents(
    files: Sources, tokenizer: Tokenizer, *, eos_token_id: int | None, vocab_size: int
) -> list[Int32[np.ndarray, " _"]]:
    """Tokens of every document, in memory: one int32 array each, with the end-of-sequence token last.

    A document is a text file, or a row ``{"text": ...}``. The rest is as in ``read_samples``, but what has an
    answer to learn, which is for fine-tuning, raises ValueError.
    """
    samples = read_samples(files, tokenizer, eos_token_id=eos_token_id, vocab_size=vocab_size)
    return [_require_document(sample).tokens for sample in samples]


def read_texts(files: Sources) -> Iterator[str]:
    """The texts of all documents, as ``read_documents`` tokenises them."""
    findings = Findings()
    for record, place, _ in _read_records(files, Reading(), findings):
        if not isinstance(record, Document):
            raise _no_document(place)
        yield record.text
    refuse_bad_rows(findings)


def read_samples(
    files: Sources,
    tokenizer: Tokenizer,
    *,
    eos_token_id: int | None,
    vocab_size: int,
    chat_template: ChatTemplate | None = None,
    reading: Reading | None = None,
    findings: Findings | None = None,
) -> Iterator[Sample]:
    """Tokens of every document, and of every question with its answer, in the order of the files.

    What a file is, is read from its content (``jsparse.texts.files``): a text file is one document, and every
    row of a file of rows is one of

    - ``{"text": str}``: a document;
    - ``{"prompt": str, "completion": str}``: the completion's tokens are scored, the prompt's are not;
    - ``{"instruction": str, "input": str, "output": str}`` (Alpaca): a question and its answer, as messages.
      ``input`` may be left out; it follows the instruction on a line of its own;
    - ``{"messages": [{"role": ..., "content": ...}, ...]}``, also with ``tools``, or
      ``{"conversations": [{"from": "human", "value": ...}, ...]}`` (ShareGPT): what the assistant says is
      scored.

    Further fields are not read. Messages are rendered by ``chat_template``, or in Alpaca's plain form
    (``jsparse.texts.plain_form``) if there is none.

    What is trained is what is served: a text or a prompt has the tokens that it has as a prompt of
    ``generate``. It begins with what the tokenizer puts there (Llama's begin-of-sequence token), once, and
    special tokens written in it are those tokens; in messages they are text. Prompt and completion are
    tokenised separately. A document and a completion end with the end-of-sequence token, which is scored;
    with ``eos_token_id=None`` there is none. Messages end as their template has it. A truncation length saved
    in tokenizer.json is not applied.

    Rows are read as they are needed, and 262,144 characters of them, or one row, are held at a time. A text
    file is read whole, because a tokenizer may merge across any place where it could be cut. For one of 20
    MB, tokenizers 0.23 took 2.5 GB of memory. Give larger texts as JSON lines.

    - files: files, folders, patterns, ids of datasets on the hub, "-" for standard input, or what
      ``find_data`` made of these.
    - chat_template: the model's.
    - reading: names of fields, what is learned, and what becomes of bad rows.
    - findings: what is found is added to it.

    Raises FileNotFoundError for a file that is missing. Raises ValueError for what is no file of data or
    empty, for ids that the model's vocabulary does not have, and, unless ``reading`` skips them, for rows
    that are not UTF-8, not JSON or of no shape: one message at the end, which names file and line of all of
    them, up to ``LIMIT``.

    >>> import tempfile
    >>> from jsparse.models import byte_tokenizer
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "questions.jsonl")
    ...     _ = file.write_text('{"prompt": "2+2=", "completion": "4"}')
    ...     (sample,) = read_samples([file], byte_tokenizer(), eos_token_id=256, vocab_size=257)
    >>> sample.tokens, sample.prompt_tokens
    (array([ 50,  43,  50,  61,  52, 256], dtype=int32), 4)
    """
    if eos_token_id is not None and not 0 <= eos_token_id < vocab_size:
        raise ValueError(f"eos_token_id={eos_token_id} must be at least 0 and less than {vocab_size=}")
    reading = Reading() if reading is None else reading
    findings = Findings() if findings is None else findings
    encoder = _Encoder(tokenizer, eos_token_id, vocab_size, chat_template, reading.loss_on)
    for batch in _batches(_read_records(files, reading, findings)):
        for sample in encoder.samples(batch, findings):
            findings.samples += 1
            findings.tokens += len(sample.tokens)
            findings.targets += sample.targets
            findings.example = findings.example or show_sample(sample, encoder.tokenizer)
            yield sample
    if reading.bad_rows == "error":
        refuse_bad_rows(findings)


def needs_chat_template(files: Found, reading: Reading) -> bool:
    """Whether the first row of a file is an instruction or a conversation, so that a template renders it."""
    return any(isinstance(_first(file, reading), Instruction | Conversation) for file in files.files)


def _first(file: DataFile, reading: Reading) -> Record | None:
    """The first row that can be read, of a preference its chosen answer; None without any, or for a text."""
    if file.kind not in ROWS:
        return None
    for row in read_rows(file):
        if isinstance(row, Row) and isinstance(row.content, dict):
            with contextlib.suppress(BadShape):
                record = read_record(row.content, reading.fields, pairs=reading.pairs)[0]
                return record.chosen if isinstance(record, Preference) else record
    return None


def refuse_bad_rows(findings: Findings, *, all_read: bool = True) -> None:
    """Raise ValueError for the bad rows that were found. ``all_read``: there are no more of them."""
    count = findings.bad.count
    if count > 1:
        least = "" if all_read else "at least "
        raise ValueError(f"data: {least}{count} bad rows, which --bad-rows skip leaves out: {findings.bad}")
    if count:
        raise ValueError(f"data: {findings.bad}")


def _read_records(files: Sources, reading: Reading, findings: Findings) -> Iterator[_Placed]:
    data = files if isinstance(files, Found) else find_data(files)
    findings.left_out += [f"{name}: {reason}" for name, reason in data.left_out]
    for file in data.files:
        findings.begin_file(file.name, file.kind)
        for row in read_rows(file):
            placed = _read_row(row, reading, findings)
            if placed is not None:
                yield placed
            elif reading.bad_rows == "error" and findings.bad.count == LIMIT:
                refuse_bad_rows(findings, all_read=False)


def _read_row(row: Row | BadRow, reading: Reading, findings: Findings) -> _Placed | None:
    if isinstance(row, BadRow):
        findings.bad.add(row.place, f" {row.reason}")
        return None
    if isinstance(row.content, str) and reading.pairs:
        findings.bad.add(row.place, " is a text, and --dpo-beta learns from pairs of answers")
        return None
    if isinstance(row.content, str):
        findings.add_row("documents", row.place)
        return _Placed(Document(row.content), row.place, row.size)
    try:
        record, unread = read_record(row.content, reading.fields, pairs=reading.pairs)
    except BadShape as error:
        findings.bad.add(row.place, str(error))
        return None
    findings.ignored.update(unread)
    findings.add_row(shape_name(record), row.place)
    return _Placed(record, row.place, row.size)


def _require_document(sample: Sample) -> Sample:
    if sample.scored is not None:
        raise _no_document(sample.place)
    return sample


def _no_document(place: str) -> ValueError:
    return ValueError(
        f"data: {place} is a prompt with its completion, which is for fine-tuning; "
        'here a document is needed: a text file, or a line {"text": ...}'
    )


class _Encoder:
    """From records to samples, by one tokenizer and one template."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_id: int | None,
        vocab_size: int,
        chat_template: ChatTemplate | None,
        loss_on: str,
    ):
        self.tokenizer = whole_text_tokenizer(tokenizer)
        self._start = start_ids(tokenizer)
        self._eos, self._vocab_size, self._all = eos_token_id, vocab_size, loss_on == "all"
        self._plain = chat_template is None
        self._given = chat_template

    def samples(self, batch: Sequence[_Placed], findings: Findings) -> Iterator[Sample]:
        """Those of a batch; what cannot be encoded is added to the bad rows."""
        starts = [one.record for one in batch if isinstance(one.record, Document | Completion)]
        texts = [one.prompt if isinstance(one, Completion) else one.text for one in starts]
        completions = [one.completion for one in starts if isinstance(one, Completion)]
        encoded_texts = iter(self._encode(texts))
        encoded_completions = iter(self._encode(completions))
        for record, place, size in batch:
            second = None
            try:
                if isinstance(record, Document):
                    ids, scored = self._document(next(encoded_texts))
                elif isinstance(record, Completion):
                    ids, scored = self._completion(next(encoded_texts), next(encoded_completions))
                elif isinstance(record, Preference):
                    ids, scored, second = self._preference(record, findings)
                else:
                    ids, scored = self._messages(record, findings)
            except BadShape as error:
                findings.bad.add(place, str(error))
                continue
            if max(ids) >= self._vocab_size:
                raise ValueError(
                    f"data: {place} has token id {max(ids)}, but the model's vocabulary has "
                    f"{self._vocab_size} entries: the tokenizer is not this model's"
                )
            yield Sample(np.asarray(ids, np.int32), scored, place, size, second)

    @functools.cached_property
    def _chat(self) -> ChatTemplate:
        """Made when a row needs it: a tokenizer may not have what the plain form needs."""
        return plain_chat_template(self.tokenizer, self._eos) if self._given is None else self._given

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [one.ids for one in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if self._eos is None or ids[-1:] == [self._eos] else [*ids, self._eos]

    def _document(self, ids: list[int]) -> tuple[list[int], None]:
        ids = self._ended(started(self._start, ids))
        if not ids:
            raise BadShape(" has no tokens for this tokenizer")
        return ids, None

    def _completion(self, prompt: list[int], completion: list[int]) -> tuple[list[int], np.ndarray]:
        prompt, answer = started(self._start, prompt) if prompt else [], self._ended(completion)
        if not prompt or not answer:
            name = "completion" if prompt else "prompt"
            raise BadShape(f": the {name} has no tokens for this tokenizer")
        return prompt + answer, np.arange(len(prompt) + len(answer)) >= (0 if self._all else len(prompt))

    def _preference(self, pair: Preference, findings: Findings) -> tuple[list[int], np.ndarray, int]:
        chosen, rejected = (self._answered(record, findings) for record in pair)
        if chosen[0] == rejected[0]:
            raise BadShape(": the two answers are the same, so neither can be preferred")
        scored = np.concatenate([chosen[1], rejected[1]])
        second = len(chosen[0])
        scored[second] = False  # nothing comes before it
        return chosen[0] + rejected[0], scored, second

    def _answered(self, record: Answered, findings: Findings) -> tuple[list[int], np.ndarray]:
        if isinstance(record, Completion):
            return self._completion(*self._encode([record.prompt, record.completion]))
        return self._messages(record, findings)

    def _messages(
        self, record: Instruction | Conversation, findings: Findings
    ) -> tuple[list[int], np.ndarray]:
        findings.form = "plain" if self._plain else "template"
        tools = None if isinstance(record, Instruction) else record.tools
        messages = record.messages(plain=self._plain) if isinstance(record, Instruction) else record.messages
        chat = self._chat
        try:
            if self._all:  # also where it cannot be told what the assistant writes
                ids = chat.encode(messages, tools=tools, add_generation_prompt=False)
                mask = [1] * len(ids)
            else:
                ids, mask = chat.encode_with_mask(messages, tools=tools)
        except ValueError as error:
            raise BadShape(f": {error}") from error
        if any(isinstance(message.get("content"), list) for message in messages):
            written = chat.render(messages, tools=tools, add_generation_prompt=False)
            for number, message in enumerate(messages):
                _require_written(message, f"messages[{number}].content", written)
        scored = np.array(mask, bool)
        if not scored[1:].any():
            raise BadShape(" has no target: the template writes nothing for the assistant")
        return ids, scored


def _require_written(message: Mapping[str, Any], place: str, written: str) -> None:
    """BadShape where a template that expects a text writes a list as Python does, or leaves it out."""
    content = message.get("content")
    if not isinstance(content, list):
        return
    if str(content) in written:
        raise BadShape(
            f": {place} is a list, which the template writes as Python does, with brackets and quotes; give "
            "it as a text"
        )
    # Of what the assistant says a template may drop the thoughts, and one that drops all has no target.
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    texts = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    as_json = [json.dumps(text, ensure_ascii=False)[1:-1] for text in texts]  # as some write what tools say
    is_whole = all(one in written or other in written for one, other in zip(texts, as_json, strict=True))
    if message["role"] != "assistant" and not is_whole:
        raise BadShape(f": {place} is a list, which the template does not write; give it as a text")


def show_sample(sample: Sample, tokenizer: Tokenizer) -> str:
    """A sample as text, its targets between ⟦ and ⟧; the middle of long parts is left out.

    >>> from jsparse.models import byte_tokenizer
    >>> scored = np.array([False, False, True])
    >>> show_sample(Sample(np.array([50, 61, 52], np.int32), scored, "", 0), byte_tokenizer())
    '2=⟦4⟧'
    """
    scored = np.ones(len(sample.tokens), bool) if sample.scored is None else sample.scored
    edges = [0, *(np.flatnonzero(np.diff(scored)) + 1).tolist(), len(scored)]
    parts = []
    for start, end in zip(edges, edges[1:], strict=False):
        text = _decode_part(sample.tokens.tolist(), start, end, tokenizer)
        parts.append(f"⟦{text}⟧" if scored[start] else text)
        if len(parts) == _PARTS_SHOWN and end < len(scored):
            parts.append(_CUT)
            break
    return "".join(parts)


def _decode_part(ids: list[int], start: int, end: int, tokenizer: Tokenizer) -> str:
    if end - start > _TOKENS_SHOWN:
        half = _TOKENS_SHOWN // 2
        shown = (start, start + half), (end - half, end)
        return _CUT.join(_decode_part(ids, *part, tokenizer) for part in shown)
    # After the token before it: alone, a decoder may take the space from the first word.
    before = tokenizer.decode(ids[:start][-1:], skip_special_tokens=False)
    text = tokenizer.decode(ids[start - 1 if start else 0 : end], skip_special_tokens=False)
    if text.startswith(before):
        return text[len(before) :]
    return tokenizer.decode(ids[start:end], skip_special_tokens=False)


def _characters(placed: _Placed) -> int:
    """About how many a record has: its bytes, or its texts if the file is compressed, as Parquet is."""
    records = placed.record if isinstance(placed.record, Preference) else [placed.record]
    return max(placed.size, sum(map(_text_length, records)))


def _text_length(record: Document | Answered) -> int:
    texts = [one.get("content") for one in record.messages] if isinstance(record, Conversation) else record
    return sum(len(text) for text in texts if isinstance(text, str))


def _batches(records: Iterable[_Placed]) -> Iterator[list[_Placed]]:
    batch, characters = [], 0
    for placed in records:
        batch.append(placed)
        characters += _characters(placed)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
