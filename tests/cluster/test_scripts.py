"""cluster/: what a shell runs, by shellcheck; the image by hadolint; a queued slice's scripts with tools that log."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"
BIN = Path(sys.executable).parent
ATTRIBUTES = {
    "kithara-ray-image": "europe-docker.pkg.dev/p/r/kithara-ray:0.1.0",
    "kithara-ray-token-secret": "ray-token",
    "accelerator-type": "v6e-16",
}
TOKEN = "0123456789abcdef" * 4


def shellcheck(script: str) -> str:
    done = subprocess.run(
        [BIN / "shellcheck", "--shell=bash", "-"], input=script, capture_output=True, text=True, timeout=60
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", ["create.sh", "startup.sh"])
def test_scripts(name):
    assert shellcheck((CLUSTER / "queued" / name).read_text()) == ""


def test_commands_of_the_launcher():
    content = yaml.safe_load((CLUSTER / "launcher" / "tpu-vm.yaml").read_text())
    for key in ("initialization_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        assert shellcheck("export RAY_HEAD_IP\n" + "\n".join(content[key])) == ""


def test_commands_of_the_readme():
    blocks = re.findall(r"```sh\n(.*?)```", (CLUSTER / "README.md").read_text(), re.S)
    assert len(blocks) == 6
    for block in blocks:
        assert shellcheck("export IMAGE\n" + block) == ""


def test_dockerfile():
    done = subprocess.run([BIN / "hadolint", CLUSTER / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_dockerfile_copies_what_is_there():
    sources = re.findall(r"^COPY --chown=\S+ (.*) \S+$", (CLUSTER / "Dockerfile").read_text(), re.M)
    assert all((CLUSTER.parent / name).exists() for line in sources for name in line.split())


@pytest.fixture
def host(tmp_path):
    """Runs a script where curl, gcloud and docker are stand-ins that answer from a directory and log their arguments.

    The real ones want a Google Cloud host.
    """
    tools, metadata, log = tmp_path / "bin", tmp_path / "metadata", tmp_path / "log"
    tools.mkdir()
    metadata.mkdir()
    stubs = {
        "curl": f'for last; do :; done; cat "{metadata}/${{last##*/}}"',
        "gcloud": f'echo "gcloud $*" >>"{log}"; case $* in *access*) printf %s {TOKEN};; esac',
        "docker": f'echo "docker $*" >>"{log}"',
    }
    for name, body in stubs.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)

    def run(script: str, *arguments: str, attributes=None, **env: str) -> str:
        for name, value in (ATTRIBUTES | (attributes or {})).items():
            (metadata / name).write_text(value)
        env |= {"PATH": f"{tools}:{os.environ['PATH']}", "KITHARA_RAY_SECRETS": str(tmp_path / "secrets")}
        command = [CLUSTER / "queued" / script, *arguments]
        subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=60)
        return log.read_text()

    return run


@pytest.mark.parametrize(
    ("attributes", "role"),
    [
        (
            {"agent-worker-number": "0", "worker-network-endpoints": "10.0.0.7,10.0.0.8"},
            "--head --port=6379 --dashboard-host=127.0.0.1",
        ),
        ({"agent-worker-number": "1", "worker-network-endpoints": "10.0.0.7,10.0.0.8"}, "--address=10.0.0.7:6379"),
        (
            {"agent-worker-number": "1", "worker-network-endpoints": "a:1:10.0.0.7,b:2:10.0.0.8"},
            "--address=10.0.0.7:6379",
        ),
        (
            {"agent-worker-number": "0", "worker-network-endpoints": "10.0.1.7", "kithara-ray-head": "10.0.0.7"},
            "--address=10.0.0.7:6379",
        ),
    ],
    ids=["first host", "second host", "named endpoints", "second slice"],
)
def test_each_host_takes_its_role_with_the_token_in_a_file(host, tmp_path, attributes, role):
    log = host("startup.sh", attributes=attributes)
    assert log.rstrip().endswith(f"{ATTRIBUTES['kithara-ray-image']} ray start --block {role}")
    assert "gcloud auth configure-docker europe-docker.pkg.dev --quiet" in log
    assert "--env RAY_AUTH_MODE=token" in log
    assert TOKEN not in log
    token = tmp_path / "secrets" / "ray_token"
    assert (token.read_text(), token.stat().st_mode & 0o777) == (TOKEN, 0o600)


def test_a_request_for_a_slice(host):
    names = {"PROJECT": "p", "ZONE": "z", "IMAGE": "registry/image", "TOKEN_SECRET": "ray-token"}
    log = host("create.sh", "mine", "v5litepod-16", **names)
    assert "queued-resources create mine --project p --zone z --node-id mine" in log
    assert "--accelerator-type v5litepod-16 --runtime-version v2-alpha-tpuv5-lite" in log
    assert "--metadata kithara-ray-image=registry/image,kithara-ray-token-secret=ray-token --metadata-from" in log
    assert f"startup-script={CLUSTER / 'queued' / 'startup.sh'}" in log
    with pytest.raises(subprocess.CalledProcessError):
        host("create.sh", "mine", "v3-8", **names)
