"""Decide whether a model is accepted from its config.json and the headers of its weights: no jax, no keras."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kithara_ray.errors import KitharaRayError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.model.families import LISTED, family_of
from kithara_ray.model.families.tensors import check_tensors, expected_tensors

_AT_ONCE = 8  # handles; most of the time goes into waiting for an object store


@dataclass(frozen=True)
class Admission:
    """One model, and the answer.

    Attributes:
        handle: as given.
        model_type: of config.json; None if it has none, or cannot be read.
        reason: why the model is refused; None if it is accepted.
        parameters: of the language model that is trained, without a copy of a tied head; None if it is refused.
    """

    handle: str
    model_type: str | None
    reason: str | None
    parameters: int | None

    @property
    def accepted(self) -> bool:
        return self.reason is None


def admissions(handles: Sequence[str]) -> list[Admission]:
    """Answer for each handle, in their order: `hf://`, an object store's URL, or a local directory.

    A directory may hold only config.json. If it has weights, their headers must belong to config.json. No weight is
    read, so a tied head that differs from the embedding is found only when a run starts.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(_admission, handles))


def _admission(handle: str) -> Admission:
    model_type = None
    try:
        base = BaseCheckpoint.described(handle)
        named = base.config.get("model_type")
        model_type = named if isinstance(named, str) else None
        family_of(base.config)
        if base.has_weights:
            check_tensors(base, values=False)
        tensors = expected_tensors(base.config) or {}
    except (KitharaRayError, OSError) as error:
        return Admission(handle, model_type, str(error).removesuffix(LISTED), None)
    count = sum(math.prod(size for _, size in dims) for dims in tensors.values())
    return Admission(handle, model_type, None, count)
