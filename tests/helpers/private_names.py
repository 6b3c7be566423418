"""Where source code uses private names that are not its own, found in its syntax tree."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

# Where private names of other libraries may stand; each module says why it needs them.
HOMES = {
    "model/keras_compat.py": "Keras and KerasHub",
    "orchestration/cluster/ray_compat.py": "Ray",
    "orchestration/cluster/ray_train_compat.py": "Ray Train",
    "orchestration/search/state_files.py": "fsspec",
}
# Names with an underscore that are documented for everybody: those of named tuples.
DOCUMENTED = {"_asdict", "_fields", "_make", "_replace"}
# Functions whose argument is a name of somebody's attribute, or of a module.
_BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "__setattr__", "__getattribute__", "import_module"}


@dataclass(frozen=True, order=True)
class Use:
    """One use: the line, the private name, and the code as it stands there."""

    line: int
    name: str
    code: str


def uses_of_private_names(source: str) -> list[Use]:
    """What a module takes from others and is private there, by line."""
    tree = ast.parse(source)
    own, imported = own_names(tree), _imported(tree)
    found = {use for node in ast.walk(tree) for use in _uses(node, own, imported)}
    return sorted(found | set(_overrides(tree)))


def is_private(name: str) -> bool:
    """A name with one underscore before it, or one that says "internal"."""
    return (name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED) or "internal_" in name


def is_private_module(path: str) -> bool:
    """A module that its library does not promise: with an underscore, Keras' `src`, what is internal or generated."""
    parts = path.split(".")
    hidden = [part for part in parts if part.startswith("_") and not part.startswith("__")]
    return bool(
        hidden or {"internal", "generated"} & set(parts) or parts[:2] in (["keras", "src"], ["keras_hub", "src"])
    )


def own_names(tree: ast.AST) -> set[str]:
    """Private names that a module itself defines: functions, classes, their attributes, and what it sets on `self`."""
    own = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        if isinstance(node, ast.Module | ast.ClassDef):
            own |= {name.id for member in node.body for name in _assigned(member)}
        elif (
            isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_name(node.value, "self", "cls")
        ):
            own.add(node.attr)
        elif isinstance(node, ast.Call) and _called(node) == "__setattr__" and _is_name(node.args[0], "self"):
            own.add(_text(node.args[1]))
    return own


def _assigned(statement: ast.stmt) -> list[ast.Name]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [target for target in targets if isinstance(target, ast.Name)]


def _imported(tree: ast.AST) -> set[str]:
    """Names that stand for what was imported."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {(alias.asname or alias.name).partition(".")[0] for node in nodes for alias in node.names}


def _uses(node: ast.AST, own: set[str], imported: set[str]) -> Iterator[Use]:
    if isinstance(node, ast.Attribute) and is_private(node.attr):
        if node.attr not in own or _is_name(node.value, *imported):
            yield Use(node.lineno, node.attr, ast.unparse(node))
    elif isinstance(node, ast.Import):
        for alias in node.names:
            if is_private_module(alias.name):
                yield Use(node.lineno, alias.name, ast.unparse(node))
    elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
        for alias in node.names:
            hidden = is_private(alias.name) or is_private_module(node.module or "")
            if hidden or is_private_module(f"{node.module}.{alias.name}"):
                yield Use(node.lineno, alias.name, ast.unparse(node))
    elif isinstance(node, ast.Call) and _called(node) in _BY_NAME:
        for argument in node.args:
            name = _text(argument)
            if (is_private(name) and name not in own) or ("." in name and is_private_module(name)):
                yield Use(node.lineno, name, ast.unparse(node))


def _overrides(tree: ast.AST) -> Iterator[Use]:
    """Private methods of derived classes that nobody in the module calls, or that call the base's: it is not ours."""
    asked = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    methods = {
        (one.name, member.name): member for one in classes for member in one.body if hasattr(member, "decorator_list")
    }
    for (owner, name), method in methods.items():
        derived = any(one.name == owner and one.bases for one in classes)
        elsewhere = any(other == name and one != owner for one, other in methods)
        if derived and is_private(name) and not elsewhere and (name not in asked or _asks_super(method)):
            yield Use(method.lineno, name, f"class {owner}: def {name}")


def _asks_super(method: ast.AST) -> bool:
    return any(
        isinstance(node, ast.Attribute) and node.attr == method.name and ast.unparse(node.value) == "super()"
        for node in ast.walk(method)
    )


def _is_name(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _text(node: ast.AST) -> str:
    """A string, or the first words of a formatted one."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def names_in(source: str) -> set[str]:
    """Every private name of others that a module uses, those in its strings too."""
    tree = ast.parse(source)
    own, imported = own_names(tree), _imported(tree)
    used = {use.name for node in ast.walk(tree) for use in _uses(node, own, imported)} | {
        u.name for u in _overrides(tree)
    }
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return used | {text for text in strings if text.isidentifier() and is_private(text)}
