"""Which devices the axes of a mesh hold, on slices that the TPU's own library describes."""

import json
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

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
    assert told["automatic"] == [[2, 4, 1, 1], [0] * 4 + [1] * 4]
    assert told["half"] == [[4, 2, 1, 1], [0] * 4 + [1] * 4]
    assert told["whole"] == [[8, 1, 1, 1], [0] * 4 + [1] * 4]
    assert "mesh data=1 over 2 TPU slices" in told["across"]


# shape -> (shape of a device's part, number of copies) on fsdp=4 and on fsdp=2 x tensor=2.
UNEVEN = {
    (46, 63): (((23, 63), 2), ((23, 63), 2)),
    (45, 66): (((45, 33), 2), ((45, 33), 2)),
    (45, 63): (((45, 63), 4), ((45, 63), 4)),
    (4, 30, 90): (((1, 30, 90), 1), ((1, 30, 90), 1)),
}


@pytest.mark.parametrize("shape", UNEVEN)
@pytest.mark.parametrize("mesh", [MeshShape(fsdp=4), MeshShape(fsdp=2, tensor=2)])
def test_a_weight_is_split_over_as_many_devices_as_divide_it(mesh, shape):
    made = make_mesh(mesh)
    part, copies = UNEVEN[shape][mesh.tensor == 2]
    layout = weight_sharding(made, shape)
    assert layout.shard_shape(shape) == part
    held = Counter(tuple((s.start, s.stop) for s in layout.devices_indices_map(shape)[d]) for d in made.devices.flat)
    assert set(held.values()) == {copies}


def test_of_two_axes_both_split_what_they_can():
    """12 over fsdp=4 and tensor=2: two ways by tensor, of each half 6 two ways by fsdp, in the mesh's order."""
    made = Mesh(np.array(jax.devices() * 2)[:8].reshape(1, 4, 2), ("data", "fsdp", "tensor"))
    layout = weight_sharding(
        SimpleNamespace(shape=dict(data=1, fsdp=4, expert=1, tensor=2), devices=made.devices), (12, 513)
    )
    assert dict(layout.mesh.shape) == {"data": 1, "fsdp": 2, "copies": 2, "tensor": 2}
    assert layout.spec == PartitionSpec(("fsdp", "tensor"), None)
    assert layout.mesh.devices.ravel().tolist() == made.devices.ravel().tolist()


def test_experts_are_on_their_axis_and_other_weights_on_all():
    """Two of eight experts on each of four devices; of two by two devices each has four experts, split inside."""
    made = make_mesh(MeshShape(expert=4))
    assert weight_sharding(made, (3, 8, 64, 32), whole_dims=1, experts=1).shard_shape((3, 8, 64, 32)) == (3, 2, 64, 32)
    assert weight_sharding(made, (64, 128), prefer=(0,)).shard_shape((64, 128)) == (16, 128)
    both = make_mesh(MeshShape(fsdp=2, expert=2))
    assert weight_sharding(both, (3, 8, 64, 32), whole_dims=1, experts=1).shard_shape((3, 8, 64, 32)) == (3, 4, 32, 32)
    assert weight_sharding(both, (64, 128)).shard_shape((64, 128)) == (64, 32)


def test_stacked_blocks_stay_whole():
    layout = weight_sharding(make_mesh(MeshShape(fsdp=4)), (8, 46, 63), whole_dims=1)
    assert layout.shard_shape((8, 46, 63)) == (8, 23, 63)
