"""From a YAML alone, on a local cluster: doctor, train, its exports and run.json, the same again as a submitted job."""

import contextlib
import json
import logging
import socket
import sys
import threading
from pathlib import Path

import pytest
import ray
import tiny
import yaml
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from kithara_ray.cli.app import main
from kithara_ray.errors import ConfigError
from kithara_ray.orchestration import submit

EXAMPLE = Path(__file__).parents[2] / "examples" / "sft_lora.yaml"
# Found nowhere in what a run writes or shows.
CANARIES = {"HF_TOKEN": "canary-of-the-hub", "WANDB_API_KEY": "canary-of-wandb", "MY_OWN": "canary-of-a-worker"}


@pytest.fixture(scope="module")
def small(tiny_models, tmp_path_factory):
    """Writes the example with a tiny model and given paths as JSON, which is YAML; returns its path."""
    root = tmp_path_factory.mktemp("small")
    (root / "train.jsonl").write_text("\n".join(json.dumps(row) for row in tiny.rows(12)))

    def write(out: Path, name: str = "run.yaml", **changes) -> Path:
        content = yaml.safe_load(EXAMPLE.read_text())
        content["model"]["preset_handle"] = str(tiny_models["llama"])
        content["train_dataloader"]["dataset"] |= {"source": str(root / "train.jsonl"), "max_seq_len": 64}
        content["optimizer"]["learning_rate"] = 0.01
        content["trainer"] |= {"steps": 2, "progress": False}
        env = {"WANDB_API_KEY": CANARIES["WANDB_API_KEY"], "MY_OWN": CANARIES["MY_OWN"]}
        content["run_config"] = {
            "storage_path": str(out / "runs"),
            "name": "mine",
            "worker_runtime_env": {"env_vars": env},
        }
        for number, layout in enumerate(("adapter", "both", "merged")):
            content["exports"][number]["output_dir"] = str(out / layout)
        for key, value in changes.items():
            section, _, leaf = key.partition("__")
            content[section][leaf] = value
        path = root / name
        path.write_text(json.dumps(content))
        return path

    return write


@pytest.fixture(scope="module")
def trained(cluster, small, tmp_path_factory):
    """One run by the command line; (directory of its output, everything that it showed or logged)."""
    out = tmp_path_factory.mktemp("trained")
    shown = out / "shown.txt"
    logging.getLogger("kithara_ray").setLevel(logging.DEBUG)
    handler = logging.FileHandler(shown)
    logging.getLogger().addHandler(handler)
    with pytest.MonkeyPatch.context() as patch, shown.open("a") as stream:
        patch.setenv("HF_TOKEN", CANARIES["HF_TOKEN"])
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            code = main(["train", str(small(out))])
    logging.getLogger().removeHandler(handler)
    assert code == 0, shown.read_text()
    return out, shown.read_text()


def test_the_example_trains_and_exports(trained, tiny_models):
    out, shown = trained
    assert f"exported {out / 'merged'}" in shown
    base = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    adapted = PeftModel.from_pretrained(base, out / "adapter").peft_config["default"]
    assert (adapted.r, adapted.lora_alpha, "down_proj" in adapted.target_modules) == (16, 32, True)
    AutoModelForCausalLM.from_pretrained(out / "both").load_adapter(out / "both" / "adapter")
    AutoModelForCausalLM.from_pretrained(out / "merged")


