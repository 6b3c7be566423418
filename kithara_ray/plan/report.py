"""A plan: the facts about a program, turned into answers to a user's questions."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from kithara_ray.model.options import KEEPS_ATTENTION, fuses_backward
from kithara_ray.plan import lines, terms
from kithara_ray.plan.chips import CHIPS, HOST_BYTES_PER_S, Slice, slice_of, slice_sizes
from kithara_ray.plan.lines import gib
from kithara_ray.plan.terms import Counts

# Memory of a worker process before it holds an array: python, jax, keras, keras-hub and Ray.
_PROCESS_BYTES = 1_000_000_000


class Hbm(TypedDict):
    """Bytes of one chip's memory; see `Plan.hbm_bytes_per_chip`."""

    frozen: int
    adapter: int
    optimizer: int
    batch: int
    kept_activations: int
    temporaries: int
    program: int | None  # known once the step is compiled
    total: int
    available: int | None  # None for an unknown chip


@dataclass(frozen=True)
class Plan:
    """Requirements of a run on a slice, and its best possible speed there. Units: bytes, FLOPs, seconds.

    Attributes:
        slice, chips, hosts, mesh: the hardware, and the mesh over it.
        uneven_bytes: bytes on one chip of copies of weights that this number of chips does not divide evenly.
        bytes_by_expert_axis: for a mixture of experts, `fsdp_minimum` for each size of the mesh's axis `expert`; the
            other devices of a slice are on `fsdp`.
        default_mesh: figures by which the mesh was chosen, see `DefaultMesh.told`; None for a mesh that was given.
        chosen: the settings that the planner chose, see `chooser.told`; None if it chose none.
        compiled: whether the TPU's compiler compiled this exact step; if not, memory is an estimate.
        estimated_because: reason for the estimate; None where the step was compiled or refused.
        fits: None where the chip's memory is not known.
        refusal: the compiler's own words where the program does not fit.
        hbm_bytes_per_chip: frozen, adapter, optimizer, batch, temporaries, program, total and available. Also
            kept_activations: the inputs of blocks kept for the backward pass, by count. The temporaries include them,
            except where they are few and the compiler holds them in VMEM.
        flops_per_token: FLOPs of the ideal program by term, their `total`, and `program`: the compiled program's.
        flops_per_step, hbm_traffic_bytes_per_step: figures for one chip.
        collective_bytes_per_step: bytes that one chip receives, by kind, their `total`, and `fsdp_minimum`: every
            weight that the mesh splits once forward and once backward, and the adapter's gradients once. With an axis
            `expert`, experts stay where they are and tokens move.
        step_time_s: lower bounds by part: compute, hbm, interconnect, and host for arrays that are kept in its memory.
        step_time_s_bound: the largest of them; `bound_by` names it.
        tokens_per_step: tokens of one step, padding included.
        compile_s, compile_cpu_s: wall-clock time, and CPU time of all the compiler's threads. The latter does not
            depend on other work of the machine.
        square_arrays: number of shapes in the program with two dims of the row's length. A width of that size counts
            too.
        host: of one host, ram_bytes_load; kept_bytes, which its chips' blocks keep in its memory; disk_bytes of the
            base, of an adapter and of a merged export.
        cost: per_hour, per_million_tokens and per_epoch at the bound, in the price's currency; None without a price.
    """

    slice: str
    chips: int
    hosts: int
    mesh: dict[str, int]
    settings: dict[str, Any]
    compiled: bool
    estimated_because: str | None
    fits: bool | None
    refusal: str | None
    hbm_bytes_per_chip: Hbm
    flops_per_token: dict[str, float]
    flops_per_step: float
    hbm_traffic_bytes_per_step: float | None
    collective_bytes_per_step: dict[str, float]
    step_time_s: dict[str, float]
    step_time_s_bound: float | None
    bound_by: str | None
    tokens_per_step: int
    tokens_per_s_bound: float | None
    mfu_bound: float | None
    compile_s: float | None
    compile_cpu_s: float | None
    square_arrays: int | None
    host: dict[str, int]
    adapter_bytes: int
    checkpoint_bytes: int
    uneven_bytes: int = 0
    bytes_by_expert_axis: dict[str, float] = field(default_factory=dict)
    cost: dict[str, float | None] | None = None
    default_mesh: dict[str, Any] | None = None
    chosen: dict[str, Any] | None = None
    advice: list[str] = field(default_factory=list)

    def json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    def verdict(self) -> str:
        """One line, e.g. "needs 21.3 of 15.8 GiB per chip of v5e-4: try v5e-8"."""
        hbm = self.hbm_bytes_per_chip
        label = "" if self.compiled or self.refusal else " (estimated)"
        if hbm["available"] is None:
            return f"needs {gib(hbm['total'])} GiB per chip of {self.slice}{label}"
        needs = f"needs {gib(hbm['total'])} of {gib(hbm['available'])} GiB per chip of {self.slice}{label}"
        return needs if self.fits else f"{needs}: try {', or '.join(self.advice)}"

    def table(self):
        """The plan as a `rich` table."""
        from rich.table import Table

        table = Table(title=self.verdict(), show_header=False, title_justify="left")
        for name, value in lines.rows(self):
            table.add_row(name, value)
        return table


