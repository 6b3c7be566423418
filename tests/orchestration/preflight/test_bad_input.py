"""What a user gets wrong ends in bounded time in an error that names it, before a worker starts, and writes nothing."""

import os
import threading

import keras
import numpy as np
import optax
import pytest
import tiny
from ray.train import ScalingConfig
from ray.util.state import list_actors

from kithara_ray import Callback, Dataloader, KerasHubModel, MeshShape, SFTDataset, TextCompletionDataset, Trainer
from kithara_ray.errors import (
    CheckpointError,
    ClusterError,
    ConfigError,
    DataError,
    DestinationError,
    UnsupportedError,
)


class Locked(Callback):
    """Cannot be carried to a worker."""

    def __init__(self):
        self.lock = threading.Lock()


@pytest.fixture
def directory(tiny_models):
    return str(tiny_models["llama"])


@pytest.fixture
def model(directory):
    return KerasHubModel.from_preset(directory, lora_rank=4)


def trainer(model, rows=None, dataset=None, **kwargs):
    dataset = dataset or SFTDataset(
        tiny.rows(8) if rows is None else rows, tokenizer_handle=model.preset_handle, max_seq_len=64
    )
    return Trainer(
        **{
            "model": model,
            "optimizer": keras.optimizers.AdamW(1e-3),
            "train_dataloader": Dataloader(dataset, per_device_batch_size=1),
            "steps": 1,
            "progress": False,
            "cluster_timeout_s": 1,
        }
        | kwargs
    )


FROM_PRESET = {
    "no such directory": (dict(preset_handle="/nowhere/model"), CheckpointError, "/nowhere/model"),
    "a bare name": (dict(preset_handle="google/gemma-2-2b"), CheckpointError, "hf://"),
    "a KerasHub preset": (
        dict(preset_handle="kaggle://keras/gemma2"),
        UnsupportedError,
        "kaggle://keras/gemma2: .* use hf://",
    ),
    "rank 0": (dict(lora_rank=0), ConfigError, r"lora_rank must be >= 1, got 0"),
    "a negative rank": (dict(lora_rank=-3), ConfigError, r"lora_rank must be >= 1, got -3"),
    "a fractional rank": (dict(lora_rank=1.5), ConfigError, "lora_rank"),
    "alpha without a rank": (
        dict(lora_rank=None, lora_alpha=8),
        ConfigError,
        "lora_alpha=8 without lora_rank=, which trains all weights and no adapter; leave it out",
    ),
    "alpha 0": (dict(lora_alpha=0), ConfigError, "lora_alpha"),
    "no such target": (
        dict(target_modules=["q_proj", "query"]),
        ConfigError,
        "target_modules: 'query' matches no linear layer of this model; it has down_proj, gate_proj",
    ),
    "an unknown precision": (dict(precision="int3"), ConfigError, "precision must be one of float32.*got 'int3'"),
    "sharding_strategy": (
        dict(sharding_strategy="fsdp"),
        ConfigError,
        r"no argument 'sharding_strategy': give Trainer\(mesh=",
    ),
    "an unknown argument": (dict(lora_rnk=3), ConfigError, "no argument 'lora_rnk'"),
}


@pytest.mark.parametrize("case", FROM_PRESET)
def test_from_preset(case, directory):
    arguments, error, text = FROM_PRESET[case]
    with pytest.raises(error, match=text):
        KerasHubModel.from_preset(**{"preset_handle": directory, "lora_rank": 4} | arguments)


