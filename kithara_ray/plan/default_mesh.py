"""The mesh of a run that gives none: whole weights on every device if they are small, else weights that are split.

Split weights (`fsdp`) take little memory, and every step gathers each of them twice. If the whole state of a run is
small beside a device's memory, this saves memory that nothing needs: the rows alone are split (`data`), and a step
moves only the gradients of what it trains. The global batch and the losses do not depend on the mesh.

The state is the frozen weights as they are held, and four numbers for each trained one: value, gradient and the two
moments of AdamW, which is assumed for every optimizer. Activations are left out, because a device computes the same
rows on either mesh.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kithara_ray.hf import beside, tower, unused
from kithara_ray.hf.checkpoint import BaseCheckpoint, TensorInfo
from kithara_ray.hf.facts.experts import is_parameter, parameters_of
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.model.lora.targets import linear_modules_of
from kithara_ray.sharding.shape import MeshShape

# The state counts as small up to this share of a device's memory. The rest is for activations, so an "auto" batch loses
# at most this share. It is 2 GB on a TPU v5e: SmolLM2-135M and Gemma-3-270M are below it, Gemma-2-2B is above.
SMALL_SHARE = 1 / 8
# Value, gradient and two moments.
NUMBERS_OF_TRAINED = 4
_WEIGHT = ".weight"
# A packed byte of MXFP4 holds two values, which are held as bfloat16.
_BYTES_OF_PACKED = 4


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a run's whole state, over all devices that share it.

    Attributes:
        frozen: weights that are not trained, in the dtype in which they are held.
        trained: trained numbers with their gradients and moments.
    """

    frozen: int
    trained: int

    @property
    def total(self) -> int:
        return self.frozen + self.trained


@dataclass(frozen=True)
class DefaultMesh:
    """The mesh that the rule chose, and the figures that it chose by.

    Attributes:
        shape: axes of the mesh; one of them is -1, for the devices that are there.
        state_bytes: bytes of the whole state.
        device_bytes: memory of one device; None if it is not known.
    """

    shape: MeshShape
    state_bytes: int
    device_bytes: int | None

    @property
    def splits(self) -> bool:
        """True if the mesh splits the weights."""
        return self.shape.fsdp != 1

    def why(self) -> str:
        """State the choice in one line."""
        does = "weights are split over the devices" if self.splits else "every device holds all weights"
        if self.device_bytes is None:
            return f"{does}: the memory of a device is not known"
        share = self.state_bytes / self.device_bytes
        than = "more than" if self.splits else "at most"
        return (
            f"{does}: the state has {self.state_bytes / 1e9:.2f} GB, {share:.1%} of a device's "
            f"{self.device_bytes / 1e9:.1f} GB, {than} {SMALL_SHARE:.1%}"
        )

    def told(self) -> dict[str, Any]:
        """Return the choice as plain data, for run.json."""
        return {"state_bytes": self.state_bytes, "device_bytes": self.device_bytes, "why": self.why()}


def default_mesh(state_bytes: int, device_bytes: int | None, slices: int = 1) -> DefaultMesh:
    """Choose the mesh of a run.

    Args:
        state_bytes: bytes of the whole state.
        device_bytes: memory of one device. With None, which stands for a chip that is not known, weights are split.
        slices: number of TPU slices. Weights are never split between slices.
    """
    is_small = device_bytes is not None and state_bytes <= SMALL_SHARE * device_bytes
    shape = MeshShape(data=-1, fsdp=1) if is_small else MeshShape(data=slices, fsdp=-1)
    return DefaultMesh(shape, state_bytes, device_bytes)


def state_bytes(base: BaseCheckpoint, lora: LoraConfig | None, precision: str, quantize: str | None) -> StateBytes:
    """Count a run's state from the headers of its base; no weight is read.

    Args:
        lora: LoRA settings; None trains all weights.
        precision: Keras dtype policy.
        quantize: "int8", "int4" or "nf4" holds the kernels of linear layers so. Four-bit weights are counted in groups
            of 64, and take a little more if their groups are smaller.
    """
    held = {info.name: info for info in _held(base)}
    if lora is None:
        itemsize = 2 if precision == "bfloat16" else 4
        return StateBytes(0, NUMBERS_OF_TRAINED * itemsize * sum(_size(info) for info in held.values()))
    linear = {f"{module}{_WEIGHT}" for module in linear_modules_of(base)} if quantize else set()
    frozen = sum(
        _quantised_bytes(info, quantize) if name in linear else _nbytes(info, precision) for name, info in held.items()
    )
    return StateBytes(frozen, NUMBERS_OF_TRAINED * 4 * trained_by(lora, base))


def decoding_bytes(base: BaseCheckpoint, lora: LoraConfig | None, precision: str) -> int:
    """Count the bytes of the arrays that decoding holds: the weights, and the adapter's tensors in float32.

    The cache of keys and values is left out: its rows are split on either mesh.
    """
    weights = sum(_nbytes(info, precision) for info in _held(base))
    return weights + (0 if lora is None else 4 * trained_by(lora, base))


def trained_by(lora: LoraConfig, base: BaseCheckpoint) -> int:
    """Return how many numbers an adapter trains: factors, magnitudes, and weights of the base itself."""
    count = 0
    for module in filter(lora.matches, linear_modules_of(base)):
        rows, columns = base.info(f"{module}{_WEIGHT}").shape
        count += lora.rank_of(module) * (rows + columns) + rows * (lora.use_dora + lora.lora_bias)
    for name, parameter in (parameters_of(base) if lora.target_parameters else {}).items():
        module = name if is_parameter(name) else name.removesuffix(_WEIGHT)
        if lora.parameter_of(module) is not None:
            count += sum(math.prod(shape) for shape in parameter.factors(lora.rank_of(module)))
    for part in beside.of_base(lora, base):
        shape = base.info(part.tensor).shape
        rows = shape[0] if part.rows is None else len(part.rows)
        count += rows * (shape[1] if len(shape) > 1 else 1)
    return count


def _held(base: BaseCheckpoint) -> Iterator[TensorInfo]:
    """Yield the tensors that a model is made of: no copy of a tied embedding, nothing that is ignored or copied."""
    tied = beside.is_tied(base)
    for name, info in base.tensors.items():
        if (
            unused.why_unused(base.config, name)
            or unused.is_beyond(base.config, name)
            or tower.is_beside(base.config, name)
        ):
            continue
        if not (tied and name.endswith("lm_head.weight")):
            yield info


def _size(info: TensorInfo) -> int:
    """Elements of a tensor; those of a packed one count as they are held."""
    return info.nbytes * _BYTES_OF_PACKED // 2 if info.dtype == "U8" else info.nbytes // info.numpy_dtype.itemsize


def _quantised_bytes(info: TensorInfo, quantize: str | None) -> int:
    """Bytes of a matrix (rows, columns) as integers: of int8 one and a float32 for each row; else 34 for each 64."""
    return _size(info) + 4 * info.shape[0] if quantize == "int8" else _size(info) * 34 // 64


def _nbytes(info: TensorInfo, precision: str) -> int:
    if info.dtype == "U8":
        return info.nbytes * _BYTES_OF_PACKED
    return 2 * _size(info) if precision == "bfloat16" else info.nbytes
