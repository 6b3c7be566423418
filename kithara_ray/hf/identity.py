"""Identify the base that an adapter was trained on, and compare it with a given one. One rule serves every path.

The first of these that both sides know decides: the fingerprint; the place (the Hub's name at one revision, or one
directory); the weights themselves, where this host has both; revision; name.
"""

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kithara_ray.errors import AdapterError, KitharaRayError
from kithara_ray.hf.checkpoint import CONFIG, BaseCheckpoint
from kithara_ray.hf.fetch import fetched_from_hub
from kithara_ray.hf.hub_place import hub_place
from kithara_ray.storage.urls import is_url

__all__ = ["UNKNOWN", "BaseIdentity", "check_same_base", "identity_of"]

log = logging.getLogger(__name__)

FINGERPRINT = "base_fingerprint"  # in the metadata of adapter_model.safetensors
_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_CACHED = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})(/.+?)?/?$")


@dataclass(frozen=True)
class BaseIdentity:
    """The known facts about a base. All fields are None if nothing is known.

    Attributes:
        name: `org/name` or `org/name/folder` on the Hub, an absolute directory, or a URL.
        revision: on the Hub: a commit, else a tag or a branch as written.
        fingerprint: the result of `BaseCheckpoint.fingerprint`.
    """

    name: str | None = None
    revision: str | None = None
    fingerprint: str | None = None

    @property
    def is_hub(self) -> bool:
        return self.name is not None and not is_url(self.name) and not self.name.startswith("/")

    @property
    def place(self) -> str:
        """The name of a base that has one."""
        assert self.name is not None
        return self.name

    @property
    def handle(self) -> str:
        """The handle that `fetch` takes, of a base that has a name."""
        if not self.is_hub:
            return self.place
        return f"hf://{self.place}" + (f"@{self.revision}" if self.revision else "")

    def __str__(self) -> str:
        return repr(self.name) + (f" at revision {self.revision!r}" if self.revision else "")


UNKNOWN = BaseIdentity()


def named(name: str | None, revision: str | None = None, fingerprint: str | None = None) -> BaseIdentity:
    """Return the identity that a handle or an adapter_config.json states.

    As in transformers, a name is a relative path if that directory exists, else a name on the Hub. A directory of the
    Hub's cache becomes a name and a commit.
    """
    if not name:
        return BaseIdentity(None, None, fingerprint)
    if name.startswith("hf://"):
        place = hub_place(name)
        return BaseIdentity(place.name, place.revision or revision, fingerprint)
    if is_url(name) and not name.startswith("file://"):
        return BaseIdentity(name.rstrip("/"), None, fingerprint)
    path = Path(os.path.expanduser(name.removeprefix("file://")))
    if not path.is_dir() and name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not name.endswith("/"):
        return BaseIdentity(name, revision, fingerprint)
    cached = _CACHED.search(str(path.absolute()))
    if cached:
        return BaseIdentity(f"{cached[1]}/{cached[2]}{cached[4] or ''}", cached[3], fingerprint)
    return BaseIdentity(str(path.absolute()), None, fingerprint)


def identity_of(base: BaseCheckpoint, handle: str) -> BaseIdentity:
    """Return an opened base's identity without reading weights. A Hub base's revision is the commit that was opened."""
    written = named(handle)
    if not written.is_hub:
        return written
    opened = named(base.source or str(base.directory))
    at = opened.revision if _same_name(opened, written) else None
    return BaseIdentity(written.name, at or written.revision)


def read_identity(directory: Path, config: dict[str, Any], metadata: dict[str, str]) -> BaseIdentity:
    """Return the identity of the base that the adapter in a directory was trained on.

    The fingerprint is in the weights' metadata. For older adapters, it is in export_report.json beside them, or in
    run.json of the run whose `adapter` directory this is.
    """
    fingerprint = metadata.get(FINGERPRINT)
    reports = (directory / "export_report.json", directory.parent / "export_report.json", directory.parent / "run.json")
    for path in reports if directory.name == "adapter" else reports[:1]:
        if fingerprint is None and path.is_file():
            fingerprint = _fingerprint_in(path)
    return named(_text(config, "base_model_name_or_path"), _text(config, "revision"), fingerprint)


