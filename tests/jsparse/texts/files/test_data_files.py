"""What files of training data are, whatever their names say, and the rows that they hold."""

import gzip
import hashlib
import io
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsparse.extras import MissingExtra
from jsparse.serve.prompts import read_text
from jsparse.texts.files import data_files, json_rows
from jsparse.texts.files.data_files import find_data
from jsparse.texts.files.data_names import split_of
from jsparse.texts.files.rows import BadRow, Row, read_rows

pa = pytest.importorskip("pyarrow", reason="needs the extra `data`")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = [{"text": "né\n", "n": 1}, {"text": "b", "n": 2}]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def json_list(rows, **options) -> bytes:
    return json.dumps(rows, **options).encode()


def json_lines(rows, end="\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def parquet(rows) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=3)
    return sink.getvalue()


def arrow_file(rows) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue()


def arrow_stream(rows) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue()


WRITERS = {
    "list": ("JSON list", json_list),
    "indented list": ("JSON list", lambda rows: json_list(rows, indent=2)),
    "list with BOM": ("JSON list", lambda rows: b"\xef\xbb\xbf\r\n" + json_list(rows, indent=2)),
    "lines": ("JSON lines", json_lines),
    "lines without the last end": ("JSON lines", lambda rows: json_lines(rows).rstrip(b"\n")),
    "lines from Windows": ("JSON lines", lambda rows: b"\xef\xbb\xbf" + json_lines(rows, "\r\n\r\n")),
    "list in gzip": ("JSON list", lambda rows: gzip.compress(json_list(rows))),
    "lines in gzip": ("JSON lines", lambda rows: gzip.compress(json_lines(rows))),
    "lines in gzip twice": (
        "JSON lines",
        lambda rows: b"".join(gzip.compress(json_lines([r])) for r in rows),
    ),
    "lines in zstd": ("JSON lines", lambda rows: zstd(json_lines(rows))),
    "lines in frames": ("JSON lines", lambda rows: b"".join(zstd(json_lines([r])) for r in rows)),
    "list in zstd": ("JSON list", lambda rows: zstd(json_list(rows))),
    "Parquet": ("Parquet", parquet),
    "Arrow": ("Arrow", arrow_file),
    "Arrow stream": ("Arrow", arrow_stream),
}


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def only(*sources):
    (file,) = find_data(sources).files
    return file


def contents(file) -> list:
    """What the rows of a file hold; their sizes sum to that of the file."""
    rows = list(read_rows(file))
    assert sum(row.size for row in rows) == file.size and all(row.size >= 0 for row in rows)
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.content for row in rows if isinstance(row, Row)]


def refused(*sources, message: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message) as caught:
        for file in find_data(sources).files:
            list(read_rows(file))
    assert "\n" not in str(caught.value)


