"""LoRA on instructions as Alpaca has them: columns instruction, input (may be empty) and output, in a template.

    python examples/alpaca.py MODEL DATA OUTPUT

MODEL is `hf://org/name` or a Hugging Face directory, DATA a jsonl, json, csv or parquet file, OUTPUT a new directory or
`gs://...` for the adapter. Only the output is learned, and the end of the sequence behind it.
"""

import os
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the driver's own: it must not take the accelerator from the workers

import keras

from kithara_ray import Dataloader, KerasHubModel, SFTDataset, Trainer

base, data, output = sys.argv[1:4]


def in_template(row: dict) -> dict:
    """What is asked, by headings; the same text has to be put together when the model is used."""
    context = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    return {"prompt": f"### Instruction:\n{row['instruction']}\n\n{context}### Response:\n", "answer": row["output"]}


model = KerasHubModel.from_preset(base, lora_rank=16, lora_alpha=32, target_modules="all-linear")
dataset = SFTDataset(data, tokenizer_handle=base, max_seq_len=1024, custom_formatting_fn=in_template)
print(dataset.preview(1))
trainer = Trainer(
    model=model,
    optimizer=keras.optimizers.AdamW(2e-4),
    train_dataloader=Dataloader(dataset, per_device_batch_size=2),
    steps=int(os.environ.get("STEPS", "100")),
    # scaling_config=ScalingConfig(use_tpu=True, topology="4x4", accelerator_type="TPU-V5LITEPOD", num_workers=4),
)
result = trainer.train()
print(f"loss {result.history[0]['loss']:.3f} -> {result.history[-1]['loss']:.3f}")
print("adapter:", model.save_in_hf_format(output, only_save_adapters=True))
