"""What a user is told of rows that are trained on: the formats they were read as, and what has no effect in them."""

import collections
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Told:
    """Attributes:
    formats: format -> rows that were read as it.
    notes: what is said -> rows that it is said of.
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
        """What the other does not tell of yet."""
        formats = {name: rows for name, rows in self.formats.items() if name not in other.formats}
        return Told(formats, {note: rows for note, rows in self.notes.items() if note not in other.notes})

    def lines(self) -> list[str]:
        """A line for each format that rows were converted from, and for each note."""
        shown = [f"{rows:,} rows are read as {name!r}" for name, rows in self.formats.items() if name not in _PLAIN]
        return shown + [f"{note} ({rows:,} rows)" for note, rows in self.notes.items()]

    def format_line(self) -> str:
        return ", ".join(f"{name} ({rows:,})" for name, rows in self.formats.items())


NOTHING = Told()
# Formats that rows have as they are.
_PLAIN = ("prompt_answer", "messages", "text")
