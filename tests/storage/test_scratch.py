"""Temporary directories whose process is killed."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kithara_ray.storage.scratch import scratch

HOLD = """
from kithara_ray.storage.scratch import scratch

with scratch() as directory:
    (directory / "part").write_bytes(b"of a base")
    print(directory, flush=True)
    input()
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def other(place):
    """(another process with a directory of its own, that directory)."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"TMPDIR": str(place)},
    )
    with process:
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_it_is_removed_and_those_of_the_living_stay(place, other):
    process, held = other
    with scratch() as first, scratch() as second:
        assert {first, second, held} == set(place.iterdir())
        (first / "deep").mkdir()
    assert list(place.iterdir()) == [held]
    process.communicate("\n")
    assert process.returncode == 0
    assert list(place.iterdir()) == []


def test_the_next_one_removes_what_a_killed_process_left(place, other):
    process, left = other
    process.kill()
    process.wait()
    assert (left / "part").exists()
    with scratch() as directory:
        assert list(place.iterdir()) == [directory]


def test_a_link_and_the_files_of_others_stay(place, tmp_path_factory):
    target = tmp_path_factory.mktemp("target")
    (place / "kithara_ray_scratch_link").symlink_to(target)
    (place / "kithara_ray_scratch_file").touch()
    (place / "another").mkdir()
    with scratch():
        pass
    assert {path.name for path in place.iterdir()} == {
        "kithara_ray_scratch_link",
        "kithara_ray_scratch_file",
        "another",
    }
    assert target.exists()
