"""What run.json says of a request. No Ray."""

import dataclasses
import json

from asking import evaluation, request

from kithara_ray import Callback, Checkpointer
from kithara_ray.orchestration.driver.run_manifest import settings
from kithara_ray.orchestration.request.snapshots import Snapshots


def test_settings_say_what_is_computed_and_what_is_kept():
    asked = request(
        model={"quantize": "int8", "starts_from_adapter": True},
        step={"on_nan": "skip", "micro_batches": 3, "optimizer": ("optax", len)},
        evaluation=dataclasses.replace(evaluation(5), max_samples=9),
        checkpointer=Checkpointer("/saved", max_to_keep=1),
        snapshots=Snapshots(7, "/steps"),
        reporting={"callbacks": (Callback(),)},
    )
    told = json.loads(json.dumps(settings(asked)))
    assert told["model"]["preset_handle"] == "/base"
    assert (told["model"]["quantize"], told["model"]["starts_from_adapter"]) == ("int8", True)
    assert (told["model"]["lora"]["r"], told["optimizer"]) == (4, "builtin_function_or_method len")
    assert (told["train_dataloader"]["per_device_batch_size"], told["train_dataloader"]["seed"]) == (2, 0)
    assert told["eval_dataloader"]["dataset"]["type"] == "SFTDataset"
    trainer = told["trainer"]
    assert (trainer["steps"], trainer["epochs"], trainer["on_nan"]) == (4, None, "skip")
    assert (trainer["eval_epochs_interval"], trainer["max_eval_samples"]) == (1, 9)
    assert (trainer["gradient_accumulation_steps"], trainer["checkpointer"]["max_to_keep"]) == (3, 1)
    assert (trainer["export_every_steps"], trainer["export_dir"]) == (7, "/steps")
    assert trainer["callbacks"] == ["Callback"]
    assert told["run_config"] | {"failure_config": None} == {
        "name": "run",
        "storage_path": "/runs",
        "failure_config": None,
    }


def test_settings_of_a_run_without_the_rest():
    told = settings(request())
    assert told["eval_dataloader"] is told["trainer"]["eval_epochs_interval"] is told["trainer"]["export_dir"] is None
