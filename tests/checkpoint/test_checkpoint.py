"""Checkpoints as files: what is written is what is read, on any mesh; what is torn is never taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from stores import clear_memory

from kithara_ray.checkpoint import disk_format, saver
from kithara_ray.checkpoint.disk_format import Checkpoint, Keep
from kithara_ray.errors import CheckpointError, ConfigError, DestinationError, TrainingError
from kithara_ray.sharding.gather import Shard, local_shards
from kithara_ray.sharding.mesh import make_mesh
from kithara_ray.sharding.shape import MeshShape
from kithara_ray.storage import places
from kithara_ray.storage.places import Place

DOCUMENT = {"identity": {}, "tensors": {}, "metrics": {}, "evaluations": [], "finished": None}


def alone(text: str) -> list[str]:
    return [text]


@pytest.fixture(params=["local", "memory"])
def where(request, tmp_path):
    if request.param == "local":
        return Place(str(tmp_path / "checkpoints"))
    clear_memory()
    return Place("memory://bucket/checkpoints")


def state_on(mesh, seed=0):
    """Arrays split over both axes, over one, and whole; float32, bfloat16 and a scalar."""
    rng = np.random.default_rng(seed)
    specs = {
        "a": ((8, 12), jnp.float32, PartitionSpec("fsdp", "tensor")),
        "b": ((8, 3), jnp.bfloat16, PartitionSpec(("fsdp", "tensor"))),
        "c": ((5,), jnp.float32, PartitionSpec()),
    }
    params = {
        name: jax.device_put(rng.normal(size=shape).astype(dtype), NamedSharding(mesh, spec))
        for name, (shape, dtype, spec) in specs.items()
    }
    step = jax.device_put(jnp.int32(rng.integers(100)), NamedSharding(mesh, PartitionSpec()))
    return {"params": params, "opt": {"m": jax.tree.map(lambda x: x * 2, params)}, "step": step}


def save(where, step, state, attempt="00000000", keep=None, **document):
    keeper = saver.Saver(where, attempt, 0, 1, keep or Keep(None), timeout_s=5)
    keeper.start()
    keeper.save(step, state, DOCUMENT | document, [{"kind": "step", "step": step}])
    keeper.wait()
    return keeper


def found(where):
    return saver.find(where, 0, 1, alone)


def assert_equal(state, other):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), state, other)


@pytest.mark.parametrize("mesh", [MeshShape(fsdp=4), MeshShape(fsdp=2, tensor=2), MeshShape(fsdp=1, data=4)])
def test_restored_on_another_mesh(where, mesh):
    state = state_on(make_mesh(MeshShape(fsdp=2, tensor=2)))
    save(where, 7, state)
    result = found(where)
    assert result.checkpoint.step == 7
    assert result.checkpoint.events() == [{"kind": "step", "step": 7}]
    restored = saver.restore(result.checkpoint, state_on(make_mesh(mesh), seed=1))
    assert_equal(restored, state)
    assert restored["params"]["a"].sharding.mesh.shape["fsdp"] == make_mesh(mesh).shape["fsdp"]


def test_every_rank_writes_what_it_holds_and_reads_what_it_needs(where, monkeypatch):
    """Two ranks, one after the other in this process; a large part is read slice by slice."""
    state = state_on(make_mesh(MeshShape(fsdp=2, tensor=2)))
    arrays = saver.named_arrays(state)
    shards = [Shard(s.name, s.bounds, np.array(s.data), 0) for s in local_shards(arrays, 0)]
    shapes = {name: (array.shape, disk_format.tag_of(array.dtype)) for name, array in arrays.items()}
    directory = disk_format.directory_name(3, "0000000a")
    for rank in (1, 0):
        disk_format.write_part(where, directory, shards[rank::2], rank, 2)
        assert found(where).checkpoint is None
    disk_format.commit(where, directory, 2, shapes, DOCUMENT, [])
    monkeypatch.setattr(disk_format, "_WHOLE_BYTES", 0)
    opened = Checkpoint.open(where, directory)
    opened.verify()
    for name, array in arrays.items():
        np.testing.assert_array_equal(opened.read(name), np.asarray(array))
    part = opened.read("params/a", (slice(3, 7), slice(5, 6)))
    np.testing.assert_array_equal(part, np.asarray(arrays["params/a"])[3:7, 5:6])
    sizes = [size for _, size in disk_format.parts_of(where, directory, 2).values()]
    assert max(sizes) < 2 * min(sizes)


def test_a_slice_that_no_rank_wrote_is_named(where):
    part = Shard("a", ((0, 2), (0, 3)), np.zeros((2, 3), np.float32), 0)
    directory = disk_format.directory_name(3, "0000000a")
    disk_format.write_part(where, directory, [part], 0, 1)
    disk_format.commit(where, directory, 1, {"a": ((4, 3), "F32")}, DOCUMENT, [])
    opened = Checkpoint.open(where, directory)
    assert opened.read("a", (slice(0, 2), slice(1, 2))).shape == (2, 1)
    with pytest.raises(CheckpointError, match="its slices of 'a' hold 6 of 12 elements asked for"):
        opened.read("a")


def test_the_copy_is_of_the_step_it_was_made_at(where):
    """The next step writes into the buffers of the last one while they are being saved."""
    state = state_on(make_mesh())
    expected = jax.tree.map(np.array, state)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    keeper = saver.Saver(where, "00000000", 0, 1, Keep(None), timeout_s=5)
    keeper.save(1, state, DOCUMENT, [])
    for _ in range(3):
        state = step(state)
    jax.block_until_ready(state)
    keeper.wait()
    assert_equal(saver.restore(found(where).checkpoint, state_on(make_mesh(), seed=1)), expected)


def damage(where, directory, pattern):
    """Flip one bit in the middle of the file."""
    name = next(name for name in where.files(directory) if pattern in name)
    raw = bytearray(where.read(directory, name))
    raw[len(raw) // 2] ^= 1
    where.fs.pipe_file(where.path(directory, name), bytes(raw))


@pytest.mark.parametrize("pattern", ["safetensors", "events", "manifest"])
def test_a_damaged_newest_checkpoint_is_passed_over_and_named(where, pattern):
    mesh = make_mesh()
    for step in (10, 20):
        save(where, step, state_on(mesh, seed=step))
    damage(where, "step-00000020-00000000", pattern)
    result = found(where)
    assert result.checkpoint.step == 10
    assert len(result.notes) == 1
    assert "step-00000020-00000000" in result.notes[0]
    assert "damaged" in result.notes[0] or "cannot be read" in result.notes[0]
    assert_equal(saver.restore(result.checkpoint, state_on(mesh)), state_on(mesh, seed=10))
    damage(where, "step-00000010-00000000", pattern)
    with pytest.raises(CheckpointError, match="no checkpoint there is complete"):
        found(where)


def test_a_lost_part_is_seen(where):
    save(where, 5, state_on(make_mesh()))
    name = next(name for name in where.files("step-00000005-00000000") if "safetensors" in name)
    where.fs.rm_file(where.path("step-00000005-00000000", name))
    with pytest.raises(CheckpointError, match="cannot be read"):
        found(where)


def test_another_rank_that_sees_another_directory_is_named(where):
    save(where, 5, state_on(make_mesh()))
    with pytest.raises(CheckpointError, match="rank 1 sees different checkpoints there from rank 0"):
        saver.find(where, 0, 2, lambda text: [text, "|"])


def test_what_is_kept(where):
    mesh = make_mesh()
    state = state_on(mesh)
    for step in (10, 20, 30):
        keeper = save(where, step, state, keep=Keep(2))
    assert disk_format.committed(where) == ["step-00000030-00000000", "step-00000020-00000000"]
    assert keeper.newest.endswith("step-00000030-00000000")
    for step, loss in ((40, 1.0), (50, 3.0), (60, 2.0), (70, float("nan"))):
        keeper = save(where, step, state, keep=Keep(2, "eval_loss"), metrics={"eval_loss": loss})
    assert [disk_format.step_of(name) for name in disk_format.committed(where)] == [70, 40]
    assert keeper.best.endswith("step-00000040-00000000")


def test_the_newest_stays_even_if_it_is_the_worst():
    kept = {f"step-{step:08d}-00000000": {"m": value} for step, value in ((1, 5.0), (2, 4.0), (3, 1.0))}
    assert Keep(1, "m", "max").victims(kept) == ["step-00000001-00000000", "step-00000002-00000000"]
    assert Keep(2, "m", "max").victims(kept) == ["step-00000002-00000000"]
    assert Keep(None).victims(kept) == []


def test_evaluations_since_the_best():
    keep, other = Keep(1, "m", "min"), Keep(1, "m", "max")
    assert keep.since_best([3.0, 2.0, 2.0, 2.5]) == 2
    assert other.since_best([3.0, 2.0, 2.0, 2.5]) == 3
    assert keep.since_best([3.0, float("nan"), 1.0]) == 0
    assert keep.since_best([float("nan")] * 2) == 2
    assert keep.since_best([]) == 0


def test_unfinished_saves_of_earlier_attempts_are_cleared(where):
    state = state_on(make_mesh())
    disk_format.write_part(where, disk_format.directory_name(9, "0000000b"), [], 0, 2)
    where.put_bytes(b"", f"{saver.PROBE}0000000b", "00001")
    assert found(where).checkpoint is None
    save(where, 10, state)
    # A directory is a name where files are: an empty one is none on an object store.
    assert [name for name in where.directories() if where.files(name)] == ["step-00000010-00000000"]


def test_a_rank_that_does_not_write_is_named(where):
    keeper = saver.Saver(where, "00000000", 0, 2, Keep(None), timeout_s=0.0)
    keeper.save(4, state_on(make_mesh()), DOCUMENT, [])
    with pytest.raises(TrainingError, match="rank 1 has not written its part after 0 s"):
        keeper.wait()
    assert found(where).checkpoint is None


def test_other_arrays_are_refused(where):
    state = state_on(make_mesh())
    save(where, 1, state)
    other = state_on(make_mesh())
    other["params"]["c"] = jnp.zeros(6)
    with pytest.raises(ConfigError, match=r"params/c is \(\[5\], 'F32'\), this run's is \(\[6\], 'F32'\)"):
        saver.restore(found(where).checkpoint, other)
    del other["params"]["c"]
    with pytest.raises(ConfigError, match="holds params/c, which this run does not have"):
        saver.restore(found(where).checkpoint, other)


def test_another_run_is_refused_by_what_differs(where):
    identity = {"seed": 3, "data": {"rows": 10, "global_batch_rows": 8}, "lora": {"target_modules": ("a", "b")}}
    save(where, 1, state_on(make_mesh()), identity=identity)
    opened = found(where).checkpoint
    disk_format.check_identity(opened, identity, ())
    with pytest.raises(ConfigError, match="another seed: it was 3 and is 4"):
        disk_format.check_identity(opened, identity | {"seed": 4}, ("data",))
    other = identity | {"data": {"rows": 10, "global_batch_rows": 16}}
    with pytest.raises(ConfigError, match="another data: global_batch_rows was 8 and is 16"):
        disk_format.check_identity(opened, other, ())
    disk_format.check_identity(opened, other, ("data",))


def test_a_failing_object_store_is_tried_again_then_named(monkeypatch):
    fs = clear_memory()
    where, original, calls = Place("memory://bucket/checkpoints"), type(fs).put_file, []
    monkeypatch.setattr(places, "_FIRST_PAUSE_S", 0.001)

    def flaky(self, *args, **kwargs):
        calls.append(1)
        if len(calls) % 3:
            raise OSError("503 service unavailable")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(fs), "put_file", flaky)
    save(where, 1, state_on(make_mesh()))
    assert found(where).checkpoint.step == 1
    assert len(calls) == 9
    monkeypatch.setattr(type(fs), "put_file", lambda *_, **__: (_ for _ in ()).throw(OSError("503 for good")))
    with pytest.raises(DestinationError, match=r"failed 4 time\(s\) \(OSError: 503 for good\)"):
        save(where, 2, state_on(make_mesh()))
    assert found(where).checkpoint.step == 1
