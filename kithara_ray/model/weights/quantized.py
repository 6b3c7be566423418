"""Frozen kernels held as small integers with scales, and made floats again in the block that computes with them.

`int8`, a quarter of float32's bytes: each output channel (a row of the Hugging Face matrix) has a float32 scale, its
largest magnitude / 127. Each weight is rounded to the nearest of 255 multiples of the scale. The error is at most
scale / 2, or 0.4 % of the row's largest weight.

`int4`, an eighth of float32's bytes and 3 % more: each group of up to 64 weights that lie next to each other in a row
has a bfloat16 scale, its weight of largest magnitude / -8. Each weight is rounded to the nearest of the 16 multiples
-8 to 7 of it. Two of them share a byte: the j-th weight of a group's first half has the lower four bits, the j-th of
the second half the upper four. `nf4` is held in the same way. The scale is the group's largest magnitude, and the 16
levels are those of QLoRA (arXiv:2305.14314), which are about equally frequent among normal weights.

Activations are not quantised. Products are computed in the model's precision.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kithara_ray.errors import UnsupportedError

_LEVELS = 127
_GROUP = 64
# QLoRA, appendix E, to float32's precision: quantiles of the normal distribution; 0 and both ends are levels.
NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """An array held as integers.

    Attributes:
        values: int8, the kernel's shape; of four bits uint8, with half of the grouped dim.
        scales: float32, the kernel's shape with 1 for each dim that its layer contracts; of four bits bfloat16, with
            the number of groups in place of the grouped dim.
        kind: "int8", "int4" or "nf4".
        grouped: the grouped dim of a kernel of four bits, counted from the last as -1; None for int8.
    """

    values: jax.Array
    scales: jax.Array
    kind: str = field(metadata={"static": True})
    grouped: int | None = field(default=None, metadata={"static": True})

    def __getitem__(self, step) -> "Quantized":
        return replace(self, values=self.values[step], scales=self.scales[step])

    def floats(self, dtype) -> jax.Array:
        """The weights as floats, multiplied in float32 and rounded once."""
        if self.grouped is None:
            return (self.values.astype(jnp.float32) * self.scales).astype(dtype)
        dim = self.values.ndim + self.grouped
        before, after = self.values.shape[:dim], self.values.shape[dim + 1 :]
        packed = self.values.reshape(*before, self.scales.shape[dim], -1, *after)
        codes = jnp.concatenate([packed & 15, packed >> 4], axis=dim + 1)
        levels = codes.astype(jnp.float32) - 8 if self.kind == "int4" else _looked_up(codes)
        weights = levels * jnp.expand_dims(self.scales, dim + 1).astype(jnp.float32)
        return weights.reshape(*before, -1, *after).astype(dtype)


@dataclass(frozen=True)
class Storage:
    """How a kernel is held as integers.

    Attributes:
        kind: "int8", "int4" or "nf4".
        contracted: the dims that the kernel's layer contracts. Groups of four-bit weights lie along the last of them.
    """

    kind: str
    contracted: tuple[int, ...]

    def after(self, dims: int) -> "Storage":
        """The same kernel with this many more leading dims."""
        return Storage(self.kind, tuple(dim + dims for dim in self.contracted))

    @property
    def grouped(self) -> int | None:
        """The dim that groups lie along; None for int8."""
        return None if self.kind == "int8" else self.contracted[-1]

    def group_in(self, shape: Sequence[int]) -> int:
        """Number of weights in a group of a kernel of this shape: 64, or the largest even divisor below it.

        Raises:
            UnsupportedError: the grouped dim is odd.
        """
        size = shape[self.contracted[-1]]
        groups = [group for group in range(2, _GROUP + 1, 2) if size % group == 0]
        if not groups:
            raise UnsupportedError(
                f"quantize={self.kind!r} holds weights in pairs, and a kernel {tuple(shape)} has {size} in a row; "
                'take "int8"'
            )
        return groups[-1]

    def values(self, shape: Sequence[int]) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of the values of a kernel of this shape."""
        if self.kind == "int8":
            return tuple(shape), np.dtype(np.int8)
        return tuple(size // 2 if dim == self.grouped else size for dim, size in enumerate(shape)), np.dtype(np.uint8)

    def scales(self, shape: Sequence[int]) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of the scales of a kernel of this shape."""
        if self.kind == "int8":
            channels = tuple(1 if dim in self.contracted else size for dim, size in enumerate(shape))
            return channels, np.dtype(np.float32)
        groups = shape[self.contracted[-1]] // self.group_in(shape)
        made = tuple(groups if dim == self.grouped else size for dim, size in enumerate(shape))
        return made, np.dtype(ml_dtypes.bfloat16)

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a kernel of this shape."""
        return sum(math.prod(part) * dtype.itemsize for part, dtype in (self.values(shape), self.scales(shape)))

    def quantise(self, kernel: np.ndarray, group: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Quantise a part of a kernel to (values, scales).

        Args:
            kernel: a part that is whole in the contracted dims for int8, and of whole groups for the others.
            group: weights in a group; None for int8.
        """
        kernel = np.asarray(kernel, np.float32)
        if group is None:
            return _int8_of(kernel, self.contracted)
        return _four_bits_of(kernel, self.contracted[-1], group, _int4_codes if self.kind == "int4" else _nf4_codes)


def in_floats(array: jax.Array | Quantized) -> jax.Array:
    """The array itself, of a kind that is never quantised: an embedding, a head, a bias, a trained weight."""
    assert not isinstance(array, Quantized)
    return array


def floats(array: jax.Array | Quantized, dtype) -> jax.Array:
    """The floats that an array stands for; `dtype` applies to those made from integers."""
    return array.floats(dtype) if isinstance(array, Quantized) else array


def _int8_of(kernel: np.ndarray, contracted: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """A channel of zeros has scale 1."""
    scales = np.abs(kernel).max(axis=tuple(contracted), keepdims=True) / np.float32(_LEVELS)
    scales[scales == 0] = 1
    return np.rint(kernel / scales).astype(np.int8), scales


def _four_bits_of(kernel: np.ndarray, dim: int, group: int, codes_of: Callable) -> tuple[np.ndarray, np.ndarray]:
    """A group of zeros has scale 1. The scales are rounded to bfloat16 before the weights are divided by them."""
    before, after = kernel.shape[:dim], kernel.shape[dim + 1 :]
    groups = kernel.reshape(*before, -1, group, *after)
    codes, scales = codes_of(groups, dim + 1)
    lower, upper = np.split(codes, 2, axis=dim + 1)
    return (lower | upper << 4).reshape(*before, -1, *after), np.squeeze(scales, dim + 1)


def _int4_codes(groups: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    highest, lowest = (reduce(groups, axis=dim, keepdims=True) for reduce in (np.max, np.min))
    scales = _bfloat16_scales(np.where(highest > -lowest, highest, lowest) / np.float32(-8))
    return (np.rint(groups / scales.astype(np.float32)).clip(-8, 7) + 8).astype(np.uint8), scales


def _nf4_codes(groups: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    scales = _bfloat16_scales(np.abs(groups).max(axis=dim, keepdims=True))
    levels = np.array(NF4, np.float32)
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, groups / scales.astype(np.float32)).astype(np.uint8), scales


def _bfloat16_scales(scales: np.ndarray) -> np.ndarray:
    rounded = scales.astype(ml_dtypes.bfloat16)
    rounded[rounded == 0] = 1
    return rounded


def _looked_up(codes: jax.Array) -> jax.Array:
    """The levels of nf4's codes, float32: fifteen selections, since a TPU looks up single elements slowly."""
    levels = [jnp.float32(level) for level in NF4]
    for bit in range(4):
        is_set = (codes >> bit & 1) == 1
        levels = [jnp.where(is_set, high, low) for low, high in zip(levels[::2], levels[1::2], strict=True)]
    return levels[0]
