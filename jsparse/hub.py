"""Models and datasets by their ids on the Hugging Face Hub: ``org/name`` or ``org/name@revision``."""

import contextlib
import functools
import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from jsparse.extras import require_extra

# The hub's rules for names, and git's for revisions, which may have slashes (refs/pr/1).
_NAME = r"\w(?:[\w.-]{0,94}\w)?"
_REVISION = r"\w[\w.+-]*(?:/\w[\w.+-]*)*"
_ID = re.compile(rf"({_NAME}/{_NAME})(?<!\.git)(?:@({_REVISION}))?", re.ASCII)

# Beside a model's config.json and weights: what those who read its folder need too (transformers, vLLM,
# llama.cpp's converter), and the terms on which a copy may be passed on.
TOKENIZER_FILES = (
    "tokenizer*",  # tokenizer.json, tokenizer_config.json, tokenizer.model, tokenizer.model.v3
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",  # SentencePiece by its other names: spiece.model, sentencepiece.bpe.model
    "*.tiktoken",
    "tekken.json",
)
CHAT_TEMPLATE_FILES = ("*.jinja", "chat_template.json", "additional_chat_templates/*")
GENERATION_FILE = "generation_config.json"
LICENCE_FILES = ("LICEN[CS]E*", "Licen[cs]e*", "licen[cs]e*", "NOTICE*", "USE_POLICY*")
COMPANIONS = (*TOKENIZER_FILES, *CHAT_TEMPLATE_FILES, GENERATION_FILE, *LICENCE_FILES)

_SMALL_FILES = [
    "config.json",
    "adapter_config.json",
    "hf_quant_config.json",
    "model.safetensors.index.json",
    "attention_pattern.json",  # ours: what each head saw in training
    "full_attention_heads.tsv",  # DuoAttention's head pattern
    *COMPANIONS,
]
# Whatever can run code, and weights and tokenizers once more, in folders or under the name of another format.
NEVER = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.py", "*/*.safetensors", "*/*.model", "consolidated*"]


def model_folder(model: str | Path, *, weights: bool = False) -> Path:
    """The folder of a model that is given as a folder or by its id on the Hugging Face Hub.

    What exists here wins over an id. The files of an id are fetched into the hub's cache, which other
    libraries share: its configuration, tokenizer and licence, and the safetensors only if
    ``weights``. Pickles and Python files are never fetched. An id without a commit is looked up once per
    process. If the hub cannot be reached, or HF_HUB_OFFLINE=1, what the cache has is used.

    - model: a folder, ``org/name``, or ``org/name@revision`` with a branch, a tag or a commit.
    - weights: whether the weights are needed too.

    Returns ``model`` itself if it exists, and otherwise a folder of the cache.

    Raises FileNotFoundError for what is neither a folder nor an id, and for a repository, revision or file
    that is not there or may not be read; MissingExtra if huggingface_hub is not installed.

    >>> Path("my-llama").mkdir()
    >>> model_folder("my-llama").name
    'my-llama'
    >>> model_folder("a/path/to/nothing")
    Traceback (most recent call last):
    FileNotFoundError: a/path/to/nothing does not exist; a model is a folder with a config.json, or an id on \
the Hugging Face Hub: org/name or org/name@revision
    """
    given = _read_id(model)
    if given is None:
        return Path(model)
    repository, revision = given
    folder = _fetch_small(repository, revision)
    if weights:
        _fetch_weights(repository, folder)
    return folder


def pinned_model(model: str | Path) -> str:
    """The name under which a model is recorded: an id with its commit, ``org/name@commit``, or the folder.

    Raises what :func:`model_folder` raises.

    >>> pinned_model(Path("."))
    '.'
    """
    given = _read_id(model)
    return str(model) if given is None else f"{given[0]}@{model_folder(model).name}"


