"""An export that nobody can load yet: where it is written, and what is known of it so that another run can go on.

While it is being written, MARKER lies at the destination: who writes, what, and which weight files are done.
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
# Without one of these no loader reads the rest: put last, taken back first.
PUBLISHED_LAST = ("model.safetensors.index.json", "adapter_config.json", "config.json")


@dataclass
class Journal:
    """What MARKER says. plan: what is exported, as a digest. parts: weight file -> its record, once it is proven."""

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
        """What another writer left; one that says nothing legible left nothing to go on from."""
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

    directory: local; what is written here is published with the rest.
    target: where weight files are put by whoever writes them: `directory`, or the destination's URL.
    """

    directory: Path
    target: str
    journal: Journal

    @property
    def is_remote(self) -> bool:
        return is_url(self.target)

    def kept(self) -> dict[str, dict[str, Any]]:
        """The records of the weight files that an earlier run of the same plan has left, still as they were."""
        return dict(self.journal.parts)

    def expect(self, names: list[str]) -> None:
        """Weight files of these names will be put at the target by others."""

    def add(self, name: str, record: Mapping[str, Any]) -> None:
        """A weight file is there and proven."""
        self.journal.parts[name] = dict(record)

    def drop(self, name: str) -> None:
        """A weight file that was kept is not what it should be."""
        self.journal.parts.pop(name, None)

    def read_headers(self, directory: Path) -> None:
        """The headers of the weight files at the target, read back into `directory`. Raises ExportError."""
        raise NotImplementedError


def publishing_order(name: str) -> tuple[int, str]:
    """A key: what loaders start from comes last."""
    leaf = name.rpartition("/")[2]
    return PUBLISHED_LAST.index(leaf) if leaf in PUBLISHED_LAST else -1, name
