"""Plans on a cluster: check a run before its workers are requested, and plan a sweep in tasks."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import ScalingConfig

from kithara_ray.errors import ConfigError, PlanError
from kithara_ray.orchestration.cluster.remote import remote_get
from kithara_ray.orchestration.request.run_request import RunRequest
from kithara_ray.plan import Plan, Slice, plan
from kithara_ray.plan.chips import slice_of_topology
from kithara_ray.plan.search import largest_batch
from kithara_ray.sharding.shape import MeshShape

logger = logging.getLogger(__name__)

# Memory of a node that one compile of a large model takes.
TASK_BYTES = 3 * 2**30
# Above this share of the chip's memory, an estimate is not trusted and the step is compiled.
_SURE = 0.6


@dataclass(frozen=True)
class Fit:
    """The rows per device that fit a run, and the plan that found them.

    Attributes:
        rows_per_device: rows per device of one micro-batch.
        plan: plan of the slice, as plain data; None if the run is not planned.
    """

    rows_per_device: int
    plan: Mapping[str, Any] | None


def slice_of_run(scaling: ScalingConfig, platform: str) -> tuple[Slice, int] | None:
    """Return the slice of a run's `ScalingConfig` and the number of slices; None if it is not a known TPU slice."""
    if platform != "tpu" or not (scaling.use_tpu and scaling.topology and scaling.accelerator_type):
        return None
    from ray.util.tpu import get_tpu_num_slices_for_workers

    where = slice_of_topology(scaling.topology, scaling.accelerator_type)
    if where is None:
        return None
    sizes: Any = {"num_workers": scaling.num_workers, "resources_per_worker": scaling.resources_per_worker}
    shape = {"topology": scaling.topology, "accelerator_type": scaling.accelerator_type}
    return where, get_tpu_num_slices_for_workers(**shape, **sizes)


def planned_on(request: RunRequest) -> tuple[Slice, int] | None:
    """Return the slice that a run is planned for, and the number of slices; None for a run that is not planned."""
    return slice_of_run(request.group.scaling_config, request.group.platform)


def check_auto(request: RunRequest) -> None:
    """Raise ConfigError for a run whose "auto" batch the planner cannot find."""
    if planned_on(request) is not None:
        return
    raise ConfigError(
        'per_device_batch_size="auto" is found for a known TPU slice (use_tpu=True with topology and '
        "accelerator_type); give a number here"
    )


def fit(request: RunRequest, shape_TK: tuple[int, int]) -> Fit:
    """Return the run's rows per device, checked against the slice's memory; with "auto", the largest that fits.

    Args:
        shape_TK: positions and predictions of a row of the largest training batch.

    Raises:
        ConfigError: the run does not fit (the message says what to try), or "auto" with an unknown slice.
    """
    rows, found = request.train.per_device_batch_size, planned_on(request)
    if isinstance(rows, str):
        check_auto(request)
    if found is None:
        assert not isinstance(rows, str)
        return Fit(rows, None)
    where, slices = found
    seq_len, settings = int(shape_TK[0]), settings_of(request, shape_TK, slices)
    if not isinstance(rows, str):
        return Fit(rows, dataclasses.asdict(check(request.model.weights_handle, where, seq_len, rows, settings)))
    best = largest_batch(request.model.weights_handle, where, seq_len, **settings)
    if not best.fits:
        raise ConfigError(_refusal(best))
    rows = best.settings["per_device_batch_size"]
    logger.info("per_device_batch_size=%d: %s", rows, best.verdict())
    return Fit(rows, dataclasses.asdict(best))


def check(base: Any, where: Slice, seq_len: int, rows: int, settings: Mapping[str, Any]) -> Plan:
    """Return the plan of a run that fits: an estimate if that is clear enough, else a compiled plan.

    Raises:
        ConfigError: the run does not fit; the message has the memory it needs, the memory there is and what to try.
    """
    made = plan(base, where, seq_len, rows, compile=False, **settings)
    hbm, available = made.hbm_bytes_per_chip, made.hbm_bytes_per_chip["available"]
    assert available is not None  # a slice that Ray knows has known chips
    # Only the state's size is exact; the rest of an estimate decides nothing.
    if hbm["frozen"] + hbm["adapter"] + hbm["optimizer"] > available:
        raise ConfigError(_refusal(made))
    if hbm["total"] > _SURE * available:
        try:
            made = plan(base, where, seq_len, rows, **settings)
        except PlanError as error:
            logger.warning("not planned: %s", error)
        if made.fits is False and not made.estimated_because:
            raise ConfigError(_refusal(made))
    return made


def _refusal(made: Plan) -> str:
    return f"this run {made.verdict()}"


def settings_of(request: RunRequest, shape_TK: tuple[int, int], slices: int = 1) -> dict[str, Any]:
    """Return the arguments of `plan` that a run sets; for a run on several slices, those of one slice."""
    step = request.step
    mesh = step.mesh or MeshShape()
    if slices > 1 and mesh.data % slices == 0:
        mesh = dataclasses.replace(mesh, data=mesh.data // slices)
    return {
        "lora": request.model.lora,
        "train_weights": request.model.lora is None,
        "quantize": request.model.quantize,
        "optimizer": step.optimizer,
        "mesh": mesh,
        "remat": step.remat,
        "precision": request.model.precision,
        "gradient_accumulation_steps": step.micro_batches,
        "router_aux_loss_coef": step.router_aux_loss_coef,
        "predictions": int(shape_TK[1]),
    }


def sweep(base: Any, points: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Plan]:
    """Find `largest_batch` of every point in parallel tasks.

    Args:
        points: points of the sweep, each with slice, seq_len and rank, which is None without LoRA.
    """

    @ray.remote(num_cpus=1, memory=TASK_BYTES, max_retries=0)
    def task(point: Mapping[str, Any]) -> Plan:
        lora = settings["lora"] and dataclasses.replace(settings["lora"], r=point["rank"])
        return largest_batch(base, point["slice"], point["seq_len"], **{**settings, "lora": lora})

    return [remote_get(reference) for reference in [task.remote(point) for point in points]]