def test_run_json_says_what_the_run_was_made_of(trained, tiny_models):
    from kithara_ray.hf.checkpoint import BaseCheckpoint

    out, shown = trained
    run = json.loads((out / "runs" / "mine" / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["base"]["fingerprint"] == BaseCheckpoint.open(tiny_models["llama"]).fingerprint()
    chosen = run["mesh"].pop("by_default")
    assert run["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1, "platform": "cpu", "devices": 4, "hosts": 2}
    assert 8 * chosen["state_bytes"] < chosen["device_bytes"]
    assert chosen["why"].startswith("every device holds all weights: the state has 0.00 GB")
    assert f"mesh data=4 fsdp=1 tensor=1: {chosen['why']}" in shown
    assert (run["data"]["train"]["rows"], len(run["data"]["train"]["fingerprint"])) == (12, 32)
    assert run["versions"]["ray"] == ray.__version__
    assert len(run["git"]["revision"]) == 40
    assert len(run["tokenizer"]["vocabulary_sha256"]) == 64
    assert run["config"]["trainer"]["steps"] == 2
    assert run["settings"]["optimizer"]["class_name"] == "AdamW"
    assert run["settings"]["trainer"]["remat"] == "dots"
    assert run["result"]["metrics"]["step"] == 2
    for export in ("adapter", "both", "merged"):
        text = (out / export / "run.json").read_text()
        carried = json.loads(text)
        assert carried["base"]["fingerprint"] == run["base"]["fingerprint"]
        assert carried["settings"]["optimizer"] == run["settings"]["optimizer"]
        # Exports are published: the host's facts and paths stay in the run's own file.
        assert not {"config", "environment", "platform", "git"} & carried.keys()
        assert str(out) not in text


def test_an_export_of_the_run_later_carries_it_too(trained, tmp_path):
    out, _ = trained
    assert main(["export", str(out / "runs" / "mine"), "--to", str(tmp_path / "later"), "--format", "adapter"]) == 0
    run = json.loads((out / "runs" / "mine" / "run.json").read_text())
    later = json.loads((tmp_path / "later" / "run.json").read_text())["training"]
    assert (later["data"], later["seeds"], later["result"]["metrics"]) == (
        run["data"],
        run["seeds"],
        run["result"]["metrics"],
    )
    assert "config" not in later


def test_no_secret_is_written_or_shown(trained):
    out, shown = trained
    texts = [path.read_bytes() for path in out.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    for canary in CANARIES.values():
        assert canary not in shown
        assert not any(canary.encode() in text for text in texts)
    run = json.loads((out / "runs" / "mine" / "run.json").read_text())
    assert run["environment"]["MY_OWN"] == "***"
    assert run["environment"]["JAX_PLATFORMS"] == "cpu"


@pytest.mark.long
def test_the_same_again_as_a_job_by_its_run_json(trained, cluster, small, tmp_path, capfd):
    """run.json's configuration with other paths, submitted; the adapter comes out the same."""
    out, _ = trained
    job = tmp_path / "job"
    job.mkdir()
    content = json.loads((out / "runs" / "mine" / "run.json").read_text())["config"]
    content["run_config"] = {"storage_path": str(tmp_path / "runs"), "name": "again"}
    content["exports"] = [{"output_dir": str(tmp_path / "adapter"), "only_save_adapters": True}]
    (job / "again.yaml").write_text(json.dumps(content))
    address = f"http://{cluster.dashboard_url}"
    arguments = ["submit", str(job / "again.yaml"), "--address", address, "--working-dir", str(job)]
    assert main([*arguments, "--python", sys.executable, "--follow"]) == 0
    shown = capfd.readouterr().out
    assert f"exported {tmp_path / 'adapter'}" in shown
    assert "succeeded" in shown
    ours, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (out, tmp_path))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    # The job runs in a packed copy of the directory, which has no history.
    assert json.loads((tmp_path / "runs" / "again" / "run.json").read_text())["git"] is None


def test_doctor_finds_nothing(cluster, small, tmp_path, capsys):
    assert main(["doctor", str(small(tmp_path, "doctor.yaml"))]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for check in ("configuration", "model", "cluster", "versions", "devices", "memory", "disk", "destinations", "rows"):
        assert check in shown
    assert "global batch 8 rows" in shown
    assert not list(tmp_path.iterdir())


def test_doctor_finds_everything_at_once(cluster, small, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("mine")
    path = small(tmp_path, "ill.yaml", trainer__mesh={"data": 3}, scaling_config__num_workers=2)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "a", "answer": "b"}\n')
    arguments = ["doctor", str(path), "--set", f"train_dataloader.dataset.source={rows}"]
    assert main(arguments) == 1
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "mesh data=3 fsdp=-1 tensor=1 does not fit 4 devices" in shown
    assert "exists and is not empty" in shown
    assert "no column 'prompt', found 'question', 'answer'" in shown
    assert main([*arguments, "--set", "scaling_config.num_workers=9"]) == 1
    assert "can hold 4 of 9 workers" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "rows.jsonl"]


def test_doctor_of_the_cluster_alone(cluster, capsys):
    assert main(["doctor"]) == 0
    assert "1: CPU: 4" in capsys.readouterr().out


class Proxy:
    """A TCP proxy to the job server whose connections can be cut."""

    def __init__(self, target: tuple[str, int]):
        self._target, self._open = target, []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._server.accept()[0]
                server = socket.create_connection(self._target)
                self._open += [client, server]
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> int:
        """Close all connections; returns how many."""
        cut, self._open = self._open, []
        for end in cut:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        return len(cut)

    def close(self) -> None:
        self._server.close()
        self.cut()


LINES = "import time\nfor i in range(40): print('line', i, flush=True); time.sleep(0.1)"


def test_a_log_over_a_connection_that_drops(cluster, tmp_path):
    host, _, port = cluster.dashboard_url.partition(":")
    proxy = Proxy((host, int(port)))
    client = submit.connect(proxy.address)
    (tmp_path / "lines.py").write_text(LINES)
    job = submit.start(client, f"{sys.executable} lines.py", {"working_dir": str(tmp_path)})
    text, cuts = [], []

    def write(piece: str) -> None:
        text.append(piece)
        if "line 9\n" in "".join(text) and not cuts:
            cuts.append(proxy.cut())

    submit.follow(client, job, write)
    proxy.close()
    assert cuts[0] > 0
    lines = [line for line in "".join(text).splitlines() if line.startswith("line ")]
    assert lines == [f"line {number}" for number in range(40)]


def test_a_job_is_stopped(cluster, tmp_path, capsys):
    address = f"http://{cluster.dashboard_url}"
    job = submit.start(submit.connect(address), "sleep 600", {})
    assert main(["submit", "--address", address, "--stop", job]) == 0
    assert "asked to stop" in capsys.readouterr().out
    assert main(["submit", "--address", address, "--job", job]) == 1
    assert f"job {job} ended as STOPPED" in capsys.readouterr().err


def test_jobs_that_cannot_be(cluster, small, tmp_path, capsys):
    address = f"http://{cluster.dashboard_url}"
    assert main(["submit", "--address", address, "--job", "raysubmit_nothing"]) == 1
    assert "there is no job 'raysubmit_nothing'" in capsys.readouterr().err
    assert main(["submit", "--address", "http://127.0.0.1:9", "--job", "x"]) == 1
    assert "http://127.0.0.1:9: no job server answers there" in capsys.readouterr().err
    path = small(tmp_path, "outside.yaml")
    assert main(["submit", str(path), "--address", address, "--working-dir", str(tmp_path)]) == 1
    assert "is not in" in capsys.readouterr().err
    assert main(["submit", str(path), "--address", address, "--set", "exports.0.output_dir=out/adapter"]) == 1
    assert "exports.0.output_dir: 'out/adapter' is relative" in capsys.readouterr().err


def test_a_directory_beyond_rays_limit_is_refused(tmp_path):
    with (tmp_path / "large.bin").open("wb") as stream:
        stream.truncate(submit.LIMIT_BYTES * 20)
    (tmp_path / "run.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"more than Ray's limit of 105 MB; the largest: large\.bin 2097 MB"):
        submit.check_size(tmp_path)
    (tmp_path / ".rayignore").write_text("large.bin\n")
    assert submit.check_size(tmp_path) < 1000
