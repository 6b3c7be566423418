"""Build configuration sections from the signatures of the functions that receive them; arguments are declared once.

A section is a pydantic model that refuses unknown keys and converts no types: "16" is not a number, 1 is not true.
"""

import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Union

from pydantic import BaseModel, ConfigDict, Tag, ValidationError, create_model

from kithara_ray.yaml_file import Where

_PLAIN = (int, float, str, bool, type(None), dict, list)


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    __left_out__: ClassVar[dict[str, str]] = {}  # arguments that YAML cannot express -> reason

    def given(self) -> dict[str, Any]:
        """The keys in the file, without defaults, which remain those of the Python functions."""
        return {name: getattr(self, name) for name in self.model_fields_set}


def section_of(
    name: str,
    function: Callable,
    left_out: Mapping[str, str],
    given_types: Mapping[str, Any] | None = None,
    nested: Mapping[type, type[Section]] | None = None,
    **more: tuple[Any, Any],
) -> type[Section]:
    """Build the section for the arguments of a function or class.

    Args:
        left_out: arguments that YAML cannot express -> reason. Arguments of an inexpressible type are left out too.
        given_types: types of arguments whose annotation is narrower or wider than YAML allows.
        nested: sections of classes that appear in annotations.
        more: further keys of the section, as pydantic's create_model takes them.
    """
    parameters = inspect.signature(function).parameters
    fields: dict[str, Any] = dict(more)
    unsaid = dict(left_out)
    for parameter in parameters.values():
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if not is_named or parameter.name in ("self", "cls") or parameter.name in left_out:
            continue
        kind = (given_types or {}).get(parameter.name) or _yaml_type(parameter.annotation, nested or {})
        if kind is None:
            unsaid[parameter.name] = "it takes a Python object; write a script for it"
            continue
        fields[parameter.name] = (kind, ... if parameter.default is parameter.empty else parameter.default)
    section = create_model(name, __base__=Section, **fields)
    section.__left_out__ = unsaid
    return section


def _yaml_type(hint: Any, nested: Mapping[type, type[Section]]) -> Any:
    """The type in YAML for an annotation; None if YAML can express no value of it."""
    if hint in nested:
        return nested[hint]
    if hint in _PLAIN:
        return hint
    if hint is Path:
        return str
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return hint
    if origin in (Union, types.UnionType):
        # In `Callable | str`, YAML can express the text.
        members = [member for member in (_yaml_type(argument, nested) for argument in arguments) if member is not None]
        return Union[tuple(members)] if set(members) - {type(None)} else None  # noqa: UP007 - made at run time
    inner = [_yaml_type(argument, nested) for argument in arguments if argument is not Ellipsis]
    if not inner or None in inner:
        return None
    if origin in (dict, Mapping):
        return dict[inner[0], inner[1]]
    if origin in (list, tuple, Sequence):
        return list[Union[tuple(inner)]]  # noqa: UP007
    return None


def told(
    error: ValidationError, root: type[Section], raw: Any, name: str, lines: Mapping[Where, int] | None = None
) -> list[str]:
    """Return a line for each fault: file, line, key, value found, remedy."""
    lines, messages = lines or {}, []
    for problem in error.errors(include_url=False):
        place = _place(problem, raw)
        line = lines.get(place) or lines.get(place[:-1])
        where = f"{name}:{line}" if line else name
        message = f"{where}: {'.'.join(map(str, place)) or 'it'}: {_problem(problem, place, root)}"
        if message not in messages:
            messages.append(message)
    return messages


def _place(problem: Mapping[str, Any], raw: Any) -> Where:
    """The part of pydantic's location that is in the file, without the names of union members."""
    place: Where = ()
    for part in problem["loc"]:
        if (isinstance(raw, dict) and part in raw) or (isinstance(raw, list) and isinstance(part, int)):
            place, raw = (*place, part), raw[part]
    if problem["type"] == "missing":
        place = (*place, problem["loc"][-1])
    return place


def _problem(problem: Mapping[str, Any], place: Where, root: type[Section]) -> str:
    kind, found = problem["type"], repr(problem["input"])
    if kind == "extra_forbidden":
        return _unknown_key(str(place[-1]), _section_of(problem["loc"][:-1], root))
    if kind == "missing":
        return "is missing"
    if kind == "union_tag_not_found":
        return f"{problem['ctx']['discriminator']} is missing"
    if kind == "union_tag_invalid":
        return f"type must be one of {problem['ctx']['expected_tags']}, got {problem['ctx']['tag']!r}"
    message = re.sub("a valid dictionary or instance of .*", "a section of keys", problem["msg"].removeprefix("Input "))
    return f"{message}, got {found if len(found) <= 60 else found[:57] + '...'}"


def _unknown_key(key: str, section: Any) -> str:
    reason = getattr(section, "__left_out__", {}).get(key)
    if reason:
        return f"cannot be given in YAML here: {reason}"
    names = list(section.model_fields)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return "no such key; " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}")


def _section_of(loc: tuple, section: Any) -> Any:
    """The section at pydantic's location, which names a union member by its tag."""
    for part in loc:
        if isinstance(part, int):
            continue
        if isinstance(section, list):
            section = next(member for tag, member in section if tag == part)
        else:
            members = list(_members(section.model_fields[part].annotation))
            section = members[0][1] if len(members) == 1 else members
    return section


def _members(annotation: Any, tag: str | None = None):
    """Yield (tag, section) for the sections in an annotation."""
    tag = next((data.tag for data in getattr(annotation, "__metadata__", ()) if isinstance(data, Tag)), tag)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield tag, annotation
    for argument in typing.get_args(annotation):
        if not isinstance(argument, Tag):
            yield from _members(argument, tag)