def assemble(
    request: Mapping[str, Any],
    where: Slice,
    found: Mapping[str, Any],
    why: str | None,
    price_per_chip_hour: float | None = None,
    tokens_per_epoch: int | None = None,
) -> Plan:
    """Assemble the plan from the result of `facts.facts`."""
    counts = Counts(**found["counts"] | {"attention": tuple(map(tuple, found["counts"]["attention"]))})
    seq_len, tokens = request["seq_len"], found["rows"] * request["seq_len"]
    flops = terms.flops_per_token(counts, seq_len, request["predictions"], request["remat"])
    hbm = _hbm(request, where, found, counts)
    program = _program_flops(request, found, counts)
    flops["program"] = flops["total"] if program is None else program * found["devices"] / tokens
    collectives = _collectives(request, found, counts)
    per_chip = flops["program"] * tokens / found["devices"]
    traffic = found["cost"]["hbm_bytes"] if "cost" in found else None
    offloaded = _offloaded(request, found, counts)
    micro = request["gradient_accumulation_steps"]
    times = _times(where, per_chip, traffic, collectives, 2 * micro * offloaded)
    bound = max(times.values(), default=None)
    peak = where.chip.flops_per_s if where.chip else None
    model_flops = terms.model_flops_per_token(flops, request["remat"], seq_len) * tokens / found["devices"]
    fits = None if hbm["available"] is None else "refusal" not in found and hbm["total"] <= hbm["available"]
    return Plan(
        slice=where.name,
        chips=where.chips,
        hosts=where.hosts,
        mesh=found["mesh"],
        default_mesh=found.get("default_mesh"),
        settings={
            "model_type": request["config"].get("model_type"),
            "parameters": counts.parameters,
            "trainable": counts.parameters if counts.trains_weights else counts.lora,
            **{name: request[name] for name in _SETTINGS},
            "lora_rank": request["lora"] and request["lora"]["r"],
        },
        compiled="memory" in found,
        estimated_because=why,
        fits=fits,
        refusal=found.get("refusal"),
        hbm_bytes_per_chip=hbm,
        flops_per_token=flops,
        flops_per_step=per_chip,
        hbm_traffic_bytes_per_step=traffic,
        collective_bytes_per_step=collectives,
        step_time_s=times,
        step_time_s_bound=bound,
        bound_by=max(times, key=lambda part: times[part]) if times else None,
        tokens_per_step=tokens,
        tokens_per_s_bound=tokens / bound if bound else None,
        mfu_bound=model_flops / peak / bound if bound else None,
        compile_s=found.get("compile_s"),
        compile_cpu_s=found.get("compile_cpu_s"),
        square_arrays=found.get("square_arrays"),
        host=_host(found, where, counts) | {"kept_bytes": offloaded * where.devices // where.hosts},
        adapter_bytes=found["adapter_bytes"],
        checkpoint_bytes=found["state_bytes"],
        uneven_bytes=found.get("uneven_bytes", 0),
        bytes_by_expert_axis=terms.bytes_by_expert_axis(counts, found["mesh"], *_step_of(request, found)),
        cost=_cost(price_per_chip_hour, tokens_per_epoch, where.chips, tokens, bound),
        advice=[] if fits in (None, True) else _advice(request, where, found, hbm, counts),
    )


_SETTINGS = (
    "seq_len", "predictions", "per_device_batch_size", "gradient_accumulation_steps", "remat", "precision", "quantize",
)  # fmt: skip


def _hbm(request, where: Slice, found, counts: Counts) -> Hbm:
    width = _width(request)
    rows = request["per_device_batch_size"] * found["mesh"]["tensor"]
    parts: Any = dict(found["bytes"])
    parts["kept_activations"] = terms.kept_bytes(counts, request["seq_len"], rows, width, request["remat"])
    arguments = sum(found["bytes"].values())
    if "memory" in found:
        memory = found["memory"]
        # The compiler pads and tiles, so take its own figures, and each part of the arguments as it is stored.
        parts |= {"temporaries": memory["temp"], "program": memory["generated_code"]}
        total = memory["argument"] + memory["temp"] + memory["output"] - memory["alias"] + memory["generated_code"]
    else:
        refused = found.get("refused_bytes") or {}
        shape = request["seq_len"], rows, found["mesh"]["tensor"], width
        estimate = int(terms.estimated_temporaries(counts, *shape, request["remat"]))
        # Gradients; a LoRA adapter's are nothing beside the rest.
        estimate += found["bytes"]["adapter"] if counts.trains_weights else 0
        parts |= {"temporaries": refused.get("temporaries") or estimate, "program": None}
        total = refused.get("total") or arguments + parts["temporaries"]
    available = where.chip.hbm_bytes if where.chip else None
    return parts | {"total": total, "available": available}


def _width(request) -> int:
    """Bytes of one activation element."""
    return 4 if request["precision"] == "float32" else 2


def _program_flops(request, found, counts: Counts) -> float | None:
    """FLOPs of one device in one step."""
    if "cost" not in found:
        return None
    rows = request["per_device_batch_size"] * found["mesh"]["tensor"]
    fused = fuses_backward(request["remat"], request["seq_len"])
    kernels = sum(
        runs * terms.kernel_flops(name, counts, request["seq_len"], rows, fused) / found["mesh"]["tensor"]
        for name, runs in found["cost"]["kernels"].items()
    )
    return found["cost"]["matmul_flops"] + kernels


def _step_of(request, found) -> tuple[int, float, int, str]:
    """The arguments of `terms.least_collective_bytes` after the mesh."""
    tokens = found["rows"] * request["seq_len"] * found["mesh"]["tensor"] / found["devices"]
    return found["adapter_bytes"], tokens, _width(request), request["remat"]


def _collectives(request, found, counts: Counts) -> dict[str, float]:
    least = terms.least_collective_bytes(counts, found["mesh"], *_step_of(request, found))
    if "cost" not in found:
        return {"total": least, "fsdp_minimum": least}
    kinds = found["cost"]["collectives"]
    return {**kinds, "total": sum(kinds.values()), "fsdp_minimum": least}


def _offloaded(request, found, counts: Counts) -> int:
    """Bytes of what one chip's blocks keep in its host's memory; they go there once a micro-batch, and come back."""
    if "memory" in found:
        return found["memory"].get("host_temp", 0)
    rows = request["per_device_batch_size"] * found["mesh"]["tensor"]
    return terms.host_bytes(counts, request["seq_len"], rows, _width(request), request["remat"])


def _times(
    where: Slice, flops: float, traffic: float | None, collectives: Mapping[str, float], host: float
) -> dict[str, float]:
    if where.chip is None:
        return {}
    times = {
        "compute": flops / where.chip.flops_per_s,
        "interconnect": collectives["total"] / where.chip.ici_bytes_per_s,
    }
    if traffic is not None:
        times["hbm"] = traffic / where.chip.hbm_bytes_per_s
    if host:
        times["host"] = host / HOST_BYTES_PER_S
    return times


def _host(found, where: Slice, counts: Counts) -> dict[str, int]:
    """RAM and disk needs. A host loads its own slices of one array at a time; an export streams tensor by tensor."""
    return {
        "ram_bytes_load": _PROCESS_BYTES + found["largest_array_bytes"] // where.hosts,
        "disk_bytes_base": counts.weights_bytes,
        "disk_bytes_merged_export": counts.weights_bytes,
    }


def _cost(price, tokens_per_epoch, chips: int, tokens_per_step: int, bound: float | None):
    if price is None:
        return None
    per_hour = price * chips
    per_token = per_hour / 3600 * bound / tokens_per_step if bound else None
    return {
        "price_per_chip_hour": price,
        "per_hour": per_hour,
        "per_million_tokens": per_token and per_token * 1e6,
        "per_epoch": per_token * tokens_per_epoch if per_token and tokens_per_epoch else None,
    }


def _advice(request, where: Slice, found, hbm: Hbm, counts: Counts) -> list[str]:
    """Single changes that would each make the run fit, cheapest first. All are estimates, never compiled."""
    split = hbm["frozen"] + hbm["adapter"] + hbm["optimizer"]
    rest = hbm["total"] - split

    are_split = found["devices"] > found["mesh"]["data"]

    def fits(rest: float, slice: Slice = where) -> bool:
        assert slice.chip is not None  # a run that does not fit has a known chip, and so have larger slices
        return split * (where.devices / slice.devices if are_split else 1) + rest <= slice.chip.hbm_bytes

    tried = []
    if request["remat"] in KEEPS_ATTENTION:
        tried.append('remat="block"')
    if request["remat"] == "block":
        shape = request["seq_len"], request["per_device_batch_size"] * found["mesh"]["tensor"], _width(request)
        if fits(rest - hbm["kept_activations"] + terms.kept_bytes(counts, *shape, "nested")):
            tried.append('remat="nested"')
    rows = request["per_device_batch_size"]
    if fits(rest / 2):
        fewer = f"per_device_batch_size={rows // 2} with gradient_accumulation_steps=2"
        tried.append(fewer if rows > 1 else f"max_seq_len={request['seq_len'] // 2}")
    tried += next(([name] for name in _larger(where) if fits(rest, slice_of(name))), [])
    return tried or ["a tensor axis in the mesh, which splits what a block computes with too, or a smaller model"]


def _larger(where: Slice) -> Iterator[str]:
    """Yield slices with more chips, then those whose chips have more memory, in the order of `CHIPS`."""
    assert where.chip is not None
    for chip in sorted(CHIPS.values(), key=lambda chip: chip is not where.chip):
        for size in slice_sizes(chip.name):
            is_larger = size // chip.per_name > where.chips if chip is where.chip else True
            if is_larger and chip.hbm_bytes >= where.chip.hbm_bytes:
                yield f"{chip.name}-{size}"
