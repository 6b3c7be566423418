"""Training speed and memory of one process, ours beside torch + transformers + peft and beside KerasHub's own LoRA.

    make bench-step

SmolLM2-135M, float32, LoRA r=16 on q_proj and v_proj, AdamW, 4 rows of 256 tokens, all of them trained. Every contender
runs in a process of its own, in turn; tokens/s is over the steps behind the first two. Then the compile time of our
step at two depths.
"""

import json
import os
import statistics
import sys
import time

import common
import numpy as np

ROWS, LENGTH, RANK, STEPS, ROUNDS = 4, 256, 16, 6, 3
BASE = "runs/SmolLM2-135M-Instruct"


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 49152, (ROWS, LENGTH)).astype(np.int32)


def report(seconds: list[float], **more) -> None:
    print(json.dumps({"tokens_per_s": ROWS * LENGTH / statistics.median(seconds[2:]), **more}))


def ours_model(layers: int | None = None):
    from kithara_ray.model import runtime

    runtime.prepare()
    from kithara_ray.hf.checkpoint import BaseCheckpoint
    from kithara_ray.hf.lora_config import LoraConfig
    from kithara_ray.model.causal_lm import build
    from kithara_ray.sharding.mesh import make_mesh

    base = BaseCheckpoint.open(BASE)
    config = base.config | ({"num_hidden_layers": layers} if layers else {})
    return base, build(config, LoraConfig(r=RANK), make_mesh(), "float32", remat="dots")


def ours_batch(model):
    import jax

    from kithara_ray.sft.batches.collate import collate
    from kithara_ray.sft.tokens.tokenize import TokenizedRow
    from kithara_ray.sharding.mesh import batch_sharding

    mask = np.ones(LENGTH, np.uint8)
    mask[0] = 0
    arrays = collate([[TokenizedRow(row, mask)] for row in tokens()], LENGTH, LENGTH, 2)
    return {name: jax.device_put(array, batch_sharding(model.mesh)) for name, array in arrays.items()}


def keras_adamw():
    import keras

    from kithara_ray.train.optimizer import KerasOptimizer

    return KerasOptimizer(keras.optimizers.serialize(keras.optimizers.AdamW(1e-4)))


def ours() -> None:
    base, model = ours_model()
    from kithara_ray.train import step

    frozen, optimizer = model.load(base), keras_adamw()
    state = step.initial_state(model, optimizer, model.initial_factors(0))
    batch = ours_batch(model)
    compiled = step.compile_step(model, optimizer, state, frozen, batch)
    seconds = []
    for _ in range(STEPS):
        mark = time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - mark)
    report(seconds, loss=loss, peak_rss_mb=common.peak_rss_mb())


def peft() -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, weight_decay=0.004)
    ids = torch.tensor(tokens()).long()
    seconds = []
    for _ in range(STEPS):
        mark = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - mark)
    report(seconds, loss=loss.item(), peak_rss_mb=common.peak_rss_mb())


def kerashub() -> None:
    """KerasHub as its users run it, with TensorFlow hidden in its favour: that would cost 0.6 GB more."""
    sys.modules["tensorflow"] = sys.modules["tensorflow_text"] = None
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    import keras_hub

    model = keras_hub.models.CausalLM.from_preset(BASE, preprocessor=None, dtype="float32")
    model.backbone.enable_lora(RANK)
    model.compile(
        optimizer=keras.optimizers.AdamW(1e-4),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        sampler="greedy",
    )
    ids = np.tile(tokens(), (STEPS, 1))
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    trained = np.tile((np.arange(LENGTH) < LENGTH - 1).astype(np.float32), (len(ids), 1))
    seconds = []

    class Clock(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.mark = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            seconds.append(time.perf_counter() - self.mark)

    targets = np.roll(ids, -1, axis=1)
    model.fit(inputs, targets, sample_weight=trained, batch_size=ROWS, shuffle=False, verbose=0, callbacks=[Clock()])
    report(seconds, peak_rss_mb=common.peak_rss_mb())


def compile_at(layers: int) -> None:
    """Seconds from the built model to the compiled step, without weights."""
    _, model = ours_model(layers)
    from kithara_ray.train import step

    optimizer = keras_adamw()
    shapes = (
        step.abstract_state(model, optimizer),
        model.abstract_frozen(np.dtype(np.float32)),
        step.abstract_batch(model, ROWS, LENGTH, LENGTH),
    )
    mark = time.perf_counter()
    compiled = step.compile_step(model, optimizer, *shapes)
    seconds = time.perf_counter() - mark
    print(json.dumps({"compile_s": seconds, "program_kb": len(compiled.as_text()) / 1024}))


def main() -> None:
    sys.path.insert(0, "examples")
    from smollm2 import write_smollm2

    write_smollm2(BASE)
    contenders = ["ours", "peft", "kerashub"]
    results = common.rounds(__file__, contenders, ROUNDS)
    compiles = common.rounds(__file__, ["6", "30"], ROUNDS)

    def median(name, what):
        return statistics.median(row[what] for row in results[name])

    table = ["| | tokens/s | peak RSS MB |", "|---|---|---|"]
    for name, label in zip(
        contenders, ("kithara_ray", "torch + transformers + peft", "KerasHub `enable_lora` + `fit`"), strict=True
    ):
        speed, memory = (
            common.middle([row[what] for row in results[name]]) for what in ("tokens_per_s", "peak_rss_mb")
        )
        table.append(f"| {label} | {speed} | {memory} |")
    ratios = {
        "speed_over_peft": median("ours", "tokens_per_s") / median("peft", "tokens_per_s"),
        "speed_over_kerashub": median("ours", "tokens_per_s") / median("kerashub", "tokens_per_s"),
        "memory_over_kerashub": median("ours", "peak_rss_mb") / median("kerashub", "peak_rss_mb"),
        "compile_30_over_6_layers": statistics.median(row["compile_s"] for row in compiles["30"])
        / statistics.median(row["compile_s"] for row in compiles["6"]),
    }
    table += ["", *(f"- {name.replace('_', ' ')}: {value:.2f}" for name, value in ratios.items())]
    table += [
        f"- compile of {layers} layers: {common.middle([row['compile_s'] for row in compiles[layers]])} s, "
        f"{compiles[layers][0]['program_kb']:.0f} KB of HLO"
        for layers in ("6", "30")
    ]
    common.write("step", "make bench-step", table, {"results": results, "compiles": compiles, "ratios": ratios})


if __name__ == "__main__":
    if len(sys.argv) < 2:
        main()
    elif sys.argv[1].isdigit():
        compile_at(int(sys.argv[1]))
    else:
        {"ours": ours, "peft": peft, "kerashub": kerashub}[sys.argv[1]]()
