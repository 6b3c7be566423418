"""Files are cut into pieces that together are the file, and what cannot be read is known by file and line."""

import json
import re

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kithara_ray.errors import DataError
from kithara_ray.sft.rows.files import pieces

ROWS = [{"prompt": f"question {i}?", "answer": "answer " * (i % 7) + "ü\u2028"} for i in range(200)]


def read(source, piece_bytes=300):
    """(places, rows, number of pieces)."""
    cut = list(pieces(source, piece_bytes))
    found = [pair for piece in cut for pair in piece.rows(piece.load())]
    ids = [piece.first_id + n for piece in cut for n, _ in enumerate(piece.rows(piece.load()))]
    assert len(set(ids)) == len(ids)
    return [place for place, _ in found], [row for _, row in found], len(cut)


def write(path, rows=ROWS):
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=30)
    elif path.suffix in (".arrow", ".feather"):
        new = pa.ipc.new_stream if "stream" in path.name else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=30)
    elif path.suffix in (".csv", ".tsv"):
        pd.DataFrame(rows).to_csv(path, index=False, sep="," if path.suffix == ".csv" else "\t")
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(row["prompt"] for row in rows))
    elif "list" in path.name:
        path.write_text(json.dumps(rows, indent=1))
    else:
        lines = (json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows))
        text = "\n".join(lines) + ("" if "torn" in path.name else "\n")
        path.write_text(text, encoding="utf-8-sig" if "bom" in path.name else "utf-8")
    return path


