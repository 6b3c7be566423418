"""All weights trained, with checkpoints: start it again, and it goes on from the newest.

    python examples/full_finetune.py MODEL DATA OUTPUT

Without `lora_rank` every weight is trained. That is the base, two moments and the gradient in float32 over all chips:
16 bytes a weight, where LoRA needs the 2 of a frozen bfloat16 base. OUTPUT gets `checkpoints/` and `model/`, which has
the base's files and dtypes. Several hosts need one that all of them share, or `gs://...`.
"""

import os
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the driver's own: it must not take the accelerator from the workers

import keras
from ray.train import RunConfig

from kithara_ray import Checkpointer, Dataloader, KerasHubModel, SFTDataset, Trainer

base, data, output = sys.argv[1:4]

model = KerasHubModel.from_preset(base)
trainer = Trainer(
    model=model,
    optimizer=keras.optimizers.AdamW(1e-5, weight_decay=0.01),
    train_dataloader=Dataloader(SFTDataset(data, tokenizer_handle=base, max_seq_len=1024), per_device_batch_size=1),
    steps=int(os.environ.get("STEPS", "100")),
    checkpointer=Checkpointer(f"{output}/checkpoints", save_interval_steps=50, max_to_keep=2),
    run_config=RunConfig(storage_path=f"{output}/runs", name="full"),  # what was trained is here until it is exported
)
result = trainer.train()
print(f"loss {result.history[0]['loss']:.3f} -> {result.history[-1]['loss']:.3f}, checkpoint: {result.checkpoint}")
print("model:", model.save_in_hf_format(f"{output}/model"))
