"""Copies that differ are found, wherever they stand; parts that are held once are not compared."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kithara_ray.errors import CheckpointError
from kithara_ray.sharding.agree import check_copies
from kithara_ray.sharding.mesh import make_mesh, weight_sharding
from kithara_ray.sharding.shape import MeshShape

LAYOUTS = {
    "whole on each": (MeshShape(), PartitionSpec()),
    "split over fsdp, copied over data": (MeshShape(data=2), PartitionSpec(None, "fsdp")),
}


# A weight that four devices do not divide: two halves, each on two of them.
UNEVEN = np.arange(46 * 63, dtype=np.float32).reshape(46, 63)


def array(mesh, spec, values, damage=None):
    """A global array of `values`; `damage(device number, block)` changes what one device holds."""
    sharding = NamedSharding(mesh, spec)
    blocks = []
    for number, device in enumerate(mesh.devices.flat):
        block = np.array(values[sharding.devices_indices_map(values.shape)[device]])
        if damage:
            damage(number, block)
        blocks.append(jax.device_put(block, device))
    return jax.make_array_from_single_device_arrays(values.shape, sharding, blocks)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_flipped_bit_or_two_swapped_elements_are_found(layout, dtype):
    shape, spec = LAYOUTS[layout]
    mesh = make_mesh(shape)
    values = (np.arange(48).reshape(6, 8) % 50).astype(dtype)

    def flip(number, block):
        if number == 3:
            block.view(np.uint8)[-1, -1] ^= 0x80

    def swap(number, block):
        if number == 3:
            block[0, 0], block[0, 1] = block[0, 1].copy(), block[0, 0].copy()

    assert check_copies(mesh, {"good": array(mesh, spec, values)}) == 1
    for damage in (flip, swap):
        arrays = {"good": array(mesh, spec, values), "model.norm.weight": array(mesh, spec, values, damage)}
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight: rank 0 holds different bits from rank 0"):
            check_copies(mesh, arrays)


def test_parts_that_no_other_device_holds_are_not_compared():
    mesh = make_mesh()
    split = array(mesh, PartitionSpec("fsdp"), np.arange(8, dtype=np.float32))
    assert check_copies(mesh, {"split": split}) == 0


def test_copies_of_a_weight_that_the_mesh_does_not_divide_are_compared():
    mesh = make_mesh()
    layout = weight_sharding(mesh, UNEVEN.shape)
    good, other = array(layout.mesh, layout.spec, UNEVEN), array(mesh, PartitionSpec(), UNEVEN)
    assert check_copies(mesh, {"uneven": good, "whole": other}) == 2

    def change(number, block):
        if number == 1:
            block[0, 0] = -1

    with pytest.raises(CheckpointError, match=r"model\.w: rank 0 holds different bits"):
        check_copies(mesh, {"whole": other, "model.w": array(layout.mesh, layout.spec, UNEVEN, change)})
