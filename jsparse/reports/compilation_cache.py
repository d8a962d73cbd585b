"""Where the commands keep what jax has compiled, so that the same command starts faster the next time."""

import hashlib
import os
import platform
import stat
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

SETTING = "JSPARSE_COMPILATION_CACHE"
_OF_JAX = "JAX_COMPILATION_CACHE_DIR"
_LEAST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_SECONDS = (
    "0.1"  # what compiles faster is not kept; jax's own limit, a second, leaves out most of a small model
)


def use_compilation_cache() -> None:
    """Let this process keep compiled programs, in a folder that only its user can write.

    The folder is ``$XDG_CACHE_HOME/jsparse/compiled`` (``~/.cache`` unless that is set), or the one that the
    environment variable ``JSPARSE_COMPILATION_CACHE`` names; with "0" there nothing is kept. If jax's own
    ``JAX_COMPILATION_CACHE_DIR`` is set, jax does as it says.

    A folder that others own or may write is not used, because programs in it are run: ValueError if the
    variable names it, and otherwise a line on stderr. Nothing is kept where the folder cannot be made.
    """
    named = os.environ.get(SETTING)
    if named == "0" or _OF_JAX in os.environ:
        return
    folder = Path(named) if named else _default_folder()
    try:
        for made in (folder.parent, folder):  # parents=True alone would make the first as the umask says
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = why_unsafe(folder) or (None if named else why_unsafe(folder.parent))
    except OSError as error:
        problem = f"{folder} cannot be used: {error.strerror}"
    if problem and named:
        raise ValueError(f"{SETTING}={named}: {problem}; name another folder, or 0 to keep nothing")
    if problem:
        print(
            f"jsparse: compiled programs are not kept: {problem} ({SETTING}=0 says so too)", file=sys.stderr
        )
        return
    _tell_jax(folder / _machine())


def _default_folder() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "jsparse" / "compiled"


def why_unsafe(folder: Path) -> str | None:
    """Why programs in a folder could be somebody else's; None if they cannot."""
    status = folder.stat()
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        return f"{folder} belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{folder} may be written by other users: chmod go-w {folder}"
    return None


def _machine() -> str:
    """A name for what the programs run on: code for a CPU with other instructions may not run here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    return f"jaxlib-{version('jaxlib')}-{hashlib.sha256(cpu.encode()).hexdigest()[:12]}"


def _tell_jax(folder: Path) -> None:
    """Set what is not set, in the environment, or in jax if it has read that already."""
    os.environ[_OF_JAX] = str(folder)
    os.environ.setdefault(_LEAST, _SECONDS)
    # Two processes may share an entry, and one read what the other still writes. jax then compiles it itself.
    warnings.filterwarnings("ignore", r"Error (reading|writing) persistent compilation cache entry")
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", float(os.environ[_LEAST]))
