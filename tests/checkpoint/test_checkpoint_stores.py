"""Checkpoints on gs:// and s3://, on emulators of the two."""

import fsspec
import numpy as np
import pytest
from stores import gs_emulator, s3_emulator

from kithara_ray.checkpoint import disk_format, saver
from kithara_ray.checkpoint.disk_format import Checkpoint, Keep
from kithara_ray.sharding.gather import Shard
from kithara_ray.storage.places import Place

DOCUMENT = {"identity": {}, "tensors": {}, "metrics": {}, "evaluations": [], "finished": None}


@pytest.fixture(params=["gs", "s3"])
def where(request, monkeypatch):
    with {"gs": gs_emulator, "s3": s3_emulator}[request.param]() as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        # gcsfs reads its environment when it is imported.
        kind = fsspec.get_filesystem_class(request.param)
        kind.clear_instance_cache()
        Place(f"{request.param}://of-checkpoints").fs.mkdir("of-checkpoints")
        yield Place(f"{request.param}://of-checkpoints/deep/run")
        kind.clear_instance_cache()


def test_on_an_object_store(where, monkeypatch):
    """Two ranks; kept, read slice by slice, damaged, passed over, cleared."""
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    shapes = {"a": (whole.shape, "F32")}
    monkeypatch.setattr(disk_format, "_WHOLE_BYTES", 0)
    assert saver.find(where, 0, 1, lambda text: [text]).checkpoint is None
    keepers = [saver.Saver(where, "0000000a", rank, 2, Keep(2), timeout_s=30) for rank in (0, 1)]
    keepers[0].start()
    for step in (10, 20, 30):
        for rank in (1, 0):
            part = Shard("a", ((2 * rank, 2 * rank + 2), (0, 6)), whole[2 * rank : 2 * rank + 2] + step, rank)
            keepers[rank]._write(step, [part], shapes, DOCUMENT, [{"kind": "step", "step": step}])
            keepers[rank].check()
    assert [disk_format.step_of(name) for name in disk_format.committed(where)] == [30, 20]
    found = saver.find(where, 0, 1, lambda text: [text]).checkpoint
    np.testing.assert_array_equal(found.read("a"), whole + 30)
    np.testing.assert_array_equal(found.read("a", (slice(1, 3), slice(4, 6))), whole[1:3, 4:6] + 30)
    assert found.events() == [{"kind": "step", "step": 30}]
    part = next(name for name in found.files if name.endswith(".safetensors"))
    raw = where.read(found.directory, part)
    where.fs.pipe_file(where.path(found.directory, part), raw[:-1] + bytes([raw[-1] ^ 1]))
    result = saver.find(where, 0, 1, lambda text: [text])
    assert result.checkpoint.step == 20
    assert "damaged" in result.notes[0]
    where.fs.rm_file(where.path(found.directory, disk_format.MANIFEST))
    keeper = saver.Saver(where, "0000000b", 0, 1, Keep(2), timeout_s=30)
    keeper.start()
    assert [name for name in where.directories() if where.files(name)] == ["step-00000020-0000000a"]
    assert Checkpoint.open(where, "step-00000020-0000000a").step == 20
