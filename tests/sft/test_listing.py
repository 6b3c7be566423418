"""A source's files are of one split and one subset, known as `datasets` knows them; others are never read with them."""

import json
import os
import re
import subprocess
import sys

import datasets
import pyarrow as pa
import pytest
from datasets.data_files import DataFilesDict, get_data_patterns
from hub import Hub

from kithara_ray.errors import DataError
from kithara_ray.sft.rows.files import pieces
from kithara_ray.sft.rows.listing import Choice, files_of, split_of

NAMES = {
    "data/train-00000-of-00002.parquet": "train",
    "test_sft-00000-of-00001.parquet": "test_sft",
    "train.jsonl": "train",
    "my_dev.v2.jsonl.gz": "validation",
    "eval/a.jsonl": "test",
    "training_2024/part-1.csv": "train",
    "latest.jsonl": None,
    "contest/a.jsonl": None,
    "a.jsonl": None,
    "test/train.jsonl": "train",
    "train_test.jsonl": "test+train",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_split_that_a_name_speaks_of(name):
    assert split_of(name) == NAMES[name]


def write(tmp_path, names):
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n")
    return tmp_path


def texts(source, **choice):
    cut = list(pieces(source, choice=Choice(**choice)))
    return [row["text"] for piece in cut for _, row in piece.rows(piece.load())]


LAYOUTS = [
    ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
    ["train.jsonl", "validation.jsonl", "test.jsonl"],
    ["train/a.jsonl", "train/b.jsonl", "dev/a.jsonl"],
    ["my_train_file.jsonl", "my-eval.jsonl"],
]


@pytest.mark.parametrize("names", LAYOUTS, ids=lambda names: names[0])
def test_splits_are_those_that_datasets_finds(tmp_path, names):
    write(tmp_path, names)
    found = DataFilesDict.from_patterns(get_data_patterns(str(tmp_path)), base_path=str(tmp_path))
    with pytest.raises(DataError, match="has several splits") as refused:
        texts(tmp_path)
    for split, paths in found.items():
        assert repr(str(split)) in str(refused.value)
        ours = [file.url for file in files_of(str(tmp_path), Choice(str(split)))]
        assert sorted(ours) == sorted(paths)
    with pytest.raises(DataError, match="has several splits"):
        texts(f"{tmp_path}/**/*.jsonl")
    assert len(texts([tmp_path / name for name in names])) == len(names)  # named one by one, they are meant


def test_a_split_that_is_not_there_and_one_by_another_name(tmp_path):
    write(tmp_path, ["train.jsonl", "valid.jsonl"])
    with pytest.raises(DataError, match="has no split 'test'; there are 'train', 'validation'"):
        texts(tmp_path, split="test")
    assert texts(tmp_path, split="dev") == ["valid.jsonl"]
    assert texts(tmp_path / "train.jsonl", split="train") == ["train.jsonl"]
    with pytest.raises(DataError, match="has no split 'test'; there are 'train'"):
        texts(tmp_path / "train.jsonl", split="test")


def test_files_of_no_split_beside_those_of_one(tmp_path):
    write(tmp_path, ["test.jsonl", "rows.jsonl"])
    with pytest.raises(DataError, match=r"files of 'test', and files of no split, such as .*rows\.jsonl"):
        texts(tmp_path)
    assert texts(tmp_path, split="test") == ["test.jsonl"]


def test_what_is_about_rows_is_not_read_as_rows(tmp_path):
    write(tmp_path, ["a.jsonl", "dataset_info.json", "dataset_infos.json", "config.json"])
    assert texts(tmp_path) == ["a.jsonl"]


ROWS = [{"text": "a"}, {"text": "b"}]


def test_what_save_to_disk_wrote(tmp_path):
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    # `map` leaves its cache beside the data.
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"not rows")
    assert texts(tmp_path / "one") == ["a", "b"]
    with pytest.raises(DataError, match="has no split 'test'"):
        texts(tmp_path / "one", split="test")
    held_out = datasets.Dataset.from_list([{"text": "secret"}])
    datasets.DatasetDict(train=one, test=held_out).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match="has several splits, 'train', 'test'; choose one: split='train'"):
        texts(tmp_path / "both")
    assert texts(tmp_path / "both", split="test") == ["secret"]
    datasets.DatasetDict(train=one).save_to_disk(tmp_path / "alone")
    assert texts(tmp_path / "alone") == ["a", "b"]
    with pytest.raises(DataError, match="has no subset 'en'"):
        texts(tmp_path / "one", subset="en")


