"""Packing and storing, against windows laid out in plain lists."""

import json
import resource
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jsparse.models import byte_tokenizer
from jsparse.texts import documents
from jsparse.texts.findings import Findings
from jsparse.texts.reading import Reading
from jsparse.train.data import windows
from jsparse.train.data.windows import FLAGS, HEADER, TOKENS, open_windows, read_findings, write_windows

END = 256


def write(files, folder, *, context, tokenizer=None, eos_token_id: int | None = END, vocab_size=257):
    tokenizer = tokenizer or byte_tokenizer()
    return write_windows(
        files, tokenizer, folder, context=context, eos_token_id=eos_token_id, vocab_size=vocab_size
    )


def write_lines(file, samples):
    """``samples``: a text each, or a prompt and a completion."""
    objects = [
        {"text": sample}
        if isinstance(sample, str)
        else dict(zip(("prompt", "completion"), sample, strict=True))
        for sample in samples
    ]
    file.write_text("".join(json.dumps(fields) + "\n" for fields in objects))
    return file


def lay_out(samples, context):
    """The oracle: for each window a list of (token, segment id, scored)."""
    rows = [[]]
    for sample in samples:
        prompt, text = ("", sample) if isinstance(sample, str) else sample
        tokens = [*(prompt + text).encode(), END]
        if prompt and len(rows[-1]) + len(tokens) > context:
            rows.append([])
        for number, token in enumerate(tokens):
            if len(rows[-1]) == context:
                rows.append([])
            begins = number == 0 or rows[-1] == []
            segment = begins + (rows[-1][-1][1] if rows[-1] else 0)
            rows[-1].append((token, segment, number >= len(prompt) and not begins))
    return [row + [(0, 0, False)] * (context - len(row)) for row in rows]


letters = st.text("abc", min_size=1, max_size=12)
prompts = st.tuples(st.text("abc", min_size=1, max_size=7), st.text("abc", min_size=1, max_size=7))


@given(
    samples=st.lists(letters | prompts, min_size=1, max_size=8),
    context=st.integers(2, 16),
    at_a_time=st.integers(1, 30),
)
@settings(max_examples=60)
def test_windows_are_those_of_the_oracle(samples, context, at_a_time):
    lengths = [len("".join(sample)) + 1 for sample in samples]
    too_long = [n for n, sample in enumerate(samples) if not isinstance(sample, str) and lengths[n] > context]
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_TOKENS_A_WRITE", at_a_time)
        patch.setattr(documents, "_BATCH_CHARACTERS", at_a_time)
        file, folder = write_lines(Path(name, "a.jsonl"), samples), Path(name, "windows")
        if too_long:
            length = lengths[too_long[0]]
            with pytest.raises(ValueError, match=f"line {too_long[0] + 1} has {length} .* context={context}"):
                write([file], folder, context=context)
            return
        if sum(lengths) < context:
            with pytest.raises(ValueError, match=f"{sum(lengths)} tokens in all .* context={context} tokens"):
                write([file], folder, context=context)
            return
        written, opened = write([file], folder, context=context), open_windows(folder)
        expected = np.array(lay_out(samples, context))
        assert (len(written), written.context) == expected.shape[:2]
        assert len(opened) == len(written)
        for found in (written[:], opened[list(range(len(opened)))]):
            assert np.array_equal(np.stack(found, axis=-1), expected)
            assert [array.dtype for array in found] == [np.int32, np.int32, bool]
        rows = np.arange(len(written))[::-2]  # any rows, in any order
        assert np.array_equal(np.stack(written[rows], axis=-1), expected[::-1][::2])


