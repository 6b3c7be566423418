"""A frozen kernel held as int8: a quarter of float32's bytes, half of bfloat16's.

Each output channel (a row of the Hugging Face matrix) has a float32 scale: its largest magnitude / 127. Each weight is
rounded to the nearest of 255 multiples of the scale. The error is at most scale / 2, or 0.4 % of the row's largest
weight. Activations are not quantised. Products are computed in the model's precision, from floats that are made from
the int8 values when a block needs them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

_LEVELS = 127


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """An int8 array: values * scales.

    Attributes:
        values: int8, the kernel's shape.
        scales: float32, the kernel's shape with 1 for each dim that its layer contracts.
    """

    values: jax.Array
    scales: jax.Array

    def __getitem__(self, step) -> "Int8":
        return Int8(self.values[step], self.scales[step])

    def floats(self, dtype) -> jax.Array:
        """The weights as floats, multiplied in float32 and rounded once."""
        return (self.values.astype(jnp.float32) * self.scales).astype(dtype)


def in_floats(array: jax.Array | Int8) -> jax.Array:
    """The array itself, of a kind that is never held as int8: an embedding, a head, a bias, a trained weight."""
    assert not isinstance(array, Int8)
    return array


def floats(array: jax.Array | Int8, dtype) -> jax.Array:
    """The floats that an array stands for; `dtype` applies to those made from int8."""
    return array.floats(dtype) if isinstance(array, Int8) else array


def int8_of(kernel: np.ndarray, contracted: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Quantise a kernel that is whole in its contracted dims to (values, scales). A channel of zeros has scale 1."""
    kernel = np.asarray(kernel, np.float32)
    scales = np.abs(kernel).max(axis=tuple(contracted), keepdims=True) / np.float32(_LEVELS)
    scales[scales == 0] = 1
    return np.rint(kernel / scales).astype(np.int8), scales
