"""Which devices the axes of a mesh hold, on slices that the TPU's own library describes."""

import json
import os
import subprocess
import sys

import pytest

from kithara_ray.errors import ConfigError
from kithara_ray.sharding.mesh import make_mesh, weight_sharding
from kithara_ray.sharding.shape import MeshShape

ASK = """
import json
from jax.experimental import topologies
from kithara_ray.errors import ConfigError
from kithara_ray.sharding.mesh import make_mesh
from kithara_ray.sharding.shape import MeshShape

devices = topologies.get_topology_desc("v5e:2x2", "tpu", num_slices=2).devices
told = {}
shapes = {"automatic": None, "half": MeshShape(data=4), "across": MeshShape(), "whole": MeshShape(data=-1, fsdp=1)}
for name, shape in shapes.items():
    try:
        mesh = make_mesh(shape, devices)
        told[name] = [list(mesh.devices.shape), [device.slice_index for device in mesh.devices.flat]]
    except ConfigError as error:
        told[name] = str(error)
print(json.dumps(told))
"""


def test_slices_are_on_the_data_axis():
    env = os.environ | {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["automatic"] == [[2, 4, 1], [0] * 4 + [1] * 4]
    assert told["half"] == [[4, 2, 1], [0] * 4 + [1] * 4]
    assert told["whole"] == [[8, 1, 1], [0] * 4 + [1] * 4]
    assert "mesh data=1 over 2 TPU slices" in told["across"]


def test_a_weight_that_no_axis_divides_is_an_error():
    mesh = make_mesh(MeshShape(fsdp=4))
    with pytest.raises(ConfigError, match=r"shape \(45, 63\) cannot be split evenly 4 ways .*choose another mesh"):
        weight_sharding(mesh, (45, 63))
