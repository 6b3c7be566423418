"""Values of every library become the plain Python that the library itself shows, with no null that Arrow put there."""

import datetime
import decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from kithara_ray.errors import DataError
from kithara_ray.sft.rows.columns import Columns, unread
from kithara_ray.sft.rows.values import plain, plain_row, read_json, rows_of, shape_of_feature, with_features

DAY = datetime.datetime(2026, 1, 2, 3, 4, 5)
VALUES = {
    "numpy scalar": (np.int64(3), 3),
    "numpy text": (np.str_("a"), "a"),
    "numpy bool": (np.bool_(True), True),
    "numpy array": (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    "array of objects": (np.array([{"a": np.float32(0.5)}, None], object), [{"a": 0.5}, None]),
    "a null among pandas' numbers": (np.array([1.0, np.nan]), [1.0, None]),
    "numpy time": (np.datetime64("2026-01-02T03:04:05", "ns"), DAY),
    "no numpy time": (np.datetime64("NaT"), None),
    "numpy times": (np.array(["2026-01-02T03:04:05"], "M8[ns]"), [DAY]),
    "pandas time": (pd.Timestamp(DAY), DAY),
    "pandas span": (pd.Timedelta(seconds=3), datetime.timedelta(seconds=3)),
    "no pandas time": (pd.NaT, None),
    "NA": ({"a": [pd.NA]}, {"a": [None]}),
    "tensor": (torch.tensor([[1, 2]]), [[1, 2]]),
    "Arrow scalar": (pa.scalar({"a": 1}), {"a": 1}),
    "Arrow array": (pa.array(["a", None]), ["a", None]),
    "tuple": (("a", ("b",)), ["a", ["b"]]),
    "what is plain": ({"a": [1, 0.5, None, True, b"x"]}, {"a": [1, 0.5, None, True, b"x"]}),
    "others": (decimal.Decimal("1.5"), decimal.Decimal("1.5")),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_are_plain(case):
    value, expected = VALUES[case]
    found = plain({"x": value})["x"]
    assert found == expected
    assert type(found) is type(expected)


def test_nan_is_null_as_a_column_and_itself_within():
    row = plain_row({"a": float("nan"), "b": {"c": float("nan")}, "d": np.float32("nan")})
    assert row["a"] is row["d"] is None
    assert row["b"]["c"] != row["b"]["c"]


def test_nulls_within_are_kept_or_left_out_but_not_out_of_lists():
    row = {"a": None, "b": [{"c": None, "d": [None, 1]}]}
    assert plain_row(row) == row
    assert plain_row(row, keep_nulls=False) == {"a": None, "b": [{"d": [None, 1]}]}


def test_arrow_keeps_of_each_row_its_own_keys():
    rows = [{"a": {"x": 1}}, {"a": {"y": [{"z": "t"}]}}, {"a": None}]
    assert rows_of(pa.Table.from_pylist(rows)) == rows


def test_maps_are_dicts_and_a_key_that_stands_twice_is_bad():
    kind = pa.map_(pa.string(), pa.int64())
    table = pa.table({"a": pa.array([[("x", 1), ("y", 2)], [("x", 1), ("x", 2)]], kind)})
    good, bad = rows_of(table)
    assert good == {"a": {"x": 1, "y": 2}}
    assert "has the key 'x' twice" in str(bad)


def test_one_row_that_python_cannot_hold_is_bad_alone():
    table = pa.table({"a": pa.array([0, 2**62, 1], pa.timestamp("s"))})
    first, bad, last = rows_of(table)
    assert first == {"a": datetime.datetime(1970, 1, 1)}
    assert last == {"a": datetime.datetime(1970, 1, 1, 0, 0, 1)}
    assert isinstance(bad, ValueError)
    assert "cannot be read" in str(bad)


def test_columns_of_one_name_are_refused():
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["answer", "answer"])
    with pytest.raises(DataError, match="two columns are named 'answer'"):
        rows_of(table)
    struct = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    assert isinstance(rows_of(pa.table({"a": struct}))[0], ValueError)


def test_json_is_decoded_by_type_and_by_feature():
    feature = {"m": {"feature": {"c": {"_type": "Json"}}, "_type": "List"}, "raw": {"_type": "Json", "decode": False}}
    text = pa.Table.from_pylist([{"m": [{"c": '{"x": null}'}, {"c": '"yes"'}, {"c": None}], "raw": "[1]"}])
    assert rows_of(with_features(text, feature)) == [{"m": [{"c": {"x": None}}, {"c": "yes"}, {}], "raw": "[1]"}]
    assert rows_of(text)[0]["m"][0] == {"c": '{"x": null}'}
    typed = pa.table({"a": pa.array(['{"b": [1]}', None], pa.json_())})
    assert rows_of(typed) == [{"a": {"b": [1]}}, {"a": None}]
    torn = pa.table({"a": pa.array(['{"b": [1', "2"], pa.json_())})
    assert [type(row) for row in rows_of(torn)] == [ValueError, dict]


def test_shapes_of_features_as_old_versions_write_them():
    json = {"_type": "Json"}
    assert shape_of_feature([{"a": json, "b": {"dtype": "string", "_type": "Value"}}]) == [{"a": "json"}]
    assert shape_of_feature({"feature": {"a": json}, "_type": "Sequence"}) == {"a": ["json"]}
    assert shape_of_feature({"a": {"dtype": "string", "_type": "Value"}}) is None


def test_a_key_that_stands_twice_at_any_depth():
    assert read_json('{"a": {"b": 1}, "c": {"b": 2}}') == {"a": {"b": 1}, "c": {"b": 2}}
    with pytest.raises(ValueError, match="has the key 'b' twice in one object"):
        read_json('{"a": [{"b": 1, "b": 1}]}')


def test_columns_that_nothing_reads():
    columns = Columns()
    row = columns.watched({"id": 1, "a": "x", "b": "y", "empty": None})
    assert row["a"]
    assert row.get("b")
    assert "id" in row
    assert columns.found() == (("id", False), ("a", True), ("b", True))
    assert unread([columns.found(), (("id", False), ("c", False)), (("c", True),)]) == ("id",)
