"""The changes that a merge makes to the tensors of a base."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kithara_ray.hf import beside
from kithara_ray.hf.adapter import A_SUFFIX, BIAS_SUFFIX, Adapter
from kithara_ray.hf.facts.experts import Part, is_parameter, part_of, targets_of


@dataclass(frozen=True)
class Change:
    """The change that a merge makes to one tensor of the base.

    Attributes:
        module: the module or parameter whose factors the merge adds, if any.
        part: the tensor's part of a parameter of experts, if it holds one.
        value: the values that replace the tensor, or only its `rows`.
        rows: the rows that `value` replaces; None means all.
        added: the array that the merge adds to a bias, multiplied by `scale`.
    """

    module: str | None = None
    part: Part | None = None
    value: np.ndarray | None = None
    rows: tuple[int, ...] | None = None
    added: np.ndarray | None = None
    scale: float = 1.0


def changes_of(adapter: Adapter | None, tensors: Iterable[str]) -> dict[str, Change]:
    """Map each of these tensors that a merge changes to its change, and each bias that an adapter adds to."""
    if adapter is None:
        return {}
    adapted = {module for module in adapter.modules if module + A_SUFFIX in adapter.tensors}
    made = {}
    for name in tensors:
        module = next((target for target in targets_of(name) if target in adapted), None)
        if module is not None:
            made[name] = Change(module, part_of(name) if is_parameter(module) else None)
    for name, array in adapter.beside.items():
        made[beside.tensor_of(name)] = Change(value=array, rows=beside.rows_of(adapter.config, name))
    for module in adapter.modules if adapter.config.lora_bias else ():
        if (added := adapter.tensors.get(module + BIAS_SUFFIX)) is not None:
            name, scale = module + beside.BIAS, adapter.config.scale_of(module)
            made[name] = dataclasses.replace(made.get(name, Change()), added=added, scale=scale)
    return made


@dataclass(frozen=True)
class Factors:
    """The factors that a merge adds to one matrix (out, in) of a tensor, or to its transpose (in, out).

    Attributes:
        left_OR, right_RI: the product's factors; for a transpose, A's transpose and B's.
        rounds: True if the product is rounded to the tensor's dtype before it is added, as PEFT does for a parameter.
        magnitude_O: DoRA's lengths of the merged rows; None without DoRA.
    """

    left_OR: np.ndarray
    right_RI: np.ndarray
    scale: float
    rounds: bool = False
    magnitude_O: np.ndarray | None = None


def factors_of(adapter: Adapter, change: Change, transposed: bool) -> list[Factors]:
    """Return the factors of a tensor's matrices: one for a linear layer, one for each expert that the tensor holds."""
    module = change.module
    assert module is not None
    a, b, config = adapter.a(module), adapter.b(module), adapter.config
    scale, rounds = config.scale_of(module), config.parameter_of(module) is not None
    if change.part is None:
        return [Factors(b, a, scale, rounds, adapter.magnitude(module) if config.use_dora else None)]
    rank, out = config.rank_of(module), len(b)
    a_ERI, b_ORE = a.reshape(-1, rank, a.shape[1]), b.reshape(out, rank, -1)
    half = change.part.half
    rows = slice(None) if half is None else slice(half * (out // 2), (half + 1) * (out // 2))
    experts = range(len(a_ERI)) if change.part.expert is None else [change.part.expert]
    pairs = ((b_ORE[rows, :, expert], a_ERI[expert]) for expert in experts)
    return [Factors(a.T, b.T, scale, rounds) if transposed else Factors(b, a, scale, rounds) for b, a in pairs]
