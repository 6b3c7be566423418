"""The events that a run reports, and the part of them that is its history.

An event is a dict of plain data with a "kind":

    begin, phase, fetch, resumed, started, first_step      start of one attempt, by rank 0
    step, eval, skipped                                    the history, by rank 0
    dropped                                                a callback that failed; the run goes on without it
    finished                                               end of the attempt, with all its events
    export, stalled                                        by the coordinator itself
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kithara_ray.orchestration.worker.channel import Channel, Event
from kithara_ray.orchestration.worker.heartbeat import Heart, Limits

_FETCH_REPORT_S = 2.0


class EventLog:
    """One rank's events, its phases of start-up and its signs of life, reported to the head.

    Attributes:
        phases: seconds of each phase.
        events: rank 0's events of this attempt; after a resume also those before the checkpoint.
        heart: reports this rank's state to the watchdog.
        also: callable that also receives every event, on every rank.

    Args:
        phases: phases that ended before the log existed.
    """

    def __init__(self, rank: int, channel: Channel, limits: Limits, phases: Mapping[str, float]):
        self.rank, self.phases = rank, dict(phases)
        self.events: list[Event] = []
        self.also: Callable[[Event], None] = lambda event: None
        self.heart = Heart(rank, channel.node_id, limits, channel.beat)
        self._channel, self._fetch_reported = channel, 0.0

    def record(self, kind: str, **values: Any) -> None:
        """Record one event. All ranks record the same; only rank 0 reports it."""
        event = {"kind": kind, **values}
        self.also(event)
        if self.rank:
            return
        if kind == "resumed":
            self.events = list(values["events"])
        elif kind != "finished":
            self.events.append(event)
        self._channel.record(event, wait=kind == "finished")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Report the beginning of one phase of start-up, and time it."""
        self.record("phase", name=name)
        self.heart.at(name)
        started = time.monotonic()
        try:
            yield
        finally:
            self.phases[name] = round(time.monotonic() - started, 2)

    def fetched(self, here: int, total: int) -> None:
        """Report, at intervals, how many bytes of the base have been fetched onto rank 0's host."""
        now = time.monotonic()
        if now - self._fetch_reported >= _FETCH_REPORT_S or here == total:
            self._fetch_reported = now
            self.heart.at("fetch")
            self.record("fetch", here=here, total=total)


def one_history(events: list[Event]) -> list[Event]:
    """Join the events of all attempts: an attempt begins with the saved events, and replaces all others before it."""
    kept: list[Event] = []
    for event in events:
        if event["kind"] == "begin":
            kept = []
        elif event["kind"] == "resumed":
            kept = list(event["events"])
        elif event["kind"] == "finished":
            # Only the coordinator reports adapters written meanwhile, so they are kept.
            kept = list(event["events"]) + [told for told in kept if told["kind"] == "export"]
        else:
            kept.append(event)
    return kept


def rows_of(events: list[Event], kind: str) -> list[Event]:
    """Return the events of one kind, without the kind."""
    return [
        {name: value for name, value in event.items() if name != "kind"} for event in events if event["kind"] == kind
    ]