# --- kinds ---


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.NDJSON", "a.txt", "a.parquet", "a", "a.jsonl.gz"])
@pytest.mark.parametrize("writer", WRITERS)
def test_the_content_tells_the_kind_and_the_name_does_not(tmp_path, writer, name):
    kind, dump = WRITERS[writer]
    file = only(write(tmp_path, name, dump(ROWS)))
    assert file == (tmp_path / name, str(tmp_path / name), kind, (tmp_path / name).stat().st_size)
    assert contents(file) == ROWS


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8),
    chunk=st.integers(1, 9),
    data=st.data(),
)
def test_any_rows_come_back_from_any_kind(tmp_path_factory, texts, chunk, data):
    rows = [{"text": text, "parts": [{"a": text}], "n": -12} for text in texts]
    kind, dump = WRITERS[data.draw(st.sampled_from(sorted(WRITERS)))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK", chunk)
        file = only(write(tmp_path_factory.mktemp("any"), "rows", dump(rows)))
        assert file.kind == kind and contents(file) == rows


@given(
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    chunk=st.integers(1, 40),
    ascii_only=st.booleans(),
)
def test_a_list_in_pieces_is_what_json_reads(value, chunk, ascii_only):
    values = [value, [value], {"a": value}, 12]
    text = json.dumps(values, ensure_ascii=ascii_only).encode("utf-8", errors="replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK", chunk)
        assert [parsed.value for parsed in json_rows.ListReader(io.BytesIO(text))] == json.loads(text)


@settings(max_examples=200)
@given(seed=st.integers(0, 10**9), chunk=st.integers(1, 40))
def test_a_damaged_list_is_refused_where_json_refuses_it(seed, chunk):
    draw = random.Random(seed)
    text = json.dumps(
        [{"a": "b\\u00e9\n", "c": [1.5e3, True, None]}, {"d": {}}] * 2, indent=draw.choice([None, 1])
    )
    for _ in range(draw.randint(1, 2)):
        at = draw.randrange(len(text))
        text = (
            text[:at]
            + draw.choice(["", "x", '"', "]", "}", ",", "\\", "1"])
            + text[at + draw.randint(0, 1) :]
        )
    try:
        expected, error = json.loads(text), None
    except json.JSONDecodeError as found:
        expected, error = None, found
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK", chunk)
        reader = json_rows.ListReader(io.BytesIO(text.encode()))
        if error is None and isinstance(expected, list):
            assert [parsed.value for parsed in reader] == expected
        else:
            with pytest.raises(ValueError) as caught:
                list(reader)
            if error is not None and "Extra data" not in error.msg and "trailing comma" not in error.msg:
                # Between elements we name the character that is wrong, json sometimes that before it.
                position = int(str(caught.value).split("at character ")[1])
                assert abs(position - error.pos) <= 1 or text[error.pos : position].strip() == "", error


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "plain"),
        ("a.md", "[![Build](x)](y)\n\n{a}"),
        ("a.py", "[1, 2]\n"),
        ("b.py", "{'a': 1}\n"),
        ("c.py", '["a", "b"]\nprint()\n'),
        ("b.md", '{"a": 1}\nis a row.\nSo is this.\n'),
        ("d.txt", "{}"),
        ("e.txt", '[{"a": 1}] is a list'),
        ("f.txt", "{\n  broken"),
        ("g", "né\r\n"),
        ("h.jinja", "{% if x %}"),
        ("i.txt", "[" * 100_000),
        ("j.txt", '["' + "a" * 10),
    ],
)
@pytest.mark.parametrize("dump", [bytes, gzip.compress, zstd, lambda content: b"\xef\xbb\xbf" + content])
def test_text_stays_text_as_it_is(tmp_path, name, content, dump):
    file = only(write(tmp_path, name, dump(content.encode())))
    assert file.kind == "text"
    assert list(read_rows(file)) == [Row(content, str(tmp_path / name), file.size)]


def test_a_text_whose_head_ends_within_a_character(tmp_path):
    text = "a" * ((1 << 20) - 1) + "é"
    assert contents(only(write(tmp_path, "a.txt", text))) == [text]


def test_a_first_row_longer_than_what_is_looked_at(tmp_path):
    rows = [{"text": "é\n" * (1 << 20)}, {"text": "b"}]
    for name, dump in itertools.product(("a.jsonl", "a.txt"), (json_list, json_lines)):
        assert contents(only(write(tmp_path, name, dump(rows)))) == rows


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\n\n"])
def test_a_second_row_that_is_cut_off_by_what_is_looked_at(tmp_path, start):
    rows = [{"text": "a" * 600_000}] * 3
    assert contents(only(write(tmp_path, "a.txt", start + json_lines(rows)))) == rows


def test_a_long_object_over_many_lines(tmp_path):
    content = json_list({"version": 1, "data": [{"text": "a" * 1000}] * 2000}, indent=1)
    for name in ("a.json", "a"):
        refused(
            write(tmp_path, name, content),
            message=f"{name} holds JSON objects that spread over several lines",
        )
    only_text = b"{\n" + b"a = 1\n" * 400_000
    assert only(write(tmp_path, "a", only_text)).kind == "text"


