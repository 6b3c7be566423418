"""The facts of one cluster node: versions, memory, disk, accelerators and their holders. Imports no jax, no keras."""

import glob
import importlib.metadata
import os
import platform
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path

import ray

from kithara_ray.orchestration.cluster import ray_compat
from kithara_ray.storage.urls import cache_dir

# These must be equal on all nodes: pickles, protocols and private interfaces cross between nodes.
PACKAGES = ("ray", "jax", "jaxlib", "keras", "keras-hub", "kithara-ray", "numpy", "transformers")
TPU_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*")


@dataclass(frozen=True)
class NodeFacts:
    """The facts of one node.

    Attributes:
        versions: package -> version, and "python"; a package that is not installed is absent.
        ram_bytes, ram_free_bytes: memory of the host, or of the container's limit.
        cache_free_bytes: free disk in the cache of bases from object stores.
        tpu_files: device files of TPUs.
        holders: (device file, pid, process name) of processes that have one open, as far as this user may see.
    """

    host: str
    versions: dict[str, str]
    ram_bytes: int
    ram_free_bytes: int
    cache_free_bytes: int
    tpu_files: tuple[str, ...] = ()
    holders: tuple[tuple[str, int, str], ...] = field(default=())


def look() -> NodeFacts:
    """Return the facts of the node that this process runs on."""
    total, free = _memory()
    files = tuple(sorted(path for pattern in TPU_FILES for path in glob.glob(pattern)))
    return NodeFacts(
        host=socket.gethostname(),
        versions=versions(),
        ram_bytes=total,
        ram_free_bytes=free,
        cache_free_bytes=free_disk(cache_dir()),
        tpu_files=files,
        holders=holders_of(files),
    )


def versions() -> dict[str, str]:
    """Return the versions in this process's environment, without importing any of the packages."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _memory() -> tuple[int, int]:
    """Return (total, available) bytes."""
    total, used = ray_compat.host_memory()
    return total, max(0, total - used)


def free_disk(path: str | Path) -> int:
    """Return the free bytes at `path`, which may not exist yet."""
    path = Path(path).expanduser().absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def holders_of(files: tuple[str, ...]) -> tuple[tuple[str, int, str], ...]:
    """Return (file, pid, process name) of every process that has one of the files open, from /proc."""
    wanted, found = set(files), set()
    for link in glob.glob("/proc/[0-9]*/fd/*") if wanted else ():
        try:
            target = os.readlink(link)
            if target in wanted:
                pid = int(link.split("/")[2])
                found.add((target, pid, Path(f"/proc/{pid}/comm").read_text().strip()))
        except OSError:  # the process ended meanwhile, or belongs to another user
            continue
    return tuple(sorted(found))


@ray.remote(num_cpus=0, max_retries=0)
def look_there() -> NodeFacts:
    """Run `look` as a task."""
    return look()
