"""Requests as the Trainer makes them, of nothing that must be there: no base, no tokenizer, no Ray."""

import dataclasses
from typing import Any

from ray.train import RunConfig, ScalingConfig

from kithara_ray import Dataloader, SFTDataset
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.orchestration.cluster.worker_group import WorkerGroup
from kithara_ray.orchestration.request.run_request import (
    EvalRequest,
    ModelRequest,
    Reporting,
    RunRequest,
    StepSettings,
    Timeouts,
)

# One host of four chips.
V5E_4 = dict(use_tpu=True, topology="2x2", accelerator_type="TPU-V5LITEPOD", num_workers=1)
LORA = LoraConfig(r=4, target_modules=("q_proj",))


def loader(per_device_batch_size: Any = 2, **settings: Any) -> Dataloader:
    dataset = SFTDataset([{"prompt": "a", "answer": "b"}], tokenizer_handle="/tokenizer", max_seq_len=64)
    return Dataloader(dataset, per_device_batch_size, **settings)


def evaluation(per_device_batch_size: Any = 2) -> EvalRequest:
    return EvalRequest(loader(per_device_batch_size), every_steps=None, every_epochs=1, max_samples=None)


def request(
    scaling: dict[str, Any] | None = None,
    run_config: RunConfig | None = None,
    model: dict[str, Any] | None = None,
    step: dict[str, Any] | None = None,
    reporting: dict[str, Any] | None = None,
    **parts: Any,
) -> RunRequest:
    """A small run on CPUs, with some of its parts changed."""
    scaling_config = ScalingConfig(**(scaling or {"num_workers": 1}))
    made = RunRequest(
        model=ModelRequest("/base", "/base", LORA, "float32", None, starts_from_adapter=False),
        train=loader(),
        evaluation=None,
        steps=4,
        epochs=None,
        step=StepSettings(("keras", {}), mesh=None, remat="block", micro_batches=1, seed=0, on_nan="stop"),
        group=WorkerGroup(scaling_config, run_config or RunConfig(name="run", storage_path="/runs"), 1, 300.0),
        checkpointer=None,
        snapshots=None,
        timeouts=Timeouts(600.0, 3600.0),
        reporting=Reporting(1, (), None, None, (), 256, progress=True),
    )
    changed = {"model": model, "step": step, "reporting": reporting}
    parts |= {name: dataclasses.replace(getattr(made, name), **some) for name, some in changed.items() if some}
    return dataclasses.replace(made, **parts)
