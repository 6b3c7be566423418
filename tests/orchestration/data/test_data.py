"""Rows from wherever they come to tokens in the object store: the same from every source, bad ones named by place."""

import json
import logging
import re
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray
import tiny

from kithara_ray import Dataloader, SFTDataset, TextCompletionDataset, mix
from kithara_ray.errors import ConfigError, DataError
from kithara_ray.orchestration.data import pipeline, sources
from kithara_ray.orchestration.data.pipeline import tokenize
from kithara_ray.orchestration.data.token_rows import Rows

ROWS = tiny.rows(50)


@pytest.fixture(scope="module")
def directory(tiny_models):
    return str(tiny_models["llama"])


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Rows are tokenised in tasks, however few they are; yields what decides it otherwise."""
    decides = sources.few
    monkeypatch.setattr(sources, "few", lambda works: ([], works))
    return decides


def jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SOURCES = {
    "a list": lambda tmp: ROWS,
    "pandas": lambda tmp: pd.DataFrame(ROWS),
    "Arrow": lambda tmp: pa.Table.from_pylist(ROWS),
    "Hugging Face": lambda tmp: datasets.Dataset.from_list([ROWS[0], *ROWS]).select(range(1, 51)),
    "Ray Data": lambda tmp: ray.data.from_items(ROWS, override_num_blocks=7),
    "Ray Data of pandas": lambda tmp: ray.data.from_pandas([pd.DataFrame(ROWS[:20]), pd.DataFrame(ROWS[20:])]),
    "a path": lambda tmp: jsonl(tmp / "a.jsonl"),
    "a URL": lambda tmp: f"file://{jsonl(tmp / 'a.jsonl')}",
    "paths": lambda tmp: [str(jsonl(tmp / "a.jsonl", ROWS[:30])), str(jsonl(tmp / "b.jsonl", ROWS[30:]))],
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_tokens_in_the_same_order(cluster, directory, tmp_path, kind, monkeypatch, few):
    monkeypatch.setattr("kithara_ray.sft.rows.files.PIECE_BYTES", 700)
    monkeypatch.setattr("kithara_ray.orchestration.data.sources._SLICE_ROWS", 20)
    monkeypatch.setattr("kithara_ray.orchestration.data.sources._SLICE_BYTES", 400)
    dataset = SFTDataset(SOURCES[kind](tmp_path), tokenizer_handle=directory, max_seq_len=64)
    store = tokenize(dataset)
    expected = dataset.row_tokenizer()(ROWS, 0)
    blocks = ray.get(list(store.blocks))
    assert np.concatenate([block.token_ids for block in blocks]).tolist() == expected.token_ids.tolist()
    assert store.lengths.tolist() == expected.lengths.tolist()
    assert store.trained.tolist() == [row.loss_mask.sum() for row in expected.rows()]
    assert store.starts.tolist() == np.cumsum([0] + [len(block) for block in blocks]).tolist()
    assert len(blocks) > 1
    monkeypatch.setattr(sources, "few", few)
    monkeypatch.setattr(pipeline, "Tasks", None)
    here = tokenize(dataset)
    assert (here.content, here.counts, here.told) == (store.content, store.counts, store.told)
    assert here.lengths.tolist() == store.lengths.tolist()


def conversations(tmp):
    rows = [
        {"messages": [{"role": "user", "content": "what is 1 + 2 ?"}, {"role": "assistant", "content": "three"}]},
        {"messages": [{"role": "user", "content": "1 ?", "name": "a"}, {"role": "assistant", "content": None,
         "tool_calls": [{"function": {"name": "add", "arguments": {"x": 1}}}]}], "tools": [{"name": "add"}]},
    ]  # fmt: skip
    return {"a list": rows, "Ray Data": ray.data.from_items(rows), "a path": str(jsonl(tmp / "c.jsonl", rows))}


def test_conversations_are_the_same_from_every_source(cluster, directory, tmp_path):
    template = (
        "{{ tools | tojson if tools }}{% for m in messages %}<|im_start|>{{ m | tojson }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    contents = {}
    for kind, source in conversations(tmp_path).items():
        dataset = SFTDataset(source, tokenizer_handle=directory, max_seq_len=1024, chat_template=template)
        blocks = ray.get(list(tokenize(dataset).blocks))
        contents[kind] = np.concatenate([block.token_ids for block in blocks]).tolist()
    assert contents["a list"] == contents["Ray Data"] == contents["a path"]


BAD = {
    "torn JSONL": (
        "a.jsonl",
        b'{"prompt": "a", "answer": "b"}\n\n{"prompt": "c", "ans',
        r"line 3 of .*a\.jsonl: is not",
    ),
    "bad UTF-8": ("a.jsonl", b'{"prompt": "a", "answer": "\xff"}\n', r"line 1 of .*a\.jsonl: is not valid UTF-8"),
    "a null": ("a.jsonl", b'\n{"prompt": "a", "answer": null}\n', r"line 2 of .*a\.jsonl: column 'answer' is null"),
    "no column": ("a.csv", b"question,answer\na,b\n", r"line 2 of .*a\.csv: no column 'prompt', found 'question'"),
    "a wrong type": ("a.json", b'[{"prompt": "a", "answer": 3}]', r"row 0 of .*a\.json: column 'answer' is int"),
    "bad UTF-8 in CSV": ("a.csv", b"prompt,answer\na,\xff\n", r"line 2 of .*a\.csv: column 'answer' is not valid"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_by_file_and_line(cluster, directory, tmp_path, case):
    name, data, text = BAD[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=text):
        tokenize(SFTDataset(tmp_path / name, tokenizer_handle=directory))


@pytest.mark.parametrize("local", [True, False])
def test_lines_are_counted_over_pieces_and_bad_ones_skipped(cluster, directory, tmp_path, monkeypatch, caplog, local):
    monkeypatch.setattr("kithara_ray.sft.rows.files.PIECE_BYTES", 700)
    monkeypatch.setattr("kithara_ray.sft.rows.files.is_local", lambda url: local)
    path = jsonl(tmp_path / "a.jsonl")
    lines = path.read_text().splitlines()
    lines[37] = lines[37][:-9]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"line 38 of .*a\.jsonl: is not JSON: .*; drop it or pass on_bad_row="):
        tokenize(SFTDataset(path, tokenizer_handle=directory))
    with caplog.at_level(logging.WARNING):
        store = tokenize(SFTDataset(path, tokenizer_handle=directory, on_bad_row="skip"))
    assert (store.num_rows, store.counts["skipped_bad"]) == (49, 1)
    assert re.search(r"of 50 rows 1 were skipped as bad; for example: line 38 of .*a\.jsonl", caplog.text)


def test_a_torn_row_group_is_named_or_skipped_with_all_its_rows(cluster, directory, tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    monkeypatch.setattr("kithara_ray.sft.rows.files.PIECE_BYTES", 1)

    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=20, compression="zstd")
    data = bytearray(path.read_bytes())
    data[4:60] = b"\0" * 56
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"a\.parquet, row group 0: cannot be read"):
        tokenize(SFTDataset(path, tokenizer_handle=directory))
    store = tokenize(SFTDataset(path, tokenizer_handle=directory, on_bad_row="skip"))
    assert (store.num_rows, store.counts["skipped_bad"]) == (30, 20)


def test_a_tokenizer_that_is_not_the_models(cluster, directory):
    with pytest.raises(DataError, match=r"row 0: token .* beyond the model's vocabulary of 40"):
        tokenize(SFTDataset(ROWS, tokenizer_handle=directory), vocabulary=40)


def test_few_blocks_are_kept_mapped(cluster, directory, monkeypatch):
    monkeypatch.setattr("kithara_ray.orchestration.data.sources._SLICE_ROWS", 10)
    dataset = SFTDataset(ROWS, tokenizer_handle=directory)
    rows = Rows(tokenize(dataset), kept_bytes=1)
    for number, expected in reversed(list(enumerate(dataset.row_tokenizer()(ROWS, 0).rows()))):
        assert rows.row(number).token_ids.tolist() == expected.token_ids.tolist()
        assert len(rows._blocks) == 1


# --- mixtures --------------------------------------------------------------------------------------------------------


def test_a_mixture_is_its_datasets_with_their_shares(cluster, directory):
    first = SFTDataset(ROWS[:40], tokenizer_handle=directory)
    second = TextCompletionDataset([{"text": "the sum of two"}] * 10, tokenizer_handle=directory)
    for epoch, draws in (("all", (40, 13)), ("first", (30, 10))):
        mixed = mix([(first, 3), (second, 1)], epoch=epoch)
        store = tokenize(mixed)
        assert [(part.start, part.stop, part.draws) for part in store.parts] == [
            (0, 40, draws[0]),
            (40, 50, draws[1]),
        ]
    assert store.lengths.tolist() == [*tokenize(first).lengths, *tokenize(second).lengths]
    assert store.starts[-1] == 50
    assert Dataloader(mixed.to_packed_dataset(), 1).packing
    bad = SFTDataset([{"prompt": "a", "answer": None}], tokenizer_handle=directory)
    with pytest.raises(DataError, match="row 0 of dataset 1 of the mixture: column 'answer' is null"):
        tokenize(mix([(first, 1), (bad, 1)]))


def test_mixtures_that_make_no_sense(directory, tiny_models):
    dataset = SFTDataset(ROWS, tokenizer_handle=directory)
    with pytest.raises(ConfigError, match="weight of dataset 0 must be > 0, got 0"):
        mix([(dataset, 0)])
    with pytest.raises(ConfigError, match=r"mix takes a list of \(dataset, weight\)"):
        mix([dataset])
    with pytest.raises(ConfigError, match="dataset 1 is list, not an SFTDataset"):
        mix([(dataset, 1), (ROWS, 1)])
    with pytest.raises(ConfigError, match="dataset 1 has a different tokenizer"):
        mix([(dataset, 1), (SFTDataset(ROWS, tokenizer_handle=str(tiny_models["gemma2"])), 1)])
    with pytest.raises(ConfigError, match="epoch must be 'all' or 'first', got 'last'"):
        mix([(dataset, 1)], epoch="last")


HELD = datasets.Dataset.from_list(ROWS)


def test_what_is_no_source(cluster, directory):
    for source, text in (
        (3, "a dataset cannot be made of int; give a path"),
        ([], "the list of rows has no element"),
        (datasets.DatasetDict(train=HELD, test=HELD), r"several splits, 'train', 'test'; choose one: split='train'"),
    ):
        with pytest.raises(DataError, match=text):
            tokenize(SFTDataset(source, tokenizer_handle=directory))


def test_a_preview_shows_rows_and_counts_all(cluster, directory):
    dataset = SFTDataset([*ROWS, {"prompt": "a", "answer": None}], tokenizer_handle=directory, on_bad_row="skip")
    shown = dataset.preview(2)
    assert [row[-1][0] for row in shown.rows] == [f"{row['answer']}<|im_end|>" for row in ROWS[:2]]
    assert shown.tokens_per_epoch == tokenize(dataset).lengths.sum()
    assert shown.counts["skipped_bad"] == 1
    mixed = mix([(dataset, 1), (dataset, 2)])
    assert mixed.preview(1).tokens_per_epoch == 2 * shown.tokens_per_epoch


def test_the_command_shows_a_preview(cluster, directory, tmp_path, capsys):
    from kithara_ray.cli.app import main

    (tmp_path / "run.yaml").write_text(
        f"model: {{preset_handle: {directory}, lora_rank: 4}}\n"
        f"train_dataloader:\n  dataset: {{type: SFTDataset, source: [{jsonl(tmp_path / 'a.jsonl')}]}}\n"
        "  per_device_batch_size: 1\noptimizer: {name: AdamW, learning_rate: 1e-3}\n"
    )
    assert main(["data", "preview", str(tmp_path / "run.yaml"), "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert "row 0" in out
    assert "row 1" not in out
    assert f"{tokenize(SFTDataset(ROWS, tokenizer_handle=directory)).lengths.sum():,}, of which" in out


def test_the_documents_snippets_run(cluster, directory, tmp_path, monkeypatch, capsys):
    jsonl(tmp_path / "train.jsonl")
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        jsonl(tmp_path / "data" / f"{split}.jsonl")
    monkeypatch.chdir(tmp_path)
    document = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    assert len(snippets) == 6
    exec("\n".join(snippets), {"tokenizer": directory})
    assert "«" in capsys.readouterr().out