def test_an_unknown_family_is_refused(tmp_path, directory):
    import json
    import shutil

    shutil.copytree(directory, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(UnsupportedError, match="model_type='mamba' is not supported: no block here computes what"):
        KerasHubModel.from_preset(str(tmp_path / "model"), lora_rank=4)


TRAINER = {
    "steps and epochs": (dict(epochs=1), ConfigError, "one of steps and epochs, got steps=1 and epochs=1"),
    "no steps": (dict(steps=0), ConfigError, "steps must be an integer >= 1, got 0"),
    "router's factor": (
        dict(router_aux_loss_coef=-1),
        ConfigError,
        "router_aux_loss_coef must be a number >= 0, got -1",
    ),
    "no routers": (
        dict(router_aux_loss_coef=0.1),
        UnsupportedError,
        "llama has no routers whose auxiliary loss is kno",
    ),
    "log interval": (dict(log_steps_interval=0), ConfigError, "log_steps_interval must be an integer >= 1, got 0"),
    "devices": (dict(cpu_devices_per_worker=0), ConfigError, "cpu_devices_per_worker must be an integer >= 1, got 0"),
    "two eval intervals": (dict(eval_steps_interval=1, eval_epochs_interval=1), ConfigError, "one of eval_steps"),
    "an optimizer's name": (dict(optimizer="adamw"), ConfigError, "optimizer must be a keras.* got str"),
    "profiler": (dict(profiler="/tmp/x"), ConfigError, "profiler must be a kithara_ray.Profiler.* got str"),
    "callbacks": (dict(callbacks=[print]), ConfigError, "callbacks must be kithara_ray.Callback objects"),
    "a callback alone": (dict(callbacks=Callback()), ConfigError, "callbacks must be a list, got Callback"),
    "a lock": (dict(callbacks=[Locked()]), ConfigError, "callback Locked .* cannot be pickled .* open files"),
    "checkpointer": (dict(checkpointer=object()), ConfigError, "checkpointer must be a Checkpointer, got object"),
    "remat": (dict(remat="all"), ConfigError, "remat must be one of auto, block, attention, .*, got 'all'"),
    "a GPU": (dict(scaling_config=ScalingConfig(use_gpu=True)), UnsupportedError, "use_gpu=True"),
    "elastic": (dict(scaling_config=ScalingConfig(num_workers=(1, 2))), UnsupportedError, "a fixed number of workers"),
}


@pytest.mark.parametrize("case", TRAINER)
def test_trainer(case, model):
    arguments, error, text = TRAINER[case]
    with pytest.raises(error, match=text):
        trainer(model, **arguments)


def test_mesh():
    with pytest.raises(ConfigError, match="at most one of them -1"):
        MeshShape(data=-1, fsdp=-1)
    with pytest.raises(ConfigError, match="does not fit 4 devices"):
        MeshShape(data=3).resolve(4)


def test_dataset_and_dataloader(directory):
    rows = tiny.rows(2)
    with pytest.raises(ConfigError, match="needs one of tokenizer and tokenizer_handle"):
        SFTDataset(rows)
    with pytest.raises(ConfigError, match="max_seq_len must be an integer >= 2, got 1"):
        SFTDataset(rows, tokenizer_handle=directory, max_seq_len=1)
    with pytest.raises(ConfigError, match="takes no argument 'model_type'"):
        SFTDataset(rows, tokenizer_handle=directory, model_type="MaxText")
    with pytest.raises(ConfigError, match="on_bad_row"):
        TextCompletionDataset(rows, tokenizer_handle=directory, on_bad_row="ignore")
    dataset = SFTDataset(rows, tokenizer_handle=directory)
    with pytest.raises(ConfigError, match="per_device_batch_size must be an integer >= 1, got 0"):
        Dataloader(dataset, per_device_batch_size=0)
    with pytest.raises(UnsupportedError, match="dataset_is_sharded_per_host=True"):
        Dataloader(dataset, 1, dataset_is_sharded_per_host=True)


ROWS = {
    "no rows": ([], "the dataset is empty"),
    "prompts that fill max_seq_len": (
        [{"prompt": "what is one " * 50, "answer": "2"}] * 3,
        "the dataset is empty: of 3 rows 3 were dropped because truncation left nothing to train",
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows(case, cluster, model):
    rows, text = ROWS[case]
    with pytest.raises(DataError, match=text):
        trainer(model, rows).train()


def test_files(cluster, model, tmp_path):
    with pytest.raises(DataError, match=r"nothing.jsonl: no such file"):
        trainer(model, dataset=SFTDataset(tmp_path / "nothing.jsonl", tokenizer_handle=model.preset_handle)).train()
    with pytest.raises(DataError, match=r"unknown extension '.pdf'"):
        trainer(model, dataset=SFTDataset(tmp_path / "x.pdf", tokenizer_handle=model.preset_handle)).train()


def test_no_tokenizer(cluster, model, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=f"no tokenizer at '{tmp_path}'"):
        trainer(model, dataset=SFTDataset(tiny.rows(2), tokenizer_handle=str(tmp_path))).train()


def test_a_cluster_that_is_too_small(cluster, model):
    with pytest.raises(ClusterError, match=r"can hold 4 of 8 workers that need CPU: 1 each.*waited 1 s"):
        trainer(model, scaling_config=ScalingConfig(num_workers=8)).train()
    wants_memory = ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1, "huge_disk": 2})
    with pytest.raises(ClusterError, match=r"can hold 0 of 1 workers that need CPU: 1, huge_disk: 2"):
        trainer(model, scaling_config=wants_memory).train()


def coordinators() -> int:
    """All that this cluster has ever started."""
    return len(list_actors(filters=[("class_name", "=", "Coordinator")], limit=10_000))


def test_what_fails_before_the_workers_leaves_no_coordinator(cluster, model, tmp_path):
    """A run starts one when all its checks have passed."""
    (tmp_path / "steps" / "step-000002").mkdir(parents=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = coordinators()
    for arguments, exports, error, message in (
        ({"mesh": MeshShape(data=3)}, [], ConfigError, "does not fit 1 devices"),
        ({"rows": [{"question": "a"}]}, [], DataError, "no column 'prompt'"),
        ({}, [{"output_dir": str(tmp_path / "full")}], DestinationError, "exists and is not empty"),
        ({"export_every_steps": 1, "export_dir": str(tmp_path / "steps")}, [], DestinationError, "an earlier run"),
        ({"scaling_config": ScalingConfig(num_workers=9)}, [], ClusterError, "can hold 4 of 9 workers"),
    ):
        with pytest.raises(error, match=message):
            trainer(model, **arguments).train(exports)
    with pytest.raises(DestinationError, match="exists and is not empty"):
        model.check_destination(str(tmp_path / "full"))
    model.check_destination(str(tmp_path / "new"))
    assert coordinators() == before
    # Such an actor is seen.
    model.coordinator()
    assert coordinators() == before + 1


def test_saving_before_training(cluster, model, tmp_path):
    with pytest.raises(ConfigError, match="nothing has been trained yet"):
        model.save_in_hf_format(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_destination_that_is_not_empty_is_left_alone(cluster, model, tmp_path):
    from kithara_ray.hf.adapter import target_modules_of
    from kithara_ray.hf.checkpoint import BaseCheckpoint

    base = BaseCheckpoint.open(model.preset_handle)
    shapes = {m: base.tensors[f"{m}.weight"].shape for m in target_modules_of(model.lora, base)}
    model.adapter = {f"{m}.lora_A.weight": np.ones((4, i), np.float32) for m, (_, i) in shapes.items()}
    model.adapter |= {f"{m}.lora_B.weight": np.ones((o, 4), np.float32) for m, (o, _) in shapes.items()}
    (tmp_path / "mine.txt").write_text("mine")
    for layout in ({"only_save_adapters": True}, {"save_adapters_separately": True}, {}):
        with pytest.raises(DestinationError, match="exists and is not empty"):
            model.save_in_hf_format(tmp_path, **layout)
    assert os.listdir(tmp_path) == ["mine.txt"]
    with pytest.raises(ConfigError, match="dtype"):
        model.save_in_hf_format(tmp_path / "out", dtype="float12")
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_generate(cluster, model):
    with pytest.raises(ConfigError, match="max_length=3 leaves no token"):
        model.generate("what is one and two ?", max_length=3)
    with pytest.raises(DataError, match="prompt 1 is empty"):
        model.generate(["what", ""], max_length=8)
    with pytest.raises(ConfigError, match="inputs must be a text"):
        model.generate(3, max_length=8)
    model.release()


def test_weight_decay_leaves_out_what_the_optimizer_says(model):
    """Keras forgets it when it serialises; the names are those of the files."""
    from kithara_ray.train.optimizer import KerasOptimizer, is_elementwise

    optimizer = keras.optimizers.AdamW(0.5, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["norm", "bias"])
    kind, value = trainer(model, optimizer=optimizer).request.step.optimizer
    params = {f"model.layers.0.{name}.weight": np.ones(3, np.float32) for name in ("input_layernorm", "mlp.up_proj")}
    ours = KerasOptimizer(value)
    after, _ = ours.update({name: np.zeros(3, np.float32) for name in params}, ours.init(params), params)
    assert [float(array[0]) for array in after.values()] == [1, 0.75]
    assert is_elementwise(kind, value)
    assert not is_elementwise(kind, value | {"exclude_from_weight_decay": "layers.1"})
    optimizer.exclude_from_weight_decay(var_list=[keras.Variable(1.0)])
    with pytest.raises(UnsupportedError, match=r"give var_names=\[...\], patterns of Hugging Face's tensor names"):
        trainer(model, optimizer=optimizer)


def test_optax_is_taken(model):
    assert trainer(model, optimizer=optax.adamw(1e-3)).request.step.optimizer[0] == "optax"
