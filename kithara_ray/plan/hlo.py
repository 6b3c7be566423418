"""Compute and traffic of a compiled program, read from its HLO text. Loops count as often as they run.

XLA's own cost analysis counts a loop's body once. Here a computation counts once per call, and a `while` calls its
body as often as the constant in its condition says. All figures are for one device.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from kithara_ray.plan.hlo_text import Computation, Instruction, called, groups, parse
from kithara_ray.plan.loops import trips

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Names of the TPU compiler's kernels for `ragged_dot`; one more only prepares the groups.
_GROUPED = re.compile(r"ragged-dot-(?!metadata)")
# Opcodes whose result is no new array in memory.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "opt-barrier", "optimization-barrier", "copy-done", "all-gather-done", "all-reduce-done",
    "collective-permute-done", "async-done", "async-start", "async-update",
}  # fmt: skip


@dataclass
class Cost:
    """The work of one device in one run of the program.

    Attributes:
        matmul_flops: FLOPs of all products; a multiply-add counts as two.
        kernels: kind of custom kernel (its name without a number) -> how often it runs.
        hbm_bytes: estimated bytes that all instructions read and write, each operand and result once. A fused slice of
            an array counts only the elements it takes.
        collectives: kind -> bytes that a device receives.
        collective_counts: kind -> how often one runs.
    """

    matmul_flops: float = 0.0
    kernels: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    hbm_bytes: float = 0.0
    collectives: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    collective_counts: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def cost_of(text: str) -> Cost:
    """Compute the cost of a program from its `compiled.as_text()`."""
    computations, entry = parse(text)
    times = _times(computations, entry)
    fused = {name for c in computations.values() for i in c.values() if i.opcode == "fusion" for name in called(i)}
    cost, seen = Cost(), {}
    for name, computation in computations.items():
        if not times[name]:
            continue
        for instruction in computation.values():
            cost.matmul_flops += times[name] * _flops(instruction, computation)
            if name not in fused:
                cost.hbm_bytes += times[name] * _traffic(instruction, computation, computations)
            if "tpu_custom_call" in instruction.attributes:
                cost.kernels[re.sub(r"[.\d]+$", "", instruction.name)] += times[name]
            kind = next((k for k in COLLECTIVES if instruction.opcode in (k, f"{k}-start")), None)
            if kind:
                # A collective that spans several steps of a pipeline appears in each of them, under one channel.
                channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                key = kind, channel[1] if channel else instruction.name
                seen.setdefault(key, []).append((times[name], name, instruction))
    for (kind, _), found in seen.items():
        runs, within, instruction = max(found, key=lambda f: f[0])
        kind, received = _received(kind, within, instruction)
        cost.collectives[kind] += runs * received
        cost.collective_counts[kind] += runs
    plain = (dict(d) for d in (cost.kernels, cost.collectives, cost.collective_counts))
    cost.kernels, cost.collectives, cost.collective_counts = plain
    return cost


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def refused_bytes(message: str) -> dict[str, int | None]:
    """Parse the compiler's refusal: the bytes that the program needs and the bytes available.

    Keys: `temporaries` or `total`, whichever the compiler counts, and `available`, None if the message does not say.
    """
    amount = r"([\d.]+)([KMG]?)"
    forms = {
        "total": rf"Used {amount} of {amount} hbm",
        "temporaries": rf"HLO temporaries \({amount}\) exceeds available HBM \({amount}\)",
    }
    for name, form in forms.items():
        if found := re.search(form, message):
            needed, there = (int(float(found[i]) * _UNITS[found[i + 1]]) for i in (1, 3))
            return {name: needed, "available": there}
    return {"available": None}


def _times(computations: Mapping[str, Computation], entry: str) -> dict[str, float]:
    """Count how often each computation runs."""
    times: dict[str, float] = defaultdict(float)

    def call(name: str, runs: float) -> None:
        times[name] += runs
        for instruction in computations[name].values():
            runs_of_it = trips(instruction, computations[name], computations) if instruction.opcode == "while" else 1
            for each in called(instruction):
                call(each, runs * runs_of_it)

    call(entry, 1)
    return times


# --- counting --------------------------------------------------------------------------------------------------------


def _flops(instruction: Instruction, computation: Computation) -> float:
    if instruction.opcode == "dot":
        lhs = computation[instruction.operands[0]].arrays[0].dims
        (contracted,) = groups(r"lhs_contracting_dims=\{([\d,]*)\}", instruction)
        return 2.0 * math.prod(instruction.arrays[0].dims) * math.prod(lhs[int(d)] for d in contracted.split(",") if d)
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    if instruction.opcode == "custom-call" and _GROUPED.match(instruction.name):
        return _grouped_flops(instruction, computation)
    return 0.0


def _grouped_flops(instruction: Instruction, computation: Computation) -> float:
    """FLOPs of the TPU's kernel for `ragged_dot`: each row is multiplied with the matrix of its own group.

    Its last operands are the rows (R, X) and either a matrix for each group, (E, X, Y), or other rows (R, Y), whose
    products it sums by group. The kernel takes 128 rows at a time and a border between groups twice: with R / E rows a
    group it multiplies up to 1 + 128 E / R times as many rows, which is not counted.
    """
    rows, other = (computation[name].arrays[0].dims for name in instruction.operands[-2:])
    return 2.0 * math.prod(rows) * other[-1]


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """FLOPs of a convolution, counting only window positions inside the input. A TPU computes products this way."""
    lhs, rhs = (computation[name].arrays[0].dims for name in instruction.operands[:2])
    out = instruction.arrays[0].dims
    lhs_labels, rhs_labels, out_labels = groups(r"dim_labels=([a-z\d]+)_([a-z\d]+)->([a-z\d]+)", instruction)
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    given = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(label for label in lhs_labels if label.isdigit())

    def per_dim(name: str, default: str) -> list[str]:
        return given[name].split("x") if name in given else [default] * len(spatial)

    valid = 1
    columns = zip(spatial, per_dim("size", "1"), per_dim("stride", "1"), per_dim("pad", "0_0"),
                  per_dim("lhs_dilate", "1"), per_dim("rhs_dilate", "1"), strict=True)  # fmt: skip
    for label, size, stride, pad, lhs_dilate, rhs_dilate in columns:
        width, places = lhs[lhs_labels.index(label)], out[out_labels.index(label)]
        low, spread = int(pad.split("_")[0]), int(lhs_dilate)
        reach = [
            place * int(stride) + tap * int(rhs_dilate) - low for place in range(places) for tap in range(int(size))
        ]
        valid *= sum(0 <= at <= (width - 1) * spread and at % spread == 0 for at in reach)
    grouped = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    batch, features = lhs[lhs_labels.index("b")], rhs[rhs_labels.index("i")]
    produced = rhs[rhs_labels.index("o")]
    return 2.0 * batch / (int(grouped[1]) if grouped else 1) * features * produced * valid


def _received(kind: str, within: str, instruction: Instruction) -> tuple[str, float]:
    """The collective's kind, and the bytes that each device of its group receives in a ring."""
    size = sum(array.nbytes for array in instruction.arrays)
    if instruction.opcode.endswith("-start") and len(instruction.arrays) > 1:
        size = max(array.nbytes for array in instruction.arrays)
    ways = _group_size(instruction.attributes)
    share = (ways - 1) / ways
    if "all-reduce-scatter" in within:
        return "reduce-scatter", size * share
    if kind == "reduce-scatter":
        return kind, size * (ways - 1)
    return kind, size * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)


