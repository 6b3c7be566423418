"""From `train()` to the end of the first step, for a tiny model on two local Ray workers: where the time goes.

    make bench-start

A llama of two small blocks, 80 rows, two workers of one CPU device each. One driver trains four times. The first run is
cold: it starts Ray, imports the tokenizer's library, and compiles unless the program is kept on disk from before. The
medians of the three after it are the phases of a warm start. The report of a run shows the same phases, and the work
that is done beside them.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

ROWS, STEPS, WARM = 80, 2, 3
GOAL_S = 12
WRITE = "import sys; sys.path.insert(0, sys.argv[2]); import tiny; tiny.write_model(tiny.Path(sys.argv[1]), 'llama')"


def start(model: str, out: Path, number: int) -> dict:
    """Train once; report the phases, their sum, and the processor time of this machine's busy cores meanwhile."""
    import keras
    from ray.train import RunConfig, ScalingConfig

    from kithara_ray import Dataloader, KerasHubModel, SFTDataset, Trainer

    rows = [{"prompt": f"{n} and {n} is", "answer": f" {n + n}"} for n in range(ROWS)]
    handle = KerasHubModel.from_preset(model, lora_rank=4, precision="float32")
    trainer = Trainer(
        model=handle,
        optimizer=keras.optimizers.AdamW(1e-3),
        train_dataloader=Dataloader(SFTDataset(rows, tokenizer_handle=model, max_seq_len=64), per_device_batch_size=4),
        steps=STEPS,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(out), name=f"run{number}"),
        progress=False,
    )
    mark, busy = time.perf_counter(), busy_s()
    result = trainer.train()
    seconds, busy = time.perf_counter() - mark, busy_s() - busy
    return {
        "phases": result.phases,
        "first_step_after_s": sum(result.phases.values()),
        "train_s": seconds,
        "busy_s": busy,
    }


def busy_s() -> float:
    """Processor seconds of the whole machine until now."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, soft, *_ = map(int, fields)
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as directory:
        model, out = str(Path(directory) / "tiny"), Path(directory) / "runs"
        helpers = str(common.HERE.parent / "tests" / "helpers")
        subprocess.run([sys.executable, "-c", WRITE, model, helpers], check=True, capture_output=True)
        runs = []
        for number in range(1 + WARM):
            runs.append(start(model, out, number))
            print(f"run {number}: load {os.getloadavg()[0]:.1f} {runs[-1]}", file=sys.stderr)
    cold, warm = runs[0], runs[1:]
    table = ["| phase | warm, s | cold, s |", "|---|---|---|"]
    for name in cold["phases"]:
        seconds = [run["phases"].get(name, 0.0) for run in warm]
        table.append(f"| {name} | {common.middle(seconds)} | {cold['phases'][name]:.2f} |")
    totals = [run["first_step_after_s"] for run in warm]
    table.append(f"| **until the first step has ended** | {common.middle(totals)} | {cold['first_step_after_s']:.2f} |")
    whole = common.middle([run["train_s"] for run in warm])
    table.append(f"| the whole of `train()`, {STEPS} steps | {whole} | {cold['train_s']:.2f} |")
    busy = common.middle([run["busy_s"] for run in warm])
    table += [
        "",
        f"- goal: {GOAL_S} s until the first step has ended",
        f"- processor time of the whole machine during `train()`: {busy} s warm, {cold['busy_s']:.0f} s cold",
    ]
    common.write("start", "make bench-start", table, {"runs": runs, "median_s": statistics.median(totals)})


if __name__ == "__main__":
    main()