NAMES = [
    "a.jsonl",
    "bom.jsonl",
    "torn.jsonl",
    "a.json",
    "list.json",
    "a.csv",
    "a.tsv",
    "a.parquet",
    "a.arrow",
    "stream.arrow",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("piece_bytes", [1, 97, 2000, 10**9])
def test_the_pieces_are_the_file(tmp_path, name, piece_bytes):
    _, rows, count = read(write(tmp_path / name), piece_bytes)
    assert rows == ROWS
    if name in ("a.jsonl", "a.parquet") and piece_bytes < 2000:
        assert count > 3


def test_text_is_a_row_a_line(tmp_path):
    places, rows, _ = read(write(tmp_path / "a.txt"))
    assert rows == [{"text": row["prompt"]} for row in ROWS]
    assert len(places) == 200


def test_compressed_directories_patterns_and_lists(tmp_path):
    import gzip

    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", "notes.md"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "c"}\n{"text": "d"}\n')
    names = ["a.jsonl", "b.jsonl", "c", "d"]
    assert [row["text"] for row in read(tmp_path)[1]] == names
    assert [row["text"] for row in read(f"{tmp_path}/[ab]*.jsonl")[1]] == names[:2]
    assert [row["text"] for row in read([tmp_path / "b.jsonl", tmp_path / "a.jsonl"])[1]] == ["b.jsonl", "a.jsonl"]
    assert [row["text"] for row in read(f"file://{tmp_path}/a.jsonl")[1]] == ["a.jsonl"]


def test_memory_urls():
    import fsspec

    with fsspec.open("memory://data/a.jsonl", "w") as file:
        file.write('{"text": "a"}\n')
    assert read("memory://data/a.jsonl")[1] == [{"text": "a"}]


def test_bad_lines_are_rows_of_their_own(tmp_path):
    lines = [b'{"text": "a"}', b"", b'{"text": "\xff"}', b"[1]", b"nonsense", b'{"text": "b"}', b'{"text": "torn']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    places, rows, _ = read(tmp_path / "a.jsonl", 10**9)
    assert places == [f"line {n}" for n in (1, 3, 4, 5, 6, 7)]
    assert [row for row in rows if isinstance(row, dict)] == [{"text": "a"}, {"text": "b"}]
    bad = [str(row) for row in rows if not isinstance(row, dict)]
    assert [text.split(":")[0] for text in bad] == [
        "is not valid UTF-8 at byte 10",
        "is list, not a JSON object",
        "is not JSON",
        "is not JSON",
    ]
    for start in range(1, 60, 7):  # counted from the file's start, wherever the pieces are cut
        whole = list(pieces(tmp_path / "a.jsonl", start))
        found = [int(p.split()[1]) + piece.lines_before() for piece in whole for p, _ in piece.rows(piece.load())]
        assert found == [1, 3, 4, 5, 6, 7]


def test_bad_csv(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'prompt,answer\na,b\na,b,c\n"a\nb",c\nd,\xff\n"torn')
    places, rows, _ = read(tmp_path / "a.csv")
    assert places == ["line 2", "line 3", "line 4", "line 6", "line 7"]
    assert rows[0] == {"prompt": "a", "answer": "b"}
    assert str(rows[1]) == "has 3 fields, the header has 2"
    assert rows[2] == {"prompt": "a\nb", "answer": "c"}
    assert rows[3]["answer"] == "\udcff"
    assert "is not CSV" in str(rows[4])


@pytest.mark.parametrize("bad", ['q1,"he said "hi" twice"', 'q1,"he said \\"hi\\" twice"', '"q1', "q1,a,b", "q1"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_bad_line_costs_no_row_in_silence(tmp_path, name, bad):
    rows = [f"q{i},a{i}" for i in range(100)]
    text = "\n".join(["prompt,answer", *rows[:2], bad, *rows[2:]])
    (tmp_path / name).write_text(text.replace(",", "\t") if name == "a.tsv" else text)
    places, found, _ = read(tmp_path / name)
    assert places == [f"line {n}" for n in range(2, 103)]
    assert isinstance(found[2], ValueError)
    kept = [row for row in found if isinstance(row, dict)]
    assert all(row == {"prompt": f"q{row['prompt'][1:]}", "answer": f"a{row['prompt'][1:]}"} for row in kept)
    assert len(kept) == (2 if bad == '"q1' else 100)  # a quote that is never closed: nobody knows where it ends


def test_a_row_over_several_lines_that_turns_out_bad_counts_each(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,answer\na,"b\nc,d\ne "x" f"\ng,h\n')
    places, rows, _ = read(tmp_path / "a.csv")
    assert places == ["line 2", "line 3", "line 4", "line 5"]
    assert [isinstance(row, dict) for row in rows] == [False, False, False, True]
    assert "the row goes on to line 4" in str(rows[0])


def test_a_long_field_is_a_field(tmp_path):
    import csv

    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"prompt,answer\nq,{'x' * 140_000}\n")
    assert len(read(tmp_path / "a.csv")[1][0]["answer"]) == 140_000
    assert csv.field_size_limit() == limit


def test_empty_fields_at_the_end_of_lines_are_nothing(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer,,\na,b,,\nc,d,,e\nf,g\n")
    _, rows, _ = read(tmp_path / "a.csv")
    assert rows[0] == {"prompt": "a", "answer": "b"}
    assert str(rows[1]) == "has 4 fields, the header has 2"
    assert rows[2] == {"prompt": "f", "answer": "g"}


def test_what_is_named_twice_is_not_overwritten(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"answer": "a", "answer": "b"}\n{"answer": "c"}\n')
    _, (bad, good), _ = read(tmp_path / "a.jsonl")
    assert str(bad) == "has the key 'answer' twice in one object"
    assert good == {"answer": "c"}
    (tmp_path / "a.json").write_text('[{"answer": "c"}, {"x": {"a": 1, "a": 2}}, {"answer": "d"}]')
    places, (first, bad, last), _ = read(tmp_path / "a.json")
    assert places == ["row 0", "row 1", "row 2"]
    assert (first, last) == ({"answer": "c"}, {"answer": "d"})
    assert str(bad) == "has the key 'a' twice in one object"
    (tmp_path / "a.csv").write_text("answer,answer\na,b\n")
    with pytest.raises(DataError, match=r"a\.csv: two columns are named 'answer'"):
        read(tmp_path / "a.csv")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["answer", "answer"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: two columns are named 'answer'"):
        read(tmp_path / "a.parquet")


def test_structs_lose_the_nulls_that_arrow_put_there(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f", "parameters": {"x": 1}}]},
        {"messages": [{"role": "assistant", "content": "b", "name": "c"}], "tools": [{"name": "g", "strict": True}]},
    ]
    assert read(write(tmp_path / "a.parquet", rows))[1] == rows


def corrupt(path, at):
    data = bytearray(path.read_bytes())
    data[at : at + 40] = b"\0" * 40
    path.write_bytes(bytes(data))
    return path


CORRUPT = {
    "no such file": (lambda tmp: tmp / "a.jsonl", "a.jsonl: no such file"),
    "no such directory": (lambda tmp: f"{tmp}/*.jsonl", "holds no file of a known extension"),
    "an unknown extension": (lambda tmp: tmp / "a.pdf", "unknown extension '.pdf'; known are .jsonl"),
    "an unknown protocol": (lambda tmp: "nfs4://a/b.jsonl", "nfs4://a/b.jsonl: "),
    "a parquet without its end": (
        lambda tmp: corrupt(write(tmp / "a.parquet"), -20),
        "a.parquet: cannot be read as Parquet",
    ),
    "a parquet with a torn group": (
        lambda tmp: corrupt(write(tmp / "a.parquet"), 4),
        "a.parquet, row group 0: cannot be read",
    ),
    "an arrow file without its end": (lambda tmp: corrupt(write(tmp / "a.arrow"), -30), "cannot be read as Arrow"),
    "a torn list": (lambda tmp: _torn(write(tmp / "list.json")), "list.json: is not JSON"),
}


def _torn(path):
    path.write_text(path.read_text()[:-30])
    return path


@pytest.mark.parametrize("case", CORRUPT)
def test_what_cannot_be_read_is_named(tmp_path, case):
    source, text = CORRUPT[case]
    with pytest.raises(DataError, match=re.escape(text)):
        read(source(tmp_path))
