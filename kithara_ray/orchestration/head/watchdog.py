"""Find the rank that has stopped making progress. Ranks report their state to the coordinator; the watchdog judges it.

An actor that is stuck in a collective still answers Ray, and its peers are stuck with it. So the watchdog names one
culprit: a rank that sends no more beats; else the rank that is behind; else a rank outside a step, as ranks in a step
wait for the others.
"""

from dataclasses import dataclass, field

from kithara_ray.orchestration.worker.heartbeat import BEAT_S, Beat, Limits


@dataclass
class Watch:
    """The last beat of every rank, and its time of arrival."""

    limits: Limits
    beats: dict[int, tuple[Beat, float]] = field(default_factory=dict)
    # Processes that are being ended; their further beats do not count.
    condemned: set[tuple[str, int]] = field(default_factory=set)

    def hear(self, beat: Beat, now: float) -> None:
        if (beat.node_id, beat.pid) in self.condemned:
            return
        known = self.beats.get(beat.rank)
        if known is not None and known[0].pid != beat.pid:
            # A new attempt: its peers of the last attempt are gone.
            self.beats.clear()
        self.beats[beat.rank] = (beat, now)

    def verdict(self, now: float) -> str | None:
        """Return the reason why the run must be ended, or None."""
        if not self.beats:
            return None
        silent = [(now - came, beat) for beat, came in self.beats.values() if beat.phase != "end"]
        if not silent:
            return None
        silence_s, beat = max(silent, key=lambda pair: pair[0])
        if silence_s > self.limits.silence_timeout_s:
            return self._sentence(beat, f"has given no sign of life for {silence_s:.0f} s; it was in {beat.doing}")
        late = [beat for beat, _ in self.beats.values() if beat.since_s > self.limits.of(beat.phase)]
        if not late:
            return None
        if silence_s > 5 * BEAT_S:
            return self._sentence(beat, f"has given no sign of life for {silence_s:.0f} s; it was in {beat.doing}")
        behind = min((beat for beat, _ in self.beats.values()), key=lambda b: (b.step, b.phase == "step", -b.since_s))
        return self._sentence(behind, f"has made no progress for {behind.since_s:.0f} s; it is in {behind.doing}")

    def _sentence(self, beat: Beat, what: str) -> str:
        others = [b for b, _ in sorted(self.beats.values(), key=lambda pair: pair[0].rank) if b.rank != beat.rank]
        shown = ", ".join(f"rank {b.rank} in {b.doing}" for b in others[:4]) + (", ..." if len(others) > 4 else "")
        where = f"rank {beat.rank} on {beat.host} (process {beat.pid})"
        return f"{where} {what}" + (f"; {shown}" if others else "")

    def condemn(self) -> list[tuple[str, int]]:
        """Return (node, process) of all ranks, for the caller to end; the next attempt starts with an empty table."""
        processes = [(beat.node_id, beat.pid) for beat, _ in self.beats.values()]
        self.condemned.update(processes)
        self.beats.clear()
        return processes
