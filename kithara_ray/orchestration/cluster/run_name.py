"""The valid names of a run: each is a directory below the storage path, and a name in Ray's own state."""

from pathlib import PurePosixPath
from typing import Any

from kithara_ray.errors import ConfigError

_MAX_BYTES = 255  # limit of a file's name, on Linux and on object stores' local mirrors


def check_run_name(name: Any) -> None:
    """Refuse a name that is not ASCII or is too long, on which Ray Train fails only after its start. Also refuse one
    that leaves the storage path.

    Raises:
        ConfigError: the name is not valid; the message has the reason.
    """
    if name is None:  # Ray makes a name
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
