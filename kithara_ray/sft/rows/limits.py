"""Limits on time and memory for code that came with the data: a chat template may loop for ever.

Both limits apply to the whole process, so guard only short code. They need Linux, and the time limit needs the main
thread; elsewhere nothing is limited.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Generator

try:
    import resource
except ImportError:  # not a Unix
    resource = None


class OutOfTime(BaseException):
    """Derives from BaseException, so that guarded code does not catch it."""


@contextlib.contextmanager
def cpu_time(seconds: float) -> Generator[None]:
    """Raise OutOfTime after `seconds` of this process' CPU time, which a busy machine does not use up."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_):
        raise OutOfTime

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def memory(more_bytes: int) -> Generator[None]:
    """Raise MemoryError if an allocation takes this process more than `more_bytes` beyond its current mappings."""
    try:
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        yield
        return
    assert resource is not None  # Linux has it, and only Linux has /proc
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = mapped + more_bytes
    if soft != resource.RLIM_INFINITY:
        bound = min(bound, soft)
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
