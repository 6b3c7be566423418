"""cluster/: every manifest by its schema, and against what Ray says of the slice that it asks for.

KUBERAY_CRDS=.../helm-chart/kuberay-operator/crds, of a checkout of KubeRay, checks them by its own definitions too.
"""

import json
import os
import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray.train import ScalingConfig
from ray.util.tpu import get_tpu_worker_resources

from kithara_ray import config
from kithara_ray.plan.chips import slice_of, slice_of_topology

CLUSTER = Path(__file__).parents[2] / "cluster"
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
LAUNCHER = CLUSTER / "launcher" / "tpu-vm.yaml"
SCHEMA = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())
KUBERNETES = "1.34"
ANNOTATION = "kithara-ray/scaling-config"


def documents(path: Path) -> list[dict]:
    return list(yaml.safe_load_all(path.read_text()))


def ray_object(path: Path) -> dict:
    (found,) = (document for document in documents(path) if document["apiVersion"] == "ray.io/v1")
    return found


def ray_cluster(path: Path) -> dict:
    spec = ray_object(path)["spec"]
    return spec.get("rayClusterSpec", spec)


def scaling_of(path: Path) -> dict:
    """The run's scaling_config that a manifest names, or runs itself."""
    if path == LAUNCHER:
        return documents(path)[0]["metadata"]["scaling_config"]
    for document in documents(path):
        if document["kind"] == "ConfigMap":
            return yaml.safe_load(document["data"]["run.yaml"])["scaling_config"]
    return yaml.safe_load(ray_object(path)["metadata"]["annotations"][ANNOTATION])


def pods(path: Path) -> list[dict]:
    cluster = ray_cluster(path)
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def columns(row: str) -> list[str]:
    """The cells of README's row of TPU generations that begins so, v5e, v5p and v6e."""
    (line,) = (line for line in (CLUSTER / "README.md").read_text().splitlines() if line.startswith(f"| {row}"))
    return [cell.strip() for cell in line.split("|")[2:5]]


@pytest.fixture(params=KUBERAY, ids=lambda path: path.stem)
def manifest(request):
    return request.param


def test_kuberay_objects_have_their_fields(manifest):
    jsonschema.Draft202012Validator(SCHEMA).validate(ray_object(manifest))


