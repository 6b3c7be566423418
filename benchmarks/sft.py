"""Fine-tuning on short real rows, ours beside TRL's SFTTrainer: useful tokens a second, and memory.

    make bench-sft

SmolLM2-135M, float32, LoRA r=16 on q_proj and v_proj, AdamW. The rows are the distinct question-answer pairs of PyPI's
chatterbot-corpus through the model's chat template, at most 512 tokens. Useful tokens are those of rows: padding is
none. A step holds about as many of them for every contender: 8 rows, or a pack of 512 tokens. Every contender runs in a
process of its own, in turn; the first two steps are not counted. TRL runs without gradient checkpointing, its fastest.
"""

import importlib.util
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import common
import numpy as np

RANK, MAX_LEN, ROWS, STEPS, ROUNDS = 16, 512, 8, 9, 2
SKIP = 2
BASE = "runs/SmolLM2-135M-Instruct"
PACKAGES = ("trl", "datasets", "chatterbot-corpus")


def pairs() -> list[dict[str, str]]:
    """{"prompt", "answer"} of every distinct English pair, rendered by the model's chat template."""
    import yaml
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    root = Path(importlib.util.find_spec("chatterbot_corpus").submodule_search_locations[0]) / "data" / "english"
    found = {}
    for file in sorted(root.glob("*.yml")):
        for said in yaml.safe_load(file.read_text())["conversations"]:
            found |= dict.fromkeys(itertools.pairwise(map(str, said)))
    rows = []
    for question, answer in found:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        rows.append({"prompt": prompt, "answer": answer + tokenizer.eos_token})
    return rows


def report(seconds: list[float], tokens: list[int], **more) -> None:
    useful = sum(tokens[SKIP:]) / sum(seconds[SKIP:])
    figures = {"useful_tokens_per_s": useful, "step_s": statistics.median(seconds[SKIP:])}
    print(json.dumps(figures | {"tokens_a_step": statistics.mean(tokens[SKIP:]), **more}))


def ours(packs: int = 1) -> None:
    from kithara_ray.model import runtime

    runtime.prepare()
    import keras

    from kithara_ray.hf.checkpoint import BaseCheckpoint
    from kithara_ray.hf.lora_config import LoraConfig
    from kithara_ray.model.causal_lm import build
    from kithara_ray.sft.batches.collate import collate
    from kithara_ray.sft.batches.order import PackedOrder
    from kithara_ray.sft.tokens.formats import PromptAnswer
    from kithara_ray.sft.tokens.tokenize import RowTokenizer
    from kithara_ray.sharding.mesh import make_mesh
    from kithara_ray.train import step
    from kithara_ray.train.optimizer import KerasOptimizer

    block = RowTokenizer(BASE, PromptAnswer(), MAX_LEN)(pairs(), 0)
    rows = list(block.rows())
    trained = np.array([row.loss_mask.sum() for row in rows])
    share = trained.sum() / block.lengths.sum()
    predictions = 8 * -(-max(int(trained.max()), int(1.5 * share * MAX_LEN)) // 8)
    order = PackedOrder(
        lengths=block.lengths, trained=trained, seq_len=MAX_LEN, predictions=predictions, batch_rows=packs
    )
    filled = block.lengths.sum() / (order.steps_of(0) * packs * MAX_LEN)

    base = BaseCheckpoint.open(BASE)
    model = build(base.config, LoraConfig(r=RANK), make_mesh(), "float32", remat="dots")
    frozen = model.load(base)
    optimizer = KerasOptimizer(keras.optimizers.serialize(keras.optimizers.AdamW(1e-4)))
    state = step.initial_state(model, optimizer, model.initial_factors(0))

    def batch(number: int):
        chosen = order.batch(number)
        arrays = collate([[rows[i] for i in pack] for pack in chosen], MAX_LEN, predictions, 2)
        return arrays, int(block.lengths[np.concatenate(chosen)].sum())

    compiled = step.compile_step(model, optimizer, state, frozen, batch(0)[0])
    seconds, tokens = [], []
    for number in range(STEPS):
        mark = time.perf_counter()
        arrays, count = batch(number)
        state, metrics = compiled(state, frozen, arrays)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - mark)
        tokens.append(count)
    report(seconds, tokens, loss=loss, packing_efficiency=filled, peak_rss_mb=common.peak_rss_mb())


def trl(**how) -> None:
    import tempfile

    import datasets
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list([{"prompt": r["prompt"], "completion": r["answer"]} for r in pairs()])
    seconds, tokens = [], []

    class Timed(SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            mark = time.perf_counter()
            useful = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(inputs["input_ids"])
            loss = super().training_step(model, inputs, *args, **kwargs)
            seconds.append(time.perf_counter() - mark)
            tokens.append(int(useful.sum()))
            return loss

    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            out, max_steps=STEPS, learning_rate=1e-4, use_cpu=True, bf16=False, fp16=False, report_to=[],
            gradient_checkpointing=False, save_strategy="no", logging_steps=STEPS, disable_tqdm=True,
            **{"per_device_train_batch_size": ROWS, "max_length": MAX_LEN, **how},
        )  # fmt: skip
        trainer = Timed(
            AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32),
            args=config,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(BASE),
            peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"]),
        )
        mark = time.perf_counter()
        trainer.train()
        loop_s = time.perf_counter() - mark
    loss = next(row["train_loss"] for row in trainer.state.log_history if "train_loss" in row)
    report(seconds, tokens, mean_loss=loss, loop_s=loop_s, peak_rss_mb=common.peak_rss_mb())


CONTENDERS = {
    "ours": ("kithara_ray, packed", ours, {}),
    "padded": ("TRL, default collator", trl, {}),
    "padding_free": ("TRL, padding-free", trl, {"padding_free": True, "max_length": None}),
    "packed": ("TRL, packing", trl, {"packing": True, "per_device_train_batch_size": 1}),
}


def main() -> None:
    sys.path.insert(0, "examples")
    from smollm2 import write_smollm2

    write_smollm2(BASE)
    results = common.rounds(__file__, list(CONTENDERS), ROUNDS)
    table = ["| | useful tokens/s | a step, s | tokens a step | peak RSS MB |", "|---|---|---|---|---|"]
    for name, (label, *_) in CONTENDERS.items():
        columns = ("useful_tokens_per_s", "step_s", "tokens_a_step", "peak_rss_mb")
        table.append(f"| {label} | " + " | ".join(common.middle([r[c] for r in results[name]]) for c in columns) + " |")

    def over(name: str, what: str) -> float:
        return statistics.median(r[what] for r in results["ours"]) / statistics.median(r[what] for r in results[name])

    ratios = {f"speed over {name}": over(name, "useful_tokens_per_s") for name in CONTENDERS if name != "ours"}
    ratios |= {f"memory over {name}": over(name, "peak_rss_mb") for name in CONTENDERS if name != "ours"}
    table += ["", *(f"- {name}: {value:.2f}" for name, value in ratios.items())]
    table += [f"- packing efficiency: {results['ours'][0]['packing_efficiency']:.1%}"]
    common.write("sft", "make bench-sft", table, {"results": results, "ratios": ratios}, PACKAGES)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        main()
    else:
        _, contender, how = CONTENDERS[sys.argv[1]]
        contender(**how)
