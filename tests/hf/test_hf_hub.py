"""hf:// as the base and as the destination, against a stand-in for the Hub on loopback."""

import json
import os
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hub import Hub
from killing import KILLED, Server

from kithara_ray.hf import safetensors_file
from kithara_ray.hf.adapter import Adapter, LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.export import Layout, export

LARGE = 700_000  # elements of a matrix that is no target: ranged reads have to leave it alone


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with org/base: two weight files, the second with a tensor of 1.4 MB."""
    directory, rng = tmp_path_factory.mktemp("base"), np.random.default_rng(0)
    where = {}
    for number, more in ((1, {}), (2, {"embed.weight": rng.normal(size=(LARGE // 7, 7)).astype(ml_dtypes.bfloat16)})):
        arrays = {f"layers.{number}.q_proj.weight": rng.normal(size=(24, 16)).astype(ml_dtypes.bfloat16), **more}
        name = f"model-0000{number}-of-00002.safetensors"
        safetensors_file.write_arrays(directory / name, arrays, {"format": "pt"})
        where |= dict.fromkeys(arrays, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (directory / "config.json").write_text("{}")
    with Hub() as hub:
        hub.directory = directory
        hub.add("org/base", {path.name: path.read_bytes() for path in directory.iterdir()})
        yield hub


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    rng, tensors = np.random.default_rng(1), {}
    for number in (1, 2):
        tensors[f"layers.{number}.q_proj.lora_A.weight"] = rng.normal(size=(4, 16)).astype(np.float32)
        tensors[f"layers.{number}.q_proj.lora_B.weight"] = rng.normal(size=(24, 4)).astype(np.float32)
    directory = tmp_path_factory.mktemp("adapter")
    Adapter(LoraConfig(r=4, target_modules=("q_proj",)), tensors).write(directory, "org/base")
    return directory


@pytest.fixture(scope="module")
def server(hub, tmp_path_factory):
    """Processes that take the stand-in for the Hub. Its newer transfer protocol is not played."""
    home = tmp_path_factory.mktemp("home")
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_x", "HF_HOME": str(home), "KITHARA_RAY_CACHE": str(home / "ours")}
    env |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    server = Server(**env)
    yield server
    server.close()


@pytest.fixture
def job(adapter):
    return {"action": "export", "adapter": str(adapter), "layout": "merged", "base": "hf://org/base"}


def _pushed(hub, repo) -> dict[str, bytes]:
    return {name: data for name, data in hub.repos[repo]["commits"][-1].items() if name != ".gitattributes"}


@pytest.mark.parametrize("layout", Layout)
def test_from_the_hub_to_the_hub(hub, server, job, adapter, tmp_path, layout):
    """One commit to a private repository; the same files as to a directory."""
    base = BaseCheckpoint.open(hub.directory)
    export(base, Adapter.read(adapter), str(tmp_path / "out"), layout, base_name="org/name")
    repo = f"org/{layout}"
    assert server.run(url=f"hf://{repo}", **job | {"layout": layout})["error"] is None
    assert hub.repos[repo]["private"]
    assert len(hub.repos[repo]["commits"]) == 2  # the repository's own, and ours
    pushed = _pushed(hub, repo)
    for path in (tmp_path / "out").rglob("*"):
        name = path.relative_to(tmp_path / "out").as_posix()
        if path.is_file() and name not in ("export_report.json", "README.md", "run.json"):
            there, here = pushed.pop(name), path.read_bytes()
            if layout is Layout.ADAPTER and name == "adapter_model.safetensors":
                # The fingerprint in its header is of weights that an adapter's export does not fetch.
                there, here = (raw[8 + int.from_bytes(raw[:8], "little") :] for raw in (there, here))
            assert there == here, name
    assert pushed.keys() <= {"export_report.json", "README.md", "run.json"}


def test_only_the_needed_ranges_are_read(hub, server, job, tmp_path):
    """Without a target in them, an adapter's export reads headers and small files."""
    hub.ranges.clear()
    job |= {"layout": "adapter", "base": "hf://org/base@main"}
    assert server.run(url=str(tmp_path / "out"), **job)["error"] is None
    assert sum(end - begin for name, begin, end in hub.ranges if name.endswith(".safetensors")) < 5_000


def test_what_is_there_is_not_overwritten(hub, server, job):
    before = hub.repos["org/base"]["commits"][-1]
    refused = server.run(url="hf://org/base", **job)
    assert "hf://org/base exists and is not empty (config.json); choose another name" in refused["error"]
    assert hub.repos["org/base"]["commits"][-1] == before
    assert "exists and is not empty" in server.run(action="check", url="hf://org/base")["error"]


def test_check_destination_leaves_nothing(hub, server):
    assert server.run(action="check", url="hf://org/probe")["error"] is None
    assert "org/probe" not in hub.repos
    hub.add("org/empty", {})
    assert server.run(action="check", url="hf://org/empty")["error"] is None


def test_killed_and_failing_at_every_request(hub, server, job, record_property):
    """Before the commit nothing is to be seen; a failure deletes the repository that it has made, a kill leaves it."""

    def run(url: str, **how) -> dict:
        hub.objects.clear()  # what has been uploaded is not uploaded again
        return server.run(url=url, **how, **job)

    count = len(run("hf://org/whole")["mutations"])
    whole = _pushed(hub, "org/whole").keys()
    assert count >= 4
    record_property("operations", 2 * count)
    for at in range(1, count + 1):
        killed, failed = f"org/killed{at}", f"org/failed{at}"
        assert run(f"hf://{killed}", mode="kill", at=at)["status"] == KILLED
        left = _pushed(hub, killed).keys() if killed in hub.repos else set()
        assert left in (set(), whole)
        again = run(f"hf://{killed}")
        assert (again["error"] is None) == (left == set())
        result = run(f"hf://{failed}", mode="fail", at=at)
        assert result["error"].startswith(f"DestinationError: hf://{failed}")
        committed = any("/commit/" in request for request in result["mutations"][: at - 1])
        assert committed == (failed in hub.repos)
