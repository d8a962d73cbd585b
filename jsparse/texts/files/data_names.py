"""What the names of files in a folder or a dataset tell: their split, and which are about the data."""

import re
from pathlib import PurePosixPath
from typing import NamedTuple

_ABOUT = re.compile(
    r"(readme|licen[cs]e|notice|copying|citation|changelog|contributing)\b.*"
    r"|dataset_infos?\.json|dataset_dict\.json|state\.json|__pycache__",
    re.IGNORECASE,
)
# The words by which the datasets library knows a split, where no letter stands beside them.
_SPLITS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}


class LeftOut(NamedTuple):
    """A file or folder that was come across and is not read, and why: "it is hidden"."""

    name: str
    reason: str


def why_left_out(name: str) -> str | None:
    """Why a file or folder of this name is not read where a whole folder is; None if it is.

    >>> why_left_out(".gitattributes"), why_left_out("README.md"), why_left_out("a.jsonl")
    ('it is hidden', 'it is about the data', None)
    """
    if name.startswith("."):
        return "it is hidden"
    return "it is about the data" if _ABOUT.fullmatch(name) else None


def split_of(path: str) -> str | None:
    """The split that a path tells: in the name of the file, or else in that of a folder.

    >>> split_of("data/train-00000-of-00001.parquet"), split_of("test/part.jsonl"), split_of("latest.json")
    ('train', 'test', None)
    """
    for part in reversed(PurePosixPath(path).parts):
        for split, words in _SPLITS.items():
            if re.search(rf"(?<![^\W\d_])({words})(?![^\W\d_])", part, re.IGNORECASE):
                return split
    return None


def without_other_splits(paths: list[str]) -> tuple[list[str], list[LeftOut]]:
    """The paths without those of other splits, if some are of the train split, and those left out.

    >>> without_other_splits(["train.jsonl", "test.jsonl"])
    (['train.jsonl'], [LeftOut(name='test.jsonl', reason='it is of the split test, beside files of train')])
    """
    splits = {path: split_of(path) for path in paths}
    if "train" not in splits.values():
        return paths, []
    others = {path: split for path, split in splits.items() if split not in ("train", None)}
    return [path for path in paths if path not in others], [
        LeftOut(path, f"it is of the split {split}, beside files of train") for path, split in others.items()
    ]
