"""Every kind of source is trained on as iterating it shows it; `tokenized_rows` shows the same without a cluster."""

import datetime
import json
import logging

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import tiny

from kithara_ray import SFTDataset, TextCompletionDataset, mix
from kithara_ray.errors import DataError
from kithara_ray.orchestration.data import sources
from kithara_ray.orchestration.data.pipeline import tokenize

TEMPLATE = (
    "{{ tools | tojson if tools }}{% for m in messages %}<|im_start|>{{ m | tojson }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def tool(name, **parameters):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": parameters}}}


def call(name, **arguments):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


ASK = {"role": "user", "content": "what is 1 + 2 ?"}
ROWS = [
    {"messages": [ASK, call("add", x="1", y=["2", "3"])], "tools": [tool("add", x={"type": "string"})]},
    {"messages": [ASK, {"role": "assistant", "content": "three"}], "tools": None},
    {"messages": [ASK, call("wait", hours="2")], "tools": [tool("wait", hours={"enum": ["1", None]})]},
]


def iterable(rows=ROWS):
    return datasets.Dataset.from_list(rows).to_iterable_dataset()


def written(tmp, name, rows=ROWS):
    path = tmp / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    return str(path)


def saved(tmp):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp / "saved")
    return str(tmp / "saved")


SOURCES = {
    "list": lambda tmp: ROWS,
    "tuple": lambda tmp: tuple(ROWS),
    "numpy within": lambda tmp: [{**row, "messages": np.array(row["messages"], object)} for row in ROWS],
    "jsonl": lambda tmp: written(tmp, "a.jsonl"),
    "json": lambda tmp: written(tmp, "a.json"),
    "parquet": lambda tmp: written(tmp, "a.parquet"),
    "arrow": lambda tmp: written(tmp, "a.arrow"),
    "save_to_disk": saved,
    "pandas": lambda tmp: pd.DataFrame(ROWS),
    "pandas of parquet": lambda tmp: pd.read_parquet(written(tmp, "a.parquet")),
    "Arrow": lambda tmp: pa.Table.from_pylist(ROWS),
    "Hugging Face": lambda tmp: datasets.Dataset.from_list(ROWS),
    "Hugging Face, JSON": lambda tmp: datasets.Dataset.from_list(ROWS, on_mixed_types="use_json"),
    "Hugging Face, as numpy": lambda tmp: datasets.Dataset.from_list(ROWS).with_format("numpy"),
    "Hugging Face, as torch": lambda tmp: datasets.Dataset.from_list(ROWS).with_format("torch"),
    "Hugging Face, transformed": lambda tmp: datasets.Dataset.from_list(ROWS).with_transform(lambda batch: batch),
    "DatasetDict": lambda tmp: datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)),
    "stream": lambda tmp: iterable(),
    "stream, mapped": lambda tmp: iterable().map(lambda row: row),
    "stream, as Arrow": lambda tmp: iterable().with_format("arrow"),
    "stream, as pandas": lambda tmp: iterable().with_format("pandas"),
    "stream, generated": lambda tmp: datasets.IterableDataset.from_generator(lambda: iter(ROWS)),
}


def dataset_of(source, directory, **options):
    return SFTDataset(source, tokenizer_handle=directory, max_seq_len=2048, chat_template=TEMPLATE, **options)


@pytest.fixture(scope="module")
def directory(tiny_models):
    return str(tiny_models["llama"])


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_is_trained_on_as_the_list_of_its_rows(directory, tmp_path, kind):
    found = list(dataset_of(SOURCES[kind](tmp_path), directory).tokenized_rows())
    expected = list(dataset_of(ROWS, directory).row_tokenizer()(ROWS, 0).rows())
    assert [row.token_ids.tolist() for row in found] == [row.token_ids.tolist() for row in expected]
    assert [row.loss_mask.tolist() for row in found] == [row.loss_mask.tolist() for row in expected]
    assert not ray.is_initialized()
    first = 1 if kind == "jsonl" else 0
    where = [row.place.split(" of ")[0] for row in found]
    assert where == [f"{'line' if kind == 'jsonl' else 'row'} {first + n}" for n in range(3)]


