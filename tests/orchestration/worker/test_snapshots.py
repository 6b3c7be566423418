"""Adapters written while training goes on."""

import keras
import numpy as np
import pytest
import tiny
from observed import EVERY
from ray.train import RunConfig, ScalingConfig

from kithara_ray import Dataloader, KerasHubModel, MeshShape, SFTDataset, Trainer
from kithara_ray.checkpoint.run_files import read_trained
from kithara_ray.cli.app import main
from kithara_ray.errors import ConfigError, DestinationError, UnsupportedError
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.orchestration.head.snapshot_writer import SnapshotWriter
from kithara_ray.orchestration.preflight.tasks import check_snapshots
from kithara_ray.orchestration.worker.channel import AdapterSpec, SnapshotPart
from kithara_ray.sharding.gather import Shard


def make_trainer(directory, tmp_path, **kwargs):
    model = KerasHubModel.from_preset(str(directory), lora_rank=4, precision="float32")
    data = SFTDataset(tiny.rows(22), tokenizer_handle=str(directory), max_seq_len=64)
    return Trainer(
        model=model,
        optimizer=keras.optimizers.AdamW(1e-2),
        train_dataloader=Dataloader(data, per_device_batch_size=2),
        steps=5,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(tmp_path), name="run"),
        cpu_devices_per_worker=2,
        mesh=MeshShape(),  # weights cross processes
        progress=False,
        **kwargs,
    )


def test_every_third_step_of_a_run_on_two_workers(observed, tmp_path):
    """Each is, bit by bit, what a checkpoint of that step holds; and a checkpoint is enough to export from."""
    root, steps, checkpoints = observed.root, (EVERY, 2 * EVERY), str(observed.root / "checkpoints")
    expected = [{"step": step, "path": f"{root}/run/adapters/step-00000{step}", "error": None} for step in steps]
    assert observed.result.exports == expected
    adapters = [Adapter.read(export["path"]) for export in observed.result.exports]
    for step, adapter in zip(steps, adapters, strict=True):
        trained = read_trained(checkpoints, step)
        assert trained.base == str(observed.directory)
        assert trained.adapter.config.target_modules == adapter.config.target_modules
        assert trained.adapter.tensors.keys() == adapter.tensors.keys()
        for name, tensor in trained.adapter.tensors.items():
            assert np.array_equal(adapter.tensors[name], tensor), name
    for one, other in ((adapters[0].tensors, adapters[1].tensors), (adapters[1].tensors, observed.model.adapter)):
        assert all(not np.array_equal(one[name], other[name]) for name in one)
    assert main(["export", checkpoints, "--to", str(tmp_path / "merged"), "--step", str(EVERY)]) == 0
    merged, base = (BaseCheckpoint.open(where) for where in (tmp_path / "merged", observed.directory))
    assert merged.names == base.names
    with pytest.raises(DestinationError, match="holds step-000003 from an earlier run; give another export_dir"):
        make_trainer(observed.directory, root, export_every_steps=2).train()


def test_what_cannot_be_is_refused(tiny_models, tmp_path):
    with pytest.raises(ConfigError, match="give both, or neither"):
        make_trainer(tiny_models["llama"], tmp_path, export_dir="x")
    with pytest.raises(ConfigError, match="export_every_steps must be an integer >= 1, got 0"):
        make_trainer(tiny_models["llama"], tmp_path, export_every_steps=0)
    with pytest.raises(UnsupportedError, match="export_dir must be a directory or on an object store"):
        make_trainer(tiny_models["llama"], tmp_path, export_every_steps=2, export_dir="hf://org/name")
    (tmp_path / "file").touch()
    with pytest.raises(DestinationError, match="cannot be written"):
        check_snapshots(str(tmp_path / "file/below"), may_resume=True)


def test_a_failed_one_is_told_and_ends_nothing(tiny_models, tmp_path):
    base = str(tiny_models["llama"])
    model = KerasHubModel.from_preset(base, lora_rank=4)
    shapes = {}
    for name, info in BaseCheckpoint.open(base).tensors.items():
        if model.lora.matches(module := name.removesuffix(".weight")):
            shapes[f"{module}.lora_A.weight"] = (4, info.shape[1])
            shapes[f"{module}.lora_B.weight"] = (info.shape[0], 4)
    made = AdapterSpec(base, model.lora, shapes, num_ranks=2)
    whole = [
        Shard(name, tuple((0, size) for size in shape), np.ones(shape, np.float32), 0) for name, shape in shapes.items()
    ]
    writer = SnapshotWriter()

    def put(step, rank, shards, name):
        return writer.put(SnapshotPart(made, step, rank, shards, str(tmp_path / name)))

    assert put(3, 1, [], "a") is None
    assert put(3, 0, whole[1:], "a")["error"].startswith(whole[0].name)
    assert put(4, 1, [], "b") is None
    writer.forget()  # the attempt that sent it has died
    assert put(4, 0, whole, "b") is None
    assert put(4, 1, [], "b")["error"] is None
    assert list(tmp_path.iterdir()) == [tmp_path / "b"]
    assert put(4, 1, [], "b") is None
    assert put(4, 0, whole, "b")["error"] is None  # there already, after a resume
