"""Weight files of an export apart from each other: bases that stay on a store, other shard sizes, what is refused."""

import json
import pickle
from collections import namedtuple

import fsspec
import ml_dtypes
import numpy as np
import pytest

from kithara_ray.errors import CheckpointError, ConfigError, DestinationError, ExportError
from kithara_ray.hf import safetensors_file
from kithara_ray.hf.adapter import Adapter, LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports import part as part_module
from kithara_ray.hf.exports.export import Layout, export
from kithara_ray.hf.exports.part import files_of, parse_size, parts_of, write_part
from kithara_ray.hf.fetch import read_header_bytes
from kithara_ray.storage import urls

MODULES = [f"layers.{number}.{leaf}" for number in range(3) for leaf in ("q_proj", "up_proj")]


@pytest.fixture
def directory(tmp_path):
    """One weight file of six matrices of 2 KiB and a norm, and what stands beside it."""
    rng = np.random.default_rng(0)
    arrays = {f"{module}.weight": rng.normal(size=(64, 16)).astype(ml_dtypes.bfloat16) for module in MODULES}
    arrays["norm.weight"] = rng.normal(size=16).astype(ml_dtypes.bfloat16)
    (tmp_path / "base").mkdir()
    safetensors_file.write_arrays(tmp_path / "base/model.safetensors", arrays, {"format": "pt"})
    (tmp_path / "base/config.json").write_text("{}")
    return tmp_path / "base"


@pytest.fixture
def adapter():
    rng, tensors = np.random.default_rng(1), {}
    for module in MODULES:
        if "q_proj" in module:
            tensors[f"{module}.lora_A.weight"] = rng.normal(size=(4, 16)).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = rng.normal(size=(64, 4)).astype(np.float32)
    return Adapter(LoraConfig(r=4, target_modules=("q_proj",)), tensors)


@pytest.fixture
def memory(directory, tmp_path, monkeypatch):
    """The base at memory://models/m."""
    monkeypatch.setenv(urls.CACHE_VARIABLE, str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    for path in directory.iterdir():
        fs.put_file(str(path), f"/models/m/{path.name}")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def _tensors(directory) -> dict[str, bytes]:
    base = BaseCheckpoint.open(directory)
    return {name: base.view(name).tobytes() for name in base.names}


def test_a_base_on_a_store_stays_there(memory, directory, adapter, tmp_path, monkeypatch):
    """Merging from memory:// gives the same file as from a local copy; weights pass through a part's scratch."""
    export(BaseCheckpoint.open(directory), adapter, str(tmp_path / "local"), Layout.MERGED, base_name="n")
    base = BaseCheckpoint.at("memory://models/m")
    assert base.source == "memory://models/m"
    (part,) = parts_of(base, adapter, "memory://out/x", "auto", files_of(base))
    assert part.runs_anywhere
    assert len(pickle.dumps(part)) < 20_000
    export(base, adapter, "memory://out/m", Layout.MERGED, base_name="n")
    assert memory.cat("/out/m/model.safetensors") == (tmp_path / "local/model.safetensors").read_bytes()
    ours, theirs = (json.loads(raw) for raw in (
        memory.cat("/out/m/export_report.json"), (tmp_path / "local/export_report.json").read_bytes())
    )  # fmt: skip
    assert ours["base"] == theirs["base"]


def test_only_the_needed_ranges_are_read(memory, directory, adapter, monkeypatch):
    """A new weight file of a third of the tensors reads a third of the base's file, and its header."""
    base, read = BaseCheckpoint.at("memory://models/m"), []
    original = type(memory).cat_file

    def counted(self, path, start=None, end=None, **kwargs):
        data = original(self, path, start=start, end=end, **kwargs)
        read.append(len(data))
        return data

    monkeypatch.setattr(type(memory), "cat_file", counted)
    monkeypatch.setattr(type(memory), "get_file", None)
    files = files_of(base, max_shard_bytes=4200)
    assert len(set(files.values())) == 3
    for part in parts_of(base, adapter, "memory://out/x", "auto", files):
        read.clear()
        write_part(part)
        header_bytes = read_header_bytes(directory / "model.safetensors")
        assert sum(read) - header_bytes == part.out_bytes


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("where", ["local", "memory"])
def test_max_shard_size(memory, directory, adapter, tmp_path, dtype, where):
    """The same tensors in other files, with an index that transformers' and our reader take; and back into one."""
    base = BaseCheckpoint.open(directory) if where == "local" else BaseCheckpoint.at("memory://models/m")
    whole, cut, joined = tmp_path / "whole", tmp_path / "cut", tmp_path / "joined"
    export(base, adapter, str(whole), Layout.MERGED, dtype=dtype, base_name="n")
    export(base, adapter, str(cut), Layout.MERGED, dtype=dtype, base_name="n", max_shard_size="4.2KB")
    size = 4 if dtype == "float32" else 2
    names = sorted(path.name for path in cut.glob("*.safetensors"))
    count = 6 if dtype == "float32" else 3  # 4 KiB or 2 KiB a matrix; the norm fits beside one
    assert names == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert _tensors(cut) == _tensors(whole)
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == (6 * 64 * 16 + 16) * size
    export(BaseCheckpoint.open(cut), adapter, str(joined), Layout.SEPARATE, base_name="n", max_shard_size=10**6)
    assert {path.name for path in joined.glob("model*")} == {"model.safetensors"}
    assert _tensors(joined) == _tensors(cut)


@pytest.mark.parametrize(("size", "expected"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), (7, 7), ("200kb", 200_000)])
def test_parse_size(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "5 parsecs", "-1GB", 0, "0.1"])
def test_sizes_that_are_none(size):
    with pytest.raises(ConfigError, match=r'max_shard_size must be bytes or text like "5GB"'):
        parse_size(size)


