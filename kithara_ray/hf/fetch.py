"""Fetch models from local directories, hf:// and any URL that fsspec knows. publish.py publishes exports.

Each host downloads a model through fsspec once, under a lock, and renames it into place when it is complete. Functions
import remote libraries when they use them.
"""

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from kithara_ray.errors import CheckpointError, UnsupportedError
from kithara_ray.hf.hub_place import hub_place
from kithara_ray.hf.model_files import (
    LICENCE_FILES,
    REFUSED_FILES,
    SUBDIRECTORIES,
    is_refused,
    matches,
    read_tokenizer,
)
from kithara_ray.storage.urls import cache_dir, cause_of, filesystem, is_url, version_of

log = logging.getLogger(__name__)

# Files taken from a model repository: weights as safetensors, configuration, tokenizer, licence, and the model card,
# which names the licence. No pickle, no code.
MODEL_FILES = (
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "tokenizer*", "README.md"),
    *LICENCE_FILES,
)
WEIGHTS = "*.safetensors"
HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors library itself
RANGE_BYTES = 32 << 20  # one ranged read, held in memory

Report = Callable[[int, int], None]  # (bytes fetched, total bytes), called during a fetch


def is_model_file(name: str) -> bool:
    """True if this library takes a file of a model directory, given by its path there.

    From subdirectories, it takes only the few files that belong to a tokenizer.
    """
    directory, _, leaf = name.rpartition("/")
    return (not directory or directory in SUBDIRECTORIES) and matches(leaf, MODEL_FILES) and not is_refused(name)


def fetch(handle: str, report: Report | None = None) -> Path:
    """Return the local directory of a model: the handle itself if local, else a copy downloaded once per host.

    handle: a local directory, `hf://org/name[/folder][@revision]`, or an fsspec URL such as `gs://bucket/dir`.
    report: called with a download's progress; not called if nothing is downloaded.
    Raises CheckpointError if there is nothing to fetch, UnsupportedError for a handle that is not supported.
    """
    handle = str(handle)
    scheme, _, rest = handle.partition("://")
    if not is_url(handle) or scheme == "file":
        return _fetch_local(rest if scheme == "file" and rest else handle)
    if scheme == "hf":
        return _fetch_hub(handle, rest, report)
    _refuse_keras(handle)
    return _fetch_remote(handle, report=report)


def _refuse_keras(handle: str) -> None:
    scheme = handle.partition("://")[0]
    if scheme in ("kaggle", "kerashub", "keras", "modelscope"):
        raise UnsupportedError(
            f"{handle}: {scheme}:// presets hold Keras weights, and exports need Hugging Face files; use "
            "hf://org/name, a gs:// directory or a local directory with config.json and safetensors"
        )


def _fetch_local(handle: str) -> Path:
    path = Path(handle).expanduser().absolute()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the model's directory")
    advice = f"for the Hugging Face hub write hf://{handle}" if handle.count("/") == 1 and handle[0] not in "./~" else (
        "a KerasHub preset name cannot be used, because exports need Hugging Face files: write hf://org/name or the "
        "path of a directory that exists on this host"
    )  # fmt: skip
    raise CheckpointError(f"no directory at {path} for the handle {handle!r}; {advice}")


