"""Normalise rows: plain Python values, the same from every kind of source.

    numpy, tensors, Arrow, pandas       Python values and lists
    NaN, NaT or NA as a column's value  None, because pandas and Arrow write a missing value in this way
    None within a struct                left out, because Arrow fills in the keys that a row lacks; pandas and Hugging
                                        Face datasets pass this on
    JSON by its type (`datasets.Json`)  the value that the text encodes

JSON files and lists of dicts keep each None inside a value, because such a row has only the keys that it names.
"""

import datetime
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from kithara_ray.errors import DataError

# The nesting of a column, where reading depends on it: JSON, MAP, {field: shape}, [shape of the items], or None.
JSON, MAP = "json", "map"
_PLAIN = (str, int, float, bool, bytes, type(None))
_METADATA = b"huggingface"


def plain(value: Any, keep_nulls: bool = True, shape: Any = None, decode: bool = False) -> Any:
    """Convert a value to plain Python.

    Args:
        keep_nulls: False leaves out struct fields that are None.
        shape: shape of the value, see `shapes_of`.
        decode: True if JSON is still text, which this function then parses.

    Raises:
        ValueError: JSON cannot be read, or a key appears twice.
    """
    if shape == JSON:
        return read_json(value) if decode and isinstance(value, str) else plain(value)
    if type(value) in _PLAIN:
        return value
    if shape == MAP and isinstance(value, list):
        return _unique((key, plain(item, keep_nulls)) for key, item in value)
    if isinstance(value, Mapping):
        inner = shape if isinstance(shape, dict) else {}
        return {
            key: plain(item, keep_nulls, inner.get(key), decode)
            for key, item in value.items()
            if keep_nulls or item is not None
        }
    if isinstance(value, (list, tuple)):
        item_shape = shape[0] if isinstance(shape, list) else None
        return [plain(item, keep_nulls, item_shape, decode) for item in value]
    return _leaf_or_array(value, keep_nulls, shape, decode)


def _leaf_or_array(value: Any, keep_nulls: bool, shape: Any, decode: bool) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.kind in "mM":  # Python's resolution: microseconds, and None for NaT
            return value.astype(f"{value.dtype.kind}8[us]").tolist()
        found = value.tolist()
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            found = _without_nan(found)
        return found if type(found) in _PLAIN else plain(found, keep_nulls, shape, decode)
    if isinstance(value, (datetime.datetime, datetime.timedelta)):
        return _python_time(value)
    if type(value).__module__.startswith("pandas.") and type(value).__name__ == "NAType":
        return None
    if isinstance(value, pa.Scalar):
        return plain(value.as_py(), keep_nulls, shape, decode)
    if isinstance(value, (pa.Array, pa.ChunkedArray)):
        return plain(value.to_pylist(), keep_nulls, shape, decode)
    if hasattr(value, "dtype") and hasattr(value, "shape"):  # a tensor
        return plain(np.asarray(value), keep_nulls)
    return value


def _without_nan(value: Any) -> Any:
    """Replace NaN in the lists of a float array by None: pandas writes a null among numbers as NaN."""
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if value != value else value


def _python_time(value: Any) -> Any:
    if value != value:  # NaT
        return None
    if hasattr(value, "to_pydatetime"):
        return value.to_pydatetime(warn=False)
    return value.to_pytimedelta() if hasattr(value, "to_pytimedelta") else value


def plain_row(row: Any, keep_nulls: bool = True, shapes: Mapping[str, Any] | None = None, decode: bool = False) -> Any:
    """Return a row as plain Python, or the ValueError in its place; the reader of rows handles anything but a dict."""
    if not isinstance(row, Mapping):
        return row
    try:
        made = {
            name: plain(value, keep_nulls, shapes.get(name) if shapes else None, decode) for name, value in row.items()
        }
    except (ValueError, OverflowError, RecursionError, pa.ArrowException) as error:
        return ValueError(f"cannot be read: {short(error)}")
    return missing_as_none(made)


def missing_as_none(row: Any) -> Any:
    """Replace NaN columns of a row by None."""
    if not isinstance(row, dict) or not any(isinstance(v, float) and v != v for v in row.values()):
        return row
    return {name: None if isinstance(value, float) and value != value else value for name, value in row.items()}


