"""Files that are whole or not there, on a local disk."""

import os

import pytest

from kithara_ray.storage import atomic
from kithara_ray.storage.atomic import AtomicFile, rename_durably, write_atomic


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "state.json"
    write_atomic(path, b"before")
    with AtomicFile(path) as stream:
        stream.write(b"af")
        assert path.read_bytes() == b"before"
        stream.write(b"ter")
    assert path.read_bytes() == b"after"
    assert os.listdir(tmp_path) == ["state.json"]


def test_what_fails_leaves_the_file_of_before_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_atomic(path, b"before")

    def torn():
        with AtomicFile(path) as stream:
            stream.write(b"half")
            raise ValueError("torn")

    with pytest.raises(ValueError, match="torn"):
        torn()
    monkeypatch.setattr(AtomicFile, "write", lambda self, data: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, b"after")
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_renamed_file_and_its_names_are_forced_onto_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(atomic, "sync", synced.append)
    source, target = tmp_path / "new", tmp_path / "runs" / "step-1" / "part"
    source.write_bytes(b"whole")
    rename_durably(source, target)
    assert target.read_bytes() == b"whole"
    assert synced == [source, target.parent, target.parent.parent]
