"""A frozen kernel held as int8: a quarter of float32's bytes, half of bfloat16's.

Each output channel (a row of the Hugging Face matrix) has a float32 scale, its largest magnitude / 127, and each weight
is rounded to the nearest of 255 multiples of it: off by at most scale / 2, that is 0.4 % of the row's largest weight.
Activations are not quantised, and the products are computed in the model's precision, of weights made anew from the
int8 where a block needs them.
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
    """values * scales.

    Attributes:
        values: int8, the kernel's shape.
        scales: float32, the kernel's shape with 1 for the dims that its layer contracts.
    """

    values: jax.Array
    scales: jax.Array

    def __getitem__(self, step) -> "Int8":
        return Int8(self.values[step], self.scales[step])

    def floats(self, dtype) -> jax.Array:
        """The weights, multiplied in float32 and rounded once."""
        return (self.values.astype(jnp.float32) * self.scales).astype(dtype)


def floats(array: jax.Array | Int8, dtype) -> jax.Array:
    """What an array stands for; `dtype` is that of an int8's floats."""
    return array.floats(dtype) if isinstance(array, Int8) else array


def int8_of(kernel: np.ndarray, contracted: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(values, scales) of a kernel, whole in its contracted dims. A channel of zeros has scale 1."""
    kernel = np.asarray(kernel, np.float32)
    scales = np.abs(kernel).max(axis=tuple(contracted), keepdims=True) / np.float32(_LEVELS)
    scales[scales == 0] = 1
    return np.rint(kernel / scales).astype(np.int8), scales