def test_subsets_of_the_hubs_header_and_of_directories(tmp_path):
    write(tmp_path, ["en/train-a.jsonl", "en/test-a.jsonl", "fr/x.jsonl", "fr/y.jsonl"])
    assert texts(tmp_path, subset="en", split="train") == ["en/train-a.jsonl"]
    with pytest.raises(DataError, match="has no subset 'de'; there are 'en', 'fr'"):
        texts(tmp_path, subset="de")
    header = (
        "configs:\n- config_name: two\n  data_files:\n  - {split: train, path: fr/*}\n  - {split: held, path: [en/*]}\n"
    )
    (tmp_path / "README.md").write_text(f"---\n{header}---\n# Rows\n")
    assert texts(tmp_path, split="train") == ["fr/x.jsonl", "fr/y.jsonl"]
    assert texts(tmp_path, subset="two", split="held") == ["en/test-a.jsonl", "en/train-a.jsonl"]
    more = "- {config_name: one, data_files: fr/y.jsonl}\n"
    (tmp_path / "README.md").write_text(f"---\n{header}{more}---\n")
    with pytest.raises(DataError, match="has several subsets, 'two', 'one'; choose one: subset='two'"):
        texts(tmp_path, split="train")
    assert texts(tmp_path, subset="one") == ["fr/y.jsonl"]
    (tmp_path / "README.md").write_text(f"---\n{header}{more.replace('one,', 'one, default: true,')}---\n")
    assert texts(tmp_path) == ["fr/y.jsonl"]


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    import fsspec

    def missing(url, *args, **kwargs):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match=re.escape("s3://b/a.jsonl: needs a package: pip install s3fs")):
        list(pieces("s3://b/a.jsonl"))


def test_a_compression_that_is_not_there_is_named(tmp_path):
    import fsspec

    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    if "zstd" not in fsspec.compression.available_compressions():
        with pytest.raises(DataError, match=r"a\.jsonl\.zst: needs a package: pip install zstandard"):
            texts(tmp_path / "a.jsonl.zst")
    (tmp_path / "a.csv.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.csv\.gz: cannot be read: Not a gzipped file"):
        texts(tmp_path / "a.csv.gz")
    (tmp_path / "b.jsonl.xz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"b\.jsonl\.xz: cannot be read: LZMAError"):
        texts(tmp_path / "b.jsonl.xz")


def test_a_hugging_face_parquet_file_is_read_as_the_dataset_shows_it(tmp_path):
    rows = [{"m": [{"c": "yes"}]}, {"m": [{"c": [{"type": "text"}]}]}, {"m": [{"c": {"x": None}}]}]
    dataset = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "a.parquet", tmp_path / "saved"):
        found = [row for piece in pieces(source) for _, row in piece.rows(piece.load())]
        assert found == list(dataset) == rows
    assert isinstance(dataset.with_format("arrow")[0:1], pa.Table)


ON_THE_HUB = """
import json, sys
from kithara_ray.errors import DataError
from kithara_ray.sft.rows.files import pieces
from kithara_ray.sft.rows.listing import Choice

for line in sys.stdin:
    url, choice = json.loads(line)
    try:
        cut = list(pieces(url, choice=Choice(**choice)))
        print(json.dumps([row["text"] for piece in cut for _, row in piece.rows(piece.load())]))
    except DataError as error:
        print(json.dumps(str(error)))
"""


def test_splits_and_subsets_of_datasets_on_the_hub(tmp_path):
    header = (
        b"---\nconfigs:\n- config_name: en\n  data_files:\n  - {split: train, path: en/train-*}\n"
        b"  - {split: test, path: en/test-*}\n- {config_name: fr, data_files: fr/*.jsonl}\n---\n"
    )
    named = {name: json.dumps({"text": name}).encode() for name in ("data/train-0.jsonl", "data/test-0.jsonl")}
    listed = {
        name: json.dumps({"text": name}).encode() for name in ("en/train-0.jsonl", "en/test-0.jsonl", "fr/a.jsonl")
    }
    several = "has several splits, 'test', 'train'; choose one: split='train'"
    subsets = "has several subsets, 'en', 'fr'; choose one: subset='en'"
    asked = [
        ("hf://datasets/o/named", {}, f"hf://datasets/o/named: {several}"),
        ("hf://datasets/o/named", {"split": "train"}, ["data/train-0.jsonl"]),
        ("hf://datasets/o/named@main/data", {"split": "test"}, ["data/test-0.jsonl"]),
        ("hf://datasets/o/named/data/*.jsonl", {}, f"hf://datasets/o/named/data/*.jsonl: {several}"),
        ("hf://datasets/o/named/data/train-0.jsonl", {}, ["data/train-0.jsonl"]),
        ("hf://datasets/o/listed", {}, f"hf://datasets/o/listed: {subsets}"),
        ("hf://datasets/o/listed", {"subset": "en", "split": "test"}, ["en/test-0.jsonl"]),
        ("hf://datasets/o/listed", {"subset": "fr"}, ["fr/a.jsonl"]),
        ("hf://datasets/o/none", {}, "hf://datasets/o/none: no such file; give an existing path, a URL or a dataset"),
    ]
    with Hub() as hub:
        hub.add("o/named", {"README.md": b"# Rows", **named})
        hub.add("o/listed", {"README.md": header, **listed})
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        lines = "".join(json.dumps([url, choice]) + "\n" for url, choice, _ in asked)
        command = [sys.executable, "-c", ON_THE_HUB]
        done = subprocess.run(
            command, input=lines, env=os.environ | env, capture_output=True, text=True, timeout=200, check=True
        )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [expected for *_, expected in asked]