# --- JSON ------------------------------------------------------------------------------------------------------------


def read_json(text: str) -> Any:
    """Parse JSON text. Raises ValueError: it is not JSON; RepeatedKey: an object has a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


class RepeatedKey(ValueError):
    """An object has a key twice; a dict would keep only one of them."""


def _unique(pairs: Any) -> dict[str, Any]:
    pairs = list(pairs)
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedKey(f"has the key {next(n for n in names if names.count(n) > 1)!r} twice in one object")
    return made


# --- Arrow -----------------------------------------------------------------------------------------------------------


def rows_of(table: pa.Table) -> list[Any]:
    """Return an Arrow table's rows as dicts, with a ValueError in the place of an unreadable row.

    Raises:
        DataError: two columns have the same name.
    """
    check_names(table.column_names)
    shapes = shapes_of(table.schema)
    try:
        rows = table.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):  # Python cannot hold a value; find its row
        rows = list(_one_by_one(table))
    return [row if isinstance(row, Exception) else plain_row(row, False, shapes, decode=True) for row in rows]


def _one_by_one(table: pa.Table) -> Iterator[Any]:
    for number in range(len(table)):
        try:
            yield table.slice(number, 1).to_pylist()[0]
        except (ValueError, OverflowError, pa.ArrowException) as error:
            yield ValueError(f"cannot be read: {short(error)}")


def check_names(names: Any) -> None:
    """Refuse columns with the same name, because a row could hold only one of them. Raises DataError."""
    names = list(names)
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise DataError(f"two columns are named {twice[0]!r}; rename or drop one of them")


def shapes_of(schema: pa.Schema) -> dict[str, Any]:
    """The shape of each column whose type carries more than its values: JSON and maps.

    The features that `datasets` writes into a schema take precedence over Arrow's types, which some conversions lose.
    """
    features = features_of(schema)
    found = {}
    for field in schema:
        shape = shape_of_feature(features[field.name]) if field.name in features else _shape_of_type(field.type)
        if shape is not None:
            found[field.name] = shape
    return found


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """The features that `datasets` wrote into a schema's metadata; empty if there are none."""
    try:
        return dict(json.loads((schema.metadata or {})[_METADATA])["info"]["features"] or {})
    except (KeyError, TypeError, ValueError):
        return {}


def with_features(table: pa.Table, features: Mapping[str, Any]) -> pa.Table:
    """Return the table with features in its schema's metadata, as `datasets` writes them."""
    metadata = {**(table.schema.metadata or {}), _METADATA: json.dumps({"info": {"features": dict(features)}}).encode()}
    return table.replace_schema_metadata(metadata)


def shape_of_feature(feature: Any) -> Any:
    """The shape of a feature of `datasets`, as its `to_dict` writes it."""
    if isinstance(feature, list):
        return _listed(shape_of_feature(feature[0])) if feature else None
    if not isinstance(feature, Mapping):
        return None
    kind = feature.get("_type")
    if kind == "Json":
        return JSON if feature.get("decode", True) else None
    if "feature" in feature and isinstance(kind, str):
        inner = shape_of_feature(feature["feature"])
        # A legacy Sequence of a struct is a struct of lists.
        is_struct = kind == "Sequence" and isinstance(inner, dict)
        return {name: [shape] for name, shape in inner.items()} if is_struct else _listed(inner)
    if isinstance(kind, str):
        return None
    return _fields({name: shape_of_feature(inner) for name, inner in feature.items()})


def _shape_of_type(kind: pa.DataType) -> Any:
    if getattr(kind, "extension_name", None) == "arrow.json":
        return JSON
    if pa.types.is_map(kind):
        return MAP
    if pa.types.is_struct(kind):
        return _fields({kind.field(i).name: _shape_of_type(kind.field(i).type) for i in range(kind.num_fields)})
    return _listed(_shape_of_type(kind.value_type)) if hasattr(kind, "value_field") else None


def _listed(shape: Any) -> list[Any] | None:
    return None if shape is None else [shape]


def _fields(shapes: Mapping[str, Any]) -> dict[str, Any] | None:
    found = {name: shape for name, shape in shapes.items() if shape is not None}
    return found or None


def short(error: BaseException) -> str:
    """An error's text on one line of at most 200 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
