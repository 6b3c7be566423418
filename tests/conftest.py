"""The test process computes on four CPU devices, so that sharding is tested anywhere; set before jax is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["KERAS_BACKEND"] = "jax"
# Ray's usage statistics would go out to the network.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import pytest
from tiny import SIZES, write_model

from kithara_ray.model import runtime

runtime.prepare()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """family -> directory, written when first asked for; tests must not write into it."""

    class Models(dict):
        def __missing__(self, family):
            self[family] = write_model(tmp_path_factory.mktemp(family), family)
            return self[family]

    return Models()


@pytest.fixture(params=["gemma2", "llama"])
def family(request):
    """Two that differ in all that is general: blocks in periods or alike, windows, soft caps."""
    return request.param


@pytest.fixture(params=sorted(SIZES))
def every_family(request):
    return request.param


def pytest_collection_modifyitems(items):
    """For `--dist loadgroup`: a file's tests stay together for their fixtures, and all that start a Ray cluster are run
    by one process, since two clusters on one machine contend for the port of the agent that takes jobs."""
    for item in items:
        group = "ray" if "orchestration" in item.path.parts else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