def test_most_lines_decide_where_the_name_does_not(tmp_path):
    lines = json_lines([{"text": "a"}] * 3) + b"oops\n"
    assert only(write(tmp_path, "a.txt", lines)).kind == "JSON lines"
    assert only(write(tmp_path, "b.txt", lines + b"oops\n" * 3)).kind == "text"
    assert only(write(tmp_path, "b.jsonl", b"oops\n" * 3 + lines)).kind == "JSON lines"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty; every data file must hold some text"),
        ("a.txt", b"\xef\xbb\xbf \r\n", "is empty"),
        ("a.jsonl", b"\n" * (3 << 20), "is empty"),
        ("a.json", b"[ ]", "is empty, a list without rows"),
        ("a.jsonl.gz", gzip.compress(b""), "is empty"),
        ("a.json", b"Hello", r"named as JSON, but its beginning is not valid JSON .*; rename it .* Parquet"),
        ("a.jsonl.zst", zstd(b"Hello"), "named as JSON"),
        ("a.json", b"[1, 2]", "a JSON list of something else than objects"),
        ("a.json", b"12", "its beginning is no JSON object"),
        ("a.json", b'[{"a": 1}', "not valid JSON .*at character 9"),
        ("a.jsonl", b'{"a": "\xe9"}', "its beginning is not UTF-8 text: byte 0xe9 at offset 7"),
        ("a.json", b'{"a":\n1}', "JSON objects that spread over several lines; `jq -c . FILE > NEW.jsonl`"),
        ("a.txt", b'{"a":\n1}\n{"a":\n1}', "spread over several lines"),
        ("a.json", b'{"v": 1, "data": [{"a": 1}]}', """rows under "data"; `jq -c '.data\\[\\]' FILE"""),
        ("a", b'{"train":\n[{"a": 1}]}', """rows under "train"; `jq"""),
        ("a.txt", b"good \xff\xfe", "is not UTF-8 text: byte 0xff at offset 5"),
        ("a.txt", b"a\0b", r"is binary \(byte 0x00 at offset 1\); what is read is UTF-8 text, "),
        ("a.txt", "é".encode("utf-16"), "is UTF-16 text; `iconv -f UTF-16 -t UTF-8"),
        ("a.txt", "é".encode("utf-32"), "is UTF-32 text"),
        ("a.txt", b"%PDF-1.4 ", "is a PDF; what is read"),
        ("a.docx", b"PK\x03\x04 ", "is a zip archive, or a document"),
        ("a.txt", b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        ("a.txt", b"\x80\x04\x95", "is a pickle, which can run code"),
        ("a.pkl", b"(lp0\n.", "named as a pickle, and does not begin as one"),
        ("a.tar.gz", gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar".ljust(255, b"\0")), "a tar archive"),
        ("a.gz", gzip.compress(gzip.compress(b"a")), "compressed twice"),
        ("a.gz", gzip.compress(parquet(ROWS)), "is Parquet that is compressed once more"),
        ("a.gz", gzip.compress(b"abc" * 100)[:-9], "is compressed, and damaged or cut off"),
        ("a.zst", zstd(random.Random(0).randbytes(99).hex().encode())[:-9], "damaged or cut off"),
        ("a.csv", b"text\na\n", "is a table of text .csv.; python -c "),
        ("a.tsv.gz", gzip.compress(b"text\na\n"), "is a table of text .tsv."),
        ("a.parquet", b"<html>", "named as a table, and does not begin as one; if it is text, name it .txt"),
        ("a.txt", b"PAR1 and more", "begins as Parquet, and is damaged"),
        ("a.txt", parquet(ROWS)[:-6], "begins as Parquet, and is damaged"),
        ("a.txt", b"ARROW1 and more", "begins as Arrow, and is damaged"),
        ("a.arrow", arrow_stream(ROWS)[:90], "begins as Arrow, and is damaged"),
        ("a.parquet", parquet([]), "has no rows"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "cannot be read: .* git lfs pull"),
    ],
    # gzip writes the time: without names of their own, two processes would have other tests.
    ids=lambda value: "content" if isinstance(value, bytes) else None,
)
def test_what_is_refused(tmp_path, name, content, message):
    refused(write(tmp_path, name, content), message=f"^data: {tmp_path}/{name} (.* )?{message}")


@pytest.mark.parametrize("separator", [",", "\t"])
def test_the_advice_for_tables_of_text_is_right(tmp_path, separator):
    name = "a.csv" if separator == "," else "a.tsv"
    path = write(tmp_path, name, f'text{separator}more\n"a\nb"{separator}c\n')
    with pytest.raises(ValueError) as caught:
        find_data([path])
    command = str(caught.value).split("; ", 1)[1].removesuffix(" makes it Parquet")
    code = command.removeprefix('python -c "').removesuffix('"').replace("FILE", name)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert contents(only(tmp_path / "NEW.parquet")) == [{"text": "a\nb", "more": "c"}]


