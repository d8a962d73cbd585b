"""Where compiled programs are kept, and when they are not."""

import os
from pathlib import Path

import pytest

from jsparse.reports import compilation_cache
from jsparse.reports.compilation_cache import SETTING, use_compilation_cache


@pytest.fixture
def told(monkeypatch, tmp_path):
    """The folders that jax is told of, in an environment that says nothing but where caches are."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv(SETTING, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    folders = []
    monkeypatch.setattr(compilation_cache, "_tell_jax", folders.append)
    return folders


def test_a_folder_of_the_users_own(told, tmp_path):
    before = os.umask(0o002)  # under which folders are writable by the group
    try:
        use_compilation_cache()
        use_compilation_cache()
    finally:
        os.umask(before)
    assert len(set(told)) == 1 and len(told) == 2
    compiled = told[0].parent
    assert compiled == tmp_path / "caches" / "jsparse" / "compiled"
    assert compiled.stat().st_mode & 0o777 == compiled.parent.stat().st_mode & 0o777 == 0o700


def test_the_users_settings_win(told, monkeypatch, tmp_path):
    monkeypatch.setenv(SETTING, str(tmp_path / "elsewhere"))
    use_compilation_cache()
    assert [folder.parent for folder in told] == [tmp_path / "elsewhere"]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/jax/knows")
    use_compilation_cache()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv(SETTING, "0")
    use_compilation_cache()
    assert len(told) == 1 and not (tmp_path / "caches").exists()


def test_a_relative_xdg_folder_does_not_count(told, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    use_compilation_cache()
    assert told[0].is_relative_to(tmp_path / "home" / ".cache")


def refusals(told, monkeypatch, capfd, folder: Path, message: str) -> None:
    """Nothing is kept in the default folder, which a line says, and it is an error to name it."""
    use_compilation_cache()
    line = capfd.readouterr().err
    assert message in line and line.count("\n") == 1
    monkeypatch.setenv(SETTING, str(folder))
    with pytest.raises(ValueError, match=message):
        use_compilation_cache()
    assert told == []


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_others_may_write_it(told, monkeypatch, capfd, tmp_path, mode):
    folder = tmp_path / "caches" / "jsparse" / "compiled"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    refusals(told, monkeypatch, capfd, folder, "may be written by other users")


def test_another_owns_it(told, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    refusals(told, monkeypatch, capfd, tmp_path / "caches", "belongs to another user")


def test_a_file_is_in_its_place(told, monkeypatch, capfd, tmp_path):
    (tmp_path / "caches").write_text("")
    refusals(told, monkeypatch, capfd, tmp_path / "caches", "cannot be used")
