"""Datasets by their ids on the Hugging Face Hub: which of their files are read, chosen by their names."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from jsparse.hub import fetch_files, list_dataset, split_id
from jsparse.texts.files.data_names import LeftOut, split_of, why_left_out, without_other_splits
from jsparse.texts.files.file_kinds import FILE_NAMES, JSON_NAMES, suffix_of

_READ = (*JSON_NAMES, ".parquet", ".arrow", ".txt")


class HubDataset(NamedTuple):
    """A dataset, its revision (None: the main branch) and a glob of its files (None: all that are data)."""

    repository: str
    revision: str | None
    pattern: str | None


def dataset_of(source: str) -> HubDataset | None:
    """The dataset that a source names: ``org/name``, ``org/name@revision``, with ``:path/glob`` behind it.

    None for what exists here, for what is no id, and for what is named as a file is.

    >>> dataset_of("org/name@main:en/*.parquet")
    HubDataset(repository='org/name', revision='main', pattern='en/*.parquet')
    >>> dataset_of("data/train.jsonl")
    """
    name, _, pattern = source.partition(":")
    given = split_id(name)
    if given is None or Path(source).exists() or suffix_of(name) in FILE_NAMES:
        return None
    return HubDataset(*given, pattern or None)


def fetch_dataset(dataset: HubDataset) -> tuple[Path, list[str], list[LeftOut]]:
    """The folder of a dataset in the hub's cache, the paths in it to read, and what is left out.

    Raises ValueError as :func:`choose_files` does; FileNotFoundError for a dataset that is not there or may
    not be read; MissingExtra if huggingface_hub is not installed.
    """
    folder, paths = list_dataset(dataset.repository, dataset.revision)
    chosen, left_out = choose_files(paths, dataset)
    fetch_files(dataset.repository, folder, chosen)
    return folder, chosen, left_out


def choose_files(paths: Sequence[str], dataset: HubDataset) -> tuple[list[str], list[LeftOut]]:
    """Which files of a dataset are read, and which are left out, with reasons.

    Those of kinds that are read, by their names. If some are of a train split, those of others are left out.

    - paths: all files of the dataset.
    - dataset: with a pattern, only the files that match it count: a glob, whose ``*`` matches slashes too,
      or a folder.

    Raises ValueError where people must choose: several configurations (folders), several formats, or splits
    of which none is train; and if nothing is left.

    >>> dataset = HubDataset("org/name", None, None)
    >>> choose_files(["README.md", "data/train-0.parquet", "data/test-0.parquet"], dataset)[0]
    ['data/train-0.parquet']
    """
    name, pattern = dataset.repository, dataset.pattern
    matching = sorted(path for path in paths if pattern is None or _matches(path, pattern))
    if not matching:
        raise ValueError(f"data: {name} has no file that matches {pattern}; it has {_some(sorted(paths))}")
    left_out = {path: reason for path in matching if (reason := _why_not(path)) is not None}
    chosen, others = without_other_splits([path for path in matching if path not in left_out])
    if not chosen:
        raise ValueError(f"data: {name} has no file that is read; it has {_some(matching)}")

    select = f"name those to read, as in '{name}:{{}}'"
    splits = sorted({split for path in chosen if (split := split_of(path)) not in (None, "train")})
    if splits and (pattern is None or len(splits) > 1):
        raise ValueError(
            f"data: {name} has the splits {', '.join(map(str, splits))}, and not train; "
            + select.format(f"*{splits[0]}*")
        )
    folders = sorted({_configuration(path) for path in chosen})
    if len(folders) > 1 and pattern is None:
        named = [folder or "(no folder)" for folder in folders]
        raise ValueError(
            f"data: {name} has several configurations: {_some(named)}; "
            + select.format(f"{folders[-1]}/*")
            + f", or all of them: '{name}:*'"
        )
    formats = sorted({suffix_of(path) for path in chosen})
    if len(formats) > 1:
        raise ValueError(
            f"data: {name} has files of several formats, {', '.join(formats)}, which may say the same; "
            + select.format(f"*{formats[0]}*")
        )
    return chosen, [*(LeftOut(path, reason) for path, reason in left_out.items()), *others]


def _matches(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or path.startswith(f"{pattern.rstrip('/')}/")


def _why_not(path: str) -> str | None:
    for part in PurePosixPath(path).parts:
        if reason := why_left_out(part):
            return reason
    return None if suffix_of(path) in _READ else "its name is of no kind that is read from a dataset"


def _configuration(path: str) -> str:
    """The folder of a file, without the folders that are named after splits, and without data/."""
    folders = PurePosixPath(path).parent.parts
    return "/".join(part for part in folders if part != "data" and split_of(part) is None)


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:10]) + (f" and {len(paths) - 10} more" if len(paths) > 10 else "") or "none"
