"""The data of a fine-tuning run: found, told apart by digests, and stored as windows in its output folder."""

import contextlib
import dataclasses
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer
from tokenizers import Tokenizer

from jsparse.models import LlamaConfig
from jsparse.models.end_token import end_token
from jsparse.reports.console import for_terminal
from jsparse.texts.chat_template import find_chat_template
from jsparse.texts.documents import needs_chat_template
from jsparse.texts.files.data_files import Found, find_data
from jsparse.texts.findings import Findings
from jsparse.train.config import FinetuneConfig
from jsparse.train.data.batches import digest_data
from jsparse.train.data.overlap import count_shared
from jsparse.train.data.windows import HEADER, Windows, open_windows, read_findings, write_windows
from jsparse.train.run.identity import DATA
from jsparse.train.run.processes import is_first_process, wait_for_all

_LOG = logging.getLogger("jsparse")


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run reads, before anything is tokenised.

    - files, eval_files: of the training data and of the held-out data, if there are any.
    - digest, eval_digest: SHA-256 of all that their windows are made of.
    - settings: how rows become windows, as ``digest_data`` takes it.
    """

    files: Found
    eval_files: Found | None
    digest: str
    eval_digest: str | None
    tokenizer: Tokenizer
    vocab_size: int
    settings: dict[str, Any]


class RunWindows(NamedTuple):
    """The windows of a run, of which ``rows`` have a target and are taken, and those of its held-out data."""

    windows: Windows
    rows: Integer[np.ndarray, " M"]
    held_out: Windows | None
    findings: Findings
    eval_findings: Findings | None


def find_run_data(config: FinetuneConfig, tokenizer: Tokenizer, model: LlamaConfig) -> RunData:
    """The files of a run and their digests. Raises what ``find_data`` raises, naming data or eval_data.

    Raises ValueError for an output folder in a folder of data too: a run that is resumed would read itself.
    """
    _require_apart(config)
    files, eval_files, eval_digest = find_data(config.data_files), None, None
    if config.eval_files:
        with _of_eval_data():
            eval_files = find_data(config.eval_files)
    reading = config.reading
    is_rendered = any(needs_chat_template(some, reading) for some in (files, eval_files) if some is not None)
    settings = {
        "context": config.context,
        "eos_token_id": end_token(config.model, tokenizer, model),
        "chat_template": find_chat_template(config.model) if is_rendered else None,
        "reading": reading,
    }
    if eval_files is not None:
        eval_digest = digest_data(eval_files, tokenizer, **settings)
    digest = digest_data(files, tokenizer, **settings)
    return RunData(files, eval_files, digest, eval_digest, tokenizer, model.vocab_size, settings)


def _require_apart(config: FinetuneConfig) -> None:
    output = config.output_folder.resolve()
    for name, sources in (("data", config.data_files), ("eval_data", config.eval_files)):
        for source in sources:
            # Of a pattern, the folder that all it matches is in, if it goes down into folders.
            folder = source if source.exists() else Path(str(source).partition("**")[0])
            is_read = "**" in str(source) or source.is_dir()
            if is_read and folder.is_dir() and output.is_relative_to(folder.resolve()):
                raise ValueError(
                    f"output={config.output} is in {name}={source}, so the run would read what it wrote "
                    "when it is resumed; choose an output folder elsewhere, or name the files"
                )


def store_run_data(data: RunData, output: Path, *, progress: bool) -> RunWindows:
    """The windows of a run on disk, from an earlier call or made now, and what is to be said about them."""
    held_out, eval_findings = None, None
    if data.eval_files is not None and data.eval_digest is not None:
        folder = output / DATA / f"held-out-{data.eval_digest[:16]}"
        with _of_eval_data():
            held_out = _windows(data, data.eval_files, folder, progress=progress, may_be_short=True)
            _rows(held_out)
        eval_findings = read_findings(folder)
    folder = output / DATA / data.digest[:16]
    windows = _windows(data, data.files, folder, progress=progress)
    return RunWindows(windows, _rows(windows), held_out, read_findings(folder), eval_findings)


def print_findings(findings: Findings | None, name: str) -> None:
    """Say on stderr what was found in the data of this name, if there are any."""
    for line in [] if findings is None else findings.lines():
        print(for_terminal(f"{name}: {line}"), file=sys.stderr)


def warn_of_windows(data: RunWindows) -> None:
    """One line for windows that are not taken."""
    without = len(data.windows) - len(data.rows)
    if without:
        _LOG.warning("note: %d of %d windows have no target and are not taken", without, len(data.windows))


def warn_of_overlap(data: RunWindows, *, pairs: bool) -> None:
    """One line for held-out samples that are trained on; ``pairs`` are one sample each."""
    if data.held_out is None:
        return
    shared, samples = count_shared(data.held_out, data.windows, pairs=pairs)
    if shared:
        _LOG.warning(
            "warning: %d of %d samples of eval_data are in data too, so the held-out loss is too low",
            shared,
            samples,
        )


def _rows(windows: Windows) -> Integer[np.ndarray, " M"]:
    """The windows that have a target, of which there must be one."""
    rows = windows.with_targets()
    if not len(rows):
        raise ValueError(
            f"data: in {len(windows)} window(s) of context={windows.context} tokens, none has a target; "
            "give more text"
        )
    return rows


def _windows(
    data: RunData, files: Found, folder: Path, *, progress: bool, may_be_short: bool = False
) -> Windows:
    """Made by the first process only."""
    if is_first_process() and not (folder / HEADER).is_file():
        write_windows(
            files,
            data.tokenizer,
            folder,
            vocab_size=data.vocab_size,
            progress=progress,
            may_be_short=may_be_short,
            **data.settings,
        )
    wait_for_all(f"data in {folder.name}")
    return open_windows(folder)


@contextlib.contextmanager
def removed_on_failure(*folders: Path) -> Iterator[None]:
    """Remove folders after an error within this context, except those that were there before."""
    new = [folder for folder in folders if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in new if is_first_process() else ():
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def _of_eval_data() -> Iterator[None]:
    """Errors of files name ``data``; within this context they name ``eval_data``."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        if not message.startswith("data: "):
            raise
        raise type(error)(f"eval_{message}") from error