def test_documents_and_prompts_of_several_files_by_hand(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    lines = write_lines(tmp_path / "b.jsonl", [("pq", "r"), "de", ("p", "q")])
    batch = write([tmp_path / "a.txt", lines], tmp_path / "windows", context=6)[:]
    a, b, c, d, e, p, q, r = b"abcdepqr"
    assert batch.tokens.tolist() == [[a, b, c, END, 0, 0], [p, q, r, END, d, e], [END, p, q, END, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 2, 2], [1, 2, 2, 2, 0, 0]]
    # No target: the first of a segment, a prompt's second token (the q of the second window), padding.
    assert batch.scored.astype(int).tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 1], [0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize(("vocab_size", "size"), [(2**16, 2), (2**16 + 1, 4), (200_000, 4)])
def test_ids_take_the_smallest_type_that_holds_the_vocabulary(tmp_path, vocab_size, size):
    highest = vocab_size - 1
    words = {"low": 0, "high": highest}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="low"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "a.txt").write_text("high low high")
    found = write(
        [tmp_path / "a.txt"],
        tmp_path / "windows",
        context=3,
        tokenizer=tokenizer,
        eos_token_id=None,
        vocab_size=vocab_size,
    )
    assert found[:].tokens.tolist() == [[highest, 0, highest]]
    assert (tmp_path / "windows" / TOKENS).stat().st_size == 3 * size


def test_a_batch_reads_its_rows_from_a_map(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh")
    found = write([tmp_path / "a.txt"], tmp_path / "windows", context=3)
    assert isinstance(found.tokens, np.memmap) and isinstance(found.flags, np.memmap)
    assert not isinstance(found[1:].tokens, np.memmap)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 2**31 + 1}, r"vocab_size=2147483649 must be from 1 to 2\*\*31"),
        ({"vocab_size": 100, "eos_token_id": None}, "a.txt has token id 120, .* 100 entries"),
        ({"context": 1}, "context=1 must be at least 2"),
        ({"context": 6}, r"1 file\(s\) with 5 tokens in all do not fill one window of context=6"),
    ],
)
def test_arguments_that_do_not_fit_are_named_and_nothing_is_left(tmp_path, changes, message):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=message):
        write([tmp_path / "a.txt"], tmp_path / "new" / "windows", **{"context": 4} | changes)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_prompt_with_a_completion_that_does_not_fit_says_how_long_it_is(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [("p", "q"), ("abcd", "efg")])
    message = "line 2 has 8 tokens, 4 of the prompt and 4 of the completion .* context=7"
    with pytest.raises(ValueError, match=message):
        write([file], tmp_path / "windows", context=7)
    assert len(write([file], tmp_path / "windows", context=8)) == 2


@pytest.mark.parametrize(
    ("too_long", "rows", "samples", "truncated", "left_out"),
    [("skip", [b"pq"], 1, 0, 2), ("truncate", [b"pq", b"abcdef"], 2, 1, 1)],
)
def test_answers_that_do_not_fit_are_left_out_or_cut_and_counted(
    tmp_path, too_long, rows, samples, truncated, left_out
):
    """The first is cut within its answer; of the last only the prompt would be left."""
    file = write_lines(tmp_path / "a.jsonl", [("p", "q"), ("abcd", "efg"), ("abcdef", "g")])
    found = write_windows(
        [file],
        byte_tokenizer(),
        tmp_path / "windows",
        context=6,
        eos_token_id=END,
        vocab_size=257,
        reading=Reading(too_long=too_long),
        may_be_short=True,
    )[:]
    expected = [[*row, END, 0, 0, 0][:6] for row in rows]
    assert found.tokens.tolist() == expected
    findings = read_findings(tmp_path / "windows")
    assert (findings.samples, findings.truncated, findings.long.count) == (samples, truncated, left_out)
    # Each has two targets: "q" and the end, and "ef".
    assert (findings.tokens, findings.targets) == ({1: 3, 2: 9}[samples], 2 * samples)


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(FileExistsError, match="a.txt is a file; it must be a folder"):
        write([tmp_path / "a.txt"], tmp_path / "a.txt", context=4)
    assert (tmp_path / "a.txt").read_text() == "text"


def test_windows_that_were_there_are_replaced_and_other_files_stay(tmp_path):
    folder = tmp_path / "windows"
    (tmp_path / "a.txt").write_text("abcd")
    old = write([tmp_path / "a.txt"], folder, context=5)
    (folder / "notes").write_text("mine")
    (tmp_path / "a.txt").write_text("xyz")
    new = write([tmp_path / "a.txt"], folder, context=4)
    assert new[:].tokens.tolist() == [[*b"xyz", END]]
    assert old[:].tokens.tolist() == [[*b"abcd", END]]  # still mapped
    assert sorted(file.name for file in folder.iterdir()) == sorted([FLAGS, "notes", TOKENS, HEADER])

    write_lines(tmp_path / "bad.jsonl", ["abcd", ""])
    with pytest.raises(ValueError, match="line 2"):
        write([tmp_path / "a.txt", tmp_path / "bad.jsonl"], folder, context=4)
    assert [file.name for file in folder.iterdir()] == ["notes"]