def split_id(model: str | Path) -> tuple[str, str | None] | None:
    """Repository and revision of an id; None for what exists here, and for what is no id.

    >>> split_id("meta-llama/Llama-3.1-8B@main"), split_id("org/name"), split_id("/org/name")
    (('meta-llama/Llama-3.1-8B', 'main'), ('org/name', None), None)
    """
    match = _ID.fullmatch(str(model))
    if match is None or Path(model).exists():
        return None
    repository, revision = match.groups()
    return None if "--" in repository or ".." in str(model) else (repository, revision)


def advise_download(repository: str, revision: str | None) -> str:
    """The command that fetches all files of a revision, those that are never fetched here too.

    >>> advise_download("org/name", "main")
    '`hf download org/name --revision main --local-dir FOLDER`'
    """
    at = "" if revision is None else f" --revision {revision}"
    return f"`hf download {repository}{at} --local-dir FOLDER`"


def _read_id(model: str | Path) -> tuple[str, str | None] | None:
    """As :func:`split_id`, but what neither exists nor is an id is refused."""
    given = split_id(model)
    if given is None and not Path(model).exists():
        raise FileNotFoundError(
            f"{model} does not exist; a model is a folder with a config.json, or an id on the Hugging Face "
            "Hub: org/name or org/name@revision"
        )
    return given


@functools.cache
def _fetch_small(repository: str, revision: str | None) -> Path:
    """The snapshot of a revision in the cache, with all but the weights; once per process."""
    name = repository if revision is None else f"{repository}@{revision}"
    patterns = {"allow_patterns": _SMALL_FILES, "ignore_patterns": NEVER}
    return _download_silently(name, repository, revision, **patterns)


def _download_silently(name: str, repository: str, revision: str | None, **options) -> Path:
    """The snapshot of a revision in the cache, with the few small files that ``options`` name."""
    require_extra(
        "huggingface_hub", "hub", f"{name} is no folder here, and the hub's library is not installed"
    )
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):  # a bar for a few small files, most often in the cache already, is noise
        def __init__(self, *args, **options):
            super().__init__(*args, **options | {"disable": True})

    with _explained(name, repository, options.get("repo_type", "model")):
        folder = snapshot_download(repository, revision=revision, tqdm_class=Silent, **options)
    return Path(folder)


@functools.cache
def list_dataset(repository: str, revision: str | None) -> tuple[Path, tuple[str, ...]]:
    """The folder of a dataset in the cache, named after the commit, and the paths of all its files.

    The files themselves are not fetched yet. Without a network the list is that of the last time; a cache
    that has none, made by an older library, is believed to be whole.

    Raises FileNotFoundError for a dataset or revision that is not there or may not be read; MissingExtra if
    huggingface_hub is not installed.
    """
    name = repository if revision is None else f"{repository}@{revision}"
    # Asking for files that nearly all have is how the library takes and keeps the list of the others.
    first = [".gitattributes", "README.md"]
    options = {"repo_type": "dataset", "allow_patterns": first}
    try:
        folder = _download_silently(f"data: {name}", repository, revision, **options)
    except FileNotFoundError as error:
        # Without a network, those files may be what the cache lacks; it knows the list all the same.
        folder = _cached_dataset(repository, revision, error.__cause__)
        if folder is None:
            raise
    from huggingface_hub import errors, get_cached_repo_tree

    try:
        files = get_cached_repo_tree(repository, repo_type="dataset", revision=folder.name)
        paths = [file.path for file in files]
    except errors.CachedRepoTreeNotFoundError:
        paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return folder, tuple(sorted(paths))


def _cached_dataset(repository: str, revision: str | None, error: BaseException | None) -> Path | None:
    """The folder of a dataset that is in the cache in part, None if it is not, or if the error is another."""
    from huggingface_hub import errors, snapshot_download

    if not isinstance(error, errors.LocalEntryNotFoundError):
        return None
    try:
        options = {"repo_type": "dataset", "revision": revision, "local_files_only": True}
        return Path(snapshot_download(repository, **options))
    except errors.IncompleteSnapshotError as incomplete:
        return Path(incomplete.snapshot_path)
    except errors.LocalEntryNotFoundError:
        return None


