"""A save that dies or fails at any of its operations: N operations, N+1 runs. What is found then is always whole."""

import builtins
import errno
import os

import fsspec
import numpy as np
import pytest

from kithara_ray.checkpoint import disk_format, saver
from kithara_ray.checkpoint.disk_format import Checkpoint, Keep
from kithara_ray.errors import DestinationError
from kithara_ray.sharding.gather import Shard
from kithara_ray.storage import places
from kithara_ray.storage.places import Place

DOCUMENT = {"identity": {}, "tensors": {}, "metrics": {}, "evaluations": [], "finished": None}


class Killed(BaseException):
    """As by SIGKILL: nothing that the process would do afterwards is done."""


class Faults:
    """Counts the operations that change what is stored, and lets one of them fail.

    Args:
        at: the number of the operation, from 1.
        dies: from there on nothing is done any more; else that operation alone fails, as on a full disk.
    """

    def __init__(self, monkeypatch, at=None, dies=False):
        self.count, self.at, self.dies = 0, at, dies
        for name in ("mkdir", "rename", "fsync", "remove", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))
        memory = type(fsspec.filesystem("memory"))
        for name in ("put_file", "rm_file"):
            monkeypatch.setattr(memory, name, self.wrap(getattr(memory, name)))
        opened = builtins.open
        writing = self.wrap(opened)
        choose = lambda file, mode="r", *a, **k: (writing if "w" in mode else opened)(file, mode, *a, **k)  # noqa: E731
        monkeypatch.setattr("io.open", choose)

    def wrap(self, call):
        def counted(*args, **kwargs):
            self.count += 1
            if self.at is not None and (self.count == self.at or (self.dies and self.count > self.at)):
                raise Killed if self.dies else OSError(errno.ENOSPC, "No space left on device")
            return call(*args, **kwargs)

        return counted


def values(step):
    return {"a": np.arange(6, dtype=np.float32).reshape(2, 3) + step, "step": np.int32(step)}


def save(where, step, attempt="00000000"):
    """The whole of a save but for the copy from the device: part, manifest, pruning to two."""
    keeper = saver.Saver(where, attempt, 0, 1, Keep(2), timeout_s=5)
    keeper.start()
    arrays = values(step)
    shards = [Shard(name, tuple((0, n) for n in array.shape), array, 0) for name, array in arrays.items()]
    shapes = {name: (array.shape, disk_format.tag_of(array.dtype)) for name, array in arrays.items()}
    keeper._write(step, shards, shapes, DOCUMENT, [{"kind": "step", "step": step}])
    keeper.check()


def assert_whole(found, step):
    assert found.step == step
    found.verify()
    for name, array in values(step).items():
        np.testing.assert_array_equal(found.read(name), array)


def fresh(kind, tmp_path, number):
    """A place with the checkpoints of steps 10 and 20."""
    if kind == "memory":
        fs = fsspec.filesystem("memory")
        fs.store.clear()
        fs.pseudo_dirs[:] = [""]
        where = Place("memory://bucket/checkpoints")
    else:
        where = Place(str(tmp_path / str(number)))
    for step in (10, 20):
        save(where, step)
    return where


@pytest.mark.parametrize("kind", ["local", "memory"])
@pytest.mark.parametrize("dies", [True, False], ids=["killed", "disk full"])
def test_failure_at_every_operation(kind, dies, tmp_path, monkeypatch, record_property):
    monkeypatch.setattr(places, "_ATTEMPTS", 1)
    where = fresh(kind, tmp_path, "count")
    with monkeypatch.context() as patch:
        counter = Faults(patch)
        save(where, 30, "0000000a")
    operations = counter.count
    record_property("operations", operations)
    assert operations > (12 if kind == "local" else 5)
    committed = 0
    for number in range(1, operations + 1):
        where = fresh(kind, tmp_path, number)
        with monkeypatch.context() as patch:
            faults = Faults(patch, number, dies)
            try:
                save(where, 30, "0000000a")
            except (Killed, DestinationError, OSError):
                pass
            assert faults.count >= number
        for name in disk_format.committed(where):
            assert_whole(Checkpoint.open(where, name), disk_format.step_of(name))
        # The process that comes after finds the last whole one, goes on and cleans up.
        found = saver.find(where, 0, 1, lambda text: [text])
        assert not found.notes
        assert_whole(found.checkpoint, found.checkpoint.step)
        assert found.checkpoint.step in (20, 30)
        committed += found.checkpoint.step == 30
        save(where, 40, "0000000b")
        names = [name for name in where.directories() if where.files(name)]
        steps = sorted(disk_format.step_of(name) for name in names)
        assert steps == sorted({found.checkpoint.step, 40}), number
        for name in names:
            assert_whole(Checkpoint.open(where, name), disk_format.step_of(name))
    # It fails before the manifest is there, and after.
    assert 0 < committed < operations
