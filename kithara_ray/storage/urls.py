"""Locations of files: paths, the URLs that fsspec knows (gs://, s3://), and this host's cache.

Functions import remote libraries when they use them.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CACHE_VARIABLE = "KITHARA_RAY_CACHE"
DEFAULT_CACHE = "~/.cache/kithara_ray"


def is_url(handle: str) -> bool:
    return "://" in handle


def absolute(path: str) -> str:
    """Make a local path absolute at once, since workers and the coordinator run in other directories."""
    return path if is_url(path) else os.path.abspath(os.path.expanduser(path))


def join(destination: str, *parts: str) -> str:
    """Return `destination/part/...` for paths and URLs."""
    return "/".join([destination.rstrip("/"), *parts]) if is_url(destination) else os.path.join(destination, *parts)


def cause_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def cache_dir() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE).expanduser().absolute()


def filesystem(url: str, error: type[Exception]) -> tuple[Any, str]:
    """Return (filesystem, root in it) of a URL, without cached listings. Raises `error` for an unknown scheme."""
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as cause:
        raise error(f"{url}: no filesystem for it ({cause}); install its fsspec package or use gs://, s3://") from cause
    fs.invalidate_cache()  # object stores cache listings forever
    return fs, root.rstrip("/")


def version_of(entry: Mapping[str, Any]) -> str:
    """Return the facts that change when an object is overwritten: generation, checksum or time, if reported."""
    fields = ("generation", "etag", "ETag", "md5Hash", "crc32c", "mtime", "updated", "LastModified", "created")
    return "|".join(f"{field}={entry[field]}" for field in fields if entry.get(field) is not None)
