"""The Trainer's arguments as a frozen request, and what follows from it. No cluster is asked."""

import dataclasses

import keras
import numpy as np
import pytest
from asking import V5E_4, request
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from safetensors.numpy import load_file

from kithara_ray import Checkpointer, Dataloader, KerasHubModel, MeshShape, Profiler, SFTDataset, Trainer
from kithara_ray.errors import ConfigError
from kithara_ray.orchestration.request import facts
from kithara_ray.orchestration.request.snapshots import Snapshots

ROWS = [{"prompt": "a", "answer": "b"}]


def trainer(directory, **arguments):
    data = SFTDataset(ROWS, tokenizer_handle=str(directory), max_seq_len=64)
    given = {
        "model": KerasHubModel.from_preset(str(directory), lora_rank=4, precision="float32"),
        "optimizer": keras.optimizers.SGD(0.5),
        "train_dataloader": Dataloader(data, per_device_batch_size=2),
    }
    return Trainer(**given | arguments)


def test_every_argument_is_in_the_request(tiny_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = tiny_models["llama"]
    held_out = Dataloader(SFTDataset(ROWS, tokenizer_handle=str(directory)), per_device_batch_size=1)
    made = trainer(
        directory,
        eval_dataloader=held_out,
        epochs=3,
        log_steps_interval=5,
        eval_steps_interval=7,
        max_eval_samples=11,
        tensorboard_dir="boards",
        profiler=Profiler("traces", (2, 4)),
        checkpointer=Checkpointer("saved", save_timeout_s=13),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="mine", storage_path=str(tmp_path / "runs")),
        cpu_devices_per_worker=3,
        mesh=MeshShape(data=2),
        remat="dots",
        gradient_accumulation_steps=17,
        seed=19,
        on_nan="skip",
        step_timeout_s=None,
        startup_timeout_s=23,
        export_every_steps=29,
        cluster_timeout_s=31,
        report_prompts=["hello"],
        report_max_length=37,
        progress=False,
    )
    asked = made.request
    assert (asked.model.preset_handle, asked.model.weights_handle) == (str(directory), str(directory))
    assert (asked.model.lora.r, asked.model.precision, asked.model.quantize) == (4, "float32", None)
    assert not asked.model.starts_from_adapter
    assert dict(asked.loaders())["eval_dataloader"] is held_out is asked.evaluation.loader
    when = asked.evaluation
    assert (when.every_steps, when.every_epochs, when.max_samples) == (7, None, 11)
    assert (asked.steps, asked.epochs) == (None, 3)
    kind, optimizer = asked.step.optimizer
    assert (kind, optimizer["class_name"]) == ("keras", "SGD")
    step = (asked.step.mesh, asked.step.remat, asked.step.micro_batches, asked.step.seed, asked.step.on_nan)
    assert step == (MeshShape(data=2), "dots", 17, 19, "skip")
    assert (asked.group.num_workers, asked.group.cpu_devices_per_worker, asked.group.cluster_timeout_s) == (2, 3, 31)
    assert asked.directory == str(tmp_path / "runs" / "mine")
    assert (asked.checkpointer.checkpoint_dir, asked.checkpointer.save_timeout_s) == (str(tmp_path / "saved"), 13)
    assert asked.snapshots == Snapshots(29, str(tmp_path / "runs/mine/adapters"))
    assert (asked.timeouts.step_s, asked.timeouts.startup_s) == (None, 23)
    reporting = asked.reporting
    assert (reporting.log_steps_interval, reporting.prompts, reporting.max_length) == (5, ("hello",), 37)
    assert reporting.tensorboard_dir == str(tmp_path / "boards")
    assert reporting.profiler == Profiler(str(tmp_path / "traces"), (2, 4))
    assert not reporting.progress
    with pytest.raises(dataclasses.FrozenInstanceError):
        asked.steps = 1


