"""The files of a run's directory: run.json, and the newest adapter or a given step's. No Ray, no JAX."""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kithara_ray.checkpoint import disk_format
from kithara_ray.checkpoint.disk_format import Checkpoint
from kithara_ray.errors import CheckpointError, ConfigError, DestinationError
from kithara_ray.hf.adapter import ADAPTER_CONFIG, Adapter
from kithara_ray.hf.fetch import fetch
from kithara_ray.hf.identity import BaseIdentity, named
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.hf.model_files import has_tokenizer, read_tokenizer
from kithara_ray.storage import urls
from kithara_ray.storage.places import Place

log = logging.getLogger(__name__)

CHECKPOINTS, ADAPTER, RUN, TOKENIZER = "checkpoints", "adapter", "run.json", "tokenizer"
# Directories in a run's directory, or in those for its checkpoints and exports; `tokenizer/` is next to them.
_OF_A_RUN = re.compile(r"adapter|adapters|checkpoints|model(-\d+)?|step-\d{6,}(-[0-9a-f]{8})?")


@dataclass
class Trained:
    """An adapter and its origin.

    base: the handle of its base; None if the files do not say.
    trained_on: the identity of that base, as far as the files say.
    run: the known facts about the training, for run.json.
    tokenizer: the location of the tokenizer that it was trained with; None if that is not known.
    """

    adapter: Adapter
    base: str | None
    trained_on: BaseIdentity
    run: dict[str, Any]
    tokenizer: str | None = None


def tokenizer_of(location: str) -> str | None:
    """Return the location of the tokenizer that an adapter, a checkpoint or a run was trained with.

    It is next to the adapter, or in `tokenizer/` of the run's directory. None if neither holds one, or for an adapter
    on the Hub, which is fetched.
    """
    if str(location).startswith("hf://"):
        return None
    place, candidates = str(location).rstrip("/"), [str(location)]
    for _ in range(3):
        candidates.append(urls.join(place, TOKENIZER))
        parent, _, name = place.rpartition("/")
        if not parent or not _OF_A_RUN.fullmatch(name):
            break
        place = parent
    return next((candidate for candidate in candidates if has_tokenizer(candidate)), None)


def tokenizer_beside(adapters: Sequence[str]) -> str | None:
    """Return the location of several adapters' tokenizer; None, with a warning, if their tokenizers differ."""
    found = [place for adapter in adapters if (place := _beside(adapter))]
    if len(found) > 1 and any(read_tokenizer(place) != read_tokenizer(found[0]) for place in found):
        log.warning("the adapters were trained with different tokenizers; the export has the base's")
        return None
    return found[0] if found else None


def _beside(adapter: str) -> str | None:
    directory = str(fetch(adapter))
    if has_tokenizer(directory):
        return directory
    return None if urls.is_url(adapter) else tokenizer_of(directory)


def read_trained(location: str, step: int | None = None) -> Trained:
    """Read the adapter at `location`.

    `location` is a PEFT adapter, a run's directory, its directory of checkpoints, or one checkpoint.

    Without `step`, this takes `adapter/` of a run that ended, else the newest checkpoint. With `step`, it takes that
    step's checkpoint. It verifies every file of the checkpoint. Raises AdapterError, CheckpointError, ConfigError.
    """
    trained = _find(location, step)
    trained.tokenizer = trained.tokenizer or tokenizer_of(location)
    manifest = _manifest(str(location))
    if manifest is not None:
        trained.run["training"] = manifest
    return trained


def write_manifest(directory: str, content: Mapping[str, Any]) -> None:
    """Write run.json into a run's directory, whole or not at all. Raises DestinationError."""
    Place(directory).put_bytes((json.dumps(content, indent=2) + "\n").encode(), "", RUN)


def _manifest(location: str) -> dict[str, Any] | None:
    """Read run.json if `location` is a run's directory. Exports copy it."""
    place = Place(location.rstrip("/"))
    if RUN not in place.files(""):
        return None
    try:
        return read_object(place, RUN)
    except ConfigError:
        return None


def read_object(place: Place, name: str) -> dict[str, Any]:
    """Read a file of named values, such as run.json, from a run's directory.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        found = json.loads(place.read("", name))
    except (OSError, ValueError, RecursionError, DestinationError) as error:
        raise ConfigError(f"{place.url(name)} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{place.url(name)} is not a file that a run writes: it is not a JSON object")
    return found


def _find(location: str, step: int | None) -> Trained:
    place = Place(str(location).rstrip("/"))
    if step is None:
        for directory in ("", ADAPTER):
            if ADAPTER_CONFIG in place.files(directory):
                return _read_adapter(urls.join(str(location), directory) if directory else str(location))
    parent, _, name = str(location).rstrip("/").rpartition("/")
    if re.fullmatch(r"step-\d{8,}-[0-9a-f]{8}", name) and disk_format.MANIFEST in place.files(""):
        return _read_checkpoint(Checkpoint.open(Place(parent), name), step)
    for directory in (str(location), urls.join(str(location), CHECKPOINTS)):
        found = disk_format.committed(Place(directory))
        chosen = [name for name in found if step is None or disk_format.step_of(name) == step]
        if chosen:
            return _read_checkpoint(Checkpoint.open(Place(directory), chosen[0]), step)
        if found:
            steps = ", ".join(str(disk_format.step_of(name)) for name in sorted(found))
            raise ConfigError(f"{directory}: no checkpoint of step {step}; there are checkpoints of steps {steps}")
    raise CheckpointError(
        f"{location}: neither a PEFT adapter ({ADAPTER_CONFIG}), nor a run's directory with adapter/ or checkpoints/, "
        "nor a checkpoint that was committed; give the run's path or its checkpoint_dir"
    )


def _revision_of(found: Checkpoint) -> str | None:
    """Return the base's revision from the run.json next to a run's checkpoints."""
    run = _manifest(found.place.root.rstrip("/").rpartition("/")[0])
    base = run.get("base") if run else None
    revision = base.get("revision") if isinstance(base, dict) else None
    return revision if isinstance(revision, str) else None


def _read_adapter(location: str) -> Trained:
    directory = fetch(location)
    adapter = Adapter.read(directory)
    tokenizer = str(directory) if has_tokenizer(str(directory)) else None
    return Trained(adapter, adapter.trained_on.handle, adapter.trained_on, {"source": str(location)}, tokenizer)


def _read_checkpoint(found: Checkpoint, step: int | None) -> Trained:
    if step is not None and found.step != step:
        raise ConfigError(f"{found.url} is of step {found.step}, but step {step} was asked for")
    found.verify()
    identity = found.manifest["identity"]
    if not identity.get("lora"):
        raise CheckpointError(f"{found.url} is not from a LoRA run, so it has no adapter")
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    lora = {name: value for name, value in identity["lora"].items() if name in fields}
    if lora.pop("added_rows", None):
        raise CheckpointError(
            f"{found.url}: the run went on from an adapter whose file gave the rows of added tokens, and a checkpoint "
            "does not hold them. Resume the run with its adapter=, or export the adapter in the run's directory"
        )
    config = LoraConfig(**lora)
    run = {"source": found.url, "step": found.step, "metrics": found.manifest["metrics"], "identity": identity}
    trained_on = named(found.manifest.get("base"), _revision_of(found), identity.get("base"))
    return Trained(Adapter(config, found.adapter(), trained_on), trained_on.handle, trained_on, run)
