"""The parameters of a mixture that LoRA adapts, and the tensors of a checkpoint that hold them.

    E  experts    I  width inside an expert    D  hidden width    R  rank

transformers holds all experts in two parameters, `<mixture>.experts.gate_up_proj` (E, 2 * I, D) and `.down_proj`
(E, D, I); gpt_oss' have their last two dims the other way round. Most files hold a tensor for each expert and matrix.
The router is a parameter too, `<mixture>.gate.weight` (E, D). Everything here has the names of transformers' modules,
except the tensors.

PEFT adapts a parameter of experts with A (E * R, in) and B (out, R * E). Row e * R + r of A and column r * E + e of B
are the r-th of expert e.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.facts import stored
from kithara_ray.hf.mxfp4 import BLOCKS
from kithara_ray.hf.tower import text_of

GATE_UP, DOWN = "gate_up_proj", "down_proj"
_PARAMETER = re.compile(rf"^(.*\.experts)\.({GATE_UP}|{DOWN})$")
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w3|w2)\.weight$")
# For each matrix of an expert: the parameter that holds it, and the half of its rows.
_GATE, _UP, _DOWN = (GATE_UP, 0), (GATE_UP, 1), (DOWN, None)
_MATRICES = {"gate_proj": _GATE, "up_proj": _UP, "down_proj": _DOWN, "w1": _GATE, "w3": _UP, "w2": _DOWN}
_ROUTERS = ("gate", "router")
_WEIGHT = ".weight"
# Model types for which PEFT takes the former names of an expert's layers, here gate, up and down, for the parameters;
# "gate" means the router. For others they name layers alone.
CONVERTED = dict.fromkeys(("mixtral", "minimax_m2"), ("w1", "w3", "w2")) | dict.fromkeys(
    ("ernie4_5_moe", "glm4_moe", "qwen3_moe", "qwen3_next"), ("gate_proj", "up_proj", "down_proj")
)
# Model types whose parameters are (E, in, out).
_TRANSPOSED = frozenset({"gpt_oss"})


@dataclass(frozen=True)
class Part:
    """The part of a parameter that one tensor of a checkpoint holds.

    Attributes:
        parameter: the parameter's name.
        expert: the number of the one expert; None means all.
        half: 0 or 1 for the first or second half of its rows; None means all.
    """

    parameter: str
    expert: int | None = None
    half: int | None = None


@dataclass(frozen=True)
class Parameter:
    """The shape of a parameter as LoRA sees it: `experts` matrices (out_dim, in_dim); a router is one matrix."""

    experts: int
    out_dim: int
    in_dim: int

    def factors(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of A and B."""
        return (self.experts * rank, self.in_dim), (self.out_dim, rank * self.experts)


def is_parameter(name: str) -> bool:
    """True if a parameter holds the matrices of experts."""
    return _PARAMETER.match(name) is not None


def is_router(module: str) -> bool:
    """True if a module's weight is a parameter that chooses experts; gemma4's router is a linear layer instead."""
    return module.rpartition(".")[2] in _ROUTERS


def holder_of(parameter: str) -> tuple[str, str]:
    """Split the name of a parameter of experts into the module and the parameter's own name."""
    holder, _, leaf = parameter.rpartition(".")
    return holder, leaf


def module_of(weight: str) -> str:
    """Return transformers' name of the module of `<module>.weight`; files of mixtral and minimax_m2 have another."""
    return weight.removesuffix(_WEIGHT).replace(".block_sparse_moe.", ".mlp.")


def part_of(tensor: str) -> Part | None:
    """Return the part of a parameter of experts that a tensor holds; None for any other tensor."""
    if is_parameter(tensor):
        return Part(tensor)
    match = _EXPERT.match(tensor)
    if match is None:
        return None
    leaf, half = _MATRICES[match[3]]
    return Part(f"{module_of(match[1])}.{leaf}", int(match[2]), half)


def targets_of(tensor: str) -> tuple[str, ...]:
    """Return the names of modules and parameters whose factors adapt a tensor; an adapter has at most one of them."""
    part = part_of(tensor)
    modules = (tensor.removesuffix(_WEIGHT), module_of(tensor))
    return modules if part is None else (*modules, part.parameter)


def former_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Map names that PEFT's `target_modules` may have for a mixture's parameters to these; empty for most models."""
    names = CONVERTED.get(text_of(config).get("model_type", ""))
    if names is None:
        return {}
    gate, up, down = names
    return {"gate": "gate.weight", gate: GATE_UP, up: GATE_UP, down: DOWN}


def is_of_no_layer(config: Mapping[str, Any], tensor: str) -> bool:
    """True if a tensor is one expert's, and no target's name means it: see `CONVERTED`."""
    return _EXPERT.match(tensor) is not None and not former_names(config)


def is_transposed(config: Mapping[str, Any]) -> bool:
    """True if a model's parameters of experts, and their tensors, are (E, in, out)."""
    return text_of(config).get("model_type") in _TRANSPOSED


def parameters_of(base: BaseCheckpoint) -> dict[str, Parameter]:
    """Map each parameter of a mixture that LoRA can adapt to its shape, from the headers only."""
    made: dict[str, Parameter] = {}
    count: dict[str, int] = {}
    for tensor, info in base.tensors.items():
        part = part_of(tensor.removesuffix(BLOCKS))
        if part is None:
            continue
        name = part.parameter
        if part.expert is None:
            experts, rows, columns = stored.shape_of(base, name)
            made[name] = Parameter(experts, *((columns, rows) if is_transposed(base.config) else (rows, columns)))
        else:
            count[name] = max(count.get(name, 0), part.expert + 1)
            rows, columns = info.shape
            made[name] = Parameter(count[name], rows * (2 if part.half is not None else 1), columns)
    mixtures = {holder_of(name)[0].rpartition(".")[0] for name in made}
    for tensor, info in base.tensors.items():
        module = module_of(tensor)
        if tensor.endswith(_WEIGHT) and is_router(module) and module.rpartition(".")[0] in mixtures:
            made[module + _WEIGHT] = Parameter(1, *info.shape)
    return dict(sorted(made.items()))


# --- names in PEFT's files -------------------------------------------------------------------------------------------

_INNER = ".base_layer"


def in_file(parameter: str, targets: Collection[str]) -> str:
    """Return the module that has a parameter's factors in PEFT's files.

    PEFT wraps the module of the experts once for each adapted parameter, the first one innermost.

    Args:
        targets: the adapted parameters of the same module.
    """
    holder, leaf = holder_of(parameter)
    return holder + _INNER if leaf == GATE_UP and f"{holder}.{DOWN}" in targets else holder


def parameters_in(module: str) -> list[str]:
    """Return the parameters that a module of a file may have the factors of, the innermost first."""
    holder = module.removesuffix(_INNER)
    return [name for name in (f"{holder}.{GATE_UP}", f"{holder}.{DOWN}") if is_parameter(name)]


def from_file(module: str, targets: Collection[str]) -> str:
    """Return the one of `targets`, the adapted of `parameters_in`, with this module's factors; else the module."""
    return next((name for name in targets if in_file(name, targets) == module), module)
