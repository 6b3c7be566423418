"""A model whose weights were all trained: the directory that a run leaves, and its export.

The run's directory is a Hugging Face model in the dtype that was trained in. It is what training goes on from and what
exports are made of: those have the base's dtypes.
"""

import contextlib
import logging
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from kithara_ray.errors import DestinationError, ExportError
from kithara_ray.hf import publish, storage
from kithara_ray.hf.card import trained_card
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.export import CARD, REPORT, carry_over
from kithara_ray.hf.merge import FLOAT_TAGS, check_dtype, write_config, write_json
from kithara_ray.hf.part import Part, Written, digest, parts_of, write_serially
from kithara_ray.hf.proof import prove_checkpoint
from kithara_ray.hf.trained import TensorSlice, TrainedWriter

log = logging.getLogger(__name__)

DIRECTORY = "model"


class Receiver:
    """Takes the trained weights of one run and publishes them as `<directory>/model`, or `model-2` and so on.

    Args:
        base: what was trained.
        names: of the tensors that will come.
        dtype: that they come in.
        directory: the run's, a path or a URL. For a URL every file is kept here until it is whole.

    Attributes:
        token: tells this receiver from one of an earlier attempt.
    """

    def __init__(self, base: BaseCheckpoint, names: Iterable[str], dtype: str, directory: str):
        self.token = secrets.randbelow(2**31)
        self._base, self._dtype = base, dtype
        self._destination = next(url for url in _candidates(directory) if not _exists(url))
        self._open = contextlib.ExitStack()
        self._stage = self._open.enter_context(publish.staged(self._destination))
        try:
            self._writer = TrainedWriter(base, names, dtype, self._stage.directory, self._place)
        except BaseException as error:
            self._open.__exit__(type(error), error, error.__traceback__)
            raise

    def put(self, part: TensorSlice) -> None:
        """See `TrainedWriter.put`; threads may call it at once."""
        self._writer.put(part)

    def _place(self, path: Path) -> None:
        """A whole file of a URL goes there at once, so that this host's disk holds a few."""
        if self._stage.is_remote:
            publish.put_file(path, storage.join(self._stage.target, path.name))
            self._stage.placed.append(path.name)
            path.unlink()

    def publish(self, num_ranks: int) -> str:
        """Where it is. Raises ExportError when something is missing."""
        try:
            self._writer.check_complete(num_ranks)
            write_config(self._base, self._stage.directory, self._dtype)
            carry_over(self._base, self._stage.directory)
        except BaseException as error:
            self._open.__exit__(type(error), error, error.__traceback__)
            raise
        self._open.close()
        return self._destination

    def abandon(self) -> None:
        """Leave nothing, unless it was published."""
        error = DestinationError("the run began again")
        self._open.__exit__(DestinationError, error, None)


def _candidates(directory: str) -> Iterator[str]:
    yield storage.join(directory, DIRECTORY)
    number = 2
    while True:
        yield storage.join(directory, f"{DIRECTORY}-{number}")
        number += 1


def _exists(url: str) -> bool:
    if not storage.is_url(url):
        return Path(url).exists()
    fs, root = storage.filesystem(url, DestinationError)
    return fs.exists(root)


# ---------------------------------------------------------------------------------------------------------- export


def export_trained(
    base: BaseCheckpoint,
    trained: BaseCheckpoint,
    destination: str,
    dtype: str = "auto",
    *,
    base_name: str,
    write: Callable[[list[Part]], Iterable[Written]] = write_serially,
) -> str:
    """Write what a `Receiver` published at `destination`, in files and dtypes like the base's; returns the destination.

    dtype: of all floating tensors; "auto" is the base's, tensor by tensor. write: as of `hf.export.export`.
    Raises DestinationError, ConfigError, ExportError; nothing is published then.
    """
    started_s = time.perf_counter()
    tag = check_dtype(dtype)
    _check_same_tensors(base, trained)
    tags = {name: tag if tag and info.dtype in FLOAT_TAGS else info.dtype for name, info in base.tensors.items()}
    with publish.staged(str(destination)) as stage:
        files = _write_files(trained, tags, stage, write)
        configs = write_config(base, stage.directory, dtype)
        with _reopened(stage, configs) as directory:
            prove_checkpoint(directory, base, tag)
        carry_over(base, stage.directory)
        report = {
            "layout": "trained",
            "dtype": dtype,
            "base": {"name": base_name, "tensors": len(base.tensors)},
            "tensors": {"trained": len(trained.tensors)},
            "checks": [
                "checkpoint reopened; names, shapes, files and dtypes are the base's",
                "every tensor equals what was trained, rounded to its dtype, bit by bit",
            ],
        }
        (stage.directory / CARD).write_text(trained_card(base_name, report), encoding="utf-8")
        others = [path for path in sorted(stage.directory.iterdir()) if path.is_file() and path.name not in files]
        report["files"] = files | {path.name: digest(path) for path in others}
        report["seconds"] = round(time.perf_counter() - started_s, 3)
        write_json(stage.directory / REPORT, report)
    log.info("exported trained weights destination=%s seconds=%.1f", destination, report["seconds"])
    return str(destination)


def _check_same_tensors(base: BaseCheckpoint, trained: BaseCheckpoint) -> None:
    ours, theirs = ({n: (i.shape, i.file.name) for n, i in one.tensors.items()} for one in (trained, base))
    if ours != theirs:
        different = sorted(name for name in ours.keys() | theirs if ours.get(name) != theirs.get(name))
        raise ExportError(f"{trained.directory}: {different[0]} is not as in the base; was the base changed since?")


def _write_files(
    trained: BaseCheckpoint,
    tags: Mapping[str, str],
    stage: publish.Stage,
    write: Callable[[list[Part]], Iterable[Written]],
) -> dict[str, dict]:
    """The weight files, cast; name -> size and digest."""
    names = [file.name for file in trained.files]
    if stage.is_remote:
        stage.placed += names
    written = {file.name: file.file for file in write(parts_of(trained, None, stage.target, tags))}
    if sorted(written) != sorted(names):
        raise ExportError(f"{len(written)} of {len(names)} weight files were written; start the export again")
    return written


@contextlib.contextmanager
def _reopened(stage: publish.Stage, configs: Iterable[Path]) -> Iterator[Path]:
    """A directory with the headers of what was written, read back from where it is."""
    if not stage.is_remote:
        yield stage.directory
        return
    with tempfile.TemporaryDirectory(prefix="kithara_ray_proof_") as scratch:
        stage.headers_of_placed(Path(scratch))
        for path in configs:
            shutil.copyfile(path, Path(scratch, path.name))
        yield Path(scratch)
