"""Plans on a cluster: a run is checked before its workers are asked for, and a sweep is planned in tasks."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from kithara_ray.errors import ConfigError, PlanError
from kithara_ray.orchestration.cluster.remote import remote_get
from kithara_ray.plan import Plan, Slice, plan
from kithara_ray.plan.chips import slice_of_topology
from kithara_ray.plan.search import largest_batch
from kithara_ray.sharding.shape import MeshShape

logger = logging.getLogger(__name__)

# What one compile of a large model takes of a node.
_TASK_BYTES = 3 * 2**30
# An estimate is compiled where it comes nearer to the chip's memory than this share of it.
_SURE = 0.6


def slice_of_run(scaling: Any, platform: str) -> tuple[Slice, int] | None:
    """The slice of a run's `ScalingConfig` and how many of them; None where it is not a known TPU slice."""
    if platform != "tpu" or not (scaling.use_tpu and scaling.topology and scaling.accelerator_type):
        return None
    from ray.util.tpu import get_tpu_num_slices_for_workers

    where = slice_of_topology(scaling.topology, scaling.accelerator_type)
    if where is None:
        return None
    slices = get_tpu_num_slices_for_workers(
        topology=scaling.topology,
        accelerator_type=scaling.accelerator_type,
        num_workers=scaling.num_workers,
        resources_per_worker=scaling.resources_per_worker,
    )
    return where, slices


def fitted(spec: Any, scaling: Any, auto: bool) -> Any:
    """The run's spec with its plan, its program known to fit; with `auto` the largest batch that does is put in.

    Args:
        spec: a `RunSpec` whose `train.rows_per_device` is that of one row where `auto`.

    Raises:
        ConfigError: it does not fit, and what to try; or `auto` where the slice is not known.
    """
    if spec.model.lora is None or spec.model.quantize is not None:
        if auto:
            what = "trains all weights" if spec.model.lora is None else "holds its base as int8"
            raise ConfigError(f'per_device_batch_size="auto": plans are of LoRA runs, this one {what}')
        return spec
    found = slice_of_run(scaling, spec.platform)
    if found is None:
        if auto:
            raise ConfigError(
                'per_device_batch_size="auto" is found for a known TPU slice (use_tpu=True with topology and '
                "accelerator_type); give a number here"
            )
        return spec
    where, slices = found
    base, seq_len, settings = arguments_of(spec, slices)
    if auto:
        best = largest_batch(base, where, seq_len, **settings)
        if not best.fits:
            raise ConfigError(_refusal(best))
        rows = best.settings["per_device_batch_size"]
        logger.info("per_device_batch_size=%d: %s", rows, best.verdict())
        return dataclasses.replace(with_rows(spec, rows), plan=dataclasses.asdict(best))
    rows = spec.train.rows_per_device // spec.step.micro_batches
    return dataclasses.replace(spec, plan=dataclasses.asdict(check(base, where, seq_len, rows, settings)))


def check(base: Any, where: Slice, seq_len: int, rows: int, settings: Mapping[str, Any]) -> Plan:
    """The plan of a run that fits, by an estimate where that is plain, else compiled.

    Raises:
        ConfigError: what it needs, what there is and what to try.
    """
    made = plan(base, where, seq_len, rows, compile=False, **settings)
    hbm = made.hbm_bytes_per_chip
    # The weights alone are exact; the rest of an estimate decides nothing.
    if hbm["frozen"] > hbm["available"]:
        raise ConfigError(_refusal(made))
    if hbm["total"] > _SURE * hbm["available"]:
        try:
            made = plan(base, where, seq_len, rows, **settings)
        except PlanError as error:
            logger.warning("not planned: %s", error)
        if made.fits is False and not made.estimated_because:
            raise ConfigError(_refusal(made))
    return made


def _refusal(made: Plan) -> str:
    return f"this run {made.verdict()}"


def arguments_of(spec: Any, slices: int = 1) -> tuple[str, int, dict[str, Any]]:
    """(base, T, settings of `plan`) of a run's spec; of one slice where it runs on several."""
    data = spec.train
    shape = data.store.shapes(spec.platform, data.packed_len, data.buckets)[-1]
    mesh = spec.step.mesh or MeshShape()
    if slices > 1 and mesh.data % slices == 0:
        mesh = dataclasses.replace(mesh, data=mesh.data // slices)
    settings = {
        "lora": spec.model.lora,
        "optimizer": spec.step.optimizer,
        "mesh": mesh,
        "remat": spec.step.remat,
        "precision": spec.model.precision,
        "gradient_accumulation_steps": spec.step.micro_batches,
        "predictions": int(shape[1]),
    }
    return spec.model.base, int(shape[0]), settings


def with_rows(spec: Any, rows: int) -> Any:
    """The spec with so many rows a device and micro-batch, in training and, where it has as many, in evaluation."""
    train = dataclasses.replace(spec.train, rows_per_device=rows * spec.step.micro_batches)
    if spec.eval is None:
        return dataclasses.replace(spec, train=train)
    held_out = dataclasses.replace(spec.eval.data, rows_per_device=max(rows, spec.eval.data.rows_per_device))
    return dataclasses.replace(spec, train=train, eval=dataclasses.replace(spec.eval, data=held_out))


def sweep(base: Any, points: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Plan]:
    """`largest_batch` of every point in parallel tasks.

    Args:
        points: each with slice, seq_len and rank.
    """

    @ray.remote(num_cpus=1, memory=_TASK_BYTES, max_retries=0)
    def task(point: Mapping[str, Any]) -> Plan:
        lora = dataclasses.replace(settings["lora"], r=point["rank"])
        return largest_batch(base, point["slice"], point["seq_len"], **{**settings, "lora": lora})

    return [remote_get(reference) for reference in [task.remote(point) for point in points]]
