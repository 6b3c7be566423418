"""The names that a run may have: each is a directory below the storage path, and a name in Ray's own state."""

from pathlib import PurePosixPath
from typing import Any

from kithara_ray.errors import ConfigError

_MAX_BYTES = 255  # of a file's name, on Linux and on object stores' local mirrors


def check_run_name(name: Any) -> None:
    """Refuse a name that Ray Train fails on when it has started: other than ASCII, or too long; and one that leaves
    the storage path.

    Raises:
        ConfigError: says what is wrong with it.
    """
    if name is None:  # Ray makes one
        return
    wrong = None
    if not isinstance(name, str) or not name.strip():
        wrong = "is empty" if isinstance(name, str) else f"is {type(name).__name__}, not text"
    elif not (name.isascii() and name.isprintable()):
        wrong = "has characters other than printable ASCII"
    elif PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        wrong = "leaves the storage path"
    elif max(map(len, PurePosixPath(name).parts), default=0) > _MAX_BYTES:
        wrong = f"is longer than {_MAX_BYTES} characters"
    if wrong:
        shown = repr(name) if len(str(name)) <= 60 else f"{str(name)[:60]!r}..."
        raise ConfigError(f"run_config: the name {ascii(shown)[1:-1]} {wrong}; give one such as 'my-run-1'")