def _fetch_hub(handle: str, rest: str, report: Report | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    place = hub_place(handle)
    within = f"{place.folder}/" if place.folder else ""
    try:
        directory = Path(
            huggingface_hub.snapshot_download(
                place.repo_id,
                revision=place.revision,
                allow_patterns=[within + pattern for pattern in MODEL_FILES],
                # No original/, onnx/, checkpoints of the training run.
                ignore_patterns=[f"{within}*/*", *REFUSED_FILES],
                tqdm_class=_reporting_bar(report) if report else None,
            )
        )
        if "snapshots" in directory.parts[:-1]:  # named after the commit: a branch may have moved since
            huggingface_hub.snapshot_download(
                place.repo_id,
                revision=directory.name,
                allow_patterns=[f"{within}{name}/*" for name in SUBDIRECTORIES],
                ignore_patterns=[f"{within}{name}/*/*" for name in SUBDIRECTORIES] + list(REFUSED_FILES),
            )
        if place.folder and not (directory / place.folder).is_dir():
            raise CheckpointError(f"{handle}: hf://{place.repo_id} has no folder {place.folder!r} with model files")
        return directory / place.folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _not_from_hub(handle, error) from error


def _reporting_bar(report: Report) -> type:
    """Return the hub's own progress bar class, extended to call `report`.

    The hub has one bar for bytes received and one for bytes written. Their totals grow as files begin. `report`
    receives the one that is further ahead.
    """
    from huggingface_hub.utils import tqdm

    furthest = 0

    class Reporting(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            nonlocal furthest
            shown = super().update(n)
            if self.unit == "B" and self.total and self.n > furthest:
                furthest = int(self.n)
                report(furthest, int(self.total))
            return shown

    return Reporting


def fetch_headers(handle: str) -> tuple[Path, str | None]:
    """Return (directory, source) of a model, leaving its weights where they are.

    For a URL, the directory holds all small files. Each weight file there is a sparse file of the true size that holds
    only the header. source is the URL, with the commit for a Hub model. A local model, or a Hub model that this host
    has already fetched, is complete: source is None.
    """
    if not is_url(handle) or handle.startswith("file://"):
        return fetch(handle), None
    _refuse_keras(handle)
    if handle.startswith("hf://"):
        fetched = fetched_from_hub(handle)
        if fetched is not None:
            return fetched, None
        handle = _with_commit(handle)
    return _fetch_remote(handle, weights=False), handle.rstrip("/")


def fetched_from_hub(handle: str) -> Path | None:
    """Return a Hub model's directory in this host's cache; None unless all its weights are there."""
    import huggingface_hub

    place = hub_place(handle)
    try:
        found = huggingface_hub.snapshot_download(place.repo_id, revision=place.revision, local_files_only=True)
        directory = Path(found) / place.folder
        index = directory / "model.safetensors.index.json"
        weights = json.loads(index.read_text())["weight_map"].values() if index.exists() else ["model.safetensors"]
    except (OSError, ValueError, KeyError):
        return None
    needed = ["config.json", *weights]
    return directory if all((directory / name).is_file() for name in needed) else None


def _with_commit(handle: str) -> str:
    """Return hf://org/name@<commit>[/folder], since a branch may move while files are read; fsspec reads it so."""
    import huggingface_hub

    place = hub_place(handle)
    try:
        commit = huggingface_hub.HfApi().model_info(place.repo_id, revision=place.revision).sha
    except Exception as error:
        raise _not_from_hub(handle, error) from error
    return f"hf://{place.repo_id}@{commit}" + (f"/{place.folder}" if place.folder else "")


def tokenizer_at(location: str) -> dict[str, bytes]:
    """Apply `read_tokenizer` to a directory or URL, or to a model or adapter on the Hub."""
    return read_tokenizer(str(fetch(location)) if location.startswith("hf://") else location)


def names_at(handle: str) -> list[str]:
    """List every file of a model at a URL by its path there, including those not taken. Raises CheckpointError."""
    if handle.startswith("hf://"):
        import huggingface_hub

        place = hub_place(handle)
        within = f"{place.folder}/" if place.folder else ""
        try:
            names = huggingface_hub.HfApi().list_repo_files(place.repo_id, revision=place.revision)
        except Exception as error:
            raise _not_from_hub(handle, error) from error
        return sorted(name.removeprefix(within) for name in names if name.startswith(within))
    fs, root = filesystem(handle, CheckpointError)
    try:
        found = fs.find(root)
    except Exception as error:
        raise CheckpointError(f"{handle}: cannot be listed ({cause_of(error)}); check credentials") from error
    return sorted(name.removeprefix(root).lstrip("/") for name in found)


def _not_from_hub(handle: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{handle}: could not be fetched from the Hugging Face hub ({cause_of(error)}); check the "
        "name, the network, and for gated models that HF_TOKEN is set on every host"
    )


def fetch_tensors(source: str, name: str, directory: Path, spans: list[tuple[int, int]]) -> Path:
    """Fetch parts of one weight file into a sparse file of the same size in `directory`.

    The model is at the URL `source`. The parts are the header and the byte ranges [begin, end), in ascending order.
    Raises CheckpointError.
    """
    fs, root = filesystem(source, CheckpointError)
    remote, local = f"{root}/{name}", directory / name
    try:
        size_bytes = int(fs.info(remote)["size"])
    except Exception as error:
        raise CheckpointError(f"{source}/{name}: not found ({cause_of(error)}); was the base changed?") from error
    fetch_header(fs, remote, local, size_bytes)
    spans = _joined(spans)
    if spans == [(read_header_bytes(local), size_bytes)]:  # the whole file: as one stream
        _download(fs, remote, local, size_bytes)
        return local
    with local.open("r+b") as stream:
        for begin, end in spans:
            stream.seek(begin)
            for start in range(begin, end, RANGE_BYTES):
                stop = min(end, start + RANGE_BYTES)
                try:
                    data = fs.cat_file(remote, start=start, end=stop)
                except Exception as error:
                    raise CheckpointError(f"{remote}: download failed ({cause_of(error)}); try again") from error
                if len(data) != stop - start:
                    raise CheckpointError(f"{remote}: {len(data)} of {stop - start} bytes arrived; try again")
                stream.write(data)
    return local


def read_ranges(source: str, name: str, spans: list[tuple[int, int]]) -> list[bytes]:
    """Read the byte ranges [begin, end) of one file of the model at the URL `source`. Raises CheckpointError."""
    fs, root = filesystem(source, CheckpointError)
    try:
        return [fs.cat_file(f"{root}/{name}", start=begin, end=end) for begin, end in spans]
    except Exception as error:
        raise CheckpointError(f"{source}/{name}: could not be read ({cause_of(error)}); try again") from error


def read_header_bytes(path: Path) -> int:
    """Return the offset at which the tensors' bytes begin in a safetensors file."""
    with path.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join adjacent ranges and leave out empty ones."""
    joined: list[tuple[int, int]] = []
    for begin, end in spans:
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        elif end > begin:
            joined.append((begin, end))
    return joined


def _fetch_remote(url: str, weights: bool = True, report: Report | None = None) -> Path:
    """Download into `<cache>/<hash of url and listing>` under a lock, and rename it into place only when complete."""
    fs, root = filesystem(url, CheckpointError)
    entries = _listed(fs, root, url)
    sizes = {name: int(entry["size"]) for name, entry in sorted(entries.items()) if is_model_file(name)}
    if not sizes:
        raise CheckpointError(f"{url}: no model files there; give a directory with config.json and safetensors")
    versions = [[name, sizes[name], version_of(entries[name])] for name in sizes]
    key = hashlib.sha256(json.dumps([url.rstrip("/"), versions]).encode()).hexdigest()[:32]
    key += "" if weights else ".headers"
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / key
    with _locked(cache / f"{key}.lock"):
        if target.is_dir():
            return target
        partial = cache / f".{key}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that died; we hold the lock
        partial.mkdir()
        try:
            log.info("fetching %s: files=%d bytes=%d weights=%s", url, len(sizes), sum(sizes.values()), weights)
            before = 0
            for name, size_bytes in sizes.items():
                (partial / name).parent.mkdir(exist_ok=True)
                if weights or not fnmatch.fnmatchcase(name, WEIGHTS):
                    _download(fs, f"{root}/{name}", partial / name, size_bytes, _from(before, sizes, report))
                    before += size_bytes
                else:
                    fetch_header(fs, f"{root}/{name}", partial / name, size_bytes)
            os.rename(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _listed(fs: Any, root: str, url: str) -> dict[str, dict]:
    """List the files at a URL, and in the subdirectories that belong to a model, by their path there."""
    found: dict[str, dict] = {}
    directories = [""]
    while directories:
        directory = directories.pop()
        try:
            listing = fs.ls(f"{root}/{directory}".rstrip("/"), detail=True)
        except FileNotFoundError:
            continue
        except Exception as error:  # every backend has its own exceptions
            raise CheckpointError(f"{url}: cannot be listed ({cause_of(error)}); check credentials") from error
        for entry in listing:
            name = f"{directory}/{entry['name'].rstrip('/').rsplit('/', 1)[-1]}".lstrip("/")
            if entry["type"] == "file":
                found[name] = entry
            elif name in SUBDIRECTORIES:
                directories.append(name)
    return found


def _from(before: int, sizes: dict[str, int], report: Report | None) -> Report | None:
    """Return a report for one file that adds the `before` bytes of earlier files and counts against all files."""
    total = sum(sizes.values())
    return report and (lambda here, _: report(before + here, total))


def fetch_header(fs: Any, remote: str, local: Path, size_bytes: int) -> None:
    """Fetch the header of a safetensors file into a sparse file of the same size; read_header checks what arrived."""
    try:
        start = fs.cat_file(remote, start=0, end=min(8, size_bytes))
        header_bytes = min(int.from_bytes(start, "little"), HEADER_LIMIT_BYTES, max(0, size_bytes - 8))
        data = start + (fs.cat_file(remote, start=8, end=8 + header_bytes) if header_bytes else b"")
    except Exception as error:
        raise CheckpointError(f"{remote}: its header could not be read ({cause_of(error)}); try again") from error
    with local.open("wb") as stream:
        stream.write(data)
        stream.truncate(size_bytes)


def _download(fs: Any, remote: str, local: Path, size_bytes: int, report: Report | None = None) -> None:
    import fsspec

    hooks = {"report": lambda size, value, **_: report(value, size_bytes)} if report else {}
    try:
        fs.get_file(remote, str(local), callback=fsspec.Callback(hooks=hooks))
    except Exception as error:
        raise CheckpointError(f"{remote}: download failed ({cause_of(error)}); try again") from error
    if local.stat().st_size != size_bytes:
        raise CheckpointError(f"{remote}: {local.stat().st_size} of {size_bytes} bytes arrived; try again")


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
