"""Each private name of Ray that this library uses is there, and does what it is used for. No cluster is started.

When a test fails, its message says which name is gone, what used it and where to look.
"""

import inspect
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import ray.data
import ray.tune.schedulers
from private_names import names_in
from ray.train import ScalingConfig
from ray.tune.search import ConcurrencyLimiter, Searcher

from kithara_ray.orchestration.cluster import ray_compat, ray_train_compat
from kithara_ray.orchestration.cluster.process_setup import WorkerBackend


@dataclass(frozen=True)
class Name:
    """Attributes:
    owner: module or class of Ray that has it; "module:Class.attribute" is looked up, other text is for the reader.
    used_by: what of ray_compat or ray_train_compat.
    """

    owner: str
    used_by: str


NAMES = {
    "worker": Name("ray._private.worker", "has_started_cluster"),
    "_global_node": Name("ray._private.worker:_global_node", "has_started_cluster"),
    "state": Name("ray._private.state:available_resources_per_node", "free_by_node"),
    "infer_tpu_pod_type_from_topology": Name(
        "ray._private.accelerators.tpu:infer_tpu_pod_type_from_topology", "tpu_pod_type"
    ),
    "get_system_memory": Name("ray._common.utils:get_system_memory", "host_memory"),
    "get_used_memory": Name("ray._private.utils:get_used_memory", "host_memory"),
    "_resources_per_worker_not_none": Name(
        "ray.train:ScalingConfig._resources_per_worker_not_none", "resources_per_worker"
    ),
    "gcs_pb2": Name("ray.core.generated.gcs_pb2:PlacementGroupTableData", "placement_group_table"),
    "_connect_and_get_accessor": Name(
        "ray._private.state:GlobalState._connect_and_get_accessor", "placement_group_table"
    ),
    "get_placement_group_table": Name(
        "ray._raylet:GlobalStateAccessor.get_placement_group_table", "placement_group_table"
    ),
    "PlacementGroupID": Name("ray._raylet:PlacementGroupID", "placement_group_of"),
    "iter_internal_ref_bundles": Name("ray.data:Dataset.iter_internal_ref_bundles", "block_refs"),
    "_limit_concurrency": Name("an instance of ray.tune.search.ConcurrencyLimiter", "limits_by_itself"),
    "_hard_stop": Name("an instance of ray.tune.schedulers.MedianStoppingRule", "only_stops"),
    "_min_time_slice": Name("an instance of ray.tune.schedulers.MedianStoppingRule", "set_time_slice"),
    "_brackets": Name("an instance of ray.tune.schedulers.ASHAScheduler", "rungs_of"),
    "_rungs": Name("a bracket of ray.tune.schedulers.ASHAScheduler", "rungs_of"),
    "packaging": Name("ray._private.runtime_env:packaging", "walk_package"),
    "_get_excludes": Name("ray._private.runtime_env.packaging:_get_excludes", "walk_package"),
    "_dir_travel": Name("ray._private.runtime_env.packaging:_dir_travel", "walk_package"),
    "create_package": Name("ray._private.runtime_env.packaging:create_package", "write_package"),
    "HEAD_NODE_RESOURCE_NAME": Name("ray._common.constants:HEAD_NODE_RESOURCE_NAME", "HEAD_NODE_RESOURCE"),
    "DatasetsCallback": Name("ray.train.v2._internal.callbacks.datasets:DatasetsCallback", "HookedJaxTrainer"),
    "PlacementGroupCleanerCallback": Name(
        "ray.train.v2._internal.callbacks.placement_group_callback:PlacementGroupCleanerCallback", "HookedJaxTrainer"
    ),
    "get_train_context": Name("ray.train.v2._internal.execution.context:get_train_context", "preemption_notice"),
    "_JaxBackend": Name("ray.train.v2.jax.config:_JaxBackend.on_start", "JaxBackend"),
    "_create_default_callbacks": Name("ray.train.v2.jax:JaxTrainer._create_default_callbacks", "HookedJaxTrainer"),
    "_register_sigint_handler": Name("ray.train.v2.jax:JaxTrainer._register_sigint_handler", "HookedJaxTrainer"),
    "get_or_create_autoscaling_coordinator": Name(
        "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator:get_or_create_autoscaling_coordinator",
        "start_autoscaling_coordinator",
    ),
    "_base_exc": Name("an instance of ray.train.v2._internal.exceptions.UserExceptionWithTraceback", "error_of_worker"),
}
# Used by the functions above and public in form: named in the table to be told of in words.
WITHOUT_UNDERSCORE = {"get_placement_group_table", "create_package", "HEAD_NODE_RESOURCE_NAME"}


