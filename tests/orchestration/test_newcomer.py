"""docs/first_run.md as a newcomer follows it: every command and every edit is read from the page."""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest
import tiny
from doc_pages import blocks, with_sections
from peft import PeftModel
from transformers import AutoModelForCausalLM

PAGE = Path(__file__).parents[2] / "docs" / "first_run.md"
PRESET = "hf://HuggingFaceTB/SmolLM2-135M-Instruct"
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "ray-client-server-port")
PORTS += ("metrics-export-port", "runtime-env-agent-port", "node-manager-port", "object-manager-port")


def command_of(start: str) -> str:
    """The page's only command that begins so."""
    lines = [line for block in blocks(PAGE, "sh") for line in block.splitlines() if line.startswith(start)]
    assert len(lines) == 1, lines
    return lines[0]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def iter_until(stream: Iterable[str], wanted: str) -> Iterator[str]:
    """Lines of a stream up to the one that has `wanted`, or to its end."""
    for line in stream:
        yield line
        if wanted in line:
            return


def end(process: subprocess.Popen) -> None:
    """`ray start --block` and what it started."""
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for each in family:  # to be told to end takes Ray 20 s and more
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait(20)
    process.stdout.close()


@pytest.fixture(scope="module")
def home():
    """Where the newcomer's cluster keeps its files: short, since its sockets' paths are bounded."""
    with tempfile.TemporaryDirectory(prefix="kr_", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def environment(home, no_cluster):
    """A cluster with a token, by the page's command, on ports of its own; yields the newcomer's environment."""
    token = home / "auth_token"
    token.write_text(secrets.token_hex(32))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "XLA_"))}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    # What changes how long it takes, and nothing of what the newcomer sees.
    env |= {"RAY_worker_niceness": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    here = Path(__file__).parents[2]
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "PYTHONPATH": str(here), "COLUMNS": "200"}
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    command = command_of("ray start").split() + [f"--{name}={port}" for name, port in ports.items()]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--num-cpus=2", f"--temp-dir={home / 'ray'}", "--block"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=home)
    try:
        shown = list(iter_until(process.stdout, "Ray runtime started"))
        assert "Ray runtime started" in shown[-1], "".join(shown)
        address = f"http://127.0.0.1:{ports['dashboard-port']}"
        yield env | {"RAY_ADDRESS": f"127.0.0.1:{ports['port']}", "DASHBOARD": address}
    finally:
        end(process)


@pytest.fixture
def newcomer(environment, tmp_path):
    """Runs one of the page's commands in a directory of its own; returns what it showed."""

    def run(start: str, code: int = 0, **changes: str) -> str:
        command = command_of(start).replace("http://127.0.0.1:8265", environment["DASHBOARD"])
        command = command.replace("/absolute/path", str(tmp_path / "out"))
        env = environment | changes
        if start.endswith("submit"):
            del env["RAY_ADDRESS"]  # another machine than the cluster's
        done = subprocess.run(command.split(), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    return run


@pytest.mark.long
def test_init_edit_doctor_submit_export(newcomer, environment, tiny_models, tmp_path):
    out = tmp_path / "out"
    newcomer("kithara-ray init")
    (data,) = blocks(PAGE, "json")
    rows = [json.loads(line) for line in data.splitlines()]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows + tiny.rows(12)))
    (sections,) = blocks(PAGE, "yaml")
    sections = sections.replace(PRESET, str(tiny_models["llama"])).replace("/absolute/path", str(out))
    config = tmp_path / "my_run.yaml"
    config.write_text(with_sections(config.read_text(), sections))

    found = newcomer("kithara-ray doctor")
    assert "global batch 2 rows" in found
    assert not list(out.rglob("*"))

    refused = newcomer("kithara-ray submit", code=1, RAY_AUTH_TOKEN_PATH="/dev/null", RAY_AUTH_TOKEN="0" * 64)
    assert "the cluster does not take this token" in refused

    shown = newcomer("kithara-ray submit")
    assert "step=3" in shown
    assert f"exported {out / 'adapter'}" in shown
    assert "succeeded" in shown
    run = json.loads((out / "runs" / "my-run" / "run.json").read_text())
    assert (run["status"], run["result"]["metrics"]["step"]) == ("finished", 3)
    report = (out / "runs" / "my-run" / "report.html").read_text()
    assert "my-run" in report
    assert str(out / "adapter") in report
    base = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    assert PeftModel.from_pretrained(base, out / "adapter").peft_config["default"].r == 16

    newcomer("kithara-ray export")
    AutoModelForCausalLM.from_pretrained(out / "merged")
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert token not in shown + found
    assert not any(token.encode() in path.read_bytes() for path in out.rglob("*") if path.is_file())
