import itertools
import json
import pickle
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch

from kithara_ray.errors import CheckpointError
from kithara_ray.hf import safetensors_file
from kithara_ray.hf.checkpoint import BaseCheckpoint, sample_ranges


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_views_equal_the_safetensors_library(make_base, dtype, sharded):
    base = BaseCheckpoint.open(make_base("llama", dtype, sharded))
    assert (len(base.files) > 1) == sharded
    reference = {}
    for file in base.files:
        reference |= safetensors.torch.load_file(file)
    assert base.names == tuple(sorted(reference))
    for name, tensor in reference.items():
        view = base.view(name)
        assert view.shape == tuple(tensor.shape) == base.tensors[name].shape
        assert np.array_equal(view.astype(np.float32), tensor.float().numpy())
        assert str(view.dtype) == dtype


def test_view_is_read_only_and_copies_nothing(base):
    view = base.view("model.embed_tokens.weight")
    assert not view.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0


def test_pickles_without_its_maps(base):
    base.view("lm_head.weight")
    copy = pickle.loads(pickle.dumps(base))
    assert copy.names == base.names
    assert len(pickle.dumps(base)) < 20_000
    assert np.array_equal(copy.view("lm_head.weight"), base.view("lm_head.weight"))


def test_open_without_weights(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    base = BaseCheckpoint.open(tmp_path, weights=False)
    assert base.config == {"model_type": "llama"}
    assert not base.has_weights
    assert base.names == ()
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        BaseCheckpoint.open(tmp_path)


def test_what_is_missing_is_named(tmp_path, make_base):
    with pytest.raises(CheckpointError, match="no checkpoint directory at"):
        BaseCheckpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        BaseCheckpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected an object, found list"):
        BaseCheckpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model.bin\).*save_pretrained"):
        BaseCheckpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="no tensor 'nothing' among"):
        BaseCheckpoint.open(make_base()).view("nothing")


def test_single_and_index_together_are_refused(two_shards):
    shutil.copy(two_shards / "model-00001-of-00002.safetensors", two_shards / "model.safetensors")
    with pytest.raises(CheckpointError, match="remove the stale one"):
        BaseCheckpoint.open(two_shards)


def _entry(begin: int, end: int, dtype: str = "F32", shape: tuple = (1,)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


MALFORMED = {
    "exceeds the file": ({}, b"", 10**6),
    "is not JSON": (b"{nonsense", b"", None),
    "the header is not JSON": (b"\xff\xfe", b"", None),
    "is a list, not an object": ([], b"", None),
    "names 'x' twice": (b'{"x":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"x":{}}', b"0000", None),
    "__metadata__ must map strings": ({"__metadata__": {"a": 1}}, b"", None),
    "expected dtype, shape and data_offsets": ({"x": {"dtype": "F32"}}, b"", None),
    "dtype 'F4' is not one of": ({"x": _entry(0, 4, "F4")}, b"0000", None),
    "is not a list of non-negative integers": ({"x": _entry(0, 4, shape=(-1,))}, b"0000", None),
    "is not a pair of non-negative": ({"x": _entry(-4, 0)}, b"0000", None),
    "do not lie within the 4 data bytes": ({"x": _entry(0, 8, shape=(2,))}, b"0000", None),
    r"needs 8 bytes, data_offsets hold 4": ({"x": _entry(0, 4, shape=(2,))}, b"0000", None),
    "'y' overlaps 'x'": ({"x": _entry(0, 8, shape=(2,)), "y": _entry(4, 8)}, b"0" * 8, None),
    "4 bytes before 'x' belong to no tensor": ({"x": _entry(4, 8)}, b"0" * 8, None),
    "4 bytes at the end belong to no tensor": ({"x": _entry(0, 4)}, b"0" * 8, None),
}


@pytest.mark.parametrize("message", MALFORMED)
def test_malformed_files(write_raw, message):
    header, data, length = MALFORMED[message]
    path = write_raw(header, data, length=length)
    with pytest.raises(CheckpointError, match=message):
        safetensors_file.read_header(path)


def test_short_and_truncated_files(tmp_path, make_base):
    short = tmp_path / "short.safetensors"
    short.write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="too short"):
        safetensors_file.read_header(short)
    whole = (make_base() / "model.safetensors").read_bytes()
    short.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        safetensors_file.read_header(short)


