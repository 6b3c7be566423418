"""More of a domain's plain text for a model: every token is learned, texts are packed, perplexity is watched.

    python examples/continued_pretraining.py MODEL TRAIN EVAL OUTPUT

TRAIN and EVAL are .txt files (a line a text), or jsonl, csv or parquet with a column `text`. Packed texts do not see
each other. A rank of 64 on all linear layers takes in more than q and v at 16; without `lora_rank`, all weights do.
"""

import os
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the driver's own: it must not take the accelerator from the workers

import keras

from kithara_ray import Dataloader, KerasHubModel, TextCompletionDataset, Trainer

base, train, held_out, output = sys.argv[1:5]
steps = int(os.environ.get("STEPS", "100"))


def texts(source: str) -> TextCompletionDataset:
    return TextCompletionDataset(source, tokenizer_handle=base, max_seq_len=2048)


model = KerasHubModel.from_preset(base, lora_rank=64, target_modules="all-linear")
schedule = keras.optimizers.schedules.CosineDecay(0.0, steps, warmup_target=1e-4, warmup_steps=max(1, steps // 20))
trainer = Trainer(
    model=model,
    optimizer=keras.optimizers.AdamW(schedule, weight_decay=0.1),
    train_dataloader=Dataloader(texts(train), per_device_batch_size=1, packing=True),
    eval_dataloader=Dataloader(texts(held_out), per_device_batch_size=1, packing=True),
    eval_steps_interval=max(1, steps // 2),
    steps=steps,
)
for row in trainer.train().eval_history:
    print(f"step {row['step']}: perplexity {row['eval_perplexity']:.2f} over {row['eval_tokens']:.0f} tokens")
print("adapter:", model.save_in_hf_format(output, only_save_adapters=True))
