"""Checks before a run, each by what it looks at; the table of them is tested with the command line."""

import socket
import subprocess
import sys

import pytest

from kithara_ray.errors import ClusterError, DestinationError
from kithara_ray.orchestration.cluster.connection import check_address
from kithara_ray.orchestration.preflight import checks, node_facts, probes


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
    assert checks.tpu_problem(facts(tpu_files=chips), 2, 2) is None
    # Ray has given the chips to a run: the holder is that run.
    assert checks.tpu_problem(facts(tpu_files=chips, holders=held), 2, 0) is None
    problem = checks.tpu_problem(facts(tpu_files=chips, holders=held), 2, 2)
    assert problem.startswith("/dev/accel1 is held by process 4242 (python)")
    assert "kill 4242" in problem
    assert "there is no /dev/accel* or /dev/vfio/*" in checks.tpu_problem(facts(), 4, 4)


def test_versions():
    here = {"python": "3.11.7", "ray": "2.60.0", "jax": "0.10.2"}
    there = {"node a": {**here, "python": "3.11.9"}, "node b": {"python": "3.12.1", "ray": "2.60.1"}}
    assert checks.different_versions(here, there) == [
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
    probes.probe_directory(str(tmp_path))
    probes.probe_directory(str(tmp_path / "not" / "there"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(DestinationError, match="cannot be written"):
        probes.probe_directory(str(tmp_path / "file"))
    with pytest.raises(DestinationError, match="cannot be written"):
        probes.probe_directory("/proc/self")


def test_all_that_failed_is_raised_together():
    error = ClusterError("no nodes")
    found = [
        checks.Finding("a", checks.OK, "fine"),
        checks.Finding("b", checks.FAILED, "no nodes", error),
        checks.Finding("c", checks.FAILED, "/x is full", DestinationError("/x is full")),
    ]
    with pytest.raises(ClusterError) as caught:
        checks.raise_for(found)
    assert str(caught.value) == "no nodes\n/x is full"
    checks.raise_for(found[:1])
