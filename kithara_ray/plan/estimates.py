"""Many estimates of one run, from as few built models as possible; nothing is compiled."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.model.options import AUTO, REMAT, ModelOptions
from kithara_ray.plan.chips import Slice
from kithara_ray.plan.planner import Rows, checked, facts_of_all, request_of
from kithara_ray.plan.report import Plan, assemble
from kithara_ray.sharding.shape import AXES, MeshShape, axes_told

# The mesh that holds all weights on every device.
WHOLE = MeshShape(data=-1, fsdp=1)
# Arguments of `plan` that are options of the model.
_OF_MODEL = ("precision", "quantize", "train_weights", "routed", "router_aux_loss_coef")
_WHY = "it is one of many candidates"
_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Variant:
    """Settings that change a step's program, but not the model that it is made of.

    Attributes:
        remat: one of `options.REMAT`.
        mesh: axes of the device mesh.
        rows: rows per device of a micro-batch.
    """

    remat: str
    mesh: MeshShape
    rows: int


def variants(
    base: str | Path | Mapping[str, Any],
    where: Slice,
    seq_len: int,
    asked: Sequence[Variant],
    settings: Mapping[str, Any],
) -> list[Plan]:
    """Estimate each variant of one run, from one built model for each mesh that splits the weights.

    Args:
        settings: arguments of `plan`; those that a variant gives, and `compile`, are ignored.

    Raises:
        ConfigError, PlanError: as `plan`.
    """
    request = _request(base, where, seq_len, settings)
    meshes = list(dict.fromkeys(variant.mesh for variant in asked))
    built = [mesh for mesh in meshes if not _is_whole(mesh, where)] or meshes[:1]
    cached = settings.get("cache", True), settings.get("timeout_s", _TIMEOUT_S)
    answers = facts_of_all([(request | {"mesh": dataclasses.asdict(mesh)}, where) for mesh in built], *cached)
    found = {mesh: checked(facts) for mesh, facts in zip(built, answers, strict=True)}
    found |= {mesh: _on(found[built[0]], mesh, where.devices) for mesh in meshes if mesh not in found}
    made = []
    for variant in asked:
        one = found[variant.mesh]
        own: dict[str, Any] = {"rows": one["rows"] * variant.rows}
        own |= {"bytes": one["bytes"] | {"batch": one["bytes"]["batch"] * variant.rows}}
        changed = {"remat": variant.remat, "per_device_batch_size": variant.rows}
        prices = settings.get("price_per_chip_hour"), settings.get("tokens_per_epoch")
        made.append(assemble(request | changed, where, one | own, _WHY, *prices))
    return made


@dataclass(frozen=True)
class Layout:
    """One place for a run, and the rows of a step there.

    Attributes:
        where: a slice with a known chip.
        seq_len: T.
        rows: rows per device of a micro-batch.
    """

    where: Slice
    seq_len: int
    rows: int


def layouts(
    base: str | Path | Mapping[str, Any], points: Sequence[Layout], settings: Mapping[str, Any]
) -> list[list[Plan]]:
    """Estimate each point with every open mesh and policy, from one built model.

    Weights that a number of chips does not divide evenly are counted as if it did.

    Args:
        settings: arguments of `plan`, among them `remat` and `mesh`; "auto" and None leave them open.

    Raises:
        ConfigError, PlanError: as `plan`.
    """
    first = points[0]
    request = _request(base, first.where, first.seq_len, settings)
    (answer,) = facts_of_all(
        [(request | {"mesh": dataclasses.asdict(MeshShape())}, first.where)],
        settings.get("cache", True),
        settings.get("timeout_s", _TIMEOUT_S),
    )
    found, micro = checked(answer), settings.get("gradient_accumulation_steps", 1)
    remats = REMAT if settings.get("remat", AUTO) == AUTO else (settings["remat"],)
    made = []
    for point in points:
        rows = Rows(point.seq_len, point.rows, micro, settings.get("predictions"))
        own = request | dataclasses.asdict(rows.on(point.where))
        plans = []
        for mesh in open_meshes(settings.get("mesh"), point.where):
            facts = _on(found, mesh, point.where.devices)
            facts |= {"rows": point.where.devices * point.rows * micro}
            numbers = 2 * own["seq_len"] + 3 * own["predictions"]
            batch = 4 * numbers * point.rows * micro * facts["mesh"]["tensor"]
            facts |= {"bytes": facts["bytes"] | {"batch": batch}}
            plans += [assemble(own | {"remat": remat}, point.where, facts, _WHY) for remat in remats]
        made.append(plans)
    return made


def open_meshes(given: MeshShape | None, where: Slice) -> list[MeshShape]:
    """The meshes to choose from: weights split over all chips, or whole on each. A given mesh is the only one."""
    if given is not None:
        return [given]
    return [MeshShape()] if where.devices == 1 else [MeshShape(), WHOLE]


def _request(base: Any, where: Slice, seq_len: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The request for an estimate with one row per device."""
    rows = Rows(seq_len, 1, settings.get("gradient_accumulation_steps", 1), settings.get("predictions"))
    known = {name: settings[name] for name in _OF_MODEL if settings.get(name) is not None}
    options = ModelOptions(**known)
    lora, optimizer = settings.get("lora") or LoraConfig(), settings.get("optimizer")
    request = request_of(base, where, rows, lora, optimizer, MeshShape(), options)
    return request | {"compile": False, "topology": None}


def _is_whole(mesh: MeshShape, where: Slice) -> bool:
    return mesh.resolve(where.devices)[0] == where.devices


def _on(found: Mapping[str, Any], mesh: MeshShape, devices: int) -> dict[str, Any]:
    """The same facts for another mesh, as if it divided all arrays evenly."""
    axes: dict[str, int] = dict(zip(AXES, mesh.resolve(devices), strict=True))
    ways = devices // axes["data"]
    held = {name: found[f"{name}_bytes"] // ways for name in ("frozen", "adapter", "optimizer")}
    return {
        **found,
        "devices": devices,
        "mesh": axes_told(axes),
        "bytes": {**found["bytes"], **held},
        "uneven_bytes": 0,
    }