def test_what_is_left_out_has_a_default(tiny_models):
    asked = trainer(tiny_models["llama"]).request
    assert (asked.steps, asked.epochs, asked.evaluation, asked.checkpointer, asked.snapshots) == (None, 1, *[None] * 3)
    assert trainer(tiny_models["llama"], steps=2).request.epochs is None
    held_out = Dataloader(SFTDataset(ROWS, tokenizer_handle="/t"), per_device_batch_size=1)
    assert trainer(tiny_models["llama"], eval_dataloader=held_out).request.evaluation.every_epochs == 1


@pytest.mark.parametrize(
    ("ray_config", "kept", "score"),
    [
        ({"failure_config": FailureConfig(max_failures=3)}, 2, None),
        ({"checkpoint_config": CheckpointConfig(num_to_keep=7)}, 7, None),
        ({"checkpoint_config": CheckpointConfig(num_to_keep=3, checkpoint_score_attribute="loss")}, 3, "loss"),
    ],
)
def test_rays_configurations_ask_for_checkpoints(tiny_models, tmp_path, ray_config, kept, score):
    run_config = RunConfig(name="mine", storage_path=str(tmp_path), **ray_config)
    made = trainer(tiny_models["llama"], run_config=run_config).request.checkpointer
    assert made.checkpoint_dir == str(tmp_path / "mine" / "checkpoints")
    assert (made.max_to_keep, made.score_attribute) == (kept, score)


def test_two_that_exclude_each_other(tiny_models):
    with pytest.raises(ConfigError, match="Trainer takes one of steps and epochs, got steps=1 and epochs=2"):
        trainer(tiny_models["llama"], steps=1, epochs=2)
    with pytest.raises(ConfigError, match="Trainer takes one of eval_steps_interval and eval_epochs_interval"):
        trainer(tiny_models["llama"], eval_steps_interval=1, eval_epochs_interval=2)


def env(**variables):
    return RunConfig(name="run", storage_path="/runs", worker_runtime_env={"env_vars": variables})


@pytest.mark.parametrize(
    ("asked", "devices", "axes"),
    [
        (request({"num_workers": 3}), 3, (1, 3, 1)),
        (request({"num_workers": 2}, env(XLA_FLAGS="--xla_force_host_platform_device_count=4")), 8, (1, 8, 1)),
        (request({"num_workers": 4}, step={"mesh": MeshShape(data=2, tensor=2)}), 4, (2, 1, 2)),
        (request(V5E_4), 4, (1, 4, 1)),
        (request(V5E_4 | {"topology": "4x4", "num_workers": 4}), 16, (1, 16, 1)),
        # Two slices: each holds the model whole.
        (request(V5E_4 | {"topology": "4x4", "num_workers": 8}), 32, (2, 16, 1)),
        # A TPU host without a topology, and a TPU run on CPUs.
        (request({"num_workers": 1, "use_tpu": True}), None, None),
        (request(V5E_4, env(JAX_PLATFORMS="cpu")), 1, None),
    ],
)
def test_devices_and_mesh(asked, devices, axes):
    assert facts.count_devices(asked) == devices
    if axes is not None:
        assert facts.mesh_axes(asked) == dict(zip(("data", "fsdp", "tensor"), axes, strict=True))
    elif devices is None:
        assert facts.mesh_axes(asked) is None


def test_a_mesh_that_does_not_fit():
    with pytest.raises(ConfigError, match=r"data=3 .* does not fit 4 devices"):
        facts.mesh_axes(request({"num_workers": 4}, step={"mesh": MeshShape(data=3)}))


def test_bytes_and_vocabulary_of_the_base(tiny_models):
    directory = tiny_models["llama"]
    asked = request(model={"preset_handle": str(directory)})
    arrays = [array for path in directory.glob("*.safetensors") for array in load_file(path).values()]
    assert facts.weight_bytes(asked) == sum(array.nbytes for array in arrays)
    rows = max(array.shape[0] for array in arrays if array.ndim == 2 and array.dtype == np.float32)
    assert facts.vocabulary(asked) == rows
