"""Models by their ids on the Hugging Face Hub: ``org/name`` or ``org/name@revision`` in place of a folder."""

import contextlib
import functools
import re
from collections.abc import Iterator
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
    require_extra(
        "huggingface_hub", "hub", f"{name} is no folder here, and the hub's library is not installed"
    )
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):  # a bar for a few small files, most often in the cache already, is noise
        def __init__(self, *args, **options):
            super().__init__(*args, **options | {"disable": True})

    with _explained(name, repository):
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=_SMALL_FILES,
            ignore_patterns=NEVER,
            tqdm_class=Silent,
        )
    return Path(folder)


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
def _explained(name: str, repository: str) -> Iterator[None]:
    """The library's errors in one line that says what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repository}"
    try:
        yield
    except errors.GatedRepoError as error:  # a RepositoryNotFoundError too
        raise FileNotFoundError(
            f"{name} is gated: accept its license on {page}, then set HF_TOKEN or run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is neither a folder here nor a model at {page}; if it is private, set HF_TOKEN or run "
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
