"""What a run's directory holds of its story, and the page that is made of it.

run.json        what the run was made of, and how it ended
history.json    its logged steps and evaluations, samples, exports
report.html     made of the two; can be made again
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
# A page that a browser can hold; of longer runs every n-th step.
_MOST_EVENTS = 50_000


def write(directory: str, history: Mapping[str, Any]) -> str:
    """history.json and report.html of the run whose run.json is in `directory`; returns where the page is."""
    data = json.dumps(_thinned(history), separators=(",", ":"), default=str).encode()
    Place(directory).put_bytes(data, "", HISTORY)
    return rewrite(directory)


def rewrite(directory: str) -> str:
    """report.html again from what is in a run's directory; returns where it is.

    Of a run that was killed, the newest checkpoint in its `checkpoints/` holds the history.

    Raises:
        ConfigError: it is no run's directory, or its files are not what a run writes.
        DestinationError: it cannot be written.
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
        raise ConfigError(f"{directory}: {RUN} or {HISTORY} is not what a run writes ({error})") from error
    place.put_bytes(text.encode("utf-8", "replace"), "", REPORT)
    return place.url(REPORT)


def add_export(directory: str, destination: str) -> None:
    """Tell the page of an export of the run: what it has proven, by its export_report.json."""
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
