"""Checks before a run, each by what it looks at; the table of them is tested with the command line."""

import socket
import subprocess
import sys

import pytest
from asking import V5E_4, request
from ray.train import RunConfig

from kithara_ray import Checkpointer, MeshShape
from kithara_ray.errors import ClusterError, ConfigError, DestinationError
from kithara_ray.hf.exports.request import requests_of
from kithara_ray.orchestration.cluster.connection import check_address
from kithara_ray.orchestration.preflight import checks, findings, node_facts, nodes, probes, tasks
from kithara_ray.orchestration.request.snapshots import Snapshots


def facts(**fields) -> node_facts.NodeFacts:
    return node_facts.NodeFacts(
        **{"host": "a", "versions": {}, "ram_bytes": 8, "ram_free_bytes": 8, "cache_free_bytes": 8} | fields
    )


def test_holders_are_named(tmp_path):
    """A process of its own has the file open, as a forgotten run has a chip."""
    path = tmp_path / "accel0"
    path.write_bytes(b"")
    command = [sys.executable, "-c", "import sys; f = open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"]
    with subprocess.Popen([*command, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "open\n"
        held = node_facts.holders_of((str(path), str(tmp_path / "accel1")))
        process.stdin.close()
    assert [(file, pid) for file, pid, _ in held] == [(str(path), process.pid)]
    assert held[0][2].startswith("python")
    assert node_facts.holders_of((str(path),)) == ()


def test_tpus():
    chips = ("/dev/accel0", "/dev/accel1")
    held = (("/dev/accel1", 4242, "python"),)
    assert nodes.tpu_problem(facts(tpu_files=chips), 2, 2) is None
    # Ray has given the chips to a run: the holder is that run.
    assert nodes.tpu_problem(facts(tpu_files=chips, holders=held), 2, 0) is None
    problem = nodes.tpu_problem(facts(tpu_files=chips, holders=held), 2, 2)
    assert problem.startswith("/dev/accel1 is held by process 4242 (python)")
    assert "kill 4242" in problem
    assert "there is no /dev/accel* or /dev/vfio/*" in nodes.tpu_problem(facts(), 4, 4)


def test_versions():
    here = {"python": "3.11.7", "ray": "2.60.0", "jax": "0.10.2"}
    there = {"node a": {**here, "python": "3.11.9"}, "node b": {"python": "3.12.1", "ray": "2.60.1"}}
    assert nodes.different_versions(here, there) == [
        "node b has jax none, the driver 0.10.2",
        "node b has python 3.12.1, the driver 3.11.7",
        "node b has ray 2.60.1, the driver 2.60.0",
    ]


def test_an_address_where_nothing_is(monkeypatch):
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9", "nonsense"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ClusterError, match=f"RAY_ADDRESS={address}: no cluster answers there"):
            check_address()
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        check_address()


def test_this_node():
    found = node_facts.look()
    assert found.versions["ray"].startswith("2.60")
    assert 0 < found.ram_free_bytes < found.ram_bytes
    assert found.cache_free_bytes > 0


def test_a_directory_is_probed_and_left_as_it_was(tmp_path):
    tasks.probe_directory(str(tmp_path))
    tasks.probe_directory(str(tmp_path / "not" / "there"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(DestinationError, match="cannot be written"):
        tasks.probe_directory(str(tmp_path / "file"))
    with pytest.raises(DestinationError, match="cannot be written"):
        tasks.probe_directory("/proc/self")


def test_all_that_failed_is_raised_together():
    error = ClusterError("no nodes")
    found = [
        findings.Finding("a", findings.OK, "fine"),
        findings.Finding("b", findings.FAILED, "no nodes", error),
        findings.Finding("c", findings.FAILED, "/x is full", DestinationError("/x is full")),
    ]
    with pytest.raises(ClusterError) as caught:
        findings.raise_for(found)
    assert str(caught.value) == "no nodes\n/x is full"
    findings.raise_for(found[:1])


GB = 10**9


def cluster_of(*hosts: node_facts.NodeFacts, tpus: int = 0, free: int = 0) -> nodes.Nodes:
    """Nodes that no Ray has: "a" is the first."""
    names = "abcdefgh"[: len(hosts)]
    resources = {"CPU": 8.0} | ({"TPU": tpus} if tpus else {})
    described = {name: {"NodeManagerAddress": f"10.0.0.{name}", "Resources": resources} for name in names}
    return nodes.Nodes(described, lambda: dict(zip(names, hosts, strict=True)), lambda: {"a": {"TPU": free}})


def test_versions_of_nodes(monkeypatch):
    monkeypatch.setattr(nodes, "versions", lambda: {"python": "3.11.7", "ray": "2.60.0"})
    same = facts(versions={"python": "3.11.7", "ray": "2.60.0"})
    assert cluster_of(same, same).check_versions() == "python 3.11.7, ray 2.60.0 on 2 node(s) and here"
    with pytest.raises(ClusterError, match=r"node 10\.0\.0\.b \(b\) has ray none, the driver 2\.60\.0; install"):
        cluster_of(same, facts(versions={"python": "3.11.7"})).check_versions()


def test_chips_of_nodes():
    chips = ("/dev/accel0", "/dev/accel1", "/dev/accel2", "/dev/accel3")
    held = facts(tpu_files=chips, holders=(("/dev/accel1", 42, "python"),))
    assert cluster_of(facts(tpu_files=chips), tpus=4, free=4).check_tpus(request(V5E_4)).startswith("4 device file(s)")
    assert cluster_of(held, tpus=4, free=0).check_tpus(request(V5E_4)).startswith("4 device file(s)")
    with pytest.raises(ClusterError, match=r"node 10\.0\.0\.a \(a\): /dev/accel1 is held by process 42"):
        cluster_of(held, tpus=4, free=4).check_tpus(request(V5E_4))
    with pytest.raises(ClusterError, match="no node has a TPU"):
        cluster_of(facts()).check_tpus(request(V5E_4))
    with pytest.raises(findings.Skipped, match="the run asks for cpu"):
        cluster_of(held, tpus=4, free=4).check_tpus(request())


def test_memory_of_nodes(monkeypatch):
    """12 GB of weights: the workers share them over fsdp; over data each keeps them all."""
    monkeypatch.setattr(nodes, "weight_bytes", lambda request: 12 * GB)
    host = facts(ram_bytes=16 * GB, ram_free_bytes=8 * GB)
    two = request({"num_workers": 2})
    assert cluster_of(host, host).check_memory(two) == "6.0 GB of weights a worker, 8.0 GB free"
    # Both workers on one node.
    with pytest.raises(findings.Warned, match=r"2 worker\(s\) keep 6\.0 GB of weights each, and 8\.0 GB of 16\.0"):
        cluster_of(host).check_memory(two)
    copies = request({"num_workers": 2}, step={"mesh": MeshShape(data=2)})
    with pytest.raises(ClusterError, match=r"2 worker\(s\) keep 12\.0 GB of weights each, of 16\.0 GB of memory"):
        cluster_of(host).check_memory(copies)
    assert cluster_of(host).check_memory(request(V5E_4)).startswith("12.0 GB of the base read by each host")


def test_memory_of_a_worker():
    """Hosts of 8 CPUs: as many workers share the memory as fit there, and of unlike hosts the least counts."""
    small, large = facts(ram_bytes=16 * GB), facts(ram_bytes=64 * GB)
    assert cluster_of(large, small).ram_of_worker(request({"num_workers": 2}).group) == 8 * GB
    each = {"num_workers": 4, "resources_per_worker": {"CPU": 3}}
    assert cluster_of(large).ram_of_worker(request(each).group) == 32 * GB
    nowhere = {"num_workers": 1, "resources_per_worker": {"CPU": 9}}
    assert cluster_of(large).ram_of_worker(request(nowhere).group) is None


class Free:
    """Room that the head node was found to have."""

    def __init__(self, **places: int):
        self._places = {f"/{name}": free for name, free in places.items()}

    def free(self):
        return self._places


def test_room_on_disks(monkeypatch):
    for module in (nodes, checks):
        monkeypatch.setattr(module, "weight_bytes", lambda request: 12 * GB)
    remote, local = request(model={"preset_handle": "gs://bucket/base"}), request()
    small, large = (cluster_of(facts(cache_free_bytes=size * GB)) for size in (5, 50))
    assert checks._check_disk(local, small, Free()) == "no export of the base's size is asked for"
    found = checks._check_disk(remote, large, Free(out=20 * GB))
    assert found == "12.0 GB of base to each host's cache; 20.0 GB free at /out"
    with pytest.raises(findings.Warned, match=r"5\.0 GB free in the cache, the base has 12\.0 GB"):
        checks._check_disk(remote, small, Free(out=20 * GB))
    # A full destination ends the run, whatever a cache warns of.
    with pytest.raises(DestinationError, match=r"/out: 1\.0 GB are free there"):
        checks._check_disk(remote, small, Free(out=GB))


def test_devices_and_the_global_batch():
    asked = request({"num_workers": 3}, step={"micro_batches": 5})
    assert checks.check_devices(asked) == "3 of cpu: data=1 fsdp=3 tensor=1, global batch 30 rows"
    with pytest.raises(findings.Skipped, match="once the workers have started"):
        checks.check_devices(request({"num_workers": 1, "use_tpu": True}))
    with pytest.raises(ConfigError, match="does not fit 3 devices"):
        checks.check_devices(request({"num_workers": 3}, step={"mesh": MeshShape(data=2)}))


def test_every_place_that_a_run_writes_to_is_probed(tmp_path):
    exports = [{"output_dir": str(tmp_path / "new")}, {"output_dir": str(tmp_path / "on"), "resume": True}]
    run_config = RunConfig(name="run", storage_path=str(tmp_path / "runs"))
    asked = request(
        run_config=run_config,
        checkpointer=Checkpointer(str(tmp_path / "saved")),
        snapshots=Snapshots(2, str(tmp_path / "steps")),
    )
    places = probes.places_of(asked, requests_of(exports, asked.model.lora))
    assert sorted(places) == sorted(str(tmp_path / name) for name in ("new", "on", "runs", "saved", "steps"))
    for name in ("new", "on", "runs", "saved", "steps/step-000002"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").touch()
    refused = {path for path, check in places.items() if not passes(check, path)}
    assert refused == {str(tmp_path / "new")}  # a run with a checkpointer resumes its own adapters
    ends = probes.places_of(request(run_config=run_config, snapshots=asked.snapshots), [])
    with pytest.raises(DestinationError, match="holds step-000002 from an earlier run; give another export_dir"):
        ends[asked.snapshots.directory](asked.snapshots.directory)
    # Ray writes there with credentials of its own.
    assert not probes.places_of(request(run_config=RunConfig(name="run", storage_path="s3://bucket/runs")), [])


def passes(check, path: str) -> bool:
    try:
        check(path)
    except DestinationError:
        return False
    return True
