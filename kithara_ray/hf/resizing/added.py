"""The rows that a resized vocabulary adds to a base's tables, where an adapter's file gives their values."""

import hashlib
from collections.abc import Mapping

import numpy as np


class AddedRows:
    """Values of added rows, by the base's tensor: (K, D) of a table, (K,) of the head's bias.

    Two of them are equal if their arrays are equal bit by bit; `repr` shows a digest of the values.
    """

    def __init__(self, values: Mapping[str, np.ndarray]):
        self.values = {name: np.ascontiguousarray(array) for name, array in sorted(values.items())}
        digest = hashlib.sha256()
        for name, array in self.values.items():
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
        self.digest = digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AddedRows) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"AddedRows({self.digest[:16]})"
