"""Private names stay at home: those of other libraries in the compat modules, ours in the module that defines them."""

import ast
from pathlib import Path

import pytest
from private_names import HOMES, names_in, uses_of_private_names

PACKAGE = Path(__file__).parents[1] / "kithara_ray"
FILES = {str(file.relative_to(PACKAGE)): file.read_text() for file in sorted(PACKAGE.rglob("*.py"))}
MOST_ARGUMENTS = 8
# The rooms whose functions are called by other rooms alone, and what may have more arguments there, with the reason.
SMALL_SIGNATURES = ("model", "train", "plan", "sharding")
LONG_SIGNATURES = {
    "model/families/gemma4.py: call": "Keras has cached this signature of KerasHub's block",
    "plan/planner.py: plan": "the public `plan`, all but three by name",
}


@pytest.mark.parametrize("file", [file for file in FILES if file not in HOMES])
def test_a_module_uses_its_own_private_names_alone(file):
    found = uses_of_private_names(FILES[file])
    shown = "\n".join(f"  line {use.line}: {use.code}" for use in found)
    assert not found, (
        f"kithara_ray/{file} reaches into what is private elsewhere:\n{shown}\n"
        "A name of Keras or KerasHub belongs into model/keras_compat.py, one of Ray into "
        "orchestration/cluster/ray_compat.py; a name of ours becomes public where it is defined."
    )


def test_no_module_spells_a_name_that_a_compat_module_is_for():
    """`getattr` by a name out of a table is seen by the name."""
    known = {name for home in HOMES for name in names_in(FILES[home]) if name.startswith("_")}
    spelled = {
        f"{file}: {node.value!r}"
        for file, source in FILES.items()
        if file not in HOMES
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and node.value in known
    }
    assert not spelled


@pytest.mark.parametrize("home", HOMES)
def test_every_home_is_used_and_says_why(home):
    source = FILES[home]
    assert uses_of_private_names(source), f"{home} uses no private name any more; take it out of HOMES"
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    for use in uses_of_private_names(source):
        inside = [one for one in functions if one.lineno <= use.line <= one.end_lineno]
        for function in inside:
            text = ast.get_docstring(function) or ""
            assert "eeded" in text, f"{home}: {function.name} uses {use.name} and does not say what it is needed for"


SEEN = {
    "another's attribute": ("y = layer._kernel", "_kernel"),
    "an inherited attribute": ("class A(Base):\n  def f(self):\n    return self._kernel", "_kernel"),
    "a store": ("variable._dtype = 1", "_dtype"),
    "an import of a name": ("from ray.train import _private_thing", "_private_thing"),
    "an import of our own name": ("from kithara_ray.hf.fetch import _ask", "_ask"),
    "a private module": ("import jax._src.core", "jax._src.core"),
    "a name of a private module": ("from ray._raylet import PlacementGroupID", "PlacementGroupID"),
    "a private module as a name": ("from jax import _src", "_src"),
    "Keras' sources": ("from keras.src.backend import config", "config"),
    "KerasHub's sources": ("import keras_hub.src.models", "keras_hub.src.models"),
    "internal modules": ("from ray.train.v2._internal.execution import context", "context"),
    "generated modules": ("from ray.core.generated.gcs_pb2 import Row", "Row"),
    "internal methods": ("for one in data.iter_internal_ref_bundles(): pass", "iter_internal_ref_bundles"),
    "a deferred import": ("def f():\n  from ray._common.utils import memory", "memory"),
    "getattr": ("getattr(layer, '_kernel', None)", "_kernel"),
    "object.__setattr__": ("object.__setattr__(block, '_kernel', 1)", "_kernel"),
    "import_module": ("import importlib\nimportlib.import_module(f'keras_hub.src.{x}')", "keras_hub.src."),
    "a module's own name by the same name": ("import options\n_LIMIT = 1\nx = options._LIMIT", "_LIMIT"),
    "an overridden hook": ("class A(Base):\n  def _hook(self): pass", "_hook"),
    "an overridden hook that calls its base": (
        "class A(Base):\n  def _hook(self):\n    return super()._hook()\n  def f(self): self._hook()",
        "_hook",
    ),
}
NOT_SEEN = {
    "own methods": "class A:\n  def _f(self): pass\n  def g(self): self._f()",
    "own attributes": "class A:\n  def __init__(self): self._x = 1\n  def f(self, other): return other._x",
    "own fields": "class A:\n  _x: int = 0\n  def f(self): return self._x",
    "own fields of frozen classes": "class A:\n  def f(self): object.__setattr__(self, '_x', 1); self._x",
    "own functions": "def _f(): pass\n_f()",
    "a base class of the same module": "class A:\n  def _f(self): pass\nclass B(A):\n  def _f(self): super()._f()",
    "dunder names": "from kithara_ray import __version__\nx = type(y).__name__",
    "named tuples": "x = point._replace(y=1)",
    "public modules": "from jax.experimental import topologies\nimport keras",
    "fields of files": "x = config['_name_or_path']",
}


@pytest.mark.parametrize("what", SEEN)
def test_a_foreign_private_name_is_seen(what):
    source, name = SEEN[what]
    assert name in {use.name for use in uses_of_private_names(source)}


@pytest.mark.parametrize("what", NOT_SEEN)
def test_what_is_no_foreign_private_name_is_left_alone(what):
    assert not uses_of_private_names(NOT_SEEN[what])


def arguments_of(source: str) -> dict[str, int]:
    """Function name -> number of its arguments."""
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return {f.name: len(f.args.posonlyargs) + len(f.args.args) + len(f.args.kwonlyargs) for f in functions}


def test_signatures_fit_into_a_head():
    long = {
        f"{file}: {name}": count
        for file, source in FILES.items()
        if file.startswith(SMALL_SIGNATURES)
        for name, count in arguments_of(source).items()
        if count > MOST_ARGUMENTS
    }
    assert long.keys() == LONG_SIGNATURES.keys(), f"{long}: split the function or give it a value object"


def test_a_long_signature_is_seen():
    assert arguments_of("def f(a, b, /, c, *rest, d, **more): pass") == {"f": 4}