def fetch_files(repository: str, folder: Path, paths: Sequence[str]) -> None:
    """Bring files of a dataset into its folder of the cache, unless they are there.

    - folder: what :func:`list_dataset` gave.
    - paths: files in it, as it lists them.

    Raises FileNotFoundError if the hub does not give them.
    """
    from huggingface_hub import snapshot_download

    missing = [path for path in paths if not (folder / path).is_file()]
    if missing:
        with _explained(f"data: {repository}@{folder.name}", repository, "dataset"):
            snapshot_download(
                repository,
                repo_type="dataset",
                revision=folder.name,
                allow_patterns=[glob.escape(path) for path in missing],
            )
    if missing := [path for path in missing if not (folder / path).is_file()]:
        raise FileNotFoundError(
            f"data: {repository}@{folder.name} has no {missing[0]} in {folder}: the cache is incomplete, and "
            "is filled without HF_HUB_OFFLINE and with a network"
        )


@functools.cache
def _fetch_weights(repository: str, folder: Path) -> None:
    """Bring the safetensors of a commit into its snapshot, unless they are there; once per process.

    Raises FileNotFoundError if the snapshot then has none, or not all that its index names.
    """
    from huggingface_hub import errors, snapshot_download

    name = f"{repository}@{folder.name}"
    get = functools.partial(
        snapshot_download,
        repository,
        revision=folder.name,
        allow_patterns=["*.safetensors"],
        ignore_patterns=NEVER,
    )
    with contextlib.suppress(errors.LocalEntryNotFoundError):
        get(local_files_only=True)  # a cache of an older library does not know what it lacks
        if not _missing_weights(folder):
            return
    with _explained(name, repository):
        get()
    if missing := _missing_weights(folder):
        raise FileNotFoundError(
            f"{name} has no {', '.join(missing)} in {folder}: the cache is incomplete, and is filled without "
            "HF_HUB_OFFLINE and with a network; or the repository has only pickled weights, which can run "
            f"code and are not fetched: {advise_download(repository, folder.name)} fetches them, and jsparse "
            "convert --model FOLDER --output NEW_FOLDER writes safetensors"
        )


def _missing_weights(folder: Path) -> list[str]:
    """The safetensors that an index names and the folder lacks; without an index, whether there are any."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        found = any(file.is_file() for file in folder.glob("*.safetensors"))  # and not a link to nowhere
        return [] if found else ["*.safetensors"]
    text = index.read_text(encoding="utf-8", errors="replace")  # whoever reads all of it says what is wrong
    shards = set(re.findall(r'"([^"/\\]+\.safetensors)"', text))
    return sorted(shard for shard in shards if not (folder / shard).is_file())


@contextlib.contextmanager
def _explained(name: str, repository: str, kind: str = "model") -> Iterator[None]:
    """The library's errors in one line that says what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{repository}"
    try:
        yield
    except errors.GatedRepoError as error:  # a RepositoryNotFoundError too
        raise FileNotFoundError(
            f"{name} is gated: accept its license on {page}, then set HF_TOKEN or run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is neither a folder here nor a {kind} at {page}; if it is private, set HF_TOKEN or run "
            "`hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name}: {page} has no such branch, tag or commit") from error
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(_not_cached(name, error)) from error


def _not_cached(name: str, error: Exception) -> str:
    from huggingface_hub import constants, is_offline_mode

    what = f"{name} is no folder here, and is not, or not wholly, in the cache {constants.HF_HUB_CACHE}"
    if is_offline_mode():
        return f"{what}; run once without HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, to download it"
    return f"{what}, and {constants.ENDPOINT} cannot be reached ({error.__cause__ or error})"
