"""A plan as the lines of a table."""

from collections.abc import Iterator
from typing import Any

_GIB = 2**30
# Upper bound: no chip has more VMEM.
_MOST_VMEM_BYTES = 2**27


def gib(nbytes: float) -> str:
    """Bytes as a number of GiB."""
    return f"{nbytes / _GIB:.2f}" if nbytes < _GIB else f"{nbytes / _GIB:.1f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def rows(plan) -> Iterator[tuple[str, str]]:
    """Yield the name and value of each line of the table."""
    hbm, flops = plan.hbm_bytes_per_chip, plan.flops_per_token
    kind = "compiled" if plan.compiled else "refused by the compiler" if plan.refusal else "estimated"
    settings = plan.settings
    rank = settings["lora_rank"]
    trained = "all trained" if rank is None else f"{settings['trainable'] / 1e6:.2f} M trained (rank {rank})"
    held = f", kernels as {settings['quantize']}" if settings["quantize"] else ""
    yield (
        "model",
        f"{settings['model_type']}, {settings['parameters'] / 1e9:.2f} G parameters, "
        f"{trained}, {settings['precision']}{held}",
    )
    micro = settings["gradient_accumulation_steps"]
    yield (
        "step",
        f"{settings['per_device_batch_size']} rows a chip"
        + (f", {micro} times" if micro > 1 else "")
        + f", of {settings['seq_len']:,} positions: {plan.tokens_per_step:,} tokens; remat {settings['remat']}",
    )
    yield (
        "slice",
        f"{plan.slice}: {_count(plan.chips, 'chip')}, {_count(plan.hosts, 'host')}, mesh "
        + " ".join(f"{axis}={size}" for axis, size in plan.mesh.items()),
    )
    if plan.chosen:
        yield "chosen", plan.chosen["why"]
    if plan.default_mesh:
        yield "", plan.default_mesh["why"]
    yield "how it is known", kind + (f": {plan.estimated_because}" if plan.estimated_because else "")
    if plan.refusal:
        yield "", plan.refusal
    kept = hbm["kept_activations"]
    # Only a TPU's program has VMEM; an estimate counts these inputs among the temporaries.
    may_be_in_vmem = plan.compiled and hbm["available"] is not None and kept <= _MOST_VMEM_BYTES
    parts: dict[str, Any] = {**hbm}
    for name in ("frozen", "adapter", "optimizer", "batch", "temporaries"):
        yield f"HBM per chip: {name}", f"{parts[name] / _GIB:.3f} GiB"
    if plan.uneven_bytes:
        yield (
            "    copies, there",
            f"{plan.uneven_bytes / _GIB:.3f} GiB: {plan.chips} chips do not divide these weights",
        )
    yield "    kept inputs of blocks", f"{kept / _GIB:.3f} GiB, there{' or in VMEM' if may_be_in_vmem else ''}"
    for name in ("program", "total"):
        if parts[name] is not None:
            yield f"HBM per chip: {name}", f"{parts[name] / _GIB:.3f} GiB"
    yield (
        "FLOPs per token",
        f"{flops['program'] / 1e9:.2f} G; ideal {flops['total'] / 1e9:.2f} G: "
        + ", ".join(f"{name} {value / 1e9:.2f}" for name, value in flops.items() if name not in ("total", "program")),
    )
    moved = plan.collective_bytes_per_step
    yield (
        "moved to each chip",
        f"{moved['total'] / 1e9:.2f} GB a step (at least {moved['fsdp_minimum'] / 1e9:.2f} on this mesh): "
        + (
            ", ".join(f"{k} {v / 1e9:.2f}" for k, v in moved.items() if k not in ("total", "fsdp_minimum"))
            or "estimated"
        ),
    )
    if plan.bytes_by_expert_axis:
        least = (f"expert={size} {nbytes / 1e9:.2f}" for size, nbytes in plan.bytes_by_expert_axis.items())
        yield "    at least, GB, with", ", ".join(least)
    if plan.step_time_s_bound:
        times = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in plan.step_time_s.items())
        yield "step time", f">= {plan.step_time_s_bound * 1e3:.0f} ms, bound by {plan.bound_by} ({times})"
        yield "tokens/s", f"<= {plan.tokens_per_s_bound:,.0f}; MFU <= {plan.mfu_bound:.0%}"
    if plan.compile_s is not None:
        yield "compile", f"{plan.compile_s:.0f} s on this machine"
    kept_there = plan.host["kept_bytes"]
    yield (
        "host",
        f"RAM to load {plan.host['ram_bytes_load'] / 1e9:.1f} GB, base {plan.host['disk_bytes_base'] / 1e9:.1f} GB"
        + (f"; blocks keep {kept_there / 1e9:.1f} GB in its RAM" if kept_there else ""),
    )
    yield "adapter, checkpoint", f"{plan.adapter_bytes / 1e6:.1f} MB, {plan.checkpoint_bytes / 1e6:.1f} MB"
    if plan.cost:
        shown = (("per_hour", "an hour"), ("per_million_tokens", "a million tokens"), ("per_epoch", "an epoch"))
        known = [f"{plan.cost[name]:.4g} {what}" for name, what in shown if plan.cost[name] is not None]
        yield "cost", f"{', '.join(known)}, at the bound; a real run takes longer"
