import os
from pathlib import Path

import pytest

from kithara_ray.errors import DestinationError
from kithara_ray.hf.publish import publish
from kithara_ray.storage import urls


def _names(directory: Path) -> set[str]:
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


def test_join():
    assert urls.join("gs://b/x/", "adapter", "f") == "gs://b/x/adapter/f"
    assert urls.join("/a/b", "c") == "/a/b/c"


def test_check_destination_local(tmp_path):
    publish.check_destination(str(tmp_path / "a/b/c"))
    publish.check_destination(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    with pytest.raises(DestinationError, match="full exists and is not empty"):
        publish.check_destination(str(tmp_path / "full"))
    with pytest.raises(DestinationError, match="x exists and is a file"):
        publish.check_destination(str(tmp_path / "full/x"))
    with pytest.raises(DestinationError, match="cannot be written"):
        publish.check_destination(str(tmp_path / "full/x/below"))
    with pytest.raises(DestinationError, match=r"/proc cannot be written"):
        publish.check_destination("/proc/here")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(DestinationError, match="dangling link"):
        publish.check_destination(str(tmp_path / "link"))


def test_check_destination_remote(memory, monkeypatch):
    publish.check_destination("memory://bucket/new")
    assert memory.find("/") == []
    memory.pipe("/bucket/full/x", b"1")
    with pytest.raises(DestinationError, match=r"memory://bucket/full exists and is not empty \(/bucket/full/x\)"):
        publish.check_destination("memory://bucket/full")
    with pytest.raises(DestinationError, match="exists and is not empty"):
        publish.check_destination("memory://bucket/full/x")
    with pytest.raises(DestinationError, match="expected hf://org/name, an empty repository"):
        publish.check_destination("hf://name")

    def denied(*_, **__):
        raise PermissionError("403")

    monkeypatch.setattr(type(memory), "pipe_file", denied)
    with pytest.raises(DestinationError, match=r"an object could not be written there .PermissionError: 403"):
        publish.check_destination("memory://bucket/new")


def test_staged_local(tmp_path):
    target = tmp_path / "deep/er/out"
    with publish.staged(str(target)) as stage:
        assert stage.directory.parent == target.parent  # the same filesystem
        assert stage.directory.name.startswith(".")
        (stage.directory / "adapter").mkdir()
        (stage.directory / "adapter/x").write_text("1")
        assert not target.exists()
    assert _names(target) == {"adapter/x"}
    assert list(target.parent.iterdir()) == [target]
    (tmp_path / "empty").mkdir()
    with publish.staged(str(tmp_path / "empty")) as stage:
        (stage.directory / "y").touch()
    assert _names(tmp_path / "empty") == {"y"}


def test_staged_local_failure_leaves_nothing(tmp_path):
    def fail():
        with publish.staged(str(tmp_path / "deep/out")) as stage:
            (stage.directory / "x").touch()
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_staged_local_does_not_replace_what_appeared_meanwhile(tmp_path):
    def race():
        with publish.staged(str(tmp_path / "out")) as stage:
            (stage.directory / "x").touch()
            (tmp_path / "out").mkdir()
            (tmp_path / "out/theirs").touch()

    with pytest.raises(DestinationError, match="was it filled meanwhile"):
        race()
    assert _names(tmp_path) == {"out/theirs"}


def test_files_are_synced_before_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(os, "rename", lambda a, b: calls.append("rename") or rename(a, b))
    with publish.staged(str(tmp_path / "out")) as stage:
        (stage.directory / "x").touch()
    assert calls == [f"{stage.directory}/x", str(stage.directory), "rename", str(tmp_path)]


def test_staged_remote_puts_config_last(memory, monkeypatch):
    order = []
    original = type(memory).put_file
    monkeypatch.setattr(type(memory), "put_file", lambda s, a, b, **k: order.append(b) or original(s, a, b, **k))
    with publish.staged("memory://bucket/out") as stage:
        for name in ("config.json", "adapter/adapter_config.json", "z.safetensors", "adapter/a.safetensors"):
            (stage.directory / name).parent.mkdir(exist_ok=True)
            (stage.directory / name).write_text(name)
        assert memory.find("/") == ["/bucket/out/.kithara_ray_unfinished"]
    assert [name.removeprefix("/bucket/out/") for name in order[-2:]] == ["adapter/adapter_config.json", "config.json"]
    assert len(memory.find("/bucket/out")) == 4
    assert memory.cat("/bucket/out/adapter/a.safetensors") == b"adapter/a.safetensors"
    assert not stage.directory.exists()


def test_staged_remote_failures_publish_nothing(memory, monkeypatch):
    def export(error: Exception | None = None):
        with publish.staged("memory://bucket/out") as stage:
            (stage.directory / "a").write_text("a")
            (stage.directory / "config.json").write_text("{}")
            if error:
                raise error

    with pytest.raises(RuntimeError, match="boom"):
        export(RuntimeError("boom"))
    assert memory.find("/") == []
    original = type(memory).put_file

    def half(self, local, remote, **kwargs):
        if remote.endswith("config.json"):
            raise OSError("connection reset")
        return original(self, local, remote, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "put_file", half)
        with pytest.raises(DestinationError, match=r"upload failed .OSError: connection reset.; the export is not"):
            export()
    assert memory.find("/") == []

    def short(self, local, remote, **kwargs):
        self.pipe_file(remote, b"")

    monkeypatch.setattr(type(memory), "put_file", short)
    with pytest.raises(DestinationError, match=r"bucket/out/a holds 0 of 1 bytes"):
        export()
    assert memory.find("/") == []
