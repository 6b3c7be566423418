"""Bounds of time and memory around code that came with the data: a chat template may loop for ever.

Both hold for the whole process while they stand, so what they guard is short. They need Linux, and the main thread for
the time; elsewhere nothing is bounded.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

try:
    import resource
except ImportError:  # not a Unix
    resource = None


class OutOfTime(BaseException):
    """Not an Exception: what is guarded must not catch it."""


@contextlib.contextmanager
def cpu_time(seconds: float) -> Iterator[None]:
    """Raise OutOfTime when this process has computed for so long; a busy machine is not a hostile template."""
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
def memory(more_bytes: int) -> Iterator[None]:
    """Raise MemoryError for an allocation that takes this process so much beyond what it has mapped now."""
    try:
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = mapped + more_bytes
    if soft != resource.RLIM_INFINITY:
        bound = min(bound, soft)
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