def test_all_else_is_kubernetes(manifest):
    for document in documents(manifest):
        if document["apiVersion"] == "v1":
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    for spec in pods(manifest):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="needs KUBERAY_CRDS, KubeRay's own definitions")
def test_kuberay_takes_them(manifest):
    document = ray_object(manifest)
    path = Path(os.environ["KUBERAY_CRDS"]) / f"ray.io_{document['kind'].lower()}s.yaml"
    versions = yaml.safe_load(path.read_text())["spec"]["versions"]
    (schema,) = (version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    close(schema)
    schema["properties"]["metadata"] = {}
    jsonschema.Draft202012Validator(schema).validate(document)


def close(schema) -> None:
    """Unknown fields, which a cluster drops silently, become errors; quantities may be numbers or texts."""
    for node in schema if isinstance(schema, list) else schema.values():
        if isinstance(node, dict | list):
            close(node)
    if isinstance(schema, dict) and schema.get("x-kubernetes-int-or-string"):
        schema.pop("anyOf", None)
        schema["type"] = ["integer", "string"]
    elif isinstance(schema, dict) and schema.get("type") == "object" and "properties" in schema:
        schema.setdefault("additionalProperties", False)


def test_hosts_and_chips_are_the_slices_of_the_run(manifest):
    """Against Ray's own arithmetic of slices and what GKE calls them."""
    scaling = scaling_of(manifest)
    (group,) = ray_cluster(manifest)["workerGroupSpecs"]
    spec = group["template"]["spec"]
    (container,) = spec["containers"]
    chips = int(container["resources"]["limits"]["google.com/tpu"])
    topology = spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert topology == scaling["topology"]
    where = slice_of_topology(topology, scaling["accelerator_type"])
    assert chips * group["numOfHosts"] == where.chips
    slices = group["replicas"]
    workers, resources = get_tpu_worker_resources(topology, scaling["accelerator_type"], None, slices)
    assert workers == scaling["num_workers"] == slices * group["numOfHosts"]
    assert resources["TPU"] == chips
    assert group["minReplicas"] == group["maxReplicas"] == slices
    ScalingConfig(**scaling)
    generation = columns("`accelerator_type`").index(f"`{scaling['accelerator_type']}`")
    accelerator = spec["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"]
    assert columns("`cloud.google.com/gke-tpu-accelerator`")[generation] == f"`{accelerator}`"
    machine = columns(f"machine type of {chips} chips")[generation].strip("`")
    assert f"machine type {machine}" in manifest.read_text()


def test_pods_get_what_they_ask_for(manifest):
    """Kubernetes wants both equal of TPUs; of the rest it keeps a training pod from being evicted."""
    for spec in pods(manifest):
        (container,) = spec["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_one_image_of_the_tested_ray(manifest):
    images = {container["image"] for spec in pods(manifest) for container in spec["containers"]}
    assert images == {documents(LAUNCHER)[0]["docker"]["image"]}
    assert ray_cluster(manifest)["rayVersion"] == ray.__version__
    assert f"FROM rayproject/ray:{ray.__version__}-py311\n" in (CLUSTER / "Dockerfile").read_text()


def test_a_token_is_asked_for_and_the_dashboard_is_private(manifest):
    cluster = ray_cluster(manifest)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    for spec in pods(manifest):
        assert not spec.keys() & {"hostNetwork", "hostPID"}
        for variable in spec["containers"][0]["env"]:
            assert "value" not in variable, "secrets are references"


def test_the_jobs_run_is_a_configuration(tmp_path):
    (run,) = (document for document in documents(CLUSTER / "kuberay" / "job.yaml") if document["kind"] == "ConfigMap")
    path = tmp_path / "run.yaml"
    path.write_text(run["data"]["run.yaml"])
    loaded = config.load(path)
    config.require_absolute(loaded)
    job = ray_object(CLUSTER / "kuberay" / "job.yaml")["spec"]
    (mount,) = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert job["entrypoint"] == f"kithara-ray train {mount['mountPath']}/run.yaml"


def test_the_launchers_yaml_is_rays():
    """By ray's schema and defaults, and by Ray's arithmetic of slices."""
    from ray._private.accelerators import tpu
    from ray.autoscaler._private import util

    content = documents(LAUNCHER)[0]
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(content, schema)
    util.validate_config(util.prepare_config(content))
    node = content["available_node_types"]["slice"]
    scaling = content["metadata"]["scaling_config"]
    name = node["node_config"]["acceleratorType"]
    workers, resources = get_tpu_worker_resources(scaling["topology"], scaling["accelerator_type"])
    assert tpu.get_total_chips_from_accelerator_type(name) == workers * resources["TPU"] == slice_of(name).chips
    assert workers == scaling["num_workers"]
    assert node["resources"]["TPU"] == resources["TPU"]
    assert node["resources"][f"TPU-{name}-head"] == 1
    assert f"`{node['node_config']['runtimeVersion']}`" in columns("runtime of TPU VMs")
    for command in (content["head_start_ray_commands"][-1], content["worker_start_ray_commands"][-1]):
        assert command.startswith("RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/root/.ray/auth_token ray start")
    assert "--dashboard-host=127.0.0.1" in content["head_start_ray_commands"][-1]
    assert "/root/.ray/auth_token" in content["file_mounts"]


def test_readme_names_each_files_scaling():
    table = dict(re.findall(r"^\| \[([\w/.-]+)\].*?(?:`(\{.*\})` )?\|$", (CLUSTER / "README.md").read_text(), re.M))
    files = {path.relative_to(CLUSTER).as_posix() for path in CLUSTER.rglob("*") if path.is_file()}
    assert set(table) == files - {"README.md", "queued/startup.sh"}
    for name, scaling in table.items():
        if scaling:
            assert yaml.safe_load(scaling) == scaling_of(CLUSTER / name)
    for topology, accelerator, name in zip(
        columns("a slice of 16 chips"), columns("`accelerator_type`"), columns("the same as a TPU VM"), strict=True
    ):
        shape, hosts = topology.split(", ")
        workers, _ = get_tpu_worker_resources(shape, accelerator.strip("`"))
        assert (int(hosts), 16) == (workers, slice_of(name.split("`")[1]).chips)
