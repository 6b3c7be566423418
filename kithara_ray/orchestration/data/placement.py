"""The global arrays of a batch. This process makes only the parts that its own devices hold.

B  rows of the global batch    T  positions    K  predictions of a row
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding

from kithara_ray.sharding.mesh import from_parts


def place(
    part: Callable[[int, int], dict[str, np.ndarray]], rows: int, shape: tuple[int, int], sharding: NamedSharding
) -> dict[str, jax.Array]:
    """Return the global arrays of a batch, given its `rows` and shape (T, K); `part(start, stop)` makes rows."""
    made: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def own(index: tuple[slice, ...], name: str) -> np.ndarray:
        start, stop, _ = index[0].indices(rows)
        if (start, stop) not in made:
            made[start, stop] = part(start, stop)
        return made[start, stop][name]

    def array(name: str, width: int) -> jax.Array:
        return from_parts((rows, width), sharding, lambda index: own(index, name))

    widths = dict.fromkeys(("token_ids", "segment_ids"), shape[0])
    widths |= dict.fromkeys(("target_positions", "target_ids", "target_weights"), shape[1])
    return {name: array(name, width) for name, width in widths.items()}
