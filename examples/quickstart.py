"""Fine-tune a model with LoRA on two local Ray workers, score it before and after, and export it three ways.

    make quickstart                                             SmolLM2-135M-Instruct learns to add numbers
    python examples/quickstart.py --model hf://... --data file.jsonl      your model, your prompts and answers
    python examples/quickstart.py --shard                       the same with split weights, as a large model has them

The two workers stand for two TPU hosts, each with a (CPU) device, and the collectives are real. The model is small, so
each device holds all of it; `--shard` splits its weights over four devices. On a pod, only the ScalingConfig changes:
`ScalingConfig(use_tpu=True, ...)`.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the driver's own: it must not take the accelerator from the workers
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # PyTorch is not needed for its tokenizers

import keras
from arithmetic import make_rows, score
from ray.train import RunConfig, ScalingConfig
from smollm2 import write_smollm2

from kithara_ray import Dataloader, KerasHubModel, MeshShape, SFTDataset, Trainer

WORKERS = 2
BATCH_ROWS = 8
HELD_OUT = 50
ANSWER_TOKENS = 8
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hf://..., a local Hugging Face directory, gs://... (default: SmolLM2-135M)")
    parser.add_argument("--data", help="a jsonl, json, csv or parquet file with columns prompt and answer")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--shard", action="store_true", help="split the weights over two devices in each worker")
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("runs") / time.strftime("quickstart-%Y%m%d-%H%M%S"))
    return parser.parse_args()


def schedule(steps: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """6 % warm-up to 1e-3, then down to 0."""
    warmup = max(1, steps // 16)
    return keras.optimizers.schedules.CosineDecay(0.0, steps - warmup, warmup_target=1e-3, warmup_steps=warmup)


def accuracy(model: KerasHubModel, held_out: list[dict], tokenizer) -> tuple[int, list[str]]:
    """How many held-out prompts are answered right, and the answers."""
    prompts = [row["prompt"] for row in held_out]
    longest = max(len(ids) for ids in tokenizer(prompts)["input_ids"])
    answers = model.generate(prompts, max_length=longest + ANSWER_TOKENS, strip_prompt=True)
    return sum(score(answer, row["entry"]) for answer, row in zip(answers, held_out, strict=True)), answers


def train(model: KerasHubModel, dataset: SFTDataset, args: argparse.Namespace):
    devices = 2 if args.shard else 1
    trainer = Trainer(
        model=model,
        optimizer=keras.optimizers.AdamW(schedule(args.steps), weight_decay=0.0),
        train_dataloader=Dataloader(dataset, per_device_batch_size=BATCH_ROWS // (WORKERS * devices)),
        steps=args.steps,
        scaling_config=ScalingConfig(num_workers=WORKERS),
        run_config=RunConfig(storage_path=str(args.out.absolute()), name="run"),
        cpu_devices_per_worker=devices,
        mesh=MeshShape(fsdp=WORKERS * devices) if args.shard else None,  # None: by the model's size
        remat="dots",  # a small model: there is memory to keep what the backward pass needs
    )
    return trainer.train()


def export(model: KerasHubModel, out: Path) -> None:
    adapter = model.save_in_hf_format(out / "adapter", only_save_adapters=True)
    both = model.save_in_hf_format(out / "both", save_adapters_separately=True)
    merged = model.save_in_hf_format(out / "merged")
    print(f"""
Three exports. In transformers (pip install torch transformers peft):

  # 1. the adapter alone, over the base
  model = AutoModelForCausalLM.from_pretrained("{model.preset_handle}")
  model.load_adapter("{adapter}")
  # 2. base and adapter, side by side
  model = AutoModelForCausalLM.from_pretrained("{both}")
  model.load_adapter("{both}/adapter")
  # 3. merged
  model = AutoModelForCausalLM.from_pretrained("{merged}")""")


def main() -> None:
    args = parse_args()
    started = time.monotonic()
    if args.model is None:
        args.model = str(write_smollm2(Path("runs") / "SmolLM2-135M-Instruct"))
    model = KerasHubModel.from_preset(
        args.model, lora_rank=16, lora_alpha=32, target_modules=LINEAR_LAYERS, precision="float32"
    )
    if args.data is not None:
        dataset = SFTDataset(args.data, tokenizer_handle=args.model, max_seq_len=args.max_seq_len)
        result = train(model, dataset, args)
        print(f"loss {result.history[0]['loss']:.3f} -> {result.history[-1]['loss']:.3f}")
        export(model, args.out)
        return

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train_rows, held_out = make_rows(args.steps * BATCH_ROWS, HELD_OUT, seed=0, tokenizer=tokenizer)
    before, answers = accuracy(model, held_out, tokenizer)
    print(f"before: {before} of {HELD_OUT} held-out sums right; {held_out[0]['entry']['question']!r} -> {answers[0]!r}")
    result = train(model, SFTDataset(train_rows, tokenizer_handle=args.model, max_seq_len=args.max_seq_len), args)
    print(f"loss {result.history[0]['loss']:.3f} -> {result.history[-1]['loss']:.3f}")
    after, answers = accuracy(model, held_out, tokenizer)
    print(f"after:  {after} of {HELD_OUT} held-out sums right; {held_out[0]['entry']['question']!r} -> {answers[0]!r}")
    export(model, args.out)
    print(f"\n{before} -> {after} of {HELD_OUT} right, in {time.monotonic() - started:.0f} s. Run: {result.path}")


if __name__ == "__main__":
    main()
