"""A folder of safetensors: one file, or shards with an index. Headers are checked before tensors are read."""

import collections
import contextlib
import dataclasses
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@contextlib.contextmanager
def written_whole(directory: Path, *, last: str) -> Iterator[Path]:
    """A folder to write files into, which are flushed and moved into ``directory`` when the block ends.

    Weights go first. The file called ``last``, which makes the folder complete, goes last. A crash, or an
    error in the block, leaves what was there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    staging = directory / ".saving"
    shutil.rmtree(staging, ignore_errors=True)  # of a save that was killed
    staging.mkdir()
    try:
        yield staging
        new = sorted(staging.iterdir(), key=lambda file: (file.name == last, file.suffix != ".safetensors"))
        for file in new:
            shutil.copymode(staging / last, file)  # safetensors makes its files private
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
        for file in new:
            os.replace(file, directory / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what its header says."""

    file: Path
    name: str
    dtype: str  # safetensors' name: "BF16", "F16", "F32", ...
    shape: tuple[int, ...]


def find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder by name, from the headers alone.

    Raises FileNotFoundError for no weights, pickled weights (they are never opened) and missing shards;
    ValueError for both layouts at once, file names that lead out of the folder, a name that is there twice,
    and an index that disagrees with its shards.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.exists() and index.exists():
        raise ValueError(f"{directory} has both {SINGLE} and {INDEX}; remove the one that is out of date")
    if single.exists():
        return read_header(_inside(directory, SINGLE))
    if index.exists():
        return _read_shards(directory, index)
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES)
    if pickles:
        names = ", ".join(pickles)
        raise FileNotFoundError(
            f"{directory} has weights only as pickle files ({names}), which can run code and are not opened; "
            f"allowed is {SINGLE}: in transformers, model.save_pretrained(directory) writes it"
        )
    raise FileNotFoundError(f"{directory} has neither {SINGLE} nor {INDEX}")


def _read_shards(directory, index):
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to file names")
    files = {name: _inside(directory, name) for name in sorted(set(weight_map.values()))}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names shards that do not exist: {', '.join(missing)}")
    tensors: dict[str, StoredTensor] = {}
    problems = []
    for name, path in files.items():
        for tensor, stored in read_header(path).items():
            if tensor in tensors:
                problems.append(f"{tensor} is in {tensors[tensor].file.name} and in {name}")
            elif weight_map.get(tensor) != name:
                problems.append(f"{tensor} is in {name}, not in {weight_map.get(tensor, 'the index')}")
            tensors[tensor] = stored
    problems += [f"{tensor} is not in {weight_map[tensor]}" for tensor in weight_map if tensor not in tensors]
    if problems:
        raise ValueError(f"{index} disagrees with the shards: {'; '.join(problems)}")
    return tensors


def _inside(directory, name):
    """The path of a file that the checkpoint names, if it stays in the checkpoint.

    A link may lead to another file of the folder, or to where the Hugging Face cache keeps its files:
    ``<repository>/snapshots/<revision>/<file>`` links to ``<repository>/blobs``.
    """
    if name != os.path.basename(name) or "\\" in name or not name.endswith(".safetensors"):
        raise ValueError(
            f"{name!r} is not the name of a .safetensors file in {directory}; paths are not allowed"
        )
    path = directory / name
    home = directory.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if path.is_symlink() and path.resolve().parent not in allowed:
        raise ValueError(
            f"{path} is a link that leads out of the checkpoint, to {path.resolve()}; that is not allowed"
        )
    return path


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Names, dtypes and shapes in a safetensors file. Unlike the library, refuses duplicate names."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(
                f"{file} is not a safetensors file, or is cut short: header of {length} in {size} bytes"
            )
        header = _parse_json(stream.read(length), file)
    header.pop("__metadata__", None)
    try:
        return {
            name: StoredTensor(file, name, entry["dtype"], tuple(int(n) for n in entry["shape"]))
            for name, entry in header.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} has a malformed safetensors header: {error!r}") from error


def read_tensor(stored: StoredTensor) -> np.ndarray:
    """The values of a tensor; ValueError if the file turns out to be damaged."""
    try:
        with safetensors.safe_open(stored.file, framework="numpy") as opened:
            return opened.get_tensor(stored.name)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{stored.file} cannot be read: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError if it is not one, or has a key twice."""
    return _parse_json(file.read_bytes(), file)


def _parse_json(text, file):
    def refuse_duplicates(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        twice = [key for key, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"keys are there twice: {', '.join(twice)}")
        return dict(pairs)

    try:
        parsed = json.loads(text, object_pairs_hook=refuse_duplicates)
    except ValueError as error:  # JSON and UTF-8 errors are ValueErrors too
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(parsed).__name__}")
    return parsed
