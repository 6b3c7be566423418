"""Run a job on another cluster through Ray's job API: pack the working directory, start, follow, stop.

The job is `python -m kithara_ray train CONFIG`, or `tune`, in a copy of the directory. If the cluster asks for a token,
it comes from Ray's own settings (RAY_AUTH_MODE=token with RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN). It is never an
argument.
"""

import asyncio
import json
import logging
import os
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from kithara_ray.errors import ClusterError, ConfigError, TrainingError
from kithara_ray.orchestration.cluster import ray_compat
from kithara_ray.orchestration.cluster.run_name import check_run_name
from kithara_ray.orchestration.driver.packed import check_packed
from kithara_ray.orchestration.driver.run_manifest import GIT_VARIABLE, git_revision
from kithara_ray.redact import is_secret_name
from kithara_ray.yaml_file import override, read_yaml, variables_of

logger = logging.getLogger(__name__)

LIMIT_BYTES = 100 * 1024**2  # maximum size of Ray's packages
EXCLUDED = (".git", ".venv", "venv", "__pycache__", ".pytest_cache", ".ruff_cache", "runs", "*.safetensors")
_ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
_ZIPPED_TO_SEE = 10  # above this multiple of the limit, no compression is enough
_RETRY_S = 2.0
_QUIET_S = 120.0  # seconds without output after which the log is requested again
# Errors of requests, aiohttp and Ray for a server that is gone, refuses or sends an invalid answer.
_FAILURES = (OSError, RuntimeError, ValueError, aiohttp.ClientError, asyncio.TimeoutError, RayError)


def connect(address: str) -> JobSubmissionClient:
    """Connect to the job server at `http://HEAD:8265`. Raises ConfigError for any other URL form; ClusterError."""
    if problem := _not_an_address(address):
        raise ConfigError(f"--address: {problem}; give the dashboard's URL, e.g. http://HEAD:8265")
    # Ray would otherwise prefer these variables to the given address.
    with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        try:
            return JobSubmissionClient(address)
        except _FAILURES as error:
            raise ClusterError(f"{address}: {_reason(error)}") from error


def _not_an_address(address: str) -> str | None:
    """Return why a text is not the URL of a dashboard, or None. The reason never quotes it: it may hold a password."""
    if not address.startswith(("http://", "https://")):
        return "no URL of http:// or https://"
    if any(character.isspace() or not character.isprintable() for character in address):
        return "the URL holds a space or a control character"
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
        (host or "").encode("idna")
    except ValueError as error:
        return f"the URL is malformed ({error})"
    if not host:
        return "the URL names no host"
    if parts.username or parts.password:
        return "the URL holds a user or password; a token is taken from RAY_AUTH_TOKEN_PATH"
    return None


class _without:
    """Remove variables from the environment for a while."""

    def __init__(self, *names: str):
        self._names = names

    def __enter__(self) -> None:
        self._kept = {name: os.environ.pop(name) for name in self._names if name in os.environ}

    def __exit__(self, *exc: Any) -> None:
        os.environ.update(self._kept)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if "401" in text or "403" in text or "uthenticat" in text or "uthoriz" in text:
        return (
            f"the cluster does not take this token ({text[:200]}); set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to "
            "the cluster's token file"
        )
    if "status code" in text:
        return f"the job server says: {text[:300]}"
    return f"no job server answers there ({text[:200]}); check the address, and that the port is forwarded"


