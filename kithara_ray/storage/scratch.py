"""Temporary directories that outlive no process for long, however it ends.

A process that is killed cannot remove its temporary files, which may be gigabytes of weights. Each directory therefore
carries a lock, which the kernel frees when the process ends. The next `scratch` of the same user on the same host
removes the directories whose locks are free.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

_PREFIX = "kithara_ray_scratch_"


@contextlib.contextmanager
def scratch() -> Generator[Path]:
    """Yield a new, empty directory below `tempfile.gettempdir()`, and remove it afterwards. Raises OSError.

    Before that, remove the leftovers of this user's killed processes. A file system without locks (some network file
    systems) keeps them.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _locked(left):
            shutil.rmtree(left, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        directory = _new(stack)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _new(stack: contextlib.ExitStack) -> Path:
    """Make a directory and keep it locked until `stack` closes."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
        try:
            stack.enter_context(_locked(directory))
        except (BlockingIOError, FileNotFoundError):
            continue  # another process took it for a leftover before it was locked
        except OSError:
            pass  # a file system without locks
        return directory


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a directory's lock inside the context. Raises OSError if the lock is held, or the directory is not ours."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise PermissionError(f"{directory} belongs to another user")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        directory.lstat()
        yield
    finally:
        os.close(descriptor)
