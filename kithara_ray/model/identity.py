"""Mappings and sets that compare keys by identity, for objects that have no hash or no plain equality.

A Keras variable compares its elements and has no hash, so it cannot be a key of a dict. A dict keyed by `id(variable)`
works, but its numbers do not show which object they stand for. Python also reuses the number of a deleted object.
These containers hold the objects themselves, in insertion order.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Set
from typing import Any, Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")
W = TypeVar("W")


class IdentityMap(MutableMapping[K, V], Generic[K, V]):
    """A dict whose keys are equal only if they are the same object.

    Example: `IdentityMap((port.variable, port) for port in ports)[layer.kernel]` is the port of that kernel.
    """

    def __init__(self, pairs: Mapping[K, V] | Iterable[tuple[K, V]] = ()):
        self._entries: dict[int, tuple[K, V]] = {}
        given: Any = pairs
        for key, value in given.items() if isinstance(given, Mapping) else given:
            self[key] = value

    def __getitem__(self, key: K) -> V:
        try:
            return self._entries[id(key)][1]
        except KeyError:
            raise KeyError(f"{_shown(key)} is none of the {len(self)} keys") from None

    def __setitem__(self, key: K, value: V) -> None:
        self._entries[id(key)] = (key, value)

    def __delitem__(self, key: K) -> None:
        del self._entries[id(key)]

    def __contains__(self, key: object) -> bool:
        return id(key) in self._entries

    def __iter__(self) -> Iterator[K]:
        return (key for key, _ in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __or__(self, other: "IdentityMap[K, W]") -> "IdentityMap[K, V | W]":
        return IdentityMap([*self.items(), *other.items()])

    # A map equals only itself: Mapping's own comparison would hash the keys.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"IdentityMap({[_shown(key) for key in self]})"


class IdentitySet(Set[K], Generic[K]):
    """A set whose elements are equal only if they are the same object."""

    def __init__(self, elements: Iterable[K] = ()):
        self._elements = IdentityMap((element, None) for element in elements)

    def __contains__(self, element: object) -> bool:
        return element in self._elements

    def __iter__(self) -> Iterator[K]:
        return iter(self._elements)

    def __len__(self) -> int:
        return len(self._elements)

    def __repr__(self) -> str:
        return f"IdentitySet({[_shown(element) for element in self]})"


def _shown(key: Any) -> str:
    """The path of a Keras variable or layer, else its name or type; their repr may print all values."""
    return next((str(name) for field in ("path", "name") if (name := getattr(key, field, None))), type(key).__name__)
