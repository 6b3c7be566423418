"""Publish to the Hugging Face Hub, `hf://org/name`, in one commit; a repository made here is private.

The process that writes a weight file uploads it before the commit. The Hub keeps such objects by their SHA-256, and
hides them until a commit names them. A killed export therefore leaves an empty repository, and a second export does not
upload existing objects again. The Hub refuses the commit if another one has been made since the export began.
"""

import contextlib
import logging
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kithara_ray.errors import DestinationError, ExportError
from kithara_ray.hf.publish.stage import Journal, Stage
from kithara_ray.storage.scratch import scratch
from kithara_ray.storage.urls import cause_of

log = logging.getLogger(__name__)

OF_THE_HUB = frozenset({".gitattributes"})  # the files of a new repository
SMALL_BYTES = 8 << 20  # a file up to this size stays in memory: the Hub may want it within the commit


@dataclass
class HubStage(Stage):
    """`target` is the destination. `expected` holds the names of the weight files."""

    expected: list[str] = field(default_factory=list)

    def expect(self, names: list[str]) -> None:
        self.expected = list(names)

    def kept(self) -> dict[str, dict[str, Any]]:
        return {}  # the Hub itself knows which objects it has

    def read_headers(self, directory: Path) -> None:
        """Use the headers as sent: uncommitted files cannot be read, but the Hub has compared their SHA-256."""
        for name in self.expected:
            receipt = self.journal.parts[name]["receipt"]
            with (directory / name).open("wb") as stream:
                stream.write(receipt["header"])
                stream.truncate(receipt["bytes"])


def check(url: str) -> None:
    """See `publish.check_destination`. A missing repository is created and deleted again."""
    repo = _repo_of(url)
    if _head(url, repo) is None:
        _create(url, repo)
        with _as_ours(url, "it was made as a probe and could not be deleted"):
            _api().delete_repo(repo)
    else:
        with _as_ours(url, "it cannot be written; set HF_TOKEN to a token with write access"):
            _api().auth_check(repo, write=True)


@contextlib.contextmanager
def staged(url: str, plan: str, resume: bool) -> Generator[HubStage]:
    """See `publish.staged`."""
    repo = _repo_of(url)
    head, made = _head(url, repo), False
    if head is None:
        _create(url, repo)
        head, made = _head(url, repo), True
    if head is None:
        raise DestinationError(f"{url}: the repository that was made there has no commit; delete it and try again")
    try:
        with scratch() as directory:
            stage = HubStage(directory, url, Journal(plan))
            yield stage
            _commit(url, repo, head, stage)
    except BaseException:
        if made and not resume:
            with contextlib.suppress(Exception):
                if _api().repo_info(repo).sha == head:  # it holds nobody's files
                    _api().delete_repo(repo)
        raise
    log.info("published %s: weight_files=%d", url, len(stage.expected))


def put_file(local: Path, target: str, name: str) -> dict[str, Any]:
    """See `publish.put_file`. The receipt holds the operation that names the uploaded object in a commit."""
    from huggingface_hub import CommitOperationAdd

    is_small = local.stat().st_size <= SMALL_BYTES
    with _as_ours(f"{target}/{name}", "upload failed; the export is not published"):
        operation = CommitOperationAdd(name, local.read_bytes() if is_small else str(local))
        _api().preupload_lfs_files(_repo_of(target), [operation])
    with local.open("rb") as stream:
        length = stream.read(8)
        header = length + stream.read(int.from_bytes(length, "little"))
    return {"operation": operation, "header": header, "bytes": local.stat().st_size}


def _commit(url: str, repo: str, head: str, stage: HubStage) -> None:
    from huggingface_hub import CommitOperationAdd

    files = [path for path in sorted(stage.directory.rglob("*")) if path.is_file()]
    operations = [CommitOperationAdd(path.relative_to(stage.directory).as_posix(), str(path)) for path in files]
    operations += [stage.journal.parts[name]["receipt"]["operation"] for name in stage.expected]
    with _as_ours(url, "the commit failed; check on the Hub whether it was made"):
        made = _api().create_commit(repo, operations, commit_message="Export by kithara_ray", parent_commit=head)
        found = _api().get_paths_info(repo, [operation.path_in_repo for operation in operations], revision=made.oid)
    _check_commit(url, {entry.path: entry for entry in found}, stage, operations)


def _check_commit(url: str, found: Mapping[str, Any], stage: HubStage, operations: list[Any]) -> None:
    for operation in operations:
        name, entry = operation.path_in_repo, found.get(operation.path_in_repo)
        if entry is None or entry.size != operation.upload_info.size:
            raise ExportError(f"{url}/{name}: was committed but is incomplete; delete the repository")
        record = stage.journal.parts.get(name)
        if record and entry.lfs and entry.lfs.sha256 != record["file"]["sha256"]:
            raise ExportError(f"{url}/{name}: holds different bytes from those that were proven; delete the repository")


def _api() -> Any:
    import huggingface_hub

    return huggingface_hub.HfApi()


def _repo_of(url: str) -> str:
    repo = url.removeprefix("hf://").rstrip("/")
    if repo.count("/") != 1 or "@" in repo or not all(repo.split("/")):
        raise DestinationError(f"{url}: expected hf://org/name, an empty repository or one that does not exist")
    return repo


def _head(url: str, repo: str) -> str | None:
    """Return an empty repository's newest commit; None if there is none. Raises DestinationError if it is not empty."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with _as_ours(url, "it cannot be read; check the name, the network and HF_TOKEN"):
        try:
            info = _api().repo_info(repo)
        except RepositoryNotFoundError:
            return None
    names = sorted(sibling.rfilename for sibling in info.siblings or ())
    others = [name for name in names if name not in OF_THE_HUB]
    if others:
        raise DestinationError(f"{url} exists and is not empty ({others[0]}); choose another name")
    return info.sha


def _create(url: str, repo: str) -> None:
    with _as_ours(url, "a private repository could not be created there; set HF_TOKEN to a token with write access"):
        _api().create_repo(repo, private=True)


@contextlib.contextmanager
def _as_ours(url: str, advice: str) -> Generator[None]:
    """Raise the errors of huggingface_hub as DestinationError."""
    try:
        yield
    except DestinationError:
        raise
    except Exception as error:  # its own errors, httpx's, and the transfer library's
        raise DestinationError(f"{url}: {advice} ({cause_of(error)})") from error