def test_a_few_rows_and_more(tmp_path, monkeypatch):
    """Rows are counted, or bytes of text. Nothing is known of sources that the driver has not read."""

    def few(source):
        _, rest = sources.few(sources.work(source))
        assert rest is None or len(list(rest)) == len(list(sources.work(source)))
        return rest is None

    row, path = {"prompt": "a", "answer": "b"}, tmp_path / "a.jsonl"
    assert few([row] * sources.FEW_ROWS)
    assert not few([row] * (sources.FEW_ROWS + 1))
    assert not few(pa.Table.from_pylist([row] * 5000))
    line = json.dumps(row) + "\n"
    for more, is_few in ((0, True), (1, False)):
        path.write_text(line * (sources.FEW_BYTES // len(line) + more))
        assert few(path) is is_few
    path.write_text(line)
    monkeypatch.setattr("kithara_ray.sft.rows.files.is_local", lambda url: False)
    assert not few(path)


def rows_of(source):
    """As a formatting function is given them."""
    is_stream = hasattr(source, "features") and not hasattr(source, "__len__")
    works = sources.stream(source, 2) if is_stream else (work for work, _ in sources.work(source))
    return [row for work in works for row in work.rows()]


PLAIN = [
    {"day": datetime.datetime(2026, 1, 2), "n": 1, "score": 0.5, "tags": ["a", None], "vector": [1.0, 2.0]},
    {"day": None, "n": 2, "score": None, "tags": [], "vector": [3.0, 4.0]},
]


@pytest.mark.parametrize(
    "make",
    [
        lambda: PLAIN,
        lambda: pa.Table.from_pylist(PLAIN),
        lambda: pa.Table.from_pylist(PLAIN).to_pandas(),
        lambda: pd.DataFrame(PLAIN),
        lambda: datasets.Dataset.from_list(PLAIN),
        lambda: datasets.Dataset.from_list(PLAIN).with_transform(lambda batch: {k: list(v) for k, v in batch.items()}),
        lambda: datasets.Dataset.from_list(PLAIN).to_iterable_dataset(),
        lambda: datasets.Dataset.from_list(PLAIN).to_iterable_dataset().with_format("numpy"),
    ],
    ids=["list", "Arrow", "pandas of Arrow", "pandas", "HF", "HF transform", "stream", "stream as numpy"],
)
def test_values_are_the_same_python_from_every_source(make):
    found = rows_of(make())
    assert found == PLAIN
    assert [{name: type(value) for name, value in row.items()} for row in found] == [
        {name: type(value) for name, value in row.items()} for row in PLAIN
    ]


def test_a_transform_is_what_is_trained_on_and_its_failures_are_bad_rows(directory, caplog):
    dataset = datasets.Dataset.from_list([{"prompt": "a", "answer": "SECRET"}, {"prompt": "b", "answer": "x"}])

    def blank(batch):
        if batch["answer"] == ["x"]:
            raise KeyError("no")
        return {"prompt": batch["prompt"], "answer": ["three" for _ in batch["answer"]]}

    source = dataset.with_transform(blank)
    with pytest.raises(DataError, match=r"row 1: the dataset's transform failed: KeyError: 'no'; drop it or pass"):
        list(SFTDataset(source, tokenizer_handle=directory).tokenized_rows())
    with caplog.at_level(logging.WARNING):
        (row,) = SFTDataset(source, tokenizer_handle=directory, on_bad_row="skip").tokenized_rows()
    tokenizer = SFTDataset(source, tokenizer_handle=directory).row_tokenizer().loaded()
    assert "three" in tokenizer.decode(row.token_ids.tolist())
    assert "of 2 rows 1 were skipped as bad; for example: row 1: the dataset's transform failed" in caplog.text


def test_columns_that_a_format_hides_are_not_read():
    dataset = datasets.Dataset.from_list([{"prompt": "a", "answer": "b", "other": "c"}])
    assert rows_of(dataset.with_format("numpy", columns=["prompt"])) == [{"prompt": "a"}]
    shown = dataset.with_format("numpy", columns=["prompt"], output_all_columns=True)
    assert rows_of(shown) == list(dataset)


def test_nulls_that_json_names_are_kept_and_those_of_arrow_are_not(directory):
    rows = [{"x": {"default": None, "of": [None]}}, {"x": {"y": 1}}]
    assert rows_of(rows) == rows
    assert rows_of(pa.Table.from_pylist(rows)) == [{"x": {"of": [None]}}, {"x": {"y": 1}}]
    mixed = datasets.Dataset.from_list([{"x": {"a": None}}, {"x": "text"}], on_mixed_types="use_json")
    assert rows_of(mixed) == rows_of(mixed.to_iterable_dataset()) == list(mixed) == [{"x": {"a": None}}, {"x": "text"}]


def test_a_stream_that_fails_is_named_by_the_row(directory):
    def rows():
        yield {"prompt": "a", "answer": "b"}
        raise OSError("gone")

    source = datasets.IterableDataset.from_generator(rows)
    with pytest.raises(DataError, match="row 1 of the stream: cannot be read: OSError: gone"):
        list(SFTDataset(source, tokenizer_handle=directory, on_bad_row="skip").tokenized_rows())


def test_what_is_named_twice_is_refused_in_every_table(directory):
    twice = pa.Table.from_arrays(
        [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["prompt", "answer", "answer"]
    )
    for source in (twice, pd.DataFrame([["a", "b", "c"]], columns=twice.column_names)):
        with pytest.raises(DataError, match="two columns are named 'answer'; rename or drop one of them"):
            list(SFTDataset(source, tokenizer_handle=directory, on_bad_row="skip").tokenized_rows())


# --- splits ----------------------------------------------------------------------------------------------------------


def test_a_split_of_several_is_chosen_by_name(directory):
    one, other = ([{"prompt": name, "answer": name}] for name in ("a", "b"))
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(one), test=datasets.Dataset.from_list(other))
    with pytest.raises(DataError, match="DatasetDict: has several splits, 'train', 'test'; choose one: split='train'"):
        list(SFTDataset(splits, tokenizer_handle=directory).tokenized_rows())
    assert SFTDataset(splits, tokenizer_handle=directory, split="test").source is splits["test"]
    with pytest.raises(DataError, match="has no split 'dev'; there are 'train', 'test'"):
        SFTDataset(splits, tokenizer_handle=directory, split="dev")
    streams = datasets.IterableDatasetDict({name: part.to_iterable_dataset() for name, part in splits.items()})
    assert SFTDataset(streams, tokenizer_handle=directory, split="test").is_endless
    for source in (one, pd.DataFrame(one), pa.Table.from_pylist(one), datasets.Dataset.from_list(one)):
        with pytest.raises(DataError, match="split='train' is for a directory, files or a DatasetDict"):
            SFTDataset(source, tokenizer_handle=directory, split="train")
    with pytest.raises(DataError, match="subset='en' is for a directory or hf://datasets"):
        SFTDataset(one, tokenizer_handle=directory, subset="en")


@pytest.mark.parametrize(
    "split", ["train[:10%]", "train[35%:]", "train[-3:]", "train[2:9]", "train[-50%:-20%]", "train[:]", "train[5:900]"]
)
def test_a_slice_of_a_split_is_that_of_datasets(directory, tmp_path, monkeypatch, split):
    monkeypatch.setattr("kithara_ray.sft.rows.files.PIECE_BYTES", 150)
    rows = [{"prompt": f"{n} is", "answer": f"number {n}"} for n in range(27)]
    (tmp_path / "lines").mkdir()
    for name, part in (("train-a.jsonl", rows[:11]), ("train-b.jsonl", rows[11:]), ("test.jsonl", rows[:2])):
        written(tmp_path / "lines", name, part)
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list(rows[:2]))
    both.save_to_disk(tmp_path / "saved")
    files = {"train": str(tmp_path / "lines" / "train-*.jsonl")}
    wanted = datasets.load_dataset("json", data_files=files, split=split, cache_dir=str(tmp_path / "cache"))
    all_rows = list(SFTDataset(rows, tokenizer_handle=directory).tokenized_rows())
    expected = [all_rows[rows.index(row)].token_ids.tolist() for row in wanted]
    assert expected
    for source in (tmp_path / "lines", tmp_path / "saved", both):
        found = list(SFTDataset(source, tokenizer_handle=directory, split=split).tokenized_rows())
        assert [row.token_ids.tolist() for row in found] == expected, source
    last = list(SFTDataset(tmp_path / "lines", tokenizer_handle=directory, split="train[-1:]").tokenized_rows())
    assert [row.place for row in last] == [f"line 16 of {tmp_path / 'lines' / 'train-b.jsonl'}"]


def test_slices_that_are_none(directory, tmp_path):
    path = written(tmp_path, "train.jsonl", [{"prompt": "a", "answer": "b"}] * 3)
    for split, message in {
        "train[3:]": "the slice is empty; the split has 3 rows",
        "train[50%:2]": "a bound in percent and one in rows",
        "train[3]": "is no slice of a split",
        "train+test": "has no split 'train.test'; there are 'train'; for several, make a dataset of each",
    }.items():
        with pytest.raises(DataError, match=message):
            list(SFTDataset(path, tokenizer_handle=directory, split=split).tokenized_rows())
    stream = datasets.IterableDatasetDict(train=iterable())
    with pytest.raises(DataError, match="a stream has no slices"):
        SFTDataset(stream, tokenizer_handle=directory, split="train[:2]")


@pytest.mark.parametrize("all_columns", [False, True])
def test_a_saved_dataset_shows_the_columns_of_its_format(directory, tmp_path, all_columns):
    saved = datasets.Dataset.from_list([{"prompt": "a", "answer": "b", "completion": "c"}])
    saved = saved.with_format("numpy", columns=["prompt", "completion"], output_all_columns=all_columns)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=saved).save_to_disk(tmp_path / "both")
    shown = [{name: str(value) for name, value in row.items()} for row in datasets.load_from_disk(tmp_path / "one")]
    expected = [row.token_ids.tolist() for row in SFTDataset(shown, tokenizer_handle=directory).tokenized_rows()]
    for source in (tmp_path / "one", tmp_path / "both"):
        found = SFTDataset(source, tokenizer_handle=directory).tokenized_rows()
        assert [row.token_ids.tolist() for row in found] == expected