def package_files(directory: Path) -> dict[Path, int]:
    """Return the size of each file that Ray would pack, by Ray's own rules: EXCLUDED, .gitignore and .rayignore."""
    sizes: dict[Path, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[path] = path.stat().st_size

    ray_compat.walk_package(directory, EXCLUDED, note)
    return sizes


def check_size(directory: Path) -> int:
    """Return the total bytes of the files to pack. Raises ConfigError if the package would exceed Ray's limit."""
    sizes = package_files(directory)
    total = packed = sum(sizes.values())
    if LIMIT_BYTES < total < _ZIPPED_TO_SEE * LIMIT_BYTES:
        packed = _zipped_bytes(directory)
    if packed > LIMIT_BYTES:
        largest = sorted(sizes, key=lambda path: sizes[path], reverse=True)[:3]
        shown = ", ".join(f"{path.relative_to(directory)} {sizes[path] / 1e6:.0f} MB" for path in largest)
        raise ConfigError(
            f"{directory} has {total / 1e6:.0f} MB, packed more than Ray's limit of {LIMIT_BYTES / 1e6:.0f} MB; the "
            f"largest: {shown}. List them in .rayignore, or give --working-dir; give data and models as URLs"
        )
    return total


def _zipped_bytes(directory: Path) -> int:
    with tempfile.TemporaryDirectory(prefix="kithara_ray_package_") as scratch:
        target = Path(scratch, "package.zip")
        ray_compat.write_package(directory, EXCLUDED, target)
        return target.stat().st_size


def submit(
    client: JobSubmissionClient,
    config: Path,
    overrides: Sequence[str] = (),
    working_dir: Path = Path(),
    python: str = "python",
    command: str = "train",
) -> str:
    """Start the run, and return the job's id.

    Args:
        config: a file under `working_dir`.
        overrides: `--set` options of the run. They are part of the job's command, which the dashboard shows.
        python: the interpreter on the head node.
        command: "train" or "tune".

    Raises:
        ConfigError: the configuration is outside the directory; the job's copy would lack it or a file that it reads;
            or the directory is too large.
        ClusterError: the job server refused.
    """
    working_dir = working_dir.resolve()
    if not working_dir.is_dir():
        raise ConfigError(f"{working_dir} is no directory; give the job's with --working-dir")
    try:
        inside = config.resolve().relative_to(working_dir)
    except ValueError:
        raise ConfigError(
            f"{config} is not in {working_dir}, the directory that the job gets; give --working-dir"
        ) from None
    _check_reads(config.resolve(), overrides, working_dir)
    size = check_size(working_dir)
    logger.info("packing %s: bytes=%d", working_dir, size)
    words = [python, "-m", "kithara_ray", command, inside.as_posix()]
    words += [word for override in overrides for word in ("--set", override)]
    revision = git_revision(working_dir)
    env = _variables(config, overrides)
    env |= {GIT_VARIABLE: json.dumps(revision)} if revision else {}  # the copy has no .git
    runtime_env = {"working_dir": str(working_dir), "excludes": list(EXCLUDED), "env_vars": env}
    return start(client, shlex.join(words), runtime_env)


def _variables(config: Path, overrides: Sequence[str]) -> dict[str, str]:
    """Return the environment variables that the configuration reads, with their values here.

    The dashboard shows a job's variables, so one that may hold a secret is left to the cluster.
    """
    texts = [config.read_text(encoding="utf-8"), *(f"value: {change.partition('=')[2]}" for change in overrides)]
    names = dict.fromkeys(name for text in texts for name in variables_of(text))
    carried = {name: os.environ[name] for name in names if not is_secret_name(name)}
    if carried:
        logger.info("environment variables that the job gets from here: %s", ", ".join(carried))
    for name in names.keys() - carried.keys():
        logger.warning(
            "the environment variable %s is not given to the job, whose variables the dashboard shows; set it on the "
            "cluster's head node", name,
        )  # fmt: skip
    return carried


def _check_reads(config: Path, overrides: Sequence[str], working_dir: Path) -> None:
    """Raise ConfigError if the job's copy lacks the configuration, or a file that it reads."""
    packed = package_files(working_dir)
    raw, _ = read_yaml(config)
    for change in overrides:
        override(raw, change)
    left_out = f".gitignore, .rayignore and `submit` itself ({', '.join(EXCLUDED)}) leave files out"
    if config not in packed:
        raise ConfigError(
            f"the job's copy of {working_dir} has no {config.relative_to(working_dir)}: {left_out}; move it"
        )
    check_run_name((raw.get("run_config") or {}).get("name"))
    check_packed(raw, working_dir, packed, left_out)


def start(client: JobSubmissionClient, command: str, runtime_env: dict[str, Any], wait_s: float = 120.0) -> str:
    """Start a command as a job, and return its id. Retry while a new cluster's agents are not there yet.

    Raises:
        ClusterError: the job server refused, or had no agent for `wait_s`.
    """
    # The id is chosen here, so that the server can be asked about the job even if the connection drops before it
    # answers.
    job = f"kithara_ray_{secrets.token_hex(6)}"
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return client.submit_job(entrypoint=command, runtime_env=runtime_env, submission_id=job)
        except _FAILURES as error:
            if _is_there(client, job):
                return job
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise ClusterError(f"the job was not accepted: {_reason(error)}") from error
        time.sleep(_RETRY_S)


def _is_there(client: JobSubmissionClient, job: str) -> bool:
    try:
        client.get_job_status(job)
    except _FAILURES:
        return False
    return True


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], None], lost_after_s: float = 300.0) -> None:
    """Write the job's log as it arrives, until the job ends. Reconnect if the connection drops.

    Raises:
        TrainingError: the job failed or was stopped.
        ClusterError: no answer for `lost_after_s`; the job may still be running.
    """
    written, deadline = 0, time.monotonic() + lost_after_s
    while True:
        try:
            client.get_job_status(job)  # raises if there is no such job; the log request would not say so
            deadline = time.monotonic() + lost_after_s
            for text in _tail(client, job, written):
                written += len(text)
                write(text)
            status = client.get_job_status(job)
            if status in _ENDED:
                rest = client.get_job_logs(job)[written:]
                write(rest)
                break
        except _FAILURES as error:
            if "does not exist" in str(error):
                raise ConfigError(f"there is no job {job!r} on that cluster; `ray job list` shows them") from error
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"job {job}: no answer for {lost_after_s:g} s ({_reason(error)}); it may still run: follow it "
                    f"again with --follow --job {job}"
                ) from error
            logger.info("connection lost, trying again: %s", error)
        time.sleep(_RETRY_S)
    if status != JobStatus.SUCCEEDED:
        raise TrainingError(f"job {job} ended as {status.value}: {client.get_job_info(job).message}")


def _tail(client: JobSubmissionClient, job: str, skip: int) -> Iterator[str]:
    """Yield the log from character `skip` on; each connection starts at the beginning of the log."""
    lines: Any = client.tail_job_logs(job)  # an asynchronous generator
    loop = asyncio.new_event_loop()
    try:
        seen = 0
        while True:
            try:
                # Without a timeout, a connection that drops silently would block forever.
                text = loop.run_until_complete(asyncio.wait_for(anext(lines), _QUIET_S))
            except StopAsyncIteration:
                return
            fresh = text[max(0, skip - seen) :]
            seen += len(text)
            if fresh:
                yield fresh
    finally:
        loop.run_until_complete(lines.aclose())
        loop.close()


def stop(client: JobSubmissionClient, job: str) -> bool:
    """Ask a job to end; return True if it was running. Raises ConfigError if there is no such job."""
    try:
        return client.stop_job(job)
    except _FAILURES as error:
        if "does not exist" in str(error):
            raise ConfigError(f"there is no job {job!r} on that cluster; `ray job list` shows them") from error
        raise ClusterError(f"job {job} was not stopped: {_reason(error)}") from error