def _group_size(attributes: str) -> int:
    """Number of devices in a group, from any of the three notations that XLA uses."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    return 2


def _traffic(instruction: Instruction, computation: Computation, computations: Mapping[str, Computation]) -> float:
    """Bytes that one instruction reads from HBM and writes to it."""
    if instruction.opcode in _FREE:
        return 0.0
    if instruction.opcode == "fusion":
        return _fusion_traffic(instruction, computation, computations[called(instruction)[0]])
    written = sum(array.nbytes for array in instruction.arrays if array.hbm)
    if instruction.opcode == "dynamic-slice":
        return 2 * written
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _hbm_bytes(computation, instruction.operands[1])
    if instruction.opcode in ("copy-start", "slice-start"):
        written = max((array.nbytes for array in instruction.arrays if array.hbm), default=0)
        return written
    return written + sum(_hbm_bytes(computation, name) for name in set(instruction.operands))


def _hbm_bytes(computation: Computation, name: str) -> int:
    return sum(array.nbytes for array in computation[name].arrays if array.hbm)


def _fusion_traffic(instruction: Instruction, computation: Computation, body: Computation) -> float:
    """Bytes of a fusion's operands and results; a slice that it takes or writes counts as the slice only."""
    users: dict[str, list[Instruction]] = defaultdict(list)
    for inner in body.values():
        for name in inner.operands:
            users[name].append(inner)
    parameters = sorted((i for i in body.values() if i.opcode == "parameter"), key=lambda i: int(i.literal))
    total = 0.0
    for parameter, operand in zip(parameters, instruction.operands, strict=False):
        nbytes = _hbm_bytes(computation, operand)
        total += min(nbytes, sum(_taken(parameter.name, user, nbytes) for user in users[parameter.name]))
    root = next(i for i in body.values() if i.is_root)
    results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for result, array in zip(results, instruction.arrays, strict=False):
        # A step of a pipeline only hands the collective's buffer on; the last step returns it by itself.
        handed_on = root.opcode == "tuple" and result.opcode in COLLECTIVES
        if array.hbm and not handed_on:
            total += _written(result, body, array.nbytes)
    return total


def _taken(name: str, user: Instruction, nbytes: int) -> float:
    if user.opcode in ("dynamic-slice", "slice", "gather"):
        return sum(array.nbytes for array in user.arrays)
    if user.opcode == "dynamic-update-slice" and user.operands[0] == name:
        return 0.0
    # The collective counts its own traffic; its buffers only pass through here.
    if user.opcode in COLLECTIVES or user.opcode in ("custom-call", "tuple"):
        return 0.0
    return nbytes


def _written(result: Instruction, body: Computation, nbytes: int) -> float:
    while result.opcode == "bitcast":
        result = body[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return sum(array.nbytes for array in body[result.operands[1]].arrays)
    return 0.0 if result.opcode == "parameter" else nbytes
