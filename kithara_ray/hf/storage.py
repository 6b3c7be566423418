"""Where models come from and where exports go: local directories, hf:// and whatever fsspec knows (gs://, s3://).

Remote libraries are imported where they are used. Nothing is ever written through a remote `open()`: an exception
inside it would publish the truncated object. Files are written locally, verified, then put.
"""

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kithara_ray.errors import CheckpointError, DestinationError, UnsupportedError

log = logging.getLogger(__name__)

# What is taken from a model repository: weights as safetensors, configuration, tokenizer, licence. No pickle, no code.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "tokenizer*") + (
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
REFUSED_FILES = (
    "*.py",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.pkl",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.gguf",
    "*.onnx",
    "consolidated*",
)
CACHE_VARIABLE = "KITHARA_RAY_CACHE"
DEFAULT_CACHE = "~/.cache/kithara_ray"
PUBLISHED_LAST = ("adapter_config.json", "config.json")  # without them a half-uploaded directory does not load


def is_url(handle: str) -> bool:
    return "://" in handle


def join(destination: str, *parts: str) -> str:
    """`destination/part/...` for paths and URLs."""
    return "/".join([destination.rstrip("/"), *parts]) if is_url(destination) else os.path.join(destination, *parts)


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def is_model_file(name: str) -> bool:
    """Whether a file name at the top of a model directory is one that this library takes."""
    allowed = any(fnmatch.fnmatchcase(name, pattern) for pattern in MODEL_FILES)
    return allowed and not any(fnmatch.fnmatchcase(name, pattern) for pattern in REFUSED_FILES)


# ---------------------------------------------------------------------------------------------------------- fetch


def fetch(handle: str) -> Path:
    """The local directory of a model: itself when local, else downloaded once per host.

    handle: a local directory, `hf://org/name[@revision]`, or an fsspec URL such as `gs://bucket/dir`.
    Raises CheckpointError when there is nothing to fetch, UnsupportedError for a handle that cannot be honoured.
    """
    handle = str(handle)
    scheme, _, rest = handle.partition("://")
    if not is_url(handle) or scheme == "file":
        return _fetch_local(rest if scheme == "file" and rest else handle)
    if scheme == "hf":
        return _fetch_hub(handle, rest)
    if scheme in ("kaggle", "kerashub", "keras", "modelscope"):
        raise UnsupportedError(
            f"{handle}: {scheme}:// presets hold Keras weights, and exports are made from Hugging Face files; "
            "use hf://org/name, a gs:// directory or a local directory with config.json and safetensors"
        )
    return _fetch_remote(handle)


def _fetch_local(handle: str) -> Path:
    path = Path(handle).expanduser().absolute()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the model's directory")
    advice = f"for the Hugging Face hub write hf://{handle}" if handle.count("/") == 1 and handle[0] not in "./~" else (
        "a KerasHub preset name cannot be used, since exports are made from Hugging Face files: "
        "write hf://org/name or the path of a directory that exists on this host"
    )  # fmt: skip
    raise CheckpointError(f"no directory at {path} for the handle {handle!r}; {advice}")


def _fetch_hub(handle: str, rest: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo_id, _, revision = rest.partition("@")
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise CheckpointError(f"{handle}: expected hf://org/name or hf://org/name@revision")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id,
                revision=revision or None,
                allow_patterns=list(MODEL_FILES),
                ignore_patterns=["*/*", *REFUSED_FILES],  # no original/, onnx/, checkpoints of the training run
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{handle}: could not be fetched from the Hugging Face hub ({_cause(error)}); check the "
            "name, the network, and for gated models that HF_TOKEN is set on every host"
        ) from error


def _cache_dir() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE).expanduser().absolute()


def _filesystem(url: str, error: type[Exception]) -> tuple[Any, str]:
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as cause:
        raise error(f"{url}: no filesystem for it ({cause}); install its fsspec package or use gs://, s3://") from cause
    fs.invalidate_cache()  # object stores cache listings for ever
    return fs, root.rstrip("/")


