"""Read one YAML document safely: YAML 1.2 scalars, no tags that build objects, limits on size and expansion.

`${NAME}` in a value is the environment variable NAME, and `$${` is the text `${`. The variable is read as if its value
were written there: a number, true, or text. It cannot add keys. In quotes it stays text.

PyYAML implements YAML 1.1, in which `1e-4` is text, `no` is false, `1:30` is 90 and a date is an object. Here a plain
scalar is null, true or false, a number, or text, as in YAML 1.2's core schema.
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from kithara_ray.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_ALIASES = 100
MAX_VALUES = 20_000  # after aliases are followed

Where = tuple[str | int, ...]
_VARIABLE = re.compile(r"\$?\$\{(?:([A-Za-z_][A-Za-z0-9_]*)\})?")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


_TAG = "tag:yaml.org,2002:"
for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"^(?:{_pattern})$"), _first)


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text, base)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor(_TAG + "int", _integer)
_Loader.add_constructor(_TAG + "float", _number)


def read_yaml(path: str | Path) -> tuple[dict, dict[Where, int]]:
    """Return the mapping in a YAML file, and the line of each key, by the key's path. Raises ConfigError."""
    path = Path(path)
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give an existing YAML file") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES:,} bytes; a configuration is a page")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text at byte {error.start}; save it as UTF-8") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> tuple[dict, dict[Where, int]]:
    """As `read_yaml`, for a text; errors call it `name`."""
    try:
        _check_events(text, name)
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if not isinstance(root, yaml.MappingNode):
                raise ConfigError(f"{name}: expected sections such as 'model:', found {_what(root)}")
            _check_expansion(root, name)
            lines: dict[Where, int] = {}
            _check_keys(root, (), lines, name)
            _fill_in(root, loader, name, set())
            return loader.construct_document(root), lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from error


def parse_scalar(text: str) -> Any:
    """Parse a value from the command line as YAML: `1e-4` is a number, `[a, b]` a list. Raises ConfigError."""
    return parse_yaml(f"value: {text}", "--set")[0]["value"]


def override(raw: dict[str, Any], text: str) -> None:
    """Put `a.b=value` from the command line into the raw content. Raises ConfigError."""
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {text!r}: expected key.key=value, e.g. --set trainer.steps=10")
    put(raw, keys, parse_scalar(value), f"--set {text!r}")


def put(raw: dict[str, Any], keys: Sequence[str], value: Any, source: str) -> None:
    """Put a value into the raw content, at `keys`.

    Args:
        source: origin of the value, for messages.

    Raises:
        ConfigError: there is no such place.
    """
    place: Any = raw
    for number, name in enumerate(keys):
        key: Any = name
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                raise ConfigError(f"{source}: {'.'.join(keys[:number])} is a list of {len(place)}; give 0, 1, ...")
            key = int(key)
        elif not isinstance(place, dict):
            raise ConfigError(f"{source}: {'.'.join(keys[:number])} is a value and has no keys")
        if number == len(keys) - 1:
            place[key] = value
        elif isinstance(place, dict) and place.get(key) is None:
            place[key] = {}
        place = place[key]


def _check_events(text: str, name: str) -> None:
    """Check depth, aliases and tags before building objects. A tag (!!name) can give a value an unexpected type."""
    depth = aliases = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            depth += 1
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
        if tag := getattr(event, "tag", None):
            raise ConfigError(f"{name}:{event.start_mark.line + 1}: the tag {tag!r} is not supported; leave it out")
        if depth > MAX_DEPTH:
            raise ConfigError(f"{name}:{event.start_mark.line + 1}: nested more than {MAX_DEPTH} deep")
        if aliases > MAX_ALIASES:
            raise ConfigError(f"{name}:{event.start_mark.line + 1}: more than {MAX_ALIASES} aliases (*name)")


def _check_expansion(root: yaml.Node, name: str) -> None:
    """Refuse documents that grow too large when aliases are followed, or that contain themselves."""
    sizes: dict[int, float] = {}

    def size(node: yaml.Node) -> float:
        if isinstance(node, yaml.ScalarNode):
            return 1
        # Compare by identity: aliases share one node, and the document keeps all nodes alive until the walk ends.
        if id(node) in sizes:
            return sizes[id(node)]
        sizes[id(node)] = math.inf  # a node met again before its size is known contains itself
        children = node.value if isinstance(node, yaml.SequenceNode) else [n for pair in node.value for n in pair]
        sizes[id(node)] = 1 + sum(size(child) for child in children)
        return sizes[id(node)]

    if size(root) > MAX_VALUES:
        raise ConfigError(f"{name}: more than {MAX_VALUES:,} values once its aliases are followed")


def _check_keys(node: yaml.Node, where: Where, lines: dict[Where, int], name: str) -> None:
    """Check that keys are text and unique, and record their lines."""
    if isinstance(node, yaml.SequenceNode):
        for number, child in enumerate(node.value):
            lines[*where, number] = child.start_mark.line + 1
            _check_keys(child, (*where, number), lines, name)
        return
    if not isinstance(node, yaml.MappingNode):
        return
    for key, child in node.value:
        line = key.start_mark.line + 1
        if key.tag == _TAG + "merge":
            continue
        if not isinstance(key, yaml.ScalarNode) or key.tag != _TAG + "str":
            raise ConfigError(f"{name}:{line}: a key must be a string, found {_what(key)}; put it in quotes")
        place = (*where, key.value)
        if place in lines:
            raise ConfigError(f"{name}:{line}: {key.value!r} is given twice, first in line {lines[place]}")
        lines[place] = line
        _check_keys(child, place, lines, name)


def _fill_in(node: yaml.Node, loader: yaml.SafeLoader, name: str, seen: set[int]) -> None:
    """Replace `${NAME}` in values by environment variables."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if not isinstance(node, yaml.ScalarNode):
        for child in node.value:
            _fill_in(child if isinstance(node, yaml.SequenceNode) else child[1], loader, name, seen)
        return
    if "${" not in node.value:
        return
    line = node.start_mark.line + 1
    node.value = _VARIABLE.sub(lambda found: _variable(found, f"{name}:{line}"), node.value)
    if node.style is None and node.value:  # plain, so it may be a number now
        node.tag = loader.resolve(yaml.ScalarNode, node.value, (True, False))


def _variable(found: re.Match, where: str) -> str:
    if found.group().startswith("$$"):
        return found.group()[1:]
    variable = found.group(1)
    if variable is None:
        raise ConfigError(f"{where}: '${{' is not followed by a variable's name and '}}'; write $${{ for the text ${{")
    if variable not in os.environ:
        raise ConfigError(f"{where}: the environment variable {variable} is not set; set it, or write $${{{variable}}}")
    return os.environ[variable]


def variables_of(text: str) -> list[str]:
    """List the environment variables that a YAML text reads, in order. Raises yaml.YAMLError."""
    scalars = (event.value for event in yaml.parse(text) if isinstance(event, yaml.ScalarEvent))
    found = (match for scalar in scalars for match in _VARIABLE.finditer(scalar))
    return list(dict.fromkeys(match[1] for match in found if match[1] and not match.group().startswith("$$")))


def escaped(value: Any) -> Any:
    """Escape `${` in the texts of a JSON-like value, so that it stays the same when written as YAML and read."""
    if isinstance(value, dict):
        return {name: escaped(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [escaped(inner) for inner in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


def _what(node: yaml.Node | None) -> str:
    if node is None:
        return "nothing"
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value) if len(node.value) < 60 else "a text"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
