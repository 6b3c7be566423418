"""Carry a run's tokenizer from its data to the model's handle and the run's files."""

import dataclasses
from typing import Any

from ray.actor import ActorHandle

from kithara_ray.orchestration.cluster.remote import remote_get
from kithara_ray.orchestration.data.learned_ends import learned_ends
from kithara_ray.orchestration.driver import kept_tokenizer
from kithara_ray.orchestration.model import KerasHubModel
from kithara_ray.orchestration.worker.spec import RunSpec


def keep_tokenizer(
    model: KerasHubModel, dataset: Any, spec: RunSpec, directory: str | None, coordinator: ActorHandle
) -> dict[str, Any]:
    """Have the coordinator keep the tokenizer in each place that exports are made from, and set it as the model's own.

    Args:
        dataset: the dataset of the training.
        directory: the run's directory, as the head node reaches it; None if the head node cannot.

    Returns: the tokenizer's entry in run.json.
    """
    ends = learned_ends(spec.train.store, dataset)
    model.prompting = dataclasses.replace(kept_tokenizer.prompting_of(dataset), ends=ends)
    others = [spec.checkpointer and spec.checkpointer.checkpoint_dir, spec.snapshots and spec.snapshots.directory]
    inside = directory and f"{directory.rstrip('/')}/"
    apart = [place for place in others if place and not (inside and place.startswith(inside))]
    places = [directory, *apart] if directory else apart
    write = lambda *files: remote_get(coordinator.keep_files.remote(*files))  # noqa: E731
    model.tokenizer, facts = kept_tokenizer.keep(model.prompting, model.preset_handle, places, write)
    return facts