def _fetch_remote(url: str) -> Path:
    """Download into `<cache>/<hash of url and listing>` under a lock; renamed into place only when complete."""
    fs, root = _filesystem(url, CheckpointError)
    try:
        listing = fs.ls(root, detail=True)
    except FileNotFoundError:
        listing = []
    except Exception as error:  # every backend has its own exceptions
        raise CheckpointError(f"{url}: cannot be listed ({_cause(error)}); check credentials") from error
    entries = {entry["name"].rsplit("/", 1)[-1]: entry for entry in listing if entry["type"] == "file"}
    sizes = {name: int(entry["size"]) for name, entry in sorted(entries.items()) if is_model_file(name)}
    if not sizes:
        raise CheckpointError(f"{url}: no model files there; give a directory with config.json and safetensors")
    versions = [[name, sizes[name], _version(entries[name])] for name in sizes]
    key = hashlib.sha256(json.dumps([url.rstrip("/"), versions]).encode()).hexdigest()[:32]
    cache = _cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / key
    with _locked(cache / f"{key}.lock"):
        if target.is_dir():
            return target
        partial = cache / f".{key}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a process that died; the lock is ours
        partial.mkdir()
        try:
            log.info("fetching %s: files=%d bytes=%d", url, len(sizes), sum(sizes.values()))
            for name, size in sizes.items():
                _download(fs, f"{root}/{name}", partial / name, size)
            os.rename(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _version(entry: dict) -> str:
    """What changes when an object is overwritten: generation, checksum or time, as far as the backend tells."""
    fields = ("generation", "etag", "ETag", "md5Hash", "crc32c", "mtime", "updated", "LastModified", "created")
    return "|".join(f"{field}={entry[field]}" for field in fields if entry.get(field) is not None)


def _download(fs: Any, remote: str, local: Path, size_bytes: int) -> None:
    try:
        fs.get_file(remote, str(local))
    except Exception as error:
        raise CheckpointError(f"{remote}: download failed ({_cause(error)}); try again") from error
    if local.stat().st_size != size_bytes:
        raise CheckpointError(f"{remote}: {local.stat().st_size} of {size_bytes} bytes arrived; try again")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


# ------------------------------------------------------------------------------------------------------- publish


def _local_path(destination: str) -> Path:
    return Path(destination.removeprefix("file://")).expanduser().absolute()


def _is_local(destination: str) -> bool:
    return not is_url(destination) or destination.startswith("file://")


def check_destination(destination: str) -> None:
    """Raises DestinationError unless a directory can be published at `destination`. Leaves nothing behind.

    It must not exist, or be an empty directory; writing is probed by creating and deleting.
    """
    destination = str(destination)
    if _is_local(destination):
        _check_local(_local_path(destination))
    elif destination.startswith("hf://"):
        raise DestinationError(f"{destination}: exports are not written to the hub; export locally, then `hf upload`")
    else:
        _check_remote(destination)


def _check_local(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise DestinationError(f"{path} is a dangling link; remove it or choose another destination")
    if path.exists():
        if not path.is_dir():
            raise DestinationError(f"{path} exists and is a file; choose another destination")
        if next(path.iterdir(), None) is not None:
            raise DestinationError(f"{path} exists and is not empty; remove it or choose another destination")
    ancestor = path.resolve().parent  # the staging directory is made beside the destination
    while not ancestor.exists():
        ancestor = ancestor.parent
    try:
        probe = Path(tempfile.mkdtemp(prefix=".kithara_ray_probe_", dir=ancestor))
        probe.rmdir()
    except OSError as error:
        raise DestinationError(f"{path}: {ancestor} cannot be written ({error.strerror}); choose another") from error


def _check_remote(url: str) -> None:
    fs, root = _filesystem(url, DestinationError)
    _check_remote_empty(fs, root, url)
    probe = f"{root}/.kithara_ray_probe_{uuid.uuid4().hex}"
    try:
        fs.pipe_file(probe, b"probe")
        fs.rm_file(probe)
    except Exception as error:
        raise DestinationError(
            f"{url}: a probe object could not be written and deleted ({_cause(error)}); "
            "check that the bucket exists and that this host's credentials may write to it"
        ) from error


def _check_remote_empty(fs: Any, root: str, url: str) -> None:
    try:
        found = [entry["name"] for entry in fs.ls(root, detail=True)]
    except (FileNotFoundError, NotADirectoryError):
        return
    except Exception as error:
        raise DestinationError(f"{url}: cannot be listed ({_cause(error)}); check credentials") from error
    found = [name for name in found if name.rstrip("/").lstrip("/") != root.lstrip("/") or _is_object(fs, name)]
    if found:
        raise DestinationError(f"{url} exists and is not empty ({found[0]}); remove it or choose another destination")


def _is_object(fs: Any, name: str) -> bool:
    """A listing of "dir/" may hold the placeholder object "dir/" itself (size 0); a real object is in the way."""
    try:
        info = fs.info(name)
    except FileNotFoundError:
        return False
    return info["type"] == "file" and bool(info.get("size"))


@contextlib.contextmanager
def staged(destination: str) -> Iterator[Path]:
    """Yields a local directory to write into; publishes it at `destination` when the block ends without exception.

    Local: the directory is a hidden sibling, fsynced, then renamed: readers see nothing or everything. Remote: every
    file is staged under $TMPDIR and uploaded, config.json last: readers cannot load half of it.
    On an exception the destination is untouched. Raises DestinationError.
    """
    destination = str(destination)
    check_destination(destination)
    if _is_local(destination):
        with _staged_local(_local_path(destination).resolve()) as directory:
            yield directory
    else:
        with tempfile.TemporaryDirectory(prefix="kithara_ray_export_") as directory:
            yield Path(directory)
            _upload(Path(directory), destination)


@contextlib.contextmanager
def _staged_local(target: Path) -> Iterator[Path]:
    made = _make_parents(target.parent)
    staging = target.parent / f".{target.name}.staging-{uuid.uuid4().hex[:8]}"
    try:
        staging.mkdir()
        yield staging
        _sync_tree(staging)
        try:
            os.rename(staging, target)
        except OSError as error:
            raise DestinationError(f"{target}: not published ({error.strerror}); was it filled meanwhile?") from error
        _sync(target.parent)
        log.info("published %s", target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _make_parents(directory: Path) -> list[Path]:
    """Create the directory; returns those that were not there, deepest first."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return made


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(directory: Path) -> None:
    for parent, _, files in os.walk(directory, topdown=False):
        for name in files:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _upload(directory: Path, url: str) -> None:
    fs, root = _filesystem(url, DestinationError)
    _check_remote_empty(fs, root, url)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    files.sort(key=lambda path: PUBLISHED_LAST.index(path.name) if path.name in PUBLISHED_LAST else -1)
    put: list[str] = []
    try:
        for path in files:
            remote = f"{root}/{path.relative_to(directory).as_posix()}"
            put.append(remote)
            fs.put_file(str(path), remote)
            size_bytes = fs.info(remote)["size"]
            if size_bytes != path.stat().st_size:
                raise OSError(f"{remote} holds {size_bytes} of {path.stat().st_size} bytes")
    except BaseException as error:
        for remote in put:
            with contextlib.suppress(Exception):
                fs.rm_file(remote)
        if not isinstance(error, Exception):
            raise
        raise DestinationError(f"{url}: upload failed ({_cause(error)}); nothing was published") from error
    log.info("published %s: files=%d", url, len(files))
