"""Adapters that a run exports during training, as set by `export_every_steps` and `export_dir`."""

from dataclasses import dataclass

from kithara_ray.storage.urls import join

PREFIX = "step-"


@dataclass(frozen=True)
class Snapshots:
    """The interval and the place of these exports.

    Attributes:
        every: steps between two exports.
        directory: path or URL; `step-000100` in it is the adapter of step 100.
    """

    every: int
    directory: str

    def path(self, step: int) -> str:
        """Return the location of a step's adapter."""
        return join(self.directory, f"{PREFIX}{step:06d}")