def said(name: str) -> str:
    """What a reader must know when a name is gone."""
    about = NAMES[name]
    where = "ray_compat" if hasattr(ray_compat, about.used_by) else "ray_train_compat"
    return (
        f"ray {metadata.version('ray')}: `{name}` is gone from {about.owner.replace(':', ', ')}; used by "
        f"kithara_ray.orchestration.cluster.{where}.{about.used_by}, whose docstring says what for"
    )


def look_up(path: str, name: str):
    module, _, attributes = path.partition(":")
    try:
        found = import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{said(name)}. Python says: {error}")
    return found


def check(owner, name: str) -> None:
    assert hasattr(owner, name), said(name)


def test_every_name_is_in_the_table():
    used = names_in(Path(ray_compat.__file__).read_text()) | names_in(Path(ray_train_compat.__file__).read_text())
    assert used | WITHOUT_UNDERSCORE == NAMES.keys(), "names of the compat modules and of this table differ"
    for name, about in NAMES.items():
        found = hasattr(ray_compat, about.used_by) or hasattr(ray_train_compat, about.used_by)
        assert found, f"{name}: no compat module has {about.used_by}"


@pytest.mark.parametrize("name", [name for name, about in NAMES.items() if ":" in about.owner])
def test_a_name_of_a_module_or_class(name):
    look_up(NAMES[name].owner, name)


def test_a_name_that_is_gone_is_told_in_words():
    with pytest.raises(pytest.fail.Exception, match=r"ray 2\S+: `packaging` is gone .* used by \S+walk_package, whose"):
        look_up("ray._private:nothing", "packaging")
    with pytest.raises(AssertionError, match=r"`_rungs` is gone from a bracket of .*ray_compat.rungs_of"):
        check(object(), "_rungs")


def test_the_heads_resource_is_rays():
    theirs = look_up(NAMES["HEAD_NODE_RESOURCE_NAME"].owner, "HEAD_NODE_RESOURCE_NAME")
    assert theirs == ray_compat.HEAD_NODE_RESOURCE


@pytest.mark.parametrize(
    ("topology", "accelerator", "expected"),
    [("4x4", "TPU-V5LITEPOD", "v5litepod-16"), ("2x2x2", "TPU-V4", "v4-16"), ("2x4", "TPU-V6E", "v6e-8")],
)
def test_pod_types(topology, accelerator, expected):
    assert ray_compat.tpu_pod_type(topology, accelerator) == expected


def test_memory_of_this_host():
    total, used = ray_compat.host_memory()
    assert 0 < used < total


def test_resources_of_a_worker():
    assert dict(ray_compat.resources_per_worker(ScalingConfig(num_workers=2))) == {"CPU": 1}
    given = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 3, "mine": 1})
    assert dict(ray_compat.resources_per_worker(given)) == {"CPU": 3, "mine": 1}
    assert ScalingConfig(num_workers=2).resources_per_worker is None, "filled in now: the public attribute is enough"


def test_the_table_of_placement_groups(monkeypatch):
    record = look_up(NAMES["gcs_pb2"].owner, "PlacementGroupTableData")
    fields = ("placement_group_id", "creator_job_id", "creator_actor_id", "creator_actor_dead", "is_detached", "state")
    for field in fields:
        assert field in record.DESCRIPTOR.fields_by_name, f"{said('gcs_pb2')}: it has no field {field}"
    kept, removed = record(placement_group_id=b"1"), record(placement_group_id=b"2", state=record.REMOVED)
    rows = [row.SerializeToString() for row in (kept, removed)]
    state = look_up("ray._private.state:state", "state")
    accessor = SimpleNamespace(get_placement_group_table=lambda: rows)
    monkeypatch.setattr(state, "_connect_and_get_accessor", lambda: accessor)
    assert [group.placement_group_id for group in ray_compat.placement_group_table()] == [b"1"]


def test_a_handle_on_a_placement_group():
    number = b"\x01" * look_up(NAMES["PlacementGroupID"].owner, "PlacementGroupID").size()
    assert ray_compat.placement_group_of(number).id.binary() == number