def test_a_base_that_changed_meanwhile_is_refused(memory, directory, adapter):
    base = BaseCheckpoint.at("memory://models/m")
    raw = bytearray(memory.cat("/models/m/model.safetensors"))
    raw[raw.index(b"norm.weight")] = ord("N")
    memory.pipe("/models/m/model.safetensors", bytes(raw))
    with pytest.raises(CheckpointError, match=r"its header has changed .norm.weight.; start the export again"):
        export(base, adapter, "memory://out/m", Layout.MERGED, base_name="n")
    memory.rm("/models/m/model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors: not found .*was the base changed"):
        export(base, adapter, "memory://out/m", Layout.MERGED, base_name="n")
    assert memory.find("/out") == []


def test_a_full_disk_is_said_before_anything_is_fetched(memory, adapter, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(part_module.shutil, "disk_usage", lambda path: usage(1 << 20))
    with pytest.raises(ExportError, match=r"model.safetensors: [\d,]+ bytes of temporary files are needed .* TMPDIR"):
        export(BaseCheckpoint.at("memory://models/m"), adapter, "memory://out/m", Layout.MERGED, base_name="n")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_check_finite(directory, adapter, tmp_path, value):
    path = directory / "model.safetensors"
    info = safetensors_file.read_header(path)[0]["layers.1.up_proj.weight"]
    raw = bytearray(path.read_bytes())
    raw[info.offset + 33 * 32 : info.offset + 33 * 32 + 2] = np.array([value], ml_dtypes.bfloat16).tobytes()
    path.write_bytes(raw)
    base = BaseCheckpoint.open(directory)
    export(base, adapter, str(tmp_path / "taken"), Layout.MERGED, base_name="n")  # the base's own: copied as it is
    with pytest.raises(ExportError, match=r"layers.1.up_proj.weight: row 33 of the written tensor holds a NaN"):
        export(base, adapter, str(tmp_path / "out"), Layout.MERGED, base_name="n", check_finite=True)
    assert not (tmp_path / "out").exists()


# --- going on from what a failed export left


def _failing_at(number: int, seen: list[str]):
    def write(parts):
        for count, part in enumerate(parts):
            if count == number:
                raise RuntimeError("the machine stopped")
            seen.append(part.name)
            yield write_part(part)

    return write


@pytest.mark.parametrize("where", ["local", "memory"])
def test_resume_keeps_what_is_proven(memory, directory, adapter, tmp_path, where):
    base = BaseCheckpoint.open(directory) if where == "local" else BaseCheckpoint.at("memory://models/m")
    url = str(tmp_path / "out") if where == "local" else "memory://out/m"
    options = {"layout": Layout.MERGED, "base_name": "n", "max_shard_size": 4200, "resume": True}
    export(base, adapter, str(tmp_path / "whole"), **options)
    seen: list[str] = []
    with pytest.raises(RuntimeError, match="the machine stopped"):
        export(base, adapter, url, write=_failing_at(2, seen), **options)
    first = list(seen)
    assert len(first) == 2
    if where == "memory":
        with pytest.raises(DestinationError, match=r"holds an unfinished export, of process .* pass resume=True"):
            export(base, adapter, url, **{**options, "resume": False})
        memory.pipe(f"/out/m/{first[0]}", b"changed meanwhile")
    else:
        left = tmp_path / ".out.staging" / first[0]
        left.write_bytes(left.read_bytes()[:-1] + b"\0")
    seen.clear()
    export(base, adapter, url, write=_failing_at(99, seen), **options)
    assert sorted(seen) == sorted({first[0], "model-00003-of-00003.safetensors"})
    for path in (tmp_path / "whole").glob("model*"):
        found = (tmp_path / "out" / path.name).read_bytes() if where == "local" else memory.cat(f"/out/m/{path.name}")
        assert found == path.read_bytes()


@pytest.mark.parametrize("where", ["local", "memory"])
def test_resume_of_something_else_starts_anew(memory, directory, adapter, tmp_path, where):
    base = BaseCheckpoint.open(directory)
    url = str(tmp_path / "out") if where == "local" else "memory://out/m"
    options = {"layout": Layout.MERGED, "base_name": "n", "max_shard_size": 4200, "resume": True}
    seen: list[str] = []
    with pytest.raises(RuntimeError):
        export(base, adapter, url, write=_failing_at(2, seen), **options)
    other = Adapter(adapter.config, {name: array * 2 for name, array in adapter.tensors.items()})
    seen.clear()
    export(base, other, url, write=_failing_at(99, seen), **options)
    assert len(seen) == 3


def test_a_writer_that_was_taken_over_publishes_nothing(memory, directory, adapter):
    """Both believed the other dead: the one that holds the marker goes on, the other ends with an error."""
    base = BaseCheckpoint.open(directory)
    options = {"layout": Layout.MERGED, "base_name": "n", "resume": True}

    def while_another_takes_over(parts):
        export(base, adapter, "memory://out/m", **options)
        memory.rm("/out/m/config.json")  # as if it had not come so far
        memory.pipe("/out/m/.kithara_ray_unfinished", b'{"writer": {"id": "other"}, "plan": "", "parts": {}}')
        for part in parts:
            yield write_part(part)

    with pytest.raises(DestinationError, match=r"taken over by process . on . since .; nothing was published"):
        export(base, adapter, "memory://out/m", write=while_another_takes_over, **options)
    assert not memory.exists("/out/m/config.json")
    assert memory.exists("/out/m/model.safetensors")


def test_two_local_writers(directory, adapter, tmp_path):
    base = BaseCheckpoint.open(directory)

    def meanwhile(parts):
        with pytest.raises(DestinationError, match="another export is being written there"):
            export(base, adapter, str(tmp_path / "out"), Layout.ADAPTER, base_name="n")
        yield from map(write_part, parts)

    export(base, adapter, str(tmp_path / "out"), Layout.MERGED, base_name="n", write=meanwhile)
    assert (tmp_path / "out/config.json").exists()


def test_what_a_killed_task_has_left_is_not_published(directory, adapter, tmp_path):
    """It wrote under another name; the task that ran again put the whole file."""

    def killed_once(parts):
        for part in parts:
            (tmp_path / ".out.staging" / f".{part.name}.0123abcd").write_bytes(b"half")
            yield write_part(part)

    base = BaseCheckpoint.open(directory)
    export(base, adapter, str(tmp_path / "out"), Layout.MERGED, base_name="n", write=killed_once)
    assert not list((tmp_path / "out").glob(".*"))
    assert "model.safetensors" in json.loads((tmp_path / "out/export_report.json").read_text())["files"]
