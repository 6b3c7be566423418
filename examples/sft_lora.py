"""Supervised fine-tuning with LoRA: the whole script that a user writes.

    python examples/sft_lora.py MODEL TRAIN OUTPUT
    ray job submit --address http://HEAD:8265 --working-dir . -- python examples/sft_lora.py MODEL TRAIN OUTPUT

MODEL is `hf://org/name`, a Hugging Face directory or one in `gs://`; TRAIN is a jsonl file with a prompt and an answer
a line; OUTPUT a directory. On a v5e-16 slice the scaling config is

    ScalingConfig(use_tpu=True, topology="4x4", accelerator_type="TPU-V5LITEPOD", num_workers=4)

A submitted job runs in a copy of the working directory: give absolute paths or URLs.
"""

import os
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the driver's own: it must not take the accelerator from the workers

import keras
import ray
from ray.train import ScalingConfig

from kithara_ray import Dataloader, KerasHubModel, SFTDataset, Trainer

base, train_file, output = sys.argv[1:4]

model = KerasHubModel.from_preset(base, lora_rank=16)  # the one-line toggle
data = SFTDataset(ray.data.read_json(train_file), tokenizer_handle=base, max_seq_len=1024)
trainer = Trainer(
    model=model,
    optimizer=keras.optimizers.AdamW(2e-4),
    train_dataloader=Dataloader(data, per_device_batch_size=1),
    steps=int(os.environ.get("STEPS", "100")),
    scaling_config=ScalingConfig(num_workers=2),
    cpu_devices_per_worker=2,
)
result = trainer.train()
model.save_in_hf_format(f"{output}/adapter", only_save_adapters=True)  # 1 adapters only
model.save_in_hf_format(
    f"{output}/both", only_save_adapters=False, save_adapters_separately=True
)  # 2 base and adapters
model.save_in_hf_format(f"{output}/merged", save_adapters_separately=False)  # 3 merged
print(model.generate("What is your name?", max_length=30))
