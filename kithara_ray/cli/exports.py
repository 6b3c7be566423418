"""The work of `kithara-ray export` and `merge`, once their arguments are read."""

import dataclasses
import logging
from collections.abc import Mapping

from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.card import summary
from kithara_ray.hf.exports.export import export_with_report
from kithara_ray.hf.exports.options import ExportOptions
from kithara_ray.hf.identity import BaseIdentity, check_same_base
from kithara_ray.model.families.tensors import check_tensors, unused_note

logger = logging.getLogger(__name__)


def export(
    adapter: Adapter, to: str, layout: str, options: ExportOptions, bases: Mapping[str, BaseIdentity], force: bool
) -> str:
    """Export an adapter with its base, and return a summary.

    Args:
        bases: each given adapter, and the base on which it was trained.
        force: take a base on which one of them was not trained.

    Raises:
        AdapterError: an adapter was trained on another base; or see `export_with_report`.
    """
    opened = BaseCheckpoint.at(options.base_name)
    for name, trained_on in bases.items():
        check_same_base(trained_on, opened, options.base_name, adapter=name, allow=force, override="--force")
    if note := unused_note(opened, check_tensors(opened, trains=False)):
        logger.warning("%s; exports carry them as they are", note)
    return summary(to, export_with_report(opened, adapter, to, layout, options))


def on_cluster(options: ExportOptions) -> ExportOptions:
    """Have each weight file written by a task on the cluster of RAY_ADDRESS, or on a local one that this starts."""
    from kithara_ray.orchestration.cluster.connection import start_ray
    from kithara_ray.orchestration.head.export_tasks import write_on_cluster

    start_ray()
    return dataclasses.replace(options, write=write_on_cluster)
