"""What a run tells while it goes on, and what of it is the run's history.

An event is a dict of plain data with a "kind":

    begin, phase, fetch, resumed, started, first_step      of one attempt's start, by rank 0
    step, eval, skipped                                    the history, by rank 0
    dropped                                                a callback that the run goes on without
    finished                                               with all events of the attempt
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
        events: rank 0's, of this attempt and, where it goes on from a checkpoint, of those before.
        heart: tells the watchdog what this rank does.
        also: is given every event too, on every rank.

    Args:
        phases: those that were over before there was a log.
    """

    def __init__(self, rank: int, channel: Channel, limits: Limits, phases: Mapping[str, float]):
        self.rank, self.phases = rank, dict(phases)
        self.events: list[Event] = []
        self.also: Callable[[Event], None] = lambda event: None
        self.heart = Heart(rank, channel.node_id, limits, channel.beat)
        self._channel, self._fetch_reported = channel, 0.0

    def record(self, kind: str, **values: Any) -> None:
        """One event. All ranks record the same; rank 0's is told."""
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
        """One phase of start-up: told when it begins, and timed."""
        self.record("phase", name=name)
        self.heart.at(name)
        started = time.monotonic()
        try:
            yield
        finally:
            self.phases[name] = round(time.monotonic() - started, 2)

    def fetched(self, here: int, total: int) -> None:
        """Now and then, how many bytes of the base have been fetched onto rank 0's host."""
        now = time.monotonic()
        if now - self._fetch_reported >= _FETCH_REPORT_S or here == total:
            self._fetch_reported = now
            self.heart.at("fetch")
            self.record("fetch", here=here, total=total)


def one_history(events: list[Event]) -> list[Event]:
    """The events of all attempts as one sequence: an attempt begins with what had been saved, and forgets the rest."""
    kept: list[Event] = []
    for event in events:
        if event["kind"] == "begin":
            kept = []
        elif event["kind"] == "resumed":
            kept = list(event["events"])
        elif event["kind"] == "finished":
            # Adapters that were written meanwhile are told by the coordinator alone.
            kept = list(event["events"]) + [told for told in kept if told["kind"] == "export"]
        else:
            kept.append(event)
    return kept


def rows_of(events: list[Event], kind: str) -> list[Event]:
    """The events of one kind, without it."""
    return [
        {name: value for name, value in event.items() if name != "kind"} for event in events if event["kind"] == kind
    ]