def test_two_columns_of_one_name(tmp_path):
    sink = io.BytesIO()
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), sink)
    refused(write(tmp_path, "a.parquet", sink.getvalue()), message="two columns of one name")


def test_pyarrow_is_missing(tmp_path, monkeypatch):
    files = [
        write(tmp_path, name, content)
        for name, content in (("a.zst", zstd(b"a")), ("b.parquet", parquet(ROWS)))
    ]
    write(tmp_path, "c.jsonl.gz", gzip.compress(json_lines(ROWS)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for file in files:
        refused(file, message=r"needs pyarrow: .*pip install -e '.\[data\]'", error=MissingExtra)
    assert contents(only(tmp_path / "c.jsonl.gz")) == ROWS


# --- rows ---


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"text": "a"', r"is not valid JSON \(Expecting ',' delimiter at character 12\)"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"text": "a", "text": "b"}', r"is not valid JSON \(a field stands there twice\)"),
        ('{"text": {"a": 1, "a": 1}}', "a field stands there twice"),
        (b'{"text": "\xff"}', "is not UTF-8 text: byte 0xff at offset 10"),
        ('["a"]', "is no JSON object"),
        ("null", "is no JSON object"),
        ('{"n": NaN}', "NaN is no number"),
        ('{"n": [-Infinity]}', "-Infinity is no number"),
        ('{"n": 1e999}', "1e999 is too large a number"),
        ('{"n": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("{} {}", "Extra data at character 2"),
    ],
)
def test_bad_lines_are_told_and_passed(tmp_path, row, reason):
    row = row if isinstance(row, bytes) else row.encode()
    for content, line in ((b'{"a": 1}\n\n' + row + b"\r\n\n", 3), (row + b'\n{"a": 1}\n', 1)):
        file = only(write(tmp_path, "a.jsonl", content))
        rows = list(read_rows(file))
        (bad,) = (found for found in rows if isinstance(found, BadRow))
        assert bad.place == f"{tmp_path}/a.jsonl, line {line}" and "\n" not in bad.reason
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(bad.reason)
        assert [found.content for found in rows if isinstance(found, Row)] == [{"a": 1}]
        assert sum(found.size for found in rows) == file.size


def test_bad_elements_of_a_list(tmp_path):
    content = b'[{"a": 1}, {"a": 1, "a": 2}, 3, {"a": NaN}, {"a": 1e999}, {"a": 2}]'
    rows = list(read_rows(only(write(tmp_path, "a.json", content))))
    assert [row.place for row in rows] == [f"{tmp_path}/a.json, row {n}" for n in range(1, 7)]
    assert [isinstance(row, BadRow) for row in rows] == [False, True, True, True, True, False]
    assert sum(row.size for row in rows) == len(content)


def test_a_list_that_breaks_off(tmp_path):
    path = write(tmp_path, "a.json", '[{"a": 1}, {"a": 2}, {"a": oops}]')
    refused(
        path, message=r"a.json is not valid JSON after row 2 \(Expecting value at character 27\), and nothing"
    )


def test_a_file_that_is_damaged_further_on(tmp_path):
    rows = [{"text": random.Random(n).randbytes(500).hex()} for n in range(5000)]
    for name, content in (("a.gz", gzip.compress(json_lines(rows))), ("a.zst", zstd(json_lines(rows)))):
        path = write(tmp_path, name, content[:-1000])
        assert only(path).kind == "JSON lines"
        refused(path, message=f"{name} is compressed, and damaged or cut off")
    refused(write(tmp_path, "a.txt", b"a" * (2 << 20) + b"\xff"), message="is not UTF-8 text: byte 0xff")


def test_values_of_tables_that_python_does_not_have(tmp_path):
    column = pa.StringArray.from_buffers(
        3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")
    )
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": column}), sink)
    good, bad, last = read_rows(only(write(tmp_path, "a.parquet", sink.getvalue())))
    assert isinstance(bad, BadRow) and bad.place.endswith("row 2") and "cannot be read" in bad.reason
    assert (good.content, last.content) == ({"text": "a"}, {"text": "b"})  # type: ignore[union-attr]


