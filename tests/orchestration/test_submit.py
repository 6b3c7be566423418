"""examples/sft_lora.py by `ray job submit`, on a tiny model."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from peft import PeftModel
from ray.job_submission import JobSubmissionClient
from transformers import AutoModelForCausalLM

from kithara_ray.errors import ClusterError, ConfigError
from kithara_ray.orchestration import submit
from kithara_ray.orchestration.driver.run_manifest import GIT_VARIABLE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arguments(tiny_models, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in tiny.rows(12)))
    return [str(tiny_models["llama"]), str(data), str(tmp_path / "out")]


def check_exports(arguments):
    base, _, out = arguments
    model = AutoModelForCausalLM.from_pretrained(base)
    assert len(PeftModel.from_pretrained(model, f"{out}/adapter").peft_config) == 1
    AutoModelForCausalLM.from_pretrained(f"{out}/both").load_adapter(f"{out}/both/adapter")
    AutoModelForCausalLM.from_pretrained(f"{out}/merged")


def run(command: list[str], **env: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"STEPS": "2"} | env, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.long
def test_by_ray_job_submit(cluster, arguments, tmp_path):
    """From another directory than the project's: the job has its own copy of what it is given."""
    job = tmp_path / "job"
    job.mkdir()
    (job / "train.py").write_text((ROOT / "examples" / "sft_lora.py").read_text())
    address = f"http://{cluster.dashboard_url}"
    ray_cli = str(Path(sys.executable).with_name("ray"))
    command = [ray_cli, "job", "submit", "--address", address, "--working-dir", str(job)]
    command += ["--runtime-env-json", json.dumps({"env_vars": {"STEPS": "2"}})]
    out = run([*command, "--", sys.executable, "train.py", *arguments])
    assert "succeeded" in out
    check_exports(arguments)


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("127.0.0.1:8265", "no URL of http"),
        ("http://", "names no host"),
        ("http://head:port", "malformed"),
        ("http://head:99999", "malformed"),
        ("http://[::1:8265", "malformed"),
        (f"http://{'x' * 70}:8265", "malformed"),
        ("http://a..b:8265", "malformed"),
        ("http://head:8265 ", "a space or a control character"),
        ("http://me:secret@head:8265", "holds a user or password"),
    ],
)
def test_an_address_that_is_none_is_refused_before_anything_is_asked(address, text):
    with pytest.raises(ConfigError, match=f"--address: .*{text}.*; give the dashboard's URL") as refused:
        submit.connect(address)
    assert "secret" not in str(refused.value)


class Cut(JobSubmissionClient):
    """A client whose connection drops before the answer to a submission comes."""

    def submit_job(self, **arguments):
        super().submit_job(**arguments)
        raise ConnectionError("cut")


def test_a_job_is_submitted_once_over_a_connection_that_drops(cluster):
    address = f"http://{cluster.dashboard_url}"
    client = Cut(address)
    before = len(client.list_jobs())
    job = submit.start(client, "true", {})
    assert client.get_job_info(job).entrypoint == "true"
    assert len(client.list_jobs()) == before + 1
    with pytest.raises(ClusterError, match="the job was not accepted"):
        submit.start(submit.connect(address), "true", {"working_dir": "/nowhere"})


def test_the_job_gets_the_variables_that_its_configuration_reads(tmp_path, monkeypatch, caplog):
    """All but those that may hold a secret, since the dashboard shows them; the same values as the check read."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "answer": "a"}\n')
    (tmp_path / "run.yaml").write_text(
        "# ${IN_A_COMMENT}\nmodel: {preset_handle: 'hf://o/n', lora_rank: 4}\n"
        "train_dataloader: {per_device_batch_size: 1, dataset: {type: SFTDataset, source: '${ROWS}'}}\n"
        "optimizer:\n  learning_rate: ${RATE}\nrun_config: {name: '$${TEXT}-${MY_TOKEN}'}\n"
    )
    for name, value in dict(ROWS="rows.jsonl", RATE="1e-3", MY_TOKEN="t", STEPS="3", IN_A_COMMENT="x").items():
        monkeypatch.setenv(name, value)
    jobs = []
    client = SimpleNamespace(submit_job=lambda **job: jobs.append(job) or "id")
    with caplog.at_level(logging.INFO):
        submit.submit(client, tmp_path / "run.yaml", ["trainer.steps=${STEPS}"], tmp_path)
    carried = jobs[0]["runtime_env"]["env_vars"]
    assert {name: value for name, value in carried.items() if name != GIT_VARIABLE} == {
        "ROWS": "rows.jsonl",
        "RATE": "1e-3",
        "STEPS": "3",
    }
    assert "variable MY_TOKEN is not given to the job" in caplog.text
    assert "from here: ROWS, RATE, STEPS" in caplog.text
