"""Handles of directories on the Hugging Face Hub."""

import re
from typing import NamedTuple

from kithara_ray.errors import CheckpointError

_COMMIT_AND_FOLDER = re.compile(r"([0-9a-f]{40}|main)/(.+)")


class HubPlace(NamedTuple):
    """A directory on the Hub: a repository's root if `folder` is empty, and its default branch without `revision`."""

    repo_id: str
    revision: str | None
    folder: str

    @property
    def name(self) -> str:
        """org/name, with the folder."""
        return f"{self.repo_id}/{self.folder}" if self.folder else self.repo_id


def hub_place(handle: str) -> HubPlace:
    """Read hf://org/name[/folder][@revision], or fsspec's hf://org/name@commit/folder.

    A revision may contain a slash (refs/pr/1), so a folder follows only a commit or main.
    """
    name, _, revision = handle.removeprefix("hf://").rstrip("/").partition("@")
    org, _, rest = name.partition("/")
    repo, _, folder = rest.partition("/")
    if not folder and (found := _COMMIT_AND_FOLDER.fullmatch(revision)):
        revision, folder = found.groups()
    parts = [org, repo, *(folder.split("/") if folder else ())]
    if not all(parts) or ".." in parts:
        raise CheckpointError(f"{handle}: expected hf://org/name, hf://org/name@revision or hf://org/name/folder")
    return HubPlace(f"{org}/{repo}", revision or None, folder)
