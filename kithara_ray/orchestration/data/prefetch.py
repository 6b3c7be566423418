"""The next batches, made in a thread while a step runs."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetched(Generic[Item]):
    """Results of `make(number)` for each number in turn, with up to `depth` made in advance.

    An error in `make` is raised in the place of its item. Call `close` to leave, or the thread waits forever.
    """

    def __init__(self, make: Callable[[int], Item], numbers: Iterable[int], depth: int = 2):
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(make, numbers), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        item, error = self._queue.get()
        if error is not None:
            self._queue.put((item, error))  # so that a repeated call raises it again
            raise error
        return item

    def close(self) -> None:
        """Stop, and drop the results that were not taken."""
        self._closed.set()

    def _fill(self, make: Callable[[int], Item], numbers: Iterable[int]) -> None:
        try:
            for number in numbers:
                self._put((make(number), None))
                if self._closed.is_set():
                    return
            self._put((None, StopIteration()))
        except BaseException as error:
            self._put((None, error))

    def _put(self, entry: tuple) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(entry, timeout=0.5)
            except queue.Full:
                continue