def _text(config: dict[str, Any], field: str) -> str | None:
    value = config.get(field)
    if value is None or isinstance(value, str):
        return value
    raise AdapterError(f"adapter_config.json: {field} must be a string, got {value!r}; name the base there, or null")


def _fingerprint_in(path: Path) -> str | None:
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None
    found = base.get("fingerprint") if isinstance(base, dict) else None
    return found if isinstance(found, str) else None


def check_same_base(
    trained: BaseIdentity, base: BaseCheckpoint, handle: str, *, adapter: str, allow: bool, override: str
) -> None:
    """Refuse a base that the adapter was not trained on, as far as both bases are known.

    Args:
        trained: the base that the adapter was trained on.
        base, handle: the base to use it with.
        adapter: the adapter's name in messages.
        allow: log a difference instead of raising.
        override: the user's setting for `allow`, for messages.

    Raises:
        AdapterError: the bases differ; the message names both and the difference.
    """
    different = _difference(trained, base, handle)
    if different is None:
        return
    said = f"{adapter} was trained on {trained} and not on {handle!r}: {different}"
    if allow:
        log.warning("%s; it is used anyway, because of %s", said, override)
        return
    raise AdapterError(f"{said}. Give the adapter's own base, or, if these are the same weights, {override}")


def _difference(trained: BaseIdentity, base: BaseCheckpoint, handle: str) -> str | None:
    if trained.fingerprint and not base.source:
        return _differ(trained.fingerprint, base)
    if trained.name is None:
        log.warning("the adapter does not say which base it was trained on; assuming %r", handle)
        return None
    given, asked = identity_of(base, handle), named(handle).revision
    if _same_place(trained, given, asked):
        return None
    own = _on_this_host(trained)
    if own is not None and not base.source:
        return _differ(own.fingerprint(), base)
    if trained.is_hub and _same_name(trained, given):
        return f"this base's revision is {given.revision or 'not known'}"
    if _last(trained.place) != _last(given.place):
        return "another name, and neither has a fingerprint to compare"
    log.warning(
        "the adapter was trained on %s. The names agree, but without a fingerprint nothing shows that %r has the same "
        "weights", trained, handle,
    )  # fmt: skip
    return None


def _differ(fingerprint: str, base: BaseCheckpoint) -> str | None:
    own = base.fingerprint()
    return None if own == fingerprint else f"fingerprint {fingerprint[:23]}... there, {own[:23]}... here"


def _same_place(trained: BaseIdentity, given: BaseIdentity, asked: str | None) -> bool:
    if not _same_name(trained, given):
        ours, theirs = trained.place, given.place
        return ours.startswith("/") and theirs.startswith("/") and _same_directory(ours, theirs)
    if not trained.is_hub or trained.revision is None or trained.revision in (given.revision, asked or "main"):
        return True
    is_commit = _COMMIT.fullmatch(trained.revision) is not None
    return is_commit and (given.revision or "").startswith(trained.revision)


def _same_name(one: BaseIdentity, other: BaseIdentity) -> bool:
    """Compare two names; the Hub ignores their case."""
    if one.is_hub and other.is_hub:
        return one.place.lower() == other.place.lower()
    return one.name == other.name


def _same_directory(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def _on_this_host(trained: BaseIdentity) -> BaseCheckpoint | None:
    """Open the base that the adapter was trained on, if this host has its weights."""
    directory = fetched_from_hub(trained.handle) if trained.is_hub else Path(trained.place)
    if directory is None or is_url(trained.place) or not (directory / CONFIG).is_file():
        return None
    try:
        return BaseCheckpoint.open(directory)
    except KitharaRayError:
        return None


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