def test_rows_are_read_as_they_are_needed(tmp_path):
    rows = [{"text": "a" * 1000}] * 4000
    for dump in (json_list, json_lines):
        path = write(tmp_path, "a.json", dump(rows) + b"oops")
        reading = read_rows(only(path))
        assert isinstance(next(reading), Row)  # the damage is 4 MB further on
    assert isinstance(list(reading)[-1], BadRow)


def test_a_digest_is_of_the_content_and_its_kind(tmp_path):
    a, b = (only(write(tmp_path, name, json_lines(ROWS))) for name in ("a.jsonl", "b.txt"))
    assert (
        a.digest()
        == b.digest()
        == hashlib.sha256(b"JSON lines\n" + hashlib.sha256(json_lines(ROWS)).digest()).digest()
    )
    assert a._replace(kind="text").digest() != a.digest() != only(write(tmp_path, "c", "c")).digest()


@pytest.mark.parametrize("dump", [bytes, gzip.compress, zstd, lambda content: b"\xef\xbb\xbf" + content])
def test_a_prompt_file_gives_the_text_that_training_reads(tmp_path, dump):
    path = write(tmp_path, "a.txt", dump("né\r\n".encode()))
    assert read_text(path).text == contents(only(path))[0] == "né\r\n"
    write(tmp_path, "a.txt", dump(b"\xff"))
    with pytest.raises(ValueError, match=f"^prompt_file: {path} is not UTF-8 text: byte 0xff at offset 0$"):
        read_text(path)


# --- sources ---


@pytest.fixture
def here(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def names(*sources) -> list[str]:
    return [file.name for file in find_data(sources).files]


def left_out(*sources) -> dict[str, str]:
    return dict(find_data(sources).left_out)


def test_a_folder(here):
    for name in ("d/b.jsonl", "d/a/z.jsonl", "d/A.jsonl", "d/.git/x.jsonl", "d/.hidden", "d/a/data"):
        write(here, name, json_lines([{"name": name}]))
    for name in ("README.md", "LICENSE", "a/readme.txt", "dataset_infos.json", ".gitattributes"):
        write(here, f"d/{name}", "about")
    write(here, "d/page.pdf", "%PDF-1")
    write(here, "d/info.json", '{\n"a": 1}')
    (here / "d/gone.jsonl").symlink_to("nowhere")
    (here / "d/a/up").symlink_to("..")
    (here / "d/linked").symlink_to(here / "other")
    write(here, "other/w.jsonl", json_lines([{"name": "other"}]))
    expected = ["d/A.jsonl", "d/a/data", "d/a/z.jsonl", "d/b.jsonl", "d/linked/w.jsonl"]
    assert names("d") == names(Path("d")) == names("d/") == expected
    reasons = left_out("d")
    assert {name for name, reason in reasons.items() if reason == "it is hidden"} == {
        f"d/{name}" for name in (".git", ".hidden", ".gitattributes")
    }
    assert {name for name, reason in reasons.items() if reason == "it is about the data"} == {
        f"d/{name}" for name in ("README.md", "LICENSE", "a/readme.txt", "dataset_infos.json")
    }
    assert reasons["d/gone.jsonl"] == "it is a link to nothing" and "already" in reasons["d/a/up"]
    assert reasons["d/page.pdf"].startswith("it is a PDF; what is read")
    assert "several lines" in reasons["d/info.json"]


def test_folders_that_are_refused(here):
    (here / "empty").mkdir()
    refused("empty", message="^data: empty holds no file that is read$")
    write(here, "pdf/a.pdf", "%PDF-1")
    refused("pdf", message="pdf holds no file that is read: pdf/a.pdf is a PDF")
    write(here, "both/a.txt", "a")
    write(here, "both/b.jsonl", json_lines(ROWS))
    refused(
        "both",
        message=r"texts, such as both/a.txt, and files of rows, such as both/b.jsonl; .*'both/\*\*/\*.jsonl'",
    )
    assert names("both/**/*.jsonl") == ["both/b.jsonl"]
    write(here, "lfs/a.jsonl", "version https://git-lfs.github.com/spec/v1\n")
    refused("lfs", message="git lfs pull")


def test_splits_of_a_folder(here):
    for name in (
        "train.jsonl",
        "test.jsonl",
        "val/a.jsonl",
        "more.jsonl",
        "x/training-1.jsonl",
        "latest.jsonl",
    ):
        write(here, f"d/{name}", json_lines([{"name": name}]))
    assert names("d") == ["d/latest.jsonl", "d/more.jsonl", "d/train.jsonl", "d/x/training-1.jsonl"]
    assert left_out("d") == {
        "d/test.jsonl": "it is of the split test, beside files of train",
        "d/val/a.jsonl": "it is of the split validation, beside files of train",
    }
    assert names("d/val") == ["d/val/a.jsonl"] and names("d/test.jsonl") == ["d/test.jsonl"]
    for name in ("train.py", "test.py"):  # texts have no splits
        write(here, f"code/{name}", name)
    assert names("code") == ["code/test.py", "code/train.py"]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00001.parquet", "train"),
        ("my_train_file.csv", "train"),
        ("TRAIN.jsonl", "train"),
        ("train/test.jsonl", "test"),
        ("en/dev0.jsonl", "validation"),
        ("eval/a.jsonl", "test"),
        ("trainer.jsonl", None),
        ("contest.jsonl", None),
        ("data/0001.jsonl", None),
    ],
)
def test_what_a_path_tells_of_its_split(path, split):
    assert split_of(path) == split


