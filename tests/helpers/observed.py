"""One run of two workers that share a model's weights, with everything that listens to a run, and its three exports.

The tests of tests/orchestration that look at a finished run share it: a group of workers takes long to start.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pytest
import ray
import tiny
from loops import Recorder, loop_with, use, writes_logits
from ray.train import RunConfig, ScalingConfig

from kithara_ray import Callback, Checkpointer, Dataloader, KerasHubModel, MeshShape, Profiler, SFTDataset, Trainer
from kithara_ray.callbacks import WandB
from kithara_ray.orchestration.results import TrainResult

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

TOKENS = np.random.default_rng(0).integers(3, tiny.VOCABULARY, (4, 24)).astype(np.int32)
LAYERS = ["down_proj", "o_proj", "q_proj", "v_proj"]
HELD_OUT = tiny.rows(5)
PROMPTS = ["what is 1 + 2 ?", "<b>2 + 2</b>"]
# Asked to stop after STOP_AT; the wish is cast in the next step and looked at two steps later.
STOP_AT, LAST, EVERY = 5, 8, 3


@dataclass(frozen=True)
class Observed:
    """A finished run.

    Attributes:
        directory: the base's. root: of the run, named "run", and of all that was written beside it: told.jsonl of a
            Recorder, checkpoints, board, trace, logits.npy of TOKENS, and the exports adapter, both and merged.
    """

    directory: Path
    root: Path
    trainer: Trainer
    result: TrainResult

    @property
    def model(self) -> KerasHubModel:
        return self.trainer.model


def train_then_write_logits(path):
    """A loop that afterwards writes what the sharded model computes."""

    def check_split(run):
        import jax

        leaves = jax.tree.leaves(run.frozen)
        assert any(not array.is_fully_addressable for array in leaves), "the weights must cross processes"
        assert all(not p.is_fully_addressable for p in run.state["params"].values())

    return loop_with(built=check_split, trained=writes_logits(path, TOKENS))


def careless():
    class Careless(Callback):
        required = False

        def on_step(self, run, step, metrics):
            raise OSError("the tracker is away")

    return Careless()


def loader(rows, directory, rows_per_device):
    data = SFTDataset(rows, tokenizer_handle=str(directory), max_seq_len=64)
    return Dataloader(data, per_device_batch_size=rows_per_device, seed=1)


def train_observed(directory: Path, root: Path) -> Observed:
    """22 rows in batches of 8, the last of each epoch not full; a callback ends the run of 30 steps."""
    trainer = Trainer(
        model=KerasHubModel.from_preset(
            str(directory), lora_rank=4, lora_alpha=12, target_modules=LAYERS, precision="float32"
        ),
        optimizer=keras.optimizers.AdamW(1e-2, weight_decay=0.01),
        train_dataloader=loader(tiny.rows(22), directory, 2),
        eval_dataloader=loader(HELD_OUT, directory, 1),
        steps=30,
        eval_steps_interval=2,
        checkpointer=Checkpointer(str(root / "checkpoints"), save_interval_steps=EVERY, max_to_keep=5),
        export_every_steps=EVERY,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(root), name="run"),
        cpu_devices_per_worker=2,
        mesh=MeshShape(),  # weights cross processes
        tensorboard_dir=str(root / "board"),
        profiler=Profiler(str(root / "trace"), steps=(2, 3)),
        callbacks=[
            careless(),
            Recorder(root / "told.jsonl", stop_at=STOP_AT),
            WandB(project="p", mode="offline", directory=str(root)),
        ],
        report_prompts=PROMPTS,
        report_max_length=64,
        progress=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        use(train_then_write_logits(root / "logits.npy"), patch)
        result = trainer.train()
    save_all(trainer.model, root)
    return Observed(directory, root, trainer, result)


def save_all(model: KerasHubModel, out: Path) -> None:
    model.save_in_hf_format(str(out / "adapter"), only_save_adapters=True)
    model.save_in_hf_format(str(out / "both"), only_save_adapters=False, save_adapters_separately=True)
    model.save_in_hf_format(str(out / "merged"), save_adapters_separately=False, check_logits=True)
