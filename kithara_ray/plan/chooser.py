"""The fastest settings of a run that compile and fit: remat, mesh and rows per device, whichever the user left open.

Every combination is estimated first, from one built model. `decide` then compiles them in the order of their estimated
time, and stops when no other estimate is faster. A setting that the user gave is kept.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

from kithara_ray.errors import ConfigError, PlanError
from kithara_ray.model.options import AUTO, REMAT, REMAT_DEFAULT
from kithara_ray.plan import planner
from kithara_ray.plan.chips import Slice, slice_of
from kithara_ray.plan.estimates import Variant, open_meshes, variants
from kithara_ray.plan.report import Plan
from kithara_ray.sharding.shape import MeshShape

logger = logging.getLogger(__name__)

# Share of a chip's memory that a chosen setting leaves free: a run allocates a little beside its step's program.
MARGIN = 0.05
# Programs that are compiled at most; a setting that needs least memory is one of them.
FINALISTS = 4
# Estimates of temporaries are rough and mostly too high. A setting is not compiled if this share of them is too much.
_SURE = 0.65
# Limit of what "offload" keeps in the host memory for each chip: half of the 48 GB that a v5e host has for each chip,
# the least of all TPU hosts (https://docs.cloud.google.com/tpu/docs/v5e, read 2026-11).
_MOST_HOST_BYTES = 24 * 10**9
# Times that differ by less are equal; less traffic then decides.
_EQUAL = 0.01
# Rows per device that "auto" considers.
_ROWS = (1, 2, 4, 8, 16, 32, 64)


def told(best: Plan, saves: float, tried: Sequence[Plan], slices: int = 1) -> dict[str, Any]:
    """Return a choice as plain data, for run.json.

    Args:
        saves: share of the time of `remat="block"` on the same mesh that it saves, both by estimate.
        tried: the plans that were compiled.
        slices: number of slices of the run.
    """
    settings, hbm = best.settings, best.hbm_bytes_per_chip
    mesh = " ".join(f"{axis}={size}" for axis, size in best.mesh.items())
    rows, batch = settings["per_device_batch_size"], slices * best.tokens_per_step // settings["seq_len"]
    memory = f", {hbm['total'] / 2**30:.1f} of {hbm['available'] / 2**30:.1f} GiB a chip" if hbm["available"] else ""
    why = (
        f"remat={settings['remat']}, mesh {mesh}, {rows} rows a device (global batch {batch}){memory}: "
        f"by estimate {saves:.0%} less time a token than remat=block; programs compiled: {len(tried)}"
    )
    return {
        "settings": _facts_of(best),
        "margin": MARGIN,
        "saves_of_block": saves,
        "compiled": [_facts_of(plan) for plan in tried],
        "why": why,
    }


def _facts_of(plan: Plan) -> dict[str, Any]:
    return {
        "remat": plan.settings["remat"],
        "mesh": plan.mesh,
        "per_device_batch_size": plan.settings["per_device_batch_size"],
        "hbm_bytes": plan.hbm_bytes_per_chip["total"],
        "step_time_s_bound": plan.step_time_s_bound,
        "bound_by": plan.bound_by,
        "fits": plan.fits,
        "compiled": plan.compiled,
    }


def choose(
    base: Any,
    where: str | Slice,
    seq_len: int,
    rows: int | str = 1,
    *,
    remat: str = AUTO,
    mesh: MeshShape | None = None,
    slices: int = 1,
    **settings: Any,
) -> Plan:
    """Plan a run with the fastest settings that fit, by predicted time per token; `Plan.chosen` describes the choice.

    If none fits, the plan is that of the settings that need least memory.

    Args:
        rows: rows per device; "auto" considers powers of two.
        remat: one of `options.REMAT`, or "auto".
        mesh: axes of the mesh of the slice; None considers weights that are split and weights that are whole.
        slices: number of such slices, for the global batch that `Plan.chosen` tells.
        settings: arguments of `plan`.

    Raises:
        ConfigError, PlanError: as `plan`.
    """
    where = where if isinstance(where, Slice) else slice_of(where)
    if where.chip is None:
        raise ConfigError(f"slice {where.name}: settings are chosen for the chips in kithara_ray.plan.chips only")
    remats = REMAT if remat == AUTO else (remat,)
    asked = [
        Variant(policy, shape, number)
        for shape in open_meshes(mesh, where)
        for policy in remats
        for number in (_ROWS if rows == AUTO else (int(rows),))
    ]
    estimates = variants(base, where, seq_len, asked, settings)

    def compiled(number: int) -> Plan:
        variant = asked[number]
        how = {"remat": variant.remat, "mesh": variant.mesh, **settings}
        return planner.plan(base, where, seq_len, variant.rows, **how)

    best, tried = decide(estimates, compiled)
    shape, number = MeshShape(**best.mesh), best.settings["per_device_batch_size"]
    pair = [Variant(policy, shape, number) for policy in (best.settings["remat"], "block")]
    alike, block = variants(base, where, seq_len, pair, settings)
    saves = 1 - _time(alike)[0] / _time(block)[0]
    return dataclasses.replace(best, chosen=told(best, saves, tried, slices))


def settled_remat(remat: str) -> str:
    """The policy of a run for which nothing can be compiled: the default in the place of "auto"."""
    return REMAT_DEFAULT if remat == AUTO else remat


def decide(estimates: Sequence[Plan], compiled: Callable[[int], Plan]) -> tuple[Plan, list[Plan]]:
    """Return the fastest plan that fits with `MARGIN`, and all plans that were compiled.

    Programs are compiled in the order of their estimates' time, up to `FINALISTS`. The search ends when no other
    estimate is faster than the best compiled plan. If nothing fits, the last program is the one that needs least
    memory by estimate, and its plan is returned, whether it fits or not.

    Args:
        estimates: a plan of each combination.
        compiled: compiles the combination with this number.

    Raises:
        PlanError: the program that needs least memory does not compile, for a reason other than memory.
    """
    least = min(range(len(estimates)), key=lambda number: estimates[number].hbm_bytes_per_chip["total"])
    order = sorted(range(len(estimates)), key=lambda number: _time(estimates[number]))
    best: Plan | None = None
    tried: dict[int, Plan] = {}
    for number in [number for number in order if _may_fit(estimates[number])][: FINALISTS - 1]:
        if best is not None and _time(best)[0] <= _time(estimates[number])[0] * (1 + _EQUAL):
            break
        try:
            tried[number] = compiled(number)
        except PlanError as error:
            logger.warning("not compiled: %s", error)
            continue
        if fits(tried[number]) and (best is None or _time(tried[number]) < _time(best)):
            best = tried[number]
    if best is None:
        best = tried[least] = tried.get(least) or compiled(least)
    return best, list(tried.values())


def fastest(estimates: Sequence[Plan]) -> Plan | None:
    """The fastest estimate that fits with `MARGIN`; None if none does."""
    known = [plan for plan in estimates if fits(plan) and _host_has_room(plan)]
    return min(known, key=_time, default=None)


def fits(plan: Plan) -> bool:
    """True if the plan fits with `MARGIN` to spare."""
    available = plan.hbm_bytes_per_chip["available"]
    is_refused = plan.fits is False
    return available is None or (not is_refused and plan.hbm_bytes_per_chip["total"] <= (1 - MARGIN) * available)


def _may_fit(estimate: Plan) -> bool:
    """False if a compiler need not be asked."""
    if not _host_has_room(estimate):
        return False
    hbm, available = estimate.hbm_bytes_per_chip, estimate.hbm_bytes_per_chip["available"]
    return available is None or hbm["total"] - (1 - _SURE) * hbm["temporaries"] <= available


def _host_has_room(plan: Plan) -> bool:
    return plan.host["kept_bytes"] * plan.hosts <= _MOST_HOST_BYTES * plan.chips


def _time(plan: Plan) -> tuple[float, float]:
    """Predicted seconds per token: the bound, and the sum of what an estimate knows, for equal bounds."""
    assert plan.step_time_s_bound is not None  # the chip is known
    known = sum(plan.step_time_s.get(part, 0.0) for part in ("compute", "interconnect", "host"))
    return plan.step_time_s_bound / plan.tokens_per_step, known / plan.tokens_per_step
