"""Upload one local file to one object of a store that fsspec knows, and read the store's receipt for it."""

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kithara_ray.errors import DestinationError
from kithara_ray.storage.urls import cause_of, filesystem, version_of


def put_file(local: Path, target: str, name: str) -> dict[str, Any]:
    """Upload a file as `name` at the URL `target`; returns the receipt of the object.

    This compares the size that arrived, and the MD5 if the store reports one (GCS). Raises DestinationError.
    """
    fs, root = filesystem(target, DestinationError)
    remote = f"{root}/{name}"
    try:
        fs.put_file(str(local), remote)
        info = fs.info(remote)
        if info["size"] != local.stat().st_size:
            raise OSError(f"{remote} holds {info['size']} of {local.stat().st_size} bytes")
        if info.get("md5Hash") and base64.b64decode(info["md5Hash"]) != _md5(local):
            raise OSError(f"{remote} does not hold the bytes that were sent: its MD5 differs")
    except Exception as error:
        raise DestinationError(
            f"{target}/{name}: upload failed ({cause_of(error)}); the export is not published"
        ) from error
    return receipt_of(info)


def receipt_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"bytes", "version"} of an object from its filesystem's info. Each version is another object."""
    return {"bytes": int(info["size"]), "version": version_of(info)}


def _md5(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).digest()
