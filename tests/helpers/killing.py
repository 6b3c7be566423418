"""Exports that are killed or fail at their n-th mutating operation, each in a process of its own.

Run as a script this is a server that has everything imported and forks for each job: a JSON line in, a JSON line out.
Mutating operations are HTTP requests other than GET and HEAD, and for local destinations what Python's audit events
tell of: files opened for writing, made, renamed, removed.

Failures are never injected as SystemExit or KeyboardInterrupt inside a coroutine: fsspec runs all of them in one
thread, which ends then, and every later call of any filesystem waits for ever.
"""

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time

KILLED = 77
STALLED_S = 60


class Server:
    """What a test talks to."""

    def __init__(self, **env: str):
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | env, text=True
        )

    def run(self, **job) -> dict:
        """{"status": exit code, "error": text or None, "mutations": how many there were, ...}"""
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        reply = json.loads(self.process.stdout.readline())
        assert reply["status"] != "stalled", (job, reply)
        return reply

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Injector:
    """Counts mutating operations and strikes at one: "kill" before it, "fail" instead of it, "lost" after it."""

    def __init__(self, mode: str | None, at: int | None):
        self.mode, self.at, self.seen = mode, at, []

    def before(self, what: str) -> None:
        self.seen.append(what)
        if len(self.seen) == self.at and self.mode == "kill":
            os._exit(KILLED)
        if len(self.seen) == self.at and self.mode == "fail":
            raise PermissionError(f"injected at operation {self.at}: {what}")

    def after(self, number: int) -> None:
        if number == self.at and self.mode == "lost":
            raise PermissionError(f"injected after operation {self.at}")

    def watch_requests(self) -> None:
        import aiohttp

        original = aiohttp.ClientSession._request

        async def request(session, method, url, **kwargs):
            if method.upper() in ("GET", "HEAD"):
                return await original(session, method, url, **kwargs)
            self.before(f"{method} {url}")
            number = len(self.seen)
            response = await original(session, method, url, **kwargs)
            self.after(number)
            return response

        aiohttp.ClientSession._request = request

    def watch_hub(self) -> None:
        import httpx2 as httpx

        original = httpx.Client.send

        def send(client, request, **kwargs):
            if request.method in ("GET", "HEAD") or request.url.path.startswith("/api/validate"):
                return original(client, request, **kwargs)
            self.before(f"{request.method} {request.url}")
            number = len(self.seen)
            response = original(client, request, **kwargs)
            self.after(number)
            return response

        httpx.Client.send = send

    def watch_files(self) -> None:
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

        def hook(event: str, args: tuple) -> None:
            if event == "open" and isinstance(args[0], str) and args[2] & writing and not args[0].startswith("/dev"):
                self.before(f"open {args[0]}")
            elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"):
                self.before(f"{event} {args[0]}")

        sys.addaudithook(hook)


def snapshot(url: str) -> dict:
    """name -> SHA-256 of everything below a destination; the report's files stand beside it."""
    import hashlib

    from kithara_ray.errors import DestinationError
    from kithara_ray.storage.urls import filesystem

    fs, root = filesystem(url, DestinationError)
    objects = {}
    for name in fs.find(root):
        raw = fs.cat_file(name)
        objects[name.removeprefix(root).lstrip("/")] = hashlib.sha256(raw).hexdigest()
    report = fs.cat_file(f"{root}/export_report.json") if "export_report.json" in objects else b"{}"
    return {"objects": objects, "report": json.loads(report).get("files", {})}


def export(job: dict) -> dict:
    from kithara_ray.errors import KitharaRayError
    from kithara_ray.hf.adapter import Adapter
    from kithara_ray.hf.checkpoint import BaseCheckpoint
    from kithara_ray.hf.exports.export import export

    base, adapter = BaseCheckpoint.at(job["base"]), Adapter.read(job["adapter"])
    injector = Injector(job.get("mode"), job.get("at"))
    if job["url"].startswith("hf://"):
        injector.watch_hub()
    elif "://" in job["url"]:
        injector.watch_requests()
    else:
        injector.watch_files()
    error = None
    try:
        export(base, adapter, job["url"], job["layout"], base_name="org/name", resume=job.get("resume", False))
    except (KitharaRayError, PermissionError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    return {"error": error, "mutations": injector.seen}


def check(job: dict) -> dict:
    from kithara_ray.errors import KitharaRayError
    from kithara_ray.hf.publish.publish import check_destination

    try:
        check_destination(job["url"])
    except KitharaRayError as caught:
        return {"error": f"{type(caught).__name__}: {caught}"}
    return {"error": None}


def call(job: dict) -> dict:
    """A function of fsspec by name: to prepare a store, or to break it."""
    from kithara_ray.errors import DestinationError
    from kithara_ray.storage.urls import filesystem

    fs, root = filesystem(job["url"], DestinationError)
    getattr(fs, job["function"])(root, *job.get("args", []))
    return {"error": None}


def in_a_child(job: dict) -> dict:
    """Run one job in a fork; what it returns, or how it ended."""
    reading, writing = os.pipe()
    # The next job would remove what is left of a killed one, which would count among its operations.
    temporary = tempfile.mkdtemp()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        tempfile.tempdir = temporary
        try:
            result = {"export": export, "snapshot": lambda j: snapshot(j["url"]), "check": check, "call": call}[
                job["action"]
            ](job)
        except BaseException as error:
            result = {"crash": repr(error)}
        os.write(writing, json.dumps(result).encode())
        os._exit(0)
    os.close(writing)
    raw, deadline = b"", time.monotonic() + STALLED_S
    while select.select([reading], [], [], max(0, deadline - time.monotonic()))[0]:
        chunk = os.read(reading, 1 << 20)
        if not chunk:
            break
        raw += chunk
    else:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return {"status": "stalled"}
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"status": status, **(json.loads(raw) if raw else {})}


def serve() -> None:
    # All that exports need, before the first fork; no thread is started by importing.
    import aiobotocore.session  # noqa: F401
    import botocore.loaders
    import botocore.session
    import gcsfs  # noqa: F401
    import huggingface_hub.hf_api
    import huggingface_hub.hf_file_system  # noqa: F401
    import s3fs

    import kithara_ray.hf.exports.export  # noqa: F401

    s3fs.S3FileSystem.retries = 1
    # The description of S3's API, read by every new client, is megabytes of JSON: once is enough.
    load = functools.lru_cache(None)(botocore.loaders.JSONFileLoader().load_file)
    botocore.loaders.JSONFileLoader.load_file = lambda self, path: load(path)
    botocore.session.get_session().create_client("s3", region_name="us-east-1")
    for line in sys.stdin:
        reply = in_a_child(json.loads(line))
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
