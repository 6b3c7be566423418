"""Adapters that a run writes while training goes on, as `export_every_steps` and `export_dir` ask for them."""

from dataclasses import dataclass

from kithara_ray.storage.urls import join

PREFIX = "step-"


@dataclass(frozen=True)
class Snapshots:
    """Attributes: every: steps between two. directory: path or URL; `step-000100` in it is the adapter of step 100."""

    every: int
    directory: str

    def path(self, step: int) -> str:
        """Where the adapter of a step goes."""
        return join(self.directory, f"{PREFIX}{step:06d}")
