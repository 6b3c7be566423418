"""Trained weights written slice by slice, and their export; no model is computed here."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import fsspec
import ml_dtypes
import numpy as np
import pytest

from kithara_ray.errors import DestinationError, ExportError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.options import ExportOptions
from kithara_ray.hf.exports.trained import TensorSlice, checksum
from kithara_ray.hf.exports.trained_export import Receiver, export_trained
from kithara_ray.hf.fetch import fetch
from kithara_ray.hf.safetensors_file import write_arrays

EMBEDDING, QUERY, NORM = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
TRAINED = (EMBEDDING, QUERY, NORM)
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def base(tmp_path):
    """Two files; dtypes mixed; a tied head in the file all the same, and a tensor that nobody trains."""
    directory, rng = tmp_path / "base", np.random.default_rng(0)
    directory.mkdir()
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    embedding = draw(8, 6).astype(BF16)
    files = {
        "model-00001-of-00002.safetensors": {EMBEDDING: embedding, "lm_head.weight": embedding, NORM: draw(6)},
        "model-00002-of-00002.safetensors": {QUERY: draw(12, 6).astype(BF16), "model.rotary_emb.inv_freq": draw(3)},
    }
    for name, arrays in files.items():
        write_arrays(directory / name, arrays, {"format": "pt"})
    weight_map = {tensor: name for name, arrays in files.items() for tensor in arrays}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    (directory / "tokenizer.json").write_text("{}")
    return BaseCheckpoint.open(directory)


@pytest.fixture
def values():
    rng = np.random.default_rng(1)
    shapes = {EMBEDDING: (8, 6), QUERY: (12, 6), NORM: (6,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def box(values, name, shape, bounds, rank=0):
    data = np.ascontiguousarray(values[name].reshape(shape)[tuple(slice(*span) for span in bounds)])
    return TensorSlice(name, shape, bounds, data, rank, checksum(data))


def slices(values):
    """Of two ranks: rows; columns; one of two dims that the file has as one, (heads, width, in)."""
    yield box(values, EMBEDDING, (8, 6), ((0, 4), (0, 6)))
    yield box(values, EMBEDDING, (8, 6), ((4, 8), (0, 6)), rank=1)
    for width in range(3):
        for rank in range(2):
            yield box(values, QUERY, (4, 3, 6), ((0, 4), (width, width + 1), (3 * rank, 3 * rank + 3)), rank)
    yield box(values, NORM, (6,), ((0, 6),))


def receive(base, directory, parts, ranks=2):
    receiver = Receiver(base, TRAINED, "float32", str(directory))
    try:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(receiver.put, parts))
        return receiver.publish(ranks)
    finally:
        receiver.abandon()


def expected(base, values):
    return values | {"lm_head.weight": values[EMBEDDING], "model.rotary_emb.inv_freq": None}


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_slices_become_a_model_and_exports_have_the_base_s_dtypes(scheme, base, values, tmp_path, monkeypatch):
    monkeypatch.setenv("KITHARA_RAY_CACHE", str(tmp_path / "cache"))
    root = str(tmp_path) if scheme == "local" else f"memory://{tmp_path.name}"
    path = receive(base, f"{root}/run", slices(values))
    assert path == f"{root}/run/model"
    state = BaseCheckpoint.open(fetch(path))
    assert state.names == base.names
    for name, value in expected(base, values).items():
        wanted = base.view(name) if value is None else value
        assert state.tensors[name].file.name == base.tensors[name].file.name
        assert state.view(name).dtype == np.float32
        assert (state.view(name) == wanted).all(), name
    out = export_trained(base, state, f"{root}/out", ExportOptions(base_name="hf://org/name@v2"))
    export = BaseCheckpoint.open(fetch(out))
    for name, value in expected(base, values).items():
        wanted = base.view(name) if value is None else value.astype(base.tensors[name].numpy_dtype)
        assert export.view(name).dtype == wanted.dtype
        assert (export.view(name) == wanted).all(), name
    assert (export.directory / "config.json").read_bytes() == (base.directory / "config.json").read_bytes()
    report = json.loads((export.directory / "export_report.json").read_text())
    assert set(report["files"]) >= {"config.json", "tokenizer.json", *(file.name for file in base.files)}
    with fsspec.open(f"{out}/README.md", "rt") as card:
        assert "base_model: org/name" in card.read()
    half = export_trained(base, state, f"{root}/half", ExportOptions(dtype="float16", base_name=str(base.directory)))
    half = BaseCheckpoint.open(fetch(half))
    assert {info.dtype for info in half.tensors.values()} == {"F16"}
    if scheme == "memory":
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def test_a_second_run_does_not_write_over_the_first(base, values, tmp_path):
    assert receive(base, tmp_path / "run", slices(values)).endswith("/model")
    assert receive(base, tmp_path / "run", slices(values)).endswith("/model-2")


BROKEN = {
    # And so is its copy, the tied head.
    "a missing slice": (lambda parts: parts[1:], "48 elements of its tensors are missing; heard from ranks"),
    "a silent rank": (lambda parts: [p for p in parts if p.rank == 0], "are missing; nothing came from rank [1]"),
    "a slice twice": (lambda parts: [parts[0], parts[0], *parts[2:]], "came twice, from rank 0 and 0"),
    "an unknown tensor": (
        lambda parts: [*parts, TensorSlice("model.x", (1,), ((0, 1),), np.zeros(1, np.float32), 1, 0)],
        "rank 1 sent model.x, which is no tensor of this model",
    ),
    "another dtype": (
        lambda parts: [TensorSlice(NORM, (6,), ((0, 6),), np.zeros(6, BF16), 0, 0), *parts],
        "rank 0 sent bfloat16 of a tensor (6,), the file's is float32 (6,)",
    ),
    "bytes that changed on the way": (
        lambda parts: [TensorSlice(**(vars(parts[0]) | {"data": parts[0].data + 1})), *parts[1:]],
        "is not what rank 0 sent",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_whole_is_not_published(case, base, values, tmp_path):
    change, text = BROKEN[case]
    with pytest.raises(ExportError) as error:
        receive(base, tmp_path / "run", change(list(slices(values))))
    assert text in str(error.value)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_base_that_changed_since_is_noticed(base, values, tmp_path):
    state = BaseCheckpoint.open(receive(base, tmp_path / "run", slices(values)))
    shutil.copytree(base.directory, tmp_path / "other")
    file = tmp_path / "other" / base.tensors[NORM].file.name
    arrays = {name: base.view(name) for name, info in base.tensors.items() if info.file.name == file.name}
    write_arrays(file, arrays | {NORM: np.zeros(7, np.float32)}, {})
    other = BaseCheckpoint.open(tmp_path / "other")
    with pytest.raises(ExportError, match=r"model\.norm\.weight differs from the base's"):
        export_trained(other, state, str(tmp_path / "out"), ExportOptions(base_name="x"))
    assert not (tmp_path / "out").exists()


def test_a_destination_that_is_not_empty_is_left_alone(base, values, tmp_path):
    state = BaseCheckpoint.open(receive(base, tmp_path / "run", slices(values)))
    with pytest.raises(DestinationError, match="exists and is not empty"):
        export_trained(base, state, str(tmp_path / "base"), ExportOptions(base_name="x"))
