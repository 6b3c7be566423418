"""A model whose weights were all trained: its directory in a run, and its export.

The run's directory is a Hugging Face model in the training's dtype. Training resumes from it, and exports are made from
it; exports have the base's dtypes.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import secrets
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from kithara_ray import __version__ as VERSION
from kithara_ray.errors import DestinationError, ExportError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.carried import carry, check_code
from kithara_ray.hf.exports.export import Settings, add_files, describe, write_weights
from kithara_ray.hf.exports.notes import tower_notes
from kithara_ray.hf.exports.options import ExportOptions
from kithara_ray.hf.exports.reference import shown_name
from kithara_ray.hf.exports.trained import TensorSlice, TrainedWriter
from kithara_ray.hf.merging.merge import check_dtype, out_tag, write_config
from kithara_ray.hf.model_files import read_tokenizer
from kithara_ray.hf.publish import publish
from kithara_ray.storage import urls

log = logging.getLogger(__name__)

DIRECTORY, TOKENIZER = "model", "tokenizer"
TRAINED = "trained"  # the layout that a report names


class Receiver:
    """A receiver of one run's trained weights, which it publishes as `<directory>/model`, or `model-2` and so on.

    Args:
        base: the model that was trained.
        names: names of the tensors that will arrive.
        dtype: the dtype in which they arrive.
        directory: the run's, a path or a URL. For a URL, every file stays on this host until it is complete.

    Attributes:
        token: distinguishes this receiver from that of an earlier attempt.
    """

    def __init__(self, base: BaseCheckpoint, names: Collection[str], dtype: str, directory: str):
        self.token = secrets.randbelow(2**31)
        self._base_name, self._tokenizer = base.source or str(base.directory), urls.join(directory, TOKENIZER)
        check_code(base, self._base_name)
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
        """See `TrainedWriter.put`; several threads may call it at the same time."""
        self._writer.put(part)

    def _place(self, path: Path) -> None:
        """Upload a complete file at once if the directory is a URL, so that this host's disk holds only a few."""
        if self._stage.is_remote:
            self._stage.expect([path.name])
            publish.put_file(path, self._stage.target, path.name)
            path.unlink()

    def publish(self, num_ranks: int) -> str:
        """Publish the weights and return their location. Raises ExportError if something is missing."""
        try:
            self._writer.check_complete(num_ranks)
            write_config(self._base, self._stage.directory, self._dtype)
            tokenizer = read_tokenizer(self._tokenizer)
            for note in carry(self._base, self._stage.directory, self._base_name, tokenizer, with_model=True):
                log.warning("%s: %s", self._destination, note)
        except BaseException as error:
            self._open.__exit__(type(error), error, error.__traceback__)
            raise
        self._open.close()
        return self._destination

    def abandon(self) -> None:
        """Remove everything, unless it was published."""
        error = DestinationError("the run began again")
        self._open.__exit__(DestinationError, error, None)


def _candidates(directory: str) -> Iterator[str]:
    yield urls.join(directory, DIRECTORY)
    number = 2
    while True:
        yield urls.join(directory, f"{DIRECTORY}-{number}")
        number += 1


def _exists(url: str) -> bool:
    if not urls.is_url(url):
        return Path(url).exists()
    fs, root = urls.filesystem(url, DestinationError)
    return fs.exists(root)


# ---------------------------------------------------------------------------------------------------------- export


def export_trained(base: BaseCheckpoint, trained: BaseCheckpoint, destination: str, options: ExportOptions) -> str:
    """Export a `Receiver`'s model to `destination`, in files and dtypes like the base's; return the destination.

    options: dtype "auto" is the base's, tensor by tensor. The tokenizer is the one next to the trained weights, and
    nothing is merged that could be proven.
    Raises DestinationError, ConfigError, ExportError; nothing is published then.
    """
    started_s = time.perf_counter()
    tag, destination = check_dtype(options.dtype), str(destination)
    options = dataclasses.replace(options, tokenizer=str(trained.directory), prove=None)
    _check_same_tensors(base, trained)
    check_code(base, options.base_name)
    tags = {name: out_tag(info, tag) for name, info in base.tensors.items()}
    settings = Settings(TRAINED, options, options.files_of(base), tags, base)
    with publish.staged(destination, _plan(base, trained, settings), options.resume) as stage:
        written = write_weights(trained, None, stage, settings)
        report = {
            "layout": TRAINED,
            "dtype": options.dtype,
            "base": {"name": shown_name(options.base_name), "tensors": len(base.tensors)},
            "tensors": {"trained": len(trained.tensors)},
            "checks": [
                "checkpoint reopened; names, shapes, files and dtypes are the base's",
                "every tensor equals what was trained, rounded to its dtype, bit by bit",
            ],
            "notes": tower_notes(base, options.dtype),
        }
        files = {file.name: file.file for file in written}
        add_files(base, stage, report, None, destination, options)
        describe(stage, report, files, started_s)
    log.info("exported trained weights destination=%s seconds=%.1f", destination, report["seconds"])
    return destination


def _check_same_tensors(base: BaseCheckpoint, trained: BaseCheckpoint) -> None:
    ours, theirs = ({n: (i.shape, i.file.name) for n, i in one.tensors.items()} for one in (trained, base))
    if ours != theirs:
        different = sorted(name for name in ours.keys() | theirs if ours.get(name) != theirs.get(name))
        raise ExportError(f"{trained.directory}: {different[0]} differs from the base's; has the base changed since?")


def _plan(base: BaseCheckpoint, trained: BaseCheckpoint, settings: Settings) -> str:
    """Digest everything that decides the weight files' bytes; trained weights are never overwritten."""
    where, options = [one.source or str(one.directory) for one in (base, trained)], settings.options
    what = [VERSION, settings.layout, options.dtype, settings.files, settings.tags, options.check_finite, where]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
