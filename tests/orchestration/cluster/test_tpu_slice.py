"""The driver code that a pod runs, on a TPU slice that exists in Ray's scheduler alone; the maths runs on CPU."""

import keras
import pytest
import ray
import tiny
from peft import PeftModel
from ray.cluster_utils import Cluster
from ray.train import RunConfig, ScalingConfig
from transformers import AutoModelForCausalLM

from kithara_ray import Dataloader, KerasHubModel, MeshShape, SFTDataset, Trainer
from kithara_ray.errors import ClusterError


@pytest.fixture(scope="module")
def v4_slice(no_cluster):
    """A head without accelerators and one v4 slice of two hosts, as Ray labels them on Cloud TPU."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    for host in range(2):
        resources = {"TPU": 4, "accelerator_type:TPU-V4": 1} | ({"TPU-v4-16-head": 1} if host == 0 else {})
        cluster.add_node(
            num_cpus=2,
            resources=resources,
            labels={
                "ray.io/tpu-slice-name": "slice-0",
                "ray.io/tpu-worker-id": str(host),
                "ray.io/tpu-pod-type": "v4-16",
            },
            env_vars={
                "TPU_NAME": "slice-0",
                "TPU_WORKER_ID": str(host),
                "TPU_ACCELERATOR_TYPE": "v4-16",
                "TPU_TOPOLOGY": "2x2x2",
            },
        )
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def make_trainer(directory, tmp_path, **scaling):
    model = KerasHubModel.from_preset(str(directory), lora_rank=4, lora_alpha=8, precision="float32")
    env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    return Trainer(
        model=model,
        optimizer=keras.optimizers.AdamW(1e-2),
        train_dataloader=Dataloader(
            SFTDataset(tiny.rows(16), tokenizer_handle=str(directory)), per_device_batch_size=1
        ),
        steps=2,
        scaling_config=ScalingConfig(use_tpu=True, **scaling),
        mesh=MeshShape(),  # weights cross processes
        run_config=RunConfig(storage_path=str(tmp_path), worker_runtime_env={"env_vars": env}),
        cluster_timeout_s=2,
        progress=False,
    )


def test_trains_and_exports_on_a_reserved_slice(v4_slice, tiny_models, tmp_path):
    directory = tiny_models["llama"]
    trainer = make_trainer(directory, tmp_path, topology="2x2x2", accelerator_type="TPU-V4", num_workers=2)
    result = trainer.train()
    assert [row["step"] for row in result.history] == [1, 2]
    out = trainer.model.save_in_hf_format(tmp_path / "adapter", only_save_adapters=True)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), out)
    factors = {name: p for name, p in adapted.named_parameters() if "lora_B" in name}
    assert len(factors) == 6
    assert all(p.abs().max() > 0 for p in factors.values())


def test_a_slice_that_does_not_exist_is_named(v4_slice, tiny_models, tmp_path):
    trainer = make_trainer(tiny_models["llama"], tmp_path, topology="2x2x4", accelerator_type="TPU-V4", num_workers=4)
    expected = r"the cluster has no 'TPU-v4-32-head' .*; it has \['TPU-v4-16-head'\]; waited 2 s"
    with pytest.raises(ClusterError, match=expected):
        trainer.train()