def test_blocks_of_a_dataset():
    blocks = (("a", 3, 30), ("b", 2, None))
    entries = [SimpleNamespace(ref=r, metadata=SimpleNamespace(num_rows=n, size_bytes=b)) for r, n, b in blocks]
    dataset = SimpleNamespace(iter_internal_ref_bundles=lambda: iter([SimpleNamespace(blocks=entries)]))
    assert list(ray_compat.block_refs(dataset)) == [("a", 3, 30), ("b", 2, 0)]


def test_what_a_limiter_counts():
    limiter = ConcurrencyLimiter(Searcher(metric="loss", mode="min"), max_concurrent=2)
    check(limiter, "_limit_concurrency")
    assert ray_compat.limits_by_itself(limiter) is True


def test_a_median_rule():
    stops = ray.tune.schedulers.MedianStoppingRule(hard_stop=True)
    pauses = ray.tune.schedulers.MedianStoppingRule(hard_stop=False)
    check(stops, "_hard_stop")
    check(stops, "_min_time_slice")
    assert (ray_compat.only_stops(stops), ray_compat.only_stops(pauses)) == (True, False)
    ray_compat.set_time_slice(stops, 12.0)
    assert vars(stops)["_min_time_slice"] == 12.0


def test_rungs_of_asha():
    asha = ray.tune.schedulers.ASHAScheduler(metric="loss", mode="min", max_t=100, grace_period=10, reduction_factor=3)
    check(asha, "_brackets")
    check(asha._brackets[0], "_rungs")
    rungs = ray_compat.rungs_of(asha)
    assert rungs == [[{}, {}, {}]]
    rungs[0][0]["trial"] = 0.5
    # The scheduler's own: what is put in there is known to it.
    assert ray_compat.rungs_of(asha)[0][0] == {"trial": 0.5}


def test_files_of_a_package(tmp_path):
    for name in ("run.py", "data/rows.jsonl", "runs/1/log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x" * 100)
    (tmp_path / ".gitignore").write_text("*.jsonl\n")
    seen = []
    ray_compat.walk_package(tmp_path, ["runs"], seen.append)
    assert sorted(path.name for path in seen if path.is_file()) == [".gitignore", "run.py"]
    ray_compat.write_package(tmp_path, ["runs"], target := tmp_path / "package.zip")
    assert target.stat().st_size > 0


# --- Ray Train -------------------------------------------------------------------------------------------------------


def test_the_trainers_hooks(monkeypatch):
    unused = [look_up(NAMES[name].owner, name) for name in ("DatasetsCallback", "PlacementGroupCleanerCallback")]
    unused, other = [callback.__new__(callback) for callback in unused], object()
    base = ray_train_compat.HookedJaxTrainer.__mro__[1]
    monkeypatch.setattr(base, "_create_default_callbacks", lambda self: [*unused, other])
    asked = []

    class Trainer(ray_train_compat.HookedJaxTrainer):
        def __init__(self):
            pass

        def on_sigint(self, controller):
            asked.append(controller)

    handlers = {}
    monkeypatch.setattr(ray_train_compat.signal, "signal", lambda number, handler: handlers.update({number: handler}))
    trainer = Trainer()
    assert trainer._create_default_callbacks() == [other]
    trainer._register_sigint_handler("controller")
    handlers[ray_train_compat.signal.SIGINT](2, None)
    assert asked == ["controller"]


@pytest.mark.parametrize("hook", ["_create_default_callbacks", "_register_sigint_handler"])
def test_ray_train_calls_the_hooks(hook):
    from ray.train.v2.api import data_parallel_trainer

    assert f"self.{hook}(" in inspect.getsource(data_parallel_trainer), f"{said(hook)}: Ray Train does not call it"


def test_the_workers_backend():
    assert issubclass(WorkerBackend().backend_cls, ray_train_compat.JaxBackend)


def test_a_notice_of_preemption(monkeypatch):
    context = import_module("ray.train.v2._internal.execution.context").TrainContext
    assert "preemption_context" in context.__dataclass_fields__, said("get_train_context")
    notice = SimpleNamespace(preemption_context=SimpleNamespace(preemption_info="soon"))
    monkeypatch.setattr(ray_train_compat, "get_train_context", lambda: notice)
    assert ray_train_compat.preemption_notice() == "soon"


def test_the_error_of_a_worker():
    wrapper = import_module("ray.train.v2._internal.exceptions").UserExceptionWithTraceback
    cause = ValueError("no such file")
    check(wrapper(cause, "traceback"), "_base_exc")
    assert ray_train_compat.error_of_worker(wrapper(cause, "traceback")) is cause
    assert ray_train_compat.error_of_worker(cause) is cause
