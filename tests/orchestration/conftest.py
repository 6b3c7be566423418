import socket

import pytest
import ray
from ray.cluster_utils import Cluster

_running: Cluster | None = None
_context = None


@pytest.fixture(scope="module")
def cluster():
    """A local Ray of four CPUs, for all files but those that start another; yields its context.

    Not `ray.init("local")`: two processes run tests, and the port of its agent, which takes jobs, is always the same.
    """
    global _running, _context
    if _running is None:
        ports = {"dashboard_port": _free_port(), "dashboard_agent_listen_port": None}
        head = {"num_cpus": 4, "include_dashboard": True, "object_store_memory": 2**30}
        _running = Cluster(initialize_head=True, head_node_args=head | ports)
        _context = ray.init(address=_running.address, log_to_driver=False, logging_level="ERROR")
    return _context


@pytest.fixture(scope="module")
def no_cluster():
    """For a file that starts a cluster of its own."""
    _stop()
    yield
    _stop()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """What is behind these tests, in the same process, has no Ray."""
    if nextitem is None or "orchestration" not in nextitem.path.parts:
        _stop()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _stop() -> None:
    global _running
    ray.shutdown()
    if _running is not None:
        _running.shutdown()
        _running = None