def test_a_configuration_names_split_and_subset(directory, tmp_path):
    from kithara_ray import config as configuration

    for name in ("en/train.jsonl", "en/test.jsonl", "fr/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"prompt": name, "answer": "a"}) + "\n")
    content = {
        "model": {"preset_handle": directory, "lora_rank": 4},
        "train_dataloader": {
            "dataset": {"type": "SFTDataset", "source": str(tmp_path), "split": "test", "subset": "en"},
            "per_device_batch_size": 1,
        },
        "optimizer": {"learning_rate": 1e-3},
    }
    loaded = configuration.checked(content, "run.yaml")
    (row,) = configuration.dataloader(loaded.train_dataloader, loaded).dataset.tokenized_rows()
    assert row.place == f"line 1 of {tmp_path}/en/test.jsonl"


# --- the same as training ------------------------------------------------------------------------------------------


def test_columns_that_nothing_reads_are_named_once(directory, caplog):
    rows = [{"id": n, "prompt": "a", "answer": "b", "note": None} for n in range(5)]
    with caplog.at_level(logging.WARNING):
        list(SFTDataset(rows, tokenizer_handle=directory).tokenized_rows())
    assert caplog.text.count("unread columns: 'id';") == 1
    caplog.clear()
    formatted = SFTDataset(rows, tokenizer_handle=directory, custom_formatting_fn=lambda row: row)
    assert len(list(formatted.tokenized_rows())) == 5
    assert "nothing reads" not in caplog.text


def errors_of(function):
    with pytest.raises(DataError) as raised:
        function()
    return str(raised.value)


def test_tokenized_rows_are_those_that_are_trained_on(cluster, directory, tmp_path, monkeypatch):
    monkeypatch.setattr("kithara_ray.sft.rows.files.PIECE_BYTES", 700)
    monkeypatch.setattr("kithara_ray.orchestration.data.sources._SLICE_ROWS", 20)
    rows = [*tiny.rows(50), {"prompt": "a", "answer": None}, *tiny.rows(7)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = TextCompletionDataset([{"text": "the sum of two"}] * 3, tokenizer_handle=directory)
    for source in (rows, path, ray.data.from_items(rows, override_num_blocks=3)):
        dataset = SFTDataset(source, tokenizer_handle=directory, max_seq_len=20, on_bad_row="skip")
        for made in (dataset, mix([(dataset, 1), (text, 1)])):
            blocks = ray.get(list(tokenize(made).blocks))
            trained = [row for block in blocks for row in block.rows()]
            shown = list(made.tokenized_rows())
            assert [row.token_ids.tolist() for row in shown] == [row.token_ids.tolist() for row in trained]
            assert [row.loss_mask.tolist() for row in shown] == [row.loss_mask.tolist() for row in trained]
            assert sum(row.truncated for row in shown) == sum(block.truncated for block in blocks)
        stopping = SFTDataset(source, tokenizer_handle=directory)
        error = errors_of(lambda: list(stopping.tokenized_rows()))  # noqa: B023 - called here
        assert "column 'answer' is null" in error
        assert error == errors_of(lambda: tokenize(stopping))  # noqa: B023
    empty = SFTDataset([rows[50]], tokenizer_handle=directory, on_bad_row="skip")
    assert errors_of(lambda: list(empty.tokenized_rows())) == errors_of(lambda: tokenize(empty))


RAY = {
    "items": lambda: ray.data.from_items(ROWS),
    "items, mapped": lambda: ray.data.from_items(ROWS).map(lambda row: row),
    "pandas blocks": lambda: ray.data.from_items(ROWS).map_batches(lambda frame: frame, batch_format="pandas"),
    "pandas": lambda: ray.data.from_pandas(pd.DataFrame(ROWS)),
    "Arrow": lambda: ray.data.from_arrow(pa.Table.from_pylist(ROWS)),
    "Hugging Face": lambda: ray.data.from_huggingface(datasets.Dataset.from_list(ROWS)),
    "Hugging Face, JSON": lambda: ray.data.from_huggingface(
        datasets.Dataset.from_list(ROWS, on_mixed_types="use_json")
    ),
}


@pytest.mark.parametrize("kind", RAY)
def test_every_block_of_ray_data_is_trained_on_as_the_list_of_its_rows(cluster, directory, kind):
    expected = [row.token_ids.tolist() for row in dataset_of(ROWS, directory).tokenized_rows()]
    dataset = dataset_of(RAY[kind](), directory)
    assert [row.token_ids.tolist() for row in dataset.tokenized_rows()] == expected
    blocks = ray.get(list(tokenize(dataset).blocks))
    assert [row.token_ids.tolist() for block in blocks for row in block.rows()] == expected


def test_values_of_ray_data_are_plain(cluster):
    rows = [{"n": 1, "grid": [[1, 2], [3, 4]], "any": {"a": "x"}}, {"n": 2, "grid": [[5, 6], [7, 8]], "any": "y"}]
    source = ray.data.from_items(rows)
    found = [row for work, part in sources.work(source) for row in work.rows(ray.get(part[0]), *part[1:])]
    assert found == rows
    assert type(found[0]["grid"][0][0]) is int


def test_a_preview_names_the_columns_that_nothing_reads(cluster, directory):
    rows = [{"id": n, "prompt": "a", "answer": "b"} for n in range(5)]
    assert "nothing reads 'id'" in str(SFTDataset(rows, tokenizer_handle=directory).preview(1))


def test_the_sources_first_row_decides_the_formatting_style_for_all(cluster, directory, monkeypatch):
    """A row that the function takes in the other style only is bad, even if it is the first of its task."""
    monkeypatch.setattr("kithara_ray.orchestration.data.sources._SLICE_ROWS", 3)
    rows = [{"prompt": f"{n}", "answer": str(n)} for n in range(9)]

    def formatted(row):
        if row["prompt"] == "3":  # the first row of the second task
            raise ValueError("not as a row")
        return {name: f"row {value}" if isinstance(value, str) else value for name, value in row.items()}

    dataset = SFTDataset(rows, tokenizer_handle=directory, custom_formatting_fn=formatted, on_bad_row="skip")
    blocks = ray.get(list(tokenize(dataset).blocks))
    trained = [row.token_ids.tolist() for block in blocks for row in block.rows()]
    assert len(trained) == 8
    assert trained == [row.token_ids.tolist() for row in dataset.tokenized_rows()]
