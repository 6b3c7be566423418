"""The settings that a run leaves to the planner, filled in after its data is known and before workers are asked for.

`remat="auto"` and a mesh that was not given are chosen by `plan.choose` on a TPU slice. Elsewhere, and where nothing
can be compiled, they are "block" and the mesh of `plan.default_mesh`.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from kithara_ray.errors import ConfigError, PlanError
from kithara_ray.orchestration.cluster.remote import remote_get
from kithara_ray.orchestration.preflight import memory_fit
from kithara_ray.orchestration.request.run_request import RunRequest
from kithara_ray.plan import Plan, choose, planner
from kithara_ray.plan.chooser import settled_remat
from kithara_ray.sharding.shape import MeshShape

logger = logging.getLogger(__name__)


def fit(request: RunRequest, shape_TK: tuple[int, int]) -> tuple[RunRequest, memory_fit.Fit]:
    """Return the request with its open settings filled in, and its rows per device with their plan.

    The global batch changes only if the user asked for an "auto" batch.

    Args:
        shape_TK: positions and predictions of a row of the largest training batch.

    Raises:
        ConfigError: the run does not fit (the message says what to try), or "auto" rows with an unknown slice.
    """
    open_mesh = request.step.mesh is None or request.default_mesh is not None
    plain = settled(request)
    if plain is request and not open_mesh:
        return request, memory_fit.fit(request, shape_TK)
    planned = memory_fit.planned_on(request)
    if planned is None:
        return plain, memory_fit.fit(plain, shape_TK)
    where, slices = planned
    if why := planner.why_not_compiled(where):
        logger.warning("remat and mesh are not chosen: %s", why)
        return plain, memory_fit.fit(plain, shape_TK)
    settings: dict[str, Any] = memory_fit.settings_of(request, shape_TK, slices)
    settings |= {"slices": slices} | ({"mesh": None} if open_mesh else {})
    rows = request.train.per_device_batch_size
    try:
        best = choose(request.model.weights_handle, where, int(shape_TK[0]), rows, **settings)
    except PlanError as error:
        logger.warning("remat and mesh are not chosen: %s", error)
        return plain, memory_fit.fit(plain, shape_TK)
    if not best.fits:
        raise ConfigError(f"this run {best.verdict()}")
    fit = memory_fit.Fit(best.settings["per_device_batch_size"], dataclasses.asdict(best))
    return _with(request, best, slices if open_mesh else None), fit


def choices(base: Any, points: Sequence[tuple[str, int, int]], settings: Mapping[str, Any]) -> list[Plan]:
    """Choose the settings of several places: in parallel Ray tasks if a cluster is connected, else one by one.

    Args:
        points: slice, row length and rows per device of each.
        settings: arguments of `plan.choose`.
    """
    if not ray.is_initialized():
        return [choose(base, *point, **settings) for point in points]

    @ray.remote(num_cpus=1, memory=memory_fit.TASK_BYTES, max_retries=0)
    def task(point: tuple[str, int, int]) -> Plan:
        return choose(base, *point, **settings)

    return [remote_get(reference) for reference in [task.remote(point) for point in points]]


def settled(request: RunRequest) -> RunRequest:
    """The request with the default policy in the place of "auto"."""
    remat = settled_remat(request.step.remat)
    if remat == request.step.remat:
        return request
    return dataclasses.replace(request, step=dataclasses.replace(request.step, remat=remat))


def _with(request: RunRequest, best: Plan, slices: int | None) -> RunRequest:
    """The request with the chosen policy, and with the chosen mesh over so many slices; None keeps its mesh."""
    step = dataclasses.replace(request.step, remat=best.settings["remat"])
    if slices is None:
        return dataclasses.replace(request, step=step)
    sizes = best.mesh
    is_whole = sizes["fsdp"] == sizes["tensor"] == 1
    step = dataclasses.replace(step, mesh=MeshShape(data=-1, fsdp=1) if is_whole else MeshShape(data=slices, fsdp=-1))
    told = {**(request.default_mesh or {}), "why": f"the planner chose it: {best.chosen and best.chosen['why']}"}
    return dataclasses.replace(request, step=step, default_mesh=told)
