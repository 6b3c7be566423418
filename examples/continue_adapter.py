"""Train an adapter further, on other rows: one of ours, or any LoRA adapter that PEFT has written.

    python examples/continue_adapter.py MODEL ADAPTER DATA OUTPUT

The adapter brings rank, alpha and target modules, so none of them is given.
"""

import os
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the driver's own: it must not take the accelerator from the workers

import keras

from kithara_ray import Dataloader, KerasHubModel, SFTDataset, Trainer

base, adapter, data, output = sys.argv[1:5]

model = KerasHubModel.from_preset(base, adapter=adapter)
trainer = Trainer(
    model=model,
    optimizer=keras.optimizers.AdamW(1e-4),
    train_dataloader=Dataloader(SFTDataset(data, tokenizer_handle=base, max_seq_len=1024), per_device_batch_size=2),
    steps=int(os.environ.get("STEPS", "50")),
)
result = trainer.train()
print(f"loss {result.history[0]['loss']:.3f} -> {result.history[-1]['loss']:.3f}")
print("adapter:", model.save_in_hf_format(output, only_save_adapters=True))
