"""An export that nobody can load yet: its location, and the records from which another run can continue it.

During the export, MARKER lies at the destination. It names the writer, the exported content and the finished weight
files.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kithara_ray.storage.urls import is_url

MARKER = ".kithara_ray_unfinished"
# Loaders need one of these files to read the rest: they are put last, and taken back first.
PUBLISHED_LAST = ("model.safetensors.index.json", "adapter_config.json", "config.json")


@dataclass
class Journal:
    """The content of MARKER.

    plan: a digest of the exported content. parts: weight file -> its record, once it is proven.
    """

    plan: str
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    writer: dict[str, Any] = field(default_factory=lambda: {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    })  # fmt: skip

    def to_bytes(self) -> bytes:
        return (json.dumps({"writer": self.writer, "plan": self.plan, "parts": self.parts}) + "\n").encode()

    @classmethod
    def of(cls, raw: bytes) -> "Journal":
        """Read another writer's journal; an illegible one is empty, with nothing from which to continue."""
        try:
            value = json.loads(raw)
            return cls(str(value["plan"]), dict(value["parts"]), dict(value["writer"]))
        except (ValueError, KeyError, TypeError):
            return cls("", {}, {})

    @property
    def author(self) -> str:
        return "process {process} on {host} since {time}".format(
            **{"process": "?", "host": "?", "time": "?", **self.writer}
        )


@dataclass
class Stage:
    """An export before anybody can load it.

    directory: local; the files in it are published with the rest.
    target: the place where the processes that write weight files put them: `directory`, or the destination's URL.
    """

    directory: Path
    target: str
    journal: Journal

    @property
    def is_remote(self) -> bool:
        return is_url(self.target)

    def kept(self) -> dict[str, dict[str, Any]]:
        """Return the records of the weight files that an earlier run of the same plan left unchanged."""
        return dict(self.journal.parts)

    def expect(self, names: list[str]) -> None:
        """Expect other processes to put weight files of these names at the target."""

    def add(self, name: str, record: Mapping[str, Any]) -> None:
        """Record that a weight file is there and proven."""
        self.journal.parts[name] = dict(record)

    def drop(self, name: str) -> None:
        """Drop the record of a kept weight file that has the wrong content."""
        self.journal.parts.pop(name, None)

    def read_headers(self, directory: Path) -> None:
        """Read the headers of the weight files at the target back into `directory`. Raises ExportError."""
        raise NotImplementedError


def publishing_order(name: str) -> tuple[int, str]:
    """Return a sort key that puts the files from which loaders start last."""
    leaf = name.rpartition("/")[2]
    return PUBLISHED_LAST.index(leaf) if leaf in PUBLISHED_LAST else -1, name