def test_globs(here):
    for name in ("b.jsonl", "a.jsonl", "d/e/c.jsonl", "d/.f.jsonl", "a[1].txt"):
        write(here, f"data/{name}", json_lines([{"name": name}]))
    assert names("data/*.jsonl") == ["data/a.jsonl", "data/b.jsonl"]
    assert names("data/**/*.jsonl") == ["data/a.jsonl", "data/b.jsonl", "data/d/e/c.jsonl"]
    assert names("data/[b]*.jsonl", "data/a.jsonl") == ["data/b.jsonl", "data/a.jsonl"]
    assert names("data/a[1].txt") == ["data/a[1].txt"]  # what exists is meant as it is called
    assert left_out("data/*") == {"data/d": "it is a folder"}
    for pattern in ("data/*.parquet", "nothing/**"):
        with pytest.raises(FileNotFoundError, match="^data: .* matches no file$"):
            find_data([pattern])
    write(here, "data/x.jsonl", "oops")
    refused("data/*.jsonl", message="data/x.jsonl is named as JSON")


def test_a_file_is_read_once(here):
    write(here, "a.jsonl", json_lines(ROWS))
    (here / "link").symlink_to(".")
    assert names("a.jsonl", "*.jsonl", here / "a.jsonl", "link/a.jsonl") == ["a.jsonl"]
    assert left_out("a.jsonl", "link/a.jsonl") == {"link/a.jsonl": "it is named twice, and read once"}


@pytest.mark.parametrize(
    "name", ["nothing", "data/train.jsonl", "org/name.parquet", "org/name.txt", "./a/b", "a/b/c"]
)
def test_what_does_not_exist(here, name):
    with pytest.raises(FileNotFoundError, match=f"^data: {name} does not exist$"):
        find_data([name])


@pytest.fixture
def standard_input(monkeypatch):
    def give(content: bytes):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content), closed=False))
        data_files._spool_standard_input.cache_clear()

    yield give
    data_files._spool_standard_input.cache_clear()


@pytest.mark.parametrize("writer", WRITERS)
def test_standard_input(standard_input, writer):
    kind, dump = WRITERS[writer]
    standard_input(dump(ROWS))
    file = only("-")
    assert (file.name, file.kind) == ("standard input", kind) and contents(file) == ROWS
    assert only("-") == file and contents(only("-")) == ROWS  # it comes only once, and stays


def test_places_and_refusals_of_standard_input(standard_input):
    standard_input(b'{"a": 1}\n[]\n{"a": 1}')
    assert [row.place for row in read_rows(only("-"))] == [f"standard input, line {n}" for n in (1, 2, 3)]
    standard_input(b"")
    refused("-", message="^data: standard input is empty")


# --- datasets of the hub ---

COMMIT = "c" * 40