def _edit_index(directory, edit):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    edit(index["weight_map"])
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(z=m["x"]), "tensor 'z' is not in model-00001-of-00002.safetensors"),
        (lambda m: m.update(x=m["y"]), r"tensor 'x' is not in model-00002"),
        (lambda m: m.update(z=m["x"], x=m["y"]), "tensor 'x' is in model-00001-of-00002.safetensors, not in"),
        (lambda m: m.update(z="missing.safetensors"), r"missing.safetensors is missing"),
        (lambda m: m.update(x="../secret.safetensors"), "not a .safetensors file in this directory"),
        (lambda m: m.update(x="/etc/passwd"), "not a .safetensors file in this directory"),
        (lambda m: m.update(x="weights.bin"), "not a .safetensors file in this directory"),
        (lambda m: m.update(x=3), "weight_map must map"),
    ],
)
def test_malformed_index(two_shards, edit, message):
    assert BaseCheckpoint.open(two_shards).names == ("x", "y")
    _edit_index(two_shards, edit)
    with pytest.raises(CheckpointError, match=message):
        BaseCheckpoint.open(two_shards)


def test_tensor_unknown_to_the_index_and_duplicates(two_shards):
    file = two_shards / "model-00002-of-00002.safetensors"
    ones = np.ones(3, np.float32)
    safetensors_file.write_arrays(file, {"y": ones, "w": ones}, {})
    with pytest.raises(CheckpointError, match=r"tensor 'w' of model-00002-of-00002.safetensors is not named"):
        BaseCheckpoint.open(two_shards)
    safetensors_file.write_arrays(file, {"y": ones, "x": ones}, {})
    with pytest.raises(CheckpointError, match=r"tensor 'x' is also in model-00001-of-00002.safetensors"):
        BaseCheckpoint.open(two_shards)


def test_fingerprint_is_of_the_mathematics(make_base, tmp_path):
    single = BaseCheckpoint.open(make_base("gemma2", "bfloat16")).fingerprint()
    assert single.startswith("sha256:")
    assert BaseCheckpoint.open(make_base("gemma2", "bfloat16", True)).fingerprint() == single  # re-sharded
    assert BaseCheckpoint.open(make_base("gemma2", "float16")).fingerprint() != single
    copy = tmp_path / "copy"
    shutil.copytree(make_base("gemma2", "bfloat16"), copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "use_cache": False, "transformers_version": "9"}))
    assert BaseCheckpoint.open(copy).fingerprint() == single
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert BaseCheckpoint.open(copy).fingerprint() != single
    (copy / "config.json").write_text(json.dumps(config))
    info = BaseCheckpoint.open(copy).tensors["model.norm.weight"]
    with info.file.open("r+b") as stream:
        stream.seek(info.offset)
        stream.write(b"\1")
    assert BaseCheckpoint.open(copy).fingerprint() != single


@pytest.mark.parametrize("nbytes", [0, 1, 384 * 1024, 384 * 1024 + 1, 10**9 + 7])
def test_sample_ranges_lie_within_the_tensor_without_overlap(nbytes):
    ranges = sample_ranges(nbytes)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == nbytes
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(ranges))
    assert sum(end - begin for begin, end in ranges) == min(nbytes, 384 * 1024)


def test_written_files_read_back_by_the_library(tmp_path):
    arrays = {
        "b": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3), "a": np.float32([1.5]),
        "empty": np.empty((0, 4), np.float32), "scalar": np.int64(3).reshape(()), "bytes": np.uint8([7]),
    }  # fmt: skip
    path = tmp_path / "x.safetensors"
    safetensors_file.write_arrays(path, arrays, {"format": "pt"})
    found = safetensors.torch.load_file(path)
    assert {name: tuple(t.shape) for name, t in found.items()} == {name: a.shape for name, a in arrays.items()}
    assert found["b"].float().tolist() == [[0, 1, 2], [3, 4, 5]]
    infos, metadata = safetensors_file.read_header(path)
    assert metadata == {"format": "pt"}
    for name, array in arrays.items():
        read = safetensors_file.read_array(infos[name])
        assert read.dtype == array.dtype
        assert np.array_equal(read, array)


def test_tensors_start_aligned_whatever_the_header_length(tmp_path):
    path = tmp_path / "x.safetensors"
    for length in range(1, 9):
        safetensors_file.write_arrays(path, {"n" * length: np.ones(2, np.float32), "half": np.ones(3, np.float16)}, {})
        infos = safetensors_file.read_header(path)[0].values()
        assert [info.offset % 8 for info in infos] == [0, 0]
