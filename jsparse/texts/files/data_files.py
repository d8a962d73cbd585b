"""The files of training data that people name: files, folders, globs, datasets of the hub, standard input."""

import atexit
import functools
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from jsparse.texts.files.data_names import LeftOut, why_left_out, without_other_splits
from jsparse.texts.files.file_kinds import ROWS, DataFile, NotData, look_at
from jsparse.texts.files.hub_datasets import HubDataset, dataset_of, fetch_dataset

STANDARD_INPUT = "standard input"


class Found(NamedTuple):
    """The files to read, in order, and what is left out."""

    files: tuple[DataFile, ...]
    left_out: tuple[LeftOut, ...]


class _Place(NamedTuple):
    path: Path
    name: str


def find_data(sources: Sequence[str | Path]) -> Found:
    """The files that ``sources`` name, each with what it is, which is read from its content.

    A source is

    - a file;
    - a folder: the files in it and in its folders, without those that are hidden or about the data
      (README, LICENSE, dataset_infos.json), those of a kind that is not read, and, if some are of a train
      split, those of the others. It must not hold texts beside files of rows;
    - a glob, ``data/*.jsonl`` or ``data/**/*.txt``: all files that match;
    - a dataset of the Hugging Face Hub: ``org/name`` or ``org/name@revision``, of which ``choose_files`` says
      which files are read; ``org/name:path/glob`` names them;
    - ``-``: standard input, read once, to its end, into a temporary file.

    What exists is taken as it is called, a glob's characters in its name or not. The order is that of
    ``sources``; within a folder or a glob, that of the paths. A file that is come across again is read once.

    Returns the files, and what was left out, with reasons.

    Raises FileNotFoundError for a source that does not exist or matches nothing; ValueError for one that
    holds nothing to read, and for a file that is not what it must be (``look_at``); MissingExtra if a
    package that is needed is not installed.

    >>> Path("data").mkdir()
    >>> Path("data", "a.jsonl").write_text('{"text": "a"}')
    13
    >>> Path("data", "README.md").write_text("# About a")
    9
    >>> files, left_out = find_data(["data"])
    >>> files
    (DataFile(path=PosixPath('data/a.jsonl'), name='data/a.jsonl', kind='JSON lines', size=13),)
    >>> left_out
    (LeftOut(name='data/README.md', reason='it is about the data'),)
    """
    files: dict[Path, DataFile] = {}
    left_out: list[LeftOut] = []
    for source in map(str, sources):
        for file in _find(source, left_out):
            # Not the file behind a link: in the hub's cache, files of equal content are links to one.
            place = file.path.parent.resolve() / file.path.name
            if place in files:
                left_out.append(LeftOut(file.name, "it is named twice, and read once"))
            files.setdefault(place, file)
    return Found(tuple(files.values()), tuple(dict.fromkeys(left_out)))


def _find(source: str, left_out: list[LeftOut]) -> Iterable[DataFile]:
    if source == "-":
        return [look_at(_spool_standard_input(), STANDARD_INPUT)]
    path = Path(source)
    if path.is_dir():
        return _files_of_a_folder(list(_walk(path, left_out)), str(path), left_out)
    if path.exists():
        if not path.is_file():
            raise ValueError(f"data: {source} is no file; `-` reads standard input")
        return [look_at(path, str(path))]
    if (dataset := dataset_of(source)) is not None:
        return _files_of_a_dataset(dataset, left_out)
    if glob.has_magic(source):
        return _files_of_a_glob(source, left_out)
    raise FileNotFoundError(f"data: {source} does not exist")


def _files_of_a_dataset(dataset: HubDataset, left_out: list[LeftOut]) -> list[DataFile]:
    name = dataset.repository
    folder, paths, others = fetch_dataset(dataset)
    left_out += [LeftOut(f"{name}/{path}", reason) for path, reason in others]
    return _files_of_a_folder([_Place(folder / path, f"{name}/{path}") for path in paths], name, left_out)


def _files_of_a_glob(pattern: str, left_out: list[LeftOut]) -> list[DataFile]:
    found = sorted({Path(name) for name in glob.iglob(pattern, recursive=True)})
    files = [path for path in found if path.is_file()]
    if not files:
        raise FileNotFoundError(f"data: {pattern} matches no file")
    if "**" not in pattern:
        left_out += [LeftOut(str(path), "it is a folder") for path in found if path.is_dir()]
    return [look_at(path, str(path)) for path in files]


def _walk(folder: Path, left_out: list[LeftOut]) -> Iterator[_Place]:
    """The files of a folder and its folders, sorted; through links too, but never into a folder twice."""
    seen = set()

    def refuse(error: OSError):
        raise ValueError(f"data: {error.filename} cannot be read: {error.strerror}") from error

    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        seen.add(os.path.realpath(root))
        for name in sorted(folders):
            path = Path(root, name)
            reason = why_left_out(name)
            if reason is None and os.path.realpath(path) in seen:
                reason = "it is a link to a folder that is read already"
            if reason is not None:
                folders.remove(name)
                left_out.append(LeftOut(str(path), reason))
        folders.sort()
        for name in sorted(names):
            path = Path(root, name)
            reason = why_left_out(name)
            if reason is None and not path.is_file():
                reason = "it is a link to nothing" if path.is_symlink() else "it is no file"
            if reason is None:
                yield _Place(path, str(path))
            else:
                left_out.append(LeftOut(str(path), reason))


def _files_of_a_folder(places: list[_Place], folder: str, left_out: list[LeftOut]) -> list[DataFile]:
    files, refused = [], []
    for path, name in sorted(places):
        try:
            files.append(look_at(path, name))
        except NotData as error:
            refused.append(LeftOut(name, str(error).removeprefix(f"data: {name} ")))
    if not files:
        why = f": {refused[0].name} {refused[0].reason}" if refused else ""
        raise ValueError(f"data: {folder} holds no file that is read{why}")
    left_out += [LeftOut(name, f"it {reason}") for name, reason in refused]
    texts = [file for file in files if file.kind not in ROWS]
    rows = [file for file in files if file.kind in ROWS]
    if texts and rows:
        raise ValueError(
            f"data: {folder} holds texts, such as {texts[0].name}, and files of rows, such as "
            f"{rows[0].name}; name those to read, as in '{folder}/**/*{PurePosixPath(rows[0].name).suffix}'"
        )
    if not rows:
        return texts
    by_path = {os.path.relpath(file.name, folder): file for file in rows}
    kept, others = without_other_splits(list(by_path))
    left_out += [LeftOut(by_path[path].name, reason) for path, reason in others]
    return [by_path[path] for path in kept]


@functools.cache
def _spool_standard_input() -> Path:
    """A temporary file with all that standard input holds, until the process ends."""
    if sys.stdin is None or sys.stdin.closed:
        raise ValueError("data: - is standard input, which is closed")
    with tempfile.NamedTemporaryFile(prefix="jsparse-stdin-", delete=False) as spool:
        atexit.register(Path(spool.name).unlink, missing_ok=True)
        shutil.copyfileobj(sys.stdin.buffer, spool)
    return Path(spool.name)
