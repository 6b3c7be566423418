"""Exports as Ray tasks on a cluster of three nodes; base and destination on an object store that is an emulator."""

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from stores import gs_emulator

from kithara_ray.errors import ExportError
from kithara_ray.hf import safetensors_file
from kithara_ray.hf.adapter import Adapter, LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.export import Layout, export
from kithara_ray.hf.exports.options import ExportOptions
from kithara_ray.hf.exports.part import write_part
from kithara_ray.orchestration.cluster.remote import head_node_id
from kithara_ray.orchestration.head import export_tasks
from kithara_ray.orchestration.head.adapters import AdapterExport, AdapterRef, ask, digest_of
from kithara_ray.orchestration.head.coordinator import start_coordinator
from kithara_ray.storage import urls

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

FILES = 4


@pytest.fixture(scope="module")
def gcs():
    """A bucket in an emulator, whose address the nodes inherit."""
    import gcsfs

    with gs_emulator() as env, pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        gcsfs.GCSFileSystem.clear_instance_cache()
        fs = gcsfs.GCSFileSystem()
        fs.mkdir("bucket")
        yield fs
        gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def nodes(gcs, no_cluster):
    """A head without CPUs, as a pod's may be, and two nodes of one CPU."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def files(gcs, tmp_path_factory):
    """A base of four weight files, local and at gs://bucket/base, and an adapter of it."""
    directory, rng, where, tensors = tmp_path_factory.mktemp("base"), np.random.default_rng(0), {}, {}
    for number in range(FILES):
        name, module = f"model-{number}.safetensors", f"layers.{number}.q_proj"
        arrays = {f"{module}.weight": rng.normal(size=(32, 16)).astype(ml_dtypes.bfloat16)}
        safetensors_file.write_arrays(directory / name, arrays, {"format": "pt"})
        where |= dict.fromkeys(arrays, name)
        tensors[f"{module}.lora_A.weight"] = rng.normal(size=(4, 16)).astype(np.float32)
        tensors[f"{module}.lora_B.weight"] = rng.normal(size=(32, 4)).astype(np.float32)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (directory / "config.json").write_text("{}")
    for path in directory.iterdir():
        gcs.put_file(str(path), f"bucket/base/{path.name}")
    return directory, Adapter(LoraConfig(r=4, target_modules=("q_proj",)), tensors)


@pytest.fixture(scope="module")
def expected(files, tmp_path_factory) -> dict[str, bytes]:
    """The merged weight files, written in this process."""
    directory, adapter = files
    out = tmp_path_factory.mktemp("expected") / "out"
    export(BaseCheckpoint.open(directory), adapter, str(out), Layout.MERGED, base_name="n")
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


@pytest.fixture
def remote_base(gcs, files, tmp_path, monkeypatch):
    monkeypatch.setenv(urls.CACHE_VARIABLE, str(tmp_path / "cache"))
    return BaseCheckpoint.at("gs://bucket/base")


def _noted(directory: Path, act=lambda part: None):
    """write_part that leaves a file for each part it ran: where, from when, until when."""

    def write(part):
        begin = time.monotonic()
        act(part)
        written = write_part(part)
        node = ray.get_runtime_context().get_node_id()
        (directory / part.name).write_text(json.dumps([node, begin, time.monotonic()]))
        return written

    return write


def _notes(directory: Path) -> list[tuple[str, float, float]]:
    return [tuple(json.loads(path.read_text())) for path in directory.glob("model-*")]


def test_from_store_to_store_on_the_cpu_nodes(nodes, gcs, files, expected, remote_base, tmp_path, monkeypatch):
    """gs:// to gs://: each file in a task, not on the head; no local copy of the base anywhere."""
    monkeypatch.setattr(export_tasks, "write_part", _noted(tmp_path))
    url = "gs://bucket/merged"
    export(remote_base, files[1], url, Layout.MERGED, base_name="n", write=export_tasks.write_on_cluster)
    assert {name: gcs.cat(f"bucket/merged/{name}") for name in expected} == expected
    assert {node for node, _, _ in _notes(tmp_path)} <= {n["NodeID"] for n in ray.nodes()} - {head_node_id()}
    assert len(_notes(tmp_path)) == FILES


def test_local_destinations_are_written_on_the_head(nodes, files, expected, tmp_path, monkeypatch):
    """By the coordinator, which is there; one file at a time as it is told."""
    monkeypatch.setattr(export_tasks, "write_part", _noted(tmp_path))
    base = BaseCheckpoint.open(files[0])
    write = lambda parts: export_tasks.write_on_cluster(parts, max_files=1)  # noqa: E731
    export(base, files[1], str(tmp_path / "out"), Layout.MERGED, base_name="n", write=write)
    notes = sorted(_notes(tmp_path), key=lambda note: note[1])
    assert {node for node, _, _ in notes} == {head_node_id()}
    assert all(before[2] <= after[1] for before, after in itertools.pairwise(notes))
    coordinator = start_coordinator()
    out = str(tmp_path / "coordinated")
    adapter = AdapterRef(str(files[0]), files[1].config, digest_of(files[1].tensors))
    # It has not seen the adapter: it asks for the tensors.
    how = (out, Layout.MERGED, ExportOptions(base_name=str(files[0])))
    ask(lambda adapter: coordinator.export.remote(AdapterExport(adapter, *how)), adapter, files[1].tensors)
    ray.kill(coordinator)
    for name in expected:
        assert (tmp_path / "out" / name).read_bytes() == expected[name]
        assert (tmp_path / "coordinated" / name).read_bytes() == expected[name]


def test_a_task_that_is_killed_runs_again(nodes, gcs, files, expected, remote_base, tmp_path, monkeypatch):
    def die_once(part):
        marker = tmp_path / "died"
        if part.name == "model-2.safetensors" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(export_tasks, "write_part", _noted(tmp_path, die_once))
    url = "gs://bucket/retried"
    export(remote_base, files[1], url, Layout.MERGED, base_name="n", write=export_tasks.write_on_cluster)
    assert (tmp_path / "died").exists()
    assert {name: gcs.cat(f"bucket/retried/{name}") for name in expected} == expected


def test_an_error_of_ours_ends_the_export_and_takes_back(nodes, gcs, files, remote_base, tmp_path, monkeypatch):
    """It is raised as itself; what other tasks have put, or were about to, is not there afterwards."""

    def fail(part):
        if part.name == "model-3.safetensors":
            raise ExportError("model-3: did not prove itself")

    monkeypatch.setattr(export_tasks, "write_part", _noted(tmp_path, fail))
    with pytest.raises(ExportError, match=r"^model-3: did not prove itself$"):
        export(
            remote_base,
            files[1],
            "gs://bucket/failed",
            Layout.MERGED,
            base_name="n",
            write=export_tasks.write_on_cluster,
        )
    gcs.invalidate_cache()
    assert gcs.find("bucket/failed") == []
    assert len(_notes(tmp_path)) < FILES
