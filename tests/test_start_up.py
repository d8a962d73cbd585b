"""The command line as a process of its own: how it starts, and how it ends when something is in its way."""

import os
import subprocess
import sys

import pytest

from jsparse.__main__ import _JSPARSE, _Command

GENERATE = ["generate", "--prompt", "import", "--max-new-tokens", "2"]


def commands(table: _Command = _JSPARSE) -> list[list[str]]:
    """Every command, as the words that name it."""
    found = [] if table.function is None else [[]]
    for name, command in table.commands.items():
        found += [[name, *rest] for rest in commands(command)]
    return found


LISTED = """
import sys
from jsparse.__main__ import main
try:
    main(sys.argv[1:])
finally:
    print(sorted({"jax", "jaxlib", "flax", "optax", "orbax"} & sys.modules.keys()), file=sys.stderr)
"""


@pytest.mark.parametrize("words", [[], ["plan"], *commands(), ["demo", "--train"]], ids=" ".join)
def test_help_needs_no_jax(words):
    """Which takes a second or two to import."""
    done = subprocess.run(
        [sys.executable, "-c", LISTED, *words, "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"usage: {' '.join(['jsparse', *words])}".replace(" scoreboard", ""))
    assert done.stderr == "[]\n"


def test_every_command_is_listed():
    assert len(commands()) >= 12 and ["bench", "prefill"] in commands() and ["evaluate"] in commands()


def start(*arguments: str | bytes, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "jsparse", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
    )


def failure(*arguments: str | bytes, **environment: str) -> str:
    """The one line with which a command ends."""
    process = start(*arguments, **environment)
    out, err = process.communicate()
    assert process.returncode == 2 and out == b"" and err.count(b"\n") == 1, err.decode()
    return err.decode()


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], GENERATE])
def test_a_reader_that_has_gone(arguments):
    process = start(*arguments)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 128 + 13
    assert b"Error" not in err and b"Exception" not in err


def test_bytes_that_are_no_text():
    assert "is not UTF-8 text" in failure("generate", "--prompt", b"\xff")


@pytest.mark.parametrize("platform", ["nothing", "cuda"])
def test_a_platform_that_is_not_here(platform):
    import jax

    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("this machine has the platform")
    assert f"JAX_PLATFORMS={platform} names no device" in failure(*GENERATE, JAX_PLATFORMS=platform)


def test_what_is_compiled_is_kept(tmp_path):
    environment = os.environ | {"JSPARSE_COMPILATION_CACHE": str(tmp_path / "compiled")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    texts, kept = [], []
    for _ in range(3):
        command = [sys.executable, "-m", "jsparse", *GENERATE]
        done = subprocess.run(command, env=environment, capture_output=True, check=True)
        texts.append(done.stdout)
        kept.append({file: file.stat().st_size for file in (tmp_path / "compiled").rglob("*-cache")})
        assert done.stderr.count(b"\n") == 2 and b"Warning" not in done.stderr, done.stderr.decode()
        if len(kept) == 2:  # nothing is compiled again; then one file is damaged
            # What took about a tenth of a second to compile may be kept the second time only.
            assert kept[0] and kept[0].items() <= kept[1].items()
            next(iter(kept[0])).write_bytes(b"damaged")
    assert len(set(texts)) == 1
