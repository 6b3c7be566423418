"""Write a run's history into its directory, and the report page made from it.

run.json        the run's inputs and settings, and its outcome
history.json    its logged steps and evaluations, samples, exports
report.html     made from the two; can be made again
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

import jinja2

from kithara_ray.checkpoint import disk_format
from kithara_ray.checkpoint.disk_format import Checkpoint
from kithara_ray.checkpoint.run_files import CHECKPOINTS, RUN, read_object
from kithara_ray.errors import ConfigError
from kithara_ray.redact import redact
from kithara_ray.report import page
from kithara_ray.storage.places import Place

logger = logging.getLogger(__name__)

HISTORY, REPORT, EXPORT = "history.json", "report.html", "export_report.json"
# As many events as a browser can show; a longer run keeps only every n-th step.
_MOST_EVENTS = 50_000


def write(directory: str, history: Mapping[str, Any]) -> str:
    """Write history.json and report.html of the run whose run.json is in `directory`; return the page's location."""
    data = json.dumps(_thinned(history), separators=(",", ":"), default=str).encode()
    Place(directory).put_bytes(data, "", HISTORY)
    return rewrite(directory)


def rewrite(directory: str) -> str:
    """Write report.html again from the files in a run's directory; return its location.

    For a run that was killed, the newest checkpoint in its `checkpoints/` holds the history.

    Raises:
        ConfigError: it is not a run's directory, or its files do not hold what a run writes.
        DestinationError: the page cannot be written.
    """
    place = Place(str(directory).rstrip("/") or "/")
    names = place.files("")
    if RUN not in names:
        raise ConfigError(f"{directory}: no {RUN} there; give a run's directory, <storage_path>/<name>")
    run = read_object(place, RUN)
    history = read_object(place, HISTORY) if HISTORY in names else _of_checkpoint(place)
    try:
        text = page.render(redact(run), redact(history))
    except (TypeError, ValueError, KeyError, AttributeError, jinja2.TemplateError) as error:
        raise ConfigError(f"{directory}: {RUN} or {HISTORY} is not a file that a run writes ({error})") from error
    place.put_bytes(text.encode("utf-8", "replace"), "", REPORT)
    return place.url(REPORT)


def add_export(directory: str, destination: str) -> None:
    """Add an export of the run to the page, with the checks that its export_report.json records."""
    place = Place(directory)
    history = read_object(place, HISTORY) if HISTORY in place.files("") else {}
    entry: dict[str, Any] = {"path": destination}
    if not destination.startswith("hf://"):
        report = read_object(Place(destination), EXPORT)
        entry |= {name: report.get(name) for name in ("layout", "dtype", "tensors", "checks", "notes", "seconds")}
        entry["bytes"] = sum(file.get("bytes", 0) for file in report.get("files", {}).values())
    kept = [told for told in history.get("exports", []) if told.get("path") != destination]
    write(directory, {**history, "exports": [*kept, entry]})


def _of_checkpoint(place: Place) -> dict[str, Any]:
    inner = Place(place.url(CHECKPOINTS))
    for directory in disk_format.committed(inner):
        try:
            return {"events": Checkpoint.open(inner, directory).events()}
        except (ValueError, OSError) as error:
            logger.warning("%s: %s", inner.url(directory), error)
    return {}


def _thinned(history: Mapping[str, Any]) -> dict[str, Any]:
    events = list(history.get("events", []))
    keep = len(events) // _MOST_EVENTS + 1
    if keep > 1:
        events = [event for number, event in enumerate(events) if event["kind"] != "step" or number % keep == 0]
    return {**history, "events": events}
