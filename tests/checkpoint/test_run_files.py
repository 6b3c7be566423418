"""What a run has left in files, exported by the command: the adapter of its end, of a step, of a checkpoint."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from kithara_ray.checkpoint import disk_format, run_files
from kithara_ray.checkpoint.run_files import read_trained
from kithara_ray.cli.app import main
from kithara_ray.errors import CheckpointError, ConfigError
from kithara_ray.hf import safetensors_file
from kithara_ray.hf.adapter import Adapter, LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.sharding.gather import Shard
from kithara_ray.storage.places import Place

CONFIG = LoraConfig(r=4, lora_alpha=6, target_modules=("q_proj",))


@pytest.fixture
def base(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"layers.{n}.q_proj.weight": rng.normal(size=(24, 16)).astype(ml_dtypes.bfloat16) for n in range(2)}
    (tmp_path / "base").mkdir()
    safetensors_file.write_arrays(tmp_path / "base/model.safetensors", arrays, {"format": "pt"})
    (tmp_path / "base/config.json").write_text("{}")
    return tmp_path / "base"


def _factors(step: int) -> dict[str, np.ndarray]:
    rng, tensors = np.random.default_rng(step), {}
    for n in range(2):
        tensors[f"layers.{n}.q_proj.lora_A.weight"] = rng.normal(size=(4, 16)).astype(np.float32)
        tensors[f"layers.{n}.q_proj.lora_B.weight"] = rng.normal(size=(24, 4)).astype(np.float32)
    return tensors


@pytest.fixture
def run(tmp_path, base):
    """A run whose checkpoints of steps 10 and 20 two ranks have written; factors of both layers are one array."""
    place = Place(str(tmp_path / "run/checkpoints"))
    for step in (10, 20):
        factors, arrays, tensors = _factors(step), {}, {}
        for kind in ("lora_A", "lora_B"):
            names = [f"layers.{n}.q_proj.{kind}.weight" for n in range(2)]
            arrays[f"params/{kind}"], tensors[f"params/{kind}"] = np.stack([factors[name] for name in names]), names
        directory = disk_format.directory_name(step, "0000abcd")
        for rank in (0, 1):
            shards = [
                Shard(name, ((rank, rank + 1), *((0, size) for size in array.shape[1:])), array[rank : rank + 1], rank)
                for name, array in arrays.items()
            ]
            disk_format.write_part(place, directory, shards, rank, 2)
        identity = {"base": BaseCheckpoint.open(base).fingerprint(), "lora": dataclasses.asdict(CONFIG)}
        document = {"identity": identity, "base": str(base), "tensors": tensors, "metrics": {"loss": 1.5}}
        shapes = {name: (array.shape, "F32") for name, array in arrays.items()}
        disk_format.commit(place, directory, 2, shapes, document, [])
    return tmp_path / "run"


def _is_of(step: int, adapter: Adapter) -> bool:
    return adapter.config == CONFIG and all(np.array_equal(adapter.tensors[n], t) for n, t in _factors(step).items())


def test_the_newest_checkpoint_of_a_run_that_failed(run, base):
    for location in (run, run / "checkpoints", run / "checkpoints/step-00000020-0000abcd"):
        trained = read_trained(str(location))
        assert _is_of(20, trained.adapter)
        assert trained.base == str(base)
        assert trained.run["step"] == 20
    assert _is_of(10, read_trained(str(run), step=10).adapter)
    with pytest.raises(ConfigError, match="no checkpoint of step 15; there are checkpoints of steps 10, 20"):
        read_trained(str(run), step=15)


def test_the_adapter_of_a_run_that_ended(run, base):
    Adapter(CONFIG, _factors(99)).write(run / "adapter", "org/name", "v2")
    trained = read_trained(str(run))
    assert _is_of(99, trained.adapter)
    assert trained.base == "hf://org/name@v2"
    assert _is_of(20, read_trained(str(run), step=20).adapter)


def test_the_command(run, base, tmp_path, capsys):
    """No run is needed but its files, and the base that they name."""
    command = ["export", str(run), "--to", str(tmp_path / "merged"), "--step", "10", "--max-shard-size", "1KB"]
    assert main(command) == 0
    assert "exported merged to" in (shown := capsys.readouterr().out)
    assert "tensors: 2 merged (2 changed), 0 as in the base" in shown
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) == 2
    assert json.loads((tmp_path / "merged/run.json").read_text())["metrics"] == {"loss": 1.5}
    assert main(["export", str(run), "--to", str(tmp_path / "adapter"), "--format", "adapter"]) == 0
    assert _is_of(20, Adapter.read(tmp_path / "adapter"))


def test_another_base_is_refused(run, base, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    raw = bytearray((other / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (other / "model.safetensors").write_bytes(raw)
    assert main(["export", str(run), "--to", str(tmp_path / "out"), "--base", str(other)]) == 1
    assert f"was trained on '{base}' and not on '{other}': fingerprint sha256:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_knows_the_revision_that_its_run_began_from(run, base):
    (run / "run.json").write_text(json.dumps({"base": {"name": str(base), "revision": "v3"}}))
    assert read_trained(str(run)).trained_on.fingerprint == BaseCheckpoint.open(base).fingerprint()
    for manifest in (run / "checkpoints").glob("*/manifest.json"):
        written = json.loads(manifest.read_text()) | {"base": "hf://acme/tiny"}
        written.pop("sha256")
        manifest.write_text(json.dumps(written | {"sha256": disk_format._digest(written)}))
    assert read_trained(str(run)).base == "hf://acme/tiny@v3"


def test_what_is_no_run(run, tmp_path):
    with pytest.raises(CheckpointError, match="neither a PEFT adapter"):
        read_trained(str(tmp_path))
    part = next((run / "checkpoints/step-00000020-0000abcd").glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256 is"):
        read_trained(str(run))


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_run_json_is_written_whole_and_a_broken_one_is_named(tmp_path, content):
    place = Place(str(tmp_path / "new" / "run"))
    run_files.write_manifest(place.root, {"status": "running"})
    run_files.write_manifest(place.root, {"status": "finished", "loss": 1.5})
    assert list(place.files("")) == [run_files.RUN]
    assert run_files.read_object(place, run_files.RUN) == {"status": "finished", "loss": 1.5}
    place.put_bytes(content, "", run_files.RUN)
    with pytest.raises(ConfigError, match=r"run/run\.json (cannot be read|is not a file that a run writes)"):
        run_files.read_object(place, run_files.RUN)
