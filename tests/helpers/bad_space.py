"""Parts of the table of test_bad_input_table.py: the place that a case spoils, and how a case is registered."""

import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Space:
    """The things that a case spoils: a model, an adapter, rows, and the configuration that names them."""

    root: Path
    config: dict = field(default_factory=dict)
    text: str | None = None  # in place of the configuration

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def dataset(self) -> dict:
        return self.config["train_dataloader"]["dataset"]

    def json(self, path: Path, **fields) -> None:
        """Change fields of a JSON file; ... removes one."""
        content = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))

    def rows(self, *rows: dict) -> None:
        (self.root / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    def file(self, name: str, content: str | bytes) -> str:
        path = self.root / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def use_adapter(self) -> dict:
        """Go on from the adapter, which brings LoRA's settings."""
        self.config["model"] = {"preset_handle": str(self.model), "adapter": str(self.adapter)}
        return self.config["model"]


CASES = {}


def case(name: str, message: str):
    """Register what spoils a space, and what the message says."""

    def register(spoil):
        CASES[name] = (spoil, message)
        return spoil

    return register


def setting(name: str, message: str, key: str, value) -> None:
    """A case that sets one key of the configuration; DATA is the dataset's section."""

    def spoil(space: Space) -> None:
        place, (*sections, leaf) = space.config, key.replace("DATA", "train_dataloader.dataset").split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value

    CASES[name] = (spoil, message)


def text(name: str, message: str, content: str) -> None:
    """A case whose configuration file is something else."""
    CASES[name] = (lambda space: setattr(space, "text", content), message)
