"""Which calls of a rank wait for the coordinator, and how many are on their way; Ray itself is not there."""

from types import SimpleNamespace

import pytest

from kithara_ray.errors import ExportError
from kithara_ray.orchestration.head import ray_channel
from kithara_ray.orchestration.head.ray_channel import RayChannel


class Calls:
    """In the place of both the actor and Ray: a reference is its call's name and number."""

    def __init__(self):
        self.made, self.pending, self.most_pending, self.fails = [], set(), 0, ""

    def __getattr__(self, name):
        def remote(*arguments):
            reference = f"{name} {len(self.made)}"
            self.made.append(reference)
            self.pending.add(reference)
            self.most_pending = max(self.most_pending, len(self.pending))
            return reference

        return SimpleNamespace(remote=remote)

    def get(self, references, timeout=None):
        for reference in [references] if isinstance(references, str) else references:
            self.pending.discard(reference)
            if reference == self.fails:
                raise ExportError("the slice does not fit")
        return timeout

    def wait(self, references, num_returns):
        return references[-num_returns:], references[:-num_returns]  # the last is done first


@pytest.fixture
def calls(monkeypatch):
    made = Calls()
    monkeypatch.setattr(ray_channel.ray, "get", made.get)
    monkeypatch.setattr(ray_channel.ray, "wait", made.wait)
    return made


def test_what_waits_and_what_does_not(calls):
    channel = RayChannel(calls)
    channel.record({"kind": "step"})
    assert calls.pending == {"record 0"}
    channel.record({"kind": "finished"}, wait=True)
    assert calls.pending == {"record 0"}
    channel.put_shards(1, [])
    assert calls.pending == {"record 0"}
    wait = channel.put_snapshot(None)
    assert calls.pending == {"record 0", "put_snapshot 3"}
    wait()
    assert calls.pending == {"record 0"}
    # A coordinator that is away must not hold the heart up for long.
    assert channel.beat(None, None) == 10


def test_two_slices_are_on_their_way_and_all_are_waited_for(calls):
    channel = RayChannel(calls)
    channel.put_slices(7, iter("abcde"))
    assert (len(calls.made), calls.most_pending, calls.pending) == (5, 2, set())


@pytest.mark.parametrize("number", [1, 4])
def test_a_slice_that_is_refused_ends_the_sending(calls, number):
    calls.fails = f"put_slice {number}"
    with pytest.raises(ExportError, match="does not fit"):
        RayChannel(calls).put_slices(7, iter("abcde"))
    assert len(calls.made) == {1: 2, 4: 5}[number]
