"""Pointers, which git leaves in place of large files until git-lfs brings them."""


def pointer_hint(start: bytes) -> str | None:
    """What to do about a file that begins with ``start``, if it is such a pointer.

    >>> pointer_hint(b"version https://git-lfs.github.com/spec/v1")
    'it is a pointer of git-lfs; in its repository, git lfs pull brings the file'
    >>> pointer_hint(b"{}")
    """
    if start.lstrip().startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs; in its repository, git lfs pull brings the file"
    return None