@pytest.mark.parametrize("existed", [False, True])
def test_a_crash_half_way_leaves_nothing_that_opens(tmp_path, monkeypatch, existed):
    (tmp_path / "a.txt").write_text("abcdefgh")
    folder = tmp_path / "windows"
    if existed:
        write([tmp_path / "a.txt"], folder, context=4)
    # Killed, so that nothing is cleaned up: after the last token, before the header has its name.
    remove, calls = windows._remove, []
    monkeypatch.setattr(
        windows, "_remove", lambda folder: calls.append(folder) or len(calls) > 1 or remove(folder)
    )
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write([tmp_path / "a.txt"], folder, context=4)
    assert sorted(file.name for file in folder.iterdir()) == sorted([FLAGS, TOKENS, f"{HEADER}.partial"])
    with pytest.raises(FileNotFoundError, match=f"windows holds no training windows: {HEADER}"):
        open_windows(folder)
    monkeypatch.undo()
    assert len(write([tmp_path / "a.txt"], folder, context=4)) == 3  # and it does not stand in the way


def test_a_disk_that_fills_is_named_and_partial_files_are_removed(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 2000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # a write beyond these bytes fails
    try:
        with pytest.raises(OSError, match="cannot be written to .*windows: .*; make room there"):
            write([tmp_path / "a.txt"], tmp_path / "new" / "windows", context=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_files_that_do_not_belong_together_do_not_open(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh")
    folder = tmp_path / "windows"
    write([tmp_path / "a.txt"], folder, context=4)
    header = (folder / HEADER).read_text()
    for damaged, message in [
        ("", "is not a description of training windows"),
        ("[]", "is not a description"),
        (header.replace("uint16", "float"), "is not a description"),
        (header.replace('"format": 1', '"format": 2'), "that this version cannot read"),
        (header.replace('"windows": 3', '"windows": 0'), "that this version cannot read"),
        (header.replace('"windows": 3', '"windows": 4'), f"{TOKENS} has 24 bytes, .* 4 windows .* 32 bytes"),
    ]:
        assert damaged != header
        (folder / HEADER).write_text(damaged)
        with pytest.raises(ValueError, match=message):
            open_windows(folder)
    (folder / HEADER).write_text(header)
    (folder / FLAGS).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{FLAGS} has 0 bytes"):
        open_windows(folder)


def test_the_bar_counts_every_byte_and_no_more(tmp_path):
    (tmp_path / "a.txt").write_text("né")
    lines = write_lines(tmp_path / "b.jsonl", ["abc", ("p", "q")])
    files = [tmp_path / "a.txt", lines]
    samples = documents.read_samples(files, byte_tokenizer(), eos_token_id=END, vocab_size=257)
    with windows.progress_bar(False) as bar:
        passed = list(windows._watch(samples, bar, total=3 + lines.stat().st_size))
        assert len(passed) == 3 and bar.finished
        assert bar.tasks[0].fields["note"].endswith("tokens/s")


def test_what_was_found_is_stored_beside_the_windows(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "abc", "meta": {"source": "c4"}}, {"text": "de", "meta": 1, "id": 2}, {"id": 3}]
    file.write_text("\n".join(map(json.dumps, rows)))
    found = Findings()
    skip = Reading(bad_rows="skip")
    list(
        documents.read_samples(
            [file], byte_tokenizer(), eos_token_id=END, vocab_size=257, reading=skip, findings=found
        )
    )
    write_windows(
        [file],
        byte_tokenizer(),
        tmp_path / "windows",
        context=4,
        eos_token_id=END,
        vocab_size=257,
        reading=skip,
    )
    stored = windows.read_findings(tmp_path / "windows")
    assert stored.ignored == {"meta": 2, "id": 1} and stored.bad.count == 1
    assert stored.lines() == found.lines()
