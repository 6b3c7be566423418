"""LoRA on conversations, through the model's own chat template; the merged model knows what was learned.

    python examples/chat.py MODEL DATA OUTPUT

A line of DATA is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}. What
the assistant says is learned, to the end of its turn; the rest is context.
"""

import os
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the driver's own: it must not take the accelerator from the workers

import keras

from kithara_ray import Dataloader, KerasHubModel, SFTDataset, Trainer

base, data, output = sys.argv[1:4]

model = KerasHubModel.from_preset(base, lora_rank=16, target_modules="all-linear")
dataset = SFTDataset(data, tokenizer_handle=base, max_seq_len=2048)
print(dataset.preview(1))  # what is learned stands between « and »
trainer = Trainer(
    model=model,
    optimizer=keras.optimizers.AdamW(2e-4),
    train_dataloader=Dataloader(dataset, per_device_batch_size=2),
    steps=int(os.environ.get("STEPS", "100")),
)
trainer.train()
question = [{"role": "user", "content": "what is 1 + 2 ?"}]
print("answer:", model.generate(question, max_length=100, strip_prompt=True))
print("merged:", model.save_in_hf_format(output))
