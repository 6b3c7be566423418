"""Names that Ray Train fails on half a minute later are refused where they are written."""

import pytest
from ray.train import RunConfig, ScalingConfig

from kithara_ray.errors import ConfigError
from kithara_ray.orchestration.cluster.run_name import check_run_name
from kithara_ray.orchestration.cluster.worker_group import WorkerGroup


@pytest.mark.parametrize("name", [None, "my-run", "run 1", "a/b", "x" * 255, "v1..2"])
def test_names(name):
    check_run_name(name)


@pytest.mark.parametrize(
    "name", ["l\u00e4uf", "\U0001f600", "nul\0", "a\nb", "\udc80", "x" * 256, "../up", "/abs", "a/../b", " ", ""]
)
def test_names_that_are_none(name):
    with pytest.raises(ConfigError, match="run_config: the name") as refused:
        check_run_name(name)
    str(refused.value).encode("ascii")


def test_a_group_is_not_made_with_one(tmp_path):
    with pytest.raises(ConfigError, match="other than printable ASCII"):
        WorkerGroup(ScalingConfig(num_workers=1), RunConfig(name="l\u00e4uf", storage_path=str(tmp_path)), 1, 1.0)
