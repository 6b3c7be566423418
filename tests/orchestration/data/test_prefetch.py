import threading

import pytest

from kithara_ray.orchestration.data.prefetch import Prefetched


def test_items_come_in_turn_and_few_are_made_ahead():
    made, third = [], threading.Event()

    def make(number):
        made.append(number)
        if number == 2:
            third.set()
        return number * 10

    items = Prefetched(make, range(100), depth=2)
    assert third.wait(10)
    # Two wait and a third is in hand; a fourth would need room.
    assert made == [0, 1, 2]
    assert [next(items) for _ in range(50)] == [n * 10 for n in range(50)]
    assert len(made) <= 53
    items.close()


def test_the_end_and_errors_come_where_the_item_would_have_been():
    assert list(Prefetched(lambda n: n, range(3))) == [0, 1, 2]

    def make(number):
        if number == 2:
            raise ValueError("row 2")
        return number

    items = Prefetched(make, range(5))
    assert [next(items), next(items)] == [0, 1]
    for _ in range(2):
        with pytest.raises(ValueError, match="row 2"):
            next(items)
