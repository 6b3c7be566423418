"""Name the file in any error of opening or reading it; stores, compressions and formats each raise their own."""

import contextlib
from collections.abc import Generator

from kithara_ray.errors import DataError
from kithara_ray.sft.rows.values import short

# Packages that fsspec needs for a protocol or for the extension of a compression, besides this package's own.
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "abfs": "adlfs",
    "az": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "sftp": "paramiko",
    "webhdfs": "requests",
    "zst": "zstandard",
    "lz4": "lz4",
    "sz": "python-snappy",
}


@contextlib.contextmanager
def reading(url: str, failed: str = "cannot be read") -> Generator[None]:
    """Raise a DataError that names the file for any error inside.

    Args:
        failed: words for the failure in the message.
    """
    try:
        yield
    except DataError as error:
        if str(error).startswith(url):
            raise
        raise DataError(f"{url}: {error}") from error
    except FileNotFoundError as error:
        raise DataError(f"{url}: no such file; give an existing path, a URL or a dataset") from error
    except ImportError as error:
        raise DataError(f"{url}: needs a package: pip install {_package(url) or short(error)}") from error
    except ValueError as error:
        if "ompression type" in str(error) and (package := _package(url)):
            raise DataError(f"{url}: needs a package: pip install {package}") from error
        raise DataError(f"{url}: {failed}: {short(error)}") from error
    except Exception as error:  # of a store's client or a decompressor, about this file
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        raise DataError(f"{url}: {failed}: {kind}{short(error)}") from error


def _package(url: str) -> str | None:
    by_extension = _PACKAGES.get(url.rpartition(".")[2])
    return by_extension or (_PACKAGES.get(url.split("://")[0]) if "://" in url else None)