@pytest.fixture
def store_dataset(hub_cache, here):
    """``store_dataset(*names)``: org/name in the hub's cache, as its library stores it, with these files.

    ``listed``: files that the hub has and the cache has not.
    """

    def store(*paths: str, listed: tuple[str, ...] | None = (), content=None) -> Path:
        home = hub_cache / "datasets--org--name"
        snapshot = home / "snapshots" / COMMIT
        for number, path in enumerate(("README.md", *paths)):
            blob = write(home, f"blobs/{number}", content or json_lines([{"path": path}]))
            (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / path).symlink_to(blob)
        write(home, "refs/main", COMMIT)
        write(home, "refs/v1", COMMIT)
        if listed is not None:
            files = dict.fromkeys(("README.md", *paths, *listed), {"size": 1, "blob_id": "0" * 40})
            write(home, f"trees/{COMMIT}.json", json.dumps({"format_version": 1, "files": files}))
        return snapshot

    return store


def test_the_train_split_of_a_dataset(store_dataset):
    snapshot = store_dataset(
        "data/train-1.jsonl", "data/train-0.jsonl", listed=("data/test-0.jsonl", "name.py", ".gitattributes")
    )
    expected = ["org/name/data/train-0.jsonl", "org/name/data/train-1.jsonl"]
    assert names("org/name") == names(Path("org/name@v1")) == names(f"org/name@{COMMIT}") == expected
    file = find_data(["org/name"]).files[0]
    assert file.path == snapshot / "data/train-0.jsonl" and contents(file) == [{"path": "data/train-0.jsonl"}]
    assert [row.place for row in read_rows(file)] == ["org/name/data/train-0.jsonl, line 1"]
    reasons = left_out("org/name")
    assert reasons["org/name/data/test-0.jsonl"] == "it is of the split test, beside files of train"
    assert "no kind that is read" in reasons["org/name/name.py"]
    assert reasons["org/name/.gitattributes"] == "it is hidden" and "about" in reasons["org/name/README.md"]


def test_files_of_a_dataset_by_name(store_dataset):
    store_dataset("en/train.jsonl", "en/test.jsonl", "de/train.jsonl")
    refused(
        "org/name",
        message=r"several configurations: de, en; .*'org/name:en/\*', or all of them: 'org/name:\*'",
    )
    assert names("org/name:en") == names("org/name:en/*") == ["org/name/en/train.jsonl"]
    assert names("org/name@main:*test*") == ["org/name/en/test.jsonl"]
    assert names("org/name:*") == ["org/name/de/train.jsonl", "org/name/en/train.jsonl"]
    refused("org/name:fr/*", message="no file that matches fr/.*; it has README.md, de/train.jsonl")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("test.jsonl", "dev.jsonl"), r"the splits test, validation, and not train; .*'org/name:\*test\*'"),
        (("test.jsonl",), "the splits test, and not train"),
        (("a.jsonl", "a.parquet"), ".jsonl, .parquet, which may say the same"),
        (("a.py", "b.csv"), "no file that is read; it has README.md, a.py, b.csv"),
    ],
)
def test_datasets_that_are_refused(store_dataset, paths, message):
    store_dataset(*paths)
    refused("org/name", message=f"^data: org/name has .*{message}")


def test_a_dataset_that_is_not_wholly_in_the_cache(store_dataset):
    store_dataset("en/train-0.jsonl", listed=("en/train-1.jsonl",))
    refused("org/name", message="^data: org/name@c+ .*not wholly, in the cache", error=FileNotFoundError)
    assert names("org/name:*train-0*") == ["org/name/en/train-0.jsonl"]


def test_a_cache_of_an_older_library_has_no_list(store_dataset):
    store_dataset("en/train-0.jsonl", listed=None)
    assert names("org/name") == ["org/name/en/train-0.jsonl"]


def test_what_exists_wins_over_a_dataset(store_dataset, here):
    store_dataset("a.jsonl")
    write(here, "org/name", "a text")
    assert only("org/name").kind == "text"


def test_a_dataset_that_is_not_there(hub_cache, here, monkeypatch):
    refused(
        "org/name", message="^data: org/name is no folder here, .*HF_HUB_OFFLINE", error=FileNotFoundError
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("org/name", message=r"data: org/name .*'.\[hub\]'", error=MissingExtra)


def test_lines_that_end_as_old_macs_end_them_are_told_so(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\r{"text": "b"}\r')
    with pytest.raises(ValueError, match=r"beginning is not valid JSON \(Extra data at character 13\)"):
        find_data([file])
