"""Try a run's inputs and outputs before it starts: destinations on the head node, the first rows of its data."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kithara_ray.errors import DataError, DestinationError, KitharaRayError
from kithara_ray.hf.exports.request import ExportRequest
from kithara_ray.hf.publish.publish import check_destination
from kithara_ray.orchestration.cluster.remote import head_node_id
from kithara_ray.orchestration.data import sources
from kithara_ray.orchestration.preflight.tasks import Found, check_snapshots, probe, probe_directory, tokenize_first
from kithara_ray.orchestration.request.run_request import RunRequest
from kithara_ray.storage import urls
from kithara_ray.storage.urls import absolute

_TIMEOUT_S = 60.0
_FIRST_ROWS = 2


class HeadProbes:
    """Places to write to. A task on the head node tries each, because the head node will write there.

    Args:
        places: path -> its check, which raises DestinationError.
    """

    def __init__(self, places: Mapping[str, Callable[[str], None]]):
        head = head_node_id()
        where = NodeAffinitySchedulingStrategy(head, soft=False) if head else "DEFAULT"
        self._asked = {
            path: probe.options(scheduling_strategy=where).remote(path, check) for path, check in places.items()
        }
        self._found: dict[str, Found] | None = None

    def results(self) -> dict[str, Found]:
        """Return the results by path. Raises DestinationError for places that do not answer."""
        if self._found is None:
            late = ray.wait(list(self._asked.values()), num_returns=len(self._asked), timeout=_TIMEOUT_S)[1]
            slow = [path for path, asked in self._asked.items() if asked in late]
            if slow:
                raise DestinationError(
                    f"{', '.join(slow)}: no answer within {_TIMEOUT_S:g} s; check the network and credentials of "
                    "the head node"
                )
            self._found = {path: ray.get(asked) for path, asked in self._asked.items()}
        return self._found

    def check(self) -> str:
        """Check that all places can be written."""
        errors = [error for error, _ in self.results().values() if error is not None]
        if errors:
            raise DestinationError("; ".join(map(str, errors)))
        return ", ".join(self._asked) or "none"


class Probes(HeadProbes):
    """Every place that a run, and the exports after it, write to."""

    def __init__(self, request: RunRequest, exports: Sequence[ExportRequest]):
        self._exports = exports
        super().__init__(places_of(request, exports))

    def free(self) -> dict[str, int]:
        """Return the free bytes at each local directory that base or merged weights are exported to."""
        whole = {export.output_dir for export in self._exports if not export.only_save_adapters}
        found = {path: self.results()[path][1] for path in sorted(whole)}
        return {path: free for path, free in found.items() if free is not None}


def places_of(request: RunRequest, exports: Sequence[ExportRequest]) -> dict[str, Callable[[str], None]]:
    """Return path -> check for every place that a run, and the exports after it, write to."""
    # An export that resumes a killed one finds files there.
    places: dict[str, Callable[[str], None]]
    places = {export.output_dir: probe_directory if export.resume else check_destination for export in exports}
    run_config = request.group.run_config
    storage_path = absolute(str(run_config.storage_path))
    # Ray writes to other stores through its own library, which needs other credentials than fsspec does.
    ours = not urls.is_url(storage_path) or storage_path.startswith("gs://")
    if run_config.storage_filesystem is None and ours:
        places[storage_path] = probe_directory
    if request.checkpointer is not None:
        places[request.checkpointer.checkpoint_dir] = probe_directory
    if request.snapshots is not None:
        may_resume = request.checkpointer is not None
        places[request.snapshots.directory] = functools.partial(check_snapshots, may_resume=may_resume)
    return places


class FirstRows:
    """The first rows of each dataset: read and formatted here, tokenised in a task while other checks run."""

    def __init__(self, request: RunRequest, tokenize: bool):
        self._asked: list[tuple[str, Any]] = []
        self._formatted: list[str] = []
        self._error: KitharaRayError | None = None
        try:
            for name, loader in request.loaders():
                for dataset in getattr(loader.dataset, "datasets", (loader.dataset,)):
                    self._look(name, dataset, tokenize)
        except KitharaRayError as error:
            self._error = error

    def _look(self, name: str, dataset: Any, tokenize: bool) -> None:
        found = first_rows(dataset)
        rows = [row for _, row in found]
        row_tokenizer = dataset.row_tokenizer()
        if tokenize:
            self._asked.append((name, tokenize_first.remote(row_tokenizer, rows)))
        elif row_tokenizer.on_bad_row == "error":
            for where, row in found:
                if not isinstance(row, Exception):  # unreadable rows are reported when all rows are read
                    row_tokenizer.read(row, where)
        columns = ", ".join(map(str, rows[0])) if rows and isinstance(rows[0], Mapping) else "none"
        self._formatted.append(f"{name}: {len(rows)} row(s) read, columns {columns}")

    def check(self) -> str:
        if self._error is not None:
            raise self._error
        texts = list(self._formatted)
        for name, asked in self._asked:
            try:
                error, text = ray.get(asked, timeout=_TIMEOUT_S)
            except GetTimeoutError:
                raise DataError(
                    f"{name}: the tokenizer did not load within {_TIMEOUT_S:g} s; check its handle and the network"
                ) from None
            if error is not None:
                raise error
            texts.append(text)
        return "; ".join(texts)


def first_rows(dataset: Any) -> list[tuple[str, Any]]:
    """Return (place, row) of the first rows of a source; none for a stream, which could not be read again.

    Raises:
        DataError: the source cannot be read, or has no rows.
    """
    if dataset.is_endless:
        return []
    found = _first_of(dataset)
    if not found:
        raise DataError("the dataset is empty: the source has no rows; nothing can be trained")
    return found


def _first_of(dataset: Any) -> list[tuple[str, Any]]:
    is_ray = sources.is_ray_dataset(dataset.source)
    source = dataset.source.limit(_FIRST_ROWS) if is_ray else dataset.source
    for work, part in sources.work(source, choice=dataset.choice):
        if work.piece is None:
            rows = work.rows(ray.get(part[0]), *part[1:]) if part else work.rows()
            return [(f"row {number}", row) for number, row in enumerate(rows[:_FIRST_ROWS])]
        loaded = work.payload if work.payload is not None else work.piece.load()
        rows = itertools.islice(work.piece.rows(loaded), _FIRST_ROWS)
        found = [(f"{place} of {work.piece.url}", row) for place, row in rows]
        if found:
            return found
    return []
