"""Mappings and sets by identity, and that no other index of objects by their numbers is left."""

import ast
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

from kithara_ray.model.identity import IdentityMap, IdentitySet

PACKAGE = Path(__file__).parents[2] / "kithara_ray"
# Where `id(...)` may be called, with the reason.
ID_CALLS = {
    "model/identity.py": "it is the index",
    "model/keras_compat.py": "Keras asks for values by the numbers of its tensors",
    "yaml_file.py": "the nodes live as long as the walk over them, and a file is read without the model's room",
}


class Array:
    """As a Keras variable: equality is elementwise and there is no hash."""

    __hash__ = None

    def __init__(self, *values, path=None):
        self.values, self.path = np.array(values), path

    def __eq__(self, other):
        return self.values == other.values


def test_equal_objects_are_different_keys():
    one, same = Array(1, 2), Array(1, 2)
    index = IdentityMap([(one, "one"), (same, "same")])
    assert (index[one], index[same], len(index)) == ("one", "same", 2)
    index[one] = "again"
    assert list(index.values()) == ["again", "same"]


def test_order_and_merging_are_those_of_a_dict():
    a, b, c = (Array(i) for i in range(3))
    left, right = IdentityMap([(a, 1), (b, 2)]), IdentityMap([(b, 3), (c, 4)])
    assert list((left | right).values()) == [1, 3, 4]
    assert list(left.values()) == [1, 2]
    left.update(right)
    assert list(left.values()) == [1, 3, 4]
    del left[b]
    assert b not in left
    assert left.get(b, "none") == "none"


def test_a_key_that_is_not_there_is_named():
    with pytest.raises(KeyError, match=r"decoder/kernel is none of the 1 keys"):
        IdentityMap([(Array(1), 1)])[Array(1, path="decoder/kernel")]


def test_the_index_keeps_its_keys_alive():
    index = IdentityMap([(key := Array(1), "first")])
    gone = weakref.ref(key)
    del key
    gc.collect()
    # A number alone would be free for the next object, which would then be found here.
    assert gone() is not None
    assert all(Array(1) not in index for _ in range(100))


def test_a_set_holds_each_object_once():
    a, b = Array(1), Array(1)
    both = IdentitySet([a, b, a])
    assert len(both) == 2
    assert [element is a for element in both] == [True, False]
    left = both - IdentitySet([a])
    assert isinstance(left, IdentitySet)
    assert a not in left
    assert b in left


def id_calls(source: str) -> list[int]:
    """Lines that call the builtin `id`."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "id"
    ]


def test_objects_are_indexed_by_this_alone():
    found = {str(file.relative_to(PACKAGE)): id_calls(file.read_text()) for file in PACKAGE.rglob("*.py")}
    found = {file: lines for file, lines in found.items() if lines}
    others = {f"kithara_ray/{file}": lines for file, lines in found.items() if file not in ID_CALLS}
    assert not others, f"id() is called in {others}; index the objects by model.identity.IdentityMap or IdentitySet"
    assert found.keys() == ID_CALLS.keys(), "an exception of ID_CALLS is used no longer"


def test_a_call_of_id_is_seen():
    assert id_calls("x = {id(v): v for v in values}\ny = model.id(3)") == [1]
