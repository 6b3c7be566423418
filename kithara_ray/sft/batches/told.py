"""Facts about training rows that a user should know: their formats, and fields without effect."""

import collections
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Told:
    """Attributes:
    formats: format -> number of rows read in it.
    notes: note -> number of rows to which it applies.
    """

    formats: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Iterable["Told"]) -> "Told":
        formats, notes = collections.Counter(), collections.Counter()
        for part in parts:
            formats.update(part.formats)
            notes.update(part.notes)
        return cls(dict(formats), dict(notes))

    def beyond(self, other: "Told") -> "Told":
        """Return the facts that `other` does not have."""
        formats = {name: rows for name, rows in self.formats.items() if name not in other.formats}
        return Told(formats, {note: rows for note, rows in self.notes.items() if note not in other.notes})

    def lines(self) -> list[str]:
        """A line for each format from which rows were converted, and for each note."""
        shown = [f"{rows:,} rows are read as {name!r}" for name, rows in self.formats.items() if name not in _PLAIN]
        return shown + [f"{note} ({rows:,} rows)" for note, rows in self.notes.items()]

    def format_line(self) -> str:
        return ", ".join(f"{name} ({rows:,})" for name, rows in self.formats.items())


NOTHING = Told()
# Formats that need no conversion.
_PLAIN = ("prompt_answer", "messages", "text")
